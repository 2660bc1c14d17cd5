"""Batch norm in eval mode as what it is there, a factor and a summand per channel: its second derivatives are cheap."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class FixedBatchNorm(TorchFunctionMode):
    """Inside, batch norm with fixed statistics is computed as x * factor + summand.

    Torch differentiates its own batch norm twice by the formula for batch statistics, which takes a fifth of a
    Hessian-vector product. Only the parameters named here get a gradient through it.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]):
        super().__init__()
        self.differentiable = {id(parameter) for parameter in parameters}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.batch_norm:
            return self._batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _batch_norm(  # the arguments have torch's names
        self, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
    ):
        if training or running_mean is None:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        weight, bias = (p if p is None or id(p) in self.differentiable else p.detach() for p in (weight, bias))
        factor = (running_var + eps).rsqrt()
        factor = factor if weight is None else factor * weight
        summand = -running_mean * factor if bias is None else bias - running_mean * factor
        shape = (1, -1, *(1,) * (input.ndim - 2))
        return torch.addcmul(summand.view(shape), input, factor.view(shape))
