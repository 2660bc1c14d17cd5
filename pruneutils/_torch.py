"""Small things about torch that several rooms need: devices, modes, precision, random states, batches."""

import contextlib
import math
import os
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from ._checks import a_model, a_pair, is_pair, one_of, some_data

PRECISIONS = ("float32", "bfloat16", "auto")


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter, the CPU for a model without any."""
    return next((p.device for p in a_model(model).parameters()), torch.device("cpu"))


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put every module into train or eval mode inside, and each back into its own afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def batches(data: object) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the (inputs, targets) batches of `data`, which may be one such pair; TypeError if it is neither."""
    for batch in [data] if is_pair(data) else some_data("data", data):
        yield a_pair("a batch", batch)


def lazy_clone(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy whose memory is taken only when it, or the original, is written to."""
    try:
        return torch._lazy_clone(tensor)
    except (AttributeError, RuntimeError):  # another torch, or memory that is not torch's own
        return tensor.clone()


def all_finite(tensor: torch.Tensor) -> bool:
    """Tell whether no entry is NaN or infinite: from the extremes, which takes an eighth of the time of isfinite."""
    if tensor.numel() == 0 or tensor.is_complex():
        return bool(tensor.isfinite().all())
    low, high = (extreme.item() for extreme in tensor.detach().aminmax())  # both are NaN if any entry is
    return -math.inf < low and high < math.inf


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes an element


def zero_pruned(weight: torch.Tensor, keep: torch.Tensor) -> None:
    """Set the entries of a weight that a bool mask does not keep to +0.0, in place and unseen by autograd."""
    weight = weight.detach()
    plain = weight.__class__ in (torch.Tensor, nn.Parameter)
    if weight.device.type == "cpu" and plain and weight.element_size() in INTEGERS:
        bits = weight.view(INTEGERS[weight.element_size()]).numpy()
        np.multiply(bits, keep.numpy(), out=bits)  # eight times faster than masked_fill_, and needs no memory
        torch.autograd.graph.increment_version(weight)  # which numpy does not do
    else:
        weight.masked_fill_(~keep, 0)


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the CPU and `device`; torch.manual_seed would reseed all other GPUs too, which nobody puts back."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def generator(seed: int, purpose: str) -> torch.Generator:
    """Return a CPU generator for one purpose: the plain seed may have drawn the very weights that are to be pruned."""
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + zlib.crc32(purpose.encode())) % 2**32)


@contextlib.contextmanager
def own_random_state(device: torch.device, seed: int) -> Iterator[None]:
    """Start the random numbers of the CPU and of `device` from `seed` inside; outside, nothing has happened."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        seed_device(device, seed)
        yield


def resolve_precision(precision: str, model: nn.Module) -> str:
    """Return the precision that really runs, "float32" or "bfloat16", for one of `PRECISIONS`.

    "auto" is bfloat16 for convolutional networks where it pays: on a GPU, or on a CPU with instructions for it.
    """
    one_of("precision", precision, PRECISIONS)
    if precision == "auto":
        convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
        precision = "bfloat16" if convolutional and bfloat16_pays(device_of(model).type) else "float32"
    note_precision(precision)
    return precision


_NOTED: list[set[str]] = []


def note_precision(precision: str) -> None:
    """Tell the record of the present run in which precision it computes."""
    for noted in _NOTED:
        noted.add(precision)


@contextlib.contextmanager
def precisions_noted() -> Iterator[set[str]]:
    """Collect the precisions that run inside, so that the record of a run tells them."""
    _NOTED.append(set())
    try:
        yield _NOTED[-1]
    finally:
        _NOTED.pop()


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return a fresh context in which `device` computes in a resolved precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 numbers as they are inside; by default a GPU convolves them in TF32, 13 bits shorter."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if hasattr(cudnn, "conv"):  # torch 2.9 and newer
        places, name, full = (cudnn.conv, cudnn.rnn, matmul), "fp32_precision", "ieee"
    else:
        places, name, full = (cudnn, matmul), "allow_tf32", False
    before = [getattr(place, name) for place in places]
    try:
        for place in places:
            setattr(place, name, full)
        yield
    finally:
        for place, value in zip(places, before):
            setattr(place, name, value)


def bfloat16_pays(device_type: str) -> bool:
    """Tell whether convolutions are much faster in bfloat16: a CPU has instructions for it (1.4 to 2.7 times) or not.

    It is looked up and not measured: on a busy machine a measurement is right in most processes, not in all, and a
    study would mix precisions. ONEDNN_MAX_CPU_ISA can forbid the instructions.
    """
    if device_type != "cpu":
        return True
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if not any(word in allowed for word in ("ALL", "DEFAULT", "BF16", "FP16", "AMX")):
        return False
    flags = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, flag, lambda: False)() for flag in flags)
