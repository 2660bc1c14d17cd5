"""How much a weight matters: one short function per criterion. Higher score = keep, for every criterion."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._checks import a_function, add_shapes_to_errors, choose, whole
from .._torch import all_finite, batches, full_float32, generator, hooked, in_mode, own_random_state
from ..target import is_transposed, prunable_weights
from ._twice import TwiceDifferentiable
from .linearising import Linearised

Scores = dict[str, torch.Tensor]
CRITERIA: dict[str, Callable[..., Scores]] = {}


def criterion(function: Callable[..., Scores]) -> Callable[..., Scores]:
    """Register a criterion under the name of its function.

    Args:
        function: `(model, ...) -> {parameter name: scores}` with a score for each prunable weight, in its shape; **high
            scores stay**. It names what it needs: `weights` ({parameter name: parameter}, all prunable ones), `data`
            (one batch or an iterable of batches), `loss_fn`, `seed`, or options of its own that `prune` hands on.

    Returns:
        The same function.

    Example:
        >>> @pu.criterion
        ... def distance(model, weights, value):
        ...     return {name: (weight - value).abs() for name, weight in weights.items()}
        >>> pu.prune(pu.models.create("lenet300"), "distance", sparsity=0.9, value=0.01).sparsity
        0.9
    """
    CRITERIA[function.__name__] = function
    return function


def list_criteria() -> list[str]:
    """List the names of all registered criteria.

    Returns:
        The names, in the order in which they were registered.

    Example:
        >>> pu.list_criteria()[:3]
        ['random', 'magnitude', 'lamp']
    """
    return list(CRITERIA)


# --- The criteria ----------------------------------------------------------------------------------------------------


@criterion
def random(model, weights, seed):
    """Uniform in [0, 1), drawn on the CPU so that every device gets the same masks."""
    # float64: 24-bit random numbers would tie by the hundred in a model of 25 million weights
    draw = functools.partial(torch.rand, generator=generator(seed, "random"), dtype=torch.float64)
    return {name: draw(weight.shape).to(weight.device) for name, weight in weights.items()}


@criterion
def magnitude(model, weights):
    """|w| (Han et al. 2015)."""
    return {name: weight.abs() for name, weight in weights.items()}


@criterion
def lamp(model, weights):
    """w^2 over the sum of the squares in its layer that are no smaller (Lee et al. 2021): the layers need no scope."""
    scores = {}
    for name, weight in weights.items():
        magnitudes, order = weight.detach().abs().flatten().sort(stable=True)
        squares = magnitudes.double().square()
        no_smaller = squares.flip(0).cumsum(0).flip(0).clamp(min=torch.finfo(torch.float64).tiny)
        scores[name] = torch.empty_like(squares).scatter_(0, order, squares / no_smaller).view(weight.shape)
    return scores


@criterion
def gradient(model, weights, data, loss_fn):
    """|g|, the magnitude of the gradient of the loss."""
    return {name: g.abs() for name, g in gradients(model, weights, data, loss_fn).items()}


@criterion
def snip(model, weights, data, loss_fn):
    """|w g|: how much the loss feels the weight's mask (Lee et al. 2019, without the common divisor)."""
    return {name: (weights[name] * g).abs() for name, g in gradients(model, weights, data, loss_fn).items()}


@criterion
def taylor(model, weights, data, loss_fn):
    """(w g)^2: first-order change of the loss without the weight, squared (Molchanov et al. 2019)."""
    # float64: the square of a product below 1e-23 is no float32
    found = gradients(model, weights, data, loss_fn)
    return {name: (weights[name] * g).double().square() for name, g in found.items()}


@criterion
def fisher(model, weights, data, loss_fn):
    """w^2 F with F the mean over samples of the squared gradient (diagonal empirical Fisher; Theis et al. 2018)."""
    samples = [(x[None], y[None]) for inputs, targets, _ in shares(data, weights) for x, y in zip(inputs, targets)]
    fisher = [torch.zeros_like(weight) for weight in weights.values()]
    for inputs, targets in samples:
        for total, g in zip(fisher, grad(loss_fn(model(inputs), targets), weights.values(), materialize_grads=True)):
            total += g.square() / len(samples)
    return {name: w.square() * f for (name, w), f in zip(weights.items(), fisher)}


@criterion
def grasp(model, weights, data, loss_fn, temperature=200.0, absolute=False):
    """w * (H g), from logits divided by `temperature`; `absolute`: its magnitude (Wang et al. 2020).

    H is the Hessian of the loss, g its gradient. The paper scores -w * (H g) and removes the highest.
    """
    parts = shares(data, weights)
    products = hessian_gradient(model, weights.values(), parts, lambda out, y: loss_fn(out / temperature, y))
    scores = {name: w * h for (name, w), h in zip(weights.items(), products)}
    return {name: score.abs() for name, score in scores.items()} if absolute else scores


def hessian_gradient(model, weights, parts, loss_fn) -> list[torch.Tensor]:
    """Compute H g for each weight; g is the gradient of the loss over all `parts` (inputs, targets, share)."""
    weights, parts = list(weights), list(parts)

    def gradients(inputs, targets, share, create_graph):
        loss = share * loss_fn(model(inputs), targets)
        return grad(loss, weights, create_graph=create_graph, materialize_grads=True)

    # the fused attention kernels have no second derivative
    with sdpa_kernel(SDPBackend.MATH), TwiceDifferentiable(weights):
        first = [gradients(*part, create_graph=len(parts) == 1) for part in parts]
        g, hg = [functools.reduce(torch.add, layers).detach() for layers in zip(*first)], None
        for part in parts:
            again = first[0] if len(parts) == 1 else gradients(*part, create_graph=True)
            graph = [(a, b) for a, b in zip(again, g) if a.requires_grad]  # a layer the loss ignores has none
            if graph:
                outputs, directions = zip(*graph)
                products = grad(outputs, weights, grad_outputs=directions, materialize_grads=True)
                hg = products if hg is None else [total + product for total, product in zip(hg, products)]
    return [torch.zeros_like(layer) for layer in g] if hg is None else list(hg)


@criterion
def synflow(model, weights, data):
    """|w dR/dw| of R = the sum of the outputs for ones as input and |w| as weights (Tanaka et al. 2020).

    `data` only gives the input's shape. R outgrows float32, hence float64. ReLU6 and the like are made linear.
    """
    inputs = data if torch.is_tensor(data) else next(iter(batches(data)))[0]
    if not inputs.is_floating_point() and any(isinstance(m, nn.Embedding | nn.EmbeddingBag) for m in model.modules()):
        way = "give it a module that starts behind the embedding, and a batch of what that takes"
        raise ValueError(f"synflow sends ones through, and {inputs.dtype} inputs are looked up in an embedding: {way}")
    ones = torch.ones_like(inputs[:1], dtype=torch.float64, device=_device(weights))
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    absolute = {id(tensor): _magnitude_in_float64(tensor.detach()) for _, tensor in named}
    tensors = {name: absolute[id(tensor)] for name, tensor in named}  # tied ones are one tensor here too
    magnitudes = {name: tensors[name].requires_grad_() for name in weights}
    model.eval()
    with Linearised():
        flow = torch.func.functional_call(model, tensors, (ones,)).sum()
    gradients = grad(flow, magnitudes.values(), materialize_grads=True)
    return {name: w.detach().mul_(g) for (name, w), g in zip(magnitudes.items(), gradients)}


def _magnitude_in_float64(tensor):
    """|tensor| as new float64 numbers; on a CPU in one pass, and into numpy's memory, whose pages are large."""
    if not tensor.is_floating_point():
        return tensor
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.float64):
        return tensor.double().abs_()
    memory = np.empty(tensor.numel() + 7)
    start = -memory.ctypes.data % 64 // 8  # aligned as torch's: how matrix products are rounded can depend on that
    magnitude = memory[start : start + tensor.numel()].reshape(tensor.shape)
    return torch.from_numpy(np.abs(tensor.numpy(), out=magnitude))


@criterion
def wanda(model, weights, data):
    """|w| times the L2 norm of the input channel it reads, over samples and positions (Sun et al. 2023)."""
    squares, modules = {}, {}

    def listen(name, channel, module, args):
        values = args[0].detach().movedim(channel, 0).flatten(1)
        squares[name] = squares.get(name, 0) + values.square().sum(1)

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name in weights:
            module = modules[name] = model.get_submodule(name.rpartition(".")[0])
            if getattr(module, "weight", None) is weights[name]:  # not one of several, such as those of an attention
                channel = 1 if isinstance(module, nn.modules.conv._ConvNd) else -1
                hooks.enter_context(hooked([module], functools.partial(listen, name, channel)))
        for inputs, _, _ in shares(data, weights):
            model(inputs)
    return {name: _per_weight(modules[name], square.sqrt()) * weights[name].abs() for name, square in squares.items()}


def _per_weight(module, norms):
    """Norms per input channel (I,), in a shape that broadcasts against the weight that reads them."""
    weight, groups = module.weight, getattr(module, "groups", 1)
    if is_transposed(module):  # (I, O / groups, ...)
        per_row = norms[:, None]
    else:  # (O, I / groups, ...): the rows of a group read its own block of channels
        per_row = norms.view(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
    return per_row.reshape(per_row.shape + (1,) * (weight.ndim - 2))


@criterion
def movement(model, weights, reference):
    """w (w - w0): the movement of Sanh et al. 2020 for one step from w0, of the model or state_dict `reference`."""
    reference = reference.state_dict() if isinstance(reference, nn.Module) else reference
    for name, weight in weights.items():
        if name not in reference or reference[name].shape != weight.shape:
            raise ValueError(f"reference has no {name!r} of shape {tuple(weight.shape)}")
    return {name: weight * (weight - reference[name].to(weight)) for name, weight in weights.items()}


def gradients(model, weights, data, loss_fn) -> Scores:
    """Compute {name: gradient of the mean loss over all samples of `data`} of these weights."""
    total = None
    for inputs, targets, share in shares(data, weights):
        with add_shapes_to_errors(inputs, targets):
            loss = share * loss_fn(model(inputs), targets)
        part = grad(loss, weights.values(), materialize_grads=True)
        total = part if total is None else [a + b for a, b in zip(total, part)]
    return dict(zip(weights, total))


def shares(data, weights) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """Return the batches of `data`, each with its share of all samples, on the device of the weights."""
    device = _device(weights)
    parts = [(inputs.to(device), targets.to(device)) for inputs, targets in batches(data)]
    total = sum(len(targets) for _, targets in parts)
    if total == 0:
        raise ValueError("data holds no sample")
    return [(inputs, targets, len(targets) / total) for inputs, targets in parts]


def _device(weights) -> torch.device:
    return next(iter(weights.values())).device


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
        loss_fn, seed, exclude, train_mode, options: As for `prune`.

    Returns:
        {parameter name: tensor of the weight's shape}, higher = keep.

    Raises:
        ValueError: For an unknown name, missing data, and scores that are missing, of another shape, NaN or infinite.

    Example:
        >>> list(pu.scores(pu.models.create("lenet300"), "magnitude"))
        ['fc1.weight', 'fc2.weight', 'fc3.weight']
    """
    chosen = bind(criterion, data, loss_fn, seed, options, prunable_weights(model))
    return score(model, chosen, prunable_weights(model, exclude), train_mode, seed)


@dataclass(frozen=True)
class Bound:
    """A criterion with all of its arguments but the model."""

    name: str
    function: Callable[..., Scores]
    call: Callable[[nn.Module], Scores]
    weights: Mapping[str, nn.Parameter] | None  # all prunable ones, if they are known already


def bind(criterion, data, loss_fn, seed, options, weights=None, known=None, **offered) -> Bound:
    """Give a criterion everything but the model; everything wrong with the arguments raises here.

    What is `offered` goes in by name; data by position to a function neither `known` nor naming `weights`.
    """
    known = CRITERIA if known is None else known
    if not callable(criterion) and not isinstance(criterion, str):
        raise TypeError(f"criterion must be a name or a callable (model, data) -> scores, not {criterion!r:.80}")
    function = choose("criterion", criterion, known)
    a_function("loss_fn", loss_fn)
    name = criterion if isinstance(criterion, str) else getattr(function, "__name__", type(function).__name__)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    takes = [p.name for p in parameters]
    any_option = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not any_option and (foreign := sorted(set(options) - set(takes))):
        own = ", ".join(takes) or "none"
        raise TypeError(f"criterion {name!r} has no option {', '.join(foreign)}; its own: {own}")
    offered |= dict(loss_fn=loss_fn or F.cross_entropy, seed=whole("seed", seed, least=0), **options)
    given = {key: value for key, value in offered.items() if key in takes or key in options}
    by_name = function in known.values() or "weights" in takes
    if by_name and "data" in takes:
        given["data"] = data
    required = [p.name for p in parameters if p.default is p.empty and p.name != "weights"]
    if by_name and (missing := [each for each in required if given.get(each) is None]):
        raise ValueError(f"criterion {name!r} needs {' and '.join(missing)}")

    def call(model):
        if "weights" in takes:
            given["weights"] = prunable_weights(model) if weights is None else weights
        return function(model, **given) if by_name else function(model, data, **given)

    return Bound(name, function, call, weights)


def score(model: nn.Module, chosen: Bound, weights: Mapping[str, nn.Parameter], train_mode: bool, seed: int) -> Scores:
    """Score these weights by a criterion, and check what comes back."""
    every = prunable_weights(model) if chosen.weights is None else chosen.weights
    with untouched(model, train_mode, seed, every.values()):
        return _checked(chosen.call(model), weights, chosen.name)


@contextlib.contextmanager
def untouched(
    model: nn.Module, train_mode: bool = False, seed: int = 0, differentiable: Iterable[nn.Parameter] = ()
) -> Iterator[None]:
    """Eval (or train) mode, fresh gradients and a random state of its own inside; everything as it was afterwards."""
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    device = parameters[0][0].device if parameters else torch.device("cpu")
    with own_random_state(device, seed), full_float32(), in_mode(model, train_mode), torch.enable_grad():
        try:
            for p, _, _ in parameters:
                p.grad = None
            for p in differentiable:
                p.requires_grad_()
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
