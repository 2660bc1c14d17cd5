"""The shuffled batches of an epoch, from a data set, a pair of tensors or anything that can be iterated again."""

from collections.abc import Callable, Iterable, Iterator

import torch

from .. import _checks
from .._torch import batches

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


def epochs_of(train: object, batch_size: int, seed: int) -> tuple[Callable[[], Batches], int]:
    """Return a function that starts a new epoch of shuffled batches, and the number of batches of an epoch."""
    batch_size = _checks.whole("batch_size", batch_size)
    if train is not None:
        _checks.some_data("train", train)
    generator = torch.Generator().manual_seed(seed)
    if hasattr(train, "batches"):
        start, n = lambda: train.batches(batch_size, generator=generator), -(-len(train) // batch_size)
    elif _checks.is_pair(train):
        if len(train[0]) != len(train[1]):
            raise ValueError(f"train holds inputs of {len(train[0]):,} samples, and targets of {len(train[1]):,}")
        start, n = lambda: _shuffled(*train, batch_size, generator), -(-len(train[1]) // batch_size)
    else:
        start, n = lambda: batches(iter(train)), _length(train)
    if n == 0:
        raise ValueError("train holds no sample")
    return start, n


def _shuffled(inputs, targets, batch_size, generator):
    for chosen in torch.randperm(len(targets), generator=generator).split(batch_size):
        chosen = chosen.to(targets.device)
        yield inputs[chosen], targets[chosen]


def _length(train) -> int:
    try:
        if not isinstance(train, Iterator):
            return len(train)
    except TypeError:  # a DataLoader has a length only if its data set has one
        pass
    raise TypeError(
        "train must be re-iterable and have a length: a data set, a pair of tensors, or a DataLoader; not "
        f"{type(train).__name__}"
    )
