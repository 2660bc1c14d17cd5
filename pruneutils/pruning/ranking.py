"""Units sorted once, so that every mask after that is one comparison: for units of many weights, and for sliders.

The masks of single weights are those of `selection`, to the bit. Sorting costs more than one selection, so it pays
where many selections follow.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Ranking:
    """The order in which the weights (kernels, filters) of one competition go, so that a mask is one comparison."""

    shapes: dict[str, tuple[int, ...]]  # by name: how many units lie along each dimension
    ranks: torch.Tensor  # (units,) int32: position in the stable sort of all scores, what is pruned already first
    values: torch.Tensor  # (units,) scores in that order
    sizes: torch.Tensor  # (units,) int32: weights that are alive in each unit
    removed: torch.Tensor  # (units,) weights that are removed with a unit and all before it
    expand: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]  # by name: from a unit mask to the weight's mask
    n_gone: int  # weights that were pruned already

    @cached_property
    def last(self) -> list[int]:
        """The position of the last unit of each weight: it is empty where more units than that go."""
        parts = self.ranks.split([torch.Size(shape).numel() for shape in self.shapes.values()])
        return [int(part.max()) for part in parts]

    def cut(self, k: int) -> int:
        """Compute how many units go so that the number of weights pruned in all is nearest to `k`."""
        k -= self.n_gone
        n_units = int(torch.searchsorted(self.removed, k, right=True))  # the most units that remove no more than k
        if n_units < len(self.removed):
            less = int(self.removed[n_units - 1]) if n_units else 0
            n_units += int(self.removed[n_units]) - k < k - less
        return n_units

    def masks(self, n_units: int) -> dict[str, torch.Tensor]:
        """Return {name: bool mask of the weight}, True = kept, where the `n_units` lowest go."""
        parts = (self.ranks >= n_units).split([torch.Size(shape).numel() for shape in self.shapes.values()])
        units = {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts)}
        return {name: self.expand[name](unit) if name in self.expand else unit for name, unit in units.items()}

    def ties(self, n_units: int) -> dict[str, int]:
        """Count by name the weights that score as much as the one at the cut, if the cut parts such ties."""
        if not 0 < n_units < len(self.values) or self.values[n_units - 1] != self.values[n_units]:
            return {}
        score = self.values[n_units]
        low, high = (int(torch.searchsorted(self.values, score, right=right)) for right in (False, True))
        tied = self.sizes * ((self.ranks >= low) & (self.ranks < high))
        parts = tied.split([torch.Size(shape).numel() for shape in self.shapes.values()])
        return {name: n for name, part in zip(self.shapes, parts) if (n := int(part.sum()))}


def rank(
    units: Mapping[str, torch.Tensor],
    sizes: Mapping[str, torch.Tensor],
    expand: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    n_gone: int = 0,
) -> Ranking:
    """Sort units once, so that every later selection among them is a comparison.

    Args:
        units: {name: scores of the units, in any shape}.
        sizes: {name: how many weights each unit would lose, in the same shape}; units that have lost all go first.
        expand: {name: function from a unit mask to the mask of the weight}; by default they are the same.
        n_gone: How many weights are pruned already.

    Returns:
        The ranking.
    """
    device = next(iter(units.values())).device
    shapes = {name: tuple(unit.shape) for name, unit in units.items()}
    counts = torch.cat([sizes[name].flatten().to(device, torch.int32) for name in units])
    values = torch.cat([unit.flatten().to(device) for unit in units.values()])
    values[counts == 0] = -torch.inf
    values, order = values.sort(stable=True)
    ranks = torch.empty_like(counts)
    ranks[order] = torch.arange(len(order), dtype=torch.int32, device=device)
    return Ranking(shapes, ranks, values, counts, counts[order].cumsum(0), expand or {}, n_gone)
