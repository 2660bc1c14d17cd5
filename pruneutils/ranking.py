"""Selection for sliders: the weights are sorted once, and every mask after that is one comparison.

The masks are those of `selection`, to the bit; sorting costs more than one selection, so this pays where many follow.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .selection import Selection, unit_scores


@dataclass(frozen=True)
class Ranking:
    """The order in which the weights (kernels, filters) of one competition go, so that a mask is one comparison."""

    shapes: dict[str, tuple[int, ...]]  # by name: of the units, 1 where a unit spans a dimension
    ranks: torch.Tensor  # (units,) int32: place in the stable sort of all scores, what is pruned already first
    values: torch.Tensor  # (units,) scores in that order
    sizes: torch.Tensor  # (units,) int32: weights that are alive in each unit
    taken: torch.Tensor | None  # (units,) weights gone when a unit and all before it are; None: one a unit
    dead: int  # weights that were pruned already

    def cut(self, k: int) -> int:
        """How many units go when `k` weights are to be pruned in all, as `selection` decides it."""
        if self.taken is None:
            return k
        k -= self.dead
        going = int(torch.searchsorted(self.taken, k, right=True))
        if going < len(self.taken):
            less = int(self.taken[going - 1]) if going else 0
            going += int(self.taken[going]) - k < k - less
        return going

    def masks(self, going: int) -> dict[str, torch.Tensor]:
        """The unit masks, True = kept, by name and in the units' shape."""
        parts = (self.ranks >= going).split([torch.Size(shape).numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts)}

    def ties(self, going: int) -> dict[str, int]:
        """By name, how many weights score as much as the one at the cut, if the cut parts such ties."""
        if not 0 < going < len(self.values) or self.values[going - 1] != self.values[going]:
            return {}
        score = self.values[going]
        low, high = (int(torch.searchsorted(self.values, score, right=right)) for right in (False, True))
        tied = self.sizes * ((self.ranks >= low) & (self.ranks < high))
        parts = tied.split([torch.Size(shape).numel() for shape in self.shapes.values()])
        return {name: n for name, part in zip(self.shapes, parts) if (n := int(part.sum()))}


def rank(scores: Mapping[str, torch.Tensor], granularity: str, alive: Mapping[str, torch.Tensor]) -> Ranking:
    """Sort the units of `scores` {name: tensor} once, so that every selection of k out of them is a comparison.

    `granularity` is "weight", "kernel" or "filter". What `alive` (bool tensors by name, missing ones all True) says is
    pruned already goes first.
    """
    first = next(iter(scores.values()))
    if granularity == "weight":
        dtype = torch.float64 if any(s.dtype == torch.float64 for s in scores.values()) else torch.float32
        units = {name: s.to(dtype) for name, s in scores.items()}
    else:
        units = {name: unit_scores(s, granularity, alive.get(name), normalize=True) for name, s in scores.items()}
    sizes = []
    for name, s in scores.items():
        mask = alive.get(name, torch.ones((), dtype=torch.bool, device=s.device)).expand(s.shape)
        spanned = [dim for dim, size in enumerate(units[name].shape) if size != s.shape[dim]]
        sizes.append((mask.sum(spanned) if spanned else mask).flatten().to(first.device, torch.int32))
    sizes = torch.cat(sizes)
    values = torch.cat([unit.flatten().to(first.device) for unit in units.values()])
    values[sizes == 0] = -torch.inf
    values, order = values.sort(stable=True)
    ranks = torch.empty_like(sizes)
    ranks[order] = torch.arange(len(order), dtype=torch.int32, device=first.device)
    dead = sum(s.numel() for s in scores.values()) - int(sizes.sum())
    taken = None if granularity == "weight" else sizes[order].cumsum(0)
    return Ranking({name: tuple(u.shape) for name, u in units.items()}, ranks, values, sizes, taken, dead)


@dataclass(frozen=True)
class Blocks:
    """What N:M leaves, in the manner of a Ranking: there is nothing to choose."""

    selection: Selection

    def cut(self, k: int) -> int:
        return k

    def masks(self, going: int) -> dict[str, torch.Tensor]:
        return self.selection.keep

    def ties(self, going: int) -> dict[str, int]:
        return self.selection.ties
