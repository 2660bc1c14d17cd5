"""The optimizers and learning-rate schedules that `fit` knows by name."""

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from .. import _checks

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=1e-3),
}
# the factor on the learning rate at progress t in [0, 1]
LR_SCHEDULES = {
    "constant": lambda t: 1.0,
    "step": lambda t: 0.1 ** ((t >= 0.5) + (t >= 0.75)),
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "one-cycle": lambda t: t / 0.25 if t < 0.25 else (1 - t) / 0.75,
}


def create(
    optimizer: str | torch.optim.Optimizer | Callable, model: nn.Module, lr: float | None, weight_decay: float
) -> torch.optim.Optimizer:
    """Return the optimizer asked for; ValueError if it is one of another model."""
    given = {} if lr is None else {"lr": _checks.number("lr", lr, least=0)}
    weight_decay = _checks.number("weight_decay", weight_decay, least=0)
    if isinstance(optimizer, str):
        make = _checks.choose("optimizer", optimizer, OPTIMIZERS)
        return make(model.parameters(), weight_decay=weight_decay, **given)
    if lr is not None or weight_decay:
        raise ValueError("lr and weight_decay go with an optimizer's name; an Optimizer or a callable has its own")
    if not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = _checks.choose("optimizer", optimizer, OPTIMIZERS)(model.parameters())
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be or return a torch Optimizer, not {optimizer!r:.60}")
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        kinds = f"({type(optimizer).__name__}) updates no parameter of this {type(model).__name__}"
        raise ValueError(f"the optimizer {kinds}: make it from the parameters() that the model has now")
    return optimizer


@contextlib.contextmanager
def preserve_learning_rates(optimizer: torch.optim.Optimizer) -> Iterator[list[float]]:
    """Yield the learning rates of the parameter groups, and restore them in the end."""
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        yield rates
    finally:
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
