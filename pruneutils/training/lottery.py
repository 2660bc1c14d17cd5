"""Lottery tickets: iterative magnitude pruning with rewinding."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from torch import nn

from .. import _checks
from ..pruning import Scope, plan, sparsity_at
from ..pruning.criteria import Scores
from ..target import Target
from .gradual import checked_prune
from .loop import OnStep, check_arguments, fit

if TYPE_CHECKING:
    import pandas as pd


def lottery_ticket(
    model: nn.Module,
    train: object,
    test: object = None,
    sparsity: float = 0.9,
    rounds: int = 5,
    epochs: int = 10,
    rewind_step: int = 0,
    criterion: str | Callable[..., Scores] = "magnitude",
    *,
    scope: str | Scope = "global",
    exclude: str | Iterable[str] = (),
    seed: int = 0,
    on_step: OnStep | None = None,
    **fit_options: object,
) -> "pd.DataFrame":
    """Find a lottery ticket: train, prune, rewind what is left to its early values, and train again.

    After a dense training, each round prunes the same share of what is left, rewinds weights and buffers to where they
    were after `rewind_step` steps, and trains from there to the same end, with the same samples and learning rates.

    Args:
        model: Any classifier, untrained; it is pruned and trained in place.
        train, test, epochs, seed, on_step, fit_options: As for `fit`, for each training.
        sparsity, rounds: The fraction of the weights that are pruned after the last round, and how many there are.
        rewind_step: 0: initialization (Frankle and Carbin 2019); a small number: early training (Frankle et al. 2020).
        criterion, scope, exclude: As for `prune`; a criterion that needs no data.

    Returns:
        A row per epoch as from `fit`, with the column `round`; round 0 is dense.

    Example:
        >>> train, test = pu.data.load("digits")
        >>> options = dict(sparsity=0.75, rounds=2, epochs=1, rewind_step=2, optimizer="adam")
        >>> table = pu.lottery_ticket(pu.models.create("lenet300"), train.subset(500), test, **options)
        >>> table[["round", "sparsity"]].values.tolist()
        [[0.0, 0.0], [1.0, 0.5], [2.0, 0.75]]
    """
    import pandas as pd

    _checks.whole("rounds", rounds)
    pruning = checked_prune(criterion, scope, exclude=exclude, seed=seed)
    plan(Target.of(model, exclude), sparsity, scope, "weight")
    steps = epochs * check_arguments(model, train, epochs=epochs, seed=seed, **fit_options).per_epoch
    if _checks.whole("rewind_step", rewind_step, least=0) > steps:
        raise ValueError(f"rewind_step={rewind_step} is beyond the end of training after {steps} steps")
    snapshot = {}

    def take_snapshot(model, step, steps):
        if step == rewind_step:
            snapshot.update({name: value.detach().clone() for name, value in model.state_dict().items()})
        if on_step is not None and step > 0:
            on_step(model, step, steps)

    take_snapshot(model, 0, steps)
    tables = [fit(model, train, test, epochs, seed=seed, on_step=take_snapshot, **fit_options).assign(round=0)]
    for turn in range(1, rounds + 1):
        pruning(model, sparsity=sparsity_at(turn / rounds, sparsity))
        model.load_state_dict(snapshot)  # masks stay on, and hold
        table = fit(model, train, test, epochs, seed=seed, start_step=rewind_step, on_step=on_step, **fit_options)
        tables.append(table.assign(round=turn))
    return pd.concat(tables, ignore_index=True)
