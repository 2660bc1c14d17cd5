"""The network that SynFlow's theory is about: activations that saturate let the flow through."""

import warnings

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .._checks import callers_level

_LINES = {  # linear at zero, and flat from somewhere on
    F.relu6, F.hardtanh, F.hardtanh_, F.tanh, torch.tanh, torch.tanh_, torch.Tensor.tanh, torch.Tensor.tanh_,
    F.softsign, torch.clamp, torch.clamp_, torch.clip, torch.Tensor.clamp, torch.Tensor.clamp_, torch.Tensor.clip,
}  # fmt: skip
_GATES = {  # between 0 and 1
    F.sigmoid, torch.sigmoid, torch.sigmoid_, torch.Tensor.sigmoid, torch.Tensor.sigmoid_, F.hardsigmoid,
}  # fmt: skip
_NO_FLOW = {F.softmax, torch.softmax, torch.Tensor.softmax, F.layer_norm, F.group_norm, F.rms_norm}
_NO_FLOW |= {F.multi_head_attention_forward, F.scaled_dot_product_attention}  # multiples of the input give the same


class Linearised(TorchFunctionMode):
    """Inside, f(x) = f'(x) x: activations that saturate become the identity, sigmoids get the slope f(x) / x."""

    def __init__(self):
        super().__init__()
        self._seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _LINES:
            return args[0] if args else kwargs["input"]
        if func in _GATES:
            values = (args[0] if args else kwargs["input"]).clone()
            result = func(*args, **kwargs).detach()
            slope = torch.where(values > 0, result / values, 1).detach()
            return result + slope * (values - values.detach())
        if func in _NO_FLOW:
            self._seen.add(func.__name__)
        return func(*args, **kwargs)

    def __exit__(self, *exception):
        super().__exit__(*exception)
        if self._seen and exception[0] is None:
            what = f"{', '.join(sorted(self._seen))}, which give the same for any multiple"
            warnings.warn(f"synflow calls {what}: scores before them mean little", stacklevel=callers_level())
