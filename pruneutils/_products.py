"""The multiply-accumulates of a forward pass, and which weight each of them belongs to."""

import contextlib
from bisect import bisect_right
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import flop_registry

from ._dispatch import Watch


@contextlib.contextmanager
def countable() -> Iterator[None]:
    """Attention by plain matrix products: torch's counter has no formula for the fused kernels of a CPU."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class Products(Watch):
    """Sees every operation of a forward pass and notes the products that each weight takes part in.

    A weight is known by its place in memory, also a part of it (the queries of an attention's projection), and so is
    what is computed from it element by element: its copy in another precision, a standardised weight.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, weights: dict[str, nn.Parameter]):
        super().__init__()
        self.total = self.biases = 0
        self.dense_of, self.sparse_of, self.bias_of = (dict.fromkeys(weights, 0) for _ in range(3))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        biases = {name: parameters.get(name.removesuffix("weight") + "bias") for name in weights}
        self._weights, self._derived = _Places(weights), _Places({})
        self._biases = _Places({name: bias for name, bias in biases.items() if bias is not None})
        self._nonzero = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, operation = kwargs or {}, getattr(func, "overloadpacket", func)
        if operation not in flop_registry and hasattr(func, "decompose"):
            with self:
                result = func.decompose(*args, **kwargs)  # in inference mode composed operations arrive whole
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        tensors = [arg for arg in (*args, *kwargs.values()) if torch.is_tensor(arg)]
        if operation in flop_registry:
            self._note_product(operation, args, kwargs, result, tensors)
        elif operation in (torch.ops.aten.add, torch.ops.aten.add_):  # a linear layer whose inputs are not contiguous
            for tensor in tensors:
                if name := self._biases.owner(tensor):
                    self._note_bias(name, tensor.numel())
        elif operation is not torch.ops.aten.embedding:
            self._note_derived(tensors, result)
        return result

    def _note_product(self, operation, args, kwargs, result, tensors):
        n_products = flop_registry[operation](*args, **kwargs, out_val=result) // 2
        self.total += n_products
        name, weight = self._weight_among(tensors)
        if operation is torch.ops.aten.convolution and args[2] is not None:
            self._note_bias(name, result.numel())
        elif operation is torch.ops.aten.addmm and args[0].ndim == 1:
            self._note_bias(name, args[0].numel())
        if name is not None:
            self.dense_of[name] += n_products
            self.sparse_of[name] += n_products * self._count_nonzero(weight) // weight.numel()

    def _note_bias(self, name, n_added):
        self.biases += n_added
        if name is not None:
            self.bias_of[name] += n_added

    def _note_derived(self, tensors, result):
        """Remember a tensor with as many entries as the weight that it was computed from."""
        result = result[0] if isinstance(result, tuple | list) and result else result
        name, weight = self._weight_among(tensors)
        if name is not None and torch.is_tensor(result) and result.numel() == weight.numel():
            if result.is_floating_point() and self._weights.owner(result) is None:
                self._derived.add(name, result)

    def _weight_among(self, tensors):
        for places in (self._weights, self._derived):
            for tensor in tensors:
                if name := places.owner(tensor):
                    return name, tensor
        return None, None

    def _count_nonzero(self, weight) -> int:
        """Count once for a weight that is used many times."""
        key = weight.data_ptr(), weight.shape, weight.stride()
        if key not in self._nonzero:
            self._nonzero[key] = int(weight.count_nonzero())
        return self._nonzero[key]


class _Places:
    """Whose a tensor is, by the stretch of memory that it lies in."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self._starts, self._rest = [], []  # sorted; (end, name, the tensor, so that its memory is not used anew)
        for name, tensor in tensors.items():
            self.add(name, tensor)

    def add(self, name: str, tensor: torch.Tensor):
        if tensor.numel():
            start = tensor.data_ptr()
            index = bisect_right(self._starts, start)
            self._starts.insert(index, start)
            self._rest.insert(index, (start + tensor.numel() * tensor.element_size(), name, tensor))

    def owner(self, tensor: torch.Tensor) -> str | None:
        """Return the name of the tensor in whose memory this one starts."""
        index = bisect_right(self._starts, tensor.data_ptr()) - 1
        return self._rest[index][1] if index >= 0 and tensor.data_ptr() < self._rest[index][0] else None
