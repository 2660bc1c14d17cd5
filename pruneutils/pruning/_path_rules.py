"""How one operation passes paths on: (operation, *its arguments with 0 and 1 for numbers) -> what it gives.

0 stands for what is zero whatever the input, 1 for everything else. A rule may connect too much, never too little.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten


def tensors_in(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]


def number(value: Any) -> torch.Tensor | float:
    if torch.is_tensor(value):
        return value if value.dtype == torch.float64 else (value != 0).double()
    return float(value != 0)


def everything(operation, *args, **kwargs):
    """Whatever is given depends on everything that is read."""
    raise NotImplementedError


def view(operation, *args, **kwargs):
    return operation(*args, **kwargs)


def alias(operation, values, **_):
    return torch.ops.aten.alias(values)


def _sums(operation, *args, **kwargs):
    """What adds up, moves or repeats numbers, and products of two: as it is."""
    kwargs = {name: value for name, value in kwargs.items() if name not in _NO_MATTER}
    return _without_place(operation)(*args, **kwargs)


def _entries(operation, *args, **kwargs):
    """Any function of single entries: zero if all that enters is zero, and the function of zeros is."""
    zeros = tree_map(lambda leaf: torch.zeros(()) if torch.is_tensor(leaf) else leaf, (args, kwargs))
    try:
        zero = float(_without_place(operation)(*zeros[0], **zeros[1]) != 0)
    except (RuntimeError, TypeError, ValueError):
        zero = 1.0
    return sum(map(number, tensors_in((args, kwargs)))) + zero


def _same(operation, values, *_, **__):
    return values


def _reshaped(operation, values, shape):
    return values.reshape(shape)


def _over(operation, _, values, *__, **___):
    return values


def _product(operation, one, other, **_):
    return number(one) * number(other)


def joint(rule, operation, *args, **kwargs):
    """A product of factors that depend on the same weight, which may be all that makes both of them zero."""
    leaves, spec = tree_flatten((args, kwargs))
    factors = [i for i, leaf in enumerate(leaves) if torch.is_tensor(leaf)]
    ways = 0
    for i in factors:
        alone = [torch.ones_like(leaf) if j in factors and j != i else leaf for j, leaf in enumerate(leaves)]
        args_alone, kwargs_alone = tree_unflatten(alone, spec)
        ways = ways + rule(operation, *args_alone, **kwargs_alone)
    return rule(operation, *args, **kwargs) + (ways - ways.detach())


def _quotient(operation, one, other, **_):
    return number(one) * (1 + number(other))


def _fill(operation, values, mask, value):
    return values + number(mask) * number(value)


def _choice(operation, condition, one, other):
    if condition.dtype == torch.bool:  # a constant
        return torch.where(condition, number(one), number(other))
    return condition + number(one) + number(other)


def _gated(operation, values, dim=-1):
    values, gate = values.chunk(2, dim)
    return values * (1 + gate)


def _softmax(operation, values, dim, *_):
    return 1 + values.sum(dim, keepdim=True)


def _largest(operation, values, dim=(), keepdim=False):
    return values.sum(dim, keepdim=keepdim)


def _pool(n_dims):
    def rule(operation, values, kernel, stride=(), padding=0, dilation=1, ceil_mode=False):
        if set(torch.atleast_1d(torch.as_tensor(dilation)).tolist()) == {1}:
            pool = {2: F.avg_pool2d, 3: F.avg_pool3d}[n_dims]
            return pool(values, kernel, stride or kernel, padding, ceil_mode)
        return _planes(n_dims)(operation, values)

    return rule


def _planes(n_dims):
    """All entries of a channel."""
    return lambda operation, values, *_: values.sum(tuple(range(-n_dims, 0)), keepdim=True)


def _scaled(values, weight, bias):
    values = values if weight is None else values * weight
    return values if bias is None else values + bias


def _layer_norm(operation, values, shape, weight, bias=None, *_):
    bias = bias if torch.is_tensor(bias) else None  # of rms_norm, this is epsilon
    return _scaled(values.sum(tuple(range(-len(shape), 0)), keepdim=True), weight, bias)


def _group_norm(operation, values, weight, bias, n, channels, size, groups, *_):
    sums = values.reshape(n, groups, -1).sum(-1).repeat_interleave(channels // groups, 1)
    column = (1, -1) + (1,) * (values.ndim - 2)
    weight, bias = (None if p is None else p.view(column) for p in (weight, bias))
    return _scaled(sums.view(sums.shape + (1,) * (values.ndim - 2)), weight, bias)


def _batch_norm(operation, values, weight, bias, mean=None, variance=None, training=False, *_):
    if training is True or mean is None:
        values = values.sum([dim for dim in range(values.ndim) if dim != 1], keepdim=True)
        mean = None
    column = (1, -1) + (1,) * (values.ndim - 2)
    mean, weight, bias = (None if p is None else p.view(column) for p in (mean, weight, bias))
    return _scaled(values if mean is None else values + mean, weight, bias)


_NO_MATTER = {"dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking", "alpha", "beta"}
PRODUCTS = {"mul", "mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addbmm", "addmv", "convolution", "_convolution"}
_RULES = {
    **dict.fromkeys(
        """
        mm bmm mv dot addmm baddbmm addbmm addmv convolution _convolution cat stack sum mean cumsum
        embedding index index_select gather take index_put index_add index_copy scatter scatter_add
        slice_scatter select_scatter constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d
        replication_pad1d replication_pad2d replication_pad3d avg_pool1d avg_pool2d avg_pool3d
        _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d
        _upsample_nearest_exact1d _upsample_nearest_exact2d upsample_linear1d upsample_bilinear2d
        flip roll repeat im2col col2im pixel_shuffle pixel_unshuffle tril triu fill zero
        """.split(),
        _sums,
    ),
    **dict.fromkeys(("clone", "_to_copy", "contiguous", "rrelu_with_noise"), _same),
    "_unsafe_view": _reshaped,
    **dict.fromkeys(("detach", "lift_fresh", "alias"), alias),
    **dict.fromkeys(("as_strided", "view_as_real", "view_as_complex"), everything),
    **dict.fromkeys(("_prelu_kernel", "threshold", "leaky_relu", "elu", "glu_jvp"), _entries),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax"), _softmax),
    **dict.fromkeys(("amax", "amin", "max", "min"), _largest),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), _layer_norm),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"), _batch_norm),
    "copy": _over,
    "mul": _product,
    "div": _quotient,
    "masked_fill": _fill,
    "where": _choice,
    "glu": _gated,
    "max_pool2d_with_indices": _pool(2),
    "max_pool3d_with_indices": _pool(3),
    "adaptive_max_pool2d": _planes(2),
    "adaptive_max_pool3d": _planes(3),
    "native_group_norm": _group_norm,
}


def _without_place(operation):
    """The operation that gives what another one writes to its first argument."""
    return getattr(torch.ops.aten, base(operation._schema.name.removeprefix("aten::")))


def base(name):
    return name.removesuffix("_") if not name.endswith("__") else name


def rule_of(operation, name: str, is_view: bool) -> Callable:
    rule = _RULES.get(base(name))
    if is_view:
        return rule if rule in (alias, everything) else view
    if rule is None and torch.Tag.pointwise in operation.tags and operation._schema.name.startswith("aten::"):
        return _entries
    return rule or everything
