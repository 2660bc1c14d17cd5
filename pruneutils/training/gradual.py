"""Pruning while training: `gradual` for whole experiments, `gradual_sparsity` for any training loop."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from .. import _checks
from .._evaluation import of_returned
from .._torch import derive_seed
from ..model_utils import Masks
from ..pruning import Granularity, Schedule, Scope, plan, prune
from ..pruning.criteria import Scores, bind
from ..pruning.granularities import find
from ..pruning.schedules import SCHEDULES
from ..pruning.scopes import SCOPES
from ..target import Target
from .loop import OnStep, check_arguments, fit

if TYPE_CHECKING:
    import pandas as pd


def checked_prune(
    criterion: str | Callable[..., Scores] = "magnitude",
    scope: str | Scope = "global",
    granularity: str | Granularity = "weight",
    data: object = None,
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    exclude: str | Iterable[str] = (),
    seed: int = 0,
    **options: object,
) -> Callable[..., Masks]:
    """Return `prune` with these arguments, which are checked now, before a training begins."""
    if isinstance(data, Iterator):
        data = list(data)  # every pruning needs its batches
    _checks.choose("scope", scope, SCOPES)
    find(granularity)
    bind(criterion, data, loss_fn, seed, options)
    options |= dict(criterion=criterion, scope=scope, granularity=granularity)
    return partial(prune, data=data, loss_fn=loss_fn, exclude=exclude, seed=seed, **options)


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
    on_step: OnStep | None = None,
    **fit_options: object,
) -> "pd.DataFrame":
    """Prune to each of `sparsities` in turn while training, in one of two designs.

    `epochs_each=2` *restarts* after each pruning: 2 epochs with an optimizer and a learning-rate schedule of their own.
    `epochs=8, recovery=4` trains *once*: of n prunings the i-th comes after i/n of the first 8 - 4 epochs, so that 4
    epochs of recovery follow the last one for every n; `sparsities=[0.0]` trains the dense network for as long.

    Args:
        model: Any classifier; it is pruned and trained in place.
        train, test, on_step, fit_options: As for `fit`.
        sparsities: Fractions, ascending, such as `[pu.pruning.sparsity_at(i / n, 0.9) for i in range(1, n + 1)]`.
        epochs_each: Restarts: how many epochs to train after each pruning (1 if `epochs` is not given either).
        criterion, scope, granularity, data, exclude: As for `prune`.
        epochs, recovery: One training: its epochs in all, and how many of them, 0.5 too, follow the last pruning.
        seed: As for `fit`. Each restart derives its own order of the samples from it.

    Returns:
        A row per epoch as from `fit`, with `epoch` counted through and the column `stage`, the number of prunings by
        the end of the epoch. A pruning at the end of an epoch comes before that epoch's test accuracy.

    Example:
        >>> train, test = pu.data.load("digits")
        >>> options = dict(sparsities=[0.5, 0.9], epochs=4, recovery=1, optimizer="adam")
        >>> table = pu.gradual(pu.models.create("lenet300"), train.subset(1000), test, **options)
        >>> table[["epoch", "stage"]].values.tolist()
        [[1, 0], [2, 1], [3, 2], [4, 2]]
    """
    import pandas as pd

    sparsities = _ascending(sparsities)
    loss_fn = of_returned(fit_options.get("loss_fn"), fit_options.get("output"))
    pruning = checked_prune(criterion, scope, granularity, data, loss_fn, exclude, seed)
    for sparsity in sparsities:
        plan(Target.of(model, exclude), sparsity, scope, granularity)  # an error now, not after a part of the training
    if epochs is None and recovery is None:
        epochs_each = _checks.whole("epochs_each", 1 if epochs_each is None else epochs_each)
        fitting = dict(fit_options, test=test, epochs=epochs_each, on_step=on_step)
        check_arguments(model, train, seed=seed, **fitting)
        tables = []
        for stage, sparsity in enumerate(sparsities):
            pruning(model, sparsity=sparsity)
            restart_seed = derive_seed(seed, stage) if stage else seed  # the first equals prune and fit
            table = fit(model, train, seed=restart_seed, **fitting)
            tables.append(table.assign(epoch=table.epoch + stage * epochs_each, stage=stage + 1))
        return pd.concat(tables, ignore_index=True)
    if epochs_each is not None or epochs is None or recovery is None:
        raise ValueError("give either epochs_each (restarts) or both epochs and recovery (one training)")

    fitting = dict(fit_options, test=test, epochs=epochs, seed=seed)
    per_epoch = check_arguments(model, train, on_step=on_step, **fitting).per_epoch
    if _checks.number("recovery", recovery, least=0) > epochs:
        raise ValueError(f"recovery must be a number of epochs between 0 and epochs={epochs}, not {recovery!r}")
    before, n = epochs * per_epoch - round(recovery * per_epoch), len(sparsities)
    sparsity_after = {round(before * i / n): sparsity for i, sparsity in enumerate(sparsities, start=1)}  # by the step
    if len(sparsity_after) < n:
        raise ValueError(f"{n} prunings do not fit into the {before} steps before recovery={recovery}")

    def prune_if_due(model, step, steps):
        if step in sparsity_after:
            pruning(model, sparsity=sparsity_after[step])
        if on_step is not None and step > 0:
            on_step(model, step, steps)

    prune_if_due.dense_gradients = getattr(on_step, "dense_gradients", False)
    prune_if_due(model, 0, epochs * per_epoch)  # `fit` calls only after a step
    table = fit(model, train, on_step=prune_if_due, **fitting)
    return table.assign(stage=[sum(step <= epoch * per_epoch for step in sparsity_after) for epoch in table.epoch])


def gradual_sparsity(
    target: float,
    begin: float = 0.0,
    end: float = 0.5,
    every: int = 100,
    *,
    start: float = 0.0,
    schedule: str | Schedule = "cubic",
    **prune_options: object,
) -> OnStep:
    """Make a function that prunes while a model trains, along a ramp of sparsities (Zhu and Gupta 2017).

    Pass it to `fit` as `on_step`, or call it after each step of any loop. It keeps nothing between calls.

    Args:
        target: The sparsity at the end of the ramp, a fraction.
        begin, end, every: Prune every so many steps between these fractions of all steps, and at the end. A ramp of
            no more than `every` steps is a single pruning, and warns.
        start: The sparsity at the beginning of the ramp; the model must not have more then.
        schedule: How the sparsity grows from `start` to `target`, as for `prune`; "cubic" removes most at first.
        prune_options: As for `prune`: criterion, scope, granularity, data, loss_fn, exclude, seed, and the criterion's.

    Returns:
        A function `(model, step, steps)`: `step` counts from 1, `steps` is how many there are in all.

    Example:
        >>> train, test = pu.data.load("digits")
        >>> ramp = pu.gradual_sparsity(0.9, begin=0.0, end=0.5, every=5)
        >>> table = pu.fit(pu.models.create("lenet300"), train.subset(1280), epochs=4, optimizer="adam", on_step=ramp)
        >>> table.sparsity.round(4).tolist()  # 40 steps, the ramp ends after 20
        [0.7875, 0.9, 0.9, 0.9]
    """
    _ascending([start, target], "start and target")
    if _checks.fraction("begin", begin) > _checks.fraction("end", end) or end == 0:
        raise ValueError(f"the ramp must end after its begin={begin!r} and after step 0, not at end={end!r}")
    _checks.whole("every", every)
    sparsity_of = _checks.choose("schedule", schedule, SCHEDULES)
    pruning = checked_prune(**prune_options)

    def prune_on_ramp(model: nn.Module, step: int, steps: int) -> None:
        first, last = round(begin * steps), max(1, round(end * steps))
        if step == 1 and begin < end and last - first <= every:
            message = f"the ramp of {last - first} steps is one pruning, at step {last}; choose less than every={every}"
            warnings.warn(message, stacklevel=_checks.callers_level())
        if step == last:
            pruning(model, sparsity=target)
        elif first < step < last and (step - first) % every == 0:
            pruning(model, sparsity=sparsity_of((step - first) / (last - first), start, target))

    return prune_on_ramp


def _ascending(sparsities, argument="sparsities") -> list[float]:
    if isinstance(sparsities, str) or not isinstance(sparsities, Iterable) or not (sparsities := list(sparsities)):
        raise ValueError(f"{argument} must be a list of ascending fractions such as [0.5, 0.9], not {sparsities!r}")
    for sparsity in sparsities:
        _checks.fraction(f"{argument}: each", sparsity)
    if sparsities != sorted(sparsities):
        raise ValueError(f"{argument} must be ascending fractions, not {sparsities!r}")
    return sparsities
