"""How much a filter matters: one short function per measure. Higher score = keep, for every measure.

A measure is a function `(model, data) -> {weight name: one score a filter}`, registered by `@importance`. Beside `data`
it may name `loss_fn`, `seed`, `example_inputs` and options of its own. The built-in ones are those of Lubana and Dick
2021, "A gradient flow framework for analyzing network pruning", under the names and with the defaults of its code. w is
a weight, g the gradient of the loss of logits divided by a temperature T, and sums run over the weights of a filter.
"""

import inspect
from collections import deque
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import grad

from .._checks import is_pair, unknown, whole
from .._torch import batches, device_of, generator, in_mode
from ..model_utils import layer_name, prunable_weights
from . import criteria
from ._slicing import is_depthwise, kind_of_attention, removed_cuts, sliced

Importance = Callable[..., dict[str, torch.Tensor]]
_IMPORTANCES: dict[str, Importance] = {}


def importance(function: Importance) -> Importance:
    """Register a measure of filters under the name of its function.

    Args:
        function: `(model, data) -> {weight name: scores}`: one score a filter, shape (filters,), or one a weight, which
            are summed over each filter. High scores stay. It may also name `loss_fn`, `seed`, `example_inputs` and
            options of its own.

    Returns:
        The same function.

    Example:
        >>> @pu.importance
        ... def largest(model):
        ...     return {name: w.detach().flatten(1).abs().amax(1) for name, w in pu.prunable_weights(model).items()}
        >>> "largest" in pu.list_importances()
        True
    """
    _IMPORTANCES[function.__name__] = function
    return function


def list_importances() -> list[str]:
    """List the names of all registered measures of filters.

    Returns:
        The names, in the order in which they were registered.

    Example:
        >>> pu.list_importances()[:3]
        ['mag_based', 'l1', 'bn']
    """
    return list(_IMPORTANCES)


# --- The measures ----------------------------------------------------------------------------------------------------


@importance
def mag_based(model):
    """||w||, the L2 norm (Lubana and Dick 2021)."""
    return _summed(model, {name: w.detach().square() for name, w in filter_weights(model).items()}, torch.sqrt)


@importance
def l1(model):
    """sum |w|, the L1 norm (Li et al. 2017)."""
    return _summed(model, {name: w.detach().abs() for name, w in filter_weights(model).items()})


@importance
def bn(model, example_inputs):
    """|gamma|, the scale of the batch norm that follows (Liu et al. 2017); no score where none does."""
    return {name: norm.weight.detach().abs() for name, norm in batch_norms(model, example_inputs).items()}


@importance
def loss_based(model, data, loss_fn, T=5.0, n_samples=2560):
    """sum |w g|: SNIP, summed over the filter (Lee et al. 2019; Lubana and Dick 2021)."""
    return _summed(model, {name: (w * g).abs() for name, (w, g) in _gradients(model, data, loss_fn, T, n_samples)})


@importance
def biased_loss(model, data, loss_fn, T=5.0, n_samples=2560, use_l2=None, params_init=None):
    """sum |w| |w g|, or with weights from before training, sum |w - w0| |w g| (Lubana and Dick 2021).

    `params_init` is a model or state_dict; what `prune_filters` has removed since is left out of it. `use_l2` is True
    for the first form and False for the second; by default it is the second where there is a `params_init`.
    """
    factors = _bias(model, use_l2, params_init)
    gradients = _gradients(model, data, loss_fn, T, n_samples)
    return _summed(model, {name: factors[name] * (w * g).abs() for name, (w, g) in gradients})


@importance
def tfo(model, data, loss_fn, T=5.0, n_samples=2560):
    """|sum w g|: the first-order change of the loss without the filter (Molchanov et al. 2017)."""
    return _summed(model, {name: w * g for name, (w, g) in _gradients(model, data, loss_fn, T, n_samples)}, torch.abs)


@importance
def fisher(model, data, loss_fn, T=5.0, n_samples=2560):
    """sum w^2 F, with F the mean over batches of the squared gradient of the batch (Theis et al. 2018)."""
    weights = filter_weights(model)
    squares = _squared_gradients(model, weights, data, loss_fn, T, n_samples)
    return _summed(model, {name: weights[name].detach().square() * f for name, f in squares.items()})


@importance
def nvidia(model, data, loss_fn, example_inputs, T=5.0, n_samples=2560):
    """gamma^2 F + beta^2 F of the batch norm that follows (Molchanov et al. 2019); no score where none does."""
    norms = batch_norms(model, example_inputs)
    parts = {
        (n, part): getattr(norm, part).requires_grad_() for n, norm in norms.items() for part in ("weight", "bias")
    }
    squares = _squared_gradients(model, parts, data, loss_fn, T, n_samples)
    scores = {key: parts[key].detach().square() * f for key, f in squares.items()}
    return {name: scores[name, "weight"] + scores[name, "bias"] for name in norms}


@importance
def grasp(model, data, loss_fn, grasp_T=200.0, n_samples=2560):
    """sum w (H g), signed: without the lowest, the gradient norm rises most or falls least (Wang et al. 2020).

    As many samples of each class as `n_samples` allows. Unlike in the criterion "grasp", H and g are those of all
    parameters: batch norm, biases and the classifier have a part in H g.
    """
    return _summed(model, _flow(model, data, loss_fn, grasp_T, n_samples))


@importance
def grad_preserve(model, data, loss_fn, grasp_T=1.0, n_samples=2560):
    """|sum w (H g)|: how much the gradient norm changes without the filter (Lubana and Dick 2021)."""
    return _summed(model, _flow(model, data, loss_fn, grasp_T, n_samples), torch.abs)


@importance
def biased_loss_tracked(model, data, loss_fn, T=5.0, alpha=0.8, track_batches=20, use_l2=True, params_init=None):
    """biased_loss as a moving average over the last `track_batches` batches: alpha of the new, 1 - alpha of the old.

    Here over the batches of `data` in train mode, with the weights as they are; `track_importance` follows a training.
    """
    parts = deque(batches(data), maxlen=whole("track_batches", track_batches))
    weights, factors, device = filter_weights(model), _bias(model, use_l2, params_init), device_of(model)
    history = []
    with in_mode(model, training=True):
        for inputs, targets in parts:
            loss = loss_fn(model(inputs.to(device)) / T, targets.to(device))
            gradients = grad(loss, list(weights.values()), materialize_grads=True)
            history.append(biased(model, weights, dict(zip(weights, gradients)), factors))
    return averaged(history, alpha)


@importance
def random(model, seed):
    """U(0, 1) for each filter, whatever its size: the control."""
    drawn = generator(seed, "random")
    weights = filter_weights(model)
    return {name: torch.rand(len(_rows(model, name, w)), generator=drawn).to(w.device) for name, w in weights.items()}


# --- What they are made of -------------------------------------------------------------------------------------------


def filter_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return {weight name: weight} of all layers with filters, the projections of nn.MultiheadAttention included."""
    weights = prunable_weights(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and kind_of_attention(module):
            weights[f"{name}.in_proj_weight" if name else "in_proj_weight"] = module.in_proj_weight
    return weights


def batch_norms(model: nn.Module, inputs: torch.Tensor | None) -> dict[str, nn.Module]:
    """Return {weight name: the batch norm that reads what its layer gives}, found by one pass over `inputs`.

    Between the two there may be operations with one input, such as an activation.
    """
    if inputs is None:
        raise ValueError("a measure that reads batch norms needs example_inputs, to see which one follows a layer")
    outputs, found, hooks = {}, {}, []

    def gives(name):
        return lambda module, args, output: outputs.update({output.grad_fn: name})

    def reads(norm, args):
        node = args[0].grad_fn
        while node is not None and node not in outputs:
            before = [n for n, _ in node.next_functions if n is not None and "AccumulateGrad" not in n.name()]
            node = before[0] if len(before) == 1 else None
        if node is not None:
            found.setdefault(outputs[node], norm)

    for name in prunable_weights(model):
        hooks.append(model.get_submodule(layer_name(name)).register_forward_hook(gives(name)))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            hooks.append(module.register_forward_pre_hook(reads))
    try:
        with criteria._untouched(model, train_mode=False, seed=0):
            model(inputs.to(device_of(model)))
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise ValueError(f"{type(model).__name__} has no batch norm with a scale behind any layer: use another measure")
    return found


def biased(model, weights, gradients, factors) -> dict[str, torch.Tensor]:
    """Return sum |w g| times a factor a weight, for each filter."""
    return _summed(model, {name: factors[name] * (w.detach() * gradients[name]).abs() for name, w in weights.items()})


def averaged(history: list[dict[str, torch.Tensor]], alpha: float) -> dict[str, torch.Tensor]:
    """Return the moving average of scores, oldest first: alpha of the new, 1 - alpha of what was."""
    if not history:
        raise ValueError("nothing has been tracked yet: train first, or give data")
    total = history[0]
    for scores in history[1:]:
        total = {name: alpha * scores[name] + (1 - alpha) * old for name, old in total.items()}
    return total


def _summed(model, scores: Mapping[str, torch.Tensor], finish=lambda sums: sums) -> dict[str, torch.Tensor]:
    """Sum the scores of each filter, in float64."""
    return {name: finish(_rows(model, name, score).double().sum(1)) for name, score in scores.items()}


def _rows(model, name, tensor) -> torch.Tensor:
    """One row a filter; a transposed convolution stores its filters along the second dimension."""
    module = model.get_submodule(layer_name(name)) if name.endswith(".weight") or name == "weight" else None
    transposed = getattr(module, "transposed", False) and not is_depthwise(module)
    return (tensor.transpose(0, 1) if transposed else tensor).flatten(1)


def _gradients(model, data, loss_fn, T, n_samples):
    """(name, (weight, gradient of the mean loss over the samples)) of all filter weights."""
    samples = _some(data, n_samples)
    scaled = lambda out, targets: loss_fn(out / T, targets)  # noqa: E731
    return criteria._gradients(model, samples, scaled, filter_weights(model)).items()


def _squared_gradients(model, parameters: Mapping, data, loss_fn, T, n_samples) -> dict:
    """Mean over batches, by their sizes, of the squared gradient of each batch's mean loss."""
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for inputs, targets, share in criteria._shares(model, _some(data, n_samples)):
        gradients = grad(loss_fn(model(inputs) / T, targets), list(parameters.values()), materialize_grads=True)
        for name, g in zip(parameters, gradients):
            total[name] += share * g.square()
    return total


def _flow(model, data, loss_fn, T, n_samples) -> dict[str, torch.Tensor]:
    """w (H g) of all filter weights, every class with the same share."""
    weights = filter_weights(model)
    others = [p for p in model.parameters() if p.requires_grad and all(p is not w for w in weights.values())]
    device, classes = device_of(model), _classes(model, data, n_samples)
    parts = [(x.to(device), y.to(device), 1 / len(classes)) for x, y in classes]
    every = [*weights.values(), *others]
    products = criteria.hessian_gradient(model, every, parts, lambda out, targets: loss_fn(out / T, targets))
    return {name: w.detach() * h for (name, w), h in zip(weights.items(), products)}


def _some(data, n_samples) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of the first `n_samples` samples."""
    parts, left = [], whole("n_samples", n_samples)
    for inputs, targets in batches(data):
        parts.append((inputs[:left], targets[:left]))
        left -= len(parts[-1][1])
        if left <= 0:
            break
    if not sum(len(targets) for _, targets in parts):
        raise ValueError("data holds no sample")
    return parts


def _classes(model, data, n_samples) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A batch a class, of its first samples, equally many of each where there are enough."""
    found, each, n_classes = {}, 0, 0
    for inputs, targets in batches(data):
        if not found:
            with torch.no_grad():
                n_classes = model(inputs[:1].to(device_of(model))).shape[-1]
            each = max(1, whole("n_samples", n_samples) // n_classes)
        for c in targets.unique().tolist():
            before = found.get(c, inputs[:0])
            found[c] = torch.cat([before, inputs[targets == c][: each - len(before)]])
        if len(found) == n_classes and all(len(x) == each for x in found.values()):
            break
    if not found:
        raise ValueError("data holds no sample")
    return [(x, torch.full((len(x),), c)) for c, x in sorted(found.items())]


def _bias(model, use_l2, params_init) -> dict[str, torch.Tensor]:
    """|w| or |w - w0| of all filter weights; w0 loses the filters that the model has lost."""
    weights, factors = filter_weights(model), {}
    use_l2 = params_init is None if use_l2 is None else use_l2
    if use_l2:
        return {name: w.detach().abs() for name, w in weights.items()}
    if params_init is None:
        raise ValueError("use_l2=False needs params_init: the weights from before training, a model or a state_dict")
    state = params_init.state_dict() if isinstance(params_init, nn.Module) else params_init
    cuts = removed_cuts(model)
    for name, w in weights.items():
        if name not in state:
            raise ValueError(f"params_init has no {name!r}")
        first = state[name] if state[name].shape == w.shape else sliced(state[name], cuts.get(name, []))
        if first.shape != w.shape:
            raise ValueError(f"params_init: {name} has shape {tuple(first.shape)}, in the model {tuple(w.shape)}")
        factors[name] = (w.detach() - first.to(w)).abs()
    return factors


# --- Scoring without a trace -----------------------------------------------------------------------------------------


def filter_scores(
    model: nn.Module,
    importance: str | Importance = "mag_based",
    data: object = None,
    *,
    example_inputs: torch.Tensor | None = None,
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    seed: int = 0,
    **options: object,
) -> dict[str, torch.Tensor]:
    """Score the filters of a model and leave no trace in it.

    Args:
        model: Any `nn.Module` with convolution or linear layers.
        importance: A name from `list_importances()`; a function `(model, data) -> {weight name: scores}`; or the name
            of a criterion from `list_criteria()`, whose scores are summed over each filter.
        data: One (inputs, targets) batch or an iterable of them, for measures that need data.
        example_inputs: Inputs (N, ...), for measures that read batch norms; by default the first of `data`.
        loss_fn: `(outputs, targets) -> mean loss over the batch`; cross-entropy by default.
        seed: Seeds what the measure draws.
        **options: Options of the measure: T, grasp_T, n_samples, use_l2, params_init, alpha, track_batches.

    Returns:
        {weight name: one score a filter, shape (filters,)}, higher = keep. The filters of `nn.MultiheadAttention` are
        the rows of its "in_proj_weight".

    Raises:
        ValueError: For an unknown measure, missing data, and scores of another shape, NaN or infinite.
        TypeError: For an option that the measure does not have.

    Example:
        >>> model = pu.models.create("lenet5")
        >>> {name: tuple(scores.shape) for name, scores in pu.filter_scores(model, "l1").items()}
        {'conv1.weight': (20,), 'conv2.weight': (50,), 'fc1.weight': (500,), 'fc2.weight': (10,)}
    """
    if example_inputs is None and is_pair(data):
        example_inputs = data[0][:1]
    call, name = bind(importance, data, loss_fn, seed, example_inputs, options)
    weights = filter_weights(model)
    with criteria._untouched(model, train_mode=False, seed=seed):
        for p in model.parameters():  # put back with the rest
            p.requires_grad_(p.requires_grad or any(p is w for w in weights.values()))
        found = call(model)
    scores = {}
    for key, score in found.items():
        if key not in weights:
            continue
        n_filters = len(_rows(model, key, weights[key]))
        if score.shape == weights[key].shape and score.ndim > 1:
            score = _rows(model, key, score).double().sum(1)
        if score.shape != (n_filters,):
            raise ValueError(f"importance {name!r}: {key} has {n_filters} filters, its scores {tuple(score.shape)}")
        if bad := n_filters - int(torch.isfinite(score).count_nonzero()):
            raise ValueError(f"importance {name!r}: {bad} of {n_filters} scores of {key} are NaN or infinite")
        scores[key] = score.detach()
    return scores


def bind(importance, data, loss_fn, seed, example_inputs, options) -> tuple[Callable, str]:
    """Give a measure everything but the model; everything wrong with the arguments raises here."""
    if isinstance(importance, str) and importance not in _IMPORTANCES:
        if importance not in criteria.list_criteria():
            raise unknown("importance", importance, [*_IMPORTANCES, *criteria.list_criteria()])
        chosen = criteria.bind(importance, data, loss_fn, seed, options)
        return chosen.call, importance
    function = _IMPORTANCES[importance] if isinstance(importance, str) else importance
    if not callable(function):
        raise TypeError(f"an importance is a name or a callable (model, data) -> scores, not {importance!r}")
    name = getattr(function, "__name__", type(function).__name__)
    parameters = list(inspect.signature(function).parameters.values())[1:]  # without the model
    takes = [p.name for p in parameters]
    own = [t for t in takes if t not in ("data", "loss_fn", "seed", "example_inputs")]
    if foreign := sorted(set(options) - set(own)):
        raise TypeError(f"importance {name!r} has no option {', '.join(foreign)}; its own: {', '.join(own) or 'none'}")
    offered = dict(data=data, loss_fn=loss_fn or F.cross_entropy, seed=seed, example_inputs=example_inputs, **options)
    given = {key: value for key, value in offered.items() if key in takes}
    if (
        function not in _IMPORTANCES.values()
    ):  # a callable of the user's own gets its data by position, whatever its name
        given.pop("data", None)
        return lambda model: function(model, data, **given), name
    if missing := [p.name for p in parameters if p.default is p.empty and given.get(p.name) is None]:
        raise ValueError(f"importance {name!r} needs {' and '.join(missing)}")
    return lambda model: function(model, **given), name
