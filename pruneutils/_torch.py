"""Small things about torch that several rooms need: devices, modes, precision, random states, batches."""

import contextlib
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import nn

from ._checks import a_model, a_pair, is_pair, one_of, some_data


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


def inputs_of(data: object, model: nn.Module, most: int | None = None) -> torch.Tensor:
    """Return the inputs (N, ...) of all batches, or the first `most`, as one tensor on the model's device."""
    parts = []
    for batch in [data] if torch.is_tensor(data) or is_pair(data) else some_data("data", data):
        inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not torch.is_tensor(inputs):
            raise TypeError(f"a batch must be inputs or an (inputs, targets) pair of tensors, not {type(inputs)}")
        parts.append(inputs)
        if most is not None and sum(map(len, parts)) >= most:
            break
    if not sum(map(len, parts)):
        raise ValueError("data holds no sample")
    return torch.cat(parts)[:most].to(device_of(model))


@contextlib.contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable, after: bool = False) -> Iterator[None]:
    """Call `hook` before (or after) each call of these modules, inside the `with` block."""
    with contextlib.ExitStack() as hooks:
        for m in modules:
            hooks.enter_context(m.register_forward_hook(hook) if after else m.register_forward_pre_hook(hook))
        yield


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


def derive_seed(seed: int, *path: int | str) -> int:
    """Return a seed for one purpose within a run, such as `derive_seed(seed, "grow", step)`: the scheme everywhere."""
    numbers = [zlib.crc32(each.encode()) if isinstance(each, str) else each for each in path]
    return int(np.random.SeedSequence([seed, *numbers]).generate_state(1)[0])


@contextlib.contextmanager
def own_random_state(device: torch.device, seed: int) -> Iterator[None]:
    """Start the random numbers of the CPU and of `device` from `seed` inside; outside, nothing has happened."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        seed_device(device, seed)
        yield


def resolve_precision(precision: str, model: nn.Module) -> str:
    """Return the precision that really runs; "auto" is bfloat16 for convolutional networks where it pays."""
    one_of("precision", precision, ("float32", "bfloat16", "auto"))
    if precision == "auto":
        convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
        precision = "bfloat16" if convolutional and bfloat16_pays(device_of(model).type) else "float32"
    for noted in _NOTED:
        noted.add(precision)
    return precision


_NOTED: list[set[str]] = []


@contextlib.contextmanager
def precisions_noted() -> Iterator[set[str]]:
    """Collect the precisions that run inside, for the record of a run."""
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
    """Tell whether convolutions are much faster in bfloat16, by a CPU's instructions: a measurement could be wrong."""
    if device_type != "cpu":
        return True
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    flags = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    has_instructions = any(getattr(torch.cpu, flag, lambda: False)() for flag in flags)
    return has_instructions and any(word in allowed for word in ("ALL", "DEFAULT", "BF16", "FP16", "AMX"))
