"""Repair without training: fresh statistics of batch norm, and weights fitted to the dense one."""

import contextlib
import queue
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from . import _torch
from ._checks import a_model, number
from ._torch import all_finite, forward, full_float32, hooked, in_mode, inputs_of, restored_on_error, tokens_only
from .filters.slicing import FILTERING, removed_cuts
from .target import Target, is_transposed, layer_name

if TYPE_CHECKING:
    import pandas as pd

_CHUNK = 2**21  # entries of patches that are held at a time: 8 MiB of float32, which fits a cache


@torch.no_grad()
def recalibrate(model: nn.Module, data: object) -> nn.Module:
    """Measure the statistics of all batch norms anew, exactly and in place (EagleEye, Li et al. 2020).

    The mean and the unbiased variance of each become those of its input (in its last call) over all samples, in the
    network as it is afterwards. All samples go through together, which is meant for a few hundred of them.

    Args:
        model: A model with batch norm.
        data: Inputs to measure on, with or without targets: a batch or an iterable of them, as for `scores`.

    Returns:
        The model.

    Raises:
        ValueError: If the model has no batch norm with running statistics, or one reads a single value, NaN or infinite
            ones. The model is then as it was.

    Example:
        >>> model = pu.models.create("resnet20", in_channels=1)
        >>> train, test = pu.data.load("digits")
        >>> bool(pu.recalibrate(model, train.batch(64)).bn1.running_mean.any())
        True
    """
    modules, kind = a_model(model).named_modules(), nn.modules.batchnorm._BatchNorm
    norms = {m: name for name, m in modules if isinstance(m, kind) and m.running_mean is not None}
    if not norms:
        raise ValueError(f"{type(model).__name__} has no batch norm with running statistics: nothing to measure")

    def measure(norm, args):
        values = tokens_only(args[0], inputs, channel=1).movedim(-1, 1)
        values = values if values.dtype == torch.float64 else values.float()
        mean, variance = values.new_zeros(2, values.shape[1])
        if values.numel() < 2 * values.shape[1]:
            raise ValueError(f"{norms[norm]}: a single value has no variance; use more data")
        F.batch_norm(values, mean, variance, training=True, momentum=1.0)  # faster than torch.var_mean
        if not (mean + variance).isfinite().all():
            raise ValueError(f"{norms[norm]}: its inputs are NaN or infinite")
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(1)

    buffers, inputs = [buffer for norm in norms for buffer in norm.buffers()], inputs_of(data, model)
    with full_float32(), in_mode(model, training=False), restored_on_error(buffers), hooked(norms, measure):
        forward(model, inputs)
    return model


def count_calls(model: nn.Module, modules: Iterable[nn.Module], inputs: _torch.Inputs) -> Counter:
    """Count how often a forward pass calls each of these modules, in the order of their first calls."""
    calls = Counter()
    with in_mode(model, training=False), hooked(modules, lambda module, args: calls.update([module])):
        forward(model, _torch.take(inputs, slice(1)))
    return calls


def fit_in_order(model: nn.Module, layers: Mapping[nn.Module, str], inputs: _torch.Inputs, fit: Callable) -> None:
    """Call `fit(module, x)` on each layer just before it reads x, in one forward pass that ends with the last layer."""
    waiting = dict(layers)

    def fit_next(module, args):
        if module not in waiting:  # called by _unfolded
            return
        name = waiting.pop(module)
        if not all_finite(args[0]):
            raise ValueError(f"{layer_name(name)}: what it reads is NaN or infinite")
        fit(module, tokens_only(args[0], inputs).flatten(0, -2) if isinstance(module, nn.Linear) else args[0])
        if not waiting:
            raise InterruptedError("all layers are done")

    with full_float32(), in_mode(model, training=False), hooked(layers, fit_next):
        with contextlib.suppress(InterruptedError):
            forward(model, inputs)


def patches(module: nn.Module, x: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield chunks of samples, and what the rows of the weight multiply, (groups, size of a row, positions)."""
    groups, size = getattr(module, "groups", 1), module.weight[0].numel()
    linear = isinstance(module, nn.Linear)
    at_once = max(1, _CHUNK // (size if linear else _unfolded(module, x[:1]).numel()))
    for start in range(0, len(x), at_once):
        samples = slice(start, start + at_once)
        columns = x[samples].T if linear else _unfolded(module, x[samples])
        yield samples, columns.reshape(groups, size, -1).to(torch.promote_types(module.weight.dtype, torch.float32))


def _unfolded(module, x) -> torch.Tensor:
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


@torch.no_grad()
def reconstruct(
    model: nn.Module, dense: nn.Module, data: object, damping: float = 0.01, *, exclude: str | Iterable[str] = ()
) -> "pd.DataFrame":
    """Fit the kept weights of a pruned network to the outputs of the dense one, layer by layer and in place.

    From the first layer to the last, the kept weights of each become the least-squares solution of

        sum || W x - (y - bias) ||^2  +  damping * (mean over inputs of sum x^2) * || W - W_now ||^2

    The sums run over all samples and positions but padded ones. x is what the layer reads behind layers that are fitted
    already, and y is what it gives in the dense network, from the filters that are left. Masks, biases and batch norms
    stay, and so do transposed convolutions and layers that are not called once, such as `out_proj` of an attention. All
    samples go through together. With damping and in float32, the fit ends about 0.3 % before its optimum.

    Args:
        model: The pruned network.
        dense: The same network before pruning.
        data: As for `recalibrate`; more samples than a layer has inputs are best.
        damping: How strongly the weights are held where they are; 0 is plain least squares.
        exclude: Names or globs of layers to leave as they are.

    Returns:
        A row per layer, in the order of the forward pass: layer, before, after (squared errors of its outputs, relative
        to the squared outputs of the dense layer).

    Raises:
        ValueError: If `dense` is `model` or another network, or inputs are NaN or infinite; the model is as it was.

    Example:
        >>> model, dense = pu.models.create("lenet5"), pu.models.create("lenet5")
        >>> masks = pu.prune(model, sparsity=0.5)
        >>> table = pu.reconstruct(model, dense, torch.rand(100, 1, 28, 28))
        >>> bool((table["after"] <= table["before"]).all())
        True
    """
    number("damping", damping, least=0)
    target, dense_modules = Target.of(model, exclude), dict(dense.named_modules())
    modules = {target.module(name): name for name in target.weights}
    layers = {m: name for m, name in modules.items() if isinstance(m, FILTERING) and not is_transposed(m)}
    twins = {m: _twin_and_rows(m, name, dense_modules, model, dense) for m, name in layers.items()}
    inputs, errors = inputs_of(data, model), {}
    layers = {m: layers[m] for m, n in count_calls(model, layers, inputs).items() if n == 1}

    def fit(module, x):
        layer, (twin, rows) = layer_name(layers[module]), twins[module]
        called, y = next(dense_outputs, (None, None))
        if called is not twin:
            raise ValueError(f"{layer}: dense calls its layers in another order")
        y = tokens_only(y, inputs).flatten(0, -2) if isinstance(module, nn.Linear) else y.movedim(1, -1)
        y = (y if len(rows) == y.shape[-1] else y[..., rows]).to(x.device)
        if not all_finite(y):
            raise ValueError(f"{layer}: what it gives in dense is NaN or infinite")
        errors[layer] = _fit(module, target.masks.get(layers[module], module.weight != 0), x, y, damping)

    with (
        in_mode(dense, training=False),
        restored_on_error([module.weight for module in layers]),
        contextlib.closing(_outputs(dense, [twins[m][0] for m in layers], inputs)) as dense_outputs,
    ):
        fit_in_order(model, layers, inputs, fit)
    import pandas as pd

    return pd.DataFrame([(layer, *pair) for layer, pair in errors.items()], columns=["layer", "before", "after"])


def _twin_and_rows(module, name, dense_modules, model, dense) -> tuple[nn.Module, list[int]]:
    """Return the layer of the dense network, and which of its outputs are those of this one."""
    twin, layer = dense_modules.get(name.rpartition(".")[0]), layer_name(name)
    if twin is module:
        raise ValueError("dense is the model itself; give a copy from before the pruning")
    if type(twin) is not type(module):
        raise ValueError(f"dense has no {type(module).__name__} {layer!r}: give the same network before pruning")
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

    @torch.no_grad()
    def run():
        try:
            forward(model, _torch.to_device(inputs, _torch.device_of(model)))
        finally:
            here.put(None)

    with hooked(modules, wait, after=True), ThreadPoolExecutor(1) as pool:
        whole_pass = pool.submit(run)
        try:
            while (found := here.get()) is not None:
                yield found
                there.put(True)
            whole_pass.result()  # raises what went wrong
        finally:
            there.put(False)


def _fit(module, keep, x, wanted, damping) -> tuple[float, float]:
    """Fit the kept weights of a layer that reads x to these outputs (features last); return its relative errors."""
    weight, groups = module.weight, getattr(module, "groups", 1)
    given, wanted = module.forward(x), wanted.to(torch.promote_types(weight.dtype, torch.float32))
    missing = wanted - (given if isinstance(module, nn.Linear) else given.movedim(1, -1))
    slopes = missing.new_zeros(groups, len(weight) // groups, weight[0].numel())
    xx = missing.new_zeros(groups, slopes.shape[2], slopes.shape[2])
    for samples, columns in patches(module, x):
        rows = missing[samples].reshape(-1, *slopes.shape[:2]).permute(1, 2, 0)
        xx.baddbmm_(columns, columns.mT)
        slopes.baddbmm_(rows, columns.mT)
    keep = keep.reshape(slopes.shape)
    step = _steps(xx.clone(), slopes, keep, damping)
    weight.copy_(torch.where(keep, weight.reshape(slopes.shape) + step, 0).reshape(weight.shape))
    before = missing.square().sum()
    errors = torch.stack([before, before - (step * (2 * slopes - step @ xx)).sum()]).clamp_(min=0)
    return tuple((errors / wanted.square().sum()).nan_to_num_(0, posinf=0).tolist())


def _steps(xx: torch.Tensor, slopes: torch.Tensor, keep: torch.Tensor, damping: float) -> torch.Tensor:
    """Solve (xx + damping * mean of its diagonal) step = slope for each row, with steps of zero where it is pruned.

    Conjugate gradients for all rows at once: an iteration is one product of matrices. Without damping, the step is the
    shortest; with it, measuring inputs by their size converges sooner.
    """
    diagonal = xx.diagonal(dim1=1, dim2=2)
    diagonal += damping * diagonal.mean(1, keepdim=True)
    size = (diagonal if damping > 0 else torch.ones_like(diagonal)).clamp(min=torch.finfo(xx.dtype).tiny)[:, None]
    step, residual = torch.zeros_like(slopes), slopes * keep
    direction = residual / size
    error = (residual * direction).sum(2, keepdim=True)
    tolerance = 1e-12 if xx.dtype == torch.float64 else 1e-2 if damping > 0 else 1e-5
    enough = tolerance**2 * error.sum()
    for _ in range(2 * xx.shape[1]):
        if not error.sum() > enough:
            break
        curved = (direction @ xx).mul_(keep)
        curvature = (direction * curved).sum(2, keepdim=True)
        length = torch.where(curvature > 0, error / curvature, 0)
        step.addcmul_(length, direction)
        residual.addcmul_(length, curved, value=-1)
        scaled, last = residual / size, error
        error = (residual * scaled).sum(2, keepdim=True)
        direction.mul_(torch.where(last > 0, error / last, 0)).add_(scaled)
    return step
