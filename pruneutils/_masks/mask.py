"""The mask of a parameter, and where a parameter finds it."""

import weakref
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from .._torch import INTEGERS, zero_pruned

# A reload of this module goes on with what it finds.
MASKS = globals().get("MASKS", WeakTensorKeyDictionary())  # parameter -> Mask
DENSE = globals().get("DENSE", WeakTensorKeyDictionary())  # parameters whose gradients are not masked
CHANGES = globals().get("CHANGES", [0])  # how often a mask has come, gone or changed


class Mask:
    """What is kept of one parameter."""

    def __init__(self, keep: torch.Tensor, original: torch.Tensor | None = None):
        self.keep = keep
        self.original = original  # the weights that `restore` brings back
        self.dense_gradients = False
        self.masked_a_gradient = False
        self.claims = weakref.WeakSet()  # of the modules that hold this mask
        self.gradient_hook = None

    def __reduce__(self):
        return Mask, (self.keep, self.original)

    @property
    def keep(self) -> torch.Tensor:
        """A bool tensor of the parameter's shape, True = kept; replaced as a whole, never written to."""
        return self._keep

    @keep.setter
    def keep(self, keep: torch.Tensor) -> None:
        self._keep, self._factors = keep, {}
        CHANGES[0] += 1

    def follow(self, parameter: nn.Parameter) -> None:
        """Move to the parameter's device, unless that is "meta", where the mask would be lost."""
        if parameter.device != self.keep.device and not parameter.is_meta:
            self.keep = self.keep.to(parameter.device)

    def apply(self, parameter: nn.Parameter) -> None:
        """Set what is pruned to +0.0, and its gradient too."""
        self.follow(parameter)
        weight = parameter.detach()
        if weight.is_meta:
            return
        zero_pruned(weight, self.keep)
        self.mask_gradient(parameter)

    def mask_gradient(self, parameter: nn.Parameter) -> None:
        """Zero the gradient of what is pruned: the hook that torch calls when a gradient has been accumulated."""
        gradient = parameter.grad
        if self.dense_gradients or gradient is None or gradient.is_sparse:
            return
        self.masked_a_gradient = True
        if gradient.requires_grad or gradient.__class__ is not torch.Tensor:  # of backward(create_graph=True)
            parameter.grad = gradient.masked_fill(~self.keep.to(gradient.device), 0)
            return
        factor = self.factor(gradient)
        if factor is not None:
            gradient.view(factor.dtype).mul_(factor)

    def factor(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the mask as integers, 0 and 1, as wide as the elements of `tensor`; None where that is of no use.

        A number times 0 can be -0.0 or NaN, but its bits times 0 are those of +0.0.
        """
        key = tensor.dtype, tensor.device, tensor.stride()
        try:
            return self._factors[key]
        except KeyError:
            width = tensor.element_size()
            expanded = any(n > 1 and stride == 0 for n, stride in zip(tensor.shape, tensor.stride()))
            useful = width in INTEGERS and not expanded  # what is expanded cannot be written to one by one
            factor = torch.empty_like(tensor.data.view(INTEGERS[width])).copy_(self.keep) if useful else None
            self._factors[key] = factor
            return factor


def mask_of(parameter: nn.Parameter) -> Mask | None:
    """Return the mask of a parameter, None if it has none."""
    return MASKS.get(parameter)


def put_in_force(parameter: nn.Parameter, mask: Mask) -> Mask:
    """Make this the mask of a parameter that has none."""
    MASKS[parameter] = mask
    CHANGES[0] += 1
    mask.dense_gradients = parameter in DENSE
    if parameter.dtype.is_floating_point or parameter.dtype.is_complex:
        frozen = not parameter.requires_grad
        parameter.requires_grad_(True)  # a hook can be registered only then; it stays when the parameter is frozen
        mask.gradient_hook = parameter.register_post_accumulate_grad_hook(mask.mask_gradient)
        if frozen:
            parameter.requires_grad_(False)
    return mask


def drop(parameter: nn.Parameter, mask: Mask) -> None:
    """Take a parameter's mask away."""
    del MASKS[parameter]
    CHANGES[0] += 1
    if mask.gradient_hook is not None:
        mask.gradient_hook.remove()


def set_dense_gradients(parameters: Iterable[nn.Parameter], dense: bool) -> list[nn.Parameter]:
    """Leave the gradients of these parameters dense, whether they have a mask or get one later, or mask them again.

    Returns the parameters for which this has changed something.
    """
    changed = [parameter for parameter in parameters if (parameter in DENSE) != dense]
    for parameter in changed:
        if dense:
            DENSE[parameter] = True
        else:
            del DENSE[parameter]
        mask = MASKS.get(parameter)
        if mask is not None:
            mask.dense_gradients = dense
    return changed


def gradients_masked(parameters: Iterable[nn.Parameter]) -> bool:
    """Tell whether a backward pass has masked the gradient of any of these parameters since they have their masks."""
    return any(mask is not None and mask.masked_a_gradient for mask in map(MASKS.get, parameters))
