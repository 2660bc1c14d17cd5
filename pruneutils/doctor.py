"""The doctor: what is wrong, or only looks right, with a pruned model, its optimizer and its statistics.

To add a check, write a short function with `@pu.doctor.checks`, which looks at a `Patient` and yields what it finds.
What is examined is never changed, not even a mask that is due to move.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ._checks import a_model, shapes
from ._torch import device_of, forward, hooked, in_mode, inputs_of, own_random_state, take, unmaskable
from .masks import held, mask_of
from .model_utils import make_permanent
from .target import find, layer_name, prunable_weights

SEVERITIES = ("error", "warning", "note")  # wrong results, likely wrong results, good to know


@dataclass(frozen=True)
class Finding:
    """What a check has found."""

    severity: str  # one of SEVERITIES
    what: str  # is wrong
    where: str  # layers or parameters
    call: str  # what to do about it
    check: str = ""  # the name of the check


class Findings(list[Finding]):
    """A list of findings, the worst first, empty if all is well; a table in Jupyter and by `pd.DataFrame`."""

    def __repr__(self) -> str:
        return "\n".join(f"{f.severity}: {f.what} ({f.where}). {f.call}" for f in self) or "no findings"

    def _repr_html_(self) -> str:
        import pandas as pd

        return pd.DataFrame(self).drop(columns="check").to_html(index=False) if self else "no findings"


@dataclass(frozen=True)
class Patient:
    """A model as the checks look at it."""

    model: nn.Module
    weights: dict[str, nn.Parameter]  # the prunable ones
    masks: dict[str, torch.Tensor]  # as they are now: True = kept
    optimizer: torch.optim.Optimizer | None
    inputs: torch.Tensor | None  # that the model runs on


CHECKS: dict[str, Callable[[Patient], Iterable[Finding]]] = {}


def checks(function: Callable[[Patient], Iterable[Finding]]) -> Callable[[Patient], Iterable[Finding]]:
    """Register a check under the name of its function."""
    CHECKS[function.__name__] = function
    return function


@torch.no_grad()
def check(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, data: object = None) -> Findings:
    """Examine a model for what makes pruning experiments go wrong without an error; nothing is changed.

    Args:
        model: Any `nn.Module`, for pruned weights that live, zeros that no mask holds, and masks that do not fit.
        optimizer: The optimizer that trains the model, for parameters that are not the model's any more.
        data: One (inputs, targets) batch or an iterable of them, or inputs (N, ...) alone, of which 128 samples count;
            for batch-norm statistics that do not fit, and kept weights without any effect.

    Returns:
        The findings, the worst first; an empty list if all is well. See `Finding`.

    Example:
        >>> model = pu.models.create("lenet300")
        >>> masks = pu.prune(model, "magnitude", 0.5)
        >>> model.fc3.reset_parameters()
        >>> for finding in pu.check(model):
        ...     print(finding.severity, finding.where, finding.call)
        error fc3 pu.hold(model) zeroes them again, pu.make_permanent(model) keeps them
    """
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch Optimizer, not a {type(optimizer).__name__}")
    present = find(dict(a_model(model).named_modules()))
    weights = {name: weight for name, weight in present.items() if weight is not None and not unmaskable(weight)}
    fitting = {name: mask for name, w in weights.items() if (mask := mask_of(w)) and not mask.misfit(w)}
    masks = {name: mask.keep.to(weights[name].device) for name, mask in fitting.items()}
    inputs, found = None if data is None else inputs_of(data, model, most=128), []
    try:
        with in_mode(model, training=False):
            forward(model, take(inputs, slice(1))) if inputs is not None else None
    except Exception as error:
        what, inputs = f"the model does not run on inputs of {shapes(inputs)}: {error}", None
        found = [Finding("error", what, type(model).__name__, "look at layers whose shapes have changed", "broken")]
    patient = Patient(model, weights, masks, optimizer, inputs)
    found += [replace(finding, check=name) for name, looks_for in CHECKS.items() for finding in looks_for(patient)]
    return Findings(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


@checks
def non_finite(patient: Patient) -> Iterator[Finding]:
    """Weights or statistics that are NaN or infinite make the outputs so."""
    tensors = {name: t for name, t in patient.model.state_dict().items() if torch.is_tensor(t) and not unmaskable(t)}
    bad = {name: _count(~tensor.isfinite()) for name, tensor in tensors.items()}
    yield from _found("error", bad, "{:,} values are NaN or infinite", "load an earlier state; train with a smaller lr")


@checks
def revived_weights(patient: Patient) -> Iterator[Finding]:
    """Something other than a torch optimizer has written to pruned weights."""
    alive = {name: _count((patient.weights[name] != 0) & ~keep) for name, keep in patient.masks.items()}
    call = "pu.hold(model) zeroes them again, pu.make_permanent(model) keeps them"
    yield from _found("error", alive, "{:,} pruned weights are not zero", call)


@checks
def zeros_without_mask(patient: Patient) -> Iterator[Finding]:
    """Weights that are exactly zero while no mask prunes them: the first step of training fills them."""
    zeros = {name: _count((w == 0) & patient.masks.get(name, w == 0)) for name, w in patient.weights.items()}
    zeros = {name: n for name, n in zeros.items() if 0.01 < n / patient.weights[name].numel() < 1}  # 1: empty_layers
    call = "pu.set_masks(model, {name: w != 0 for name, w in pu.prunable_weights(model).items()})"
    yield from _found("warning", zeros, "{:,} weights are exactly zero, and no mask holds them there", call)


@checks
def lost_masks(patient: Patient) -> Iterator[Finding]:
    """The mask fits nothing that is in its parameter's place, or the parameter was replaced by another one."""
    for name, parameter, mask in held(dict(patient.model.named_modules())):
        what, _, way = mask.misfit(parameter).partition("; ")
        if what:
            yield Finding("error", f"it has {what}", name, f"{way}, or give up the mask by pu.make_permanent(model)")
        elif mask_of(parameter) is None:
            call = "pu.hold(model) moves its mask; make the optimizer anew"
            yield Finding("warning", "a parameter with a mask was replaced by another one", name, call)


@checks
def foreign_optimizer(patient: Patient) -> Iterator[Finding]:
    """The optimizer updates other parameters than the model has now."""
    if patient.optimizer is None:
        return
    trained = {id(p) for group in patient.optimizer.param_groups for p in group["params"]}
    if n_foreign := len(trained - set(map(id, patient.model.parameters()))):
        call = "make the optimizer anew from model.parameters(); after prune_filters, call pu.filters.rebind_optimizer"
        what = f"{n_foreign} of the {len(trained)} parameters that the optimizer holds are not the model's"
        yield Finding("error", what, type(patient.optimizer).__name__, call)


@checks
def stale_statistics(patient: Patient) -> Iterator[Finding]:
    """Batch norm normalises by other statistics than its inputs have, as after pruning without training."""
    modules, stale = {module: name for name, module in patient.model.named_modules()}, {}
    kind = nn.modules.batchnorm._BatchNorm
    norms = [m for m in modules if isinstance(m, kind) and m.running_mean is not None and m.num_batches_tracked != 0]

    def measure(norm, args):
        values = args[0].movedim(1, 0).flatten(1).double()
        if values.shape[1] >= 32:  # fewer say little
            mean, var = values.mean(1), values.var(1)
            shift = (mean - norm.running_mean).abs() / (torch.maximum(norm.running_var, var) + norm.eps).sqrt()
            scale = ((var + norm.eps) / (norm.running_var + norm.eps)).log().abs() / 2
            # of a channel's mean in standard deviations, or the logarithm of the ratio of these
            stale.setdefault(modules[norm], torch.maximum(shift, scale).clamp(max=3).mean() > 0.5)

    if norms and patient.inputs is not None:
        with in_mode(patient.model, training=False), hooked(norms, measure):
            forward(patient.model, patient.inputs)
    yield from _found("warning", stale, "running statistics are not those of the data", "pu.recalibrate(model, data)")


@checks
def empty_layers(patient: Patient) -> Iterator[Finding]:
    """Nothing passes a layer without weights but its bias."""
    empty = {name: not weight.any() for name, weight in patient.weights.items()}
    severity = "error" if any(empty[name] for name in patient.masks) else "warning"
    call = "prune anew, with less sparsity, or scope='layer' or 'erk'; what is not masked needs training or its weights"
    yield from _found(severity, empty, "{} layers have no weight left", call)


@checks
def disconnected_paths(patient: Patient) -> Iterator[Finding]:
    """Kept weights whose every way to the input or the output leads through pruned ones."""
    if patient.inputs is None or not patient.masks:
        return
    # not those that the architecture cuts off, such as the outer taps of a 3x3 kernel on a single pixel
    whole = make_permanent(copy.deepcopy(patient.model))
    for weight in prunable_weights(whole).values():
        weight.fill_(1)
    try:
        dead, always_dead = (dead_weights(model, (patient.inputs, None)) for model in (patient.model, whole))
    except RuntimeError:  # the model has numbers of one precision only
        return
    useful = {name: ~always_dead[name] & keep & (patient.weights[name] != 0) for name, keep in patient.masks.items()}
    lost = {name: _count(useful[name] & dead[name]) for name in useful}
    share = sum(lost.values()) / max(1, sum(map(_count, useful.values())))
    if share > 0.05:
        what = f"{{:,}} kept weights, {share:.0%}, have no effect on the outputs"
        call = "pu.dead_weights(model, data) names them; criterion='synflow' or scope='erk' leave fewer"
        yield from _found("warning" if share > 0.2 else "note", lost, what, call)


@checks
def pruned_classifier(patient: Patient) -> Iterator[Finding]:
    """Classes without a weight."""
    name = next(reversed(patient.weights), "")
    if name not in patient.masks or len(patient.weights) < 2:
        return
    silent = {name: _count(~patient.masks[name].flatten(1).any(1))}
    call = f"pu.prune(model, ..., exclude={layer_name(name)!r})"
    yield from _found("error", silent, "{} outputs of the last layer have no weight left", call)


def _found(severity: str, counts: dict[str, int], what: str, call: str) -> Iterator[Finding]:
    """Yield a finding about those parameters whose count is not zero, if any; the sum goes into the text at {}."""
    if names := [layer_name(name) or name for name, n in counts.items() if n]:
        where = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        yield Finding(severity, what.format(sum(counts.values())), where, call)


def _count(mask: torch.Tensor) -> int:
    return int(mask.count_nonzero())


# --- Weights without an effect ---------------------------------------------------------------------------------------


def dead_weights(model: nn.Module, inputs: object) -> dict[str, torch.Tensor]:
    """Find the kept weights that cannot have any effect on the output.

    No path of nonzero weights leads through them. As in SynFlow, the outputs' gradient is zero there, with positive
    random numbers for parameters, lines for activations, and means for max pooling. What passes only through
    comparisons, maxima, sorting or Python numbers is called dead too.

    Args:
        model: Any `nn.Module` with prunable layers that computes in the precision of its weights, here float64.
        inputs: A batch, or its inputs (N, ...); only the shape matters, and the values of whole numbers such as tokens.

    Returns:
        {parameter name: bool tensor of the weight's shape}, True = dead. Weights that are zero are never dead.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU6(), torch.nn.Linear(2, 1))
        >>> with torch.no_grad():
        ...     model[2].weight[0, 1] = 0  # nothing leaves the second hidden unit
        >>> pu.dead_weights(model, torch.zeros(1, 2))["0.weight"].tolist()
        [[False, False], [True, True]]
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(tensor):
        """Random numbers where the tensor is not zero; those that a unit reads add up to 1, so nothing overflows."""
        numbers = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).add_(0.5).to(tensor.device)
        numbers = numbers * (tensor.detach() != 0)
        return F.normalize(numbers.flatten(1), p=1).view_as(tensor) if tensor.ndim > 1 else numbers

    x, weights = inputs_of(inputs, model, most=1), prunable_weights(model)
    x = tree_map_only(torch.Tensor, lambda t: drawn(torch.ones_like(t)) if t.is_floating_point() else t, x)
    tensors = {name: b.double() if b.is_floating_point() else b for name, b in model.named_buffers()}
    tensors = {name: torch.ones_like(b) if name.endswith("running_var") else b for name, b in tensors.items()}
    parameters = {parameter: drawn(parameter).requires_grad_() for parameter in model.parameters()}
    tensors |= {name: parameters[p] for name, p in model.named_parameters(remove_duplicate=False)}
    with in_mode(model, training=False), own_random_state(device_of(model), 0), torch.enable_grad():
        with _NothingSaturates():
            run = lambda *args, **keywords: torch.func.functional_call(model, tensors, args, keywords)  # noqa: E731
            outputs = tree_leaves(forward(run, x))
        outputs = [out.double() for out in outputs if torch.is_tensor(out) and out.requires_grad]
        flow = sum((out * drawn(torch.ones_like(out))).sum() for out in outputs)
    gradients = torch.autograd.grad(flow, [parameters[w] for w in weights.values()], materialize_grads=True)
    return {name: (gradient == 0) & (weights[name] != 0) for name, gradient in zip(weights, gradients)}


_ACTIVATIONS = set(
    "relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish hardtanh hardswish hardsigmoid sigmoid tanh "
    "softplus logsigmoid softsign softshrink hardshrink tanhshrink threshold clamp clip abs float".split()
)


class _NothingSaturates(TorchFunctionMode):
    """Activations become linear, plus what they make of zero, and maxima over positions become means."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.__name__.strip("_")
        if name in _ACTIVATIONS or "max_pool" in name:
            x, *others = args or (kwargs.pop("input"),)
            if name in _ACTIVATIONS:
                slope = 0.5 + float(torch.rand(()))  # of its own, so that no two cancel each other
                return x * slope + func(torch.zeros_like(x), *others, **kwargs)
            if set(torch.tensor(kwargs.get("dilation", 1)).flatten().tolist()) == {1}:
                kwargs = {key: value for key, value in kwargs.items() if key not in ("dilation", "return_indices")}
                return getattr(F, name.replace("max", "avg"))(x, *others, **kwargs)
        return func(*args, **kwargs)
