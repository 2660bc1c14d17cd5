"""The format of the files that `pruneutils.save` writes: plain data, checked in every respect before it is believed.

A file of version 2 holds tensors and texts. A weight with a mask stands there as two tensors: `<name>#mask`, one bit
per entry, packed, and `<name>#kept`, the values where the bit is 1. All other parameters and buffers are stored as they
are, tied ones once. The texts, each in JSON, are

    shapes    {name: shape} of the weights with a mask
    tied      {name: the name under which the same tensor is stored}
    facts     what the user has told
    recipe    the arguments of `models.create`, or null
    removed   what `prune_filters` has left of each layer, or {}

and besides them `format`, `version` and `checksum`. Files of version 1 have neither the last two, nor tied and removed,
and can be read.
"""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from . import _safetensors

VERSION = 2

_BITS, _KEPT = "#mask", "#kept"
_TEXTS = {
    1: {"format", "shapes", "facts", "recipe"},
    2: {"format", "version", _safetensors.CHECKSUM, "shapes", "tied", "facts", "recipe", "removed"},
}


def write(
    path: str | os.PathLike,
    state: Mapping[str, torch.Tensor],
    masks: Mapping[str, torch.Tensor],
    facts: str,
    recipe: str,
    removed: Mapping[str, Any],
) -> None:
    """Write a state_dict and its masks; facts and recipe are JSON already."""
    tied, tensors = tied_names(state, masks), {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        if name in masks:
            mask = masks[name].cpu()
            tensors[name + _BITS] = torch.from_numpy(np.packbits(mask.numpy().reshape(-1)))
            tensors[name + _KEPT] = tensor[mask]
        elif name not in tied:
            tensors[name] = tensor.clone()  # two views of one memory, which safetensors refuses
    texts = {
        "format": "pruneutils",
        "version": str(VERSION),
        "shapes": json.dumps({name: list(mask.shape) for name, mask in masks.items()}),
        "tied": json.dumps(tied),
        "facts": facts,
        "recipe": recipe,
        "removed": json.dumps(removed),
    }
    _safetensors.write(path, tensors, texts)


def tied_names(state: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return {name: the name under which the same tensor is stored}; a name with a mask is stored, else the first."""
    first, tied = {}, {}
    for name in sorted(state, key=lambda name: name not in masks):
        tensor = state[name]
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        if first.setdefault(place, name) != name:
            tied[name] = first[place]
    return tied


def read(path: str | os.PathLike) -> "Stored":
    """Return the content of the file; ValueError wherever it is not as `save` writes it."""
    tensors, texts = _safetensors.read(path, checked=False)
    if texts.get("format") != "pruneutils":
        raise ValueError(
            f"{path} was not written by pruneutils.save; models.load_weights(model, path) loads an ordinary state_dict"
        )
    version = texts.get("version", "1")
    if not version.isdecimal() or int(version) > VERSION:
        raise ValueError(f"{path} has version {version!r}; this pruneutils reads versions up to {VERSION}")
    if set(texts) != _TEXTS.get(int(version)):
        raise ValueError(f"{path} does not hold what a file of version {version} holds, but {', '.join(sorted(texts))}")
    return Stored(tensors, {"tied": "{}", "removed": "{}"} | texts)


class Stored:
    """The content of a file, checked in itself: every mask has as many bits as its weight, and as many values as 1s."""

    def __init__(self, tensors: dict[str, torch.Tensor], texts: dict[str, str]):
        self.facts = _parsed(texts, "facts", dict)
        self.recipe = _parsed(texts, "recipe", dict | None)
        self.tied = _parsed(texts, "tied", dict)
        self.removed = _parsed(texts, "removed", dict)
        self._bits, self._plain, self.shapes, self.dtypes = {}, dict(tensors), {}, {}
        for name, shape in _parsed(texts, "shapes", dict).items():
            bits, kept = self._plain.pop(name + _BITS, None), self._plain.pop(name + _KEPT, None)
            self._bits[name] = _unpacked(name, shape, bits, kept), kept
            self.shapes[name], self.dtypes[name] = torch.Size(shape), kept.dtype
        if both := sorted(set(self._bits) & set(self._plain)):
            raise ValueError(f"{both[0]} is stored twice, with a mask and without")
        self.shapes |= {name: tensor.shape for name, tensor in self._plain.items()}
        self.dtypes |= {name: tensor.dtype for name, tensor in self._plain.items()}
        for name, other in self.tied.items():
            if name in self.shapes or not isinstance(other, str) or other not in self.shapes:
                raise ValueError(f"{name} is tied to {other!r}, which does not fit what is stored")
        for name, other in self.tied.items():
            self.shapes[name], self.dtypes[name] = self.shapes[other], self.dtypes[other]

    def masks(self) -> dict[str, torch.Tensor]:
        """The masks, as bool tensors."""
        return {name: torch.from_numpy(bits).view(self.shapes[name]) for name, (bits, _) in self._bits.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors, those with masks filled up with zeros."""
        tensors = self._plain | {name: self._filled(name) for name in self._bits}
        return tensors | {name: tensors[other] for name, other in self.tied.items()}

    def _filled(self, name):
        """Put the kept values where the mask has them; as bytes, since torch cannot index every type."""
        mask, kept = self._bits[name]
        values = np.zeros((len(mask), kept.element_size()), np.uint8)
        values[mask] = kept.contiguous().view(torch.uint8).numpy().reshape(len(kept), kept.element_size())
        return torch.from_numpy(values.reshape(-1)).view(kept.dtype).view(self.shapes[name])


def _parsed(texts, name, kind):
    """Return the JSON value of one of the texts."""
    try:
        value = json.loads(texts[name])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({error})") from error
    if not isinstance(value, kind):
        raise ValueError(f"{name} should not be {type(value).__name__}")
    return value


def _unpacked(name, shape, bits, kept) -> np.ndarray:
    """Return the mask as a flat bool array."""
    if bits is None or kept is None:
        raise ValueError(f"{name} has a shape and a mask, but {_BITS if bits is None else _KEPT} is missing")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{name} has no shape: {shape!r}")
    n_entries = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.shape != (-(-n_entries // 8),) or kept.ndim != 1:
        raise ValueError(f"{name}: {tuple(bits.shape)} bytes of mask do not fit its shape {tuple(shape)}")
    every_bit = np.unpackbits(bits.numpy())
    mask = every_bit[:n_entries].astype(bool)
    if every_bit[n_entries:].any() or int(mask.sum()) != len(kept):
        raise ValueError(f"{name}: the mask keeps {int(every_bit.sum()):,} weights, and {len(kept):,} are stored")
    return mask
