"""Repair without training: fresh statistics of batch norm, and weights fitted to the dense one."""

import contextlib
import queue
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ._checks import a_model, number
from ._torch import device_of, full_float32, hooked, in_mode, inputs_of
from .filters.slicing import FILTERING, removed_cuts
from .target import Target, layer_name

if TYPE_CHECKING:
    import pandas as pd

_CHUNK = 2**21  # entries of patches that are held at a time, in float64: 16 MiB, which fits a cache


@torch.no_grad()
def recalibrate(model: nn.Module, data: object) -> nn.Module:
    """Measure the statistics of all batch norms anew, exactly and in place (EagleEye, Li et al. 2020).

    The mean and the unbiased variance of each batch norm become those of its input over all samples, in the network as
    it is afterwards: each layer is measured behind layers that are done already. All samples go through the network
    together, which is meant for a few hundred of them.

    Args:
        model: A model with batch norm.
        data: Inputs (N, ...) to measure on: a tensor, one (inputs, targets) pair, or an iterable of such batches.

    Returns:
        The model.

    Raises:
        ValueError: If the model has no batch norm with running statistics, or one of them reads a single value, or NaN
            or infinite ones. The model is then as it was.

    Example:
        >>> model = pu.models.create("resnet20", num_classes=10, in_channels=1)
        >>> train, test = pu.data.load("digits")
        >>> bool(pu.recalibrate(model, train.batch(64)).bn1.running_mean.any())
        True
    """
    modules, kind = a_model(model).named_modules(), nn.modules.batchnorm._BatchNorm
    norms = {m: name for name, m in modules if isinstance(m, kind) and m.running_mean is not None}
    if not norms:
        raise ValueError(f"{type(model).__name__} has no batch norm with running statistics: nothing to measure")
    moments = {}

    def measure(norm, args):
        values = args[0] if args[0].dtype == torch.float64 else args[0].float()
        n, (mean, variance) = values.numel() // values.shape[1], values.new_zeros(2, values.shape[1])
        if n < 2:
            raise ValueError(f"{norms[norm]}: a single value has no variance; use more data")
        F.batch_norm(values, mean, variance, training=True, momentum=1.0)  # faster than torch.var_mean
        if not (mean + variance).isfinite().all():
            raise ValueError(f"{norms[norm]}: its inputs are NaN or infinite")
        n_before, mean_before, squares = moments.get(norm, (0, 0.0, 0.0))  # a layer may be called more than once
        total, shift = n_before + n, mean - mean_before
        mean = mean_before + shift * (n / total)
        squares = squares + variance * (n - 1) + shift.square() * (n_before * n / total)
        moments[norm] = total, mean, squares
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(squares / (total - 1))
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(1)

    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    with full_float32(), in_mode(model, training=False), _restored_on_error(buffers), hooked(norms, measure):
        model(inputs_of(data, model))
    return model


@contextlib.contextmanager
def _restored_on_error(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    saved = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    except BaseException:
        for tensor, value in saved:
            tensor.copy_(value)
        raise


# --- Weights by least squares ----------------------------------------------------------------------------------------


@torch.no_grad()
def reconstruct(
    model: nn.Module, dense: nn.Module, data: object, damping: float = 0.01, *, exclude: str | Iterable[str] = ()
) -> "pd.DataFrame":
    """Fit the kept weights of a pruned network to the outputs of the dense one, layer by layer and in place.

    From the first layer to the last, the kept weights of each become the least-squares solution of

        sum || W x - (y - bias) ||^2  +  damping * (mean over inputs of sum x^2) * || W - W_now ||^2

    The sums run over all samples and positions. x is what the layer reads in the pruned network, whose layers before it
    are fitted already, and y is what the same layer gives in the dense network, from the filters that are left. Masks,
    biases and batch norms stay as they are, and so does a layer that is called more than once, or used as a function,
    such as the output projection of `nn.MultiheadAttention`. All samples go through both networks together.

    Args:
        model: The pruned network.
        dense: The same network before pruning.
        data: Inputs (N, ...), as for `recalibrate`; more samples than a layer has inputs are best.
        damping: How strongly the weights are held where they are; 0 is plain least squares.
        exclude: Names or globs of layers to leave as they are.

    Returns:
        A row per layer, in the order of the forward pass: layer, before, after, which are the squared errors of its
        outputs relative to the squared outputs of the dense layer, on `data`.

    Raises:
        ValueError: If `dense` is `model` or another network, a layer is a transposed convolution, or its inputs are NaN
            or infinite. The model is then as it was.

    Example:
        >>> model, dense = pu.models.create("lenet5"), pu.models.create("lenet5")
        >>> masks = pu.prune(model, sparsity=0.5)
        >>> table = pu.reconstruct(model, dense, torch.rand(100, 1, 28, 28))
        >>> bool((table["after"] <= table["before"]).all())
        True
    """
    number("damping", damping, least=0)
    target, dense_modules = Target.of(model, exclude), dict(dense.named_modules())
    layers = {target.module(name): name for name in target.weights}
    layers = {m: name for m, name in layers.items() if isinstance(m, FILTERING)}
    twins = {m: _twin_and_rows(m, name, dense_modules, model, dense) for m, name in layers.items()}
    inputs, calls, errors = inputs_of(data, model), Counter(), {}
    with in_mode(model, training=False), hooked(layers, lambda module, args: calls.update([module])):
        model(inputs[:1])
    called_once = [module for module in layers if calls[module] == 1]

    def fit_layer(module, args):
        layer, (twin, rows) = layer_name(layers[module]), twins[module]
        if layer in errors:  # called by _patches
            return
        called, y = next(dense_outputs, (None, None))
        if called is not twin:
            raise ValueError(f"{layer}: dense calls its layers in another order")
        y = (y if isinstance(module, nn.Linear) else y.movedim(1, -1)).to(inputs.device)
        y = y if len(rows) == y.shape[-1] else y[..., rows]
        if not (args[0].isfinite().all() and y.isfinite().all()):
            raise ValueError(f"{layer}: what it reads, or gives in dense, is NaN or infinite")
        keep = target.masks.get(layers[module], module.weight != 0)
        errors[layer] = ()
        errors[layer] = _fit(module, keep, args[0], y, damping)

    with (
        full_float32(),
        in_mode(model, training=False),
        in_mode(dense, training=False),
        _restored_on_error([module.weight for module in called_once]),
        contextlib.closing(_outputs(dense, [twins[m][0] for m in called_once], inputs)) as dense_outputs,
        hooked(called_once, fit_layer),
    ):
        model(inputs)
    import pandas as pd

    return pd.DataFrame([(layer, *pair) for layer, pair in errors.items()], columns=["layer", "before", "after"])


def _twin_and_rows(module, name, dense_modules, model, dense) -> tuple[nn.Module, list[int]]:
    """Return the layer of the dense network, and which of its outputs are those of this one."""
    twin, layer = dense_modules.get(name.rpartition(".")[0]), layer_name(name)
    if twin is module:
        raise ValueError("dense is the model itself; give a copy from before the pruning")
    if type(twin) is not type(module):
        raise ValueError(f"dense has no {type(module).__name__} {layer!r}: it must be the same network before pruning")
    if getattr(module, "transposed", False):
        raise ValueError(f"{layer} is a transposed convolution, which is not fitted; exclude it")
    own, other = module.weight.shape, twin.weight.shape
    rows, dense_rows = (  # as they were numbered before any filter was removed
        next((index.tolist() for dim, index in removed_cuts(net).get(name, []) if dim == 0), list(range(shape[0])))
        for net, shape in ((model, own), (dense, other))
    )
    if not set(rows) <= set(dense_rows) or other[1:].numel() < own[1:].numel():
        raise ValueError(f"{layer} has the shape {tuple(own)}, in dense {tuple(other)}, not by filters removed")
    position = {row: i for i, row in enumerate(dense_rows)}
    return twin, [position[row] for row in rows]


def _outputs(model, modules, inputs) -> Iterator[tuple[nn.Module, torch.Tensor]]:
    """Yield (module, output) at each call of the modules in a forward pass; a thread, it stands still meanwhile."""
    here, there = queue.SimpleQueue(), queue.SimpleQueue()

    def wait(module, args, output):
        here.put((module, output))
        if not there.get():
            raise InterruptedError("nobody needs the rest of this pass")

    def run():
        try:
            with torch.no_grad():
                model(inputs.to(device_of(model)))
            here.put(None)
        except BaseException as error:
            here.put(error)

    thread = threading.Thread(target=run, daemon=True)
    with hooked(modules, wait, after=True):
        thread.start()
        try:
            while (call := here.get()) is not None:
                if isinstance(call, BaseException):
                    raise call
                yield call
                there.put(True)
        finally:
            there.put(False)
            thread.join()


def _fit(module, keep, x, y, damping) -> tuple[float, float]:
    """Fit the kept weights of a layer that reads x to the outputs y (features last); return its relative errors."""
    groups, size = getattr(module, "groups", 1), module.weight[0].numel()
    xx = x.new_zeros(groups, size, size, dtype=torch.float64)  # sums over samples and positions, group by group
    xy = x.new_zeros(groups, size, len(module.weight) // groups, dtype=torch.float64)
    yy = scale = 0.0
    if isinstance(module, nn.Linear):
        x, y = x.flatten(0, -2), y.flatten(0, -2)
    at_once = max(1, _CHUNK // (groups * size * y[0, ..., 0].numel()))
    for reads, gives in zip(x.split(at_once), y.split(at_once)):
        columns = reads.T if isinstance(module, nn.Linear) else _patches(module, reads)
        columns = columns.reshape(groups, size, -1).double()
        wanted = gives.double().reshape(-1, groups, xy.shape[2]).permute(1, 2, 0)
        scale += wanted.square().sum().item()
        if module.bias is not None:
            wanted = wanted - module.bias.double().reshape(groups, -1, 1)
        xx.baddbmm_(columns, columns.mT)
        xy.baddbmm_(columns, wanted.mT)
        yy += wanted.square().sum().item()
    old = module.weight.double().reshape(groups, -1, size)
    new, keep = old.clone(), keep.reshape(old.shape)
    for group in range(groups):
        slopes = xy[group].T - old[group] @ xx[group]
        new[group] += _steps(xx[group], slopes, keep[group], damping * xx[group].diagonal().mean().item())
    errors = [(((w @ xx) * w).sum() - 2 * (w * xy.mT).sum()).item() + yy for w in (old, new)]
    module.weight.copy_(torch.where(keep, new, 0).reshape(module.weight.shape))
    return tuple(max(0.0, error) / scale if scale else 0.0 for error in errors)


def _patches(module, x) -> torch.Tensor:
    """What the kernels of a convolution read, (groups x inputs, N, ...positions)."""
    own_forward = type(module).forward is not nn.Conv2d.forward
    if not (own_forward or isinstance(module.padding, str) or module.padding_mode != "zeros"):
        return F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).movedim(1, 0)
    # any other is asked for its outputs with kernels that hold a single one
    size, groups = module.weight[0].numel(), module.groups
    eye = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, *module.weight.shape[1:])
    tensors = {"weight": eye.repeat(groups, *(1,) * (eye.ndim - 1))}
    if module.bias is not None:
        tensors["bias"] = x.new_zeros(size * groups)
    return torch.func.functional_call(module, tensors, (x,)).movedim(1, 0)


def _steps(xx: torch.Tensor, slopes: torch.Tensor, keep: torch.Tensor, damping: float) -> torch.Tensor:
    """Solve (xx + damping I) step = slope for each row, with steps of zero where a row does not keep its weight."""
    result = torch.zeros_like(slopes)
    matrix = xx + damping * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    patterns, pattern_of = torch.unique(keep, dim=0, return_inverse=True)  # rows with equal masks go together
    inverse = None
    for i, pattern in enumerate(patterns):
        rows, kept, gone = (mask.nonzero().flatten() for mask in (pattern_of == i, pattern, ~pattern))
        if len(kept) == 0:
            continue
        if damping > 0 and 0 < len(gone) < len(kept) and len(patterns) > 1:
            # Few are gone: solve for all, then take back what the gone ones have taken, a smaller system for each row.
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix)) if inverse is None else inverse
            free = slopes[rows] @ inverse
            step = free - (inverse[:, gone] @ _solve(inverse[gone][:, gone], free[:, gone].T)).T
            step[:, gone] = 0
            result[rows] = step
        else:
            result[rows[:, None], kept] = _solve(matrix[kept][:, kept], slopes[rows][:, kept].T).T
    return result


def _solve(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solve a symmetric system; the shortest solution where inputs depend on each other."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    diagonal = factor.diagonal()  # an entry far smaller than the rest is what rounding has left of a zero
    if failed.item() == 0 and diagonal.min() > 1e-7 * diagonal.max():
        return torch.cholesky_solve(right, factor)
    return torch.linalg.pinv(matrix, hermitian=True) @ right
