"""How much a filter matters: a criterion, and how its scores within a filter become one. High scores stay.

Any criterion will do: `@pu.criterion` registers one's own. Here its `weights` are those of all layers with filters, and
it may name `example_inputs` too. `MEASURES` lists the names of Lubana and Dick 2021, "A gradient flow framework for
analyzing network pruning", with the defaults of its code. w is a weight, g the gradient of the loss of logits divided
by a temperature, H its Hessian.
"""

import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.autograd import grad
from torch.optim.optimizer import register_optimizer_step_post_hook

from .._checks import fraction, is_pair, whole
from .._torch import batches, generator, hooked, in_mode
from ..pruning import criteria
from ..target import Modules, Target
from .rebinding import sliced
from .slicing import FILTERING, is_transposed, kind_of_attention, removed_cuts

Scores = dict[str, torch.Tensor]
Criterion = str | Callable[..., Scores]

# --- Criteria of the framework ---------------------------------------------------------------------------------------


def first_order(model, weights, data, loss_fn, temperature=5.0, n_samples=2560):
    """w g, the first-order change of the loss, signed."""
    gradients = criteria.gradients(model, weights, first_samples(data, n_samples), softened(loss_fn, temperature))
    return {name: weights[name] * g for name, g in gradients.items()}


def biased_loss(model, weights, data, loss_fn, temperature=5.0, n_samples=2560, reference=None):
    """|w| |w g|, or |w - w0| |w g| with a `reference`: the model or state_dict w0 from before training."""
    factors = biases(model, weights, reference)
    found = first_order(model, weights, data, loss_fn, temperature, n_samples)
    return {name: factors[name] * score.abs() for name, score in found.items()}


def biased_loss_tracked(model, weights, data, loss_fn, temperature=5.0, alpha=0.8, track_batches=20, reference=None):
    """biased_loss averaged over the last batches of `data` in train mode; `track_importance` follows a training."""
    tracked, loss_fn = track_importance(model, alpha, track_batches, reference), softened(loss_fn, temperature)
    with in_mode(model, training=True):
        for batch in deque(batches(data), maxlen=track_batches):
            tracked.add(weights, criteria.gradients(model, weights, [batch], loss_fn))
    return tracked(model)


def fisher_of_batches(model, weights, data, loss_fn, temperature=5.0, n_samples=2560):
    """w^2 F, with F the mean over batches of the squared gradient of a batch."""
    total = {name: torch.zeros_like(w) for name, w in weights.items()}
    for inputs, targets, share in criteria.shares(first_samples(data, n_samples), weights):
        loss = loss_fn(model(inputs) / temperature, targets)
        for name, g in zip(weights, grad(loss, list(weights.values()), materialize_grads=True)):
            total[name] += share * g.square()
    return {name: w.detach().square() * total[name] for name, w in weights.items()}


def scale_behind(model, weights, example_inputs):
    """|gamma| of the batch norm that follows; no score where none does."""
    return {name: norm.weight.detach().abs() for name, norm in norms_behind(model, weights, example_inputs).items()}


def fisher_behind(model, weights, data, loss_fn, example_inputs, temperature=5.0, n_samples=2560):
    """gamma^2 F + beta^2 F of the batch norm that follows; no score where none does."""
    norms = norms_behind(model, weights, example_inputs)
    parts = {(name, p): getattr(norm, p).requires_grad_() for name, norm in norms.items() for p in ("weight", "bias")}
    found = fisher_of_batches(model, parts, data, loss_fn, temperature, n_samples)
    return {name: found[name, "weight"] + found[name, "bias"] for name in norms}


def gradient_flow(model, weights, data, loss_fn, temperature=200.0, n_samples=2560):
    """w (H g), the first-order change of the gradient norm, signed, from equally many samples of each class.

    Unlike in the criterion "grasp", H and g are those of all parameters, batch norm and biases included.
    """
    filters = {id(w) for w in weights.values()}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in filters]
    by_class = _classes(model, weights, data, whole("n_samples", n_samples))
    parts = [(inputs, targets, 1 / len(by_class)) for inputs, targets, _ in criteria.shares(by_class, weights)]
    products = criteria.hessian_gradient(model, [*weights.values(), *others], parts, softened(loss_fn, temperature))
    return {name: w.detach() * h for (name, w), h in zip(weights.items(), products)}


def uniform(model, weights, seed):
    """U(0, 1) for each filter, whatever its size: the control."""
    drawn, modules = generator(seed, "random"), dict(model.named_modules())
    sizes = {name: len(_rows(modules, name, w)) for name, w in weights.items()}
    return {name: torch.rand(size, generator=drawn).to(weights[name].device) for name, size in sizes.items()}


# --- The published names ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """A published measure of filters: its formula, a criterion, and how scores within a filter become one."""

    formula: str
    criterion: Callable[..., Scores]
    reduction: str = "sum"
    options: Mapping[str, object] = field(default_factory=dict)  # defaults that differ from the criterion's own


REDUCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # of (filters, weights), in float64
    "sum": lambda rows: rows.double().sum(1),
    "sum of magnitudes": lambda rows: rows.abs().double().sum(1),
    "magnitude of the sum": lambda rows: rows.double().sum(1).abs(),
    "norm": lambda rows: rows.square().double().sum(1).sqrt(),
}
MEASURES: dict[str, Measure] = {
    "mag_based": Measure("||w||, the L2 norm", criteria.magnitude, "norm"),
    "l1": Measure("sum |w| (Li et al. 2017)", criteria.magnitude),
    "bn": Measure("|gamma| of the batch norm that follows (Liu et al. 2017)", scale_behind),
    "loss_based": Measure("sum |w g|, SNIP (Lee et al. 2019)", first_order, "sum of magnitudes"),
    "biased_loss": Measure("sum |w| |w g|, or sum |w - w0| |w g|", biased_loss),
    "tfo": Measure("|sum w g| (Molchanov et al. 2017)", first_order, "magnitude of the sum"),
    "fisher": Measure("sum w^2 F (Theis et al. 2018)", fisher_of_batches),
    "nvidia": Measure("gamma^2 F + beta^2 F of the batch norm that follows (Molchanov et al. 2019)", fisher_behind),
    "grasp": Measure("sum w (H g), signed (Wang et al. 2020)", gradient_flow),
    "grad_preserve": Measure("|sum w (H g)|", gradient_flow, "magnitude of the sum", {"temperature": 1.0}),
    "biased_loss_tracked": Measure("moving average of biased_loss over batches", biased_loss_tracked),
    "random": Measure("U(0, 1)", uniform),
}


# --- Scoring without a trace -----------------------------------------------------------------------------------------


def filter_scores(
    model: nn.Module,
    criterion: Criterion = "mag_based",
    data: object = None,
    *,
    example_inputs: torch.Tensor | None = None,
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    seed: int = 0,
    **options: object,
) -> Scores:
    """Score the filters of a model and leave no trace in it.

    Args:
        model: Any `nn.Module` with convolution or linear layers.
        criterion: A published name (`pu.filters.MEASURES` lists them with their formulas), the name of a criterion, or
            a function as for `pu.criterion`. It gives a score a filter, or a score a weight: then their sum counts.
        data, loss_fn, seed: As for `prune`.
        example_inputs: Inputs (N, ...), for measures that read batch norms; by default the first of `data`.
        **options: Options of the measure: temperature, n_samples, reference, alpha, track_batches.

    Returns:
        {weight name: one score a filter, shape (filters,)}, higher = keep. The filters of `nn.MultiheadAttention` are
        the rows of its "in_proj_weight".

    Raises:
        ValueError: For an unknown measure, missing data, and scores of another shape, NaN or infinite.

    Example:
        >>> model = pu.models.create("lenet5")
        >>> {name: tuple(scores.shape) for name, scores in pu.filter_scores(model, "l1").items()}
        {'conv1.weight': (20,), 'conv2.weight': (50,), 'fc1.weight': (500,), 'fc2.weight': (10,)}
    """
    example_inputs = data[0][:1] if example_inputs is None and is_pair(data) else example_inputs
    return score_filters(Target.of(model, strict=False), criterion, data, example_inputs, loss_fn, seed, options)


def score_filters(target: Target, criterion, data, example_inputs, loss_fn, seed, options) -> Scores:
    """Return `filter_scores` of the model of a `Target`."""
    weights = filter_weights(target.modules)
    chosen, reduction = bind(criterion, data, example_inputs, loss_fn, seed, options, weights)
    if not weights:
        raise ValueError(f"{type(target.model).__name__} has no convolution or linear layer: no filter to score")
    with criteria.untouched(target.model, seed=seed, differentiable=weights.values()):
        found = chosen.call(target.model)
    scores = {name: score for name, score in found.items() if name in weights}
    for name, score in scores.items():
        n_filters = len(_rows(target.modules, name, weights[name]))
        if score.shape == weights[name].shape and score.ndim > 1:
            score = reduced(target.modules, {name: score}, reduction)[name]
        if score.shape != (n_filters,):
            raise ValueError(f"criterion {chosen.name!r}: {name} has {n_filters} filters, scores {tuple(score.shape)}")
        if n_bad := n_filters - int(torch.isfinite(score).count_nonzero()):
            raise ValueError(f"criterion {chosen.name!r}: {n_bad} of {n_filters} scores of {name} are NaN or infinite")
        scores[name] = score.detach()
    return scores


def bind(criterion, data, example_inputs, loss_fn, seed, options, weights=None) -> tuple[criteria.Bound, str]:
    """Give a measure everything but the model, and look up its reduction; wrong arguments raise here."""
    known = criteria.CRITERIA | {name: measure.criterion for name, measure in MEASURES.items()}
    published = MEASURES.get(criterion) if isinstance(criterion, str) else None
    options = {**published.options, **options} if published else options
    bound = criteria.bind(criterion, data, loss_fn, seed, options, weights, known=known, example_inputs=example_inputs)
    return bound, published.reduction if published else "sum"


def filter_weights(modules: Modules) -> dict[str, nn.Parameter]:
    """Return {weight name: weight} of all layers with filters, in module order, shared ones once."""
    weights, seen = {}, set()
    for layer, module in modules.items():
        attribute = "in_proj_weight" if kind_of_attention(module) == "torch" else "weight"
        weight = module._parameters.get(attribute) if isinstance(module, (*FILTERING, nn.MultiheadAttention)) else None
        if weight is not None and 0 not in weight.shape and id(weight) not in seen:
            seen.add(id(weight))
            weights[f"{layer}.{attribute}".lstrip(".")] = weight
    return weights


# --- Followed through a training --------------------------------------------------------------------------------------


class track_importance:
    """Follow `biased_loss` of all filters while a model trains: a context manager, and a criterion for `prune_filters`.

    The scores with the gradient of every optimizer step go into a moving average; filters removed start it anew.

    Args:
        model: The model that is trained.
        alpha, track_batches: The share of the newest batch in the average, and how many batches it goes back.
        reference: A model or state_dict from before training: weigh by the distance from it, not by |w|.

    Example:
        >>> model, (train, test) = pu.models.create("lenet5"), pu.data.load("digits")
        >>> with pu.filters.track_importance(model, track_batches=5) as tracked:
        ...     history = pu.fit(model, train.subset(256), epochs=1, lr=0.01)
        >>> model = pu.prune_filters(model, tracked, ratio=0.5, example_inputs=train.batch(1)[0])
    """

    def __init__(self, model: nn.Module, alpha: float = 0.8, track_batches: int = 20, reference: object = None):
        self.alpha = fraction("alpha", alpha)
        self._model, self._reference = weakref.ref(model), reference
        self._history: deque[Scores] = deque(maxlen=whole("track_batches", track_batches))
        biases(model, filter_weights(dict(model.named_modules())), reference)

    def __enter__(self) -> "track_importance":
        self._hook = register_optimizer_step_post_hook(self._after_step)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hook.remove()

    def _after_step(self, optimizer, *_) -> None:
        model = self._model()
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        if model is not None and any(id(p) in stepped for p in model.parameters()):
            weights = filter_weights(dict(model.named_modules()))
            self.add(weights, {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in weights.items()})

    def add(self, weights: Mapping[str, nn.Parameter], gradients: Mapping[str, torch.Tensor]) -> None:
        """Take the next batch into the average."""
        model = self._model()
        factors = biases(model, weights, self._reference)
        products = {name: factors[name] * (w.detach() * gradients[name]).abs() for name, w in weights.items()}
        scores = reduced(dict(model.named_modules()), products)
        if self._history and any(self._history[-1][name].shape != score.shape for name, score in scores.items()):
            self._history.clear()
        self._history.append(scores)

    def __call__(self, model: nn.Module, data: object = None) -> Scores:
        """Return {weight name: one score a filter}."""
        if not self._history:
            raise ValueError("nothing has been tracked yet: train first, or give data")
        total, *later = self._history
        for scores in later:
            total = {name: self.alpha * scores[name] + (1 - self.alpha) * old for name, old in total.items()}
        return total


# --- What measures are made of ---------------------------------------------------------------------------------------


def reduced(modules: Modules, scores: Mapping[str, torch.Tensor], reduction: str = "sum") -> Scores:
    """Make one score a filter of the scores of its weights."""
    return {name: REDUCTIONS[reduction](_rows(modules, name, score)) for name, score in scores.items()}


def _rows(modules, name, tensor) -> torch.Tensor:
    """One row a filter; a transposed convolution stores its filters along the second dimension."""
    transposed = is_transposed(modules[name.rpartition(".")[0]])
    return (tensor.transpose(0, 1) if transposed else tensor).flatten(1)


def biases(model: nn.Module, weights: Mapping[str, nn.Parameter], reference: object) -> Scores:
    """Return |w|, or |w - w0| with a reference; w0 loses the filters that the model has lost."""
    if reference is None:
        return {name: w.detach().abs() for name, w in weights.items()}
    state = reference.state_dict() if isinstance(reference, nn.Module) else reference
    cuts, factors = removed_cuts(model), {}
    for name, w in weights.items():
        if name not in state:
            raise ValueError(f"reference has no {name!r}")
        first = state[name] if state[name].shape == w.shape else sliced(state[name], cuts.get(name, []))
        if first.shape != w.shape:
            raise ValueError(f"reference: {name} has shape {tuple(first.shape)}, in the model {tuple(w.shape)}")
        factors[name] = (w.detach() - first.to(w)).abs()
    return factors


def softened(loss_fn: Callable, temperature: float) -> Callable:
    """Return the loss of logits divided by a temperature."""
    return lambda outputs, targets: loss_fn(outputs / temperature, targets)


def first_samples(data: object, n_samples: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the batches of the first `n_samples` samples."""
    parts, left = [], whole("n_samples", n_samples)
    for inputs, targets in batches(data):
        parts.append((inputs[:left], targets[:left]))
        left -= len(parts[-1][1])
        if left <= 0:
            break
    return parts


def _classes(model, weights, data, n_samples) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A batch a class, of its first samples, equally many of each where there are enough."""
    found, n_each, n_classes = {}, 0, 0
    for inputs, targets in batches(data):
        if not found:
            with torch.no_grad():
                n_classes = model(inputs[:1].to(next(iter(weights.values())).device)).shape[-1]
            n_each = max(1, n_samples // n_classes)
        for c in targets.unique().tolist():
            before = found.get(c, inputs[:0])
            found[c] = torch.cat([before, inputs[targets == c][: n_each - len(before)]])
        if len(found) == n_classes and all(len(inputs) == n_each for inputs in found.values()):
            break
    if not found:
        raise ValueError("data holds no sample")
    return [(inputs, torch.full((len(inputs),), c)) for c, inputs in sorted(found.items())]


def norms_behind(model: nn.Module, weights: Mapping[str, nn.Parameter], inputs: torch.Tensor) -> dict[str, nn.Module]:
    """Return {weight name: the batch norm behind its layer}, with nothing but operations of one input in between."""
    modules, outputs, found = dict(model.named_modules()), {}, {}
    names = {modules[name.rpartition(".")[0]]: name for name in weights}
    layers = [module for module in names if isinstance(module, FILTERING)]
    norms = [m for m in modules.values() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine]

    def gives(module, args, output):
        outputs[output.grad_fn] = names[module]

    def reads(norm, args):
        node = args[0].grad_fn
        while node is not None and node not in outputs:
            before = [n for n, _ in node.next_functions if n is not None and "AccumulateGrad" not in n.name()]
            node = before[0] if len(before) == 1 else None
        if node is not None:
            found.setdefault(outputs[node], norm)

    with hooked(layers, gives, after=True), hooked(norms, reads):
        model(inputs.to(next(iter(weights.values())).device))
    if not found:
        raise ValueError(f"{type(model).__name__} has no batch norm with a scale behind any layer: use another measure")
    return found
