"""Scores become a pruned model: the only place where criterion, scope, granularity and schedule meet."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .. import _checks
from .._left_out import LeftOutWarning, tell_left_out
from .._prunable import is_transposed, join_parts, module_of, split_parts, weights_to_prune
from .._torch import generator, zero_pruned
from ..model_utils import Masks, attach_masks, get_masks, layer_name, masked
from . import criteria, granularities, schedules
from ._slicing import replay
from .criteria import Scores, criterion, list_criteria, scores
from .filters import filter_table, prune_filters
from .granularities import Block, Granularity, NofM, Tiles, granularity
from .importances import filter_scores, importance, list_importances
from .reachability import dead_weights
from .rebinding import rebind_optimizer
from .repair import Recalibration, recalibrate, reconstruct
from .schedules import Schedule, schedule, sparsity_at
from .scopes import Scope, competitions, erk_sparsities, scope
from .tracking import track_importance

__all__ = [
    "Block",
    "LayerCollapseWarning",
    "LeftOutWarning",
    "NofM",
    "Recalibration",
    "Tiles",
    "TiedScoresWarning",
    "criterion",
    "dead_weights",
    "erk_sparsities",
    "filter_scores",
    "filter_table",
    "granularity",
    "importance",
    "list_criteria",
    "list_importances",
    "prune",
    "prune_filters",
    "prune_threshold",
    "rebind_optimizer",
    "recalibrate",
    "reconstruct",
    "replay",
    "schedule",
    "scope",
    "scores",
    "sparsity_at",
    "track_importance",
]


class TiedScoresWarning(UserWarning):
    """Scores tie at the cut: position, and not the criterion, decides which of these weights go."""


class LayerCollapseWarning(UserWarning):
    """A layer has lost all of its weights."""


def prune(
    model: nn.Module,
    criterion: str | Callable[..., Scores] = "magnitude",
    sparsity: float | Mapping[str, float] | None = None,
    scope: str | Scope = "global",
    granularity: str | Granularity = "weight",
    data: object = None,
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    iterations: int = 1,
    schedule: str | Schedule = "exponential",
    drop_probability: float = 1.0,
    exclude: str | Iterable[str] = (),
    seed: int = 0,
    *,
    normalize: bool = True,
    train_mode: bool = False,
    restorable: bool = False,
    **options: object,
) -> Masks:
    """Prune a model in place, to exactly `round(sparsity * total)` weights, and return its masks.

    Args:
        model: Any `nn.Module` with convolution, linear or attention layers, or others that `pu.prunable` names.
        criterion: How much a weight matters: a name from `list_criteria()`, or a function `(model, data) ->
            {parameter name: scores}`. High scores stay.
        sparsity: The fraction of the prunable weights that are pruned after the call, what was pruned before included
            (never a number of weights: 1 is 1.0, with a warning); or {layer name or glob: fraction}, where each such
            layer competes within itself and the others are left alone. None is for granularities such as "2:4" that fix
            it.
        scope: Who competes with whom: "global" (all weights), "layer" (each layer within itself), "erk" (each within
            itself, larger ones lose more; Evci et al. 2020), or a function as for `pu.scope`.
        granularity: What goes together: "weight", "kernel", "filter", "2:4" or any "N:M", or an object such as
            `pu.Block(4, 4)`. Tiles of several weights go until the number of weights is as near to the one asked for as
            whole tiles allow.
        data: One (inputs, targets) batch or an iterable of them, for criteria that need data.
        loss_fn: `(outputs, targets) -> mean loss over the batch`; cross-entropy by default.
        iterations: In how many steps to prune, scoring anew at the pruned point before each.
        schedule: How the sparsity grows over these steps: "exponential", "linear", "cubic", or a function
            `(progress, start, target) -> sparsity`.
        drop_probability: Below 1, each weight (or tile) that would go is dropped with this probability only.
        exclude: Names or globs of layers to leave alone.
        seed: Seeds the random choices. The global random state is never touched.
        normalize: Whether a tile scores the mean of its weights, or their sum.
        train_mode: Whether to score with batch statistics and dropout.
        restorable: Whether to keep the present weights for `restore`.
        **options: Options of the criterion, such as `temperature` of "grasp".

    Returns:
        The masks of the model, {parameter name: bool tensor}, True = kept.

    Raises:
        ValueError: For an unknown name, a fraction outside [0, 1], less sparsity than the model has, scores that are
            missing, NaN or infinite. The model is then as it was.
        TypeError: For an option that the criterion does not have.

    Warns:
        TiedScoresWarning: If scores tie at the cut, with the number of tied weights in each layer.
        LayerCollapseWarning: If a layer has no weight left.
        LeftOutWarning: If much of the model is not prunable or a pruned weight is an embedding too, once for each
            model; and if N:M leaves out depthwise layers.

    Example:
        >>> model = pu.models.create("lenet300")
        >>> pu.prune(model, "magnitude", sparsity=0.9)
        Masks(3 weights, 26,620 of 266,200 kept, sparsity 0.9000)
    """
    _checks.a_model(model)
    if isinstance(data, Iterator):
        data = list(data)  # an iterator would be empty when scores are computed again
    chosen = criteria.bind(criterion, data, loss_fn, seed, options)
    contest = plan(model, sparsity, scope, granularity, exclude, split=True)
    step_to = _checks.choose("schedule", schedule, schedules.SCHEDULES)
    _checks.fraction("drop_probability", drop_probability)
    _checks.whole("iterations", iterations)
    if iterations > 1 and (drop_probability < 1 or contest.unit.fixed_sparsity() is not None):
        raise ValueError(f"iterations={iterations} goes neither with drop_probability below 1 nor with N:M: use 1")

    tell_left_out(model, exclude)

    weights, alive, ties = contest.weights, dict(contest.present), {}
    before = {name: w.detach().clone() for name, w in weights.items()} if restorable or iterations > 1 else None
    try:
        for step in range(1, iterations + 1):
            if chosen.function is criteria.magnitude and contest.unit == granularities.Weight():
                # Scored a chunk at a time while selecting, so that no second copy of the weights is made.
                values, transform = {name: weight.detach() for name, weight in weights.items()}, torch.abs
            else:
                values = split_parts(model, criteria.score(model, chosen, contest.whole, train_mode, seed))
                transform = None
            for (names, target), start in zip(contest.groups, contest.starts):
                total = sum(weights[name].numel() for name in names)
                k = max(start, round(total * step_to(step / iterations, start / total, target / total)))
                mine = {name: values[name] for name in names}
                gone = {name: alive[name] for name in names if name in alive}
                selection = contest.unit.select(mine, target if step == iterations else k, gone, normalize, transform)
                alive |= selection.keep
                ties |= selection.ties
            if step < iterations:
                _zero(weights, alive)
        if drop_probability < 1:
            alive = _spare(alive, contest.present, contest.unit, drop_probability, seed)
        _warn(ties, alive, chosen.name)  # before the model changes: a warning can be made an error
    except BaseException:
        if iterations > 1:
            _copy(weights, before)
        raise
    masks = join_parts(contest.whole, {part: alive[part] for part in weights})
    attach_masks(model, masks, join_parts(contest.whole, before) if restorable else None)
    return get_masks(model)


def prune_threshold(
    model: nn.Module,
    threshold: float,
    criterion: str | Callable[..., Scores] = "magnitude",
    granularity: str | Granularity = "weight",
    data: object = None,
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    drop_probability: float = 1.0,
    exclude: str | Iterable[str] = (),
    seed: int = 0,
    *,
    normalize: bool = True,
    train_mode: bool = False,
    restorable: bool = False,
    **options: object,
) -> Masks:
    """Prune every weight (kernel, filter, block) that scores below a threshold, in place, and return the masks.

    Args:
        model: Any `nn.Module` with convolution or linear layers.
        threshold: In the units of the criterion's scores. What scores exactly this much stays.
        criterion: As for `prune`.
        granularity: As for `prune`; "N:M" knows no threshold.
        data: As for `prune`.
        loss_fn: As for `prune`.
        drop_probability: As for `prune`.
        exclude: As for `prune`.
        seed: As for `prune`.
        normalize: As for `prune`.
        train_mode: As for `prune`.
        restorable: As for `prune`.
        **options: Options of the criterion.

    Returns:
        The masks of the model, {parameter name: bool tensor}, True = kept.

    Raises:
        ValueError: For a threshold that is no number, and as `prune` does. The model is then as it was.

    Example:
        >>> model = pu.models.create("lenet300")
        >>> masks = pu.prune_threshold(model, 0.03)
        >>> bool((model.fc1.weight[masks["fc1.weight"]].abs() >= 0.03).all())
        True
    """
    unit = granularities.find(granularity)
    weights = weights_to_prune(model, exclude)
    threshold = _checks.number("threshold", threshold, finite=False)
    _checks.fraction("drop_probability", drop_probability)
    if unit.fixed_sparsity() is not None:
        raise ValueError(f"{unit} knows no threshold; use prune")
    unit.check(weights)
    _check_not_transposed(model, weights, unit)
    chosen = criteria.bind(criterion, data, loss_fn, seed, options)
    tell_left_out(model, exclude)
    values = criteria.score(model, chosen, weights, train_mode, seed)
    present = {name: mask for name, mask in get_masks(model).items() if name in weights}
    keep = {}
    for name, value in values.items():
        mask = unit.scores(value, present.get(name), normalize) >= threshold
        keep[name] = mask & present[name] if name in present else mask.contiguous()
    if drop_probability < 1:
        keep = _spare(keep, present, unit, drop_probability, seed)
    _warn({}, keep, chosen.name)  # before the model changes: a warning can be made an error
    attach_masks(model, keep, {n: w.detach().clone() for n, w in weights.items()} if restorable else None)
    return get_masks(model)


# --- What is asked for -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a call asks for, checked: who competes, what goes together, and how much is pruned already."""

    whole: dict[str, nn.Parameter]  # the weights that take part
    weights: dict[str, torch.Tensor]  # the same, those of several layers in parts
    unit: Granularity
    groups: list[tuple[list[str], int]]  # who competes with whom, and how many weights are to be pruned in the end
    present: dict[str, torch.Tensor]  # masks that these weights have already
    starts: list[int]  # weights of each group that are pruned already


def plan(
    model: nn.Module,
    sparsity: float | Mapping[str, float] | None,
    scope: str | Scope,
    granularity: str | Granularity,
    exclude: str | Iterable[str] = (),
    split: bool = False,
) -> Plan:
    """Check what is asked of `prune` and return it in full; everything wrong with it raises here.

    With `split`, the parts of weights that hold several layers compete for themselves.
    """
    whole, unit = weights_to_prune(model, exclude), granularities.find(granularity)
    fixed = unit.fixed_sparsity()
    if fixed:
        whole = _without_depthwise(model, whole, unit)
    unit.check(whole)
    _check_not_transposed(model, whole, unit)
    weights = split_parts(model, whole) if split else whole
    if fixed is None:
        groups = competitions(weights, sparsity, scope)
    elif sparsity in (None, fixed):
        groups = competitions(weights, fixed, "layer")
    else:
        raise ValueError(f"{unit} makes the sparsity {fixed}, not {sparsity!r}; leave it out")
    competing = {name for names, _ in groups for name in names}
    parts = {name: list(split_parts(model, {name: weight})) if split else [name] for name, weight in whole.items()}
    whole = {name: weight for name, weight in whole.items() if competing.intersection(parts[name])}
    weights = {part: weights[part] for name in whole for part in parts[name]}
    masks = {name: mask.keep for name, mask in masked(model).items() if name in whole}
    present = split_parts(model, masks) if split else masks
    # a part that does not compete beside one that does
    present |= {
        p: torch.ones_like(w, dtype=torch.bool) for p, w in weights.items() if p not in competing | set(present)
    }
    starts = [_check_not_less(names, target, weights, present, unit) for names, target in groups]
    return Plan(whole, weights, unit, groups, present, starts)


def _check_not_less(names, target, weights, present, unit) -> int:
    """Return how many weights of the group are pruned already; ValueError if that is more than asked for."""
    pruned = granularities.n_pruned({name: present[name] for name in names if name in present})
    # Whole tiles may have taken up to half of the largest more than asked for.
    largest = max(math.prod(map(min, unit.tile(tuple(weights[n].shape)), weights[n].shape)) for n in names)
    if pruned - target > largest // 2:
        total = sum(weights[name].numel() for name in names)
        where = layer_name(names[0]) if len(names) == 1 else f"the {len(names)} layers together"
        raise ValueError(
            f"{where}: {pruned} of {total} weights are pruned already (sparsity {pruned / total:.4f}), which is more "
            f"than the {target} asked for ({target / total:.4f}); what is pruned stays pruned"
        )
    return pruned


def _check_not_transposed(model, weights, unit) -> None:
    """Transposed weights are (in, out, *kernel): only what treats both alike fits them."""
    if unit not in (granularities.Weight(), granularities.Kernel()):
        bad = [name for name in weights if is_transposed(model, name)]
        if bad:
            kinds = sorted({type(module_of(model, name)).__name__ for name in bad})
            raise ValueError(
                f"{unit} is not for transposed convolutions and other weights stored as (in, out) "
                f"({', '.join(kinds)}); exclude {', '.join(bad)}"
            )


def _without_depthwise(model, weights, unit) -> dict[str, nn.Parameter]:
    """Leave out depthwise layers, whose rows of a single input hold no group of M."""
    depthwise = [
        name
        for name, weight in weights.items()
        if weight.ndim > 1 and weight.shape[1] == 1 and getattr(module_of(model, name), "groups", 1) > 1
    ]
    if depthwise and len(depthwise) < len(weights):
        warnings.warn(
            f"{unit} leaves out {len(depthwise)} depthwise layers, which have one input in each group: "
            f"{', '.join(map(layer_name, depthwise))}",
            LeftOutWarning,
            stacklevel=_checks.callers_level(),
        )
    return {name: weight for name, weight in weights.items() if name not in depthwise or len(depthwise) == len(weights)}


# --- Steps -----------------------------------------------------------------------------------------------------------


def _spare(keep, present, unit, probability, seed) -> dict[str, torch.Tensor]:
    """Let each tile that would go stay with 1 - probability; drawn on the CPU, so that all devices agree."""
    drawn = generator(seed, "drop")
    spared = {}
    for name, mask in keep.items():
        tile, shape = unit.tile(tuple(mask.shape)), tuple(mask.shape)
        draws = torch.rand(granularities.units_of(shape, tile), generator=drawn) >= probability
        draws = granularities.spread(draws, tile, shape).to(mask.device)
        spared[name] = mask | (draws & present.get(name, mask.new_ones(())))
    return spared


def _zero(weights, masks) -> None:
    for name, weight in weights.items():
        zero_pruned(weight, masks[name])


def _copy(weights, values) -> None:
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(values[name])


# --- Warnings --------------------------------------------------------------------------------------------------------


def _warn(ties, masks, criterion) -> None:
    """Warn of ties and empty layers, at the line that called into this package."""
    if ties:
        layers = ", ".join(f"{layer_name(name)}: {n:,}" for name, n in ties.items())
        warnings.warn(
            f"{sum(ties.values()):,} weights tie at the cut of {criterion!r} ({layers}); position decides which of "
            "them go. Scores that tie in large numbers often are zeros of weights without effect: see dead_weights",
            TiedScoresWarning,
            stacklevel=_checks.callers_level(),
        )
    empty = [layer_name(name) for name, mask in masks.items() if not mask.cpu().numpy().any()]
    if empty:
        warnings.warn(
            f"{len(empty)} of {len(masks)} layers have no weight left: {', '.join(empty)}. Less sparsity, more "
            "iterations, or scope 'layer' or 'erk' leave some in each",
            LayerCollapseWarning,
            stacklevel=_checks.callers_level(),
        )
