"""How much of a network is left after its least important units are gone: filters, parameters or MACs, in closed form.

Each quantity is a sum of terms: an amount, times the fraction that is kept of each layer and role it depends on. The
weight of a convolution depends on its own filters and on the channels it reads; a product of attention, on the heads.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from .._checks import one_of
from ..costs import _count_macs
from ..model_utils import prunable_weights
from ._slicing import cuts_of, kind_of_attention, size_of
from ._surgery import Group

QUANTITIES = ("filters", "parameters", "macs")
Key = tuple[str, str]  # a layer and a role


@dataclass(frozen=True)
class Term:
    amount: int
    keys: tuple[Key, ...]


def terms_of(model: nn.Module, groups: list[Group], of: str, inputs: torch.Tensor) -> list[Term]:
    """Return the terms of a quantity of a model; those of the filters are over the filters that may go."""
    one_of("of", of, QUANTITIES)
    keys = {(part.layer, part.role) for group in groups for part in group.parts}
    if of == "filters":
        parts = {part.layer: part.role for group in groups for part in group.parts if part.role != "in"}
        return [
            Term(len(rows), ((layer, parts[layer]),))
            for group in groups
            for (_, rows, _), layer in zip(group.filters, group.layers)
        ]
    cutting: dict[str, list[Key]] = {}
    for layer, role in sorted(keys):
        module = model.get_submodule(layer)
        nothing = torch.arange(0)
        for name, _, _ in cuts_of(module, role, nothing, size_of(module, role)):
            cutting.setdefault(f"{layer}.{name}" if layer else name, []).append((layer, role))
    if of == "parameters":
        return [Term(p.numel(), tuple(cutting.get(name, ()))) for name, p in model.named_parameters()]
    return _mac_terms(model, cutting, inputs)


def _mac_terms(model, cutting, inputs) -> list[Term]:
    """MACs of one input as `cost` counts them: layers, their biases, attention, and the rest, which nothing changes."""
    _, products = _count_macs(model, inputs)
    weights, terms, rest = prunable_weights(model), [], products.total + products.biases
    for name in weights:
        terms.append(Term(products.dense_of[name], tuple(cutting.get(name, ()))))
        terms.append(Term(products.bias_of[name], tuple(cutting.get(f"{name.removesuffix('weight')}bias", ()))))
    heads = {layer for keys in cutting.values() for layer, role in keys if role == "heads"}
    for layer in heads:
        module = model.get_submodule(layer)
        width, torch_own = module.num_heads * module.head_dim, kind_of_attention(module) == "torch"
        name = f"{layer}.out_proj.weight" if torch_own else f"{layer}.qkv.weight"
        tokens = products.dense_of[name] // weights[name].numel()
        terms.append(Term(2 * tokens * tokens * width, ((layer, "heads"),)))
        if torch_own and f"{layer}.in_proj_weight" not in weights:  # the user has said that it is not prunable
            terms.append(Term(tokens * module.in_proj_weight.numel(), ((layer, "heads"),)))
    return [*terms, Term(rest - sum(term.amount for term in terms), ())]


@dataclass(frozen=True)
class Order:
    """All units from the least important on, and which of them every layer's channels belong to."""

    units: list[tuple[int, int]]  # (group, unit), those that may go, lowest score first
    ranks: dict[Key, np.ndarray]  # for each channel of a layer and role, the place of its unit in that order
    sizes: dict[Key, int]

    def kept(self, n_units: int) -> dict[Key, torch.Tensor]:
        """Return {(layer, role): indices of what stays} once the first `n_units` are gone, where something goes."""
        masks = {key: ranks >= n_units for key, ranks in self.ranks.items()}
        return {key: torch.from_numpy(np.flatnonzero(mask)) for key, mask in masks.items() if not mask.all()}

    def amount(self, terms: list[Term], n_units: int) -> int:
        """Return what is left of a quantity once the first `n_units` are gone."""
        total, left = 0, {}
        for term in terms:
            amount = term.amount
            for key in term.keys:
                if key in self.ranks:
                    if key not in left:
                        left[key] = int(np.count_nonzero(self.ranks[key] >= n_units))
                    amount = amount * left[key] // self.sizes[key]
            total += amount
        return total

    def cut(self, terms: list[Term], target: float) -> int:
        """Return how many units have to go so that what is left is as near to `target` as whole units allow."""
        low, high = 0, len(self.units)
        while low < high:  # the least number of units after which no more than the target is left
            middle = (low + high) // 2
            if self.amount(terms, middle) <= target:
                high = middle
            else:
                low = middle + 1
        if low > 0 and self.amount(terms, low - 1) - target <= target - self.amount(terms, low):
            return low - 1
        return low


def staying_units(groups: list[Group], min_density: float) -> dict[str, int]:
    """Return how many units stay in any case, for each layer."""
    counts = {layer: group.n_units for group in groups for layer in group.layers}
    return {layer: max(1, math.ceil(round(min_density * n_units, 9))) for layer, n_units in counts.items()}


def order_units(
    model: nn.Module, groups: list[Group], scores: dict[str, torch.Tensor], staying: Mapping[str, int]
) -> Order:
    """Order all units by their scores, the mean over the filters of each; the best of each group, `staying`, never go.

    Ties go by position: of equal units, the first goes first. Raises ValueError where no filter of a group has a score.
    """
    means = []
    for group in groups:
        sums, counts = np.zeros(group.n_units), np.zeros(group.n_units)
        for name, rows, unit in group.filters:
            if name in scores:
                np.add.at(sums, unit, scores[name].double().cpu().numpy()[rows])
                np.add.at(counts, unit, 1)
        if not counts.all():
            raise ValueError(f"the importance gives no scores for {', '.join(group.layers)}; exclude these layers")
        means.append(sums / counts)
    score = np.concatenate(means)
    group_of = np.repeat(np.arange(len(groups)), [group.n_units for group in groups])
    unit_of = np.concatenate([np.arange(group.n_units) for group in groups])
    starts = np.cumsum([0, *(group.n_units for group in groups)])
    # A depthwise convolution of a single channel is an ordinary one, which was in no group before.
    n_staying = [max(staying.get(layer, 1) for layer in group.layers) for group in groups]
    stays = [start + np.argsort(mean, kind="stable")[-n:] for start, mean, n in zip(starts, means, n_staying)]
    may_go = np.setdiff1d(np.arange(len(score)), np.concatenate(stays))
    order = may_go[np.argsort(score[may_go], kind="stable")]
    rank = np.full(len(score), np.iinfo(np.int64).max)
    rank[order] = np.arange(len(order))
    ranks, sizes = {}, {}
    for start, group in zip(starts, groups):
        for part in group.parts:
            key = part.layer, part.role
            if key not in ranks:
                sizes[key] = size_of(model.get_submodule(part.layer), part.role)
                ranks[key] = np.full(sizes[key], np.iinfo(np.int64).max)
            ranks[key][part.index] = np.minimum(ranks[key][part.index], rank[start + part.unit])
    return Order([(int(group_of[i]), int(unit_of[i])) for i in order], ranks, sizes)
