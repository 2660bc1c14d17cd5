"""What goes together: a granularity tiles each weight, and a tile is pruned or kept as a whole.

A granularity of tiles says the shape of one tile in `tile(shape)`. `NofM` is no tiling: it keeps the best N of every M.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from .._checks import unknown
from .ranking import Ranking, rank
from .selection import Selection, n_each_true, select, select_n_of_m

Tensors = Mapping[str, torch.Tensor]
Shape = tuple[int, ...]


class Granularity(Protocol):
    """What `prune` asks of a granularity."""

    def tile(self, shape: Shape) -> Shape:
        """Return the shape of one unit of a weight (out, in, *kernel)."""

    def check(self, weights: Tensors) -> None:
        """Raise ValueError if a weight's shape does not fit."""

    def fixed_sparsity(self) -> float | None:
        """Return the sparsity if the granularity itself fixes it."""

    def select(self, scores: Tensors, k: int, alive: Tensors, normalize: bool = True, transform=None) -> Selection:
        """Prune the lowest units until `k` weights are pruned in all, those that `alive` says are gone included."""

    def rank(self, scores: Tensors, alive: Tensors, normalize: bool = True):
        """Return what gives the masks of any `k` later, as a `Ranking` does."""


GRANULARITIES: dict[str, "Granularity"] = {}


def granularity(kind: type) -> type:
    """Register a granularity under the lower-case name of its class.

    Args:
        kind: A subclass of `pu.Tiles` that can be made without arguments.

    Returns:
        The same class.

    Example:
        >>> @pu.granularity
        ... class Row(pu.Tiles):
        ...     def tile(self, shape):
        ...         return (1, 1, 1, shape[3]) if len(shape) == 4 else (1, 1)
        >>> model = pu.models.create("lenet5")
        >>> masks = pu.prune(model, sparsity=0.5, granularity="row")
        >>> sorted(set(masks["conv2.weight"].sum(-1).flatten().tolist()))  # rows of five, whole or gone
        [0, 5]
    """
    GRANULARITIES[kind.__name__.lower()] = kind()
    return kind


@dataclass(frozen=True)
class Tiles:
    """A granularity that prunes whole tiles: subclass it and say the shape of one tile.

    Tiles at the edge of a weight that the shape does not divide are smaller. A tile scores the mean of its entries, or
    with `normalize=False` their sum.
    """

    def tile(self, shape: Shape) -> Shape:
        """Return the shape of one tile.

        Args:
            shape: The shape of a weight, (out, in, *kernel).

        Returns:
            As many numbers; a tile spans so many entries along each dimension.
        """
        raise NotImplementedError

    def check(self, weights: Tensors) -> None:
        for name, weight in weights.items():
            tile = self.tile(tuple(weight.shape))
            if len(tile) != weight.ndim or min(tile) < 1:
                raise ValueError(f"{self!r}: {tile} is no tile of {name} with the shape {tuple(weight.shape)}")

    def fixed_sparsity(self) -> float | None:
        return None

    def select(self, scores: Tensors, k: int, alive: Tensors, normalize: bool = True, transform=None) -> Selection:
        ranking = self.rank(scores, alive, normalize)
        n_units = ranking.cut(k)
        keep = {name: mask.to(scores[name].device) for name, mask in ranking.masks(n_units).items()}
        keep = {name: mask & alive[name] if name in alive else mask.contiguous() for name, mask in keep.items()}
        return Selection(keep, ranking.ties(n_units))

    def rank(self, scores: Tensors, alive: Tensors, normalize: bool = True) -> Ranking:
        units, sizes, expand = {}, {}, {}
        for name, score in scores.items():
            tile = self.tile(tuple(score.shape))
            mask = alive.get(name, torch.ones_like(score, dtype=torch.bool))
            # Sums in float64 hardly ever differ when they are taken in another order, as on a GPU.
            units[name] = tile_sums(score.double() * mask, tile)
            sizes[name] = tile_sums(mask, tile)
            if normalize:
                units[name] /= tile_sums(torch.ones_like(mask), tile)
            expand[name] = _expander(tile, tuple(score.shape))
        return rank(units, sizes, expand, n_pruned(alive))

    def scores(self, score: torch.Tensor, alive: torch.Tensor | None, normalize: bool) -> torch.Tensor:
        """Score each tile, and give every entry of the weight the score of its tile."""
        tile = self.tile(tuple(score.shape))
        values = tile_sums(score.double() if alive is None else score.double() * alive, tile)
        if normalize:
            values = values / tile_sums(torch.ones_like(score, dtype=torch.bool), tile)
        return _expander(tile, tuple(score.shape))(values)


@granularity
@dataclass(frozen=True)
class Weight(Tiles):
    """Single weights."""

    def tile(self, shape: Shape) -> Shape:
        return (1,) * len(shape)

    def select(self, scores: Tensors, k: int, alive: Tensors, normalize: bool = True, transform=None) -> Selection:
        return select(scores, k - n_pruned(alive), alive, transform)

    def scores(self, score: torch.Tensor, alive: torch.Tensor | None, normalize: bool) -> torch.Tensor:
        return score

    def rank(self, scores: Tensors, alive: Tensors, normalize: bool = True) -> Ranking:
        dtype = torch.float64 if any(score.dtype == torch.float64 for score in scores.values()) else torch.float32
        units = {name: score.to(dtype) for name, score in scores.items()}
        sizes = {
            name: alive.get(name, torch.ones((), dtype=torch.bool, device=score.device)).expand(score.shape)
            for name, score in scores.items()
        }
        return rank(units, sizes, n_gone=n_pruned(alive))


@granularity
@dataclass(frozen=True)
class Kernel(Tiles):
    """The k x k weights between one input and one output channel; a single weight in a linear layer."""

    def tile(self, shape: Shape) -> Shape:
        return (1, 1, *shape[2:])


@granularity
@dataclass(frozen=True)
class Filter(Tiles):
    """All weights of one output channel or feature (Li et al. 2017)."""

    def tile(self, shape: Shape) -> Shape:
        return (1, *shape[1:])


@dataclass(frozen=True)
class Block(Tiles):
    """Blocks of neighbouring outputs and inputs, at the same place in the kernel (Gray et al. 2017).

    Attributes:
        outputs: How many consecutive outputs a block spans.
        inputs: How many consecutive inputs a block spans.

    Example:
        >>> model = pu.models.create("lenet300")
        >>> masks = pu.prune(model, sparsity=0.9, granularity=pu.Block(4, 4))
        >>> blocks = masks["fc1.weight"].view(75, 4, 196, 4).sum((1, 3))
        >>> sorted(set(blocks.flatten().tolist()))
        [0, 16]
    """

    outputs: int
    inputs: int

    def __post_init__(self) -> None:
        if not all(isinstance(size, int) and size >= 1 for size in (self.outputs, self.inputs)):
            raise ValueError(f"a block spans whole numbers of at least 1, not {self.outputs!r} and {self.inputs!r}")

    def tile(self, shape: Shape) -> Shape:
        return (self.outputs, self.inputs, *(1,) * (len(shape) - 2))


@dataclass(frozen=True)
class NofM:
    """Keep the best N of every M consecutive inputs, at the same output and place in the kernel (Mishra et al. 2021).

    Attributes:
        n: How many are kept.
        m: Out of how many.

    Example:
        >>> model = pu.models.create("lenet300")
        >>> pu.prune(model, granularity=pu.NofM(2, 4)).sparsity  # the same as granularity="2:4"
        0.5
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not (isinstance(self.n, int) and isinstance(self.m, int) and 0 < self.n <= self.m):
            raise ValueError(f"{self.n!r}:{self.m!r} is not N:M with whole numbers 0 < N <= M, such as 2:4")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def tile(self, shape: Shape) -> Shape:
        return (1,) * len(shape)

    def check(self, weights: Tensors) -> None:
        inputs = {name: weight.shape[1] if weight.ndim > 1 else 1 for name, weight in weights.items()}
        odd = [f"{name} ({n} inputs)" for name, n in inputs.items() if n % self.m]
        if odd:
            raise ValueError(f"{self} needs inputs in multiples of {self.m}; exclude {', '.join(odd)}")

    def fixed_sparsity(self) -> float:
        return 1 - self.n / self.m

    def select(self, scores: Tensors, k: int, alive: Tensors, normalize: bool = True, transform=None) -> Selection:
        return select_n_of_m(scores, self.n, self.m, alive)

    def rank(self, scores: Tensors, alive: Tensors, normalize: bool = True) -> "_Fixed":
        return _Fixed(self.select(scores, 0, alive))


@dataclass(frozen=True)
class _Fixed:
    """What N:M leaves, in the manner of a Ranking: there is nothing to choose."""

    selection: Selection

    def cut(self, k: int) -> int:
        return k

    def masks(self, n_units: int) -> dict[str, torch.Tensor]:
        return self.selection.keep

    def ties(self, n_units: int) -> dict[str, int]:
        return self.selection.ties


def find(granularity: "str | Granularity") -> Granularity:
    """Return a granularity by its name, "N:M" included, or as it is; ValueError for an unknown name."""
    if not isinstance(granularity, str):
        known = all(hasattr(granularity, name) for name in ("tile", "check", "select", "rank"))
        if known and not isinstance(granularity, type):
            return granularity
        raise TypeError(f"a granularity is a name or an object such as pu.Block(4, 4), not {granularity!r}")
    n, colon, m = granularity.partition(":")
    if colon:
        if not (n.isdecimal() and m.isdecimal() and 0 < int(n) <= int(m)):
            raise ValueError(f"granularity {granularity!r} is not N:M with whole numbers 0 < N <= M, such as 2:4")
        return NofM(int(n), int(m))
    if granularity not in GRANULARITIES:
        raise unknown("granularity", granularity, [*GRANULARITIES, "N:M"])
    return GRANULARITIES[granularity]


def n_pruned(masks: Tensors) -> int:
    """Count the False entries of all masks."""
    return sum(mask.numel() for mask in masks.values()) - sum(n_each_true(masks.values()))


def units_of(shape: Shape, tile: Shape) -> Shape:
    """Return how many tiles lie along each dimension of a weight."""
    return tuple(-(-size // span) for size, span in zip(shape, tile))


def tile_sums(values: torch.Tensor, tile: Shape) -> torch.Tensor:
    """Sum the entries of each tile; the result has one entry a tile, in the shape of `units_of`."""
    whole = [span in (1, size) for size, span in zip(values.shape, tile)]
    if all(whole):  # nothing to divide: a dimension is spanned or it is not
        spanned = [dim for dim, (size, span) in enumerate(zip(values.shape, tile)) if span > 1 and size == span]
        if spanned:
            return values.sum(spanned, keepdim=True)
        return values.long() if values.dtype == torch.bool else values
    padding = [-size % span for size, span in zip(values.shape, tile)]
    values = F.pad(values, [pad for end in reversed(padding) for pad in (0, end)])
    units = units_of(tuple(values.shape), tile)
    split = values.reshape([number for pair in zip(units, tile) for number in pair])
    return split.sum(list(range(1, 2 * len(tile), 2)))


def spread(units: torch.Tensor, tile: Shape, shape: Shape) -> torch.Tensor:
    """Give each entry of a weight what its tile has: the inverse of `tile_sums` for masks and scores."""
    for dim, (size, span) in enumerate(zip(shape, tile)):
        if span not in (1, size):
            units = units.repeat_interleave(span, dim).narrow(dim, 0, size)
    return units.expand(shape)


def _expander(tile: Shape, shape: Shape) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda units: spread(units, tile, shape)
