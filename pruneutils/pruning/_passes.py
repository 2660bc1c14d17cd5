"""Passes through a network that stop at one of its layers."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from .._checks import is_pair
from .._torch import device_of


class _Reached(Exception):
    """The layer has been called as often as it is in one pass."""


def inputs_of(data: object, model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the inputs (N, ...) of each batch on the model's device; targets, if there are any, are left out."""
    if torch.is_tensor(data) or is_pair(data):
        data = [data]
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be inputs, an (inputs, targets) pair, or an iterable of such, not {type(data)}")
    empty = True
    for batch in data:
        inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not torch.is_tensor(inputs):
            raise TypeError(f"a batch must be inputs or an (inputs, targets) pair of tensors, not {type(batch)}")
        if len(inputs):
            empty = False
            yield inputs.to(device_of(model))
    if empty:
        raise ValueError("data holds no sample")


def calls_of(model: nn.Module, modules: Iterable[nn.Module], inputs: torch.Tensor) -> dict[nn.Module, int]:
    """Return {module: how often one pass calls it} of those that it calls, in the order of their first call."""
    calls: dict[nn.Module, int] = {}
    hooks = [m.register_forward_pre_hook(lambda m, _: calls.update({m: calls.get(m, 0) + 1})) for m in modules]
    try:
        model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def run_until(model: nn.Module, module: nn.Module, n_calls: int, inputs: torch.Tensor, outputs: bool) -> list:
    """Run a network as far as the last of `n_calls` calls of a module; return what it reads there, or gives, each time.

    With `outputs` its outputs are returned and otherwise its inputs, in which case the last call is not computed.
    """
    seen = []

    def listen(module, args, output=None):
        seen.append(output if outputs else args[0])
        if len(seen) == n_calls:
            raise _Reached

    hook = module.register_forward_hook(listen) if outputs else module.register_forward_pre_hook(listen)
    try:
        model(inputs)
    except _Reached:
        pass
    finally:
        hook.remove()
    return seen
