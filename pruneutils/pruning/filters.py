"""Filters physically removed: the model gets smaller and stays an ordinary one."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .. import _checks
from .._torch import batches, device_of, full_float32, in_mode, own_random_state
from . import schedules
from ._budget import QUANTITIES, Order, order_units, staying_units, terms_of
from ._slicing import cut, kind_of_attention, size_of, tensor_cuts
from ._surgery import Structure, analyse
from .importances import Importance, filter_scores
from .rebinding import rebind_optimizer

if TYPE_CHECKING:
    import pandas as pd


@schedules.schedule
def front_loaded(progress: float, start: float, target: float) -> float:
    """Remove r_k = p / (k p + n (1 - p)) of what is left in round k of n: most at first (Lubana and Dick 2021).

    The product of all 1 - r_k is exactly 1 - p. `p` is the target, as a fraction of what is there at the start.
    """
    if target == start:
        return target
    p = (target - start) / (1 - start)
    return start + (1 - start) * progress * p / (progress * p + 1 - p)


def prune_filters(
    model: nn.Module,
    importance: str | Importance = "mag_based",
    ratio: float | Sequence[float] = 0.5,
    example_inputs: torch.Tensor | None = None,
    rounds: int = 1,
    of: str = "filters",
    data: object = None,
    exclude: str | Iterable[str] = (),
    *,
    min_density: float = 0.0,
    schedule: str | schedules.Schedule = "front_loaded",
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    on_round: Callable[[nn.Module, int], object] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    preserve_momentum: bool = True,
    seed: int = 0,
    **options: object,
) -> nn.Module:
    """Remove filters from a model, in place: it is smaller and faster afterwards, and an ordinary model as before.

    A filter is an output channel of a convolution or linear layer; a head of an attention layer goes as a whole. What
    depends on a filter goes with it: its batch norm, its depthwise convolution, what the next layers read of it, and
    the same channel of all layers that shortcuts add up. All filters compete with each other; those that only go
    together compete by their mean score. At least one stays in every layer. The classifier keeps its filters, and so do
    the layer that reads the input of a network with shortcuts, grouped convolutions, and layers whose channels a layer
    norm mixes. Masks are cut along with their weights. The smaller network computes what the whole one would compute if
    the removed filters gave zeros; this is checked on `example_inputs`.

    Args:
        model: Any `nn.Module` with convolution or linear layers.
        importance: How much a filter matters: a name from `list_importances()` or `list_criteria()`, or a function
            `(model, data) -> {weight name: scores}`. High scores stay.
        ratio: The fraction that goes, of what the model has when this is called; or a list of ascending fractions, what
            is gone after each round.
        example_inputs: Inputs (N, ...) that the model is run on; by default the first of `data`.
        rounds: In how many steps to remove, scoring anew before each.
        of: What `ratio` is a fraction of: "filters" (of all layers that may lose some), "parameters" or "macs" (of the
            whole model, as `cost` counts). It is met as nearly as whole filters allow.
        data: One (inputs, targets) batch or an iterable of them, for measures that need data.
        exclude: Names or globs of layers whose filters stay.
        min_density: The fraction of its filters, of those when this is called, that every layer keeps over all rounds;
            one stays in any case.
        schedule: How `ratio` grows over the rounds: "front_loaded", "exponential", "linear", "cubic", or a function
            `(progress, start, target) -> fraction`.
        loss_fn: `(outputs, targets) -> mean loss over the batch`; cross-entropy by default.
        on_round: `(model, round) -> anything`, called after each round (1, 2, ...), to train in between.
        optimizer: An optimizer of the model that is bound to the new parameters in every round, before `on_round`.
        preserve_momentum: Whether that optimizer keeps its state for the filters that are left.
        seed: Seeds the random choices. The global random state is never touched.
        **options: Options of the importance, such as T, grasp_T, n_samples or params_init.

    Returns:
        The same model. `model.removed` records what is left of each layer, {layer: {"out", "in" or "heads": {"of": how
        many there were at first, "kept": indices}}}; `pu.save` stores it, so that `pu.load` finds the shapes again.

    Raises:
        ValueError: For an unknown name, a fraction outside [0, 1], scores that are NaN or infinite, a ratio that
            whole layers would have to go for; and if a layer cannot be cut, with its name. The model is then as it was.
        TypeError: For an option that the importance does not have.

    Example:
        >>> model = pu.models.create("vgg16_bn")
        >>> pu.prune_filters(model, "l1", ratio=0.5, example_inputs=torch.rand(1, 3, 32, 32)) is model
        True
        >>> sum(module.out_channels for module in model.modules() if isinstance(module, torch.nn.Conv2d))  # of 4,224
        2112
    """
    _checks.a_model(model)
    targets = targets_of(ratio, rounds, schedule)
    _checks.one_of("of", of, QUANTITIES)
    _checks.fraction("min_density", min_density)
    if isinstance(data, Iterator):
        data = list(data)  # an iterator would be empty in the second round
    inputs = _inputs(model, example_inputs, data)
    total, gone, staying = None, 0, None
    for number, target in enumerate(targets, start=1):
        structure = analyse(model, inputs, exclude)
        if not structure.groups:
            raise ValueError(f"no filter can be removed: {_reasons(structure)}")
        scores = filter_scores(model, importance, data, example_inputs=inputs, loss_fn=loss_fn, seed=seed, **options)
        if staying is None:  # of what the layers have now, not of what a round leaves
            staying = staying_units(structure.groups, min_density)
        order = order_units(model, structure.groups, scores, staying)
        terms = terms_of(model, structure.groups, of, inputs)
        present = order.amount(terms, 0)
        if total is None:
            total = present
            _check_possible(order, terms, total, targets[-1], of, structure)
        n_units = order.cut(terms, present - (total * target - gone))
        gone += present - order.amount(terms, n_units)
        _remove(model, order, n_units, inputs, structure)
        if optimizer is not None:
            rebind_optimizer(optimizer, model, preserve_momentum)
        if on_round is not None:
            on_round(model, number)
    return model


def filter_table(model: nn.Module) -> "pd.DataFrame":
    """List what `prune_filters` has left of each layer.

    Args:
        model: A model; one that has lost nothing gives an empty table.

    Returns:
        A row per layer that has lost filters (for attention: heads), in module order: layer, before, after, ratio (the
        fraction that is gone).

    Example:
        >>> model = pu.models.create("lenet300")
        >>> model = pu.prune_filters(model, "l1", ratio=0.5, example_inputs=torch.rand(1, 1, 28, 28))
        >>> pu.filter_table(model)[["layer", "before"]].values.tolist()
        [['fc1', 300], ['fc2', 100]]
    """
    rows = []
    for layer, module in model.named_modules():
        for role, entry in getattr(model, "removed", {}).get(layer, {}).items():
            if role == "heads" or (role == "out" and hasattr(module, "weight") and module.weight.ndim > 1):
                after = len(entry["kept"])
                rows.append((layer, entry["of"], after, 1 - after / entry["of"]))
    import pandas as pd

    return pd.DataFrame(rows, columns=["layer", "before", "after", "ratio"])


# --- What is asked for -----------------------------------------------------------------------------------------------


def targets_of(ratio: float | Sequence[float], rounds: int, schedule: str | schedules.Schedule) -> list[float]:
    """Return the fraction that is gone after each round; ValueError if that cannot be."""
    step_to = _checks.choose("schedule", schedule, schedules.SCHEDULES)
    if isinstance(ratio, Sequence) and not isinstance(ratio, str):
        targets = [_checks.fraction("ratio: each", each) for each in ratio]
        if not targets or targets != sorted(targets):
            raise ValueError(f"ratio must be ascending fractions, at least one, not {ratio!r}")
        if rounds not in (1, len(targets)):
            raise ValueError(f"ratio names {len(targets)} rounds, so rounds={rounds!r} must be left out")
        return targets
    _checks.fraction("ratio", ratio)
    _checks.whole("rounds", rounds)
    return [step_to(number / rounds, 0.0, ratio) for number in range(1, rounds)] + [ratio]


def _inputs(model, example_inputs, data) -> torch.Tensor:
    """Inputs to run the model on."""
    if example_inputs is None:
        if data is None:
            raise ValueError(
                "prune_filters needs example_inputs (N, ...): it runs the model to see what depends on what"
            )
        example_inputs = next(iter(batches(data)))[0][:2]
    if not torch.is_tensor(example_inputs) or len(example_inputs) == 0:
        raise TypeError(f"example_inputs must be a tensor (N, ...) with N of at least 1, not {example_inputs!r:.80}")
    return example_inputs.to(device_of(model))


def _check_possible(order: Order, terms, total, target, of, structure) -> None:
    """Raise ValueError if even without all units that may go, more is left than is asked for."""
    least, before = order.amount(terms, len(order.units)), order.amount(terms, max(0, len(order.units) - 1))
    if least - total * (1 - target) > (before - least) / 2:
        raise ValueError(
            f"ratio={target!r}: at most {1 - least / total:.4f} of the {of} can go; every layer keeps some, and "
            f"{_reasons(structure)}"
        )


def _reasons(structure: Structure) -> str:
    reasons: dict[str, list[str]] = {}
    for layer, reason in structure.protected.items():
        reasons.setdefault(reason, []).append(layer)
    told = [f"{', '.join(layers[:3])}{' ...' * (len(layers) > 3)} ({why})" for why, layers in reasons.items()]
    return f"these keep theirs: {'; '.join(told)}" if told else "all layers take part"


# --- Removing, with a check ------------------------------------------------------------------------------------------


def _remove(model: nn.Module, order: Order, n_units: int, inputs: torch.Tensor, structure: Structure) -> None:
    """Remove the first units; ValueError, with the model as it was, if the rest does not compute what it should."""
    kept = order.kept(n_units)
    if not kept:
        return
    problem = _cut_and_compare(model, kept, inputs)
    if problem is None:
        return
    for group in structure.groups:  # which of them is it?
        keys = {(part.layer, part.role) for part in group.parts}
        alone = {key: index for key, index in _alone(order, group, n_units).items() if key in keys}
        trial = copy.deepcopy(model)
        if alone and (found := _cut_and_compare(trial, alone, inputs)) is not None:
            raise ValueError(
                f"the filters of {', '.join(group.layers)} cannot be removed: {found}. The model is as it was; "
                f"leave them with exclude={group.layers!r}"
            )
    raise ValueError(f"these filters cannot be removed together: {problem}. The model is as it was")


def _alone(order: Order, group, n_units: int) -> dict:
    """What is kept if only the units of this group go."""
    kept = {}
    for part in group.parts:
        key = part.layer, part.role
        mask = kept.setdefault(key, torch.ones(order.sizes[key], dtype=torch.bool))
        mask[torch.from_numpy(part.index[order.ranks[key][part.index] < n_units])] = False
    return {key: mask.nonzero().flatten() for key, mask in kept.items() if not mask.all()}


def _cut_and_compare(model, kept, inputs) -> str | None:
    """Cut, and compare with the model in which the same filters give zeros; what is wrong if that differs."""
    wanted = _outputs(lambda: torch.func.functional_call(model, _silenced(model, kept), (inputs,)), model, kept)
    take_back = cut(model, kept)
    try:
        try:
            found = _outputs(lambda: model(inputs), model, {})
        except Exception as error:  # a model may fail in any way once its shapes differ
            problem = f"the forward pass then fails with {type(error).__name__}: {error}"
        else:
            problem = _difference(wanted, found)
    except BaseException:
        take_back()
        raise
    if problem is not None:
        take_back()
    return problem


def _silenced(model, kept) -> dict[str, torch.Tensor]:
    """The tensors of a model in which the channels that are not kept have no effect."""
    state, tensors = dict(model.named_parameters()) | dict(model.named_buffers()), {}
    sizes = {(layer, role): size_of(model.get_submodule(layer), role) for layer, role in kept}
    for name, cuts in tensor_cuts(model, kept, sizes).items():
        tensors[name] = state[name].detach().clone()
        for dim, index in cuts:
            gone = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
            gone[index] = False
            tensors[name][(slice(None),) * dim + (gone.to(tensors[name].device),)] = 0
    return tensors


@torch.no_grad()
def _outputs(run, model, kept) -> list[tuple[str, torch.Tensor]]:
    """What every convolution and linear layer gives in turn, of its kept filters, and then what the model gives.

    The outputs of the model alone would not do: those of a classifier that starts at zero are always the same.
    """
    outputs, hooks = [], []

    def listen(layer, dim):
        def hook(module, args, output):
            index = kept.get((layer, "out"))
            kept_output = output if index is None else output.index_select(dim, index.to(output.device))
            outputs.append((f"those of {layer}", kept_output.clone()))  # an activation may overwrite it

        return hook

    inside = {f"{n}.{part}" for n, m in model.named_modules() if kind_of_attention(m) for part in ("qkv", "out_proj")}
    for layer, module in model.named_modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and layer not in inside:
            hooks.append(module.register_forward_hook(listen(layer, -1 if isinstance(module, nn.Linear) else 1)))
    try:
        with in_mode(model, training=False), own_random_state(device_of(model), 0), full_float32():
            final = [("the outputs", leaf) for leaf in tree_leaves(run()) if torch.is_tensor(leaf)]
    finally:
        for hook in hooks:
            hook.remove()
    return outputs + final


def _difference(wanted, found) -> str | None:
    """What differs between two lists of outputs beyond rounding, or None."""
    for (name, a), (_, b) in zip(wanted, found, strict=True):
        if a.shape != b.shape:
            return f"{name} would have the shape {tuple(b.shape)} instead of {tuple(a.shape)}"
        if not a.is_floating_point() or a.numel() == 0:
            continue
        scale = torch.nan_to_num(a, 0, 0, 0).abs().max().item()
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(a.dtype, 5e-2) * scale + 1e-6
        gap = torch.nan_to_num((a - b).abs(), 0).max().item()
        if gap > tolerance or not torch.equal(a.isfinite(), b.isfinite()):
            return f"{name} would change by {gap:.3g} (the largest is {scale:.3g})"
    return None
