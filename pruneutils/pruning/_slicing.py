"""Layers cut to some of their channels: what is cut, what is recorded about it, and how it is taken back.

What is kept is a dict {(layer, role): kept indices}. The roles are "out" (filters; for a batch norm or a depthwise
convolution its channels), "in" (what a layer reads) and "heads" (of an attention layer).
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..model_utils import get_masks, replace_mask
from .attention import NarrowAttention

Kept = Mapping[tuple[str, str], torch.Tensor]
Cut = tuple[int, torch.Tensor]  # a dimension, and the indices that are kept along it

# {a parameter from before: (the one in its place, the cuts between)}, as long as somebody holds the old one
SUCCESSORS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def is_depthwise(module: nn.Module) -> bool:
    """Tell whether each filter reads a channel of its own and no other."""
    groups = getattr(module, "groups", 1)
    return isinstance(module, nn.modules.conv._ConvNd) and groups == module.in_channels == module.out_channels > 1


def kind_of_attention(module: nn.Module) -> str:
    """Return "torch" or "timm" for an attention layer whose heads can be removed one by one, "" for all else."""
    if isinstance(module, nn.MultiheadAttention):
        plain = module.in_proj_weight is not None and module.bias_k is None and not module.add_zero_attn
        return "torch" if plain and type(module) in (nn.MultiheadAttention, NarrowAttention) else ""
    if not all(hasattr(module, name) for name in ("qkv", "proj", "num_heads", "head_dim", "attn_dim")):
        return ""
    children = {name for name, child in module.named_children() if next(child.parameters(), None) is not None}
    fused = isinstance(module.qkv, nn.Linear) and module.qkv.out_features == 3 * module.num_heads * module.head_dim
    plain = children <= {"qkv", "proj", "q_norm", "k_norm"} and not module._parameters  # no bias per head, no gate
    return "timm" if fused and plain and module.attn_dim == module.num_heads * module.head_dim else ""


def size_of(module: nn.Module, role: str) -> int:
    """Return how many channels (or heads) a layer has in a role."""
    if role == "heads":
        return module.num_heads
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels if role == "out" else module.in_channels
    if isinstance(module, nn.Linear):
        return module.out_features if role == "out" else module.in_features
    return module.num_parameters if isinstance(module, nn.PReLU) else module.num_features


def cuts_of(module: nn.Module, role: str, kept: torch.Tensor, size: int) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yield (name of the tensor within the layer, dimension, kept indices) for all that a role cuts.

    `size` is how many channels or heads the layer had before the cut.
    """
    if role == "heads":
        columns = (kept[:, None] * module.head_dim + torch.arange(module.head_dim)).flatten()
        rows = (torch.arange(3)[:, None] * size * module.head_dim + columns).flatten()
        torch_own = kind_of_attention(module) == "torch"
        first, last = ("in_proj_", "out_proj.") if torch_own else ("qkv.", "proj.")
        yield f"{first}weight", 0, rows
        yield f"{first}bias", 0, rows
        yield f"{last}weight", 1, columns
    elif role == "in":
        yield "weight", 0 if getattr(module, "transposed", False) else 1, kept
    else:
        transposed = getattr(module, "transposed", False) and not is_depthwise(module)
        yield "weight", 1 if transposed else 0, kept
        for name in ("bias", "running_mean", "running_var"):
            yield name, 0, kept


def tensor_cuts(model: nn.Module, kept: Kept, sizes: Mapping[tuple[str, str], int]) -> dict[str, list[Cut]]:
    """Return {name of a parameter or buffer: its cuts} for what is kept of the layers."""
    tensors = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    cuts: dict[str, list[Cut]] = {}
    for (layer, role), index in kept.items():
        for name, dim, along in cuts_of(model.get_submodule(layer), role, index, sizes[layer, role]):
            name = f"{layer}.{name}" if layer else name
            if name in tensors:
                cuts.setdefault(name, []).append((dim, along))
    return cuts


def removed_cuts(model: nn.Module) -> dict[str, list[Cut]]:
    """Return {tensor name: the cuts that lead to it from the model before any removal}."""
    entries = {
        (layer, role): entry for layer, roles in getattr(model, "removed", {}).items() for role, entry in roles.items()
    }
    kept = {key: torch.tensor(entry["kept"]) for key, entry in entries.items()}
    return tensor_cuts(model, kept, {key: entry["of"] for key, entry in entries.items()})


def _new_sizes(module: nn.Module, role: str, size: int) -> Iterator[tuple[nn.Module, str, object]]:
    """Yield (owner, attribute, value): what a layer of a new size in a role says about itself."""
    if role == "heads":
        kind, width = kind_of_attention(module), size * module.head_dim
        yield module, "num_heads", size
        if kind == "torch":
            yield module, "__class__", NarrowAttention
            yield module, "_qkv_same_embed_dim", False  # keeps torch's fast path away
            yield module.out_proj, "in_features", width
        else:
            yield module, "attn_dim", width
            yield module.qkv, "out_features", 3 * width
            yield module.proj, "in_features", width
    elif isinstance(module, nn.modules.conv._ConvNd):
        names = ("in_channels", "out_channels", "groups") if is_depthwise(module) else (f"{role}_channels",)
        for name in names:
            yield module, name, size
    elif isinstance(module, nn.Linear):
        yield module, f"{role}_features", size
    else:
        yield module, "num_parameters" if isinstance(module, nn.PReLU) else "num_features", size


def cut(model: nn.Module, kept: Kept) -> Callable[[], None]:
    """Cut the layers of a model in place, masks included; return a function that takes it all back."""
    masks, history, before = get_masks(model), getattr(model, "removed", None), []
    sizes = {(layer, role): size_of(model.get_submodule(layer), role) for layer, role in kept}
    new_masks, successors = {}, {}
    for name, along in tensor_cuts(model, kept, sizes).items():
        path, _, tensor_name = name.rpartition(".")
        owner = model.get_submodule(path)
        old = getattr(owner, tensor_name)
        new = sliced(old.detach(), along)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            successors[old] = new, along
            if name in masks:
                new_masks[name] = sliced(masks[name], along)
        before.append((owner, tensor_name, old))
        setattr(owner, tensor_name, new)
    record = _recorded(model, kept, history or {})
    for (layer, role), index in kept.items():
        for owner, name, value in _new_sizes(model.get_submodule(layer), role, len(index)):
            before.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)
    model.removed = record
    for name, mask in new_masks.items():
        replace_mask(model, name, mask)
    SUCCESSORS.update(successors)

    def take_back() -> None:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)
        for old in successors:
            SUCCESSORS.pop(old, None)
        if history is None:
            del model.removed
        else:
            model.removed = history
        get_masks(model)  # so that the layers hold the masks of their old parameters again

    return take_back


def sliced(tensor: torch.Tensor, cuts: list[Cut]) -> torch.Tensor:
    """Return a copy of a tensor without what the cuts leave out, in the same memory format."""
    for dim, index in cuts:
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def _recorded(model: nn.Module, kept: Kept, history: Mapping) -> dict[str, dict[str, dict]]:
    """Return the record of a model after a cut: what is kept of the layers it had in the beginning, as plain JSON."""
    record = {layer: dict(roles) for layer, roles in history.items()}
    for (layer, role), index in kept.items():
        roles = record.setdefault(layer, {})
        size = size_of(model.get_submodule(layer), role)
        old = roles.get(role, {"of": size, "kept": range(size)})
        roles[role] = {"of": old["of"], "kept": [old["kept"][i] for i in index.tolist()]}
    return record


def replay(model: nn.Module, removed: Mapping[str, Mapping[str, Mapping]]) -> nn.Module:
    """Cut a model to the shapes of one whose filters were removed.

    Args:
        model: The same network before the removal, an ordinary one. It is changed in place.
        removed: What `prune_filters` has recorded in `model.removed`: {layer: {"out", "in" or "heads": {"of": how many
            there were, "kept": the indices of those that are left}}}.

    Returns:
        The model; its parameters are those of the kept channels.

    Raises:
        ValueError: If a layer is missing or has another size than recorded. The model is then as it was.

    Example:
        >>> model = pu.models.create("lenet5")
        >>> small = pu.prune_filters(pu.models.create("lenet5"), ratio=0.5, example_inputs=torch.rand(1, 1, 28, 28))
        >>> pu.pruning.replay(model, small.removed).conv1.weight.shape == small.conv1.weight.shape
        True
    """
    modules, kept = dict(model.named_modules()), {}
    for layer, roles in removed.items():
        for role, entry in roles.items():
            module, index = modules.get(layer), entry["kept"]
            if module is None or role not in ("out", "in", "heads"):
                raise ValueError(f"removed: the model has no layer {layer!r} with {role!r}")
            if role == "heads" and not kind_of_attention(module):
                raise ValueError(f"removed: {layer} is no attention layer whose heads can be removed")
            if size_of(module, role) != entry["of"]:
                raise ValueError(f"removed: {layer} has {size_of(module, role)} channels ({role}), not {entry['of']}")
            if not index or sorted(set(index)) != list(index) or not 0 <= index[0] <= index[-1] < entry["of"]:
                raise ValueError(f"removed: {layer} ({role}) must keep ascending indices below {entry['of']}")
            kept[layer, role] = torch.tensor(index)
    cut(model, kept)
    return model
