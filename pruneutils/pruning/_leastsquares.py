"""Linear and convolution layers as least-squares problems: sums over samples and positions, and masked solutions."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

_CHUNK = 2**23  # entries of patches held at a time, in float64: 64 MiB
_PLAIN = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


@dataclass
class Sums:
    """What a least-squares problem needs of its data, group by group of a convolution (one for a linear layer)."""

    xx: torch.Tensor  # (groups, inputs, inputs): sum of x x^T
    xy: torch.Tensor  # (groups, inputs, outputs): sum of x y^T, y without the bias that stays
    yy: float  # sum of y^2
    scale: float  # sum of y^2 with the bias


def columns_of(module: nn.Module, x: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (samples, what each output reads of them (groups, inputs, samples x positions)), in float64."""
    if isinstance(module, nn.Linear):
        x = x.reshape(-1, module.in_features)
        for start in range(0, len(x), size := max(1, _CHUNK // module.in_features)):
            part = slice(start, start + size)
            yield part, x[part].double().T[None]
        return
    groups, kernel = module.groups, module.weight[0].numel()
    positions = module(x[:1])[0, 0].numel()
    for start in range(0, len(x), size := max(1, _CHUNK // (groups * kernel * positions))):
        part = slice(start, start + size)
        patches = (_unfolded if type(module).forward in _PLAIN else _convolved)(module, x[part])
        yield part, patches.double().reshape(groups, kernel, -1)


def _unfolded(module, x) -> torch.Tensor:
    """Patches (groups, inputs, N, positions), cut out of the padded images."""
    n, kernel = len(x), module.kernel_size
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode)
    for d, (size, stride, step) in enumerate(zip(kernel, module.stride, module.dilation)):
        x = x.unfold(2 + d, (size - 1) * step + 1, stride)[..., ::step]
    dims = len(kernel)
    x = x.permute(1, *range(2 + dims, 2 + 2 * dims), 0, *range(2, 2 + dims))  # (channels, *kernel, N, *positions)
    return x.reshape(module.groups, module.weight[0].numel(), n, -1)


def _convolved(module, x) -> torch.Tensor:
    """The same for a convolution with a forward pass of its own: what it gives for kernels with a single one."""
    size, groups = module.weight[0].numel(), module.groups
    eye = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, *module.weight.shape[1:])
    tensors = {"weight": eye.repeat(groups, *(1,) * (eye.ndim - 1))}
    if module.bias is not None:
        tensors["bias"] = x.new_zeros(size * groups)
    out = torch.func.functional_call(module, tensors, (x,))
    return out.reshape(len(x), groups, size, -1).permute(1, 2, 0, 3)


def add(sums: Sums | None, module: nn.Module, x: torch.Tensor, y: torch.Tensor, fit_bias: bool) -> Sums:
    """Add the samples x, with the outputs y wanted for them (features last), to the sums."""
    groups = getattr(module, "groups", 1)
    fit_bias = fit_bias and module.bias is not None
    y = y.reshape(-1, y.shape[-1]) if isinstance(module, nn.Linear) else y.flatten(1, -2)
    for part, columns in columns_of(module, x):
        wanted = y[part].double().reshape(-1, groups, y.shape[-1] // groups).permute(1, 2, 0)
        scale = wanted.square().sum().item()
        if module.bias is not None and not fit_bias:
            wanted = wanted - module.bias.double().reshape(groups, -1, 1)
        if fit_bias:
            columns = torch.cat([columns, columns.new_ones(groups, 1, columns.shape[2])], 1)
        if sums is None:
            size = columns.shape[1]
            sums = Sums(
                columns.new_zeros(groups, size, size), columns.new_zeros(groups, size, wanted.shape[1]), 0.0, 0.0
            )
        sums.xx.baddbmm_(columns, columns.mT)
        sums.xy.baddbmm_(columns, wanted.mT)
        sums.yy += wanted.square().sum().item()
        sums.scale += scale
    return sums


def fit(module: nn.Module, keep: torch.Tensor, sums: Sums, damping: float, fit_bias: bool) -> tuple[float, float]:
    """Set the kept weights of a layer to the solution; return its relative squared errors before and after."""
    groups, fit_bias = len(sums.xx), fit_bias and module.bias is not None
    old = module.weight.detach().double().reshape(groups, -1, module.weight[0].numel())
    keep = keep.reshape(old.shape)
    if fit_bias:
        old = torch.cat([old, module.bias.detach().double().reshape(groups, -1, 1)], 2)
        keep = torch.cat([keep, keep.new_ones(*keep.shape[:2], 1)], 2)
    new = old.clone()
    for group, (xx, xy) in enumerate(zip(sums.xx, sums.xy)):
        new[group] += steps(xx, xy.T - old[group] @ xx, keep[group], damping * xx.diagonal().mean().item())
    errors = [_error(weights, sums) for weights in (old, new)]
    if fit_bias:
        module.bias.copy_(new[..., -1].flatten())
        new, keep = new[..., :-1], keep[..., :-1]
    module.weight.copy_(torch.where(keep, new, 0).reshape(module.weight.shape))
    return errors[0], errors[1]


def _error(weights, sums) -> float:
    squares = ((weights @ sums.xx) * weights).sum() - 2 * (weights * sums.xy.mT).sum() + sums.yy
    return max(0.0, squares.item()) / sums.scale if sums.scale else 0.0


def steps(xx: torch.Tensor, slopes: torch.Tensor, keep: torch.Tensor, damping: float) -> torch.Tensor:
    """Solve (xx + damping I) step = slope for each row, with steps of zero where a row does not keep its weight.

    xx is (inputs, inputs), slopes and keep are (rows, inputs). Rows with equal masks are solved together.
    """
    result = torch.zeros_like(slopes)
    matrix = xx + damping * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    patterns, pattern_of = torch.unique(keep, dim=0, return_inverse=True)
    inverse = None
    for number, pattern in enumerate(patterns):
        rows = (pattern_of == number).nonzero().flatten()
        kept, gone = pattern.nonzero().flatten(), (~pattern).nonzero().flatten()
        if len(kept) == 0:
            continue
        if damping > 0 and 0 < len(gone) < len(kept) and len(patterns) > 1:
            # Few are gone: solve for all, then take back what the gone ones have taken (a smaller system for each row).
            if inverse is None:
                inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
            free = slopes[rows] @ inverse
            back = _solve(inverse[gone][:, gone], free[:, gone].T)
            step = free - (inverse[:, gone] @ back).T
            step[:, gone] = 0
            result[rows] = step
        else:
            step = _solve(matrix[kept][:, kept], slopes[rows][:, kept].T)
            result[rows[:, None], kept] = step.T
    return result


def _solve(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solve a symmetric system; the shortest solution where inputs depend on each other."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    # A factor far smaller than the rest is what rounding has left of a zero.
    diagonal = factor.diagonal()
    if failed.item() == 0 and diagonal.min() > 1e-7 * diagonal.max():
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(matrix)
    large = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, large] @ ((vectors[:, large].T @ right) / values[large, None])
