"""Which module holds which mask: claims follow copies, loaded weights and replaced parameters."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.utils.weak import WeakIdRef

from .mask import MASKS, Mask, drop, put_in_force
from .optimizers import clear_state

_CLAIMS, _HOOK = "_pruneutils_masks", "_pruneutils_hook"  # the attributes that a module with masks has in addition


class Claim:
    """A module holds the mask of one of its parameters: deepcopy and pickle carry parameter and mask along."""

    def __init__(self, parameter: torch.Tensor, mask: Mask):
        self.parameter, self.mask = WeakIdRef(parameter), mask
        mask.claims.add(self)

    def __reduce__(self):
        return _claim_of_a_copy, (self.parameter(), self.mask)


def _claim_of_a_copy(parameter, mask):
    if parameter is None:  # replaced since: the next call gives the mask to the one that came
        parameter = torch.empty(0)
    elif parameter not in MASKS:
        put_in_force(parameter, mask)
    return Claim(parameter, mask)


def attach(
    model: nn.Module, masks: Mapping[str, torch.Tensor], originals: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Give the named parameters these bool masks, unchecked and not copied, and what `restore` brings back."""
    settle(model, strict=False)
    attached = []
    for name, keep in masks.items():
        layer, _, attribute = name.rpartition(".")
        parameter = getattr(model.get_submodule(layer), attribute)
        mask = MASKS.get(parameter)
        if mask is None:
            mask = put_in_force(parameter, Mask(keep))
        if mask.keep is not keep:
            mask.keep = keep
        if mask.original is None:
            mask.original = (originals or {}).get(name)
        mask.apply(parameter)
        attached.append(parameter)
    settle(model, strict=False)  # all modules that share these parameters claim their masks
    clear_state(attached)


def settle(model: nn.Module, strict: bool = True) -> None:
    """Let the modules of `model` hold the masks of the parameters that they have now.

    Raises ValueError, unless `strict` is off, where a masked parameter was replaced by one of another shape.
    """
    modules = [(layer, module) for layer, module in model.named_modules() if module._parameters]
    for layer, module in modules if strict else ():
        for attribute, parameter, mask in _replaced(module):
            if parameter.shape != mask.keep.shape:
                name = _joined(layer, attribute)
                raise ValueError(
                    f"{name} was replaced by a parameter of shape {tuple(parameter.shape)}, while its mask has shape "
                    f"{tuple(mask.keep.shape)}; give it a new mask by pu.set_masks(model, {{{name!r}: mask}}), or "
                    "remove all masks by pu.make_permanent(model)"
                )
    for _, module in modules:
        _settle_module(module)


def _replaced(module) -> Iterator[tuple[str, nn.Parameter, Mask]]:
    """Parameters without a mask that stand where a masked one stood, and its mask."""
    for attribute, claim in module.__dict__.get(_CLAIMS, {}).items():
        parameter = module._parameters.get(attribute)
        if parameter is not None and parameter not in MASKS:
            yield attribute, parameter, claim.mask


def replaced(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
    """Yield (name, parameter, mask) of parameters without a mask that stand where one with this mask stood."""
    for layer, module in model.named_modules():
        for attribute, parameter, mask in _replaced(module):
            yield _joined(layer, attribute), parameter, mask.keep


def _settle_module(module):
    for _, parameter, old in _replaced(module):
        if parameter.shape == old.keep.shape:
            put_in_force(parameter, Mask(old.keep, old.original)).apply(parameter)
            clear_state([parameter])
    claims = module.__dict__.get(_CLAIMS, {})
    for attribute, parameter in module._parameters.items():
        mask = None if parameter is None else MASKS.get(parameter)
        if mask is None:
            continue
        mask.follow(parameter)
        if not claims:
            module.__dict__[_CLAIMS] = claims
            module.__dict__[_HOOK] = module.register_load_state_dict_post_hook(_after_loading)
        if attribute not in claims or claims[attribute].mask is not mask:
            claims[attribute] = Claim(parameter, mask)


def _after_loading(module, _incompatible_keys):
    """After load_state_dict: what is pruned stays pruned, also where `assign=True` has put new parameters in."""
    _settle_module(module)
    for attribute in module.__dict__.get(_CLAIMS, {}):
        parameter = module._parameters.get(attribute)
        mask = None if parameter is None else MASKS.get(parameter)
        if mask is not None:
            mask.apply(parameter)


def let_go(model: nn.Module, parameters: Iterable[nn.Parameter] | None = None) -> list[str]:
    """Take back the claims of the modules of `model`; with `parameters`, only those on these.

    A mask that no module claims any more is gone. Returns the names of parameters that stay masked, since a module
    outside of `model` claims them.
    """
    settle(model, strict=False)
    chosen, released = None if parameters is None else {id(p) for p in parameters}, {}
    for layer, module in model.named_modules():
        claims = module.__dict__.get(_CLAIMS, {})
        for attribute in list(claims):
            if chosen is None or id(module._parameters.get(attribute)) in chosen:
                claim = released[_joined(layer, attribute)] = claims.pop(attribute)
                claim.mask.claims.discard(claim)
        if not claims and _HOOK in module.__dict__:
            module.__dict__.pop(_HOOK).remove()
            del module.__dict__[_CLAIMS]
    for claim in released.values():
        parameter = claim.parameter()
        if not claim.mask.claims and parameter is not None and MASKS.get(parameter) is claim.mask:
            drop(parameter, claim.mask)
    return [name for name, claim in released.items() if claim.mask.claims]


def claimed_elsewhere(model: nn.Module, mask: Mask) -> bool:
    """Tell whether a module that is not part of `model` holds the mask."""
    mine = {claim for module in model.modules() for claim in module.__dict__.get(_CLAIMS, {}).values()}
    return not mine.issuperset(mask.claims)


def _joined(layer, attribute) -> str:
    return f"{layer}.{attribute}" if layer else attribute
