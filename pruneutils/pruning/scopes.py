"""Who competes with whom: a scope divides the weights into competitions, and says how many of each are to be pruned."""

import itertools
import math
from collections.abc import Callable, Mapping

import torch

from .._checks import choose, fraction
from ..target import match_layers

Weights = Mapping[str, torch.Tensor]
Competitions = list[tuple[list[str], int]]
Scope = Callable[[Weights, float], Competitions]
SCOPES: dict[str, Scope] = {}


def scope(function: Scope) -> Scope:
    """Register a scope under the name of its function.

    Args:
        function: `(weights, sparsity) -> [(names, n_pruned)]` of {parameter name: tensor} and a fraction; each pair
            names weights that compete with each other, and how many of their entries are to be pruned.

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


@scope
def global_(weights: Weights, sparsity: float) -> Competitions:
    """All weights compete with each other."""
    return [(list(weights), round(sparsity * sum(weight.numel() for weight in weights.values())))]


SCOPES["global"] = SCOPES.pop("global_")  # "global" is a keyword of Python


@scope
def layer(weights: Weights, sparsity: float) -> Competitions:
    """Each layer competes within itself, at the same sparsity."""
    return [([name], round(sparsity * weight.numel())) for name, weight in weights.items()]


@scope
def erk(weights: Weights, sparsity: float) -> Competitions:
    """Each layer competes within itself, and larger ones lose more (Erdos-Renyi kernel; Evci et al. 2020)."""
    sizes = {name: weight.numel() for name, weight in weights.items()}
    fractions = erk_sparsities({name: tuple(weight.shape) for name, weight in weights.items()}, sparsity)
    # Running sums are rounded, so that the whole is exact too. Dense layers are left out: they can take no rounding.
    sparse = [name for name, size in sizes.items() if fractions[name] * size > 1e-6]
    ends = [round(end) for end in itertools.accumulate(fractions[name] * sizes[name] for name in sparse)]
    ends[-1:] = [round(sparsity * sum(sizes.values()))] if sparse else []
    targets = {name: end - start for name, start, end in zip(sparse, [0, *ends], ends)}
    return [([name], targets.get(name, 0)) for name in sizes]


def erk_sparsities(shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> dict[str, float]:
    """Distribute a sparsity over layers by the Erdos-Renyi kernel rule (Evci et al. 2020).

    A layer's density is proportional to sum(shape) / prod(shape); where it would exceed 1, the layer stays dense.

    Args:
        shapes: {layer or parameter name: shape of its weight}.
        sparsity: The sparsity over all layers together, a fraction.

    Returns:
        {name: sparsity of this layer, a fraction}.

    Example:
        >>> pu.pruning.erk_sparsities({"fc1": (300, 784), "fc2": (10, 300)}, 0.9)["fc2"]
        0.0
    """
    fraction("sparsity", sparsity)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    budget = (1 - sparsity) * sum(sizes.values())
    dense = set()
    while True:
        rest = [name for name in shapes if name not in dense]
        weight = sum(raw[name] * sizes[name] for name in rest)
        scale = (budget - sum(sizes[name] for name in dense)) / weight if rest else 0.0
        over = {name for name in rest if scale * raw[name] > 1}
        if not over:
            return {name: 0.0 if name in dense else 1 - scale * raw[name] for name in shapes}
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
        return [([name], round(sparsity[found[name]] * weights[name].numel())) for name in weights if name in found]
    groups = rule(weights, fraction("sparsity", sparsity))
    _check(groups, weights, scope)
    return groups


def _check(groups: Competitions, weights: Weights, scope: str | Scope) -> None:
    """Check what a scope has returned: known names, each at most once, and no more than there is to prune."""
    which, seen = f"scope {getattr(scope, '__name__', scope)!r}", set()
    for names, n_pruned in groups:
        for name in names:
            if name not in weights or name in seen:
                raise ValueError(f"{which} names {name!r}, which is no weight to prune, or names it twice")
            seen.add(name)
        total = sum(weights[name].numel() for name in names)
        if isinstance(n_pruned, bool) or not isinstance(n_pruned, int) or not 0 <= n_pruned <= total:
            raise ValueError(f"{which} asks for {n_pruned!r} of the {total} weights of {', '.join(names)}")
