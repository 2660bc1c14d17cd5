"""What a model costs: parameters, multiply-accumulates (MACs) dense and sparse, bytes on disk, measured latency."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ._checks import number
from ._files import tied_names
from ._torch import device_of, forward, in_mode, inputs_of
from .model_utils import get_masks, layer_name, layer_table, prunable_weights

if TYPE_CHECKING:
    import pandas as pd

aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """The price of a model and of one input of it; MACs as `cost` counts them."""

    parameters: int  # all of them: weights, biases, normalisation
    nonzero: int  # how many of these are not zero
    macs: int  # per input, the additions of biases included
    sparse_macs: int  # the same without the multiplications by weights that are zero
    bias_macs: int  # of both, the additions of biases
    bytes: int  # of the state_dict, tied weights once
    sparse_bytes: int  # as `save` stores it: where there is a mask, one bit a weight and the kept values
    latency: float | None = None  # median seconds of a forward pass of the whole batch, if measured

    @property
    def mac_density(self) -> float:
        """Fraction of the dense MACs that is left."""
        return self.sparse_macs / self.macs


def cost(model: nn.Module, inputs: object, *, latency: bool = False, seconds: float = 1.0) -> Cost:
    """Count what a model costs, and measure its latency if asked; the model is left as it was.

    MACs are per input: half of what torch's formulas give for matrix products and convolutions, plus `bias_macs`, as in
    Tanaka et al. 2020's code: one per output element of a convolution and per output feature of a linear layer with a
    bias. All else is free. `sparse_macs` leaves out the products with weights that are zero, masked or not. Dense
    kernels compute them all the same: only `latency` shows what a device gains.

    Args:
        model: Any `nn.Module` with prunable layers.
        inputs: Inputs (N, ...) or a batch of any form, of which the first is run to count, and all to measure.
        latency: Whether to measure the time of a forward pass in eval mode, on one thread.
        seconds: For about how long to measure, after a warm-up; at least once.

    Returns:
        A `Cost`.

    Raises:
        ValueError: If `inputs` is empty, an option is out of its range, or the model has nothing to prune.

    Example:
        >>> model = pu.models.create("lenet300")
        >>> masks = pu.prune(model, "magnitude", 0.9)
        >>> price = pu.cost(model, torch.zeros(1, 1, 28, 28))
        >>> price.macs, price.sparse_macs, round(price.mac_density, 4)
        (266610, 27030, 0.1014)
    """
    number("seconds", seconds, least=0)
    table, products = _count_macs(model, inputs)
    parameters, macs = list(model.parameters()), products.total + products.biases
    state, masks = model.state_dict(), get_masks(model)
    size = sum(state[name].nbytes for name in state.keys() - tied_names(state, masks).keys())
    saved = sum(int((~mask).sum()) * state[name].itemsize - -(-mask.numel() // 8) for name, mask in masks.items())
    return Cost(
        parameters=sum(p.numel() for p in parameters),
        nonzero=sum(int(p.detach().count_nonzero()) for p in parameters),
        macs=macs,
        sparse_macs=macs - int((table["macs"] - table["sparse_macs"]).sum()),
        bias_macs=products.biases,
        bytes=size,
        sparse_bytes=size - saved,
        latency=_latency(model, inputs, seconds) if latency else None,
    )


def cost_table(model: nn.Module, inputs: object) -> "pd.DataFrame":
    """List what each prunable layer costs.

    Args:
        model, inputs: As for `cost`.

    Returns:
        A row per prunable layer in module order: layer, shape, density, macs and sparse_macs (as in `cost`). Products
        without a prunable weight, such as queries times keys, are in no row.

    Example:
        >>> pu.costs.cost_table(pu.models.create("lenet300"), torch.zeros(1, 1, 28, 28))
          layer       shape  density    macs  sparse_macs
        0   fc1  (300, 784)      1.0  235500       235500
        1   fc2  (100, 300)      1.0   30100        30100
        2   fc3   (10, 100)      1.0    1010         1010
    """
    table, _ = _count_macs(model, inputs)
    return table.assign(density=1 - table["sparsity"])[["layer", "shape", "density", "macs", "sparse_macs"]]


def _count_macs(model, inputs) -> "tuple[pd.DataFrame, _Products]":
    """Return the layer table with macs and sparse_macs for one input, and the products of the whole model."""
    weights = prunable_weights(model)
    products = _Products(model, weights)
    with (
        torch.inference_mode(False),  # there composed operations would arrive whole
        torch.no_grad(),
        torch.autocast(device_of(model).type, enabled=False),  # with it, copies of the weights would be multiplied
        in_mode(model, training=False),
        _plain_kernels(model),
    ):
        sample = inputs_of(inputs, model, most=1)
        with products:
            forward(model, sample)
    table = layer_table(model)
    names = table["layer"].map({layer_name(name): name for name in weights})
    added, dense, sparse = (names.map(n).astype(int) for n in (products.bias_of, products.dense_of, products.sparse_of))
    table["macs"], table["sparse_macs"] = dense + added, sparse + added
    return table, products


@contextlib.contextmanager
def _plain_kernels(model: nn.Module) -> Iterator[None]:
    """Compute attention and recurrence by plain matrix products: torch has no formulas for their fused kernels."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with contextlib.ExitStack() as undo, sdpa_kernel(SDPBackend.MATH):
        undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        for library in (torch.backends.mkldnn, torch.backends.cudnn) if recurrent else ():
            undo.callback(setattr, library, "enabled", library.enabled)
            library.enabled = False
        yield


class _Products(TorchDispatchMode):
    """Counts the products of a forward pass by torch's formulas, and notes which weight takes part in each."""

    def __init__(self, model: nn.Module, weights: dict[str, nn.Parameter]):
        super().__init__()
        self.total = self.biases = 0
        self.dense_of, self.sparse_of, self.bias_of = (dict.fromkeys(weights, 0) for _ in range(3))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._alive = []  # what is in `_names` and not in the model, so that its memory is not used anew
        # by their memory, so that parts of a weight belong to it, and what is computed from it entry by entry
        self._names = {_memory(w): name for name, w in weights.items() if w.ndim > 1}
        biases = ((name, parameters.get(name.removesuffix("weight") + "bias")) for name in weights)
        self._bias_names = {_memory(bias): name for name, bias in biases if bias is not None}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to be skipped by the compiler means to import it, which takes seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, operation = kwargs or {}, getattr(func, "overloadpacket", func)
        result = func(*args, **kwargs)
        tensors = [arg for arg in args if torch.is_tensor(arg)]
        weight = next((tensor for tensor in tensors if _memory(tensor) in self._names), None)
        name = None if weight is None else self._names[_memory(weight)]
        if operation in flop_registry:
            n_products = flop_registry[operation](*args, **kwargs, out_val=result) // 2
            self.total += n_products
            if name is not None:
                self.dense_of[name] += n_products
                self.sparse_of[name] += n_products * int(weight.count_nonzero()) // weight.numel()
        elif name is not None and operation is not aten.embedding:
            first = result[0] if isinstance(result, tuple | list) and result else result
            if torch.is_tensor(first) and first.numel() == weight.numel():  # such as a standardised weight
                self._names[_memory(first)] = name
                self._alive.append(first)
        if operation is aten.convolution and args[2] is not None:
            self._note_bias(args[2], result.numel())
        elif operation is aten.addmm and args[0].ndim == 1:
            self._note_bias(args[0], args[0].numel())
        elif operation in (aten.add, aten.add_):  # a linear layer whose inputs are not contiguous
            for tensor in tensors:
                if _memory(tensor) in self._bias_names:
                    self._note_bias(tensor, tensor.numel())
        return result

    def _note_bias(self, bias, n_added):
        self.biases += n_added
        if (name := self._bias_names.get(_memory(bias))) is not None:
            self.bias_of[name] += n_added


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _latency(model, inputs, seconds) -> float:
    """Return the median of the seconds of a forward pass of the whole batch."""
    from torch.utils import benchmark  # takes half a second to import

    run = partial(forward, model, inputs_of(inputs, model))
    timer = benchmark.Timer("run()", globals={"run": run})  # waits for a GPU by itself
    with torch.no_grad(), in_mode(model, training=False):
        timer.timeit(3)
        return timer.blocked_autorange(min_run_time=seconds).median
