"""Filters removed while training: warm-up, rounds of training and removal, final training."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import nn

from .. import _checks
from .._evaluation import of_returned
from ..pruning import Schedule, prune_filters, track_importance
from ..pruning.filters import targets_of
from ..pruning.importances import Importance, bind
from . import optimizers
from .batches import epochs_of
from .loop import check_arguments, fit

if TYPE_CHECKING:
    import pandas as pd


def gradual_filters(
    model: nn.Module,
    train: object,
    test: object = None,
    importance: str | Importance = "mag_based",
    ratio: float | list[float] = 0.5,
    rounds: int | None = None,
    epochs: int = 10,
    *,
    warmup_epochs: int = 0,
    epochs_each: int = 1,
    optimizer: str | torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] = "sgd",
    lr: float | None = None,
    lr_prune: float | None = None,
    lr_schedule: str | Callable[[float], float] = "step",
    weight_decay: float = 0.0,
    preserve_momentum: bool = False,
    of: str = "filters",
    schedule: str | Schedule = "front_loaded",
    data: object = None,
    exclude: str | Iterable[str] = (),
    min_density: float = 0.0,
    options: Mapping[str, object] | None = None,
    seed: int = 0,
    **fit_options: object,
) -> "pd.DataFrame":
    """Train, remove filters in rounds with training before each, and train to the end (Lubana and Dick 2021).

    Warm-up and final training run at `lr`, the final one with `lr_schedule`; the rounds run at `lr_prune`. All stages
    share one optimizer, which is bound to the new parameters after each removal.

    Args:
        model: Any classifier; it is trained and gets smaller in place.
        train: As for `fit`.
        test: As for `fit`.
        importance: As for `prune_filters`. "biased_loss_tracked" follows the training.
        ratio: As for `prune_filters`; a list holds what is gone after each round.
        rounds: In how many rounds to remove filters; by default as many as `ratio` lists, or 5.
        epochs: How long to train after the last removal.
        warmup_epochs: How long to train before the first round.
        epochs_each: How long to train in each round, before its removal.
        optimizer: As for `fit`.
        lr: The learning rate of warm-up and final training, as for `fit`.
        lr_prune: The learning rate of the rounds; by default that of the other stages.
        lr_schedule: The learning rate of each step of the final training, as for `fit`.
        weight_decay: As for `fit`.
        preserve_momentum: Whether the optimizer keeps its state for the filters that are left.
        of: As for `prune_filters`.
        schedule: As for `prune_filters`.
        data: What a measure of importance that needs data gets; by default 20 batches of `train`.
        exclude: As for `prune_filters`.
        min_density: As for `prune_filters`.
        options: Options of the importance, such as `{"T": 1}`.
        seed: As for `fit`. Each stage draws its own order of the samples from it.
        **fit_options: Further options of `fit`, such as `batch_size` and `precision`.

    Returns:
        A row per epoch as from `fit`, with `epoch` counted through and the columns `stage` ("warm-up", "pruning" or
        "final"), `round` (of the removal that follows, or the last) and `parameters` (of the model in this epoch).

    Raises:
        ValueError: As `prune_filters` and `fit` do, before the training starts.

    Example:
        >>> train, test = pu.data.load("digits")
        >>> model = pu.models.create("lenet5")
        >>> table = pu.gradual_filters(model, train.subset(500), test, ratio=0.5, rounds=2, epochs=1, lr=0.01)
        >>> table.stage.tolist()
        ['pruning', 'pruning', 'final']
        >>> int(pu.filter_table(model)["after"].sum())  # of 20 + 50 + 500
        285
    """
    fitting = dict(fit_options, lr_schedule="constant")
    for name, value in (("epochs_each", epochs_each), ("epochs", epochs)):
        _checks.whole(name, value)
    _checks.whole("warmup_epochs", warmup_epochs, least=0)
    check_arguments(model, train, epochs=epochs, seed=seed, **fit_options, lr_schedule=lr_schedule)
    stepping = optimizers.create(optimizer, model, lr, weight_decay)
    rates = [group["lr"] for group in stepping.param_groups]
    options, tracking = dict(options or {}), None
    if importance == "biased_loss_tracked" and data is None:
        tracking, options = track_importance(model, **options), {}
    new_epoch, _ = epochs_of(train, fit_options.get("batch_size", 128), seed)
    data = list(islice(new_epoch(), 20)) if data is None else list(data) if isinstance(data, Iterator) else data
    if rounds is None:
        rounds = len(ratio) if isinstance(ratio, Sequence) else 5
    last = targets_of(ratio, rounds, schedule)[-1]
    loss_fn = of_returned(fit_options.get("loss_fn"), fit_options.get("output"))
    bind(importance, data, loss_fn, seed, data[0][0], options)
    trial = copy.deepcopy(model)  # what cannot be done shows before the training
    prune_filters(trial, "mag_based", last, None, 1, of, data, exclude, min_density=min_density)
    tables: list = []

    def stage(name, number, n_epochs, how):
        for group, rate in zip(stepping.param_groups, rates):
            group["lr"] = lr_prune if name == "pruning" and lr_prune is not None else rate
        size, so_far = sum(p.numel() for p in model.parameters()), sum(map(len, tables))
        table = fit(model, train, test, n_epochs, stepping, seed=seed + len(tables), **how)
        table["epoch"] += so_far
        tables.append(table.assign(stage=name, round=number, parameters=size))

    if warmup_epochs:
        stage("warm-up", 1, warmup_epochs, fitting)
    with tracking or contextlib.nullcontext(importance) as measure:
        stage("pruning", 1, epochs_each, fitting)
        prune_filters(
            model, measure, ratio, None, rounds, of, data, exclude, min_density=min_density, schedule=schedule,
            loss_fn=loss_fn, optimizer=stepping, preserve_momentum=preserve_momentum, seed=seed,
            on_round=lambda _, number: number < rounds and stage("pruning", number + 1, epochs_each, fitting),
            **options,
        )  # fmt: skip
    stage("final", rounds, epochs, dict(fitting, lr_schedule=lr_schedule))
    for group, rate in zip(stepping.param_groups, rates):
        group["lr"] = rate
    import pandas as pd

    return pd.concat(tables, ignore_index=True)
