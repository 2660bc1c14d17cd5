"""Filters physically removed: the model gets smaller and stays an ordinary one."""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .. import _checks
from .._torch import batches, device_of, full_float32, hooked, in_mode, own_random_state
from ..pruning import schedules
from ..target import Target
from .budget import QUANTITIES, Order, measured, order_units, staying_units, terms_of
from .measures import Criterion, score_filters
from .rebinding import rebind_optimizer
from .slicing import FILTERING, Kept, cut, kind_of_attention, size_of, tensor_cuts
from .surgery import Group, analyse

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
    criterion: Criterion = "mag_based",
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
    """Remove filters (output channels of convolutions and linear layers, heads of attention) in place.

    What depends on a filter goes with it, masks included: its batch norm, what later layers read of it, the same
    channel of all layers that shortcuts add up. All filters compete, those that only go together by their mean score.
    One stays in every layer; the classifier, the stem of a network with shortcuts, grouped convolutions, and layers
    whose channels a layer norm mixes keep theirs. The smaller network computes what the whole one would if the removed
    filters gave zeros; this is checked on `example_inputs`. `model.removed` records what is left, for `pu.save`.

    Args:
        model, criterion, data, loss_fn, seed, **options: As for `filter_scores`. High scores stay.
        ratio: The fraction of what the model has now that goes; or an ascending list, what is gone after each round.
        example_inputs: Inputs (N, ...) that the model is run on; by default the first of `data`.
        rounds: In how many steps to remove, scoring anew before each.
        of: What `ratio` is a fraction of: "filters" (of all layers that may lose some), "parameters" or "macs" (of the
            whole model, as `cost` counts), met as nearly as whole filters allow.
        exclude: Names or globs of layers whose filters stay.
        min_density: The fraction of the filters it has now that every layer keeps over all rounds.
        schedule: How `ratio` grows over the rounds: a name or a function as for `pu.schedule`.
        on_round: `(model, round) -> anything`, called after each round (1, 2, ...), to train in between.
        optimizer, preserve_momentum: An optimizer that is bound to the new parameters in every round, before
            `on_round`, and whether it keeps its state for the filters that are left.

    Returns:
        The model.

    Raises:
        ValueError: For wrong names, fractions or scores, more than whole layers can give, and a layer that cannot be
            cut, with its name. The model is then as it was.

    Example:
        >>> model = pu.prune_filters(pu.models.create("vgg16_bn"), "l1", 0.5, torch.rand(1, 3, 32, 32))
        >>> sum(module.out_channels for module in model.modules() if isinstance(module, torch.nn.Conv2d))  # of 4,224
        2112
    """
    ratios = ratios_of(ratio, rounds, schedule)
    _checks.one_of("of", of, QUANTITIES)
    _checks.fraction("min_density", min_density)
    if isinstance(data, Iterator):
        data = list(data)  # an iterator would be empty in the second round
    inputs = _inputs(example_inputs, data).to(device_of(model))
    gone = 0
    for number, fraction in enumerate(ratios, start=1):
        target = Target.of(model, strict=False)
        groups, protected = analyse(target, inputs, exclude)
        if not groups:
            raise ValueError(f"no filter can be removed: {_reasons(protected)}")
        scores = score_filters(target, criterion, data, inputs, loss_fn, seed, options)
        if number == 1:  # of what the layers have now, not of what a round leaves
            staying = staying_units(groups, min_density)
        order = order_units(target.modules, groups, scores, staying, terms_of(target, groups, of, inputs))
        present = order.amount(0)
        if number == 1:
            total = present
            _check_possible(order, ratios[-1], of, protected)
        n_units = order.nearest(present - (total * fraction - gone))
        _remove(target, order, n_units, inputs, groups)
        predicted = present - order.amount(n_units)
        removed = predicted if of == "filters" else present - measured(target, of, inputs)
        gone += removed
        if abs(gone - total * fraction) > order.step(n_units) * (removed / predicted if predicted else 1):
            message = f"asked to remove {fraction:.4f} of the {of}, prune_filters has removed {gone / total:.4f}"
            warnings.warn(message, stacklevel=_checks.callers_level())
        if optimizer is not None:
            rebind_optimizer(optimizer, model, preserve_momentum)
        if on_round is not None:
            on_round(model, number)
    return model


def filter_table(model: nn.Module) -> "pd.DataFrame":
    """List what `prune_filters` has left of each layer.

    Args:
        model: Any model.

    Returns:
        A row per layer that has lost filters (or heads), in module order: layer, before, after, ratio (what is gone).

    Example:
        >>> model = pu.prune_filters(pu.models.create("lenet300"), "l1", 0.5, torch.rand(1, 1, 28, 28))
        >>> pu.filters.filter_table(model)[["layer", "before"]].values.tolist()
        [['fc1', 300], ['fc2', 100]]
    """
    import pandas as pd

    rows = []
    for layer, module in model.named_modules():
        for role, entry in getattr(model, "removed", {}).get(layer, {}).items():
            if role == "heads" or (role == "out" and hasattr(module, "weight") and module.weight.ndim > 1):
                after = len(entry["kept"])
                rows.append((layer, entry["of"], after, 1 - after / entry["of"]))
    return pd.DataFrame(rows, columns=["layer", "before", "after", "ratio"])


# --- What is asked for -----------------------------------------------------------------------------------------------


def ratios_of(ratio: float | Sequence[float], rounds: int, schedule: str | schedules.Schedule) -> list[float]:
    """Return the fraction that is gone after each round; ValueError if that cannot be."""
    step_to = _checks.choose("schedule", schedule, schedules.SCHEDULES)
    if isinstance(ratio, Sequence) and not isinstance(ratio, str):
        ratios = [_checks.fraction("ratio: each", each) for each in ratio]
        if not ratios or ratios != sorted(ratios):
            raise ValueError(f"ratio must be ascending fractions, at least one, not {ratio!r}")
        if rounds not in (1, len(ratios)):
            raise ValueError(f"ratio lists {len(ratios)} rounds, so leave out rounds={rounds!r}")
        return ratios
    _checks.fraction("ratio", ratio)
    _checks.whole("rounds", rounds)
    return [step_to(number / rounds, 0.0, ratio) for number in range(1, rounds)] + [ratio]


def _inputs(example_inputs, data) -> torch.Tensor:
    """Inputs to run the model on, to see what depends on what."""
    if example_inputs is None and data is not None:
        example_inputs = next(iter(batches(data)))[0][:2]
    if not torch.is_tensor(example_inputs) or len(example_inputs) == 0:
        raise TypeError(f"prune_filters needs example_inputs, a tensor (N, ...), not {example_inputs!r:.80}")
    return example_inputs


def _check_possible(order: Order, ratio: float, of: str, protected: Mapping[str, str]) -> None:
    """Raise ValueError if even without all units that may go, more is left than is asked for."""
    total, least = order.amount(0), order.amount(order.n_units)
    if least - total * (1 - ratio) > order.step(order.n_units) / 2:
        most = f"ratio={ratio!r}: at most {1 - least / total:.4f} of the {of} can go"
        raise ValueError(f"{most}; every layer keeps some, and {_reasons(protected)}")


def _reasons(protected) -> str:
    each = [f"{layer} ({reason})" for layer, reason in protected.items()]
    return f"these keep theirs: {', '.join(each[:6]) or 'none'}{' ...' * (len(each) > 6)}"


# --- Removing, with a check ------------------------------------------------------------------------------------------


def _remove(target: Target, order: Order, n_units: int, inputs: torch.Tensor, groups: list[Group]) -> None:
    """Remove the first units; ValueError, with the model as it was, if the rest does not compute what it should."""
    problem = _cut_and_compare(target, order.kept(n_units), inputs)
    if problem is None:
        return
    for group in groups:  # which of them is it?
        trial = Target.of(copy.deepcopy(target.model), strict=False)
        if found := _cut_and_compare(trial, order.only(group).kept(n_units), inputs):
            way = f"the model is as it was; leave them with exclude={group.layers!r}"
            raise ValueError(f"the filters of {', '.join(group.layers)} cannot be removed: {found}; {way}")
    raise ValueError(f"these filters cannot be removed together: {problem}; the model is as it was")


def _cut_and_compare(target: Target, kept: Kept, inputs: torch.Tensor) -> str | None:
    """Cut, and compare with the model in which the same filters give zeros; what is wrong if that differs."""
    if not kept:
        return None
    wanted = _outputs(target, inputs, kept, _silenced(target, kept))
    problem, take_back = "", cut(target, kept)
    try:
        problem = _difference(wanted, _outputs(target, inputs, {}, {}))
    except Exception as error:  # a model may fail in any way once its shapes differ
        problem = f"the forward pass then fails with {type(error).__name__}: {error}"
    finally:
        if problem is not None:
            take_back()
    return problem


def _silenced(target: Target, kept: Kept) -> dict[str, torch.Tensor]:
    """The tensors of a model in which the channels that are not kept have no effect."""
    state, tensors = dict(target.model.named_parameters()) | dict(target.model.named_buffers()), {}
    sizes = {(layer, role): size_of(target.modules[layer], role) for layer, role in kept}
    for name, cuts in tensor_cuts(target.modules, kept, sizes).items():
        tensors[name] = state[name].detach().clone()
        for dim, index in cuts:
            is_gone = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
            is_gone[index] = False
            tensors[name].movedim(dim, 0)[is_gone.to(tensors[name].device)] = 0
    return tensors


@torch.no_grad()
def _outputs(target: Target, inputs, kept: Kept, tensors: Mapping) -> list[tuple[str, torch.Tensor]]:
    """What every convolution and linear layer gives in turn, of its kept filters, and then what the model gives."""
    # The outputs of the model alone would not do: those of a classifier that starts at zero are always the same.
    outputs = []
    qkv = {f"{name}.qkv" for name, module in target.modules.items() if kind_of_attention(module) == "timm"}
    layers = {m: name for name, m in target.modules.items() if isinstance(m, FILTERING) and name not in qkv}

    def note(module, args, output):
        index, dim = kept.get((layers[module], "out")), -1 if isinstance(module, nn.Linear) else 1
        kept_output = output if index is None else output.index_select(dim, index.to(output.device))
        outputs.append((f"those of {layers[module]}", kept_output.clone()))  # an activation may overwrite it

    with in_mode(target.model, training=False), own_random_state(inputs.device, 0), full_float32():
        with hooked(layers, note, after=True):
            final = tree_leaves(torch.func.functional_call(target.model, tensors, (inputs,)))
    return outputs + [("the outputs", leaf) for leaf in final if torch.is_tensor(leaf)]


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
