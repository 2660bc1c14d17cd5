"""Optimizers of a model whose filters were removed: they hold the old parameters until they are bound to the new."""

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

Cut = tuple[int, torch.Tensor]  # a dimension, and the indices that are kept along it

# {a parameter from before: (the one in its place, the cuts between)}, as long as somebody holds the old one
SUCCESSORS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def rebind_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, preserve_momentum: bool = True
) -> torch.optim.Optimizer:
    """Bind an optimizer to the parameters that `prune_filters` has put in the place of its own.

    Args:
        optimizer: Any torch optimizer but LBFGS, in place. Groups, learning rates and schedulers stay as they are.
        model: The model, after the removal; a ValueError says if the optimizer holds none of its parameters.
        preserve_momentum: Whether the optimizer keeps its state for the filters that are left, or forgets it for all.

    Returns:
        The optimizer.

    Example:
        >>> model = pu.models.create("lenet5")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model = pu.prune_filters(model, ratio=0.5, example_inputs=torch.rand(1, 1, 28, 28))
        >>> optimizer = pu.filters.rebind_optimizer(optimizer, model)
        >>> optimizer.param_groups[0]["params"][0] is model.conv1.weight
        True
    """
    parameters = list(model.parameters())
    present = {id(p) for p in parameters}
    successors = {id(old): _successor(old) for group in optimizer.param_groups for old in group["params"]}
    if not any(id(new) in present for new, _ in successors.values()):
        raise ValueError(f"this {type(optimizer).__name__} holds no parameter of this {type(model).__name__}")
    for group in optimizer.param_groups:
        for position, old in enumerate(group["params"]):
            new, cuts = successors[id(old)]
            if new is not old:
                group["params"][position] = new
                _move_state(optimizer.state, old, new, cuts)
    for parameter in parameters if not preserve_momentum else ():
        optimizer.state.pop(parameter, None)
    return optimizer


def sliced(tensor: torch.Tensor, cuts: Sequence[Cut]) -> torch.Tensor:
    """Return a copy of a tensor without what the cuts leave out, in the same memory format."""
    for dim, index in cuts:
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def remember(successors: Mapping[nn.Parameter, tuple[nn.Parameter, list[Cut]]]) -> None:
    """Note what stands in the place of old parameters, from now on watched for in the steps of all optimizers."""
    _watch_steps(_refuse_old_parameters)
    SUCCESSORS.update(successors)


_watch_steps = functools.cache(register_optimizer_step_pre_hook)  # once in a process, with the first filters that go


def _refuse_old_parameters(optimizer, *_) -> None:
    """Before a step: an optimizer of old parameters would train nothing, and nobody would notice."""
    held = (p for group in optimizer.param_groups for p in group["params"]) if SUCCESSORS else ()
    if n_old := sum(p in SUCCESSORS and p.grad is None for p in held):
        what = f"{n_old} parameters of this {type(optimizer).__name__} are from before prune_filters"
        raise RuntimeError(f"{what}: call pu.filters.rebind_optimizer(optimizer, model), or make a new optimizer")


def _successor(parameter) -> tuple[nn.Parameter, list[Cut]]:
    """The parameter that stands in the place of this one now, and all cuts in between."""
    cuts: list[Cut] = []
    while parameter in SUCCESSORS:
        parameter, more = SUCCESSORS[parameter]
        cuts += more
    return parameter, cuts


def _move_state(states, old, new, cuts) -> None:
    """Cut the state of a parameter if it is one number a weight, or one in all; forget it otherwise."""
    state = states.pop(old, {})
    tensors = {key: value for key, value in state.items() if torch.is_tensor(value)}
    rest = [value for key, value in state.items() if key not in tensors]
    by_weight = {key: sliced(value, cuts) for key, value in tensors.items() if value.shape == old.shape}
    is_known = all(value is None or isinstance(value, (int, float, str)) for value in rest)
    if state and is_known and all(key in by_weight or value.numel() == 1 for key, value in tensors.items()):
        states[new] = state | by_weight
