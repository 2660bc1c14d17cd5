"""Masks that hold: one per parameter, for as long as the parameter lives.

What is true of every mask, whatever a program does with its models (tests/test_masks_in_any_order.py tries):

1. *One parameter, one mask.* The mask belongs to the parameter object, not to a name, a module or an `id`. All layers,
   models and optimizers that share the parameter share its mask.
2. *Lifetime.* The mask stays while the parameter lives, until every module that holds it has been made permanent.
3. *Exact zeros.* Pruned weights are +0.0 (never -0.0, never NaN) after every call that sets masks, after every step of
   a torch optimizer and after `load_state_dict`, whatever the gradient was. So is what the optimizer keeps about them.
4. *Gradients.* After every backward pass, `.grad` is zero at pruned weights, unless `dense_gradients` is on.
5. *Copies.* `copy.deepcopy` and pickle give the copied parameter a copy of the mask. After that the two are strangers.
6. *Nobody else.* Only the parameters that a call names are written to, whatever models and optimizers are alive.
7. *Replaced parameters.* If a module gets another parameter of the same shape, the mask is given to it at the next call
   of this package. If nothing is there that the mask fits (another shape, a tensor on the meta device, sparse, sharded
   or quantized, no parameter at all), that call raises a ValueError and changes nothing.
8. *An ordinary model.* Class, parameters and `state_dict` keys are those of the unpruned model. When the masks are
   gone, nothing is left behind.

A parameter finds its mask in `MASKS`, which does not keep the parameter alive. Modules hold claims on masks; to copy a
module is to copy its claims, and with them the masks. Three hooks keep the zeros: after a gradient has been
accumulated, around every optimizer step, and after `load_state_dict`.
"""

import functools
import operator
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdRef, WeakTensorKeyDictionary

from ._checks import callers_level
from ._torch import INTEGERS, is_plain, unmaskable, zero_pruned

Modules = Mapping[str, nn.Module]  # dict(model.named_modules())
Tensors = Mapping[str, torch.Tensor]

MASKS = WeakTensorKeyDictionary()  # parameter -> Mask
DENSE = WeakTensorKeyDictionary()  # parameters whose gradients are not masked
_N_CHANGES = [0]  # how often a mask has come, gone or changed
_CLAIMS, _HOOK = "_pruneutils_masks", "_pruneutils_hook"  # the attributes that a module with masks has in addition

# --- The mask of a parameter -----------------------------------------------------------------------------------------


class Mask:
    """What is kept of one parameter."""

    def __init__(self, keep: torch.Tensor, original: torch.Tensor | None = None):
        self._keep = self.always_kept = keep
        self.keep = keep
        self.original = original  # the weights that `restore` brings back
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
        if keep.shape != self._keep.shape:  # the parameter has another shape now
            self.always_kept, self.original = keep, None
        elif keep is not self.always_kept:  # what has ever been pruned, for optimizers that are seen later
            always = self.always_kept.to(keep.device) & keep
            self.always_kept = keep if torch.equal(always, keep) else always
        self._keep, self._factors = keep, {}
        _N_CHANGES[0] += 1

    def misfit(self, parameter: torch.Tensor | None) -> str:
        """Say why this cannot be the mask of what is in its parameter's place, and the way out; "" if it can."""
        if parameter is None:
            return "a mask and no parameter: a parametrization, flattening or del has taken it away; undo that"
        if why := unmaskable(parameter):
            return f"a mask and {why}"
        given, own = tuple(parameter.shape), tuple(self.keep.shape)
        return "" if given == own else f"shape {given}, and a mask of shape {own}; set another by pu.set_masks"

    def follow(self, parameter: nn.Parameter) -> None:
        """Move to the device of a parameter that fits."""
        if parameter.device != self.keep.device and not self.misfit(parameter):
            self.keep = self.keep.to(parameter.device)

    def apply(self, parameter: nn.Parameter) -> None:
        """Set what is pruned to +0.0, and its gradient too, if the parameter fits."""
        if not self.misfit(parameter):
            self.follow(parameter)
            zero_pruned(parameter, self.keep)
            self.mask_gradient(parameter)

    def mask_gradient(self, parameter: nn.Parameter) -> None:
        """Zero the gradient of what is pruned: the hook that torch calls when a gradient has been accumulated."""
        gradient = parameter.grad
        if gradient is None or gradient.layout != torch.strided or parameter in DENSE:
            return
        if gradient.shape != self.keep.shape:  # an error inside of backward would leave half of the gradients
            shapes = f"{tuple(gradient.shape)} has a mask of shape {tuple(self.keep.shape)}"
            warnings.warn(f"a parameter of shape {shapes}, so nothing holds it; see pu.check(model)", stacklevel=2)
            return
        self.masked_a_gradient = True
        if gradient.requires_grad or gradient.__class__ is not torch.Tensor:  # of backward(create_graph=True)
            parameter.grad = gradient.masked_fill(~self.keep.to(gradient.device), 0)
        else:
            self.zero(gradient)

    def zero(self, tensor: torch.Tensor) -> None:
        """Set the entries of a gradient or of an optimizer's state that the mask prunes to +0.0."""
        factor = self.factor(tensor)
        if factor is not None:
            tensor.data.view(factor.dtype).mul_(factor)

    def factor(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the mask as integers as wide as elements of `tensor`, whose bits times 0 are +0.0; None if useless."""
        key, width = (tensor.dtype, tensor.device, tensor.stride()), tensor.element_size()
        if key not in self._factors:
            expanded = any(n > 1 and stride == 0 for n, stride in zip(tensor.shape, tensor.stride()))
            useful = width in INTEGERS and not expanded  # what is expanded cannot be written to one by one
            factor = torch.empty_like(tensor.data.view(INTEGERS[width])).copy_(self.keep) if useful else None
            self._factors[key] = factor
        return self._factors[key]


def mask_of(parameter: nn.Parameter) -> Mask | None:
    """Return the mask of a parameter, None if it has none."""
    return MASKS.get(parameter)


def _put_in_force(parameter, mask) -> Mask:
    """Make this the mask of a parameter that has none."""
    install_hooks()
    MASKS[parameter] = mask
    _N_CHANGES[0] += 1
    trained = parameter.requires_grad
    parameter.requires_grad_(True)  # a hook can be registered only then; it stays when the parameter is frozen
    mask.gradient_hook = parameter.register_post_accumulate_grad_hook(mask.mask_gradient)
    parameter.requires_grad_(trained)
    return mask


def gradients_masked(parameters: Iterable[nn.Parameter]) -> bool:
    """Tell whether a backward pass has masked the gradient of any of these parameters since they have their masks."""
    return any(mask is not None and mask.masked_a_gradient for mask in map(MASKS.get, parameters))


# --- Which module holds which mask: claims follow copies, loaded weights and replaced parameters ---------------------


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
        _put_in_force(parameter, mask)
    return Claim(parameter, mask)


def attach(modules: Modules, masks: Tensors, originals: Mapping[str, torch.Tensor] = {}) -> None:
    """Give the named parameters these bool masks, unchecked and not copied, and what `restore` brings back."""
    if masks and torch.__future__.get_swap_module_params_on_conversion():  # not of what has a weak reference
        way = "masks need torch.__future__.set_swap_module_params_on_conversion(False)"
        raise ValueError(f"{next(iter(masks))}: {way}")
    settle(modules, strict=False)
    attached = []
    for name, keep in masks.items():
        layer, _, attribute = name.rpartition(".")
        parameter = modules[layer]._parameters[attribute]
        mask = MASKS.get(parameter) or _put_in_force(parameter, Mask(keep))
        if mask.keep is not keep:
            mask.keep = keep
        if mask.original is None:
            mask.original = originals.get(name)
        mask.apply(parameter)
        attached.append(parameter)
    settle(modules, strict=False)  # all modules that share these parameters claim their masks
    _clear_states(attached)


def settle(modules: Modules, strict: bool = True) -> None:
    """Let the modules hold the masks of their present parameters; ValueError (`strict`) where one does not fit."""
    for name, parameter, mask in held(modules) if strict else ():
        if what := mask.misfit(parameter):
            raise ValueError(f"{name} has {what}, or give up the mask by pu.make_permanent(model)")
    for module in modules.values():
        _settle_module(module)


def held(modules: Modules) -> Iterator[tuple[str, nn.Parameter | None, Mask]]:
    """Yield (name, parameter, mask) of what has a mask, and of what stands now, if anything, where a mask was held."""
    for layer, module in modules.items():
        claims, parameters = module.__dict__.get(_CLAIMS, {}), dict(module._parameters.items())
        for attribute in {**claims, **parameters}:
            parameter = parameters.get(attribute)
            mask = None if parameter is None else MASKS.get(parameter)
            mask = claims[attribute].mask if mask is None and attribute in claims else mask
            if mask is not None:
                yield joined(layer, attribute), parameter, mask


def _settle_module(module):
    claims = module.__dict__.get(_CLAIMS, {})
    for attribute, parameter, mask in held({"": module}):
        if parameter is not None and parameter not in MASKS and not mask.misfit(parameter):
            mask = _put_in_force(parameter, Mask(mask.keep, mask.original))
            mask.apply(parameter)
            _clear_states([parameter])
        if parameter is None or parameter not in MASKS:
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
    for _, parameter, mask in held({"": module}):
        mask.apply(parameter)


def let_go(modules: Modules, parameters: Iterable[nn.Parameter] | None = None) -> list[str]:
    """Take back the modules' claims (on `parameters`); warn of what others hold masked still, and return its names."""
    settle(modules, strict=False)
    chosen, released = None if parameters is None else {id(p) for p in parameters}, {}
    for layer, module in modules.items():
        claims = module.__dict__.get(_CLAIMS, {})
        for attribute in list(claims):
            if chosen is None or id(module._parameters.get(attribute)) in chosen:
                claim = released[joined(layer, attribute)] = claims.pop(attribute)
                claim.mask.claims.discard(claim)
        if not claims and _HOOK in module.__dict__:
            module.__dict__.pop(_HOOK).remove()
            del module.__dict__[_CLAIMS]
    for claim in released.values():
        parameter, mask = claim.parameter(), claim.mask
        if not mask.claims and parameter is not None and MASKS.get(parameter) is mask:
            del MASKS[parameter]
            _N_CHANGES[0] += 1
            if mask.gradient_hook is not None:
                mask.gradient_hook.remove()
    if shared := [name for name, claim in released.items() if claim.mask.claims]:
        message = "shared with a pruned model outside of this one, and masked until that one is made permanent too"
        warnings.warn(f"{', '.join(shared)}: {message}", stacklevel=callers_level())
    return shared


def joined(layer: str, attribute: str) -> str:
    """Return the name of a module's parameter in the whole model."""
    return f"{layer}.{attribute}" if layer else attribute


# --- Around every step of every torch optimizer: pruned weights and the state about them end at +0.0 -----------------

_OPTIMIZERS = weakref.WeakSet()  # those that have taken a step since the hooks are there
_LOCK = threading.Lock()  # a WeakSet must not grow while another thread goes through it
_PLAN = "_pruneutils_plan"  # the attribute of an optimizer; torch leaves it out of copies and files
_ADAM, _TINY = (torch.optim.Adam, torch.optim.AdamW), 0x0DA24260  # the bits of 1e-30 in float32


@functools.cache
def install_hooks() -> None:
    """Watch the steps of all optimizers of the process, from now on."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


class _Plan:
    """What the steps of one optimizer have to zero: looked up again only when a mask, a parameter or state changes."""

    def __init__(self):
        self.n_changes, self.parameters = -1, []

    def refresh(self, optimizer):
        """Look up what the next call of `zero` is about."""
        parameters = _parameters(optimizer)
        if self.n_changes != _N_CHANGES[0] or not _same(parameters, self.parameters):
            self.n_changes, self.parameters, self.values = _N_CHANGES[0], parameters, None
            self.masked = [(p, mask) for p in parameters if (mask := MASKS.get(p)) is not None]
        values = [each for p, _ in self.masked for each in (p, *_state(optimizer, p).values())]
        known = self.values is not None and _same(values, self.values)
        if known and all(t.data_ptr() == start and t.stride() == stride for t, start, stride in self.memory):
            return
        self.values = values
        self.bits, self.factors, self.memory, self.moments, self.second, self.tiny = [], [], [], [], [], []
        for parameter, mask in self.masked:
            state = _state(optimizer, parameter)
            for key, tensor in [("", parameter), *state.items()]:
                if not _maskable(tensor, mask) or (factor := mask.factor(tensor)) is None:
                    continue
                # .data: autograd need not hear of zeros over zeros, and anything else the optimizer has announced
                self.bits.append(tensor.data.view(factor.dtype))
                self.factors.append(factor)
                self.memory.append((tensor, tensor.data_ptr(), tensor.stride()))
                if key == "exp_avg_sq" and type(optimizer) in _ADAM and tensor.is_cpu and tensor.dtype == torch.float32:
                    self.moments.append((state, tensor))
                    self.second.append(self.bits[-1])
                    self.tiny.append((1 - factor).mul_(_TINY))

    def zero(self):
        if self.bits:
            torch._foreach_mul_(self.bits, self.factors)


def _plan_of(optimizer) -> _Plan:
    """The plan of an optimizer; at first sight, what it knows about pruned weights from before is cleared."""
    plan = optimizer.__dict__.get(_PLAN)
    if plan is None:
        plan = optimizer.__dict__[_PLAN] = _Plan()
        with _LOCK:
            _OPTIMIZERS.add(optimizer)
        # what it knows may be older than the pruning of weights that are kept again
        masks = {p: Mask(mask.always_kept) for p in _parameters(optimizer) if (mask := MASKS.get(p))}
        _clear_state(optimizer, masks)
    return plan


def _before_step(optimizer, *_):
    """Spare Adam on a CPU the square roots of zeros, which MKL is slow at: for the step, second moments are tiny."""
    plan = _plan_of(optimizer)
    if plan.n_changes != _N_CHANGES[0] or not plan.second:
        return
    if all(state.get("exp_avg_sq") is moment for state, moment in plan.moments):
        torch._foreach_add_(plan.second, plan.tiny)  # adds 0 to the bits of kept ones


def _after_step(optimizer, *_):
    """Zero the pruned weights that the optimizer updates, and what it keeps about them."""
    plan = _plan_of(optimizer)
    plan.refresh(optimizer)
    plan.zero()


def _clear_states(parameters: Sequence[nn.Parameter]) -> None:
    """Zero what the known optimizers keep about the pruned weights of these parameters, and of no others."""
    with _LOCK:
        optimizers = list(_OPTIMIZERS)
    for optimizer in optimizers:
        _clear_state(optimizer, {parameter: MASKS[parameter] for parameter in parameters})


def _clear_state(optimizer, masks):
    for parameter, mask in masks.items():
        for value in _state(optimizer, parameter).values():
            if _maskable(value, mask):
                mask.zero(value)
    if isinstance(optimizer, torch.optim.LBFGS) and any(p in masks for p in optimizer._params):
        optimizer.state.clear()  # its directions lead through what is pruned now; the next step begins anew


def _parameters(optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _same(one: list, other: list) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _state(optimizer, parameter) -> Mapping:
    """What the optimizer keeps about a parameter; some keep it in other forms, which are not ours to change."""
    state = optimizer.state.get(parameter)
    return state if isinstance(state, Mapping) else {}


def _maskable(value, mask) -> bool:
    """Whether this is a number for every weight."""
    return isinstance(value, torch.Tensor) and is_plain(value) and value.shape == mask.keep.shape
