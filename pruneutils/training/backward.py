"""Backward-only pruning: the model computes what it always did, and gradients flow back through pruned weights."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ..model_utils import check_masks, layer_name, prunable_weights


class _Outputs(torch.autograd.Function):
    """The value of `outputs`, with the gradient handed to both `outputs` and `through`."""

    @staticmethod
    def forward(ctx, outputs, through):
        ctx.mark_dirty(outputs)  # neither a copy nor a view: in-place activations may follow
        return outputs

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient


@contextlib.contextmanager
def backward_pruned(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> Iterator[nn.Module]:
    """Inside, gradients pass each masked layer of `model` as if its weights were pruned; all else is unchanged.

    `masks` {parameter name: bool or 0/1 tensor of the weight's shape, True = kept}, of convolution (transposed too) and
    linear layers. Outputs are the same bit for bit, and so is every layer's weight and bias gradient for the same
    gradient at its output; the gradient handed on to its input is W'dy with W' = mask * W instead of W. Run the
    forward pass inside; backward may come later. It costs a second forward pass of each masked layer that hands a
    gradient on. For a fresh random mask in every iteration (Wang et al. 2022) enter anew each time.

    Raises ValueError for an unknown name, another shape, entries other than 0 and 1, and a weight that
    nn.MultiheadAttention uses without calling the layer; nothing is changed then. On exit, also by an exception, the
    model is as it was.
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


def _pruned_forward(module, forward, mask):
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
    """{id of the weight: its bool mask on its device}; a weight that several layers share is masked in all of them."""
    weights, masks = prunable_weights(model), check_masks(model, masks)
    uncalled = {id(m.out_proj.weight) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for name in masks:
        if id(weights[name]) in uncalled:
            raise ValueError(f"nn.MultiheadAttention never calls {layer_name(name)}: leave {name} out of the masks")
    return {id(weights[name]): mask for name, mask in masks.items()}
