"""Which channels of which layers have to go together. The only module that talks to torch-pruning.

torch-pruning traces one forward pass and tells what depends on what. It cuts nothing: its groups become plain lists of
indices, and `_slicing` does the cutting. Every call builds a new graph and hands over nothing that torch-pruning keeps,
since its own defaults are shared between calls and grow.
"""

import fnmatch
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .. import _torchvision
from .._checks import nearest
from .._torch import in_mode
from ._slicing import is_depthwise, kind_of_attention, size_of

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)  # each channel by itself
# Operations that move channels to other places, or mix them in a way that no list of indices describes.
_MOVING = (
    "Unbind", "Permute", "Transpose", "Bmm", "Baddbmm", "Softmax", "ScaledDotProduct", "PixelShuffle",
    "PixelUnshuffle", "Roll", "Flip", "IndexSelect", "Index", "Gather", "Cumsum", "Repeat",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What one layer loses with a group: its channel `index[i]` goes with the unit `unit[i]`."""

    layer: str
    role: str  # "out", "in" or "heads"
    index: np.ndarray
    unit: np.ndarray


@dataclass(frozen=True)
class Group:
    """Units that only go as a whole, such as the same channel of all layers that a shortcut adds up."""

    n_units: int
    parts: list[Part]
    filters: list[tuple[str, np.ndarray, np.ndarray]]  # (weight name, its rows, the unit of each)

    @property
    def layers(self) -> list[str]:
        """The layers whose filters these are."""
        return list(dict.fromkeys(part.layer for part in self.parts if part.role == "heads")) or [
            name.removesuffix("weight").removesuffix(".") for name, _, _ in self.filters
        ]


@dataclass
class Structure:
    """The groups of a model, and the layers whose filters stay, each with the reason."""

    groups: list[Group] = field(default_factory=list)
    protected: dict[str, str] = field(default_factory=dict)


def analyse(model: nn.Module, inputs: torch.Tensor, exclude: str | Iterable[str] = ()) -> Structure:
    """Find what can be removed from a model; `inputs` (N, ...) are run once.

    Raises ValueError for an entry of `exclude` that fits no layer.
    """
    attention = {name: module for name, module in model.named_modules() if kind_of_attention(module)}
    inside = {f"{name}.{part}" for name in attention for part in ("qkv", "proj", "out_proj")}
    excluded = _excluded(model, attention, exclude)
    structure = Structure()
    found = _trace(model, inputs, inside)
    coupled = any(len(_members(model, parts)) > 1 for parts, _, _ in found)
    for parts, problem, reads_input in found:
        members = _members(model, parts)
        if reads_input and coupled and not problem:
            problem = "it reads the input of a network with shortcuts"
        kept = [layer for layer in members if layer in excluded]
        problem = problem or (f"{kept[0]} is excluded" if kept else "")
        if problem:
            structure.protected |= dict.fromkeys(members, problem)
            continue
        filters = [(f"{p.layer}.weight".lstrip("."), p.index, p.unit) for p in parts if p.layer in members]
        filters = [f for f, p in zip(filters, (p for p in parts if p.layer in members)) if p.role == "out"]
        structure.groups.append(Group(int(parts[0].unit.max()) + 1, parts, filters))
    for name, module in attention.items():
        if name in excluded:
            structure.protected[name] = f"{name} is excluded"
        else:
            structure.groups.append(_heads(name, module))
    place = {name: number for number, (name, _) in enumerate(model.named_modules())}
    structure.groups.sort(key=lambda group: min(place[layer] for layer in group.layers))
    return structure


def _heads(name: str, module: nn.Module) -> Group:
    """The heads of an attention layer: each is a unit, and its filters are its rows of queries, keys and values."""
    n_heads, width = module.num_heads, module.head_dim
    heads = np.arange(n_heads)
    rows = np.arange(3 * n_heads * width)
    weight = "in_proj_weight" if kind_of_attention(module) == "torch" else "qkv.weight"
    return Group(n_heads, [Part(name, "heads", heads, heads)], [(f"{name}.{weight}", rows, rows // width % n_heads)])


def _members(model: nn.Module, parts: list[Part]) -> list[str]:
    """The layers of a group that have filters of their own; a depthwise convolution only follows another layer."""
    return [p.layer for p in parts if p.role == "out" and _has_filters(model.get_submodule(p.layer))]


def _has_filters(module: nn.Module) -> bool:
    return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and not is_depthwise(module)


def _excluded(model, attention, exclude) -> set[str]:
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    layers = [name for name, module in model.named_modules() if _has_filters(module)] + list(attention)
    excluded = set()
    for pattern in patterns:
        fits = [name for name in layers if fnmatch.fnmatchcase(name, pattern.removesuffix(".weight"))]
        if not fits:
            raise ValueError(f"exclude: no layer with filters fits {pattern!r}; {nearest(pattern, layers)}")
        excluded.update(fits)
    return excluded


# --- torch-pruning ---------------------------------------------------------------------------------------------------


def _trace(model, inputs, inside) -> list[tuple[list[Part], str, bool]]:
    """Groups of channels as (parts, why they have to stay or "", whether one of the layers reads the input)."""
    _torchvision.load()  # torch-pruning imports it, and not every torchvision can be imported as it is
    import torch_pruning

    names = {module: name for name, module in model.named_modules()}
    shared = _shared_parameters(model)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    with in_mode(model, training=False), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for p, _ in flags:  # the graph is that of autograd, which passes over frozen layers
                p.requires_grad_(p.is_floating_point())
            graph = torch_pruning.DependencyGraph()
            graph.build_dependency(model, inputs, output_transform=_marked, verbose=False)
            found, covered = [], set()
            for module in list(graph.module2node):
                name = names.get(module)
                if name is None or name in covered or name in inside or not _has_filters(module):
                    continue
                pruner = graph.get_pruner_of_module(module)
                n_units = pruner.get_out_channels(module)
                group = graph.get_pruning_group(module, pruner.prune_out_channels, list(range(n_units)))
                parts, problem = _parts(graph, group, names, shared)
                if not problem and any(item.dep.target.type.name == "SPLIT" for item in group):
                    first = graph.get_pruning_group(module, pruner.prune_out_channels, [0])
                    if any(len(item.idxs) > 1 for item in first if item.dep.target.module is module):
                        problem = "its channels are split into halves that meet again"
                covered.update(p.layer for p in parts if p.role == "out")
                members = [graph.module2node[model.get_submodule(layer)] for layer in _members(model, parts)]
                found.append((parts, problem, any(_reads_input(node, names) for node in members)))
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)
    return found


def _reads_input(node, names) -> bool:
    """Tell whether no layer with parameters comes before this one."""
    waiting, seen = list(node.inputs), set()
    while waiting:
        before = waiting.pop()
        if before.module in names and next(before.module.parameters(), None) is not None:
            return False
        if before not in seen:
            seen.add(before)
            waiting += before.inputs
    return True


def _marked(outputs) -> list[torch.Tensor]:
    """Give every output an operation of its own: only such are outputs to the graph."""
    leaves = [leaf for leaf in tree_leaves(outputs) if torch.is_tensor(leaf) and leaf.grad_fn is not None]
    return [leaf * 1 for leaf in leaves]


def _parts(graph, group, names, shared) -> tuple[list[Part], str]:
    """What the layers of a group lose, and what forbids to cut it."""
    parts, problem = [], ""
    for item in group:
        module, kind = item.dep.target.module, item.dep.target.type.name
        if module not in names:
            problem = problem or _forbids(kind, module)
            continue
        layer = names[module]
        index, unit = np.array(item.idxs, dtype=np.int64), np.array(item.root_idxs, dtype=np.int64)
        has_filters = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
        if not has_filters and not isinstance(module, _NORMS):
            if next(module.parameters(), None) is not None or kind not in ("ELEMENTWISE", "RESHAPE"):
                problem = problem or f"it feeds {layer} ({type(module).__name__}), which looks at several channels"
            continue
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            continue
        out = not has_filters or is_depthwise(module) or graph.is_out_channel_pruning_fn(item.dep.handler)
        role = "out" if out else "in"
        if not problem and getattr(module, "groups", 1) > 1 and not is_depthwise(module):
            problem = f"{layer} is a grouped convolution"
        if not problem and any(id(p) in shared for p in module.parameters(recurse=False)):
            problem = f"{layer} shares its weight with another layer"
        size = size_of(module, role)
        whole = len(index) == size and len(np.unique(index)) == size
        if not problem and (index.max() >= size or (has_filters and role == "out" and not whole)):
            problem = f"its channels and those of {layer} meet in a way that indices do not describe"
        parts.append(Part(layer, role, index, unit))
    return parts, problem


def _forbids(kind: str, module) -> str:
    """Why an operation or a parameter in between forbids to cut, or ""."""
    if kind == "OUTPUT":
        return "it gives the model's outputs"
    if kind == "PARAMETER":
        return f"it meets a parameter of shape {tuple(module.shape)} that belongs to no layer"
    if kind in ("UNBIND", "EXPAND", "SLICE"):
        return f"its channels pass an operation ({kind.lower()}) that gives them other places"
    operation = str(getattr(module, "_grad_fn", ""))
    if operation.startswith(_MOVING):
        return f"its channels pass {operation}, which gives them other places"
    return ""


def _shared_parameters(model) -> set[int]:
    """Ids of the parameters that several layers have."""
    seen, shared = {}, set()
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None and seen.setdefault(id(p), module) is not module:
                shared.add(id(p))
    return shared
