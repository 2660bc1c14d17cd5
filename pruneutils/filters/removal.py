"""Filters physically removed: the model gets smaller and stays an ordinary one."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .. import _checks, _torch
from .._torch import Inputs, device_of, forward, hooked
from ..pruning import schedules
from ..pruning.criteria import untouched
from ..target import Target
from .budget import QUANTITIES, Budget, Order, order_units
from .measures import Criterion, score_filters
from .rebinding import rebind_optimizer
from .slicing import FILTERING, Kept, cut, kind_of_attention, tensor_cuts
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
    example_inputs: Inputs | None = None,
    rounds: int = 1,
    of: str = "filters",
    data: object = None,
    exclude: str | Iterable[str] = (),
    *,
    min_density: float = 0.0,
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
    One stays in every layer. The classifier and grouped convolutions keep theirs, and so do layers whose channels are
    mixed (a layer norm), moved by numbers in the code (grouped queries), or added to values of no layer. The smaller
    network computes what the whole one would if the removed filters gave zeros; this is checked on `example_inputs`.
    `model.removed` records what is left, for `pu.save`.

    Args:
        model, criterion, data, loss_fn, seed, **options: As for `filter_scores`. High scores stay.
        ratio: The fraction of what the model has now that goes; or an ascending list, what is gone after each round.
        example_inputs: Inputs (N, ...) that the model is run on, or a mapping of such; by default the first of `data`.
        rounds: In how many steps to remove a single ratio, as `front_loaded` says, scoring anew before each.
        of: What `ratio` is a fraction of: "filters" (of all layers that may lose some), "parameters" or "macs" (of the
            whole model, as `cost` counts), met as nearly as whole filters allow.
        exclude: Names or globs of layers whose filters stay.
        min_density: The fraction of its filters that every layer keeps over all rounds.
        on_round: `(model, round) -> anything`, called after each round (1, 2, ...), to train in between.
        optimizer, preserve_momentum: An optimizer that is bound to the new parameters in every round, before
            `on_round`, and whether it keeps its state for the filters that are left.

    Returns:
        The model. A ValueError says what is wrong, such as which layer cannot be cut; the model is then as it was.

    Example:
        >>> model = pu.prune_filters(pu.models.create("vgg16_bn"), "l1", 0.5, torch.rand(1, 3, 32, 32))
        >>> sum(module.out_channels for module in model.modules() if isinstance(module, torch.nn.Conv2d))  # of 4,224
        2112
    """
    ratios = ratios_of(ratio, rounds)
    _checks.one_of("of", of, QUANTITIES)
    _checks.fraction("min_density", min_density)
    given = _checks.a_model(model)
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or "_orig_mod" in model._modules:
        model = next(model.children())  # whose layers have the names that a record needs
    if not isinstance(getattr(model, "removed", {}), dict):
        raise ValueError(f"{type(model).__name__} has an attribute `removed`, where the record goes: rename it")
    if isinstance(model, torch.jit.ScriptModule) or any(p.is_meta for p in model.parameters()):
        raise ValueError("filters are removed before a model is scripted, and from weights that are loaded, not `meta`")
    data = list(data) if isinstance(data, Iterator) else data  # an iterator would be empty in the second round
    inputs = _torch.inputs_of(data, model, 1) if example_inputs is None and data is not None else example_inputs
    if not _torch.n_samples(inputs):
        what = "a tensor (N, ...), a mapping or a tuple of such"
        raise TypeError(f"prune_filters needs example_inputs, {what}, not {_checks.shapes(inputs)}")
    inputs, gone = _torch.to_device(inputs, device_of(model)), 0
    for number, fraction in enumerate(ratios, start=1):
        target = Target.of(model, strict=False)
        groups, protected = analyse(target, inputs, exclude)
        if not groups:
            raise ValueError(f"no filter can be removed: {_reasons(protected)}")
        scores = score_filters(target, criterion, data, inputs, loss_fn, seed, options)
        if number == 1:  # of what the layers have now, not of what a round leaves
            counts = {layer: group.n_units for group in groups for layer in group.layers}
            staying = {layer: max(1, math.ceil(round(min_density * n, 9))) for layer, n in counts.items()}
        order = order_units(groups, scores, staying)
        budget = Budget(target, order, of, inputs)
        present = budget.left(0)
        if number == 1:
            total = present
            least, step = budget.left(order.n_units), budget.step(order.n_units)
            if least - total * (1 - ratios[-1]) > step / 2:
                most = f"ratio={ratios[-1]!r}: at most {1 - least / total:.4f} of the {of} can go"
                raise ValueError(f"{most}; every layer keeps some, and {_reasons(protected)}")
        n_units = budget.nearest(present - (total * fraction - gone))
        step = budget.step(n_units)
        if problem := _cut_and_compare(target, order.kept(n_units), inputs):
            raise _refusal(target, order, n_units, inputs, groups, problem)
        gone += present - budget.measured(n_units)
        if abs(gone - total * fraction) > step:
            message = f"asked to remove {fraction:.4f} of the {of}, prune_filters has removed {gone / total:.4f}"
            warnings.warn(message, stacklevel=_checks.callers_level())
        if optimizer is not None:
            rebind_optimizer(optimizer, model, preserve_momentum)
        if on_round is not None:
            on_round(given, number)
    return given


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

    removed, rows = getattr(model, "removed", {}), []
    for layer, module in model.named_modules():
        for role, entry in removed.get(layer, {}).items():
            if role == "heads" or (role == "out" and isinstance(module, FILTERING)):
                rows.append((layer, entry["of"], len(entry["kept"]), 1 - len(entry["kept"]) / entry["of"]))
    return pd.DataFrame(rows, columns=["layer", "before", "after", "ratio"])


def ratios_of(ratio: float | Sequence[float], rounds: int) -> list[float]:
    """Return the fraction that is gone after each round; ValueError if that cannot be."""
    if isinstance(ratio, Sequence) and not isinstance(ratio, str):
        ratios = [_checks.fraction("ratio: each", each) for each in ratio]
        if not ratios or ratios != sorted(ratios):
            raise ValueError(f"ratio must be ascending fractions, one a round, not {ratio!r}")
        return ratios
    _checks.fraction("ratio", ratio)
    _checks.whole("rounds", rounds)
    return [front_loaded(number / rounds, 0.0, ratio) for number in range(1, rounds)] + [ratio]


def _reasons(protected) -> str:
    each = [f"{layer} ({reason})" for layer, reason in protected.items()]
    return f"these keep theirs: {', '.join(each[:6]) or 'none'}{' ...' * (len(each) > 6)}"


def _refusal(target: Target, order: Order, n_units: int, inputs: Inputs, groups: list[Group], why) -> ValueError:
    """The error for units whose removal fails or leaves something else than it should: it names their layers."""
    trials = [(group, _cut_and_compare(target, order.only(group).kept(n_units), inputs, True)) for group in groups]
    found = [(group.layers, problem) for group, problem in trials if problem]
    if not found:
        return ValueError(f"these filters cannot be removed together: {why}; the model is as it was")
    each = [f"the filters of {', '.join(layers)} cannot be removed: {problem}" for layers, problem in found]
    way = f"leave them with exclude={[layer for layers, _ in found for layer in layers]!r}"
    return ValueError(f"{'; '.join(each)}; the model is as it was; {way}")


def _cut_and_compare(target: Target, kept: Kept, inputs: Inputs, is_trial: bool = False) -> str | None:
    """Cut, and compare with the model in which the same filters give zeros; what is wrong if that differs."""
    wanted = _outputs(target, inputs, kept)
    problem, take_back = "", cut(target, kept)
    try:
        problem = _difference(wanted, _outputs(target, inputs, {}))
    except Exception as error:  # a model may fail in any way once its shapes differ
        problem = f"the forward pass then fails with {type(error).__name__}: {error}"
    finally:
        if problem is not None or is_trial:
            take_back()
    return problem


def _silenced(target: Target, kept: Kept) -> dict[str, torch.Tensor]:
    """The tensors of a model in which the channels that are not kept have no effect."""
    state, tensors = dict(target.model.named_parameters()) | dict(target.model.named_buffers()), {}
    for name, cuts in tensor_cuts(target.modules, kept).items():
        tensors[name] = state[name].detach().clone()
        for dim, index in cuts:
            gone = torch.ones(tensors[name].shape[dim], dtype=torch.bool).index_fill_(0, index, False).nonzero()[:, 0]
            tensors[name].index_fill_(dim, gone.to(tensors[name].device), 1 if name.endswith("running_var") else 0)
    return tensors


def _outputs(target: Target, inputs: Inputs, kept: Kept) -> list[tuple[str, torch.Tensor]]:
    """What each layer and the model give without what is not kept; a zero classifier alone would hide a difference."""
    outputs = []
    qkv = {f"{name}.qkv" for name, module in target.modules.items() if kind_of_attention(module) == "timm"}
    layers = {m: name for name, m in target.modules.items() if isinstance(m, FILTERING) and name not in qkv}

    def note(module, args, output):
        index, dim = kept.get((layers[module], "out")), -1 if isinstance(module, nn.Linear) else 1
        copied = output.clone() if index is None else output.index_select(dim, index.to(output.device))
        outputs.append((f"those of {layers[module]}", copied))  # an activation may overwrite the output itself

    def run(*args, **kwargs):
        return torch.func.functional_call(target.model, _silenced(target, kept), args, kwargs)

    with untouched(target.model), torch.no_grad(), hooked(layers, note, after=True):
        final = tree_leaves(forward(run, inputs, whole=True))
    return outputs + [("the outputs", leaf) for leaf in final if torch.is_tensor(leaf)]


def _difference(wanted, found) -> str | None:
    """What differs between two lists of outputs beyond rounding, or None."""
    for (name, a), (_, b) in zip(wanted, found, strict=True):
        if a.shape != b.shape:
            return f"{name} would have the shape {tuple(b.shape)} instead of {tuple(a.shape)}"
        if not a.is_floating_point() or a.numel() == 0:
            continue
        scale = torch.nan_to_num(a, 0, 0, 0).abs().max().item()
        tolerance = (1e-9 if a.dtype == torch.float64 else 1e-4) * scale + 1e-6
        if not torch.allclose(a, b, rtol=0, atol=tolerance, equal_nan=True):
            return f"{name} would change by up to {(a - b).abs().max():.3g} (the largest is {scale:.3g})"
    return None
