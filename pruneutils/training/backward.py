"""Backward-only pruning: outputs stay as they are, and gradients flow back as if the weights were pruned."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from .._prunable import module_of
from ..model_utils import check_masks, layer_name, prunable_weights


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

    Inside the `with` block the outputs are the same bit for bit, and so is every layer's weight and bias gradient for
    the same gradient at its output. What changes is the gradient that a layer hands on to its input: W'dy with W' =
    mask * W instead of W. Run the forward pass inside; backward may come later. It costs a second forward pass of each
    masked layer that hands a gradient on. On exit, also by an exception, the model is as it was.

    Args:
        model: Any model; its weights and its own masks are not touched.
        masks: {parameter name: bool or 0/1 tensor of the weight's shape}, True = kept, for convolution (transposed
            too) and linear layers. For a fresh random mask in every iteration enter the block anew each time.

    Yields:
        The model.

    Raises:
        ValueError: For an unknown name, another shape, entries other than 0 and 1, or a weight that
            nn.MultiheadAttention uses without calling the layer; nothing is changed then.

    Example:
        >>> model = torch.nn.Linear(3, 2, bias=False)
        >>> masks = {"weight": torch.tensor([[1, 0, 1], [1, 0, 0]])}
        >>> inputs = torch.ones(1, 3, requires_grad=True)
        >>> with pu.backward_pruned(model, masks):
        ...     outputs = model(inputs)
        >>> torch.equal(outputs, model(inputs))
        True
        >>> outputs.sum().backward()
        >>> torch.equal(inputs.grad, (model.weight * masks["weight"]).sum(0, keepdim=True))
        True

    Wang et al. 2022.
    """
    masks = _checked(model, masks)
    layers = [module for module in model.modules() if id(module._parameters.get("weight")) in masks]
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


def _checked(model, masks) -> dict[int, torch.Tensor]:
    """Return {id of the weight: its bool mask on its device}; a shared weight is masked in all of its layers."""
    weights, masks = prunable_weights(model), check_masks(model, masks)
    uncalled = {id(m.out_proj.weight) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for name in masks:
        if id(weights[name]) in uncalled:
            raise ValueError(f"nn.MultiheadAttention never calls {layer_name(name)}: leave {name} out of the masks")
    for name in masks:
        if not isinstance(module_of(model, name), (nn.modules.conv._ConvNd, nn.Linear)):
            raise ValueError(f"{name} is not of a convolution or linear layer: leave it out of the masks")
    return {id(weights[name]): mask for name, mask in masks.items()}
