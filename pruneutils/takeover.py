"""Masks that other libraries have left in a model become masks of this one."""

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from .masks import joined
from .model_utils import Masks, get_masks, set_masks
from .target import find


def take_over(model: nn.Module) -> Masks:
    """Turn what torch.nn.utils.prune has pruned into masks of this package, in place.

    The parameter stays the same object, an ordinary `weight`; other layers that share it are pruned too.

    Args:
        model: A model with layers that torch.nn.utils.prune has pruned, by whatever method.

    Returns:
        All masks of the model, {parameter name: bool tensor}, True = kept.

    Raises:
        ValueError: If it has pruned nothing here, or parameters that are not prunable. Nothing is changed then.

    Example:
        >>> layer = torch.nn.Linear(4, 2)
        >>> _ = torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
        >>> pu.takeover.take_over(layer)
        Masks(1 weights, 4 of 8 kept, sparsity 0.5000)
    """
    modules = dict(model.named_modules())
    found = {
        joined(layer, hook._tensor_name): (module, hook._tensor_name)
        for layer, module in modules.items()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, torch_prune.BasePruningMethod)
    }
    if not found:
        raise ValueError(f"torch.nn.utils.prune has pruned nothing in {type(model).__name__}")
    masks = {name: getattr(module, f"{attribute}_mask") for name, (module, attribute) in found.items()}
    prunable = find(modules)
    for name, (module, _) in found.items():
        if name not in prunable:
            raise ValueError(f"{name} of {type(module).__name__} is not prunable here; pu.prunable makes it so")
        if not torch.equal(masks[name].bool().to(masks[name]), masks[name]):
            raise ValueError(f"{name}: its mask holds numbers other than 0 and 1")
    for module, attribute in found.values():
        torch_prune.remove(module, attribute)
    set_masks(model, masks)
    return get_masks(model)
