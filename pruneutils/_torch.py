"""Small things about torch that several rooms need: devices, modes, precision, random states, batches."""

import contextlib
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ._checks import a_batch, is_batch, is_pair, one_of, shapes, some_data

Inputs = torch.Tensor | Mapping[str, object] | tuple[torch.Tensor, ...]

LEFT_OUT = -100  # the targets that torch's cross-entropy ignores by default, such as padding


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter, the CPU for a model without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


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


@contextlib.contextmanager
def restored_on_error(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Put the values of these tensors back if an error comes out of the `with` block."""
    saved = [(tensor.detach(), tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    except BaseException:
        for tensor, value in saved:
            tensor.copy_(value)
        raise


def batches(data: object, targets: bool = True) -> Iterator[tuple[Inputs, torch.Tensor | None]]:
    """Yield the (inputs, targets) of each batch of `data`, which may be a single batch.

    Inputs are a tensor, a tuple of several, or a mapping of tensors, whose "labels" are the targets. Only without
    `targets` may a batch lack them (None). Targets that repeat the "input_ids" become the next tokens.
    """
    two = not targets and isinstance(data, list) and is_pair(data)  # an iterable of two inputs, if they are alike
    two = two and data[0].ndim == data[1].ndim > 1 and data[0].dtype == data[1].dtype
    for batch in [data] if is_batch(data) and not two else some_data("data", data):
        inputs, own = a_batch("a batch", batch)
        if isinstance(inputs, Mapping):
            own = inputs.get("labels") if own is None else own
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
            own = None if own is None else _next_tokens(own, inputs)
        if targets and own is None:
            what = f"{shapes(inputs)} without targets"
            raise TypeError(f"a batch must be an (inputs, targets) pair or a mapping with 'labels', not {what}")
        yield inputs, own


def _next_tokens(targets, inputs) -> torch.Tensor:
    """Shift targets that repeat the tokens they stand at to the token before, and leave out the padded ones."""
    tokens, padding = inputs.get("input_ids"), inputs.get("attention_mask")
    if padding is not None and padding.shape == targets.shape and not targets.is_floating_point():
        targets = targets.masked_fill(padding == 0, LEFT_OUT)
    counts = targets != LEFT_OUT
    alike = tokens is not None and tokens.shape == targets.shape and targets.ndim == 2
    if not alike or not torch.equal(targets[counts], tokens[counts]):
        return targets
    following = F.pad(targets[:, 1:], (0, 1), value=LEFT_OUT)
    return following if padding is None else following.masked_fill(padding == 0, LEFT_OUT)


def forward(model: Callable, inputs: Inputs, whole: bool = False) -> object:
    """Run a model on inputs of every form; of an output with `.logits`, return these unless it is wanted `whole`."""
    if isinstance(inputs, Mapping):
        returned = model(**inputs)
    else:
        returned = model(inputs) if torch.is_tensor(inputs) else model(*inputs)
    logits = getattr(returned, "logits", None)
    return logits if torch.is_tensor(logits) and not whole else returned


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Move inputs of every form; to a GPU without waiting."""
    return tree_map_only(torch.Tensor, lambda x: x.to(device, non_blocking=device.type != "cpu"), inputs)


def n_samples(inputs: Inputs) -> int:
    """Return the number of samples N among inputs of every form."""
    return next((len(leaf) for leaf in tree_leaves(inputs) if torch.is_tensor(leaf) and leaf.ndim), 0)


def take(inputs: Inputs, samples: slice) -> Inputs:
    """Return these samples of inputs of every form."""
    n = n_samples(inputs)
    return tree_map_only(torch.Tensor, lambda x: x[samples] if x.ndim and len(x) == n else x, inputs)


def inputs_of(data: object, model: nn.Module, most: int | None = None) -> Inputs:
    """Return the inputs of all batches, or the first `most` samples, joined and on the model's device."""
    parts, n = [], 0
    for inputs, _ in batches(data, targets=False):
        parts.append(inputs)
        n += n_samples(inputs)
        if most is not None and n >= most:
            break
    if not n:
        raise ValueError("data holds no sample")
    return to_device(take(_joined(*parts), slice(most)), device_of(model))


def _joined(first: object, *others: object, padded: bool = False) -> object:
    """Put the inputs of several batches together; beside an "attention_mask", zeros follow those that are shorter."""
    parts = first, *others
    if isinstance(first, Mapping):
        return {key: _joined(*(part[key] for part in parts), padded="attention_mask" in first) for key in first}
    if isinstance(first, tuple | list):
        return tuple(map(_joined, *parts))
    if padded and torch.is_tensor(first) and first.ndim == 2:
        longest = max(part.shape[1] for part in parts)
        parts = [F.pad(part, (0, longest - part.shape[1])) for part in parts]
    return torch.cat(parts) if torch.is_tensor(first) else first


def tokens_only(values: torch.Tensor, inputs: Inputs, channel: int = -1) -> torch.Tensor:
    """Return what a layer reads with its features last, but not (N, tokens) where the "attention_mask" pads."""
    values = values.movedim(channel, -1)
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if mask is None or mask.ndim != 2:
        return values
    for kept in (mask != 0, mask.flatten() != 0):
        if values.ndim > kept.ndim and values.shape[: kept.ndim] == kept.shape:
            return values if kept.all() else values[kept]
    return values


@contextlib.contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable, after: bool = False) -> Iterator[None]:
    """Call `hook(module, args)` before, or with the output after, each call of these modules; `args` hold all."""

    def with_keywords(module, args, keywords, *output):
        return hook(module, (*args, *keywords.values()), *output)

    with contextlib.ExitStack() as hooks:
        for m in modules:
            register = m.register_forward_hook if after else m.register_forward_pre_hook
            hooks.enter_context(register(with_keywords, with_kwargs=True))
        yield


def all_finite(tensor: torch.Tensor) -> bool:
    """Say whether no entry is NaN or infinite: from the extremes, which takes an eighth of the time of isfinite."""
    if tensor.numel() == 0 or tensor.is_complex():
        return bool(tensor.isfinite().all())
    return all(map(math.isfinite, (extreme.item() for extreme in tensor.detach().aminmax())))


def is_plain(tensor: torch.Tensor) -> bool:
    """Say whether a tensor is one block of numbers: not sharded, not packed by a subclass, not sparse."""
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__ and tensor.layout == torch.strided


def unmaskable(parameter: torch.Tensor) -> str:
    """Say why a parameter can have no mask, and the way out; "" if it can."""
    if parameter.is_meta:
        return "is on the meta device, without values; load the whole model first, without offloading"
    if type(parameter).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"is a {type(parameter).__name__}; prune the model before it is sharded or quantized"
    if parameter.layout != torch.strided:
        return f"is stored as {parameter.layout}; convert it by .to_dense()"
    if not (parameter.dtype.is_floating_point or parameter.dtype.is_complex):
        return f"holds {parameter.dtype}; prune the model before it is quantized"
    return ""


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
    """Return a seed for one purpose within a run, such as `derive_seed(seed, "grow", step)`."""
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
    new = hasattr(cudnn, "conv")  # torch 2.9 and newer
    places = (cudnn.conv, cudnn.rnn, matmul) if new else (cudnn, matmul)
    name, full = ("fp32_precision", "ieee") if new else ("allow_tf32", False)
    before = [getattr(place, name) for place in places]
    try:
        for place in places:
            setattr(place, name, full)
        yield
    finally:
        for place, value in zip(places, before):
            setattr(place, name, value)


def bfloat16_pays(device_type: str) -> bool:
    """Say whether convolutions are much faster in bfloat16, by a CPU's instructions: a measurement could be wrong."""
    if device_type != "cpu":
        return True
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    has_instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return has_instructions and any(word in allowed for word in ("ALL", "DEFAULT", "BF16", "FP16", "AMX"))
