"""Scores become a pruned model: the only place where criterion, scope, granularity and schedule meet."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .. import _checks
from .._torch import generator, restored_on_error, zero_pruned
from ..masks import attach, mask_of
from ..model_utils import Masks
from ..target import LeftOutWarning, Target, is_transposed, layer_name, warn_unprunable
from . import criteria, granularities, schedules
from .criteria import Bound, Scores, criterion, list_criteria, scores
from .granularities import Block, Granularity, NofM, Tiles, granularity
from .schedules import Schedule, schedule, sparsity_at
from .scopes import Rows, Scope, competitions, output, scope

__all__ = ["LayerCollapseWarning", "LeftOutWarning", "TiedScoresWarning", "prune", "prune_threshold"]
__all__ += ["criterion", "list_criteria", "schedule", "scope", "scores", "sparsity_at"]
__all__ += ["Block", "NofM", "Tiles", "granularity"]

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


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
    loss_fn: Loss | None = None,
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
        criterion: How much a weight matters: a name from `list_criteria()`, or a function as for `pu.criterion`.
        sparsity: The fraction of the prunable weights that are pruned after the call, what was pruned before included;
            or {layer name or glob: fraction} of layers that compete within themselves. None where "N:M" fixes it.
        scope: Who competes with whom: "global" (all weights), "layer" (each layer within itself), "output" (each output
            unit within itself), "erk" (layers, of which larger ones lose more), or a function as for `pu.scope`.
        granularity: What goes together: "weight", "kernel", "filter", "2:4" or any "N:M", or an object such as
            `pu.Block(4, 4)`. Tiles go until the count is as near to the one asked for as whole tiles allow.
        data: For criteria that need it, as for `scores`: one (inputs, targets) batch or an iterable of them.
        loss_fn: `(outputs, targets) -> mean loss over the batch`; cross-entropy by default.
        iterations: In how many steps to prune, scoring anew before each.
        schedule: How the sparsity grows over them: "exponential", "linear", "cubic", or as for `pu.schedule`.
        drop_probability: Below 1, each weight (or tile) that would go is dropped with this probability only.
        exclude: Names or globs of layers to leave alone.
        seed: Seeds the random choices. The global random state is never touched.
        normalize: Whether a tile scores the mean of its weights, or their sum.
        train_mode, restorable: Whether to score with batch statistics and dropout; to keep the weights for `restore`.
        **options: Options of the criterion, such as `temperature` of "grasp".

    Returns:
        The masks of the model, {parameter name: bool tensor}, True = kept.

    Raises:
        ValueError: For an unknown name, a fraction outside [0, 1], less sparsity than the model has, scores that are
            missing, NaN or infinite. The model is then as it was.

    Warns:
        TiedScoresWarning: If scores tie at the cut; LayerCollapseWarning if a layer has no weight left; LeftOutWarning
            if much is not prunable, or a pruned weight is an embedding too.

    Example:
        >>> pu.prune(pu.models.create("lenet300"), "magnitude", sparsity=0.9)
        Masks(3 weights, 26,620 of 266,200 kept, sparsity 0.9000)
    """
    target = Target.of(model, exclude)
    if isinstance(data, Iterator):
        data = list(data)  # an iterator would be empty when scores are computed again
    chosen = criteria.bind(criterion, data, loss_fn, seed, options, target.prunable)
    contest = plan(target, sparsity, scope, granularity)
    step_to = _checks.choose("schedule", schedule, schedules.SCHEDULES)
    _checks.fraction("drop_probability", drop_probability)
    _checks.whole("iterations", iterations)
    if iterations > 1 and (drop_probability < 1 or contest.unit.fixed_sparsity() is not None):
        raise ValueError(f"iterations={iterations} goes neither with drop_probability below 1 nor with N:M: use 1")
    warn_unprunable(target)

    weights, alive, ties = contest.weights, dict(contest.present), {}
    before = contest.copies() if restorable else None
    with restored_on_error(weights.values() if iterations > 1 else ()):
        for step in range(1, iterations + 1):
            if chosen.function is criteria.magnitude and contest.unit == granularities.Weight():
                # Scored a chunk at a time while selecting, so that no second copy of the weights is made.
                values, transform = {name: weight.detach() for name, weight in weights.items()}, torch.abs
            else:
                values, transform = contest.scores(chosen, train_mode, seed), None
            for (names, final), start in zip(contest.groups, contest.starts):
                total = sum(weights[name].numel() for name in names)
                k = max(start, round(total * step_to(step / iterations, start / total, final / total)))
                own = {name: values[name] for name in names}
                gone = {name: alive[name] for name in names if name in alive}
                selection = contest.unit.select(own, final if step == iterations else k, gone, normalize, transform)
                alive |= selection.keep
                ties |= selection.ties
            if step < iterations:
                for name, weight in weights.items():
                    zero_pruned(weight, alive[name])
        return contest.apply(alive, ties, chosen.name, drop_probability, seed, before)


def prune_threshold(
    model: nn.Module,
    threshold: float,
    criterion: str | Callable[..., Scores] = "magnitude",
    granularity: str | Granularity = "weight",
    data: object = None,
    loss_fn: Loss | None = None,
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
        threshold: In the units of the criterion's scores. What scores exactly this much stays.
        model, criterion, granularity, data, loss_fn, exclude, seed: As for `prune`, without "N:M".
        normalize, train_mode, restorable, options: As for `prune`.

    Returns:
        The masks of the model, {parameter name: bool tensor}, True = kept.

    Example:
        >>> model = pu.models.create("lenet300")
        >>> pu.prune_threshold(model, 0.03)["fc1.weight"].equal(model.fc1.weight.abs() >= 0.03)
        True
    """
    target = Target.of(model, exclude)
    chosen = criteria.bind(criterion, data, loss_fn, seed, options, target.prunable)
    threshold = _checks.number("threshold", threshold, finite=False)
    if granularities.find(granularity).fixed_sparsity() is not None:
        raise ValueError(f"{granularity} knows no threshold; use prune")
    contest = plan(target, 1.0, "global", granularity)  # any number may go
    warn_unprunable(target)
    keep = {}
    for name, values in contest.scores(chosen, train_mode, seed).items():
        present = contest.present.get(name)
        mask = contest.unit.scores(values, present, normalize) >= threshold
        keep[name] = mask.contiguous() if present is None else mask & present
    return contest.apply(keep, {}, chosen.name, originals=contest.copies() if restorable else None)


@dataclass(frozen=True)
class Plan:
    """What a call asks for, checked: who competes, what goes together, and how much is pruned already."""

    target: Target
    whole: dict[str, nn.Parameter]  # the weights that compete, or of which a part does
    weights: dict[str, torch.Tensor]  # the same, in parts such as "in_proj_weight[q]" where they hold several layers
    unit: Granularity
    groups: list[tuple[list[str], int]]  # who competes with whom, and how many weights are to be pruned in the end
    present: dict[str, torch.Tensor]  # masks that these parts have already
    starts: list[int]  # how many weights of each group they prune

    def scores(self, chosen: Bound, train_mode: bool, seed: int) -> Scores:
        """Score the parts that compete."""
        return self.target.split(criteria.score(self.target.model, chosen, self.whole, train_mode, seed))

    def copies(self) -> dict[str, torch.Tensor]:
        """Copy the weights."""
        return {name: weight.detach().clone() for name, weight in self.weights.items()}

    def apply(self, keep, ties, criterion, drop_probability=1.0, seed=0, originals=None) -> Masks:
        """Warn, give the model its masks, and return all that it has now."""
        if drop_probability < 1:
            keep = _spare(keep, self.present, self.unit, drop_probability, seed)
        _warn(ties, keep, criterion)  # before the model changes: a warning can be made an error
        masks = self.target.join({part: keep[part] for part in self.weights})
        attach(self.target.modules, masks, self.target.join(originals) if originals else {})
        held = {name: mask_of(weight) for name, weight in self.target.prunable.items()}
        return Masks({name: mask.keep for name, mask in held.items() if mask is not None}, in_force=True)


def plan(
    target: Target, sparsity: float | Mapping[str, float] | None, scope: str | Scope, granularity: str | Granularity
) -> Plan:
    """Check what is asked of `prune` and return it in full."""
    whole, unit = target.weights, granularities.find(granularity)
    fixed = unit.fixed_sparsity()
    weights, parts = target.split(whole), {name: list(target.split({name: weight})) for name, weight in whole.items()}
    unit.check({name: weights[parts[name][0]] for name in whole})
    _check_not_transposed(target, whole, unit)
    if fixed is None and scope in ("output", output):
        unit = Rows.of(target, unit)
        groups = competitions({name: unit.by_output(name, w) for name, w in weights.items()}, sparsity, scope)
    elif fixed is None:
        groups = competitions(weights, sparsity, scope)
    elif sparsity in (None, fixed):
        groups = competitions(weights, fixed, "layer")
    else:
        raise ValueError(f"{unit} makes the sparsity {fixed}, not {sparsity!r}; leave it out")
    competing = {name for names, _ in groups for name in names}
    whole = {name: weight for name, weight in whole.items() if competing.intersection(parts[name])}
    weights = {part: weights[part] for name in whole for part in parts[name]}
    present = target.split({name: mask for name, mask in target.masks.items() if name in whole})
    for part in weights.keys() - competing - present.keys():  # beside a part that competes
        present[part] = torch.ones_like(weights[part], dtype=torch.bool)
    starts = [_check_not_less(names, k, weights, present, unit) for names, k in groups]
    if isinstance(unit, Rows):
        unit.check_not_less(groups, present)
    return Plan(target, whole, weights, unit, groups, present, starts)


def _check_not_less(names, target, weights, present, unit) -> int:
    """Return how many weights of the group are pruned already; ValueError if that is more than asked for."""
    pruned = granularities.n_pruned({name: present[name] for name in names if name in present})
    largest = max(math.prod(map(min, unit.tile(tuple(weights[n].shape)), weights[n].shape)) for n in names)
    if pruned - target > largest // 2:  # whole tiles may have taken half a tile more than asked for
        where = layer_name(names[0]) if len(names) == 1 else f"the {len(names)} layers together"
        total = sum(weights[name].numel() for name in names)
        more = f"{pruned} of {total} weights are pruned already, more than the {target} asked for"
        raise ValueError(f"{where}: {more} ({target / total:.4f}); what is pruned stays pruned")
    return pruned


def _check_not_transposed(target, weights, unit) -> None:
    """Transposed weights are (in, out, *kernel): only what treats both alike fits them."""
    bad = [name for name in weights if is_transposed(target.module(name))]
    if bad and unit not in (granularities.Weight(), granularities.Kernel()):
        kinds = ", ".join(sorted({type(target.module(name)).__name__ for name in bad}))
        raise ValueError(f"{unit} is not for (in, out) weights, such as those of {kinds}; exclude {', '.join(bad)}")


def _spare(keep, present, unit, probability, seed) -> dict[str, torch.Tensor]:
    """Let each tile that would go stay with 1 - probability; drawn on the CPU, so that all devices agree."""
    drawn, spared = generator(seed, "drop"), {}
    for name, mask in keep.items():
        tile, shape = unit.tile(tuple(mask.shape)), tuple(mask.shape)
        draws = torch.rand(granularities.units_of(shape, tile), generator=drawn) >= probability
        stays = granularities.spread(draws, tile, shape).to(mask.device)
        spared[name] = mask | (stays & present[name] if name in present else stays)
    return spared


def _warn(ties, masks, criterion) -> None:
    """Warn of ties and empty layers, at the line that called into this package."""
    if ties:
        layers = ", ".join(f"{layer_name(name)}: {n:,}" for name, n in ties.items())
        way = "position decides which of them go. Many ties often are weights without effect: see dead_weights"
        message = f"{sum(ties.values()):,} weights tie at the cut of {criterion!r} ({layers}); {way}"
        warnings.warn(message, TiedScoresWarning, stacklevel=_checks.callers_level())
    if empty := [layer_name(name) for name, mask in masks.items() if not mask.cpu().numpy().any()]:
        way = "Less sparsity, more iterations, or scope 'layer' or 'erk' leave some in each"
        message = f"{len(empty)} of {len(masks)} layers have no weight left: {', '.join(empty)}. {way}"
        warnings.warn(message, LayerCollapseWarning, stacklevel=_checks.callers_level())
