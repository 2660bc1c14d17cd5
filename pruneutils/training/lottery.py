"""Lottery tickets: iterative magnitude pruning with rewinding."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from torch import nn

from .. import _checks
from ..pruning import Scope, plan, prune, sparsity_at
from ..pruning.criteria import Scores, bind
from .loop import check_arguments, fit

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
    on_step: Callable[[nn.Module, int, int], None] | None = None,
    **fit_options: object,
) -> "pd.DataFrame":
    """Find a lottery ticket: train, prune, rewind what is left to its early values, and train again.

    The dense model is trained first. Each round then prunes the same share of what is left, rewinds the weights and
    buffers to where they were after `rewind_step` steps of the dense training, and trains from there to the same end,
    with the same order of samples and the same learning rates. The model ends trained, with the ticket as its masks.

    Args:
        model: Any classifier, untrained; it is pruned and trained in place.
        train: As for `fit`.
        test: As for `fit`.
        sparsity: The fraction of the weights that are pruned after the last round.
        rounds: How often to prune, at least 1.
        epochs: Of each training, counted from step 0.
        rewind_step: 0 rewinds to initialization (Frankle and Carbin 2019), a small number of steps to a network in
            early training (Frankle et al. 2020).
        criterion: As for `prune`; one that needs no data.
        scope: As for `prune`.
        exclude: As for `prune`.
        seed: As for `fit`.
        on_step: As for `fit`, in each of the trainings.
        **fit_options: Further options of `fit`, such as `optimizer`, `lr_schedule` and `precision`.

    Returns:
        A row per epoch as from `fit`, with the column `round`; round 0 is dense.

    Raises:
        ValueError: Before training, for a number out of range, an unknown name, or a `rewind_step` beyond the end.

    Example:
        >>> train, test = pu.data.load("digits")
        >>> model = pu.models.create("lenet300")
        >>> table = pu.lottery_ticket(
        ...     model, train.subset(500), test, sparsity=0.75, rounds=2, epochs=1, rewind_step=2, optimizer="adam"
        ... )
        >>> table[["round", "sparsity"]].values.tolist()
        [[0.0, 0.0], [1.0, 0.5], [2.0, 0.75]]

    Frankle and Carbin 2019, "The lottery ticket hypothesis"; Frankle et al. 2020, "Linear mode connectivity and the
    lottery ticket hypothesis".
    """
    _checks.whole("rounds", rounds)
    plan(model, sparsity, scope, "weight", exclude)
    bind(criterion, None, None, seed, {})
    steps = epochs * check_arguments(model, train, epochs=epochs, seed=seed, **fit_options).per_epoch
    if _checks.whole("rewind_step", rewind_step, least=0) > steps:
        raise ValueError(f"rewind_step={rewind_step} is beyond the end of training after {steps} steps")
    snapshot = {}

    def take(model, step, steps):
        if step == rewind_step:
            snapshot.update({name: value.detach().clone() for name, value in model.state_dict().items()})
        if on_step is not None and step:
            on_step(model, step, steps)

    take(model, 0, steps)
    tables = []
    for turn in range(rounds + 1):
        if turn:
            prune(model, criterion, sparsity_at(turn / rounds, sparsity), scope, exclude=exclude, seed=seed)
            model.load_state_dict(snapshot)  # masks stay on, and hold
        start = rewind_step if turn else 0
        hook = on_step if turn else take
        table = fit(model, train, test, epochs, seed=seed, start_step=start, on_step=hook, **fit_options)
        tables.append(table.assign(round=turn))
    import pandas as pd

    return pd.concat(tables, ignore_index=True)
