"""How much a weight matters: one short function per criterion. Higher score = keep, for every criterion."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.autograd import grad
from torch.utils._pytree import tree_leaves, tree_map_only

from .. import _torch
from .._checks import a_function, choose, whole
from .._evaluation import cross_entropy
from .._torch import all_finite, batches, full_float32, generator, hooked, in_mode, own_random_state
from ..target import is_transposed, prunable_weights
from .gradients import Scores, gradients, hessian_gradient, loss_of, n_counted, shares
from .linearising import Linearised

CRITERIA: dict[str, Callable[..., Scores]] = {}
_SHORT = torch.float16, torch.bfloat16


def criterion(function: Callable[..., Scores]) -> Callable[..., Scores]:
    """Register a criterion under the name of its function.

    Args:
        function: `(model, ...) -> {parameter name: scores}`, in the shapes of the prunable weights; **high scores
            stay**. It names what it needs: `weights` ({parameter name: parameter}), `data` (a batch or an iterable of
            batches), `loss_fn`, `seed`, or options of its own that `prune` hands on.

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


@criterion
def random(model, weights, seed):
    """Uniform in [0, 1), drawn on the CPU so that every device gets the same masks."""
    drawn = generator(seed, "random")  # float64: 24-bit numbers would tie by the hundred among 25 million weights
    return {name: torch.rand(w.shape, generator=drawn, dtype=torch.float64).to(w.device) for name, w in weights.items()}


@criterion
def magnitude(model, weights):
    """|w| (Han et al. 2015)."""
    return {name: weight.abs() for name, weight in weights.items()}


@criterion
def lamp(model, weights):
    """w^2 over the sum of the squares in its layer that are no smaller (Lee et al. 2021): the layers need no scope.

    In layers of more than 2**18 weights, a CPU interpolates the sum, to 1 % of it but for the largest hundredth.
    """
    scores = {}
    for name, weight in weights.items():
        if weight.device.type == "cpu" and weight.numel() > 2**18:  # sorting would take ten times as long
            scores[name] = _lamp_by_bins(weight.detach().flatten()).view(weight.shape)
            continue
        magnitudes, order = weight.detach().abs().flatten().sort(stable=True)
        squares = magnitudes.double().square()
        no_smaller = squares.flip(0).cumsum(0).flip(0).clamp(min=torch.finfo(torch.float64).tiny)
        scores[name] = torch.empty_like(squares).scatter_(0, order, squares / no_smaller).view(weight.shape)
    return scores


def _lamp_by_bins(weights):
    """Sum the squares in 2**16 bins by the first bits of a float32; inside of one, the sum falls evenly with w^2."""
    parts, scores = weights.split(2**17), torch.empty_like(weights)  # parts that stay in a cache
    bins_of = lambda part: part.abs().float().view(torch.int32) >> 15  # noqa: E731
    sums = sum(torch.bincount(bins_of(part), part.double().square(), minlength=2**16) for part in parts)
    edges = torch.arange(2**16 + 1).mul_(2**15).int().view(torch.float32).double().square()
    slopes = sums / (edges[1:] - edges[:-1])
    at_zero = sums.flip(0).cumsum(0).flip(0) + slopes * edges[:-1]
    for part, score in zip(parts, scores.split(2**17)):
        squares, bins = part.double().square(), bins_of(part)
        no_smaller = torch.maximum(at_zero[bins] - slopes[bins] * squares, squares)
        score.copy_(squares / no_smaller.clamp_(min=torch.finfo(torch.float64).tiny))
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
    return {name: score.double().square() for name, score in snip(model, weights, data, loss_fn).items()}


@criterion
def fisher(model, weights, data, loss_fn):
    """w^2 F with F the mean over samples of the squared gradient (diagonal empirical Fisher; Theis et al. 2018)."""
    fisher, n = [torch.zeros_like(weight) for weight in weights.values()], 0
    for inputs, targets, _ in shares(data, weights):
        for i in (i for i, own in enumerate(targets) if n_counted(own)):
            loss = loss_of(model, _torch.take(inputs, slice(i, i + 1)), targets[i : i + 1], loss_fn)
            for total, g in zip(fisher, grad(loss, weights.values(), materialize_grads=True)):
                total += g.square()
            n += 1
    return {name: w.square() * (f / n) for (name, w), f in zip(weights.items(), fisher)}


@criterion
def grasp(model, weights, data, loss_fn, temperature=200.0, absolute=False):
    """w * (H g), from logits divided by `temperature`; `absolute`: its magnitude (Wang et al. 2020).

    H is the Hessian of the loss, g its gradient. The paper scores -w * (H g) and removes the highest.
    """
    parts = shares(data, weights)
    products = hessian_gradient(model, weights.values(), parts, lambda out, y: loss_fn(out / temperature, y))
    scores = {name: w * h for (name, w), h in zip(weights.items(), products)}
    return {name: score.abs() for name, score in scores.items()} if absolute else scores


@criterion
def synflow(model, weights, data):
    """|w dR/dw| of R = the sum of the outputs for ones as input and |w| as weights (Tanaka et al. 2020).

    `data` only gives the input's shape. R outgrows float32, hence float64. ReLU6 and the like are made linear.
    """
    inputs = _torch.inputs_of(data, model, most=1)
    numbers = any(torch.is_tensor(x) and x.is_floating_point() for x in tree_leaves(inputs))

    def ones(tensor):
        return torch.ones_like(tensor, dtype=torch.float64) if tensor.is_floating_point() or not numbers else tensor

    def in_float64(*args, **keywords):
        return torch.func.functional_call(model, tensors, args, keywords)

    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    magnitudes = {id(tensor): _magnitude_in_float64(tensor.detach()) for _, tensor in named}
    tensors = {name: magnitudes[id(tensor)] for name, tensor in named}  # tied ones are one tensor here too
    absolute = {name: tensors[name].requires_grad_() for name in weights}
    model.eval()
    try:
        with Linearised():
            flow = _torch.forward(in_float64, tree_map_only(torch.Tensor, ones, inputs)).sum()
    except RuntimeError as error:
        if "double" not in str(error).lower():
            raise
        way = "make tensors inside in the type of what layers read (dtype=x.dtype), or begin behind the embedding"
        raise ValueError(f"synflow sends ones in float64 through, which do not fit here ({error}): {way}") from error
    found = grad(flow, absolute.values(), materialize_grads=True)
    return {name: w.detach().mul_(g) for (name, w), g in zip(absolute.items(), found)}


def _magnitude_in_float64(tensor):
    """|tensor| as new float64 numbers; on a CPU in one pass, and into numpy's memory, whose pages are large."""
    if not tensor.is_floating_point():
        return tensor
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.float64):
        return tensor.to(torch.float64, copy=True).abs_()
    memory = np.empty(tensor.numel() + 7)
    start = -memory.ctypes.data % 64 // 8  # aligned as torch's: how matrix products are rounded can depend on that
    magnitude = memory[start : start + tensor.numel()].reshape(tensor.shape)
    return torch.from_numpy(np.abs(tensor.numpy(), out=magnitude))


@criterion
def wanda(model, weights, data):
    """|w| times the L2 norm of the input channel it reads, over samples and positions (Sun et al. 2023).

    In the paper the weights of each output compete with each other, which is `scope="output"`. Positions that an
    "attention_mask" pads do not count. Embeddings read no numbers, bilinear layers two inputs: they get no scores.
    """
    modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in weights}
    others = nn.Embedding, nn.EmbeddingBag, nn.Bilinear  # and one weight of several, such as those of an attention
    names = {m: name for name, m in modules.items() if getattr(m, "weight", None) is weights[name]}
    names = {m: name for m, name in names.items() if not isinstance(m, others)}
    squares, inputs = {}, None

    def listen(module, args):
        channel = 1 if isinstance(module, nn.modules.conv._ConvNd) else -1
        values = torch.atleast_2d(_torch.tokens_only(args[0].detach(), inputs, channel))
        if values.numel():
            values = values if values.dtype == torch.float64 else values.float()
            total = values.square().sum(tuple(range(values.ndim - 1))).double()
            squares[names[module]] = squares.get(names[module], 0) + total

    with hooked(names, listen), torch.no_grad():
        for each, _ in batches(data, targets=False):
            inputs = _torch.to_device(each, next(iter(weights.values())).device)
            _torch.forward(model, inputs)
    if inputs is None:
        raise ValueError("data holds no sample")
    norms = {name: _per_weight(modules[name], square.sqrt().to(weights[name])) for name, square in squares.items()}
    return {name: norm * weights[name].abs() for name, norm in norms.items()}


def _per_weight(module, norms):
    """Norms per input channel (I,), in a shape that broadcasts against the weight that reads them."""
    weight, groups = module.weight, getattr(module, "groups", 1)
    if is_transposed(module):  # (I, O / groups, ...)
        return norms.view(-1, *(1,) * (weight.ndim - 1))
    # (O, I / groups, ...): the rows of a group read its own block of channels
    rows = norms.view(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
    return rows.view(*rows.shape, *(1,) * (weight.ndim - 2))


@criterion
def movement(model, weights, reference):
    """w (w - w0): the movement of Sanh et al. 2020 for one step from w0, of the model or state_dict `reference`."""
    reference = reference.state_dict() if isinstance(reference, nn.Module) else reference
    for name, weight in weights.items():
        if name not in reference or reference[name].shape != weight.shape:
            raise ValueError(f"reference has no {name!r} of shape {tuple(weight.shape)}")
    return {name: weight * (weight - reference[name].to(weight)) for name, weight in weights.items()}


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
    """Score the prunable weights of a model, in float32 or more whatever its type, and leave no trace in it.

    Args:
        model: Any `nn.Module` with convolution or linear layers.
        criterion: A name from `list_criteria()`, or a function `(model, data) -> {parameter name: scores}`.
        data: One (inputs, targets) batch or an iterable of them, which count as one large batch. Inputs are a tensor, a
            tuple, or a mapping as a tokenizer gives, whose "labels" are the targets ("input_ids" as such mean the next
            token). "wanda" and "synflow" need no targets.
        loss_fn, seed, exclude, train_mode, options: As for `prune`.

    Returns:
        {parameter name: tensor of the weight's shape}, higher = keep.

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
    weights: Mapping[str, nn.Parameter] | None  # all prunable ones; None where only the arguments are checked


def bind(criterion, data, loss_fn, seed, options, weights=None, known=None, **offered) -> Bound:
    """Give a criterion everything but the model, and what is `offered` by name; wrong arguments raise here."""
    known = CRITERIA if known is None else known
    function = choose("criterion", criterion, known)
    a_function("loss_fn", loss_fn)
    name = criterion if isinstance(criterion, str) else getattr(function, "__name__", type(function).__name__)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    takes = [p.name for p in parameters]
    any_option = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not any_option and (foreign := sorted(set(options) - set(takes))):
        own = ", ".join(takes) or "none"
        raise TypeError(f"criterion {name!r} has no option {', '.join(foreign)}; its own: {own}")
    offered |= dict(loss_fn=loss_fn or cross_entropy, seed=whole("seed", seed, least=0), **options)
    given = {key: value for key, value in offered.items() if key in takes or key in options}
    by_name = function in known.values() or "weights" in takes  # any other takes data by position
    if by_name and "data" in takes:
        given["data"] = data
    required = [p.name for p in parameters if p.default is p.empty and p.name != "weights"]
    if by_name and (missing := [each for each in required if given.get(each) is None]):
        raise ValueError(f"criterion {name!r} needs {' and '.join(missing)}")
    if "weights" in takes:
        given["weights"] = weights
    call = functools.partial(function, **given) if by_name else lambda model: function(model, data, **given)
    return Bound(name, function, call, weights)


def score(model: nn.Module, chosen: Bound, weights: Mapping[str, nn.Parameter], train_mode: bool, seed: int) -> Scores:
    """Score these weights, detached; ValueError where scores are missing, of another shape, NaN or infinite."""
    with untouched(model, train_mode, seed, chosen.weights.values()):
        found = {key: each.detach() for key, each in chosen.call(model).items()}
    for key, weight in weights.items():
        if key not in found:
            why = "either no batch has reached it (a dead expert?), or its kind is unknown there"
            raise ValueError(f"criterion {chosen.name!r} gives no scores for {key}: {why}; exclude that layer")
        own, what = found[key], f"criterion {chosen.name!r}: {key} has"
        if own.shape != weight.shape:
            raise ValueError(f"{what} shape {tuple(weight.shape)}, scores {tuple(own.shape)}")
        if not all_finite(own):
            n_bad = own.numel() - int(torch.isfinite(own).count_nonzero())
            raise ValueError(f"{what} {n_bad} of {own.numel()} scores that are NaN or infinite")
    return {key: found[key] for key in weights}


@contextlib.contextmanager
def untouched(
    model: nn.Module, train_mode: bool = False, seed: int = 0, differentiable: Iterable[nn.Parameter] = ()
) -> Iterator[None]:
    """Inside: eval (or train) mode, new gradients, float32, a random state of its own; everything is put back after.

    A model in 16 bits has float32 copies of its numbers inside: squares of its inputs would overflow, those of
    gradients vanish, and sums stop growing.
    """
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    short = [(t, t.data) for t in (*model.parameters(), *model.buffers()) if t.dtype in _SHORT]
    device = next((p.device for p, _, _ in parameters), torch.device("cpu"))
    lengthened = model.register_forward_pre_hook(_longer, with_kwargs=True) if short else contextlib.nullcontext()
    with lengthened, own_random_state(device, seed), full_float32(), in_mode(model, train_mode), torch.enable_grad():
        try:
            for p, _, _ in parameters:
                p.grad = None
            for p in differentiable:
                p.requires_grad_()
            for tensor, value in short:
                tensor.data = value.float()
            yield
        finally:
            for tensor, value in short:
                tensor.data = value
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for p, requires_grad, gradient in parameters:
                p.requires_grad_(requires_grad).grad = gradient


def _longer(module, args, keywords):
    return tree_map_only(torch.Tensor, lambda x: x.float() if x.dtype in _SHORT else x, (args, keywords))
