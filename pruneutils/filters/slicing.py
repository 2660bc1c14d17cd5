"""Layers cut to some of their channels: what is cut, what is recorded about it, and how it is taken back.

What is kept is a dict {(layer, role): kept indices}. The roles are "out" (filters; for a batch norm or a depthwise
convolution its channels), "in" (what a layer reads) and "heads" (of an attention layer).
"""

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from .. import masks as held
from ..target import Modules, Target
from .rebinding import SUCCESSORS, Cut, remember, sliced

Key = tuple[str, str]  # a layer and a role
Kept = Mapping[Key, torch.Tensor]
FILTERING = (nn.modules.conv._ConvNd, nn.Linear)  # layers whose outputs are filters
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)  # each channel by itself
_FROZEN = {"weight", "bias", "running_mean", "running_var"}  # the buffers of a batch norm without parameters


def has_filters(module: nn.Module) -> bool:
    """Return whether a layer has filters of its own; a depthwise convolution only follows another layer."""
    return isinstance(module, FILTERING) and not is_depthwise(module)


def is_layer(module: nn.Module) -> bool:
    """Return whether a layer can be cut: it has filters, or does something to each channel by itself."""
    frozen = _FROZEN <= module._buffers.keys() and not module._parameters and module.running_mean.ndim == 1
    return frozen or isinstance(module, (*FILTERING, *_NORMS))


def is_depthwise(module: nn.Module) -> bool:
    """Return whether each filter reads a channel of its own and no other."""
    marked = getattr(module, "is_depthwise", False)  # when it was cut: with a single channel it looks like any other
    of_several = isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1
    return marked or (of_several and module.groups == module.in_channels == module.out_channels)


def is_transposed(module: nn.Module) -> bool:
    """Return whether a layer stores its filters along the second dimension of its weight."""
    return getattr(module, "transposed", False) and not is_depthwise(module)


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


def _sizes(module: nn.Module, role: str) -> tuple[str, ...]:
    """The attributes in which a layer says how many channels (or heads) it has in a role."""
    if role == "heads":
        return ("num_heads",)
    if isinstance(module, nn.modules.conv._ConvNd):
        return ("in_channels", "out_channels", "groups") if is_depthwise(module) else (f"{role}_channels",)
    if isinstance(module, nn.Linear):
        return (f"{role}_features",)
    return ("num_parameters",) if isinstance(module, nn.PReLU) else ("num_features",)


def size_of(module: nn.Module, role: str) -> int:
    """Return how many channels (or heads) a layer has in a role."""
    known = getattr(module, _sizes(module, role)[0], None)
    return len(module.running_mean) if known is None else known  # a frozen batch norm may not say it


def _cuts_of(module: nn.Module, role: str, kept: torch.Tensor, size: int) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yield (tensor within the layer, dimension, kept indices) for all that a role of this size cuts."""
    if role == "heads":
        columns = (kept[:, None] * module.head_dim + torch.arange(module.head_dim)).flatten()
        rows = (torch.arange(3)[:, None] * size * module.head_dim + columns).flatten()
        first, last = ("in_proj_", "out_proj.") if kind_of_attention(module) == "torch" else ("qkv.", "proj.")
        yield f"{first}weight", 0, rows
        yield f"{first}bias", 0, rows
        yield f"{last}weight", 1, columns
    elif role == "in":
        yield "weight", 0 if is_transposed(module) else 1, kept
    else:
        yield "weight", 1 if is_transposed(module) else 0, kept
        for name in ("bias", "running_mean", "running_var"):
            yield name, 0, kept


def tensor_cuts(modules: Modules, kept: Kept, sizes: Mapping[Key, int] | None = None) -> dict[str, list[Cut]]:
    """Return {name of a parameter or buffer: its cuts} for what is kept of layers of these sizes, or their own."""
    cuts: dict[str, list[Cut]] = {}
    for (layer, role), index in kept.items():
        size = sizes[layer, role] if sizes else size_of(modules[layer], role)
        for name, dim, along in _cuts_of(modules[layer], role, index, size):
            name = f"{layer}.{name}" if layer else name
            if _tensor(modules, name) is not None:
                cuts.setdefault(name, []).append((dim, along))
    return cuts


def _tensor(modules, name) -> torch.Tensor | None:
    """The parameter or buffer with this name, if there is one."""
    path, _, attribute = name.rpartition(".")
    return (modules[path]._parameters | modules[path]._buffers).get(attribute)


def removed_cuts(model: nn.Module) -> dict[str, list[Cut]]:
    """Return {tensor name: the cuts that lead to it from the model before any removal}."""
    removed = getattr(model, "removed", {})
    entries = {(layer, role): entry for layer, roles in removed.items() for role, entry in roles.items()}
    kept = {key: torch.tensor(entry["kept"]) for key, entry in entries.items()}
    return tensor_cuts(dict(model.named_modules()), kept, {key: entry["of"] for key, entry in entries.items()})


def cut(target: Target, kept: Kept) -> Callable[[], None]:
    """Cut the layers of a model in place, masks included; return a function that takes it all back."""
    model, modules, before, successors, masks = target.model, target.modules, [], {}, {}

    def change(owner, attribute, value):
        before.append((owner, attribute, getattr(owner, attribute, False)))
        setattr(owner, attribute, value)

    cuts = tensor_cuts(modules, kept)
    record = {layer: dict(roles) for layer, roles in getattr(model, "removed", {}).items()}
    for (layer, role), index in kept.items():
        size = size_of(modules[layer], role)
        old = record.setdefault(layer, {}).get(role, {"of": size, "kept": range(size)})
        record[layer][role] = {"of": old["of"], "kept": [old["kept"][i] for i in index.tolist()]}
        for owner, attribute, value in _new_sizes(modules[layer], role, len(index)):
            change(owner, attribute, value)
    for name, along in cuts.items():
        path, _, attribute = name.rpartition(".")
        old = _tensor(modules, name)
        new = sliced(old.detach(), along)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            successors[old] = new, along
            if name in target.masks:
                masks[name] = sliced(target.masks[name], along)
        change(modules[path], attribute, new)
    vars(model).setdefault("removed", {})  # as if nothing were gone yet
    change(model, "removed", record)
    held.attach(modules, masks)
    remember(successors)

    def take_back() -> None:
        for owner, attribute, value in reversed(before):
            setattr(owner, attribute, value)
        if not model.removed:
            del model.removed
        for old in successors:
            SUCCESSORS.pop(old, None)
        held.settle(modules)  # so that the layers hold the masks of their old parameters again

    return take_back


def _new_sizes(module: nn.Module, role: str, size: int) -> Iterator[tuple[nn.Module, str, object]]:
    """Yield (owner, attribute, value): what a layer of a new size in a role says about itself."""
    if role == "heads":
        width = size * module.head_dim
        if kind_of_attention(module) == "torch":
            yield module, "__class__", NarrowAttention
            yield module, "_qkv_same_embed_dim", False  # keeps torch's fast path away
            yield module.out_proj, "in_features", width
        else:
            yield module, "attn_dim", width
            yield module.qkv, "out_features", 3 * width
            yield module.proj, "in_features", width
    if is_depthwise(module):
        yield module, "is_depthwise", True
    for attribute in _sizes(module, role):
        if hasattr(module, attribute):
            yield module, attribute, size


def replay(model: nn.Module, removed: Mapping[str, Mapping[str, Mapping]]) -> nn.Module:
    """Cut a model in place to the shapes of one whose filters were removed.

    Args:
        model: The same network before the removal.
        removed: `model.removed` as `prune_filters` has left it: {layer: {"out", "in" or "heads": {"of": how many there
            were, "kept": the indices of those that are left}}}. A ValueError says what does not fit, before any cut.

    Returns:
        The model.

    Example:
        >>> small = pu.prune_filters(pu.models.create("lenet5"), ratio=0.5, example_inputs=torch.rand(1, 1, 28, 28))
        >>> pu.filters.replay(pu.models.create("lenet5"), small.removed).conv1.weight.shape == small.conv1.weight.shape
        True
    """
    target, kept = Target.of(model, strict=False), {}
    for layer, roles in removed.items():
        for role, entry in roles.items():
            module, index = target.modules.get(layer), list(entry["kept"])
            known = ("out", "in", "heads") if kind_of_attention(module) else ("out", "in")
            if module is None or role not in known:
                raise ValueError(f"removed: the model has no layer {layer!r} with {role!r}")
            size = size_of(module, role)
            if size != entry["of"] or not index or index != sorted(set(index) & set(range(size))):
                raise ValueError(
                    f"removed: {layer} has {size} channels ({role}), and must keep ascending ones of these"
                )
            kept[layer, role] = torch.tensor(index)
    cut(target, kept)
    return model


class NarrowAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose heads together are narrower than the queries; names and arguments are the same."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend; arguments and returns are those of `nn.MultiheadAttention`."""
        is_first = self.batch_first or query.ndim == 2  # or a single sequence
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x if is_first else x.transpose(0, 1), weight, bias)
            .unflatten(-1, (self.num_heads, self.head_dim))
            .transpose(-3, -2)
            for x, weight, bias in zip((query, key, value), self.in_proj_weight.chunk(3), biases)
        )
        if is_causal and attn_mask is None:
            attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, q.shape[:-2])
        padding = None if key_padding_mask is None else key_padding_mask[..., None, None, :]
        masks = [_added(mask, q.dtype) for mask in (attn_mask, padding) if mask is not None]
        mask, dropout = sum(masks) if masks else None, self.dropout if self.training else 0.0
        if need_weights:
            logits = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            attention = F.dropout((logits if mask is None else logits + mask).softmax(-1), dropout)
            out = attention @ v
            attention = attention.mean(-3) if average_attn_weights else attention
        else:
            attention, out = None, F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = F.linear(out.transpose(-3, -2).flatten(-2), self.out_proj.weight, self.out_proj.bias)
        return out if is_first else out.transpose(0, 1), attention


def _added(mask, dtype) -> torch.Tensor:
    """A mask to be added to the logits: minus infinity where a bool mask is True."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf")) if mask.dtype == torch.bool else mask
