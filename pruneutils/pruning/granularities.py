"""What goes together: a granularity tiles each weight, or keeps the best N of every M inputs."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .._checks import one_of
from .selection import Selection, n_each_true, select, select_n_of_m, select_units

Tensors = Mapping[str, torch.Tensor]
Shape = tuple[int, ...]
GRANULARITIES: dict[str, "Tiles"] = {}


def granularity(kind: type) -> type:
    """Register a granularity under the lower-case name of its class.

    Args:
        kind: A subclass of `pu.pruning.Tiles` that can be made without arguments.

    Returns:
        The same class.

    Example:
        >>> @pu.pruning.granularity
        ... class Row(pu.pruning.Tiles):
        ...     def tile(self, shape):
        ...         return (1, *shape[1:])
        >>> pu.prune(pu.models.create("lenet300"), sparsity=0.5, granularity="row")["fc1.weight"].sum(1).unique()
        tensor([  0, 784])
    """
    GRANULARITIES[kind.__name__.lower()] = kind()
    return kind


@dataclass(frozen=True)
class Tiles:
    """A granularity that prunes whole tiles: subclass it and say the shape of one; those at an edge may be smaller."""

    def tile(self, shape: Shape) -> Shape:
        """Return the shape of one tile: how many entries it spans along each dimension of a (out, in, *kernel)."""
        raise NotImplementedError

    def check(self, weights: Tensors) -> None:
        """Raise ValueError if a weight's shape does not fit."""
        for name, weight in weights.items():
            tile = self.tile(tuple(weight.shape))
            if len(tile) != weight.ndim or min(tile) < 1:
                raise ValueError(f"{self!r}: {tile} is no tile of {name} with the shape {tuple(weight.shape)}")

    def fixed_sparsity(self) -> float | None:
        """Return the sparsity if the granularity itself fixes it."""
        return None

    def select(self, scores: Tensors, k: int, alive: Tensors, normalize: bool = True, transform=None) -> Selection:
        """Prune the lowest tiles until `k` weights are pruned in all, those included that `alive` says are gone."""
        units, sizes, keep = {}, {}, {}
        for name, score in scores.items():
            mask = alive[name] if name in alive else torch.ones_like(score, dtype=torch.bool)
            units[name] = self._units(score, alive.get(name), normalize)
            sizes[name] = tile_sums(mask, self.tile(tuple(score.shape)))
        found = select_units(units, sizes, k - n_pruned(alive))
        for name, score in scores.items():
            mask = spread(found.keep[name], self.tile(tuple(score.shape)), tuple(score.shape)).to(score.device)
            keep[name] = mask & alive[name] if name in alive else mask.contiguous()
        return Selection(keep, found.ties)

    def _units(self, score, alive, normalize) -> torch.Tensor:
        """The score of each tile. Sums in float64 hardly ever differ when taken in another order, as on a GPU."""
        tile = self.tile(tuple(score.shape))
        values = tile_sums(score.double() if alive is None else score.double() * alive, tile)
        return values / tile_sums(torch.ones_like(score, dtype=torch.bool), tile) if normalize else values

    def scores(self, score: torch.Tensor, alive: torch.Tensor | None, normalize: bool) -> torch.Tensor:
        """Give every entry of the weight the score of its tile."""
        shape = tuple(score.shape)
        return spread(self._units(score, alive, normalize), self.tile(shape), shape)


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
    """Blocks of so many neighbouring outputs and inputs, at the same place in the kernel (Gray et al. 2017).

    Example:
        >>> masks = pu.prune(pu.models.create("lenet300"), sparsity=0.9, granularity=pu.Block(4, 4))
        >>> sorted(set(masks["fc1.weight"].view(75, 4, 196, 4).sum((1, 3)).flatten().tolist()))
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

    Layers whose inputs are no multiple of M, such as depthwise ones, have to be excluded; an error names them.

    Example:
        >>> pu.prune(pu.models.create("lenet300"), granularity=pu.NofM(2, 4)).sparsity  # or granularity="2:4"
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


Granularity = Tiles | NofM  # or an object with the same methods


def find(granularity: str | Granularity) -> Granularity:
    """Return a granularity by its name, "N:M" included, or as it is; ValueError for an unknown name."""
    if not isinstance(granularity, str):
        if not isinstance(granularity, type) and all(hasattr(granularity, name) for name in ("tile", "select")):
            return granularity
        raise TypeError(f"a granularity is a name or an object such as pu.Block(4, 4), not {granularity!r}")
    if ":" in granularity:
        return NofM(*(int(n) if n.isdecimal() else n for n in granularity.split(":", 1)))
    return GRANULARITIES[one_of("granularity", granularity, GRANULARITIES)]


def n_pruned(masks: Tensors) -> int:
    """Count the False entries of all masks."""
    return sum(mask.numel() for mask in masks.values()) - sum(n_each_true(masks.values()))


def units_of(shape: Shape, tile: Shape) -> Shape:
    """Return how many tiles lie along each dimension of a weight."""
    return tuple(-(-size // span) for size, span in zip(shape, tile))


def tile_sums(values: torch.Tensor, tile: Shape) -> torch.Tensor:
    """Sum the entries of each tile; the result has one entry a tile, in the shape of `units_of`."""
    padding = [-size % span for size, span in zip(values.shape, tile)]
    if any(padding):
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
