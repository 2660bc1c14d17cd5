"""What a model costs: parameters, multiply-accumulates (MACs) dense and sparse, bytes on disk, measured latency."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ._torch import device_of, in_mode
from .model_utils import get_masks, layer_name, layer_table, prunable_weights


@dataclass(frozen=True)
class Cost:
    """The price of a model and of one input of it; MACs as `cost` counts them."""

    parameters: int  # all of them: weights, biases, normalisation
    nonzero: int  # of these
    prunable: int  # weights of convolution and linear layers
    kept: int  # of these
    macs: int  # per input, the additions of biases included
    sparse_macs: int  # the same without the multiplications by pruned weights
    bias_macs: int  # of both, the additions of biases
    bytes: int  # of the state_dict, as it is
    sparse_bytes: int  # as `save` stores it: where there is a mask, one bit a weight and the kept values
    latency: float | None = None  # median seconds for the whole batch, if measured
    latency_spread: float | None = None  # interquartile range of the same, in seconds

    @property
    def mac_density(self) -> float:
        """Fraction of the dense MACs that is left."""
        return self.sparse_macs / self.macs


def cost(model: nn.Module, inputs: torch.Tensor, *, latency: bool = False, repeats: int = 30) -> Cost:
    """Count what `model` costs on `inputs` (N, ...), of which one is run; with `latency`, time the whole batch.

    MACs are per input: half of what torch's counter gives for the matrix products and convolutions, attention and
    groups included, plus `bias_macs`, the convention of Tanaka et al. 2020's code: one per output element of a
    convolution with a bias and one per output feature of a linear layer with a bias. Normalisation, activations,
    pooling and residual additions are free. `sparse_macs` leaves out the products with pruned weights, which dense
    kernels compute all the same: only `latency` tells what a device gains. It is the median of `repeats` passes in eval
    mode after a warm-up. The model is left as it was. Raises TypeError if `inputs` is not a tensor, ValueError if it
    is empty or the model has nothing to prune.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats!r}")
    table, total = _count_macs(model, inputs)
    biases = int(table["bias_macs"].sum())
    skipped = int((table["macs"] - table["sparse_macs"]).sum())
    parameters = list(model.parameters())
    tensors = model.state_dict()
    saved = sum(
        (mask.numel() - int(mask.count_nonzero())) * tensors[name].element_size() - -(-mask.numel() // 8)
        for name, mask in get_masks(model).items()
    )
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    median, spread = _latency(model, inputs, repeats) if latency else (None, None)
    return Cost(
        parameters=sum(p.numel() for p in parameters),
        nonzero=sum(int(p.detach().count_nonzero()) for p in parameters),
        prunable=int(table["total"].sum()),
        kept=int(table["kept"].sum()),
        macs=total + biases,
        sparse_macs=total + biases - skipped,
        bias_macs=biases,
        bytes=size,
        sparse_bytes=size - saved,
        latency=median,
        latency_spread=spread,
    )


def cost_table(model: nn.Module, inputs: torch.Tensor) -> pd.DataFrame:
    """A row per prunable layer in module order: layer, shape, density, macs, sparse_macs (as in `cost`, per input).

    Products without a prunable weight, such as queries times keys, are in no row. Raises as `cost` does.
    """
    table, _ = _count_macs(model, inputs)
    table["density"] = 1 - table["sparsity"]
    return table[["layer", "shape", "density", "macs", "sparse_macs"]]


def _count_macs(model, inputs) -> tuple[pd.DataFrame, int]:
    """The layer table with macs, sparse_macs and bias_macs, and the products of the whole model, for one input."""
    if not torch.is_tensor(inputs):
        raise TypeError(f"inputs must be a tensor (N, ...), not {type(inputs).__name__}")
    if len(inputs) == 0:
        raise ValueError("inputs is empty: one input is needed to see the shapes")
    names = {id(weight): layer_name(name) for name, weight in prunable_weights(model).items()}
    # a weight takes part in one product per position: an output's for a convolution, a token for a linear layer
    positions, biases = dict.fromkeys(names.values(), 0), dict.fromkeys(names.values(), 0)

    def listen(module, args, output):
        if isinstance(module, nn.MultiheadAttention):  # calls its output projection as a function, past any hook
            module, output = module.out_proj, output[0]
        name = names[id(module.weight)]
        if isinstance(module, nn.Linear):
            positions[name] += output.numel() // module.out_features
            added = module.out_features
        else:
            grid = args[0] if module.transposed else output
            positions[name] += grid[0, 0].numel()
            added = output[0].numel()
        if module.bias is not None:
            biases[name] += added

    layers = [m for m in model.modules() if id(getattr(m, "weight", None)) in names]
    layers += [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    counter = FlopCounterMode(display=False)
    hooks = [module.register_forward_hook(listen) for module in layers]
    try:
        with torch.no_grad(), in_mode(model, training=False), _countable(), counter:
            model(inputs[:1].to(device_of(model)))
    finally:
        for hook in hooks:
            hook.remove()
    table = layer_table(model)
    places, added = table["layer"].map(positions), table["layer"].map(biases)
    table["bias_macs"] = added
    table["macs"] = table["total"] * places + added
    table["sparse_macs"] = table["kept"] * places + added
    return table, counter.get_total_flops() // 2


@contextlib.contextmanager
def _countable() -> Iterator[None]:
    """Attention by plain matrix products: torch's counter has no formula for the fused kernels of a CPU."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _latency(model, inputs, repeats) -> tuple[float, float]:
    """Median and interquartile range of the seconds of a forward pass."""
    device = device_of(model)
    inputs = inputs.to(device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    with torch.no_grad(), in_mode(model, training=False):
        for _ in range(3 + repeats):
            wait()
            start = time.perf_counter()
            model(inputs)
            wait()
            seconds.append(time.perf_counter() - start)
    first, median, third = torch.tensor(seconds[3:], dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    return median.item(), (third - first).item()
