"""Scores to masks to a pruned model: who competes (scope), what goes together (granularity), in how many steps."""

import itertools
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real

import torch
from torch import nn

from . import criteria
from .model_utils import Masks, attach_masks, generator, get_masks, layer_name, match_layers, nearest, prunable_weights
from .selection import Selection, n_of_m, select, select_n_of_m, select_units, unit_scores, unit_shape

SCOPES = ("global", "layer", "erk")
GRANULARITIES = ("weight", "kernel", "filter", "N:M")
SCHEDULES = ("one-shot", "exponential", "linear", "cubic")


class TiedScoresWarning(UserWarning):
    """Scores tie at the cut: position, and not the criterion, decides which of these weights go."""


class LayerCollapseWarning(UserWarning):
    """A layer has lost all of its weights."""


def prune(
    model: nn.Module,
    criterion="magnitude",
    sparsity: float | Mapping[str, float] | None = None,
    scope: str = "global",
    granularity: str = "weight",
    data=None,
    loss_fn=None,
    iterations: int = 1,
    schedule: str = "exponential",
    drop_probability: float = 1.0,
    exclude: Iterable[str] = (),
    seed: int = 0,
    *,
    normalize: bool = True,
    train_mode: bool = False,
    restorable: bool = False,
    **options,
) -> Masks:
    """Prune `model` in place to `round(sparsity * total)` masked weights, exactly, and return its masks.

    `sparsity` is the fraction of the prunable weights (without the excluded ones) that are pruned after the call, what
    was pruned before included; or {layer name or glob: fraction}: each such layer by itself, the others left alone.
    `scope` says who competes: "global" all weights, "layer" each layer by itself at the same sparsity, "erk" each by
    itself with more sparsity for larger ones (Erdos-Renyi kernel; Evci et al. 2020). `granularity` says what goes
    together: single weights; k x k kernels or filters (all weights of an output), by the mean of their scores or, with
    `normalize=False`, the sum, until the number of weights is as near to the one asked for as whole ones allow; or
    "N:M", where of every M consecutive inputs N stay and `sparsity` may be left out.

    `iterations` prunes in steps along `schedule`, scoring anew at the pruned point in between. With `drop_probability`
    below 1, each weight (or unit) that would go is dropped with this probability only. `restorable` keeps the present
    weights for `restore`. `data`, `loss_fn`, `seed`, `train_mode` and further `options` are the criterion's: `scores`.

    Warns with TiedScoresWarning and LayerCollapseWarning. Raises ValueError or TypeError, and leaves the model as it
    was, for an unknown name, a fraction outside [0, 1], less sparsity than the model has, and unusable scores.
    """
    weights = prunable_weights(model, exclude)
    check_name("scope", scope, SCOPES)
    check_name("schedule", schedule, SCHEDULES)
    check_fraction("drop_probability", drop_probability)
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations must be a positive int, not {iterations!r}")
    if iterations > 1 and (drop_probability < 1 or ":" in str(granularity)):
        raise ValueError(f"iterations={iterations} goes neither with drop_probability below 1 nor with N:M: use 1")
    if isinstance(data, Iterator):
        data = list(data)  # an iterator would be empty when scores are computed again
    name, _ = criteria.prepare(criterion, data, loss_fn, seed, options)

    check_not_transposed(model, weights, granularity)
    groups = competitions(weights, sparsity, scope, granularity)
    weights = {name: weights[name] for names, _ in groups for name in names}
    exclude = [name for name in prunable_weights(model) if name not in weights]
    present = {name: mask for name, mask in get_masks(model).items() if name in weights}
    starts = [check_not_less(names, target, weights, present, granularity) for names, target in groups]
    before = {name: w.detach().clone() for name, w in weights.items()} if restorable or iterations > 1 else None
    settings = dict(loss_fn=loss_fn, seed=seed, exclude=exclude, train_mode=train_mode, **options)
    alive, ties = dict(present), {}
    try:
        for step in range(1, iterations + 1):
            if criterion == "magnitude" and granularity == "weight":
                # scored a piece at a time while selecting, so that no second copy of the weights is made
                scores, transform = {name: weight.detach() for name, weight in weights.items()}, torch.abs
            else:
                scores, transform = criteria.scores(model, criterion, data, **settings), None
            for (names, target), start in zip(groups, starts):
                total = sum(weights[name].numel() for name in names)
                k = max(start, round(total * sparsity_at(step / iterations, target / total, start / total, schedule)))
                here = {name: scores[name] for name in names}
                chosen = _select(here, target if step == iterations else k, alive, granularity, normalize, transform)
                alive |= chosen.keep
                ties |= chosen.ties
            if step < iterations:
                _zero(weights, alive)
        if drop_probability < 1:
            alive = _spare(alive, present, granularity, drop_probability, seed)
        _warn(ties, alive, name)  # before the model changes: a warning can be made an error
    except BaseException:
        if iterations > 1:
            _copy(weights, before)
        raise
    attach_masks(model, alive, before if restorable else None)
    return get_masks(model)


def prune_threshold(
    model: nn.Module,
    threshold: float,
    criterion="magnitude",
    granularity: str = "weight",
    data=None,
    loss_fn=None,
    drop_probability: float = 1.0,
    exclude: Iterable[str] = (),
    seed: int = 0,
    *,
    normalize: bool = True,
    train_mode: bool = False,
    restorable: bool = False,
    **options,
) -> Masks:
    """Prune every weight (kernel, filter) of `model` that scores below `threshold`, in place; return its masks.

    The arguments, warnings and errors are those of `prune`; `threshold` is in the criterion's units.
    """
    weights = prunable_weights(model, exclude)
    check_fraction("drop_probability", drop_probability)
    if granularity not in ("weight", "kernel", "filter"):
        raise ValueError(f"unknown granularity {granularity!r} for a threshold; known: weight, kernel, filter")
    if not isinstance(threshold, Real) or math.isnan(threshold):
        raise ValueError(f"threshold must be a number, not {threshold!r}")
    name, _ = criteria.prepare(criterion, data, loss_fn, seed, options)
    check_not_transposed(model, weights, granularity)
    scores = criteria.scores(
        model, criterion, data, loss_fn=loss_fn, seed=seed, exclude=exclude, train_mode=train_mode, **options
    )
    present = {name: mask for name, mask in get_masks(model).items() if name in weights}
    keep = {}
    for key, score in scores.items():
        if granularity != "weight":
            score = unit_scores(score, granularity, present.get(key), normalize)
        keep[key] = (score >= threshold).expand(weights[key].shape) & present.get(key, score.new_ones((), dtype=bool))
    if drop_probability < 1:
        keep = _spare(keep, present, granularity, drop_probability, seed)
    _warn({}, keep, name)  # before the model changes: a warning can be made an error
    attach_masks(model, keep, {n: w.detach().clone() for n, w in weights.items()} if restorable else None)
    return get_masks(model)


def sparsity_at(progress: float, sparsity: float, start: float = 0.0, schedule: str = "exponential") -> float:
    """The sparsity (fractions) that `schedule` has reached at `progress` in [0, 1] from `start` to `sparsity`.

    "exponential" removes the same share of what is left in every step (Tanaka et al. 2020), "linear" the same number,
    "cubic" most at first: final + (start - final)(1 - t)^3 (Zhu & Gupta 2017); "one-shot" all in the first step.
    """
    check_name("schedule", schedule, SCHEDULES)
    t = progress
    if schedule == "exponential":
        return 1 - (1 - start) ** (1 - t) * (1 - sparsity) ** t
    if schedule == "linear":
        return start + (sparsity - start) * t
    if schedule == "cubic":
        return sparsity + (start - sparsity) * (1 - t) ** 3
    return sparsity if t > 0 else start


def erk_sparsities(shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> dict[str, float]:
    """Sparsity per layer, densities in proportion to sum(shape) / prod(shape), over all layers `sparsity` on average.

    Erdos-Renyi kernel (Evci et al. 2020): layers whose density would exceed 1 stay dense, the others make up for it.
    """
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


def competitions(weights, sparsity, scope, granularity) -> list[tuple[list[str], int]]:
    """Who competes with whom, and how many weights of each such group are to be pruned in the end."""
    if ":" in str(granularity):
        n, m = n_of_m(granularity)
        if bad := [f"{name} ({w.shape[1]} inputs)" for name, w in weights.items() if w.shape[1] % m]:
            raise ValueError(f"{granularity} needs inputs in multiples of {m}; exclude {', '.join(bad)}")
        if sparsity not in (None, 1 - n / m):
            raise ValueError(f"{granularity} makes the sparsity {1 - n / m}, not {sparsity!r}; leave it out")
        return [([name], weight.numel() * (m - n) // m) for name, weight in weights.items()]
    check_name("granularity", granularity, GRANULARITIES)
    sizes = {name: weight.numel() for name, weight in weights.items()}
    if isinstance(sparsity, Mapping):
        if not sparsity:
            raise ValueError("sparsity is an empty mapping; give {layer name or glob: fraction}")
        for pattern, fraction in sparsity.items():
            check_fraction(f"sparsity of {pattern!r}", fraction)
        found = match_layers(weights, sparsity, "sparsity")
        return [([name], round(sparsity[found[name]] * sizes[name])) for name in weights if name in found]
    check_fraction("sparsity", sparsity)
    if scope == "global":
        return [(list(weights), round(sparsity * sum(sizes.values())))]
    if scope == "layer":
        return [([name], round(sparsity * size)) for name, size in sizes.items()]
    fractions = erk_sparsities({name: tuple(weight.shape) for name, weight in weights.items()}, sparsity)
    # rounded as running sums, so that the whole is exact too; not over dense layers, which can take no rounding
    sparse = [name for name, size in sizes.items() if fractions[name] * size > 1e-6]
    ends = [round(end) for end in itertools.accumulate(fractions[name] * sizes[name] for name in sparse)]
    ends[-1:] = [round(sparsity * sum(sizes.values()))] if sparse else []
    targets = {name: end - start for name, start, end in zip(sparse, [0, *ends], ends)}
    return [([name], targets.get(name, 0)) for name in sizes]


def _select(scores, k, alive, granularity, normalize, transform) -> Selection:
    """Prune `k` weights in all, those that are pruned already included."""
    alive = {name: alive[name] for name in scores if name in alive}
    if ":" in granularity:
        return select_n_of_m(scores, *n_of_m(granularity), alive)
    k -= sum(mask.numel() - int(mask.count_nonzero()) for mask in alive.values())
    if granularity == "weight":
        return select(scores, k, alive, transform)
    return select_units(scores, k, alive, granularity, normalize)


def _spare(keep, present, granularity, probability, seed) -> dict[str, torch.Tensor]:
    """Let each unit that would go stay with 1 - probability; drawn on the CPU, so that all devices agree."""
    drawn = generator(seed, "drop")
    spared = {}
    for name, mask in keep.items():
        draws = torch.rand(unit_shape(mask.shape, granularity), generator=drawn) >= probability
        spared[name] = mask | (draws.to(mask.device) & present.get(name, mask.new_ones(())))
    return spared


def _zero(weights, masks):
    with torch.no_grad():
        for name, weight in weights.items():
            weight.masked_fill_(~masks[name], 0)


def _copy(weights, values):
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(values[name])


def _warn(ties, masks, criterion):
    """Tell about ties and empty layers, at the line that called into this package."""
    if ties:
        layers = ", ".join(f"{layer_name(name)}: {n:,}" for name, n in ties.items())
        warnings.warn(
            f"{sum(ties.values()):,} weights tie at the cut of {criterion!r} ({layers}); position decides which of "
            "them go. Scores that tie in large numbers often are zeros of weights without effect: see dead_weights",
            TiedScoresWarning,
            stacklevel=_callers_level(),
        )
    empty = [layer_name(name) for name, mask in masks.items() if not mask.cpu().numpy().any()]
    if empty:
        warnings.warn(
            f"{len(empty)} of {len(masks)} layers have no weight left: {', '.join(empty)}. Less sparsity, more "
            "iterations, or scope 'layer' or 'erk' leave some in each",
            LayerCollapseWarning,
            stacklevel=_callers_level(),
        )


def _callers_level() -> int:
    """The stacklevel, seen from who asks, of the first caller outside of this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(__package__ + "."):
        frame, level = frame.f_back, level + 1
    return level


def check_not_less(names, target, weights, present, granularity) -> int:
    """How many weights of the group are pruned already; ValueError if that is more than asked for."""
    pruned = sum(present[name].numel() - int(present[name].count_nonzero()) for name in names if name in present)
    # whole units may have taken up to half of the largest more than asked for
    units = (weights[name].numel() // math.prod(unit_shape(weights[name].shape, granularity)) for name in names)
    if pruned - target > max(units) // 2:
        total = sum(weights[name].numel() for name in names)
        where = layer_name(names[0]) if len(names) == 1 else f"the {len(names)} layers together"
        raise ValueError(
            f"{where}: {pruned} of {total} weights are pruned already (sparsity {pruned / total:.4f}), which is more "
            f"than the {target} asked for ({target / total:.4f}); what is pruned stays pruned"
        )
    return pruned


def check_not_transposed(model, weights, granularity):
    if granularity not in ("weight", "kernel"):
        bad = [name for name in weights if getattr(model.get_submodule(layer_name(name)), "transposed", False)]
        if bad:
            raise ValueError(f"{granularity!r} is not for transposed convolutions; exclude {', '.join(bad)}")


def check_name(argument, value, known):
    if value not in known:
        raise ValueError(f"unknown {argument} {value!r}; {nearest(value, known)}")


def check_fraction(argument, value):
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
        raise ValueError(f"{argument} must be a fraction in [0, 1], not {value!r}")
