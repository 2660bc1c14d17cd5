"""How much of a network is left after its least important units are gone: filters, parameters or MACs, in closed form.

Each quantity is a sum of terms: an amount, times the fraction that is kept of each layer and role it depends on. The
weight of a convolution depends on its own filters and on the channels it reads; a product of attention, on the heads.
"""

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..costs import _count_macs
from ..target import Modules, Target
from .slicing import Key, cuts_of, kind_of_attention, size_of
from .surgery import Group

QUANTITIES = ("filters", "parameters", "macs")
_NEVER = np.iinfo(np.int64).max  # the rank of a unit that never goes
Term = tuple[int, Sequence[Key]]  # an amount, and what it depends on


def terms_of(target: Target, groups: list[Group], of: str, inputs: torch.Tensor) -> list[Term]:
    """Return the terms of a quantity of a model; those of the filters are over the filters that may go."""
    if of == "filters":
        roles = {part.layer: part.role for group in groups for part in group.parts if part.role != "in"}
        filters = [each for group in groups for each in zip(group.layers, group.filters)]
        return [(len(rows), [(layer, roles[layer])]) for layer, (_, rows, _) in filters]
    cutting: dict[str, list[Key]] = {}
    for layer, role in sorted({(part.layer, part.role) for group in groups for part in group.parts}):
        module = target.modules[layer]
        for name, _, _ in cuts_of(module, role, torch.arange(0), size_of(module, role)):
            cutting.setdefault(f"{layer}.{name}".lstrip("."), []).append((layer, role))
    if of == "parameters":
        return [(p.numel(), cutting.get(name, ())) for name, p in target.model.named_parameters()]
    return _mac_terms(target, cutting, inputs)


def _mac_terms(target, cutting, inputs) -> list[Term]:
    """MACs of one input as `cost` counts them: layers, their biases, attention, and the rest, which nothing changes."""
    _, products = _count_macs(target.model, inputs)
    terms = [(amount, cutting.get(name, ())) for name, amount in products.dense_of.items()]
    biases = ((name.removesuffix("weight") + "bias", amount) for name, amount in products.bias_of.items())
    terms += [(amount, cutting.get(name, ())) for name, amount in biases]
    for layer in {layer for keys in cutting.values() for layer, role in keys if role == "heads"}:
        module = target.modules[layer]
        is_torch, width = kind_of_attention(module) == "torch", module.num_heads * module.head_dim
        name = f"{layer}.out_proj.weight" if is_torch else f"{layer}.qkv.weight"
        tokens = products.dense_of[name] // target.prunable[name].numel()
        terms.append((2 * tokens * tokens * width, [(layer, "heads")]))
        if is_torch and f"{layer}.in_proj_weight" not in target.prunable:  # made unprunable by the user
            terms.append((tokens * module.in_proj_weight.numel(), [(layer, "heads")]))
    return [*terms, (products.total + products.biases - sum(amount for amount, _ in terms), ())]


def measured(target: Target, of: str, inputs: torch.Tensor) -> int:
    """Count the parameters or MACs of a model as it is."""
    if of == "parameters":
        return sum(p.numel() for p in target.model.parameters())
    _, products = _count_macs(target.model, inputs)
    return products.total + products.biases


@dataclass(frozen=True)
class Order:
    """All units from the least important on, and which of them every layer's channels belong to."""

    n_units: int  # those that may go
    ranks: dict[Key, np.ndarray]  # for each channel of a layer and role, the place of its unit in that order
    sizes: dict[Key, int]
    terms: list[Term]  # of the quantity that a ratio is a fraction of

    def only(self, group: Group) -> "Order":
        """Return the same order, in which nothing but the units of this group ever goes."""
        ranks = {}
        for part in group.parts:
            key = part.layer, part.role
            ranks.setdefault(key, np.full(self.sizes[key], _NEVER))
            ranks[key][part.index] = self.ranks[key][part.index]
        return dataclasses.replace(self, ranks=ranks)

    def kept(self, n_units: int) -> dict[Key, torch.Tensor]:
        """Return {(layer, role): indices of what stays} once the first `n_units` are gone, where something goes."""
        masks = {key: ranks >= n_units for key, ranks in self.ranks.items()}
        return {key: torch.from_numpy(np.flatnonzero(mask)) for key, mask in masks.items() if not mask.all()}

    def amount(self, n_units: int) -> int:
        """Return what is left of the quantity once the first `n_units` are gone."""
        left = {key: int(np.count_nonzero(ranks >= n_units)) for key, ranks in self.ranks.items()}
        total = 0
        for amount, keys in self.terms:
            for key in keys:
                if key in left:
                    amount = amount * left[key] // self.sizes[key]
            total += amount
        return total

    def step(self, n_units: int) -> int:
        """Return how much the last unit before, or the first one after this place takes with it, whichever is more."""
        amounts = [self.amount(n) for n in range(max(0, n_units - 1), min(n_units + 1, self.n_units) + 1)]
        return max((more - less for more, less in zip(amounts, amounts[1:])), default=0)

    def nearest(self, target: float) -> int:
        """Return how many units have to go so that what is left is as near to `target` as whole units allow."""
        n_units = bisect.bisect_left(range(self.n_units), -target, key=lambda n: -self.amount(n))
        is_too_far = n_units > 0 and self.amount(n_units - 1) - target <= target - self.amount(n_units)
        return n_units - is_too_far


def staying_units(groups: list[Group], min_density: float) -> dict[str, int]:
    """Return how many units stay in any case, for each layer."""
    counts = {layer: group.n_units for group in groups for layer in group.layers}
    return {layer: max(1, math.ceil(round(min_density * n_units, 9))) for layer, n_units in counts.items()}


def order_units(
    modules: Modules,
    groups: list[Group],
    scores: Mapping[str, torch.Tensor],
    staying: Mapping[str, int],
    terms: list[Term],
) -> Order:
    """Order all units by the mean score of their filters, ties by position; the best of each group never go."""
    means = [_mean_scores(group, scores) for group in groups]
    starts = np.cumsum([0, *map(len, means)])
    # A depthwise convolution of a single channel is an ordinary one, which was in no group before.
    n_staying = [max(staying.get(layer, 1) for layer in group.layers) for group in groups]
    stays = [start + np.argsort(mean, kind="stable")[-n:] for start, mean, n in zip(starts, means, n_staying)]
    score = np.concatenate(means)
    may_go = np.setdiff1d(np.arange(len(score)), np.concatenate(stays))
    rank = np.full(len(score), _NEVER)
    rank[may_go[np.argsort(score[may_go], kind="stable")]] = np.arange(len(may_go))
    ranks = {}
    for start, group in zip(starts, groups):
        for part in group.parts:
            key = part.layer, part.role
            ranks.setdefault(key, np.full(size_of(modules[part.layer], part.role), _NEVER))
            ranks[key][part.index] = np.minimum(ranks[key][part.index], rank[start + part.unit])
    return Order(len(may_go), ranks, {key: len(each) for key, each in ranks.items()}, terms)


def _mean_scores(group, scores) -> np.ndarray:
    """The score of each unit."""
    sums, counts = np.zeros(group.n_units), np.zeros(group.n_units)
    for name, rows, unit in group.filters:
        if name in scores:
            np.add.at(sums, unit, scores[name].double().cpu().numpy()[rows])
            np.add.at(counts, unit, 1)
    if not counts.all():
        raise ValueError(f"the criterion gives no scores for {', '.join(group.layers)}; exclude these layers")
    return sums / counts
