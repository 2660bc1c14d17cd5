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
from .._torch import batches, derive_seed
from ..training import optimizers
from ..training.batches import epochs_of
from ..training.loop import check_arguments, fit
from .measures import Criterion, bind, track_importance
from .removal import prune_filters, ratios_of

if TYPE_CHECKING:
    import pandas as pd


def gradual_filters(
    model: nn.Module,
    train: object,
    test: object = None,
    criterion: Criterion = "mag_based",
    ratio: float | Sequence[float] = 0.5,
    rounds: int = 5,
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
    data: object = None,
    exclude: str | Iterable[str] = (),
    min_density: float = 0.0,
    options: Mapping[str, object] | None = None,
    seed: int = 0,
    **fit_options: object,
) -> "pd.DataFrame":
    """Train, remove filters in rounds with training before each, and train to the end (Lubana and Dick 2021).

    All stages share one optimizer, bound to the new parameters after each removal; errors come before the training.

    Args:
        model: Any classifier; it is trained and gets smaller in place.
        train, test, optimizer, lr, weight_decay: As for `fit`.
        criterion, ratio, rounds, of, exclude, min_density: As for `prune_filters`; the criterion "biased_loss_tracked"
            follows the training.
        epochs, warmup_epochs, epochs_each: After the last removal, before the first round, and in each before removing.
        lr_prune: The learning rate of the rounds; by default that of the other stages.
        lr_schedule: The learning rate of each step of the final training, as for `fit`.
        preserve_momentum: Whether the optimizer keeps its state for the filters that are left.
        data, options: What a criterion gets, by default 20 batches of `train`, and such as `{"temperature": 1}`.
        seed, **fit_options: As for `fit`, such as `batch_size`. Stage n has the seed `derive_seed(seed, n)`.

    Returns:
        A row per epoch as from `fit`, with `epoch` counted through and the columns `stage` ("warm-up", "pruning" or
        "final"), `round` (of the removal that follows, or the last) and `parameters`.

    Example:
        >>> train, test = pu.data.load("digits")
        >>> model = pu.models.create("lenet5")
        >>> table = pu.filters.gradual_filters(model, train.subset(500), test, rounds=2, epochs=1, lr=0.01)
        >>> table.stage.tolist()
        ['pruning', 'pruning', 'final']
    """
    _checks.whole("epochs_each", epochs_each)
    _checks.whole("warmup_epochs", warmup_epochs, least=0)
    check_arguments(model, train, epochs=epochs, seed=seed, **fit_options, lr_schedule=lr_schedule)
    stepping = optimizers.create(optimizer, model, lr, weight_decay)
    rates = [group["lr"] for group in stepping.param_groups]
    options, tracking = dict(options or {}), None
    if criterion == "biased_loss_tracked" and data is None:
        tracking, options = track_importance(model, **options), {}
    new_epoch, _ = epochs_of(train, fit_options.get("batch_size", 128), seed)
    data = list(islice(new_epoch(), 20)) if data is None else list(data) if isinstance(data, Iterator) else data
    ratios = ratios_of(ratio, rounds)
    loss_fn = of_returned(fit_options.get("loss_fn"), fit_options.get("output"))
    bind(criterion, data, next(iter(batches(data)))[0], loss_fn, seed, options)
    removing = {"of": of, "data": data, "exclude": exclude, "min_density": min_density}
    prune_filters(
        copy.deepcopy(model), "mag_based", ratios[-1], **removing
    )  # what cannot be done shows before the training
    tables: list = []

    def train_stage(stage, number, n_epochs, rate=None, lr_schedule="constant"):
        for group, own in zip(stepping.param_groups, rates):
            group["lr"] = own if rate is None else rate
        size, so_far = sum(p.numel() for p in model.parameters()), sum(map(len, tables))
        stage_seed = derive_seed(seed, len(tables))
        table = fit(model, train, test, n_epochs, stepping, lr_schedule=lr_schedule, seed=stage_seed, **fit_options)
        table["epoch"] += so_far
        tables.append(table.assign(stage=stage, round=number, parameters=size))

    def train_on(_, number):
        if number < len(ratios):
            train_stage("pruning", number + 1, epochs_each, lr_prune)

    if warmup_epochs:
        train_stage("warm-up", 1, warmup_epochs)
    with tracking or contextlib.nullcontext(criterion) as chosen:
        train_stage("pruning", 1, epochs_each, lr_prune)
        removing |= {"optimizer": stepping, "preserve_momentum": preserve_momentum, "loss_fn": loss_fn, "seed": seed}
        prune_filters(model, chosen, ratios, on_round=train_on, **removing, **options)
    train_stage("final", len(ratios), epochs, lr_schedule=lr_schedule)
    import pandas as pd

    return pd.concat(tables, ignore_index=True)
