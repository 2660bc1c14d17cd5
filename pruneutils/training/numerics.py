"""What decides how a training run rounds: kernels that repeat, and the layout of the weights in memory."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from .._torch import full_float32, own_random_state


@contextlib.contextmanager
def reproducible(device: torch.device, seed: int) -> Iterator[None]:
    """Give training a random state of its own, and on a GPU only kernels that repeat and do not round to TF32."""
    deterministic = torch.backends.cudnn.deterministic
    with own_random_state(device, seed), full_float32():
        torch.backends.cudnn.deterministic = True
        try:
            yield
        finally:
            torch.backends.cudnn.deterministic = deterministic


@contextlib.contextmanager
def fastest_layout(model: nn.Module) -> Iterator[None]:
    """Put the channels of convolutions last, as they run fastest in any precision; afterwards where they were.

    The layout depends on the model alone, since sums round differently in another one.
    """
    channels_last = any(isinstance(module, nn.Conv2d) for module in model.modules()) and not _corrupts(model)
    own = {id(p) for p in model.parameters() if p.ndim == 4 and not p.is_contiguous()}
    if channels_last:
        _set_layout(model, lambda p: torch.channels_last)
    try:
        yield
    finally:
        if channels_last:
            _set_layout(model, lambda p: torch.channels_last if id(p) in own else torch.contiguous_format)


def _corrupts(model: nn.Module) -> bool:
    """Tell whether a CPU could write past its memory with channels last: strided 1x1 convolutions of few channels.

    oneDNN issue 6035: their weight gradient overruns a buffer where the input has fewer channels than a vector holds,
    8 with AVX2 and 16 with AVX-512. It ends in a crash, a hang, or wrong gradients. We take 16 on every machine.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return any(set(m.kernel_size) == {1} and max(m.stride) > 1 and m.in_channels // m.groups < 16 for m in layers)


def _set_layout(model, memory_format_of):
    for p in model.parameters():
        if p.ndim == 4:  # Module.to() refuses the five dimensions of Conv3d
            p.data = p.data.contiguous(memory_format=memory_format_of(p))
