"""Masks that other libraries have left in a model become masks of this one."""

from collections import Counter

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from ._prunable import prunable_names
from .model_utils import Masks, get_masks, set_masks


def take_over(model: nn.Module) -> Masks:
    """Turn what torch.nn.utils.prune has pruned into masks of this package, in place.

    Its `weight_orig` and `weight_mask` become an ordinary `weight` with a mask. The parameter stays the same object, so
    that optimizers and `load_state_dict` of the unpruned model go on working.

    Args:
        model: A model with layers that torch.nn.utils.prune has pruned, by whatever method.

    Returns:
        All masks of the model, {parameter name: bool tensor}, True = kept.

    Raises:
        ValueError: If torch.nn.utils.prune has pruned nothing here, or parameters that are not prunable, such as
            biases, which `prunable` can change. Nothing is changed then.

    Example:
        >>> layer = torch.nn.Linear(4, 2)
        >>> _ = torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
        >>> pu.take_over(layer)
        Masks(1 weights, 4 of 8 kept, sparsity 0.5000)
        >>> sorted(layer.state_dict())
        ['bias', 'weight']
    """
    found = {
        f"{layer}.{hook._tensor_name}" if layer else hook._tensor_name: (module, hook._tensor_name)
        for layer, module in model.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, torch_prune.BasePruningMethod)
    }
    if not found:
        raise ValueError(f"torch.nn.utils.prune has pruned nothing in {type(model).__name__}")
    masks = {name: getattr(module, f"{attribute}_mask") for name, (module, attribute) in found.items()}
    _check(model, found, masks)
    for module, attribute in found.values():
        torch_prune.remove(module, attribute)
    set_masks(model, masks)
    return get_masks(model)


def _check(model, found, masks) -> None:
    """Everything that is wrong raises here, before anything is changed."""
    prunable = prunable_names(model)
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, (module, attribute) in found.items():
        if name not in prunable:
            kind = type(module).__name__
            raise ValueError(
                f"{name} is pruned by torch.nn.utils.prune, and {attribute} of {kind} is not prunable here; "
                "pu.prunable names what is, or make it permanent by torch.nn.utils.prune.remove"
            )
        if owners[id(getattr(module, f"{attribute}_orig"))] > 1:
            raise ValueError(f"{name} is shared with another layer, which would be pruned too; untie the two first")
        if not torch.equal(masks[name].bool().to(masks[name]), masks[name]):
            raise ValueError(f"{name}: its mask holds numbers other than 0 and 1")
