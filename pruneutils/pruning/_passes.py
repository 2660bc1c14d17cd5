"""Forward passes that stand still at chosen layers, so that many batches can go through a network side by side.

What a layer gets from a repair depends on all batches, and what the next layer reads depends on that. Running all
batches anew for each layer would take as many passes as there are layers. Here each batch is run once, in a thread of
its own that waits at every layer until the others have come as far. Only one thread runs at a time.
"""

import queue
import threading
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from .._checks import is_pair
from .._torch import device_of


def inputs_of(data: object, model: nn.Module) -> list[torch.Tensor]:
    """Return the inputs (N, ...) of each batch on the model's device; targets, if there are any, are left out."""
    if torch.is_tensor(data) or is_pair(data):
        data = [data]
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be inputs, an (inputs, targets) pair, or an iterable of such, not {type(data)}")
    batches = [batch[0] if isinstance(batch, (tuple, list)) and batch else batch for batch in data]
    for batch in batches:
        if not torch.is_tensor(batch):
            raise TypeError(f"a batch must be inputs or an (inputs, targets) pair of tensors, not {type(batch)}")
    batches = [batch.to(device_of(model)) for batch in batches if len(batch)]
    if not batches:
        raise ValueError("data holds no sample")
    return batches


class _Stopped(Exception):
    """Nobody wants to know how this pass goes on."""


def stops(
    model: nn.Module, modules: Iterable[nn.Module], inputs: torch.Tensor, after: bool = False
) -> Iterator[tuple[nn.Module, torch.Tensor]]:
    """Run a network and yield (module, what it reads) at each call of the modules; the pass stands still meanwhile.

    With `after`, what it gives is yielded. Closing the iterator ends the pass.
    """
    here, there = queue.SimpleQueue(), queue.SimpleQueue()

    def listen(module, args, output=None):
        if threading.current_thread() is thread:  # and not the pass of another batch
            here.put((module, output if after else args[0]))
            if there.get() is _Stopped:
                raise _Stopped

    def run():
        try:
            with torch.no_grad():
                model(inputs)
            here.put(None)
        except BaseException as error:
            here.put(error)

    register = "register_forward_hook" if after else "register_forward_pre_hook"
    hooks = [getattr(module, register)(listen) for module in modules]
    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()
        while (stop := here.get()) is not None:
            if isinstance(stop, BaseException):
                raise stop
            yield stop
            there.put(None)
    finally:
        there.put(_Stopped)
        thread.join()
        for hook in hooks:
            hook.remove()


def side_by_side(passes: list[Iterator]) -> Iterator[tuple[nn.Module, list[torch.Tensor]]]:
    """Yield (module, what each of the passes has there), with all passes at the same call."""
    try:
        while True:
            here = [next(each, None) for each in passes]
            if all(stop is None for stop in here):
                return
            if any(stop is None or stop[0] is not here[0][0] for stop in here):
                raise ValueError("the batches take different ways through the network, so they cannot go side by side")
            module, tensors = here[0][0], [tensor for _, tensor in here]
            del here  # nothing but the passes themselves shall hold on to their tensors
            yield module, tensors
            del tensors
    finally:
        for each in passes:
            each.close()
