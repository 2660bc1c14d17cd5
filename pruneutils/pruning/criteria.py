"""How much a weight matters: one short function per criterion. Higher score = keep, for every criterion.

A criterion is a function `(model, data) -> {parameter name: scores of the weight's shape}`. The built-in ones are
registered by `@criterion`; beside `data` they may name `loss_fn`, `seed` and options of their own, and `scores` hands
over what they name. They run in eval mode with all prunable weights differentiable; what they touch is put back.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._checks import a_function, a_seed, inputs_told, unknown
from .._prunable import is_transposed, module_of
from .._torch import all_finite, batches, device_of, full_float32, generator, in_mode, own_random_state
from ..model_utils import prunable_weights
from ._twice import TwiceDifferentiable
from .linearising import Linearised

Scores = dict[str, torch.Tensor]
_CRITERIA: dict[str, Callable[..., Scores]] = {}


def criterion(function: Callable[..., Scores]) -> Callable[..., Scores]:
    """Register a criterion under the name of its function.

    Args:
        function: `(model, ...) -> {parameter name: scores}` with a score for each prunable weight, in the weight's
            shape; **high scores stay**. It names what it needs beyond the model: `data` (one batch or an iterable of
            batches), `loss_fn`, `seed`, or options of its own, which `prune` and `scores` hand on.

    Returns:
        The same function.

    Example:
        >>> @pu.criterion
        ... def distance(model, reference):
        ...     return {name: (w - reference[name]).abs() for name, w in pu.prunable_weights(model).items()}
        >>> model, start = (pu.models.create("lenet300", seed=seed) for seed in (1, 0))
        >>> pu.prune(model, "distance", sparsity=0.9, reference=start.state_dict()).sparsity
        0.9
    """
    _CRITERIA[function.__name__] = function
    return function


def list_criteria() -> list[str]:
    """List the names of all registered criteria.

    Returns:
        The names, in the order in which they were registered.

    Example:
        >>> pu.list_criteria()[:3]
        ['random', 'magnitude', 'lamp']
    """
    return list(_CRITERIA)


# --- The criteria ----------------------------------------------------------------------------------------------------


@criterion
def random(model, seed):
    """Uniform in [0, 1), drawn on the CPU so that every device gets the same masks."""
    drawn = generator(seed, "random")
    # float64: 24-bit random numbers would tie by the hundred in a model of 25 million weights
    return {
        name: torch.rand(weight.shape, generator=drawn, dtype=torch.float64).to(weight.device)
        for name, weight in prunable_weights(model).items()
    }


@criterion
def magnitude(model):
    """|w| (Han et al. 2015)."""
    return {name: weight.abs() for name, weight in prunable_weights(model).items()}


@criterion
def lamp(model):
    """w^2 over the sum of the squares in its layer that are no smaller (Lee et al. 2021): the layers need no scope.

    Equal magnitudes in a layer are ordered by position. The largest weight of every layer scores 1.
    """
    scores = {}
    for name, weight in prunable_weights(model).items():
        squares, order = weight.detach().double().square().flatten().sort(stable=True)
        no_smaller = squares.flip(0).cumsum(0).flip(0).clamp(min=torch.finfo(torch.float64).tiny)
        scores[name] = torch.empty_like(squares).scatter_(0, order, squares / no_smaller).view(weight.shape)
    return scores


@criterion
def gradient(model, data, loss_fn):
    """|g|, the magnitude of the gradient of the loss."""
    return {name: g.abs() for name, (_, g) in _gradients(model, data, loss_fn).items()}


@criterion
def snip(model, data, loss_fn):
    """|w g|: how much the loss feels the weight's mask (Lee et al. 2019, without the common divisor)."""
    return {name: (w * g).abs() for name, (w, g) in _gradients(model, data, loss_fn).items()}


@criterion
def taylor(model, data, loss_fn):
    """(w g)^2: first-order change of the loss without the weight, squared (Molchanov et al. 2019)."""
    # float64: the square of a product below 1e-23 is no float32
    return {name: (w * g).double().square() for name, (w, g) in _gradients(model, data, loss_fn).items()}


@criterion
def fisher(model, data, loss_fn):
    """w^2 F with F the mean over samples of the squared gradient (diagonal empirical Fisher; Theis et al. 2018)."""
    weights = prunable_weights(model)
    samples = [(x[None], y[None]) for inputs, targets, _ in _shares(model, data) for x, y in zip(inputs, targets)]
    fisher = [torch.zeros_like(weight) for weight in weights.values()]
    for inputs, targets in samples:
        gradients = grad(loss_fn(model(inputs), targets), weights.values(), materialize_grads=True)
        for total, g in zip(fisher, gradients):
            total += g.square() / len(samples)
    return {name: w.square() * f for (name, w), f in zip(weights.items(), fisher)}


@criterion
def grasp(model, data, loss_fn, temperature=200.0, absolute=False):
    """w * (H g), from logits divided by `temperature`; `absolute`: its magnitude (Wang et al. 2020).

    The paper scores -w * (H g) and removes the highest: removing these raises the gradient norm most, or lowers it
    least. Here the sign is turned, so that high is kept as everywhere. H is the Hessian of the loss with respect to
    the prunable weights, g the gradient; one graph serves both, which is exact and a quarter cheaper than two.
    """
    weights = prunable_weights(model)
    parts = _shares(model, data)
    products = hessian_gradient(model, weights.values(), parts, lambda out, y: loss_fn(out / temperature, y))
    scores = {name: w * h for (name, w), h in zip(weights.items(), products)}
    return {name: score.abs() for name, score in scores.items()} if absolute else scores


def hessian_gradient(model, weights, parts, loss_fn) -> list[torch.Tensor]:
    """Compute H g for each weight; g is the gradient of the loss over all `parts` (inputs, targets, share)."""
    weights, parts = list(weights), list(parts)

    def gradients(inputs, targets, share, create_graph):
        loss = share * loss_fn(model(inputs), targets)
        return grad(loss, weights, create_graph=create_graph, materialize_grads=True)

    with (
        sdpa_kernel(SDPBackend.MATH),
        TwiceDifferentiable(weights),
    ):  # the fused attention kernels have no second derivative
        first = [gradients(*part, create_graph=len(parts) == 1) for part in parts]
        g, hg = [_sum(layers).detach() for layers in zip(*first)], None
        for part in parts:
            again = first[0] if len(parts) == 1 else gradients(*part, create_graph=True)
            graph = [(a, b) for a, b in zip(again, g) if a.requires_grad]  # a layer the loss ignores has none
            if graph:
                outputs, directions = zip(*graph)
                products = grad(outputs, weights, grad_outputs=directions, materialize_grads=True)
                hg = products if hg is None else [total + product for total, product in zip(hg, products)]
    return [torch.zeros_like(layer) for layer in g] if hg is None else list(hg)


def _sum(tensors):
    return sum(tensors[1:], tensors[0])  # not from 0: to add that takes a copy


@criterion
def synflow(model, data):
    """|w dR/dw| of R = the sum of the outputs for ones as input and |w| as weights (Tanaka et al. 2020).

    Data-free: `data` (a batch, or just its inputs) only tells the input's shape. All in float64, since R grows with
    depth beyond float32 (about 1e70 for ResNet-56), and in eval mode, since batch statistics of one image are void.
    Activations that saturate, such as ReLU6, are made linear: the theory is about those that let all flow through.
    """
    return {name: weight.mul_(g) for name, (weight, g) in _flow_gradients(model, data).items()}


def _flow_gradients(model, data) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{parameter name: (|w|, dR/d|w|)}, R as in `synflow`."""
    inputs = data if torch.is_tensor(data) else next(iter(batches(data)))[0]
    if not inputs.is_floating_point() and any(isinstance(m, nn.Embedding | nn.EmbeddingBag) for m in model.modules()):
        raise ValueError(
            f"synflow sends ones through the network, and {inputs.dtype} inputs are looked up in an embedding: give it "
            "a module that starts behind the embedding, and a batch of what that takes"
        )
    ones = torch.ones_like(inputs[:1], dtype=torch.float64, device=device_of(model))
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    absolute = {
        id(tensor): _magnitude_in_float64(tensor.detach()) if tensor.is_floating_point() else tensor
        for _, tensor in named
    }
    tensors = {name: absolute[id(tensor)] for name, tensor in named}  # tied ones are one tensor here too
    weights = {name: tensors[name].requires_grad_() for name in prunable_weights(model)}
    model.eval()
    with Linearised():
        flow = torch.func.functional_call(model, tensors, (ones,)).sum()
    gradients = grad(flow, weights.values(), materialize_grads=True)
    return {name: (w.detach(), g) for (name, w), g in zip(weights.items(), gradients)}


def _magnitude_in_float64(tensor):
    """|tensor| as new float64 numbers; on a CPU in one pass, and into numpy's memory, whose pages are large.

    It begins at a multiple of 64 bytes, as torch's does: how matrix products are rounded can depend on that.
    """
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.float64):
        return tensor.double().abs_()
    memory = np.empty(tensor.numel() + 7)
    start = -memory.ctypes.data % 64 // 8
    magnitude = memory[start : start + tensor.numel()].reshape(tensor.shape)
    return torch.from_numpy(np.abs(tensor.numpy(), out=magnitude))


@criterion
def wanda(model, data):
    """|w| times the L2 norm of the input channel it reads, over samples and positions (Sun et al. 2023)."""
    squares, hooks = {}, []

    def listen(name, channel):
        def hook(module, args):
            values = args[0].detach().movedim(channel, 0).flatten(1)
            squares[name] = squares.get(name, 0) + values.square().sum(1)

        return hook

    weights = prunable_weights(model)
    try:
        for name in weights:
            module = module_of(model, name)
            if getattr(module, "weight", None) is not weights[name]:
                continue  # of several inputs, such as those of an attention
            channel = 1 if isinstance(module, nn.modules.conv._ConvNd) else -1
            hooks.append(module.register_forward_pre_hook(listen(name, channel)))
        with torch.no_grad():
            for inputs, _, _ in _shares(model, data):
                model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _per_weight(model, name, square.sqrt()) * weights[name].abs() for name, square in squares.items()}


def _per_weight(model, name, norms):
    """Norms per input channel (I,), in a shape that broadcasts against the weight that reads them."""
    module = module_of(model, name)
    weight, groups = module.weight, getattr(module, "groups", 1)
    if is_transposed(model, name):  # (I, O / groups, ...)
        per_row = norms[:, None]
    else:  # (O, I / groups, ...): the rows of a group read its own block of channels
        per_row = norms.view(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
    return per_row.reshape(per_row.shape + (1,) * (weight.ndim - 2))


@criterion
def movement(model, reference):
    """w (w - w0): how far training has moved the weight away from zero since `reference` (Sanh et al. 2020).

    `reference` is an earlier model or state_dict. The paper adds up -lr w g over training; this is its value for the
    way from w0 to w taken as one step.
    """
    reference = reference.state_dict() if isinstance(reference, nn.Module) else reference
    weights = prunable_weights(model)
    for name, weight in weights.items():
        if name not in reference or reference[name].shape != weight.shape:
            raise ValueError(f"reference has no {name!r} of shape {tuple(weight.shape)}")
    return {name: weight * (weight - reference[name].to(weight)) for name, weight in weights.items()}


def _gradients(model, data, loss_fn, weights=None) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{parameter name: (weight, gradient of the mean loss over all samples of `data`)}."""
    weights, total = weights or prunable_weights(model), None
    for inputs, targets, share in _shares(model, data):
        with inputs_told(inputs, targets):
            loss = share * loss_fn(model(inputs), targets)
        part = grad(loss, weights.values(), materialize_grads=True)
        total = part if total is None else [a + b for a, b in zip(total, part)]
    return {name: (weight, g) for (name, weight), g in zip(weights.items(), total)}


def _shares(model, data) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """The batches of `data` on the model's device, each with its share of all samples; ValueError if there are none."""
    device = device_of(model)
    parts = [(inputs.to(device), targets.to(device)) for inputs, targets in batches(data)]
    total = sum(len(targets) for _, targets in parts)
    if total == 0:
        raise ValueError("data holds no sample")
    return [(inputs, targets, len(targets) / total) for inputs, targets in parts]


# --- Scoring without a trace -----------------------------------------------------------------------------------------


def scores(
    model: nn.Module,
    criterion: str | Callable[..., Scores] = "magnitude",
    data: object = None,
    *,
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    seed: int = 0,
    exclude: str | Iterable[str] = (),
    train_mode: bool = False,
    **options: object,
) -> Scores:
    """Score the prunable weights of a model and leave no trace in it.

    Args:
        model: Any `nn.Module` with convolution or linear layers.
        criterion: A name from `list_criteria()`, or a function `(model, data) -> {parameter name: scores}`.
        data: One (inputs, targets) batch or an iterable of them, which count as one large batch.
        loss_fn: `(outputs, targets) -> mean loss over the batch`; cross-entropy by default.
        seed: Seeds what the criterion draws.
        exclude: Names or globs of layers to leave out.
        train_mode: Whether to score with batch statistics and dropout, drawn from `seed`.
        **options: What the criterion takes beyond that, such as `temperature`, `absolute` or `reference`.

    Returns:
        {parameter name: tensor of the weight's shape}, higher = keep.

    Raises:
        ValueError: For an unknown criterion, missing data, and scores that are missing, of another shape, NaN or
            infinite.
        TypeError: For an option that the criterion does not have.

    Example:
        >>> model = pu.models.create("lenet300")
        >>> train, test = pu.data.load("digits")
        >>> {name: tuple(score.shape) for name, score in pu.scores(model, "snip", train.batch(100)).items()}
        {'fc1.weight': (300, 784), 'fc2.weight': (100, 300), 'fc3.weight': (10, 100)}
    """
    chosen = bind(criterion, data, loss_fn, seed, options)
    return score(model, chosen, prunable_weights(model, exclude), train_mode, seed)


@dataclass(frozen=True)
class Bound:
    """A criterion with all of its arguments but the model."""

    name: str
    function: Callable[..., Scores]
    call: Callable[[nn.Module], Scores]


def bind(criterion, data, loss_fn, seed, options) -> Bound:
    """Give a criterion everything but the model; everything wrong with the arguments raises here."""
    if isinstance(criterion, str) and criterion not in _CRITERIA:
        raise unknown("criterion", criterion, _CRITERIA)
    function = _CRITERIA[criterion] if isinstance(criterion, str) else criterion
    if not callable(function):
        way = f"; is sparsity={criterion!r} meant?" if isinstance(criterion, Real) else ""
        raise TypeError(f"criterion must be a name or a callable (model, data) -> scores, not {criterion!r:.80}{way}")
    a_function("loss_fn", loss_fn)
    name = getattr(function, "__name__", type(function).__name__)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    takes = [p.name for p in parameters]
    any_option = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not any_option and (foreign := sorted(set(options) - set(takes))):
        way = "; how much goes is called sparsity" if {"amount", "ratio", "fraction"} & set(foreign) else ""
        own = f"its own: {', '.join(takes) or 'none'}{way}"
        raise TypeError(f"criterion {name!r} has no option {', '.join(foreign)}; {own}")
    offered = dict(loss_fn=loss_fn or F.cross_entropy, seed=a_seed(seed), **options)
    given = {key: value for key, value in offered.items() if key in takes or key in options}
    if function not in _CRITERIA.values():  # a callable of the user's own gets its data by position, whatever its name
        return Bound(name, function, lambda model: function(model, data, **given))
    if "data" in takes:
        given["data"] = data
    if missing := [p.name for p in parameters if p.default is p.empty and given.get(p.name) is None]:
        raise ValueError(f"criterion {name!r} needs {' and '.join(missing)}")
    return Bound(name, function, lambda model: function(model, **given))


def score(model: nn.Module, chosen: Bound, weights: Mapping[str, nn.Parameter], train_mode: bool, seed: int) -> Scores:
    """Score these weights by a criterion, and check what comes back."""
    with _untouched(model, train_mode, seed):
        return _checked(chosen.call(model), weights, chosen.name)


@contextlib.contextmanager
def _untouched(model: nn.Module, train_mode: bool, seed: int) -> Iterator[None]:
    """Eval (or train) mode, fresh gradients and a random state of its own inside; everything as it was afterwards."""
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with own_random_state(device_of(model), seed), full_float32(), in_mode(model, train_mode), torch.enable_grad():
        try:
            for p, _, _ in parameters:
                p.grad = None
            for weight in prunable_weights(model).values():
                weight.requires_grad_()
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for p, requires_grad, gradient in parameters:
                p.requires_grad_(requires_grad).grad = gradient


def _checked(result: Scores, weights: dict[str, nn.Parameter], name: str) -> Scores:
    """The scores of `weights` alone, detached; ValueError where one is missing, of another shape, NaN or infinite."""
    for key, weight in weights.items():
        if key not in result:
            raise ValueError(f"criterion {name!r} gives no scores for {key}; exclude that layer")
        score = result[key]
        if score.shape != weight.shape:
            raise ValueError(f"criterion {name!r}: {key} has shape {tuple(weight.shape)}, scores {tuple(score.shape)}")
        if not all_finite(score):
            bad = score.numel() - int(torch.isfinite(score).count_nonzero())
            raise ValueError(f"criterion {name!r}: {bad} of {score.numel()} scores of {key} are NaN or infinite")
    return {key: result[key].detach() for key in weights}
