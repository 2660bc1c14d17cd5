"""The optimal brain surgeon, layer by layer: the weights of a row that are left make up for those that go."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ._checks import number, whole
from ._torch import inputs_of, restored_on_error
from .model_utils import Masks
from .pruning import plan
from .pruning.granularities import Granularity, NofM, Weight, find
from .repair import count_calls, fit_in_order, patches
from .target import Target, layer_name, warn_unprunable


@torch.no_grad()
def sparsegpt(
    model: nn.Module,
    data: object,
    sparsity: float | Mapping[str, float] | None = None,
    granularity: str | Granularity = "weight",
    exclude: str | Iterable[str] = (),
    damping: float = 0.01,
    block: int = 128,
) -> Masks:
    """Prune and repair linear layers and 2-d convolutions at once, layer by layer (Frantar and Alistarh 2023).

    H is the sum of x x^T over all samples and positions but padded ones, where x is what a layer reads behind layers
    that are done, and C the upper Cholesky factor of its inverse. In each block of inputs, the weights with the lowest
    (w / C_ii)^2 go, and later weights of their rows make up for them. All samples go through together.

    Args:
        model, data: As for `reconstruct`, without a dense twin.
        sparsity: The fraction of each layer, or {layer name or glob: fraction}; by default half, or what "N:M" fixes.
        granularity: "weight", or "2:4" and any other "N:M".
        exclude: Names or globs of layers to leave alone.
        damping: What is added to the diagonal of H, relative to its mean.
        block: How many inputs are pruned at once.

    Returns:
        The masks of the model, as `prune` returns them.

    Raises:
        ValueError: For layers of other kinds, or not called once; for inputs that are NaN, infinite, or depend on each
            other without damping; and as `prune` does. The model is then as it was.

    Example:
        >>> pu.sparsegpt(pu.models.create("lenet5"), torch.rand(64, 1, 28, 28), sparsity=0.5).sparsity
        0.5
    """
    number("damping", damping, least=0)
    target, unit, block = Target.of(model, exclude), find(granularity), whole("block", block)
    if not isinstance(unit, Weight | NofM):
        raise ValueError(f"sparsegpt prunes single weights or N:M, not {unit!r}")
    contest = plan(target, 0.5 if sparsity is None and isinstance(unit, Weight) else sparsity, "layer", unit)
    layers, n_wanted = {target.module(name): name for name in contest.weights}, {n[0]: k for n, k in contest.groups}
    inputs, keep = inputs_of(data, model), {}
    calls = count_calls(model, layers, inputs)
    for module, name in layers.items():
        if not isinstance(module, nn.Linear | nn.Conv2d) or calls[module] != 1:
            what = f"{layer_name(name)} is a {type(module).__name__} that a forward pass calls {calls[module]} times"
            raise ValueError(f"{what}; exclude all but nn.Linear and nn.Conv2d that are called once")
    warn_unprunable(target)

    def fit(module, x):
        name = layers[module]
        alive = contest.present.get(name, torch.ones_like(module.weight, dtype=torch.bool))
        keep[name] = _prune_layer(module, name, x, alive, unit, n_wanted[name], damping, block)

    with restored_on_error([module.weight for module in layers]):
        fit_in_order(model, layers, inputs, fit)
        return contest.apply(keep, {}, "sparsegpt")


def _prune_layer(module, name, x, alive, unit, n_wanted, damping, block) -> torch.Tensor:
    """Prune the weight of a layer that reads x, in place, and return what is kept of it."""
    weight, groups = module.weight, getattr(module, "groups", 1)
    rows = weight.to(torch.promote_types(weight.dtype, torch.float32)).reshape(groups, len(weight) // groups, -1)
    hessian = rows.new_zeros(groups, rows.shape[2], rows.shape[2])
    for _, columns in patches(module, x):
        hessian.baddbmm_(columns, columns.mT)
    # Inputs at one place of the kernel become neighbours, for N:M.
    order = torch.arange(rows.shape[2], device=x.device).view(weight.shape[1], -1).T.flatten()
    rows, keep = rows[..., order], alive.reshape(rows.shape)[..., order]
    hessian = hessian[:, order[:, None], order].double()
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    diagonal += damping * diagonal.mean(1, keepdim=True)
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        factor = torch.linalg.cholesky(inverse, upper=True).to(rows.dtype)
    except torch.linalg.LinAlgError:
        way = "use damping above 0, or more data"
        raise ValueError(f"{layer_name(name)}: its inputs are zero or depend on each other; {way}") from None
    _prune_rows(rows, keep, factor, unit, n_wanted, block)
    rows, keep = ((each[..., order.argsort()].reshape(weight.shape)) for each in (rows, keep))
    weight.copy_(rows * keep)
    return keep


def _prune_rows(rows, keep, factor, unit, n_wanted, block) -> None:
    """Prune (groups, outputs, inputs) weights, in place, until `keep` lacks `n_wanted`."""
    at_once = unit.m if isinstance(unit, NofM) else block
    block = -(-block // at_once) * at_once
    diagonal, n_alive = factor.diagonal(dim1=1, dim2=2)[:, None], int(keep.count_nonzero())
    n_left = n_wanted - (keep.numel() - n_alive)
    for start in range(0, rows.shape[2], block):
        end = min(start + block, rows.shape[2])
        errors = torch.zeros_like(rows[..., start:end])
        for i in range(start, end):
            if i % at_once == 0:
                now = slice(i, i + at_once)
                alive, scores = keep[..., now], (rows[..., now] / diagonal[..., now]).square()
                n_here = int(alive.count_nonzero())
                n_more = round(n_left * n_here / max(1, n_alive))  # by what is left, so that the whole is exact
                n_left, n_alive = n_left - n_more, n_alive - n_here
                pruned = alive.numel() - n_here + n_more
                found = unit.select({"": scores.flatten(0, 1)}, pruned, {"": alive.flatten(0, 1)})
                keep[..., now] = found.keep[""].view(alive.shape)
            errors[..., i - start] = rows[..., i].masked_fill(keep[..., i], 0) / diagonal[..., i]
            rows[..., i:end].addcmul_(errors[..., i - start, None], factor[:, i, None, i:end], value=-1)
        rows[..., end:].baddbmm_(errors, factor[:, start:end, end:], alpha=-1)
