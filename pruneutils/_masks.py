"""Masks that hold: one per parameter, for as long as the parameter lives.

What is true of every mask, whatever a program does with its models (tests/test_masks.py tries it in random order):

1. *One parameter, one mask.* The mask belongs to the parameter object, not to a name, a module or an `id`. All layers,
   models and optimizers that share the parameter share its mask.
2. *Lifetime.* The mask stays while the parameter lives, until every module that holds it has been made permanent. The
   death of one of several models that share the parameter changes nothing.
3. *Exact zeros.* Pruned weights are +0.0 (never -0.0, never NaN) after every call of this package, after every step of
   a torch optimizer and after `load_state_dict`, whatever the gradient was. So is what the optimizer keeps about them.
4. *Gradients of a pruned model.* After every backward pass, `.grad` is zero at pruned weights, so that closures, line
   searches and gradient clipping see the pruned model. `dense_gradients` switches this off.
5. *Copies.* `copy.deepcopy` and pickle give the copied parameter a copy of the mask. After that the two are strangers.
6. *Nobody else.* Only the parameters that a call names are written to, whatever models and optimizers are alive.
7. *Replaced parameters.* If a module gets another parameter of the same shape, the mask is given to it at the next call
   of this package. If the shape differs, that call raises a ValueError and changes nothing.
8. *An ordinary model.* Class, parameters and `state_dict` keys are those of the unpruned model. When the masks are
   gone, nothing is left behind.

Parameters find their masks in `_MASKS`, which does not keep them alive. Modules hold claims on masks: copying a module
copies its claims, and with them the masks. The zeros are kept by three hooks: after every optimizer step, after
`load_state_dict`, and after a gradient has been accumulated.
"""

import operator
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdRef, WeakTensorKeyDictionary

# A reload of this module keeps what it finds.
_MASKS = globals().get("_MASKS", WeakTensorKeyDictionary())  # parameter -> Mask
_DENSE = globals().get("_DENSE", WeakTensorKeyDictionary())  # parameters whose gradients are not masked
_OPTIMIZERS = globals().get("_OPTIMIZERS", weakref.WeakSet())  # all that have taken a step: these may hold state
_CHANGES = globals().get("_CHANGES", [0])  # how often a mask has come, gone or changed
_LOCK = threading.Lock()  # a WeakSet must not grow while another thread goes through it

_CLAIMS, _HOOK = "_pruneutils_masks", "_pruneutils_hook"  # what a module with masks has in addition
_ADAM = (torch.optim.Adam, torch.optim.AdamW)
_PLAIN = (torch.Tensor, nn.Parameter)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes an element


class Mask:
    """What is kept of one parameter."""

    def __init__(self, keep: torch.Tensor, original: torch.Tensor | None = None):
        self.keep = keep  # bool, True = kept; replaced as a whole, never written to
        self.original = original  # the weights that `restore` brings back
        self.dense_gradients = False
        self.masked_a_gradient = False
        self.claims = weakref.WeakSet()
        self.handle = None  # of the gradient hook

    def __reduce__(self):
        return Mask, (self.keep, self.original)

    @property
    def keep(self) -> torch.Tensor:
        """A bool tensor of the parameter's shape, True = kept."""
        return self._keep

    @keep.setter
    def keep(self, keep: torch.Tensor):
        self._keep, self._factors = keep, {}
        _CHANGES[0] += 1

    def follow(self, parameter: nn.Parameter):
        """Move to the parameter's device, unless that is "meta", where the mask would be lost."""
        if parameter.device != self.keep.device and not parameter.is_meta:
            self.keep = self.keep.to(parameter.device)

    def apply(self, parameter: nn.Parameter):
        """Set what is pruned to +0.0, and its gradient too."""
        self.follow(parameter)
        weight = parameter.detach()
        if weight.is_meta:
            return
        if weight.device.type == "cpu" and weight.__class__ in _PLAIN and weight.element_size() in _BITS:
            bits = weight.view(_BITS[weight.element_size()]).numpy()
            np.multiply(bits, self.keep.numpy(), out=bits)  # four times faster than masked_fill_, and needs no memory
            torch.autograd.graph.increment_version(weight)  # which numpy does not do
        else:
            weight.masked_fill_(~self.keep, 0)
        self.mask_gradient(parameter)

    def factor(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The mask as integers, 0 and 1, as wide as the elements of `tensor`; None where it is of no use.

        A number times 0 can be -0.0 or NaN, but its bits times 0 are those of +0.0.
        """
        key = tensor.dtype, tensor.device, tensor.stride()
        try:
            return self._factors[key]
        except KeyError:
            width = tensor.element_size()
            expanded = any(n > 1 and stride == 0 for n, stride in zip(tensor.shape, tensor.stride()))
            known = not expanded and width in _BITS
            factor = torch.empty_like(tensor.data.view(_BITS[width])).copy_(self.keep) if known else None
            self._factors[key] = factor
            return factor

    def gather(self, tensor: torch.Tensor, bits: list, factors: list):
        """Append the bits of `tensor` and what to multiply them by.

        `.data`, because autograd need not hear of it: where zeros are written over zeros nothing changes, and anything
        else the optimizer has announced.
        """
        factor = self.factor(tensor)
        if factor is not None:
            bits.append(tensor.data.view(factor.dtype))
            factors.append(factor)

    def tiny(self, tensor: torch.Tensor) -> torch.Tensor:
        """1e-30 where the mask prunes, 0 elsewhere."""
        key = "tiny", tensor.dtype, tensor.device, tensor.stride()
        if key not in self._factors:
            self._factors[key] = torch.empty_like(tensor.data).copy_(~self.keep).mul_(1e-30)
        return self._factors[key]

    def mask_gradient(self, parameter: nn.Parameter):
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


class Claim:
    """That a module holds a parameter's mask: deepcopy and pickle carry parameter and mask along."""

    def __init__(self, parameter: torch.Tensor, mask: Mask):
        self.parameter, self.mask = WeakIdRef(parameter), mask
        mask.claims.add(self)

    def __reduce__(self):
        return _claim_of_a_copy, (self.parameter(), self.mask)


def _claim_of_a_copy(parameter, mask):
    if parameter is None:  # replaced since; whoever looks at the module next gives the mask to the new one
        parameter = torch.empty(0)
    elif parameter not in _MASKS:
        _hold(parameter, mask)
    return Claim(parameter, mask)


def mask_of(parameter: nn.Parameter) -> Mask | None:
    """Return the mask of a parameter, None if it has none."""
    return _MASKS.get(parameter)


def attach(
    model: nn.Module, masks: Mapping[str, torch.Tensor], originals: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Give the named parameters these bool masks, unchecked and not copied, and what `restore` brings back."""
    settle(model, strict=False)
    attached = []
    for name, keep in masks.items():
        layer, _, attribute = name.rpartition(".")
        parameter = getattr(model.get_submodule(layer), attribute)
        mask = _MASKS.get(parameter)
        if mask is None:
            mask = _hold(parameter, Mask(keep))
        mask.keep = keep
        if mask.original is None:
            mask.original = (originals or {}).get(name)
        mask.apply(parameter)
        attached.append(parameter)
    settle(model, strict=False)  # the modules that share these parameters claim them
    _clear_state(attached)


def settle(model: nn.Module, strict: bool = True) -> None:
    """Let the modules of `model` hold the masks of the parameters that they have now.

    Raises ValueError, unless `strict` is off, where a masked parameter was replaced by one of another shape.
    """
    modules = [(layer, module) for layer, module in model.named_modules() if module._parameters]
    for layer, module in modules if strict else ():
        for attribute, parameter, claim in _outdated(module):
            name = f"{layer}.{attribute}" if layer else attribute
            if parameter.shape != claim.mask.keep.shape:
                raise ValueError(
                    f"{name} was replaced by a parameter of shape {tuple(parameter.shape)}, while its mask has shape "
                    f"{tuple(claim.mask.keep.shape)}; give it a new mask by pu.set_masks(model, {{{name!r}: mask}}), "
                    "or remove all masks by pu.make_permanent(model)"
                )
    for _, module in modules:
        _settle_module(module)


def _outdated(module) -> Iterator[tuple[str, nn.Parameter, Claim]]:
    """The parameters without a mask that stand where a masked one stood."""
    for attribute, claim in module.__dict__.get(_CLAIMS, {}).items():
        parameter = module._parameters.get(attribute)
        if parameter is not None and parameter not in _MASKS:
            yield attribute, parameter, claim


def _settle_module(module):
    for _, parameter, claim in list(_outdated(module)):
        if parameter.shape == claim.mask.keep.shape:
            mask = _hold(parameter, Mask(claim.mask.keep, claim.mask.original))
            mask.apply(parameter)
            _clear_state([parameter])
    claims = module.__dict__.get(_CLAIMS, {})
    for attribute, parameter in module._parameters.items():
        mask = None if parameter is None else _MASKS.get(parameter)
        if mask is None:
            continue
        mask.follow(parameter)
        if not claims:
            module.__dict__[_CLAIMS] = claims
            module.__dict__[_HOOK] = module.register_load_state_dict_post_hook(_after_loading)
        if attribute not in claims or claims[attribute].mask is not mask:
            claims[attribute] = Claim(parameter, mask)


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
                claim = released[f"{layer}.{attribute}" if layer else attribute] = claims.pop(attribute)
                claim.mask.claims.discard(claim)
        if not claims and _HOOK in module.__dict__:
            module.__dict__.pop(_HOOK).remove()
            del module.__dict__[_CLAIMS]
    for claim in released.values():
        parameter = claim.parameter()
        if not claim.mask.claims and parameter is not None and _MASKS.get(parameter) is claim.mask:
            del _MASKS[parameter]
            _CHANGES[0] += 1
            if claim.mask.handle is not None:
                claim.mask.handle.remove()
    return [name for name, claim in released.items() if claim.mask.claims]


def claimed_elsewhere(model: nn.Module, mask: Mask) -> bool:
    """Tell whether a module that is not part of `model` holds the mask."""
    mine = {claim for module in model.modules() for claim in module.__dict__.get(_CLAIMS, {}).values()}
    return not mine.issuperset(mask.claims)


def set_dense_gradients(parameters: Iterable[nn.Parameter], dense: bool) -> list[nn.Parameter]:
    """Leave the gradients of these parameters dense, whether they have a mask or get one later, or mask them again.

    Returns the parameters for which this has changed something.
    """
    changed = [parameter for parameter in parameters if (parameter in _DENSE) != dense]
    for parameter in changed:
        if dense:
            _DENSE[parameter] = True
        else:
            del _DENSE[parameter]
        mask = _MASKS.get(parameter)
        if mask is not None:
            mask.dense_gradients = dense
    return changed


def gradients_masked(parameters: Iterable[nn.Parameter]) -> bool:
    """Tell whether a backward pass has masked the gradient of any of these parameters since they have their masks."""
    return any(mask is not None and mask.masked_a_gradient for mask in map(_MASKS.get, parameters))


# --- Hooks -----------------------------------------------------------------------------------------------------------


def _hold(parameter: nn.Parameter, mask: Mask) -> Mask:
    """Put the mask in force."""
    _MASKS[parameter] = mask
    _CHANGES[0] += 1
    mask.dense_gradients = parameter in _DENSE
    if parameter.dtype.is_floating_point or parameter.dtype.is_complex:
        frozen = not parameter.requires_grad
        parameter.requires_grad_(True)  # a hook can be registered only then; it stays when the parameter is frozen
        mask.handle = parameter.register_post_accumulate_grad_hook(mask.mask_gradient)
        if frozen:
            parameter.requires_grad_(False)
    return mask


def _after_loading(module, _incompatible_keys):
    """After load_state_dict: what is pruned stays pruned, also where `assign=True` has put new parameters in."""
    _settle_module(module)
    for attribute in module.__dict__.get(_CLAIMS, {}):
        parameter = module._parameters.get(attribute)
        mask = None if parameter is None else _MASKS.get(parameter)
        if mask is not None:
            mask.apply(parameter)


class _Plan:
    """What is zeroed after the steps of one optimizer: kept from step to step as long as all tensors stay the same."""

    def __init__(self):
        self.changes, self.parameters = -1, []

    def __reduce__(self):  # copies begin anew
        return _Plan, ()

    def refresh(self, optimizer):
        """Look up masks and state again if a mask, a parameter or the state has changed."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self.changes != _CHANGES[0] or not _same(parameters, self.parameters):
            self.changes, self.parameters, self.seen = _CHANGES[0], parameters, None
            self.masks = [(p, mask) for p in parameters if (mask := _MASKS.get(p)) is not None]
        seen = []
        for parameter, _ in self.masks:
            seen.append(parameter)
            seen += optimizer.state.get(parameter, {}).values()
        if (
            self.seen is None
            or not _same(seen, self.seen)
            or any(tensor.data_ptr() != pointer or tensor.stride() != stride for tensor, pointer, stride in self.memory)
        ):
            self.seen, self.memory, self.bits, self.factors, self.moments, self.tiny = seen, [], [], [], [], []
            for parameter, mask in self.masks:
                for tensor in _gather(optimizer, parameter, mask, self.bits, self.factors):
                    self.memory.append((tensor, tensor.data_ptr(), tensor.stride()))
                if type(optimizer) in _ADAM:
                    moment = optimizer.state.get(parameter, {}).get("exp_avg_sq")
                    if moment is not None and moment.is_cpu and moment.__class__ is torch.Tensor:
                        self.moments.append(moment.data)
                        self.tiny.append(mask.tiny(moment))


def _same(one: list, other: list) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _before_step(optimizer, *_):
    """Spare Adam on a CPU the square roots of zeros, for which MKL takes six times as long as for other numbers.

    During the step, second moments of pruned weights are tiny instead of zero. The update stays zero, since the first
    moments are, and afterwards `_after_step` makes them zero again.
    """
    plan = optimizer.__dict__.get("_pruneutils_plan")
    if plan is not None and type(optimizer) in _ADAM:
        plan.refresh(optimizer)
        if plan.moments:
            torch._foreach_add_(plan.moments, plan.tiny)


def _after_step(optimizer, *_):
    """Zero the pruned weights that `optimizer` updates, and what it keeps about them."""
    plan = optimizer.__dict__.get("_pruneutils_plan")
    if plan is None:
        plan = optimizer.__dict__["_pruneutils_plan"] = _Plan()
        with _LOCK:
            _OPTIMIZERS.add(optimizer)
    plan.refresh(optimizer)
    if plan.bits:
        torch._foreach_mul_(plan.bits, plan.factors)


def _gather(optimizer, parameter, mask, bits, factors) -> list:
    """Gather a parameter and its state; return these tensors."""
    found = [parameter] if parameter.__class__ in _PLAIN else []
    for value in optimizer.state.get(parameter, {}).values():
        if value.__class__ in _PLAIN and value.shape == parameter.shape and value.layout == torch.strided:
            found.append(value)
    for tensor in found:
        mask.gather(tensor, bits, factors)
    return found


def _clear_state(parameters):
    """Zero what optimizers keep about the pruned weights of these parameters, and of no others."""
    with _LOCK:
        optimizers = list(_OPTIMIZERS)
    bits, factors = [], []
    for optimizer in optimizers:
        for parameter in parameters:
            if parameter in optimizer.state:
                _gather(optimizer, parameter, _MASKS[parameter], bits, factors)
        if isinstance(optimizer, torch.optim.LBFGS) and any(p is q for p in parameters for q in optimizer._params):
            optimizer.state.clear()  # its directions lead through what is pruned now; the next step begins anew
    if bits:
        torch._foreach_mul_(bits, factors)


for _handle in globals().get("_HANDLES", ()):  # of this module before it was reloaded
    _handle.remove()
_HANDLES = [register_optimizer_step_pre_hook(_before_step), register_optimizer_step_post_hook(_after_step)]
