"""What a model costs: parameters, multiply-accumulates (MACs) dense and sparse, bytes on disk, measured latency."""

import math
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import nn

from ._checks import whole
from ._products import Products, countable
from ._stored import tied_names
from ._torch import device_of, in_mode
from .model_utils import get_masks, layer_name, layer_table, prunable_weights

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Cost:
    """The price of a model and of one input of it; MACs as `cost` counts them.

    Args:
        parameters: All of them: weights, biases, normalisation.
        nonzero: How many of these are not zero.
        prunable: The weights of the prunable layers.
        kept: How many of these are kept, as `count` counts them.
        macs: Per input, the additions of biases included.
        sparse_macs: The same without the multiplications by weights that are zero.
        bias_macs: Of both, the additions of biases.
        bytes: Of the state_dict, tied weights once.
        sparse_bytes: As `save` stores it: where there is a mask, one bit a weight and the kept values.
        latency: Median seconds of a forward pass of the whole batch, if measured.
        latency_spread: Interquartile range of the same, in seconds.
        threads: The number of CPU threads that the latency was measured with.

    Example:
        >>> model = pu.models.create("lenet300")
        >>> masks = pu.prune(model, "magnitude", 0.9)
        >>> price = pu.cost(model, torch.zeros(1, 1, 28, 28))
        >>> price.macs, price.sparse_macs, round(price.mac_density, 4)
        (266610, 27030, 0.1014)
    """

    parameters: int
    nonzero: int
    prunable: int
    kept: int
    macs: int
    sparse_macs: int
    bias_macs: int
    bytes: int
    sparse_bytes: int
    latency: float | None = None
    latency_spread: float | None = None
    threads: int | None = None

    @property
    def mac_density(self) -> float:
        """Fraction of the dense MACs that is left."""
        return self.sparse_macs / self.macs


def cost(
    model: nn.Module,
    inputs: torch.Tensor,
    *,
    latency: bool = False,
    threads: int = 1,
    seconds: float = 1.0,
) -> Cost:
    """Count what a model costs, and measure its latency if asked; the model is left as it was.

    MACs are per input: half of what torch's counter gives for the matrix products and convolutions, attention and
    groups included, plus `bias_macs`, the convention of Tanaka et al. 2020's code: one per output element of a
    convolution with a bias and one per output feature of a linear layer with a bias. Normalisation, activations,
    pooling and residual additions are free. `sparse_macs` leaves out the products with weights that are zero, masked or
    not. Dense kernels compute them all the same: only `latency` tells what a device gains.

    Args:
        model: Any `nn.Module` with prunable layers.
        inputs: A batch (N, ...), of which the first is run to count, and all to measure.
        latency: Whether to measure the time of a forward pass in eval mode.
        threads: CPU threads while measuring; afterwards there are as many as before.
        seconds: Measure for about this long, after a warm-up, and at least five times.

    Returns:
        A `Cost`.

    Raises:
        TypeError: If `inputs` is not a tensor.
        ValueError: If `inputs` is empty, an option is out of its range, or the model has nothing to prune.

    Example:
        >>> model = pu.models.create("vgg16")
        >>> pu.cost(model, torch.zeros(1, 3, 32, 32)).macs
        313478154
        >>> price = pu.cost(pu.models.create("lenet300"), torch.zeros(8, 1, 28, 28), latency=True, seconds=0.1)
        >>> 0 < price.latency < 1, price.threads
        (True, 1)
    """
    whole("threads", threads)
    if isinstance(seconds, bool) or not isinstance(seconds, Real) or not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be a number above 0, not {seconds!r}")
    table, products = _count_macs(model, inputs)
    skipped = int((table["macs"] - table["sparse_macs"]).sum())
    parameters, state, masks = list(model.parameters()), model.state_dict(), get_masks(model)
    saved = sum(
        (mask.numel() - int(mask.count_nonzero())) * state[name].element_size() - -(-mask.numel() // 8)
        for name, mask in masks.items()
    )
    tied = tied_names(state, masks)
    size = sum(tensor.numel() * tensor.element_size() for name, tensor in state.items() if name not in tied)
    median, spread = _latency(model, inputs, threads, seconds) if latency else (None, None)
    return Cost(
        parameters=sum(p.numel() for p in parameters),
        nonzero=sum(int(p.detach().count_nonzero()) for p in parameters),
        prunable=int(table["total"].sum()),
        kept=int(table["kept"].sum()),
        macs=products.total + products.biases,
        sparse_macs=products.total + products.biases - skipped,
        bias_macs=products.biases,
        bytes=size,
        sparse_bytes=size - saved,
        latency=median,
        latency_spread=spread,
        threads=threads if latency else None,
    )


def cost_table(model: nn.Module, inputs: torch.Tensor) -> "pd.DataFrame":
    """List what each prunable layer costs.

    Args:
        model: Any `nn.Module` with prunable layers.
        inputs: A batch (N, ...), of which the first is run.

    Returns:
        A row per prunable layer in module order with the columns layer, shape, density, macs and sparse_macs (as in
        `cost`, per input). Products without a prunable weight, such as queries times keys, are in no row.

    Raises:
        TypeError: If `inputs` is not a tensor.
        ValueError: If `inputs` is empty or the model has nothing to prune.

    Example:
        >>> pu.cost_table(pu.models.create("lenet300"), torch.zeros(1, 1, 28, 28))
          layer       shape  density    macs  sparse_macs
        0   fc1  (300, 784)      1.0  235500       235500
        1   fc2  (100, 300)      1.0   30100        30100
        2   fc3   (10, 100)      1.0    1010         1010
    """
    table, _ = _count_macs(model, inputs)
    table["density"] = 1 - table["sparsity"]
    return table[["layer", "shape", "density", "macs", "sparse_macs"]]


# --- Products --------------------------------------------------------------------------------------------------------


def _count_macs(model, inputs) -> "tuple[pd.DataFrame, Products]":
    """Return the layer table with macs and sparse_macs for one input, and the products of the whole model."""
    if not torch.is_tensor(inputs):
        raise TypeError(f"inputs must be a tensor (N, ...), not {type(inputs).__name__}")
    if inputs.ndim == 0 or len(inputs) == 0:
        raise ValueError("inputs is empty: one input is needed to see the shapes")
    weights = prunable_weights(model)
    products = Products(model, {name: weight for name, weight in weights.items() if weight.ndim > 1})  # no biases
    torch.clear_autocast_cache()  # under autocast, copies of the weights from before would not be known
    with torch.no_grad(), in_mode(model, training=False), countable(), products:
        model(inputs[:1].to(device_of(model)))
    table = layer_table(model)
    names = table["layer"].map({layer_name(name): name for name in weights})
    added, dense, sparse = (
        names.map(counts).fillna(0).astype(int) for counts in (products.bias_of, products.dense_of, products.sparse_of)
    )
    table["macs"], table["sparse_macs"] = dense + added, sparse + added
    return table, products


# --- Latency ---------------------------------------------------------------------------------------------------------


def _latency(model, inputs, threads, seconds) -> tuple[float, float]:
    """Median and interquartile range of the seconds of a forward pass of the whole batch."""
    from torch.utils import benchmark  # takes half a second to import

    run = partial(model, inputs.to(device_of(model)))
    timer = benchmark.Timer("run()", globals={"run": run}, num_threads=threads)  # waits for a GPU by itself
    with torch.no_grad(), in_mode(model, training=False):
        timer.timeit(3)
        measured = timer.blocked_autorange(min_run_time=seconds)
        while len(measured.times) < 5:
            (measured,) = benchmark.Measurement.merge([measured, timer.blocked_autorange(min_run_time=seconds)])
    return measured.median, measured.iqr
