"""Layers whose second derivatives are cheap: torch's own formulas for these compute more than is needed."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch.autograd.function import Function, once_differentiable
from torch.nn.modules.utils import _pair
from torch.overrides import TorchFunctionMode


class TwiceDifferentiable(TorchFunctionMode):
    """Inside, gradients can be differentiated once more at less cost; of biases and norms, those of `parameters` only.

    Batch norm with fixed statistics is a factor and a summand per channel; the gradients of a convolution are bilinear,
    so that their own are convolutions with kernels of the usual size; that of a ReLU does not change with its input.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]):
        super().__init__()
        self.differentiable = {id(parameter) for parameter in parameters}
        self.replaced = {F.batch_norm: self._batch_norm, F.conv2d: self._conv2d, F.relu: self._relu}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.replaced.get(func, func)(*args, **(kwargs or {}))

    def _batch_norm(
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

    def _conv2d(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        plain = not isinstance(padding, str) and input.ndim == 4 and input.dtype == weight.dtype
        if not plain or id(bias) in self.differentiable or torch.is_autocast_enabled(input.device.type):
            return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        options = _pair(stride), _pair(padding), _pair(dilation), groups
        return _Convolution.apply(input, weight, None if bias is None else bias.detach(), options)

    def _relu(self, input, inplace=False):
        return F.relu(input, True) if inplace else _Relu.apply(input)


class _Convolution(Function):
    @staticmethod
    def forward(ctx, inputs, weight, bias, options):
        ctx.save_for_backward(inputs, weight)
        ctx.options = options
        return F.conv2d(inputs, weight, bias, *options)

    @staticmethod
    def backward(ctx, g):
        return *_ConvolutionGradients.apply(g, *ctx.saved_tensors, ctx.options, ctx.needs_input_grad[:2]), None, None


class _ConvolutionGradients(Function):
    """The gradients of a convolution with respect to its inputs, from g and the weight, and to its weight."""

    @staticmethod
    def forward(ctx, g, inputs, weight, options, wanted):
        ctx.save_for_backward(g, inputs, weight)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return _gradients(g, inputs, weight, options, wanted)

    @staticmethod
    @once_differentiable
    def backward(ctx, to_inputs, to_weight):
        g, inputs, weight = ctx.saved_tensors
        to_g = None
        if to_weight is not None:
            to_g = F.conv2d(inputs, to_weight, None, *ctx.options)
        if to_inputs is not None:
            also = F.conv2d(to_inputs, weight, None, *ctx.options)
            to_g = also if to_g is None else to_g.add_(also)
        wanted = to_weight is not None and ctx.needs_input_grad[1], to_inputs is not None and ctx.needs_input_grad[2]
        inputs, weight = to_inputs if wanted[1] else inputs, to_weight if wanted[0] else weight
        return to_g, *_gradients(g, inputs, weight, ctx.options, wanted), None, None


def _gradients(g, inputs, weight, options, wanted):
    if not any(wanted):
        return None, None
    stride, padding, dilation, groups = options
    return torch.ops.aten.convolution_backward(
        g, inputs, weight, None, stride, padding, dilation, False, [0, 0], groups, [*wanted, False]
    )[:2]


class _Relu(Function):
    @staticmethod
    def forward(ctx, inputs):
        outputs = F.relu(inputs)
        ctx.save_for_backward(outputs)
        return outputs

    @staticmethod
    def backward(ctx, g):
        return _ReluGradient.apply(g, ctx.saved_tensors[0].detach())


class _ReluGradient(Function):
    @staticmethod
    def forward(ctx, g, outputs):
        ctx.save_for_backward(outputs)
        return torch.ops.aten.threshold_backward(g, outputs, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return torch.ops.aten.threshold_backward(g, *ctx.saved_tensors, 0), None
