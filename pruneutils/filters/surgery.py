"""Which channels of which layers have to go together. The only module that talks to torch-pruning.

torch-pruning traces one forward pass and finds what depends on what. It cuts nothing: its groups become plain lists of
indices, and `slicing` does the cutting. Every call builds a new graph: its own defaults are shared between calls.
"""

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .. import _torchvision
from ..pruning.criteria import untouched
from ..target import Target, layer_name, match_layers
from .slicing import FILTERING, has_filters, is_depthwise, kind_of_attention, size_of

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)  # each channel by itself
# Operations, by prefix, that move channels to other places, or mix them in a way that no list of indices describes.
_MOVING = "Unbind Permute Transpose Bmm Baddbmm Softmax ScaledDot Pixel Roll Flip Index Gather Cumsum Repeat".split()


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
    layers: list[str]  # those whose filters these are
    filters: list[tuple[str, np.ndarray, np.ndarray]]  # (weight name, its rows, the unit of each)


def analyse(target: Target, inputs: torch.Tensor, exclude: str | Iterable[str] = ()) -> tuple[list[Group], dict]:
    """Return the groups of a model, and {layer whose filters stay: the reason}, by running `inputs` (N, ...) once."""
    attention = {name: module for name, module in target.modules.items() if kind_of_attention(module)}
    inside = {f"{name}.{part}" for name in attention for part in ("qkv", "proj", "out_proj")}
    weights = [f"{name}.weight" for name, module in target.modules.items() if has_filters(module) or name in attention]
    patterns = [exclude] if isinstance(exclude, str) else exclude
    excluded = {layer_name(name) for name in match_layers(weights, patterns, "exclude")}
    groups, protected = [], {}
    found = _trace(target, inputs, inside)
    coupled = any(len(_members(target.modules, parts)) > 1 for parts, _, _ in found)
    for parts, problem, reads_input in found:
        members = _members(target.modules, parts)
        kept = [part.layer for part in members if part.layer in excluded]
        if not problem and reads_input and coupled:
            problem = "it reads the input of a network with shortcuts"
        elif not problem and kept:
            problem = f"{kept[0]} is excluded"
        if problem:
            protected |= {part.layer: problem for part in members}
            continue
        filters = [(f"{part.layer}.weight".lstrip("."), part.index, part.unit) for part in members]
        groups.append(Group(int(parts[0].unit.max()) + 1, parts, [part.layer for part in members], filters))
    for name, module in attention.items():
        if name in excluded:
            protected[name] = f"{name} is excluded"
        else:
            groups.append(_heads(name, module))
    place = {name: number for number, name in enumerate(target.modules)}
    return sorted(groups, key=lambda group: min(place[layer] for layer in group.layers)), protected


def _heads(name, module) -> Group:
    """The heads of an attention layer: each is a unit, and its filters are its rows of queries, keys and values."""
    n_heads, width = module.num_heads, module.head_dim
    heads, rows = np.arange(n_heads), np.arange(3 * n_heads * width)
    weight = "in_proj_weight" if kind_of_attention(module) == "torch" else "qkv.weight"
    filters = [(f"{name}.{weight}".lstrip("."), rows, rows // width % n_heads)]
    return Group(n_heads, [Part(name, "heads", heads, heads)], [name], filters)


def _members(modules, parts) -> list[Part]:
    """The parts of a group that are filters."""
    return [part for part in parts if part.role == "out" and has_filters(modules[part.layer])]


# --- torch-pruning ---------------------------------------------------------------------------------------------------


def _trace(target, inputs, inside) -> list[tuple[list[Part], str, bool]]:
    """Groups of channels as (parts, why they have to stay or "", whether one of the layers reads the input)."""
    _torchvision.load()  # torch-pruning imports it, and not every torchvision can be imported as it is
    import torch_pruning

    names = {module: name for name, module in target.modules.items()}
    uses = Counter(id(p) for module in target.modules.values() for p in module._parameters.values() if p is not None)
    shared = {key for key, n_uses in uses.items() if n_uses > 1}
    found, covered = [], set()
    # the graph is that of autograd, which passes over frozen layers
    parameters = [p for p in target.model.parameters() if p.is_floating_point()]
    with untouched(target.model, differentiable=parameters), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch_pruning.DependencyGraph()
        graph.build_dependency(target.model, inputs, output_transform=_marked, verbose=False)
        for module in list(graph.module2node):
            name = names.get(module)
            if name is None or name in covered or name in inside or not has_filters(module):
                continue
            pruner = graph.get_pruner_of_module(module)
            n_units = pruner.get_out_channels(module)
            group = graph.get_pruning_group(module, pruner.prune_out_channels, list(range(n_units)))
            parts, problem = _parts(graph, group, names, shared)
            if not problem and any(item.dep.target.type.name == "SPLIT" for item in group):
                first = graph.get_pruning_group(module, pruner.prune_out_channels, [0])
                if any(len(item.idxs) > 1 for item in first if item.dep.target.module is module):
                    problem = "its channels are split into halves that meet again"
            covered.update(part.layer for part in parts if part.role == "out")
            nodes = [graph.module2node[target.modules[part.layer]] for part in _members(target.modules, parts)]
            found.append((parts, problem, any(_reads_input(node, names) for node in nodes)))
    return found


def _marked(outputs) -> list[torch.Tensor]:
    """Give every output an operation of its own: only such are outputs to the graph."""
    leaves = [leaf for leaf in tree_leaves(outputs) if torch.is_tensor(leaf) and leaf.grad_fn is not None]
    return [leaf * 1 for leaf in leaves]


def _reads_input(node, names) -> bool:
    """Return whether no layer with parameters comes before this one."""
    waiting, seen = list(node.inputs), set()
    while waiting:
        before = waiting.pop()
        if before.module in names and next(before.module.parameters(), None) is not None:
            return False
        if before not in seen:
            seen.add(before)
            waiting += before.inputs
    return True


def _parts(graph, group, names, shared) -> tuple[list[Part], str]:
    """What the layers of a group lose, and what forbids to cut it, or ""."""
    parts, problems = [], []
    for item in group:
        module, kind = item.dep.target.module, item.dep.target.type.name
        if module not in names:
            problems.append(_forbids(kind, module))
            continue
        layer, is_filtering = names[module], isinstance(module, FILTERING)
        if not is_filtering and not isinstance(module, _NORMS):
            if next(module.parameters(), None) is not None or kind not in ("ELEMENTWISE", "RESHAPE"):
                problems.append(f"it feeds {layer} ({type(module).__name__}), which looks at several channels")
            continue
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            continue
        is_out = not is_filtering or is_depthwise(module) or graph.is_out_channel_pruning_fn(item.dep.handler)
        index, unit = np.array(item.idxs, dtype=np.int64), np.array(item.root_idxs, dtype=np.int64)
        part = Part(layer, "out" if is_out else "in", index, unit)
        problems.append(_forbids_part(part, module, shared))
        parts.append(part)
    return parts, next(filter(None, problems), "")


def _forbids(kind, module) -> str:
    """Why an operation or a parameter in between forbids to cut, or ""."""
    if kind == "OUTPUT":
        return "it gives the model's outputs"
    if kind == "PARAMETER":
        return f"it meets a parameter of shape {tuple(module.shape)} that belongs to no layer"
    operation = kind if kind in ("UNBIND", "EXPAND", "SLICE") else str(getattr(module, "_grad_fn", ""))
    moves = operation is kind or operation.startswith(tuple(_MOVING))
    return f"its channels pass {operation.lower()}, which gives them other places" if moves else ""


def _forbids_part(part, module, shared) -> str:
    """Why a layer forbids to cut it, or ""."""
    if getattr(module, "groups", 1) > 1 and not is_depthwise(module):
        return f"{part.layer} is a grouped convolution"
    if any(id(p) in shared for p in module.parameters(recurse=False)):
        return f"{part.layer} shares its weight with another layer"
    size = size_of(module, part.role)
    is_whole = len(part.index) == size and len(np.unique(part.index)) == size
    if part.index.max() >= size or (part.role == "out" and not isinstance(module, _NORMS) and not is_whole):
        return f"its channels and those of {part.layer} meet in a way that indices do not describe"
    return ""
