"""Which weights can have an effect on the output: paths of numbers that need not be zero, from the input to the output.

A forward pass is recorded, operation by operation, and played again with 0 and 1 in place of all numbers: 0 stands for
what is zero whatever the input, 1 for everything else. Each operation follows one of few rules. Those that add up
products are computed as they are, activations and the like let through whatever enters them, and an operation that no
rule knows connects everything that it reads to everything that it gives. So no rule can lose a path, and what no
gradient of this second pass reaches is dead. How large numbers are plays no part, nor where an activation saturates.
"""

import functools
import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_map

from .._dispatch import Watch
from .._products import countable
from .._torch import batches, device_of
from ..model_utils import prunable_weights
from ._path_rules import PRODUCTS, alias, base, everything, joint, number, rule_of, tensors_in, view
from .criteria import _untouched


def dead_weights(model: nn.Module, data: object) -> dict[str, torch.Tensor]:
    """Find the weights that cannot have any effect on the output.

    No path of nonzero weights leads from the input through them to the output: taps of a kernel that only ever meet
    padding, layers in front of a batch norm whose scale is zero, channels that are cut off further on. The structure
    decides, not the values of the data. A weight that has an effect is never called dead, whatever the activations;
    the reverse can happen, since an unknown operation is taken to connect everything.

    Args:
        model: Any `nn.Module` with prunable layers. Numbers that it takes out of torch, as by `.numpy()`, and brings
            back are not followed.
        data: A batch, or its inputs (N, ...); only the shape matters, and the values of whole numbers such as tokens.

    Returns:
        {parameter name: bool tensor of the weight's shape}, True = dead.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU6(), torch.nn.Linear(2, 1))
        >>> with torch.no_grad():
        ...     model[2].weight[0, 1] = 0  # nothing leaves the second hidden unit
        >>> pu.dead_weights(model, torch.zeros(1, 2))["0.weight"].tolist()
        [[False, False], [True, True]]
    """
    inputs = data if torch.is_tensor(data) else next(iter(batches(data)))[0]
    inputs = inputs[:1].to(device_of(model))
    if inputs.is_floating_point():
        inputs = torch.ones_like(inputs)
    with _untouched(model, train_mode=False, seed=0), torch.no_grad():
        weights = prunable_weights(model)
        tape = _Tape(model, inputs)
        slots = [tape.slot(weight) for weight in weights.values()]
        with countable(), tape:
            outputs = tensors_in(model(inputs))
        if not outputs:
            raise TypeError(f"{type(model).__name__} returns no tensor, and no tuple, list or dict of tensors")
        reached = [tape.slot(output) for output in outputs] + tape.read_out
    with torch.enable_grad():
        alive = _play(tape, reached, slots)
    return {name: gradient == 0 for name, gradient in zip(weights, alive)}


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _key(tensor: torch.Tensor) -> tuple:
    return _storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _support(values: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """Return 1 where something is not zero, in the memory layout of `like`."""
    like = values if like is None else like
    return torch.empty_like(like, dtype=torch.float64, requires_grad=False).copy_(values != 0)


# --- The first pass --------------------------------------------------------------------------------------------------


class _Slot(int):
    """The number of a tensor, in its place among the arguments of a recorded operation."""


@dataclass(frozen=True)
class _Step:
    """An operation, or a value that is known (`rule` is None)."""

    rule: Callable | None
    operation: Callable | None
    args: tuple
    kwargs: dict
    given: list[tuple[_Slot, torch.Tensor, bool]]  # what it gives: number, the tensor or its value, written in place?


class _Tape(Watch):
    """Records the operations of a forward pass.

    Tensors are known by their place in memory, which is the same for every Python object that stands for them. All are
    kept until the end, so that no memory is used twice.
    """

    def __init__(self, model: nn.Module, inputs: torch.Tensor):
        super().__init__()
        self.steps, self.values, self.kept = [], {}, []  # values: of the tensors that were there before
        self.read_out = []  # tensors that became Python numbers, with which a model may do anything
        self._slots, self._by_storage, self._unwritten = {}, {}, set()
        self._live = {}  # memory that depends on weights or inputs: {storage: a bit for each parameter}
        for tensor in (*model.parameters(), *model.buffers(), inputs):
            self.slot(tensor)
        self.values[self.slot(inputs)].fill_(1)
        self.sources = [self.slot(tensor) for tensor in (*model.parameters(), inputs)]
        self._live = {_storage(tensor): 1 << i for i, tensor in enumerate(model.parameters())} | {_storage(inputs): 0}

    def slot(self, tensor: torch.Tensor) -> _Slot:
        """Return the number of a tensor; what nobody has made is a constant, or a view of something that is known."""
        key = _key(tensor)
        if key not in self._slots:
            relatives = list(self._by_storage.get(key[0], ()))
            slot = self._new(tensor)
            if relatives and key[0] in self._live:
                self._add(everything, relatives, [(slot, tensor, False)])
            else:
                self.values[slot] = _support(tensor)
        return self._slots[key]

    def _new(self, tensor):
        slot = self._slots[_key(tensor)] = _Slot(len(self.kept))
        self._by_storage.setdefault(_storage(tensor), []).append(slot)
        self.kept.append(tensor)
        return slot

    def _add(self, rule, args, given, operation=None, kwargs=None):
        self.steps.append(_Step(rule, operation, tuple(args), kwargs or {}, given))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, schema = kwargs or {}, func._schema
        name = schema.name.removeprefix("aten::")
        named = {argument.name: value for argument, value in zip(schema.arguments, args)} | kwargs
        written = [
            tensor
            for argument in schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tensors_in(named.get(argument.name))
        ]
        tensors = tensors_in((args, kwargs))
        for tensor in tensors:
            slot = self.slot(tensor)
            if _storage(tensor) in self._unwritten and not any(tensor is other for other in written):
                # written to by something that is no operation of torch, and nobody knows from what
                self._unwritten.discard(_storage(tensor))
                self._live[_storage(tensor)] = -1  # all bits
                self._add(everything, self.sources, [(slot, tensor, True)])
        depends = [self._live[_storage(tensor)] for tensor in tensors if _storage(tensor) in self._live]
        noted = tree_map(self._noted, (args, kwargs))
        result = func(*args, **kwargs)
        outputs = [tensor for tensor in tensors_in(result) if not any(_key(tensor) == _key(w) for w in written)]
        if depends and not outputs and not written:
            self.read_out += [self.slot(tensor) for tensor in tensors]
        is_view = not written and any(returned.alias_info is not None for returned in schema.returns)
        changed = {_storage(tensor) for tensor in (*outputs, *written)}
        if name.removesuffix("_like").removeprefix("new_") in ("empty", "empty_strided"):
            self._unwritten |= changed
        elif not is_view:
            self._unwritten -= changed
        if name.endswith("_like") or name.startswith("new_"):
            depends = []  # shape and type are all that these take
        for storage in changed if depends and not is_view else ():
            self._live[storage] = functools.reduce(operator.or_, depends, self._live.get(storage, 0))
        given = [(self._new(tensor), tensor, False) for tensor in outputs]
        given += [(self.slot(tensor), tensor, True) for tensor in written]
        if depends or is_view:
            rule = rule_of(func, name, is_view)
            if base(name) in PRODUCTS and any(a & b for a, b in itertools.combinations(depends, 2)):
                rule = functools.partial(joint, rule)
            self._add(rule, noted[0], given, func, noted[1])
        else:
            self._add(None, (), [(slot, _support(tensor), in_place) for slot, tensor, in_place in given])
        return result

    def _noted(self, leaf):
        """Numbers of tensors; indices that are constant stand for themselves."""
        if not torch.is_tensor(leaf):
            return leaf
        if not (leaf.is_floating_point() or leaf.is_complex()) and _storage(leaf) not in self._live:
            return leaf.clone()
        return self.slot(leaf)


# --- The second pass -------------------------------------------------------------------------------------------------


class _Binary(torch.autograd.Function):
    """1 where something is not zero, forwards and backwards: nothing overflows, and nothing becomes too small."""

    @staticmethod
    def forward(ctx, values, like):
        return _support(values, like)

    @staticmethod
    def backward(ctx, gradient):
        return _support(gradient), None


def _play(tape: _Tape, reached: list[_Slot], weights: list[_Slot]) -> tuple[torch.Tensor, ...]:
    """Return, for each of the weights, numbers above zero where there is a path to the tensors `reached`."""
    leaves = [tape.values[slot].requires_grad_() for slot in weights]
    values = {slot: value * 1 for slot, value in tape.values.items()}
    for step in tape.steps:
        results = [value for _, value, _ in step.given] if step.rule is None else _apply(step, values)
        for (slot, like, in_place), result in zip(step.given, results):
            if not in_place:
                is_view = step.rule in (None, view, alias)
                values[slot] = result if is_view else _Binary.apply(result, like)
                continue
            result = _Binary.apply(result, like)
            try:
                values[slot].copy_(result)
            except RuntimeError:  # autograd does not let one write to some views
                values[slot] = result
    flow = sum(values[slot].sum() for slot in reached)
    if not flow.requires_grad:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    return torch.autograd.grad(flow, leaves, materialize_grads=True)


def _apply(step: _Step, values: dict[_Slot, torch.Tensor]) -> list[torch.Tensor]:
    """Apply the rule of a step; where it fails or gives another shape, everything is connected with everything."""
    args, kwargs = tree_map(lambda leaf: values[leaf] if isinstance(leaf, _Slot) else leaf, (step.args, step.kwargs))
    shapes = [like.shape for _, like, _ in step.given]
    try:
        results = step.rule(step.operation, *args, **kwargs)
        results = list(results) if isinstance(results, tuple | list) else [results]
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, AttributeError):
        results = []
    results += [None] * (len(shapes) - len(results))
    fits = [r is not None and r.dtype == torch.float64 and _expands(r.shape, s) for r, s in zip(results, shapes)]
    if not all(fits):
        total = 1 + sum(number(tensor).sum() for tensor in tensors_in((args, kwargs)))
        results = [result if fit else total for result, fit in zip(results, fits)]
    return [result if result.shape == shape else result.expand(shape) for result, shape in zip(results, shapes)]


def _expands(shape, wanted) -> bool:
    try:
        return torch.broadcast_shapes(shape, wanted) == wanted
    except RuntimeError:
        return False
