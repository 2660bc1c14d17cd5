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
   of this package. If the shape differs, that call raises a ValueError and changes nothing.
8. *An ordinary model.* Class, parameters and `state_dict` keys are those of the unpruned model. When the masks are
   gone, nothing is left behind.

A parameter finds its mask in `MASKS`, which does not keep the parameter alive. Modules hold claims on masks; to copy a
module is to copy its claims, and with them the masks. Three hooks keep the zeros: after a gradient has been
accumulated, around every optimizer step, and after `load_state_dict`.
"""

import functools
import operator
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdRef, WeakTensorKeyDictionary

from ._torch import INTEGERS, zero_pruned

Modules = Mapping[str, nn.Module]  # dict(model.named_modules())

MASKS = WeakTensorKeyDictionary()  # parameter -> Mask
_DENSE = WeakTensorKeyDictionary()  # parameters whose gradients are not masked
_N_CHANGES = [0]  # how often a mask has come, gone or changed
_CLAIMS, _HOOK = "_pruneutils_masks", "_pruneutils_hook"  # the attributes that a module with masks has in addition

# --- The mask of a parameter -----------------------------------------------------------------------------------------


class Mask:
    """What is kept of one parameter."""

    def __init__(self, keep: torch.Tensor, original: torch.Tensor | None = None):
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
        self._keep, self._factors = keep, {}
        _N_CHANGES[0] += 1

    def follow(self, parameter: nn.Parameter) -> None:
        """Move to the parameter's device, unless that is "meta", where the mask would be lost."""
        if parameter.device != self.keep.device and not parameter.is_meta:
            self.keep = self.keep.to(parameter.device)

    def apply(self, parameter: nn.Parameter) -> None:
        """Set what is pruned to +0.0, and its gradient too."""
        self.follow(parameter)
        if not parameter.is_meta:
            zero_pruned(parameter, self.keep)
            self.mask_gradient(parameter)

    def mask_gradient(self, parameter: nn.Parameter) -> None:
        """Zero the gradient of what is pruned: the hook that torch calls when a gradient has been accumulated."""
        gradient = parameter.grad
        if gradient is None or gradient.is_sparse or parameter in _DENSE:
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


def _put_in_force(parameter, mask) -> Mask:
    """Make this the mask of a parameter that has none."""
    install_hooks()
    MASKS[parameter] = mask
    _N_CHANGES[0] += 1
    if parameter.dtype.is_floating_point or parameter.dtype.is_complex:
        trained = parameter.requires_grad
        parameter.requires_grad_(True)  # a hook can be registered only then; it stays when the parameter is frozen
        mask.gradient_hook = parameter.register_post_accumulate_grad_hook(mask.mask_gradient)
        parameter.requires_grad_(trained)
    return mask


def set_dense_gradients(parameters: Iterable[nn.Parameter], dense: bool) -> list[nn.Parameter]:
    """Leave the gradients of these parameters dense, or mask them again; return those for which this is new."""
    changed = [parameter for parameter in parameters if (parameter in _DENSE) != dense]
    for parameter in changed:
        if dense:
            _DENSE[parameter] = True
        else:
            del _DENSE[parameter]
    return changed


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


def attach(
    modules: Modules, masks: Mapping[str, torch.Tensor], originals: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Give the named parameters these bool masks, unchecked and not copied, and what `restore` brings back."""
    settle(modules, strict=False)
    attached = []
    for name, keep in masks.items():
        layer, _, attribute = name.rpartition(".")
        parameter = modules[layer]._parameters[attribute]
        mask = MASKS.get(parameter) or _put_in_force(parameter, Mask(keep))
        if mask.keep is not keep:
            mask.keep = keep
        if mask.original is None:
            mask.original = (originals or {}).get(name)
        mask.apply(parameter)
        attached.append(parameter)
    settle(modules, strict=False)  # all modules that share these parameters claim their masks
    _clear_states(attached)


def settle(modules: Modules, strict: bool = True) -> None:
    """Let the modules hold the masks of their present parameters; ValueError (`strict`) where a shape has changed."""
    for name, parameter, mask in replaced(modules) if strict else ():
        if parameter.shape != mask.keep.shape:
            shapes = f"shape {tuple(parameter.shape)}, while its mask has shape {tuple(mask.keep.shape)}"
            way = f"give it a new mask by pu.set_masks(model, {{{name!r}: mask}}), or call pu.make_permanent(model)"
            raise ValueError(f"{name} was replaced by a parameter of {shapes}; {way}")
    for module in modules.values():
        _settle_module(module)


def replaced(modules: Modules) -> Iterator[tuple[str, nn.Parameter, Mask]]:
    """Yield (name, parameter, mask) of parameters without a mask that stand where one with this mask stood."""
    for layer, module in modules.items():
        for attribute, claim in module.__dict__.get(_CLAIMS, {}).items():
            parameter = module._parameters.get(attribute)
            if parameter is not None and parameter not in MASKS:
                yield _joined(layer, attribute), parameter, claim.mask


def _settle_module(module):
    for _, parameter, old in replaced({"": module}):
        if parameter.shape == old.keep.shape:
            _put_in_force(parameter, Mask(old.keep, old.original)).apply(parameter)
            _clear_states([parameter])
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
    for parameter in module._parameters.values():
        if parameter is not None and parameter in MASKS:
            MASKS[parameter].apply(parameter)


def let_go(modules: Modules, parameters: Iterable[nn.Parameter] | None = None) -> list[str]:
    """Take back the modules' claims (on `parameters`), and return the names of what others still hold masked."""
    settle(modules, strict=False)
    chosen, released = None if parameters is None else {id(p) for p in parameters}, {}
    for layer, module in modules.items():
        claims = module.__dict__.get(_CLAIMS, {})
        for attribute in list(claims):
            if chosen is None or id(module._parameters.get(attribute)) in chosen:
                claim = released[_joined(layer, attribute)] = claims.pop(attribute)
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
    return [name for name, claim in released.items() if claim.mask.claims]


def claimed_elsewhere(modules: Modules, mask: Mask) -> bool:
    """Tell whether a module that is not among these holds the mask."""
    mine = {claim for module in modules.values() for claim in module.__dict__.get(_CLAIMS, {}).values()}
    return not mine.issuperset(mask.claims)


def _joined(layer, attribute) -> str:
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
        self.n_changes, self.parameters, self.in_a_step = -1, [], False

    def refresh(self, optimizer):
        parameters = _parameters(optimizer)
        if self.n_changes != _N_CHANGES[0] or not _same(parameters, self.parameters):
            self.n_changes, self.parameters, self.values = _N_CHANGES[0], parameters, None
            self.masked = [(p, mask) for p in parameters if (mask := MASKS.get(p)) is not None]
        values = [each for p, _ in self.masked for each in (p, *_state(optimizer, p).values())]
        known = self.values is not None and _same(values, self.values)
        if not known or any(t.data_ptr() != start or t.stride() != stride for t, start, stride in self.memory):
            self.values = values
            self._look_up(optimizer)

    def _look_up(self, optimizer):
        self.bits, self.factors, self.memory, self.moments, self.second, self.tiny = [], [], [], [], [], []
        for parameter, mask in self.masked:
            state = _state(optimizer, parameter)
            for key, tensor in [("", parameter), *state.items()]:
                if not _maskable(tensor, parameter) or (factor := mask.factor(tensor)) is None:
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
        _clear_state(optimizer, [parameter for parameter in _parameters(optimizer) if parameter in MASKS])
    return plan


def _before_step(optimizer, *_):
    """Spare Adam on a CPU the square roots of zeros, which MKL is slow at: for the step, second moments are tiny."""
    plan = _plan_of(optimizer)
    if plan.n_changes != _N_CHANGES[0] or not plan.second:
        return
    if all(state.get("exp_avg_sq") is moment for state, moment in plan.moments):
        if plan.in_a_step:  # the one before has not come to its end
            plan.zero()
        plan.in_a_step = True
        torch._foreach_add_(plan.second, plan.tiny)  # adds 0 to the bits of kept ones


def _after_step(optimizer, *_):
    """Zero the pruned weights that the optimizer updates, and what it keeps about them."""
    plan = _plan_of(optimizer)
    plan.refresh(optimizer)
    plan.zero()
    plan.in_a_step = False


def _clear_states(parameters: Sequence[nn.Parameter]) -> None:
    """Zero what the known optimizers keep about the pruned weights of these parameters, and of no others."""
    with _LOCK:
        optimizers = list(_OPTIMIZERS)
    for optimizer in optimizers:
        _clear_state(optimizer, parameters)


def _clear_state(optimizer, parameters):
    for parameter in parameters:
        for value in _state(optimizer, parameter).values():
            if _maskable(value, parameter):
                MASKS[parameter].zero(value)
    if isinstance(optimizer, torch.optim.LBFGS) and any(p is q for p in parameters for q in optimizer._params):
        optimizer.state.clear()  # its directions lead through what is pruned now; the next step begins anew


def _parameters(optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _same(one: list, other: list) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _state(optimizer, parameter) -> Mapping:
    """What the optimizer keeps about a parameter; some keep it in other forms, which are not ours to change."""
    state = optimizer.state.get(parameter)
    return state if isinstance(state, Mapping) else {}


def _maskable(value, parameter) -> bool:
    """Whether this is a number for every weight."""
    fits = isinstance(value, torch.Tensor) and value.shape == parameter.shape
    return fits and value.layout == torch.strided and not is_traceable_wrapper_subclass(value)
