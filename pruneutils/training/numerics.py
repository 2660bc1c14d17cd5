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
    """Put the channels of convolutions last, which is fastest and depends on the model alone; afterwards as before."""
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    # Strided 1x1 convolutions of few channels could write past the CPU's memory (oneDNN issue 6035).
    corrupts = any(set(m.kernel_size) == {1} and max(m.stride) > 1 and m.in_channels // m.groups < 16 for m in layers)
    # Module.to() refuses the five dimensions of Conv3d
    weights = [p for p in model.parameters() if p.ndim == 4] if layers and not corrupts else []
    layouts = [torch.contiguous_format if p.is_contiguous() else torch.channels_last for p in weights]
    for p in weights:
        p.data = p.data.contiguous(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for p, layout in zip(weights, layouts):
            p.data = p.data.contiguous(memory_format=layout)
