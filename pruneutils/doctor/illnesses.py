"""The checks of the doctor, a short function each."""

import copy
import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from .. import _masks
from .._prunable import layer_name, present_weights
from .._torch import in_mode
from ..model_utils import make_permanent
from ..pruning import dead_weights
from .examine import Finding, Patient, checks

_BatchNorm = nn.modules.batchnorm._BatchNorm


@checks
def broken(patient: Patient) -> Iterator[Finding]:
    """The model does not run on the data."""
    if error := patient.failure:
        what = f"the model does not run on inputs of shape {tuple(patient.inputs.shape)}: {error}"
        yield Finding("error", what, type(patient.model).__name__, "look at the layers whose shapes have changed")


@checks
def non_finite(patient: Patient) -> Iterator[Finding]:
    """Weights or statistics that are NaN or infinite make the outputs so."""
    tensors = (*patient.model.named_parameters(), *patient.model.named_buffers())
    bad = {name: _n_non_finite(tensor.detach()) for name, tensor in tensors}
    bad = {name: n for name, n in bad.items() if n}
    if bad:
        what = f"{sum(bad.values()):,} values are NaN or infinite"
        yield Finding("error", what, _listed(bad), "load an earlier state, and train with a smaller lr")


@checks
def revived_weights(patient: Patient) -> Iterator[Finding]:
    """Something other than a torch optimizer has written to pruned weights."""
    alive = {name: _count((patient.weights[name] != 0).logical_and_(~keep)) for name, keep in patient.masks.items()}
    alive = {name: n for name, n in alive.items() if n}
    if alive:
        pruned = sum(keep.numel() - _count(keep) for keep in patient.masks.values())
        what = f"{sum(alive.values()):,} of {pruned:,} pruned weights are not zero"
        call = "pu.hold(model) zeroes them again, pu.make_permanent(model) keeps them"
        yield Finding("error", what, _layers(alive), call)


@checks
def zeros_without_mask(patient: Patient) -> Iterator[Finding]:
    """Weights that are exactly zero while no mask prunes them: the first step of training fills them."""
    open_zeros = {}
    for name, weight in patient.weights.items():
        keep = patient.masks.get(name)
        n = _count(weight == 0) if keep is None else _count((weight == 0).logical_and_(keep))
        if 0.01 * weight.numel() < n < weight.numel():  # a layer without any is another finding
            open_zeros[name] = n
    if open_zeros:
        what = f"{sum(open_zeros.values()):,} weights are exactly zero, and no mask holds them there"
        call = "pu.set_masks(model, {name: w != 0 for name, w in pu.prunable_weights(model).items()})"
        yield Finding("warning", what, _layers(open_zeros), call)


@checks
def lost_masks(patient: Patient) -> Iterator[Finding]:
    """A parameter with a mask was replaced by another one."""
    for name, parameter, keep in _masks.replaced(patient.model):
        if parameter.shape == keep.shape:
            what = "the parameter was replaced, and its mask moves only at the next call of pruneutils"
            yield Finding("warning", what, name, "pu.hold(model), and make the optimizer anew")
        else:
            shapes = f"{tuple(keep.shape)} by one of shape {tuple(parameter.shape)}"
            call = f"pu.set_masks(model, {{{name!r}: mask}}) gives it a new mask, pu.make_permanent(model) removes all"
            yield Finding("error", f"a parameter with a mask of shape {shapes} was replaced", name, call)


@checks
def foreign_optimizer(patient: Patient) -> Iterator[Finding]:
    """The optimizer updates other parameters than the model has now."""
    if patient.optimizer is None:
        return
    own = {id(p): name for name, p in patient.model.named_parameters()}
    held = {id(p): p for group in patient.optimizer.param_groups for p in group["params"]}
    foreign = [p for key, p in held.items() if key not in own]
    missing = [name for name, p in patient.model.named_parameters() if p.requires_grad and id(p) not in held]
    call = "make the optimizer anew from model.parameters(); after prune_filters, pu.rebind_optimizer(optimizer, model)"
    if foreign:
        shapes = ", ".join(str(tuple(p.shape)) for p in foreign[:3])
        what = f"the optimizer holds {len(foreign)} of {len(held)} parameters that are not the model's (shape {shapes})"
        yield Finding("error", what, type(patient.optimizer).__name__, call)
    if missing:
        what = f"the optimizer does not train {len(missing)} of {len(own)} parameters that require a gradient"
        yield Finding("error" if foreign else "warning", what, _listed(missing), call)


@checks
def stale_statistics(patient: Patient) -> Iterator[Finding]:
    """Batch norm normalises by other statistics than its inputs have, as after pruning without training."""
    if patient.inputs is None or patient.failure:
        return
    norms = {m: name for name, m in patient.model.named_modules() if isinstance(m, _BatchNorm)}
    norms = {m: name for m, name in norms.items() if m.running_mean is not None and m.num_batches_tracked != 0}
    shifts = {name: shift for name, shift in _shifts(patient, norms).items() if shift > 0.5}
    if shifts:
        what = "the running statistics are not those of the data"
        yield Finding("warning", what, _listed(shifts), "pu.recalibrate(model, data)")


@checks
def empty_layers(patient: Patient) -> Iterator[Finding]:
    """Nothing passes a layer without weights but its bias."""
    empty = [name for name, weight in patient.weights.items() if not weight.any()]
    if empty:
        masked = any(name in patient.masks for name in empty)
        call = "prune anew, with less sparsity, more iterations, or scope='layer' or 'erk'"
        what = f"{len(empty)} of {len(patient.weights)} layers have no weight left"
        yield Finding(
            "error" if masked else "warning",
            what,
            _layers(empty),
            call if masked else "train it or load its weights: gradients stop there",
        )


@checks
def disconnected_paths(patient: Patient) -> Iterator[Finding]:
    """Kept weights whose every way to the input or the output leads through pruned ones."""
    if patient.inputs is None or patient.failure or not any(_cuts_a_channel(patient, name) for name in patient.masks):
        return  # every channel is written and read, so that what follows, a second or two, would find nothing
    kept = {name: keep & (patient.weights[name] != 0) for name, keep in patient.masks.items()}
    dead = dead_weights(patient.model, patient.inputs[:1])
    n_dead = sum(_count(each & kept[name]) for name, each in dead.items() if name in kept)
    if n_dead <= 0.04 * sum(map(_count, kept.values())):  # then no more than 0.05 of the useful ones, as below
        return
    # not those that the architecture cuts off, such as the outer taps of a 3x3 kernel on a single pixel
    whole = make_permanent(copy.deepcopy(patient.model))
    for weight in present_weights(whole).values():
        weight.detach().fill_(1)
    useful = {
        name: ~each & kept[name] for name, each in dead_weights(whole, patient.inputs[:1]).items() if name in kept
    }
    lost = {name: _count(each & dead[name]) for name, each in useful.items()}
    lost, total = {name: n for name, n in lost.items() if n}, sum(map(_count, useful.values()))
    if sum(lost.values()) > 0.05 * total:
        what = f"{sum(lost.values()):,} of {total:,} kept weights have no effect on the outputs"
        call = "pu.dead_weights(model, data) names them; criterion='synflow' or scope='erk' leave fewer"
        yield Finding("warning" if sum(lost.values()) > 0.2 * total else "note", what, _layers(lost), call)


@checks
def pruned_classifier(patient: Patient) -> Iterator[Finding]:
    """Classes without a weight, or a last layer that is far sparser than the others."""
    name = next(reversed(patient.weights), "")
    if name not in patient.masks or len(patient.weights) < 2:
        return
    keep, call = patient.masks[name], f"leave it out: pu.prune(model, ..., exclude={layer_name(name)!r})"
    silent = _count(~keep.flatten(1).any(1))
    density = _count(keep) / keep.numel()
    others = sum(map(_count, patient.masks.values())) / sum(each.numel() for each in patient.masks.values())
    if silent:
        what = f"{silent} of {len(keep)} outputs of the last layer have no weight left, so they are constant"
        yield Finding("error", what, _layers([name]), call)
    elif density < 0.1 * others:
        what = f"the last layer keeps {density:.2%} of its weights, all layers together {others:.2%}"
        yield Finding("warning", what, _layers([name]), call)


@checks
def ties_at_the_cut(patient: Patient) -> Iterator[Finding]:
    """Many kept weights have the very magnitude at which the pruned ones end: position has decided."""
    if all(keep.all() for keep in patient.masks.values()):
        return
    lowest = {name: _lowest(patient.weights[name], keep) for name, keep in patient.masks.items()}
    cut = min(lowest.values())
    last = [name for name, low in lowest.items() if low == cut < math.inf]
    ties = {name: _count((patient.weights[name].abs() == cut).logical_and_(patient.masks[name])) for name in last}
    n, total = sum(ties.values()), sum(map(_count, patient.masks.values()))
    if n > max(10, 0.001 * total):
        what = f"{n:,} of {total:,} kept weights have the smallest magnitude of all, {cut:.3g}; if magnitudes were the "
        what += "scores, position has decided which of them stayed"
        yield Finding("note", what, _layers(ties), "prune by a criterion with finer scores, such as 'taylor' with data")


@checks
def tied_weights(patient: Patient) -> Iterator[Finding]:
    """A weight with several names is pruned under all of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in patient.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for weight in present_weights(patient.model).values():
        if len(shared := names.get(id(weight), ())) > 1:
            what = "these are one parameter: it counts once, and is pruned under all of its names"
            call = f"leave it out by pu.prune(model, ..., exclude={layer_name(shared[0])!r}) if it is not to be pruned"
            yield Finding("note", what, " = ".join(shared), call)


@checks
def outside_every_mask(patient: Patient) -> Iterator[Finding]:
    """The sparsity of a model says little if much of the model is outside of its masks."""
    if not patient.masks:
        return
    masked = {id(weight) for name, weight in present_weights(patient.model).items() if name in patient.masks}
    outside = {n: p.numel() for n, p in patient.model.named_parameters() if id(p) not in masked and p.ndim > 1}
    share = sum(outside.values()) / patient.n_parameters
    if share > 0.1:
        largest = sorted(outside, key=outside.get, reverse=True)
        what = f"{share:.0%} of the parameters are outside of every mask, biases and norms not counted"
        yield Finding("note", what, _listed(largest), "pu.count(model) counts prunable weights alone")


# --- What several checks need ----------------------------------------------------------------------------------------


def _count(mask: torch.Tensor) -> int:
    return int(mask.count_nonzero())


def _cuts_a_channel(patient: Patient, name: str) -> bool:
    """Tell whether some channel that a layer reads or writes has no weight in it."""
    weight = patient.weights[name] != 0
    if weight.ndim < 2:
        return True
    groups = getattr(patient.model.get_submodule(name.rpartition(".")[0]), "groups", 1)
    pairs = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1).any(3)  # of channels that are connected
    return not (pairs.any(2).all() and pairs.any(1).all())


def _lowest(weight: torch.Tensor, keep: torch.Tensor) -> float:
    """Return the smallest magnitude above zero that is kept."""
    magnitude = weight.abs()
    return float(magnitude.masked_fill_(~keep | (magnitude == 0), math.inf).min())


def _n_non_finite(tensor: torch.Tensor) -> int:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta:
        return 0
    return 0 if tensor.sum().isfinite() else tensor.numel() - _count(tensor.isfinite())  # a sum needs no memory


def _layers(names: Iterable[str]) -> str:
    return _listed(layer_name(name) or name for name in names)


def _listed(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@torch.no_grad()
def _shifts(patient: Patient, norms: dict[nn.Module, str]) -> dict[str, float]:
    """Return how far running statistics are from what each norm reads, the mean over channels.

    For a channel that is the shift of its mean in standard deviations, or the logarithm of the ratio of these.
    """
    shifts: dict[str, float] = {}

    def listen(norm, args):
        values = args[0].detach().movedim(1, 0).flatten(1).double()
        if values.shape[1] >= 32 and norms[norm] not in shifts:  # fewer values say little
            spread = torch.maximum(norm.running_var, values.var(1).to(norm.running_var)) + norm.eps
            shift = (values.mean(1).to(spread) - norm.running_mean).abs() / spread.sqrt()
            scale = ((values.var(1).to(spread) + norm.eps) / (norm.running_var + norm.eps)).log().abs() / 2
            shifts[norms[norm]] = float(torch.maximum(shift, scale).clamp(max=3).mean())

    hooks = [norm.register_forward_pre_hook(listen) for norm in norms]
    try:
        if norms:
            with in_mode(patient.model, training=False):
                patient.model(patient.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return shifts
