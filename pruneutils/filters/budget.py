"""In which order the units of a network go, and how many, until enough filters, parameters or MACs are gone."""

import bisect
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from .._torch import Inputs, hooked
from ..costs import _count_macs
from ..target import Target
from .slicing import Key, kind_of_attention, tensor_cuts
from .surgery import Group

QUANTITIES = ("filters", "parameters", "macs")
_NEVER = np.iinfo(np.int64).max  # the place of a unit that never goes


@dataclass(frozen=True)
class Order:
    """All units from the least important on, as the place in that order of what belongs to them."""

    n_units: int  # those that may go
    channels: dict[Key, np.ndarray]  # of each channel of a layer and role
    filters: np.ndarray  # of each filter

    def only(self, group: Group) -> "Order":
        """Return the same order, in which nothing but the units of this group ever goes."""
        channels = {key: np.where(units < 0, _NEVER, self.channels[key]) for key, units in group.channels.items()}
        return dataclasses.replace(self, channels=channels)

    def kept(self, n_units: int) -> dict[Key, torch.Tensor]:
        """Return {(layer, role): indices of what stays} once the first `n_units` are gone, where something goes."""
        masks = {key: places >= n_units for key, places in self.channels.items()}
        return {key: torch.from_numpy(np.flatnonzero(mask)) for key, mask in masks.items() if not mask.all()}


class Budget:
    """How much is left of a quantity once the first units of an order are gone, from what each tensor has part in."""

    def __init__(self, target: Target, order: Order, of: str, inputs: Inputs):
        self._target, self._order, self._of, self._inputs = target, order, of, inputs
        self._shapes = {name: p.shape for name, p in target.model.named_parameters()}
        self._amounts = [(shape.numel(), name) for name, shape in self._shapes.items()]
        if of == "macs":
            self._amounts = _macs(target, inputs)

    def left(self, n_units: int) -> int:
        """Return what is left once the first `n_units` are gone."""
        if self._of == "filters":
            return int((self._order.filters >= n_units).sum())
        cuts, total = tensor_cuts(self._target.modules, self._order.kept(n_units)), 0
        for amount, name in self._amounts:
            for dim, index in cuts.get(name, ()):
                amount = amount * len(index) // self._shapes[name][dim]
            total += amount
        return total

    def measured(self, n_units: int) -> int:
        """Return what is left now that they are gone: filters that are called in unusual ways cost something else."""
        if self._of == "parameters":
            return sum(p.numel() for p in self._target.model.parameters())
        return self.left(n_units) if self._of == "filters" else sum(n for n, _ in _macs(self._target, self._inputs))

    def step(self, n_units: int) -> int:
        """Return how much the last unit before, or the first one after this place takes with it, whichever is more."""
        left = [self.left(n) for n in range(max(0, n_units - 1), min(n_units + 1, self._order.n_units) + 1)]
        return max((more - less for more, less in zip(left, left[1:])), default=0)

    def nearest(self, wanted: float) -> int:
        """Return how many units have to go so that what is left is as near to `wanted` as whole units allow."""
        n_units = bisect.bisect_left(range(self._order.n_units), -wanted, key=lambda n: -self.left(n))
        return min((max(0, n_units - 1), n_units), key=lambda n: abs(self.left(n) - wanted))


def _macs(target, inputs) -> list[tuple[int, str]]:
    """MACs of one input as `cost` counts them, each with the tensor whose size they depend on, "" for none."""
    attention = {module: name for name, module in target.modules.items() if kind_of_attention(module)}
    amounts = []

    def note(module, args):
        is_torch, width = kind_of_attention(module) == "torch", module.num_heads * module.head_dim
        query, key = args[0], args[1] if is_torch else args[0]
        sequences = 1 if query.ndim == 2 else query.shape[0 if getattr(module, "batch_first", True) else 1]
        rows, columns = (each.numel() // each.shape[-1] for each in (query, key))  # of all sequences, such as windows
        tensor = f"{attention[module]}.{'in_proj_weight' if is_torch else 'proj.weight'}".lstrip(".")
        amounts.append((2 * rows * columns // sequences * width, tensor))

    with hooked(attention, note):
        _, products = _count_macs(target.model, inputs)
    amounts += [(n, name) for name, n in products.dense_of.items()]
    amounts += [(n, name.removesuffix("weight") + "bias") for name, n in products.bias_of.items()]
    return [*amounts, (products.total + products.biases - sum(n for n, _ in amounts), "")]


def order_units(groups: list[Group], scores: Mapping[str, torch.Tensor], staying: Mapping[str, int]) -> Order:
    """Order all units by the mean score of their filters, ties by position; the best of each group never go."""
    means = [_mean_scores(group, scores) for group in groups]
    starts = np.cumsum([0, *map(len, means)])
    n_staying = [max(staying[layer] for layer in group.layers) for group in groups]
    stays = [start + np.argsort(mean, kind="stable")[-n:] for start, mean, n in zip(starts, means, n_staying)]
    score = np.concatenate(means)
    may_go = np.setdiff1d(np.arange(len(score)), np.concatenate(stays))
    place = np.full(len(score) + 1, _NEVER)  # the last is that of channels without a unit
    place[may_go[np.argsort(score[may_go], kind="stable")]] = np.arange(len(may_go))
    channels, filters = {}, []
    for start, group in zip(starts, groups):
        for key, units in group.channels.items():
            places = place[np.where(units < 0, -1, start + units)]
            channels[key] = np.minimum(channels.get(key, places), places)
        filters += [place[start + units] for units in group.filters.values()]
    return Order(len(may_go), channels, np.concatenate(filters))


def _mean_scores(group, scores) -> np.ndarray:
    """The score of each unit."""
    known = [(units, scores[name].double().cpu().numpy()) for name, units in group.filters.items() if name in scores]
    if not known:
        raise ValueError(f"the criterion gives no scores for {', '.join(group.layers)}; exclude these layers")
    units, scores = map(np.concatenate, zip(*known))
    return np.bincount(units, scores) / np.bincount(units)
