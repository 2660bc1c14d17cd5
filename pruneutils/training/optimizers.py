"""The optimizers and learning-rate schedules that `fit` knows by name."""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from .. import _checks

OPTIMIZERS = {
    "sgd": lambda parameters, lr, weight_decay: torch.optim.SGD(
        parameters, lr=0.1 if lr is None else lr, momentum=0.9, nesterov=True, weight_decay=weight_decay
    ),
    "adam": lambda parameters, lr, weight_decay: torch.optim.Adam(
        parameters, lr=1e-3 if lr is None else lr, weight_decay=weight_decay
    ),
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
    if lr is not None:
        lr = _checks.number("lr", lr, least=0)
    weight_decay = _checks.number("weight_decay", weight_decay, least=0)
    if isinstance(optimizer, str):
        return _checks.choose("optimizer", optimizer, OPTIMIZERS)(model.parameters(), lr, weight_decay)
    if lr is not None or weight_decay:
        raise ValueError("lr and weight_decay go with an optimizer's name; an Optimizer or a callable has its own")
    if not isinstance(optimizer, torch.optim.Optimizer):
        if not callable(optimizer):
            raise _checks.unknown("optimizer", optimizer, OPTIMIZERS)
        made = optimizer(model.parameters())
        if not isinstance(made, torch.optim.Optimizer):
            raise TypeError(f"optimizer={optimizer!r:.60} must return a torch Optimizer, not {made!r:.60}")
        optimizer = made
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            f"the optimizer ({type(optimizer).__name__}) updates no parameter of this {type(model).__name__}: make it "
            "from this model's parameters(), and after the last of them was replaced"
        )
    return optimizer


@contextlib.contextmanager
def rates_put_back(optimizer: torch.optim.Optimizer) -> Iterator[list[float]]:
    """Give the learning rates of the parameter groups, and put them back in the end."""
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        yield rates
    finally:
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
