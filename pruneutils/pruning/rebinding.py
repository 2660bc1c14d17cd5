"""Optimizers of a model whose filters were removed: they hold the old parameters until they are bound to the new."""

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ._slicing import SUCCESSORS, Cut, sliced


def rebind_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, preserve_momentum: bool = True
) -> torch.optim.Optimizer:
    """Bind an optimizer to the parameters that `prune_filters` has put in the place of its own.

    Args:
        optimizer: Any torch optimizer, in place. Groups, learning rates and schedulers stay as they are.
        model: The model, after the removal.
        preserve_momentum: Whether the optimizer keeps its state (momentum, second moments, step counts) for the filters
            that are left, or forgets it for all parameters of the model. A layer that has lost filters keeps its state
            only if that is one number a weight or one number in all.

    Returns:
        The optimizer.

    Raises:
        ValueError: If the optimizer holds none of the model's parameters, old or new.

    Example:
        >>> model = pu.models.create("lenet5")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> model = pu.prune_filters(model, ratio=0.5, example_inputs=torch.rand(1, 1, 28, 28))
        >>> optimizer = pu.rebind_optimizer(optimizer, model)
        >>> optimizer.param_groups[0]["params"][0] is model.conv1.weight
        True
    """
    present = {id(p) for p in model.parameters()}
    moves = []
    for group in optimizer.param_groups:
        for position, old in enumerate(group["params"]):
            new, cuts = _present(old)
            moves.append((group["params"], position, old, new, cuts))
    if not any(id(new) in present for *_, new, _ in moves):
        raise ValueError(f"this {type(optimizer).__name__} holds no parameter of this {type(model).__name__}")
    for params, position, old, new, cuts in moves:
        if new is old:
            continue
        params[position] = new
        state = optimizer.state.pop(old, {})
        if state and _by_weight(state, old):
            optimizer.state[new] = {
                key: sliced(value, cuts) if torch.is_tensor(value) and value.shape == old.shape else value
                for key, value in state.items()
            }
    for parameter in model.parameters() if not preserve_momentum else ():
        optimizer.state.pop(parameter, None)
    if hasattr(optimizer, "_numel_cache"):
        optimizer._numel_cache = None  # LBFGS remembers the length of all its parameters together
    return optimizer


def _present(parameter: nn.Parameter) -> tuple[nn.Parameter, list[Cut]]:
    """The parameter that stands in the place of this one now, and all cuts in between."""
    cuts: list[Cut] = []
    while parameter in SUCCESSORS:
        parameter, more = SUCCESSORS[parameter]
        cuts += more
    return parameter, cuts


def _by_weight(state, parameter) -> bool:
    """Tell whether everything in the state is one number a weight, or one in all."""
    return all(
        (value.shape == parameter.shape or value.numel() == 1)
        if torch.is_tensor(value)
        else value is None or isinstance(value, (int, float, str))
        for value in state.values()
    )


def _refuse_old_parameters(optimizer, *_) -> None:
    """Before a step: an optimizer of old parameters would train nothing, and nobody would notice."""
    if not SUCCESSORS:
        return
    for group in optimizer.param_groups:
        old = sum(p in SUCCESSORS and p.grad is None for p in group["params"])
        if old:
            raise RuntimeError(
                f"{old} parameters of this {type(optimizer).__name__} are from before prune_filters, so the step would "
                "not train them; call pu.rebind_optimizer(optimizer, model) once after the removal, or make a new one"
            )


register_optimizer_step_pre_hook(_refuse_old_parameters)
