"""What a pruned network gets back without training: fresh batch-norm statistics, and weights fitted to the dense one.

Most of what one-shot pruning loses is not in the weights that went. The statistics of batch norm are those of a network
that no longer exists, and the weights that stay do not know that others are gone. Both can be mended with a few hundred
inputs and no labels.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import nn

from .._checks import a_model, is_pair
from .._prunable import module_of
from .._torch import device_of, full_float32, in_mode
from ..model_utils import accuracy, get_masks, layer_name, prunable_weights
from ._leastsquares import add, fit
from ._passes import inputs_of, stops, visits
from ._slicing import removed_cuts

if TYPE_CHECKING:
    import pandas as pd

_Norm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Recalibration:
    """What `recalibrate` has measured; the accuracies are None where there were no targets."""

    layers: int  # batch norms measured anew
    samples: int  # inputs they were measured on
    before: float | None  # accuracy before
    after: float | None  # and after


@torch.no_grad()
def recalibrate(model: nn.Module, data: object, test: object = None) -> Recalibration:
    """Measure the statistics of all batch norms anew, exactly and in place.

    The mean and the unbiased variance of each batch norm become those of its input over all samples of all batches,
    pooled in float64, in the network as it is afterwards: each layer is measured behind layers that are done already.
    So nothing is left of the old statistics, no moving average is involved, and it does not matter how the data is
    divided into batches. The batches go through the network side by side, from one batch norm to the next, in one pass;
    the first layers, where activations of all samples are too large to wait for each other, take a short one each.

    Args:
        model: A model with batch norm.
        data: Inputs (N, ...) to measure on: a tensor, one (inputs, targets) pair, or an iterable of such batches. A few
            hundred samples of the training data are usual.
        test: What to measure the accuracy on; by default `data`, if it has targets.

    Returns:
        A `Recalibration`: how many layers were measured on how many samples, and the accuracy before and after.

    Raises:
        ValueError: If the model has no batch norm with running statistics, `data` is empty, one value is all that a
            batch norm reads, or a statistic is NaN or infinite. The model is then as it was.

    Example:
        >>> model = pu.models.create("resnet20", num_classes=10, in_channels=1)
        >>> train, test = pu.data.load("digits")
        >>> done = pu.recalibrate(model, train.batch(64)[0])
        >>> done.layers, done.samples
        (19, 64)

    References:
        Li et al. 2020, EagleEye (adaptive batch norm).
    """
    names = {
        m: name for name, m in a_model(model).named_modules() if isinstance(m, _Norm) and m.running_mean is not None
    }
    if not names:
        raise ValueError(f"{type(model).__name__} has no batch norm with running statistics: nothing to measure")
    data = list(data) if isinstance(data, Iterator) else data
    test = data if test is None and _has_targets(data) else test
    inputs = inputs_of(data, model)
    before = None if test is None else accuracy(model, test)
    buffers = [b for m in names for b in (m.running_mean, m.running_var, m.num_batches_tracked) if b is not None]
    saved = [buffer.clone() for buffer in buffers]
    tallies: dict[nn.Module, _Tally] = {}
    try:
        with full_float32(), in_mode(model, training=False), closing(visits(model, names, inputs)) as calls:
            for module, tensors in calls:
                tally = tallies.setdefault(module, _Tally())
                for tensor in tensors:
                    tally.add(tensor)
                _set_statistics(module, names[module], tally, len(inputs))
    except BaseException:
        for buffer, value in zip(buffers, saved):
            buffer.copy_(value)
        raise
    after = None if test is None else accuracy(model, test)
    return Recalibration(len(tallies), sum(len(x) for x in inputs), before, after)


def _set_statistics(module, name, tally, n_batches) -> None:
    if tally.n == 1:
        raise ValueError(f"{name}: a single value has no variance; use more data")
    variance = tally.m2 / (tally.n - 1)
    if not (torch.isfinite(tally.mean).all() and torch.isfinite(variance).all()):
        raise ValueError(f"{name}: its inputs are NaN or infinite")
    module.running_mean.copy_(tally.mean)
    module.running_var.copy_(variance)
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.fill_(n_batches)


def _has_targets(data) -> bool:
    """Tell whether the batches are (inputs, targets) with a class a sample."""
    if torch.is_tensor(data) or not isinstance(data, Iterable):
        return False
    batch = data if is_pair(data) else next(iter(data), None)
    return is_pair(batch) and batch[1].ndim == 1 and not batch[1].is_floating_point()


class _Tally:
    """Mean and variance over batches of any sizes (Chan et al. 1983)."""

    def __init__(self):
        self.n, self.mean, self.m2 = 0, 0.0, 0.0

    def add(self, values: torch.Tensor) -> None:
        """Add the values (N, channels, ...) of one batch."""
        values = values if values.dtype in (torch.float32, torch.float64) else values.float()
        n = values.numel() // values.shape[1]
        if values.ndim == 4 and values.dtype == torch.float32 and values.device.type == "cpu":
            for sample in values.split(1):  # thirty times faster, and rounding stays within a sample
                mean, var = torch.batch_norm_update_stats(sample, *torch.zeros(2, values.shape[1]), momentum=0.0)
                self._pool(mean, var, n // len(values))
        else:
            var, mean = torch.var_mean(values, [d for d in range(values.ndim) if d != 1], correction=0)
            self._pool(mean, var, n)

    def _pool(self, mean: torch.Tensor, var: torch.Tensor, n: int) -> None:
        """Add the mean and the biased variance of n values of each channel."""
        delta, total = mean.double() - self.mean, self.n + n
        self.m2 = self.m2 + var.double() * n + delta.square() * (self.n * n / total)
        self.mean, self.n = self.mean + delta * (n / total), total


# --- Weights by least squares ----------------------------------------------------------------------------------------


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    dense: nn.Module,
    data: object,
    damping: float = 0.01,
    *,
    exclude: str | Iterable[str] = (),
    fit_bias: bool = False,
) -> "pd.DataFrame":
    """Fit the kept weights of a pruned network to the outputs of the dense one, layer by layer and in place.

    From the first layer to the last, the kept weights of each become the least-squares solution of

        sum || W x - (y - bias) ||^2  +  damping * (mean over inputs of sum x^2) * || W - W_now ||^2

    The sums run over all samples and positions. x is what the layer reads in the pruned network, whose layers before it
    are fitted already, and y is what the same layer gives in the dense network. Masks, biases and batch norms stay as
    they are. Where `prune_filters` has removed filters, y are the outputs of those that are left. The batches go
    through both networks side by side as in `recalibrate`, so only one layer's matrices are in memory, sum x x^T and
    sum x y^T. A layer that is called more than once stays as it is, and so does one that is used as a function, such as
    the output projection of `nn.MultiheadAttention`.

    Args:
        model: The pruned network.
        dense: The same network before pruning.
        data: Inputs (N, ...) to fit on: a tensor, one (inputs, targets) pair, or an iterable of such batches. Batches
            of 10 to 100 are fastest, and more samples than a layer has inputs best.
        damping: How strongly the weights are held where they are, relative to the mean square of the inputs; 0 is plain
            least squares.
        exclude: Names or globs of layers to leave as they are.
        fit_bias: Whether to fit the biases of layers that have one, too.

    Returns:
        A row per layer, in the order of the forward pass: layer, before, after, which are the squared errors of its
        outputs relative to the squared outputs of the dense layer, on `data`.

    Raises:
        ValueError: If `dense` is `model` or another network, `data` is empty, damping is negative, a layer cannot be
            fitted (a transposed convolution), or its inputs are NaN or infinite. The model is then as it was.

    Example:
        >>> model = pu.models.create("lenet5")
        >>> dense = pu.models.create("lenet5")
        >>> train, test = pu.data.load("digits")
        >>> masks = pu.prune(model, sparsity=0.5)
        >>> table = pu.reconstruct(model, dense, train.batch(100))
        >>> bool((table["after"] <= table["before"]).all()), pu.count(model).sparsity
        (True, 0.5)

    References:
        Frantar and Alistarh 2022, Optimal Brain Compression; 2023, SparseGPT. Both also choose what goes; here the
        masks are given.
    """
    if isinstance(damping, bool) or not isinstance(damping, Real) or not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be a number of at least 0, not {damping!r}")
    weights, masks = prunable_weights(model, exclude), get_masks(model)
    layers = {module_of(model, name): name for name in weights}
    layers = {m: name for m, name in layers.items() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))}
    rows = {name: _rows(model, dense, name) for name in layers.values()}
    inputs = inputs_of(data, model)
    with in_mode(model, training=False):
        calls = Counter(module for module, _ in stops(model, layers, inputs[0][:1]))
    saved = [(p, p.detach().clone()) for module in layers for p in module._parameters.values() if p is not None]
    table = []
    try:
        once = [module for module in layers if calls.get(module) == 1]
        twins = [module_of(dense, layers[module]) for module in once]
        with (
            full_float32(),
            in_mode(model, training=False),
            in_mode(dense, training=False),
            closing(visits(model, once, inputs)) as found,
            closing(visits(dense, twins, [x.to(device_of(dense)) for x in inputs], after=True)) as wanted,
        ):
            for (module, reads), (_, gives) in zip(found, wanted, strict=True):
                name, sums = layers[module], None
                for x, y in zip(reads, gives, strict=True):
                    y = y if isinstance(module, nn.Linear) else y.movedim(1, -1)
                    y = y if len(rows[name]) == y.shape[-1] else y[..., rows[name]]
                    sums = add(sums, module, x, y.to(x.device), fit_bias)
                if not (torch.isfinite(sums.xx).all() and torch.isfinite(sums.xy).all()):
                    raise ValueError(f"{layer_name(name)}: what it reads, or gives in dense, is NaN or infinite")
                keep = masks[name] if name in masks else module.weight != 0
                table.append((layer_name(name), *fit(module, keep, sums, damping, fit_bias)))
    except BaseException:
        for parameter, value in saved:
            parameter.copy_(value)
        raise
    import pandas as pd

    return pd.DataFrame(table, columns=["layer", "before", "after"])


def _rows(model: nn.Module, dense: nn.Module, name: str) -> torch.Tensor:
    """Which outputs of the dense layer are those of this one, filters that were removed in either left out."""
    layer = layer_name(name)
    try:
        twin = module_of(dense, name)
    except AttributeError:
        twin = None
    module = module_of(model, name)
    if twin is module:
        raise ValueError("dense is the model itself; give a copy from before the pruning")
    if type(twin) is not type(module):
        raise ValueError(f"dense has no {type(module).__name__} {layer!r}: it must be the same network before pruning")
    if getattr(module, "transposed", False):
        raise ValueError(f"{layer} is a transposed convolution, which is not fitted; exclude it")
    mine, theirs = (_kept_rows(net, name, len(m.weight)) for net, m in ((model, module), (dense, twin)))
    position = {row: i for i, row in enumerate(theirs)}
    if not set(mine) <= set(position) or twin.weight.shape[1:].numel() < module.weight.shape[1:].numel():
        raise ValueError(
            f"{layer} has the shape {tuple(module.weight.shape)}, in dense {tuple(twin.weight.shape)}, and that is not "
            "explained by filters that prune_filters has removed"
        )
    return torch.tensor([position[row] for row in mine])


def _kept_rows(model: nn.Module, name: str, n_rows: int) -> list[int]:
    """The rows of a weight as they were numbered before any removal."""
    for dim, index in removed_cuts(model).get(name, []):
        if dim == 0:
            return index.tolist()
    return list(range(n_rows))
