"""Pruned models in files: safetensors and JSON, which load into the plain class and cannot run code.

A weight with a mask is stored as two tensors: `<name>#mask`, one bit per entry, packed, and `<name>#kept`, the values
where the bit is 1. Other parameters and buffers are stored as they are, tied ones once. The texts of a file are
`format`, `version`, `checksum` and, each in JSON, `shapes` (of the weights with a mask), `tied` ({name: the stored
one}), `facts`, `recipe` (the arguments of `models.create`, or null) and `removed` (what `prune_filters` has left of
each layer). Files of version 1 lack `version`, `checksum`, `tied` and `removed`.
"""

import copy
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn

from ._checks import a_model, a_path, nearest
from ._files import tied_names, write_whole
from ._torch import is_plain, unmaskable
from .filters.slicing import replay
from .model_utils import check_masks, get_masks, layer_name, make_permanent, revived, set_masks

Tensors = dict[str, torch.Tensor]

_VERSION = 2
_KINDS = {"shapes": dict, "tied": dict, "facts": dict, "recipe": dict | None, "removed": dict}  # of the JSON values


def save(model: nn.Module, path: str | os.PathLike, **facts: Any) -> Path:
    """Save weights, buffers and masks of a model, and any facts, to one file that cannot run code.

    The file appears whole or not at all. For a model from `models.create` it holds the recipe: `load` needs no model.
    For other programs, `safetensors.torch.save_model(model, path)` writes an ordinary state_dict, zeros and all.

    Args:
        model: Any `nn.Module`; what torch.compile and DataParallel have wrapped loads into the plain one.
        path: The file, usually *.safetensors; its folder is made if there is none.
        **facts: What to remember with the model: names and JSON values.

    Returns:
        The path.

    Raises:
        ValueError: If pruned weights are not zero, or a tensor is sparse or without values. Nothing is written then.

    Example:
        >>> model = pu.models.create("lenet300")
        >>> pu.load(pu.save(model, "lenet300.safetensors", accuracy=0.97)).facts
        {'accuracy': 0.97}
    """
    model, path = _unwrapped(a_model(model)), Path(a_path(path))
    state, masks = model.state_dict(), get_masks(model)
    for name, value in facts.items():
        if not _is_json(value):
            raise TypeError(f"the fact {name!r} is {type(value).__name__} and no JSON value such as a number or text")
    for name, tensor in state.items():
        if not torch.is_tensor(tensor):
            raise ValueError(f"{name} in the state_dict is a {type(tensor).__name__}, and only tensors can be saved")
        if tensor.is_meta or not is_plain(tensor):
            raise ValueError(f"{name} {unmaskable(tensor)}")
        if tensor.is_quantized or tensor.dtype in (torch.complex32, torch.complex128):
            raise ValueError(f"{name} holds {tensor.dtype}, which the format does not know; convert it first")
        if name.rpartition("#")[0] in masks:
            raise ValueError(f"{name}: a name with # belongs to the mask of {name.rpartition('#')[0]}; rename it")
    for name, n in revived(model).items():
        way = "pu.hold(model) zeroes them again, pu.make_permanent(model) keeps them"
        raise ValueError(f"{layer_name(name)}: {n:,} pruned weights are not zero. {way}")
    recipe, removed = getattr(model, "recipe", None), getattr(model, "removed", None)
    values = {
        "shapes": {name: list(mask.shape) for name, mask in masks.items()},
        "tied": tied_names(state, masks),
        "facts": facts,
        # they may be anything of the user's own, and a recipe may hold a class or a function
        "recipe": recipe if isinstance(recipe, dict) and "name" in recipe and _is_json(recipe) else None,
        "removed": removed if isinstance(removed, dict) and removed.keys() <= {*dict(model.named_modules())} else {},
    }
    tensors = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        if name in masks:
            mask = masks[name].cpu()
            tensors[f"{name}#mask"] = torch.from_numpy(np.packbits(mask.numpy().reshape(-1)))
            tensors[f"{name}#kept"] = tensor[mask]
        elif name not in values["tied"]:
            tensors[name] = tensor.clone()  # two views of one memory, which safetensors refuses
    texts = {"format": "pruneutils", "version": str(_VERSION)} | {k: json.dumps(v) for k, v in values.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, safetensors.torch.save(tensors, texts | {"checksum": checksum(tensors, texts)}))
    return path


def load(path: str | os.PathLike, model: nn.Module | None = None) -> nn.Module:
    """Load a file made by `save`, masks included; the whole file is checked before the model changes.

    Args:
        path: A file that `save` has written; for an ordinary state_dict see `models.load_weights`.
        model: One with the same names and shapes, whose masks are replaced; by default a new one, by the file's recipe.

    Returns:
        The model. `model.facts` holds the facts, unless a layer or tensor of the model is called so.

    Raises:
        ValueError: If the file is damaged, not ours, has no recipe where it must, or does not fit (nothing changes).

    Example:
        >>> pu.load(pu.save(torch.nn.Linear(3, 2), "layer.safetensors"), torch.nn.Linear(3, 2))
        Linear(in_features=3, out_features=2, bias=True)
    """
    path, given = a_path(path), None if model is None else a_model(model)
    try:
        tensors, masks, values = _read(path)
        model = _follow(values, tensors) if given is None else _unwrapped(given)
        # filters are removed from a copy first, so that a model that turns out not to fit keeps its own
        tried = _cut(copy.deepcopy(model), values["removed"]) if values["removed"] else model
        tensors = _fitted(tensors, tried.state_dict())
        check_masks(tried, masks)
    except OSError:
        raise
    except Exception as error:  # a file from a stranger can hold anything
        raise ValueError(f"{path}: {error}" if isinstance(error, ValueError) else f"{path}: {error!r}") from error
    own = make_permanent(_cut(model, values["removed"])).state_dict()
    for name, tensor in tensors.items():  # load_state_dict takes time quadratic in the layers that lie side by side
        own[name].copy_(tensor)
    if any(not torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items()):
        model.load_state_dict(tensors)
    set_masks(model, masks)
    loaded = model if given is None else given
    if isinstance(getattr(loaded, "facts", {}), dict):
        loaded.facts = values["facts"]
    return loaded


def checksum(tensors: Tensors, texts: dict[str, str]) -> str:
    """Return the SHA-256 of all names, types, shapes and bytes, whatever their order in the file."""
    digest = hashlib.sha256()
    for name, text in sorted(texts.items()):
        if name != "checksum":
            digest.update(repr((name, text)).encode(errors="surrogatepass"))
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode(errors="surrogatepass"))
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _is_json(value) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


# --- Reading what a stranger may have written ------------------------------------------------------------------------


def _read(path) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """Return tensors with all their names and zeros filled in, masks, and the JSON values; whatever is wrong raises."""
    with safetensors.safe_open(path, framework="pt") as file:
        texts, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    if texts.get("format") != "pruneutils":
        raise ValueError("not written by pu.save; pu.models.load_weights(model, path) loads a state_dict")
    if texts.get("version", "1") not in ("1", str(_VERSION)):
        raise ValueError(f"has version {texts['version']!r}; versions up to {_VERSION} can be read")
    if ("version" in texts or "checksum" in texts) and texts.get("checksum") != checksum(tensors, texts):
        raise ValueError("is damaged: its checksum is not that of its content")
    texts, masks = {"tied": "{}", "removed": "{}"} | texts, {}
    values = {name: json.loads(texts[name]) for name in _KINDS}
    for name, kind in _KINDS.items():
        if not isinstance(values[name], kind):
            raise ValueError(f"{name} is a {type(values[name]).__name__}")
    for name, shape in values["shapes"].items():
        if name in tensors:
            raise ValueError(f"{name} is stored twice, with a mask and without")
        tensors[name], masks[name] = _filled(name, shape, tensors.pop(f"{name}#mask"), tensors.pop(f"{name}#kept"))
    stored = set(tensors)
    for name, other in values["tied"].items():
        if name in stored or other not in stored:
            raise ValueError(f"{name} is tied to {other!r}, which does not fit what is stored")
        tensors[name] = tensors[other]
    return tensors, masks, values


def _filled(name, shape, bits, kept) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight with zeros where its mask has them, and the mask."""
    fits = all(type(size) is int and size >= 0 for size in shape) and kept.ndim == 1 and bits.dtype == torch.uint8
    n_entries = math.prod(shape) if fits else -1
    mask = np.unpackbits(bits.numpy()).astype(bool)
    if bits.shape != (-(-n_entries // 8),) or mask[n_entries:].any() or mask.sum() != len(kept):
        raise ValueError(f"{name}: mask and kept values do not fit each other or the shape {shape}")
    mask = mask[:n_entries]
    values = np.zeros((n_entries, kept.element_size()), np.uint8)  # bytes, since torch cannot index every type
    values[mask] = kept.contiguous().view(torch.uint8).numpy().reshape(len(kept), kept.element_size())
    return torch.from_numpy(values.reshape(-1)).view(kept.dtype).view(shape), torch.from_numpy(mask).view(shape)


def _follow(values, tensors) -> nn.Module:
    """Return a new model by the recipe, cut as the removed filters say, of the types that are stored."""
    from .models.building import follow  # models may import this room

    if values["recipe"] is None:
        raise ValueError("has no recipe, since models.create did not make its model; give load a model")
    n_entries = sum(tensor.numel() for tensor in tensors.values())
    if values["removed"]:  # the network was larger before, and how much the file does not say
        n_entries = max(100 * n_entries, 50_000_000)
    model = _cut(follow(values["recipe"], n_entries), values["removed"])
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        dtype = tensors.get(name, tensor).dtype
        if tensor.is_floating_point() and dtype.is_floating_point:
            tensor.data = tensor.data.to(dtype)
    return model


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of torch.compile, DataParallel and the like, which hold nothing else."""
    while model._modules.keys() in ({"module"}, {"_orig_mod"}) and not (model._parameters or model._buffers):
        (model,) = model._modules.values()
    return model


def _cut(model: nn.Module, removed: dict) -> nn.Module:
    """Remove the filters that the saved model has lost, in place, unless this one has lost them too."""
    return replay(model, removed) if removed and getattr(model, "removed", None) != removed else model


def _fitted(tensors: Tensors, own: Tensors) -> Tensors:
    """Return the tensors in the types of the model's own; ValueError where names, shapes or numbers do not fit."""
    fitted = {}
    for name in sorted(set(own) ^ set(tensors)):
        lacking, others = ("file", tensors) if name in own else ("model", own)
        raise ValueError(f"the {lacking} lacks {name!r}; {nearest(name, others)}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, in the model {tuple(own[name].shape)}")
        if tensor.dtype != own[name].dtype and not (tensor.is_floating_point() and own[name].is_floating_point()):
            raise ValueError(f"{name} is of type {tensor.dtype}, in the model of {own[name].dtype}")
        fitted[name] = tensor.to(own[name].dtype)
        if tensor.dtype != own[name].dtype and (tensor.double().isfinite() & ~fitted[name].double().isfinite()).any():
            raise ValueError(f"{name} has numbers too large for {own[name].dtype}, the type that it has in the model")
    for name, other in tied_names(own, {}).items():  # one tensor with two names holds only one value
        if not torch.equal(tensors[name], tensors[other]):
            raise ValueError(f"{name} and {other} are one tensor in the model, and two in the file")
    return fitted
