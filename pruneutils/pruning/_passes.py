"""Forward passes that stand still at chosen layers, so that many batches can go through a network side by side.

What a layer gets from a repair depends on all batches, and what the next layer reads depends on that. Running all
batches anew for each layer would take as many passes as there are layers. Here each batch is run once, in a thread of
its own that waits at every layer until the others have come as far; only one thread runs at a time. What waits is kept
in memory, so this begins where activations are small.
"""

import os
import queue
import threading
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from .._checks import is_pair
from .._torch import device_of

_WAITING = 2**28  # bytes that a layer may always read on all samples together while their passes wait: 256 MiB
_APART = "the batches take different ways through the network, so they cannot be taken through it side by side"


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


def visits(
    model: nn.Module, modules: Iterable[nn.Module], inputs: list[torch.Tensor], after: bool = False
) -> Iterator[tuple[nn.Module, Iterable[torch.Tensor]]]:
    """Yield (module, what it reads on each batch) at each call of the modules, all batches at the same call.

    What is done to a module in between holds for everything behind it. With `after`, what it gives is yielded.
    """
    modules, seen = list(modules), Counter()
    calls = []  # (module, how many calls of it there were before, bytes for all samples)
    n_samples = sum(len(batch) for batch in inputs)
    for module, tensor in stops(model, modules, inputs[0][:1], after):
        calls.append((module, seen[module], tensor.numel() * tensor.element_size() * n_samples))
        seen[module] += 1
    # Large activations come first and few layers lie before them: there each layer costs passes of its own, that far.
    most = _waiting(inputs[0].device)
    start = 1 + max((i for i, (*_, size) in enumerate(calls) if size > most), default=-1)
    for module, before, _ in calls[:start]:
        yield module, (_nth(stops(model, [module], batch, after), before) for batch in inputs)
    rest = {module for module, *_ in calls[start:]}
    if rest:
        skip = sum(module in rest for module, *_ in calls[:start])
        yield from _side_by_side([stops(model, rest, batch, after) for batch in inputs], skip)


def _waiting(device: torch.device) -> int:
    """Return how many bytes a layer may read while passes wait: a tenth of what is free, for they hold several such."""
    if device.type == "cuda":
        return max(_WAITING, torch.cuda.mem_get_info(device)[0] // 10)
    try:
        return max(_WAITING, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 10)
    except (AttributeError, ValueError, OSError):  # not on every system
        return _WAITING


def _nth(passing, before) -> torch.Tensor:
    """What the call after `before` others is about; the pass ends there."""
    try:
        for _ in range(before):
            next(passing)
        return next(passing)[1]
    except StopIteration:
        raise ValueError(_APART) from None
    finally:
        passing.close()


def _side_by_side(passes, skip) -> Iterator[tuple[nn.Module, list[torch.Tensor]]]:
    """Take all passes from call to call; the first `skip` of them are passed over."""
    try:
        while True:
            here = [next(each, None) for each in passes]
            if all(stop is None for stop in here):
                return
            if any(stop is None or stop[0] is not here[0][0] for stop in here):
                raise ValueError(_APART)
            module, tensors = here[0][0], [tensor for _, tensor in here]
            del here  # nothing but the passes themselves shall hold on to their tensors
            if skip > 0:
                skip -= 1
                continue
            yield module, tensors
            del tensors
    finally:
        for each in passes:
            each.close()
