"""Which channels of which layers have to go together: a forward pass in which tensors carry labels of their channels.

A label says which filter of which layer a channel comes from. Operations that move channels move their labels. Filters
whose channels meet entry by entry go together. Filters stay if their channels are mixed, meet values that no layer
gives, or are lost at a place that is written into the code.
"""

import re
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .._torch import Inputs, forward, hooked
from ..costs import _plain_kernels
from ..pruning.criteria import untouched
from ..target import Target, layer_name, match_layers
from .slicing import FILTERING, Key, has_filters, is_layer, kind_of_attention, size_of

_COPYING = "_to_copy clone hardswish hardswish_ hardtanh hardtanh_ masked_fill masked_fill_".split()  # entry by entry
_MOVING = ("_unsafe_view", "repeat", "roll", "flip")  # and all operations that torch calls views
_RESIZING = re.compile("pool|pad|upsample")  # within channels, where the number of channels stays


@dataclass(frozen=True)
class Group:
    """Units that only go as a whole, such as the same channel of all layers that a shortcut adds up."""

    n_units: int
    layers: list[str]  # those whose filters these are
    channels: dict[Key, np.ndarray]  # the unit of each channel of a layer and role, -1 for those of other groups
    filters: dict[str, np.ndarray]  # {weight name: the unit of each of its filters}


def analyse(target: Target, inputs: Inputs, exclude: str | Iterable[str] = ()) -> tuple[list[Group], dict]:
    """Return the groups of a model, and {layer whose filters stay: the reason}, by running `inputs` (N, ...) once."""
    attention = {name: module for name, module in target.modules.items() if kind_of_attention(module)}
    weights = [f"{name}.weight" for name, module in target.modules.items() if has_filters(module) or name in attention]
    patterns = [exclude] if isinstance(exclude, str) else exclude
    excluded = {layer_name(name) for name in match_layers(weights, patterns, "exclude")}
    trace = Trace(target, inputs, plain={f"{name}.qkv" for name in attention})
    groups, protected, own = [], {}, {(layer, "out"): labels for layer, labels in trace.filters.items()}
    n_labels = sum(map(len, own.values()))
    layers = [np.stack([np.full_like(labels, labels[0]), labels]) for labels in own.values()]
    unit_of, group_of = classes(n_labels, trace.pairs), classes(n_labels, [*trace.pairs, *layers])  # each label
    reasons = {int(group_of[label]): reason for label, reason in reversed(trace.stays.items())}  # the first of each
    for group in np.unique(group_of).tolist():
        units = np.unique(unit_of[group_of == group])
        number = np.full(n_labels + 1, -1)  # that of the label -1 is the last one
        number[:-1][group_of == group] = np.searchsorted(units, unit_of[group_of == group])
        channels = {key: number[labels] for key, labels in (own | trace.reads).items() if (number[labels] >= 0).any()}
        names = [layer for layer, role in channels if (layer, role) in own]
        kept = [f"{layer} is excluded" for layer in names if layer in excluded]
        kept += ["all its channels go together"] if len(units) == 1 < len(own[names[0], "out"]) else []
        if group in reasons or kept:
            protected |= dict.fromkeys(names, reasons.get(group) or kept[0])
        else:
            filters = {f"{layer}.weight".lstrip("."): channels[layer, "out"] for layer in names}
            groups.append(Group(len(units), names, channels, filters))
    for name, module in attention.items():
        if name in excluded:
            protected[name] = f"{name} is excluded"
        else:  # each head is a unit; its filters are its rows of queries, keys and values
            heads = np.arange(module.num_heads)
            weight = "in_proj_weight" if kind_of_attention(module) == "torch" else "qkv.weight"
            filters = {f"{name}.{weight}".lstrip("."): np.tile(heads.repeat(module.head_dim), 3)}
            groups.append(Group(len(heads), [name], {(name, "heads"): heads}, filters))
    place = {name: number for number, name in enumerate(target.modules)}
    return sorted(groups, key=lambda group: min(place[layer] for layer in group.layers)), protected


class Channels(NamedTuple):
    """The labels of a tensor along a dimension, -1 for channels that no layer with filters gives."""

    dim: int
    labels: np.ndarray


class Trace(TorchDispatchMode):
    """What a forward pass shows about the filters of a model; `plain` layers give no channels of their own."""

    def __init__(self, target: Target, inputs: Inputs, plain: Container[str] = ()):
        super().__init__()
        self.filters: dict[str, np.ndarray] = {}  # the labels of the filters of each layer: 0, 1, ... over all layers
        self.reads: dict[Key, np.ndarray] = {}  # the label of each channel that a layer reads
        self.pairs: list[np.ndarray] = []  # of labels that go together, (2, n)
        self.stays: dict[int, str] = {}  # labels of filters that stay, and why
        self._plain, self._names = plain, {module: name for name, module in target.modules.items()}
        self._removed = getattr(target.model, "removed", {})
        self._uses = Counter(id(p) for m in target.modules.values() for p in m._parameters.values())
        self._weights = {p.untyped_storage()._cdata for p in target.model.parameters()}
        self._known: dict[int, tuple[torch.Tensor, Channels]] = {}  # by the id of the tensor, which lives with it
        self._running: list[nn.Module] = []  # the innermost layer last
        modules = [m for m in target.modules.values() if is_layer(m) or next(m.children(), None) is None]
        with untouched(target.model), torch.inference_mode(False), torch.no_grad(), _plain_kernels(target.model):
            with hooked(modules, lambda m, _: self._running.append(m)), hooked(modules, self._leave, after=True), self:
                outputs = forward(target.model, inputs, whole=True)
        for leaf in tree_leaves(outputs):
            self._keep(self._of(leaf), "it gives the model's outputs")
        self._known.clear()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to be skipped by the compiler means to import it, which takes seconds

    def _of(self, tensor) -> Channels | None:
        return self._known[id(tensor)][1] if id(tensor) in self._known else None

    def _note(self, tensor, channels) -> None:
        self._known.pop(id(tensor), None)
        if channels is not None:
            self._known[id(tensor)] = tensor, channels

    def _keep(self, channels, reason) -> None:
        for label in () if channels is None else channels.labels[channels.labels >= 0].tolist():
            self.stays.setdefault(label, reason)

    def _join(self, labels, others, reason) -> None:
        """Join the filters whose channels meet; those that meet none stay."""
        differ = labels != others
        pairs = np.stack([labels[differ], others[differ]])
        self.pairs.append(pairs[:, pairs.min(0) >= 0])
        self._keep(Channels(0, pairs.max(0)[pairs.min(0) < 0]), reason)

    def _leave(self, module, args, output) -> None:
        self._running.pop()
        tensor = next(filter(torch.is_tensor, args), None)
        if not is_layer(module) or not torch.is_tensor(output) or tensor is None:
            return
        name, given, role = self._names[module], self._of(tensor), "in" if has_filters(module) else "out"
        n_dims = len(module.kernel_size) + 1 if hasattr(module, "kernel_size") else 1  # a channel's, and its own
        dim = tensor.ndim - n_dims if isinstance(module, FILTERING) else 1
        if given is not None and (given.dim != dim or len(given.labels) != size_of(module, role)):
            self._keep(given, f"{name} reads its channels along another dimension")
            given = None
        if given is not None:
            before = self.reads.setdefault((name, role), given.labels)
            self._join(before, given.labels, f"{name} is called with channels of different layers")
        own = given if role == "out" else self._own(name, dim, size_of(module, "out"))
        self._note(output, own)
        if problem := self._problem(name, module, role):
            self._keep(own, problem)
            self._keep(given, problem)

    def _own(self, name, dim, size) -> Channels | None:
        """The labels of a layer's filters; none if a single one is left, which stays in any case."""
        if name in self._plain or (size == 1 and "out" not in self._removed.get(name, ())):
            return None
        start = sum(map(len, self.filters.values()))
        labels = self.filters.setdefault(name, np.arange(start, start + size))
        return Channels(dim, labels) if size > 1 else None

    def _problem(self, name, module, role) -> str:
        """Why a layer forbids to cut it, or ""."""
        if role == "in" and getattr(module, "groups", 1) > 1:
            return f"{name} is a grouped convolution"
        if role == "in" and module._parameters.keys() != {"weight", "bias"}:  # a parametrization, or a type of its own
            return f"{name} ({type(module).__name__}) has other parameters than a weight and a bias"
        is_shared = any(self._uses[id(p)] > 1 for p in module.parameters(recurse=False))
        return f"{name} shares its weight with another layer" if is_shared else ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        result = func(*args, **kwargs)
        known = [leaf for leaf in tree_leaves((args, kwargs)) if id(leaf) in self._known]
        makes_new = name.endswith("_like") or name.startswith("new_")  # from the shape alone
        if known and not makes_new and not (self._running and is_layer(self._running[-1])):
            outputs = [leaf for leaf in tree_leaves(result) if torch.is_tensor(leaf)]
            found = self._follow(func, name, args, kwargs, known, outputs) or [None] * len(outputs)
            if outputs and None in found:
                for tensor in known:
                    self._keep(self._of(tensor), f"its channels pass {name}{self._place()}, which mixes or moves them")
            for output, channels in zip(outputs, found):
                self._note(output, channels)
        return result

    def _follow(self, func, name, args, kwargs, known, outputs) -> list[Channels | None] | None:
        """The channels of the outputs of an operation; None where it loses, mixes or moves some."""
        if func._schema.is_mutable and _is_part(args[0]) and any(tensor is not args[0] for tensor in known):
            return None  # written into a part of another tensor
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        named = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
        if torch.Tag.pointwise in func.tags or name in _COPYING:
            return [self._met(tensors, outputs[0].ndim)] * len(outputs)
        if name == "cat":
            return [self._concatenated(tensors, named.get("dim", 0) % outputs[0].ndim)]
        if len(known) > 1:
            return None
        (dim, labels), before, after = self._of(known[0]), known[0].shape, outputs[0].shape
        if func.is_view or name in _MOVING:
            return self._moved(func, args, kwargs, after if name in ("view", "_unsafe_view") else None)
        dims = named.get("dim")
        along = {each % len(before) for each in ([dims] if isinstance(dims, int) else dims or range(len(before)))}
        n_fewer = len(before) - len(after)  # of a reduction
        if n_fewer not in (0, len(along)) or (dim in along and not _RESIZING.search(name)):
            return None
        now = dim - sum(each < dim for each in along) if n_fewer else dim
        return [Channels(now, labels)] * len(outputs) if after[now] == before[dim] else None

    def _met(self, tensors, ndim) -> Channels | None:
        """Join the filters whose channels meet in tensors that are broadcast to `ndim` dimensions."""
        found = [(each.dim + ndim - t.ndim, each.labels) for t in tensors if (each := self._of(t)) is not None]
        dim, labels = found[0]
        if any(other_dim != dim or len(others) != len(labels) for other_dim, others in found):
            return None
        for _, others in found[1:]:
            self._join(labels, others, "its channels meet some that no layer gives")
            labels = np.maximum(labels, others)
        for tensor in tensors:
            size = tensor.shape[dim - ndim] if tensor.ndim >= ndim - dim else 1
            if size > 1 and id(tensor) not in self._known:
                kind = "a parameter" if tensor.untyped_storage()._cdata in self._weights else "values"
                what = f"{kind} of shape {tuple(tensor.shape)}{self._place()}"
                self._keep(Channels(dim, labels), f"it meets {what}, which no layer with filters gives")
        return Channels(dim, labels)

    def _concatenated(self, tensors, dim) -> Channels | None:
        """The channels of tensors after each other; where these are no other channels, they meet."""
        known = [self._of(tensor) for tensor in tensors]
        dims = {each.dim for each in known if each is not None}
        if dims != {dim}:
            return None if dim in dims else self._met(tensors, tensors[0].ndim)
        parts = [np.full(t.shape[dim], -1) if each is None else each.labels for t, each in zip(tensors, known)]
        return Channels(dim, np.concatenate(parts))

    def _moved(self, func, args, kwargs, shape) -> list[Channels | None] | None:
        """Do an operation to labels. All are still there, or in pieces: then the same channels of all go together."""
        tensor, (dim, labels) = args[0], self._of(args[0])
        labels = torch.from_numpy(labels).view([-1 if d == dim else 1 for d in range(tensor.ndim)]).expand(tensor.shape)
        moved = func(labels, *args[1:], **kwargs) if shape is None else labels.reshape(shape)
        pieces = [_channels(each) for each in tree_leaves(moved)]
        if None in pieces or len({len(piece.labels) for piece in pieces}) > 1:
            return None
        is_written = "sizes" in func.overloadpacket.__name__  # numbers in the code, which a smaller network has not
        if len(pieces) > 1 and is_written and len(pieces[0].labels) < tensor.shape[dim]:
            return None
        if not np.array_equal(np.unique(np.concatenate([piece.labels for piece in pieces])), labels.unique()):
            return None
        for piece in pieces[1:]:
            self._join(pieces[0].labels, piece.labels, "its channels are split")
        return pieces

    def _place(self) -> str:
        """Name the layer that is running, if there is one."""
        return "".join(f" in {self._names[module]} ({type(module).__name__})" for module in self._running[-1:])


def _is_part(tensor) -> bool:
    return tensor.numel() * tensor.element_size() < tensor.untyped_storage().nbytes()


def _channels(labels: torch.Tensor) -> Channels | None:
    """The dimension along which labels differ, and these; None unless there is one such dimension."""
    first = (labels.narrow(dim, 0, 1).expand_as(labels) for dim in range(labels.ndim))
    dims = [dim for dim, each in enumerate(first) if not torch.equal(each, labels)]
    if len(dims) != 1:
        return None
    return Channels(dims[0], labels.movedim(dims[0], 0).reshape(labels.shape[dims[0]], -1)[:, 0].numpy())


def classes(n: int, pairs: list[np.ndarray]) -> np.ndarray:
    """Return for each of n numbers the smallest one that it goes together with, by pairs (2, n) or chains of such."""
    found, (a, b) = np.arange(n), np.concatenate([np.zeros((2, 0), np.int64), *pairs], 1)
    while not np.array_equal(found[a], found[b]):
        for left, right in ((a, b), (b, a)):
            np.minimum.at(found, left, found[right])
        found = found[found]
    return found
