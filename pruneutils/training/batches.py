"""The shuffled batches of an epoch, from a data set, a pair of tensors or anything that can be iterated again."""

from collections.abc import Callable, Iterable

import torch

from .. import _checks
from .._torch import batches


def epochs_of(train: object, batch_size: int, seed: int) -> tuple[Callable[[], Iterable], int]:
    """Return a function that starts a new epoch of shuffled batches, and the number of batches of an epoch."""
    batch_size = _checks.whole("batch_size", batch_size)
    _checks.some_data("train", train)
    generator = torch.Generator().manual_seed(seed)
    if hasattr(train, "batches"):
        start, n = lambda: train.batches(batch_size, generator=generator), -(-len(train) // batch_size)
    elif _checks.is_pair(train):
        if len(train[0]) != len(train[1]):
            raise ValueError(f"train holds inputs of {len(train[0]):,} samples, and targets of {len(train[1]):,}")
        start, n = lambda: _shuffled(*train, batch_size, generator), -(-len(train[1]) // batch_size)
    else:
        try:
            start, n = lambda: batches(iter(train)), len(train)
        except TypeError as error:  # an iterator has no length, and a DataLoader only if its data set has one
            raise TypeError(f"train must be re-iterable and have a length, not {type(train).__name__}") from error
    if n == 0:
        raise ValueError("train holds no sample")
    return start, n


def _shuffled(inputs, targets, batch_size, generator):
    for chosen in torch.randperm(len(targets), generator=generator).split(batch_size):
        chosen = chosen.to(targets.device)
        yield inputs[chosen], targets[chosen]
