"""The samples that the explorer measures accuracy on: a few at every move, all of them when it rests."""

from collections.abc import Iterator

import torch

from .. import _checks
from .._torch import batches

_WORK = 2e9  # multiply-accumulates between two looks at what the user wants: about a tenth of a second
_FEWEST, _MOST = 4, 500  # images at a time


def few(data: object, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return at most `n` samples as one pair: drawn from an image set, evenly spaced in a pair, else the first."""
    if n < 1:
        raise ValueError(f"subset must be at least 1, not {n!r}")
    if hasattr(data, "batch"):
        return data.batch(min(n, len(data)))
    if _checks.is_pair(data):
        inputs, targets = data
        places = torch.arange(min(n, len(targets))) * len(targets) // min(n, len(targets))
        return inputs[places.to(inputs.device)], targets[places.to(targets.device)]
    parts, seen = [], 0
    for part in batches(data):
        parts.append(part)
        seen += len(part[1])
        if seen >= n:
            break
    if not seen:
        raise ValueError("data holds no sample")
    inputs, targets = (torch.cat(tensors) for tensors in zip(*parts))
    return inputs[:n], targets[:n]


def images_at_a_time(macs: int) -> int:
    """Return how many images to evaluate before the panel listens again, for a network of so many MACs an image."""
    return int(min(max(_WORK / max(macs, 1), _FEWEST), _MOST))


def pieces(data: object, n: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the samples of `data`, at most `n` at a time."""
    for inputs, targets in batches(data):
        yield from zip(inputs.split(n), targets.split(n))
