"""What happens around every step of every torch optimizer: pruned weights and the state about them end at +0.0."""

import operator
import threading
import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .mask import CHANGES, MASKS, Mask

# A reload of this module goes on with what it finds.
OPTIMIZERS = globals().get("OPTIMIZERS", weakref.WeakSet())  # all that have taken a step: only these have state
_LOCK = threading.Lock()  # a WeakSet must not grow while another thread goes through it
_PLAN = "_pruneutils_plan"  # the attribute of an optimizer; torch leaves it out of copies and files
_TINY = 0x0DA24260  # the bits of 1e-30 in float32
_ADAM = (torch.optim.Adam, torch.optim.AdamW)


class Batch:
    """Tensors to be masked in place, all in one call.

    `.data`, because autograd need not hear of it: where zeros are written over zeros nothing changes, and anything else
    the optimizer has announced.
    """

    def __init__(self):
        self.bits, self.factors = [], []

    def add(self, tensor: torch.Tensor, mask: Mask) -> None:
        """Add one tensor of the mask's shape."""
        factor = mask.factor(tensor)
        if factor is not None:
            self.bits.append(tensor.data.view(factor.dtype))
            self.factors.append(factor)

    def zero(self) -> None:
        """Set what the masks prune to +0.0."""
        if self.bits:
            torch._foreach_mul_(self.bits, self.factors)


class Plan:
    """What the steps of one optimizer have to zero: looked up again only when a mask, a parameter or state changes."""

    def __init__(self):
        self.changes, self.parameters, self.in_a_step = -1, [], False

    def __reduce__(self):  # copies begin anew
        return Plan, ()

    def refresh(self, optimizer: Optimizer) -> None:
        """Look up masks and state again if anything has changed."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self.changes != CHANGES[0] or not _same(parameters, self.parameters):
            self.changes, self.parameters, self.seen = CHANGES[0], parameters, None
            self.masked = [(p, mask) for p in parameters if (mask := MASKS.get(p)) is not None]
        seen = []
        for parameter, _ in self.masked:
            seen.append(parameter)
            seen += _state(optimizer, parameter).values()
        moved = self.seen is None or not _same(seen, self.seen)
        if moved or any(t.data_ptr() != pointer or t.stride() != stride for t, pointer, stride in self.memory):
            self._look_up(optimizer)
            self.seen = seen

    def _look_up(self, optimizer):
        self.batch, self.memory, self.moments, self.second, self.tiny = Batch(), [], [], [], []
        for parameter, mask in self.masked:
            state = _state(optimizer, parameter)
            for tensor in [parameter, *state.values()]:
                if _maskable(tensor, parameter):
                    self.batch.add(tensor, mask)
                    self.memory.append((tensor, tensor.data_ptr(), tensor.stride()))
            moment = state.get("exp_avg_sq")
            if moment is not None and _takes_roots_of(moment, parameter, optimizer):
                factor = mask.factor(moment)
                if factor is not None:
                    self.moments.append((state, moment))
                    self.second.append(moment.data.view(factor.dtype))
                    self.tiny.append((1 - factor).mul_(_TINY))


def _same(one: list, other: list) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _state(optimizer, parameter) -> Mapping:
    """What the optimizer keeps about a parameter; some keep it in other forms, which are not ours to change."""
    state = optimizer.state.get(parameter)
    return state if isinstance(state, Mapping) else {}


def _maskable(value, parameter) -> bool:
    """Whether this is a number for every weight."""
    return (
        isinstance(value, torch.Tensor)
        and value.shape == parameter.shape
        and value.layout == torch.strided
        and not is_traceable_wrapper_subclass(value)
    )


def _takes_roots_of(moment, parameter, optimizer) -> bool:
    """Whether the optimizer hands this second moment to MKL; a fused one takes the roots itself, and fast."""
    return (
        type(optimizer) in _ADAM
        and not optimizer.defaults.get("fused")
        and _maskable(moment, parameter)
        and moment.is_cpu
        and moment.element_size() == 4
    )


def _before_step(optimizer, *_):
    """Spare Adam on a CPU the square roots of zeros, for which MKL takes six times as long as for other numbers.

    During the step, second moments of pruned weights are tiny instead of zero. The update stays zero, since the first
    moments are, and after the step they are zero again.
    """
    plan = optimizer.__dict__.get(_PLAN)
    if plan is None or plan.changes != CHANGES[0] or not plan.second:
        return
    if all(state.get("exp_avg_sq") is moment for state, moment in plan.moments):
        if plan.in_a_step:  # the one before has not come to its end
            plan.batch.zero()
        plan.in_a_step = True
        torch._foreach_add_(plan.second, plan.tiny)  # adds 0 to the bits of kept ones


def _after_step(optimizer, *_):
    """Zero the pruned weights that the optimizer updates, and what it keeps about them."""
    plan = optimizer.__dict__.get(_PLAN)
    if plan is None:
        plan = optimizer.__dict__[_PLAN] = Plan()
        with _LOCK:
            OPTIMIZERS.add(optimizer)
    plan.refresh(optimizer)
    plan.batch.zero()
    plan.in_a_step = False


def clear_state(parameters: Sequence[nn.Parameter]) -> None:
    """Zero what optimizers keep about the pruned weights of these parameters, and of no others."""
    with _LOCK:
        optimizers = list(OPTIMIZERS)
    batch = Batch()
    for optimizer in optimizers:
        for parameter in parameters:
            for value in _state(optimizer, parameter).values():
                if _maskable(value, parameter):
                    batch.add(value, MASKS[parameter])
        if isinstance(optimizer, torch.optim.LBFGS) and any(p is q for p in parameters for q in optimizer._params):
            optimizer.state.clear()  # its directions lead through what is pruned now; the next step begins anew
    batch.zero()


for _handle in globals().get("_HANDLES", ()):  # of this module before it was reloaded
    _handle.remove()
_HANDLES = [register_optimizer_step_pre_hook(_before_step), register_optimizer_step_post_hook(_after_step)]
