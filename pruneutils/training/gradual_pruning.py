"""Pruning while training: `gradual` for whole experiments, `gradual_sparsity` for any training loop."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from .. import _checks
from .._evaluation import of_returned
from ..pruning import Granularity, Schedule, Scope, plan, prune
from ..pruning.criteria import Scores, bind
from ..pruning.granularities import find
from ..pruning.schedules import SCHEDULES
from ..pruning.scopes import SCOPES
from .loop import check_arguments, fit

if TYPE_CHECKING:
    import pandas as pd

OnStep = Callable[[nn.Module, int, int], None]


def gradual(
    model: nn.Module,
    train: object,
    test: object = None,
    sparsities: Sequence[float] = (0.5, 0.75, 0.9),
    epochs_each: int | None = None,
    criterion: str | Callable[..., Scores] = "magnitude",
    *,
    epochs: int | None = None,
    recovery: float | None = None,
    scope: str | Scope = "global",
    granularity: str | Granularity = "weight",
    data: object = None,
    exclude: str | Iterable[str] = (),
    seed: int = 0,
    **fit_options: object,
) -> "pd.DataFrame":
    """Prune to each of `sparsities` in turn while training, in one of two designs.

    `epochs_each=2` *restarts* after each pruning: it prunes, then trains 2 epochs with an optimizer and a learning-rate
    schedule of their own. Experiments of equal length then differ in how long they train after the last pruning.

    `epochs=8, recovery=4` trains *once*, for 8 epochs with one optimizer and one learning-rate schedule. Of n prunings
    the i-th comes after i/n of the first 8 - 4 epochs, so that the last one leaves the same 4 epochs of recovery for
    every n. With one sparsity this is instant pruning: after 4 epochs of dense training, or with `recovery=8` at the
    start. `sparsities=[0.0]` continues the training of the dense network for as long.

    Args:
        model: Any classifier; it is pruned and trained in place.
        train: As for `fit`.
        test: As for `fit`.
        sparsities: Fractions, ascending. `[pu.sparsity_at(i / n, 0.9) for i in range(1, n + 1)]` are those of n
            prunings that each remove the same share of what is left; with `schedule="cubic"` the steps get smaller.
        epochs_each: Restarts: how many epochs to train after each pruning (1 if `epochs` is not given either).
        criterion: As for `prune`.
        epochs: One training: how many epochs it has in all.
        recovery: One training: how many of its epochs follow the last pruning; fractions of an epoch are fine.
        scope: As for `prune`.
        granularity: As for `prune`.
        data: As for `prune`.
        exclude: As for `prune`.
        seed: As for `fit`. Each restart draws its own order of the samples from it.
        **fit_options: Further options of `fit`, such as `optimizer`, `lr_schedule` and `precision`.

    Returns:
        A row per epoch as from `fit`, with `epoch` counted through and the column `stage`, the number of prunings by
        the end of the epoch. A pruning at the end of an epoch comes before that epoch's test accuracy.

    Raises:
        ValueError: Before the model changes, for sparsities that do not ascend or are not in [0, 1], for both designs
            at once, for prunings that do not fit into the steps before recovery, and as `prune` and `fit` do.

    Example:
        >>> train, test = pu.data.load("digits")
        >>> model = pu.models.create("lenet300")
        >>> table = pu.gradual(
        ...     model, train.subset(1000), test, sparsities=[0.5, 0.75, 0.9], epochs=4, recovery=1, optimizer="adam"
        ... )
        >>> table[["epoch", "stage", "sparsity"]].round(2).values.tolist()
        [[1.0, 1.0, 0.5], [2.0, 2.0, 0.75], [3.0, 3.0, 0.9], [4.0, 3.0, 0.9]]

    Zhu and Gupta 2017, "To prune, or not to prune".
    """
    sparsities = _ascending(sparsities)
    pruning = dict(criterion=criterion, scope=scope, granularity=granularity, exclude=exclude, seed=seed)
    pruning |= {
        "data": _repeatable(data),
        "loss_fn": of_returned(fit_options.get("loss_fn"), fit_options.get("output")),
    }
    _check_pruning(model, sparsities, **pruning)
    if epochs is None and recovery is None:
        epochs_each = _checks.whole("epochs_each", 1 if epochs_each is None else epochs_each)
        check_arguments(model, train, epochs=epochs_each, seed=seed, **fit_options)
        return _with_restarts(model, train, test, sparsities, epochs_each, pruning, fit_options)
    if epochs_each is not None:
        raise ValueError("give epochs_each (restarts) or epochs and recovery (one training), not both")
    if epochs is None or recovery is None:
        raise ValueError("one training needs epochs (how many in all) and recovery (how many after the last pruning)")
    per_epoch = check_arguments(model, train, epochs=epochs, seed=seed, **fit_options).per_epoch
    due = _spread_evenly(sparsities, epochs, recovery, per_epoch)
    return _in_one_training(model, train, test, due, epochs, per_epoch, pruning, fit_options)


def gradual_sparsity(
    target: float,
    begin: float = 0.0,
    end: float = 0.5,
    every: int = 100,
    criterion: str | Callable[..., Scores] = "magnitude",
    *,
    start: float = 0.0,
    schedule: str | Schedule = "cubic",
    scope: str | Scope = "global",
    granularity: str | Granularity = "weight",
    data: object = None,
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    exclude: str | Iterable[str] = (),
    seed: int = 0,
    **options: object,
) -> OnStep:
    """Make a function that prunes while a model trains, along a ramp of sparsities.

    Pass it to `fit` as `on_step`, or call it after each step of any loop. It keeps nothing between calls, so training
    that goes on from a checkpoint meets the same ramp.

    Args:
        target: The sparsity at the end of the ramp, a fraction.
        begin: Where the ramp begins, as a fraction of all steps.
        end: Where the ramp ends and recovery begins, as a fraction of all steps.
        every: Prune every so many steps of the ramp, and at its end.
        criterion: As for `prune`.
        start: The sparsity at the beginning of the ramp; the model must not have more then.
        schedule: How the sparsity grows from `start` to `target`, as for `prune`; "cubic" removes most at first.
        scope: As for `prune`.
        granularity: As for `prune`.
        data: As for `prune`.
        loss_fn: As for `prune`.
        exclude: As for `prune`.
        seed: As for `prune`.
        **options: Options of the criterion.

    Returns:
        A function `(model, step, steps)`: `step` counts from 1, `steps` is how many there are in all.

    Raises:
        ValueError: For a fraction outside [0, 1], `start` above `target`, a ramp that ends before it begins, an unknown
            name, or a criterion without its data.
        TypeError: For an option that the criterion does not have.

    Example:
        >>> train, test = pu.data.load("digits")
        >>> model = pu.models.create("lenet300")
        >>> ramp = pu.gradual_sparsity(0.9, begin=0.0, end=0.5, every=5)
        >>> table = pu.fit(model, train.subset(1280), test, epochs=4, optimizer="adam", on_step=ramp)
        >>> table.sparsity.round(4).tolist()  # 40 steps, the ramp ends after 20
        [0.7875, 0.9, 0.9, 0.9]

    Zhu and Gupta 2017, "To prune, or not to prune".
    """
    _ascending([start, target], "start and target")
    data = _repeatable(data)
    if _checks.fraction("begin", begin) > _checks.fraction("end", end) or end == 0:
        raise ValueError(f"the ramp must end after its begin={begin!r} and after step 0, not at end={end!r}")
    _checks.whole("every", every)
    sparsity_of = _checks.choose("schedule", schedule, SCHEDULES)
    _checks.choose("scope", scope, SCOPES)
    find(granularity)
    bind(criterion, data, loss_fn, seed, options)

    def due(step: int, steps: int) -> float | None:
        first, last = round(begin * steps), max(1, round(end * steps))
        if step == last:
            return target
        on_ramp = first < step < last and (step - first) % every == 0
        return sparsity_of((step - first) / (last - first), start, target) if on_ramp else None

    return _pruning_when(
        due, criterion=criterion, scope=scope, granularity=granularity, data=data, loss_fn=loss_fn, exclude=exclude,
        seed=seed, **options,
    )  # fmt: skip


# --- The two designs -------------------------------------------------------------------------------------------------


def _with_restarts(model, train, test, sparsities, epochs_each, pruning, fit_options) -> "pd.DataFrame":
    tables = []
    for stage, sparsity in enumerate(sparsities):
        prune(model, sparsity=sparsity, **pruning)
        table = fit(model, train, test, epochs_each, seed=_seed_of(pruning["seed"], stage), **fit_options)
        table["epoch"] += stage * epochs_each
        tables.append(table.assign(stage=stage + 1))
    import pandas as pd

    return pd.concat(tables, ignore_index=True)


def _in_one_training(model, train, test, due, epochs, per_epoch, pruning, fit_options) -> "pd.DataFrame":
    prune_if_due = _pruning_when(lambda step, steps: due.get(step), **pruning)
    on_step = fit_options.pop("on_step", None)

    def prune_and_call(model, step, steps):
        prune_if_due(model, step, steps)
        if on_step is not None:
            on_step(model, step, steps)

    prune_if_due(model, 0, epochs * per_epoch)  # `fit` calls only after a step
    table = fit(model, train, test, epochs, seed=pruning["seed"], on_step=prune_and_call, **fit_options)
    return table.assign(stage=[sum(step <= epoch * per_epoch for step in due) for epoch in table.epoch])


def _spread_evenly(sparsities, epochs, recovery, per_epoch) -> dict[int, float]:
    """Return {step: sparsity}: the i-th of n prunings comes i/n of the way to the recovery."""
    if isinstance(recovery, bool) or not isinstance(recovery, Real) or not 0 <= recovery <= epochs:
        raise ValueError(f"recovery must be a number of epochs between 0 and epochs={epochs}, not {recovery!r}")
    before = epochs * per_epoch - round(recovery * per_epoch)
    due = {round(before * i / len(sparsities)): sparsity for i, sparsity in enumerate(sparsities, start=1)}
    if len(due) < len(sparsities):
        raise ValueError(f"{len(sparsities)} prunings do not fit into the {before} steps before recovery={recovery}")
    return due


def _pruning_when(due: Callable[[int, int], float | None], **pruning) -> OnStep:
    """Return a function that prunes to `due(step, steps)` after the steps where that is a sparsity."""

    def on_step(model: nn.Module, step: int, steps: int) -> None:
        sparsity = due(step, steps)
        if sparsity is not None:
            prune(model, sparsity=sparsity, **pruning)

    return on_step


def _seed_of(seed: int, stage: int) -> int:
    """Derive the seed of a restart; the first stage has the seed itself, so that it equals prune and fit."""
    return int(np.random.SeedSequence([seed, stage]).generate_state(1)[0]) if stage else seed


# --- Checks that come before training --------------------------------------------------------------------------------


def _ascending(sparsities, argument="sparsities") -> list[float]:
    if isinstance(sparsities, str) or not isinstance(sparsities, Iterable) or not (sparsities := list(sparsities)):
        raise ValueError(f"{argument} must be a list of ascending fractions such as [0.5, 0.9], not {sparsities!r}")
    for sparsity in sparsities:
        _checks.fraction(f"{argument}: each", sparsity)
    if sparsities != sorted(sparsities):
        raise ValueError(f"{argument} must be ascending fractions, not {sparsities!r}")
    return sparsities


def _repeatable(data):
    """Keep the batches of an iterator: every pruning needs them."""
    return list(data) if isinstance(data, Iterator) else data


def _check_pruning(model, sparsities, criterion, scope, granularity, data, exclude, seed, loss_fn) -> None:
    """Raise what `prune` would raise only after a part of the training."""
    for sparsity in sparsities:
        plan(model, sparsity, scope, granularity, exclude)
    bind(criterion, data, loss_fn, seed, {})
