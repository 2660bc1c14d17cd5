"""Who competes with whom: a scope divides the weights into competitions, and says how many of each are to be pruned."""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .._checks import choose, fraction
from ..target import Target, is_transposed, layer_name, match_layers
from .granularities import Weight
from .selection import Selection, select_in_rows

Weights = Mapping[str, torch.Tensor]
Competitions = list[tuple[list[str], int]]
Scope = Callable[[Weights, float], Competitions]
SCOPES: dict[str, Scope] = {}


def scope(function: Scope) -> Scope:
    """Register a scope under the name of its function.

    Args:
        function: `(weights, sparsity) -> [(names, n_pruned)]` of {parameter name: tensor} and a fraction: which compete
            with each other, and how many of their entries are to be pruned.

    Returns:
        The same function.

    Example:
        >>> @pu.scope
        ... def half(weights, sparsity):
        ...     return [([name], weight.numel() // 2) for name, weight in weights.items()]
        >>> pu.prune(pu.models.create("lenet300"), sparsity=0.9, scope="half").sparsity
        0.5
    """
    SCOPES[function.__name__] = function
    return function


def global_(weights: Weights, sparsity: float) -> Competitions:
    """All weights compete with each other."""
    return [(list(weights), round(sparsity * sum(weight.numel() for weight in weights.values())))]


SCOPES["global"] = global_  # which is a keyword of Python


@scope
def layer(weights: Weights, sparsity: float) -> Competitions:
    """Each layer competes within itself, at the same sparsity."""
    return [([name], round(sparsity * weight.numel())) for name, weight in weights.items()]


@scope
def output(weights: Weights, sparsity: float) -> Competitions:
    """Each output unit competes within itself: of its n weights, exactly round(sparsity * n) go."""
    return [([name], len(weight) * round(sparsity * weight[0].numel())) for name, weight in weights.items()]


@dataclass(frozen=True)
class Rows(Weight):
    """Single weights that compete within their output unit: the granularity of the scope "output"."""

    transposed: Mapping[str, int]  # {name of a weight that is (in, out / groups, ...): groups}

    @classmethod
    def of(cls, target: Target, unit: object) -> "Rows":
        """Make the one for these weights; ValueError if anything but single ones is to be pruned."""
        if unit != Weight():
            raise ValueError(f"scope 'output' is for single weights ('weight') and N:M, not {unit}: use scope 'layer'")
        transposed = {name: weight for name, weight in target.weights.items() if is_transposed(target.module(name))}
        return cls({part: getattr(target.module(part), "groups", 1) for part in target.split(transposed)})

    def by_output(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Turn a weight's tensor to (out, in / groups, ...), or back."""
        groups = self.transposed.get(name)
        return tensor.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1) if groups else tensor

    def select(self, scores: Weights, k: int, alive: Weights, normalize: bool = True, transform=None) -> Selection:
        """Prune the lowest scores of each output unit, the same number everywhere, until `k` are pruned in all."""
        keep, ties = {}, {}
        for name, score in scores.items():
            mask = alive.get(name, score.new_ones((), dtype=torch.bool))
            values = score if score.is_floating_point() else score.double()
            rows = self.by_output(name, values.masked_fill(~mask, -torch.inf))
            kept, tied = select_in_rows(rows.reshape(len(rows), -1), k // len(rows))
            keep[name] = (self.by_output(name, kept.view(rows.shape)) & mask).contiguous()
            ties[name] = int(tied.count_nonzero())
        return Selection(keep, {name: n for name, n in ties.items() if n})

    def check_not_less(self, groups: Competitions, present: Weights) -> None:
        """Raise ValueError if an output unit has lost more weights already than it is to lose."""
        for (name,), k in groups:
            if name in present:
                gone = self.by_output(name, ~present[name]).flatten(1).sum(1)
                (most, unit), least = map(int, gone.max(0)), k // len(gone)
                if most > least:
                    more = f"{most} weights are pruned already, more than the {least} asked for"
                    raise ValueError(f"output {unit} of {layer_name(name)}: {more}; what is pruned stays pruned")


@scope
def erk(weights: Weights, sparsity: float) -> Competitions:
    """Each layer competes within itself, and larger ones lose more (Erdos-Renyi kernel; Evci et al. 2020)."""
    sizes, fractions = {name: weight.numel() for name, weight in weights.items()}, erk_sparsities(weights, sparsity)
    # Running sums are rounded, so that the whole is exact too. Dense layers are left out: they can take no rounding.
    sparse = [name for name, size in sizes.items() if fractions[name] * size > 1e-6]
    ends = [round(end) for end in itertools.accumulate(fractions[name] * sizes[name] for name in sparse)]
    ends[-1:] = [round(sparsity * sum(sizes.values()))] if sparse else []
    targets = {name: end - start for name, start, end in zip(sparse, [0, *ends], ends)}
    return [([name], targets.get(name, 0)) for name in sizes]


def erk_sparsities(weights: Weights, sparsity: float) -> dict[str, float]:
    """Make the density of each layer proportional to sum(shape) / prod(shape), and at most 1."""
    spans = {name: sum(weight.shape) for name, weight in weights.items()}
    sizes = {name: weight.numel() for name, weight in weights.items()}
    dense = set()
    while True:
        rest = [name for name in weights if name not in dense]
        budget = (1 - sparsity) * sum(sizes.values()) - sum(sizes[name] for name in dense)
        scale = budget / sum(spans[name] for name in rest) if rest else 0.0
        over = {name for name in rest if scale * spans[name] > sizes[name]}
        if not over:
            return {name: 0.0 if name in dense else 1 - scale * spans[name] / sizes[name] for name in weights}
        dense |= over


def competitions(weights: Weights, sparsity: float | Mapping[str, float] | None, scope: str | Scope) -> Competitions:
    """Divide the weights by a scope or its name, or by the layers that a mapping {layer glob: fraction} names."""
    rule = choose("scope", scope, SCOPES)
    if isinstance(sparsity, Mapping):
        if not sparsity:
            raise ValueError("sparsity is an empty mapping; give {layer name or glob: fraction}")
        for pattern, share in sparsity.items():
            fraction(f"sparsity of {pattern!r}", share)
        found = match_layers(weights, sparsity, "sparsity")
        within = output if rule is output else layer
        return [within({name: weights[name]}, sparsity[found[name]])[0] for name in weights if name in found]
    groups = rule(weights, fraction("sparsity", sparsity))
    _check(groups, weights, scope)
    return groups


def _check(groups: Competitions, weights: Weights, scope: str | Scope) -> None:
    """Check what a scope has returned: known names, each at most once, and no more than there is to prune."""
    which = f"scope {getattr(scope, '__name__', scope)!r}"
    named = Counter(name for names, _ in groups for name in names)
    if bad := [name for name, times in named.items() if times > 1 or name not in weights]:
        raise ValueError(f"{which} names {', '.join(bad)}: no weights to prune, or named twice")
    for names, n in groups:
        if not isinstance(n, int) or not 0 <= n <= sum(weights[name].numel() for name in names):
            raise ValueError(f"{which} asks for {n!r} of all weights of {', '.join(names)}, which they do not have")
