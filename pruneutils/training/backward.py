"""Backward-only pruning: outputs stay as they are, and gradients flow back as if the weights were pruned."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from ..model_utils import check_masks
from ..target import Target


class _Outputs(torch.autograd.Function):
    """The value of `outputs`; both `outputs` and `through` get its gradient."""

    @staticmethod
    def forward(ctx, outputs, through):
        ctx.mark_dirty(outputs)  # neither a copy nor a view: in-place activations may follow
        return outputs

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient


@contextlib.contextmanager
def backward_pruned(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> Iterator[nn.Module]:
    """Let gradients pass each masked layer as if its weights were pruned; outputs are unchanged.

    What changes is the gradient of a layer's input: W'dy with W' = mask * W instead of W (Wang et al. 2022). Run the
    forward pass inside the `with` block; backward may come later. It costs a second forward pass of each masked layer.

    Args:
        model: Any model; its weights and its own masks are not touched.
        masks: As for `set_masks`, for convolution and linear layers.

    Yields:
        The model.

    Raises:
        ValueError: For masks that do not fit the model, or a layer of another type.

    Example:
        >>> model = torch.nn.Linear(3, 2, bias=False)
        >>> masks = {"weight": torch.tensor([[1, 0, 1], [1, 0, 0]])}
        >>> inputs = torch.ones(1, 3, requires_grad=True)
        >>> with pu.backward_pruned(model, masks):
        ...     model(inputs).sum().backward()
        >>> torch.equal(inputs.grad, (model.weight * masks["weight"]).sum(0, keepdim=True))
        True
    """
    target = Target.of(model, strict=False)
    masks = check_masks(model, masks)
    for name in masks:
        layer = target.module(name)
        uncalled = isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)  # by nn.MultiheadAttention
        if uncalled or not isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)):
            raise ValueError(f"{name} is not of a convolution or linear layer that is called: leave it out")
    masks = {id(target.prunable[name]): mask for name, mask in masks.items()}  # a shared weight is in several layers
    layers = [module for module in target.modules.values() if id(module._parameters.get("weight")) in masks]
    before = [module.__dict__.get("forward") for module in layers]
    try:
        for module in layers:
            module.forward = _pruned_forward(module, module.forward, masks[id(module.weight)])
        yield model
    finally:
        for module, forward in zip(layers, before):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


def _pruned_forward(module, forward, mask) -> Callable:
    """Return a layer's forward whose outputs come from the whole weight, and their gradient from the masked one."""

    def pruned_forward(input, *args, **kwargs):
        if not (torch.is_grad_enabled() and input.requires_grad):
            return forward(input, *args, **kwargs)
        outputs = forward(input.detach(), *args, **kwargs)  # the gradients of weight and bias come from here
        parameters = dict(module._parameters)
        try:  # and that of the input from here
            module._parameters.update(weight=module.weight.detach() * mask, bias=None)
            through = forward(input, *args, **kwargs)
        finally:
            module._parameters.update(parameters)
        return _Outputs.apply(outputs, through)

    return pruned_forward
