"""How much a filter matters: a criterion, and how its scores within a filter become one. High scores stay.

Any criterion will do; its `weights` are those of all layers with filters, and it may name `example_inputs` too. The
names in `MEASURES` are those of Lubana and Dick 2021, "A gradient flow framework for analyzing network pruning", with
its defaults. w is a weight, g the gradient of the loss of logits divided by a temperature, H its Hessian.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .._checks import fraction, is_pair, shapes, whole
from .._torch import Inputs, batches, forward, generator, in_mode, take, to_device
from ..pruning import criteria
from ..target import Target
from .rebinding import sliced
from .slicing import FILTERING, is_transposed, removed_cuts
from .surgery import Trace

Scores = dict[str, torch.Tensor]
Criterion = str | Callable[..., Scores]


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
    for *batch, share in criteria.shares(first_samples(data, n_samples), weights):
        for name, g in criteria.gradients(model, weights, [tuple(batch)], softened(loss_fn, temperature)).items():
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


@dataclass(frozen=True)
class Measure:
    """A published measure of filters: its formula, a criterion, and how scores within a filter become one."""

    formula: str
    criterion: Callable[..., Scores]
    reduction: str = "sum"


REDUCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # of (filters, weights), in float64
    "sum": lambda rows: rows.sum(1, dtype=torch.float64),
    "sum of magnitudes": lambda rows: rows.abs().sum(1, dtype=torch.float64),
    "magnitude of the sum": lambda rows: rows.sum(1, dtype=torch.float64).abs(),
    "norm": lambda rows: torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64),
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
    "grad_preserve": Measure("|sum w (H g)|", partial(gradient_flow, temperature=1.0), "magnitude of the sum"),
    "biased_loss_tracked": Measure("moving average of biased_loss over batches", biased_loss_tracked),
    "random": Measure("U(0, 1)", uniform),
}


def filter_scores(
    model: nn.Module,
    criterion: Criterion = "mag_based",
    data: object = None,
    *,
    example_inputs: Inputs | None = None,
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
        {weight name: one score a filter}, higher = keep; a ValueError names what is NaN or of another shape. The
        filters of `nn.MultiheadAttention` are the rows of its "in_proj_weight".

    Example:
        >>> model = pu.models.create("lenet5")
        >>> {name: tuple(scores.shape) for name, scores in pu.filter_scores(model, "l1").items()}
        {'conv1.weight': (20,), 'conv2.weight': (50,), 'fc1.weight': (500,), 'fc2.weight': (10,)}
    """
    example_inputs = data[0][:1] if example_inputs is None and is_pair(data) else example_inputs
    return score_filters(Target.of(model, strict=False), criterion, data, example_inputs, loss_fn, seed, options)


def score_filters(target: Target, criterion, data, example_inputs, loss_fn, seed, options) -> Scores:
    """Return `filter_scores` of the model of a `Target`."""
    model, modules, weights = target.model, target.modules, filter_weights(target)
    chosen, reduction = bind(criterion, data, example_inputs, loss_fn, seed, options, weights)
    if not weights:
        raise ValueError(f"{type(model).__name__} has no convolution or linear layer: no filter to score")
    with criteria.untouched(model, seed=seed, differentiable=weights.values()):
        found = chosen.call(model)
    scores = {name: score for name, score in found.items() if name in weights}
    for name, score in scores.items():
        n_filters = len(_rows(modules, name, weights[name]))
        if score.shape == weights[name].shape and score.ndim > 1:
            score = REDUCTIONS[reduction](_rows(modules, name, score))
        if score.shape != (n_filters,):
            raise ValueError(f"criterion {chosen.name!r}: {name} has {n_filters} filters, scores {tuple(score.shape)}")
        if not torch.isfinite(score).all():
            raise ValueError(f"criterion {chosen.name!r}: scores of {name} are NaN or infinite")
        scores[name] = score.detach()
    return scores


def bind(criterion, data, example_inputs, loss_fn, seed, options, weights=None) -> tuple[criteria.Bound, str]:
    """Give a measure everything but the model, and look up its reduction; wrong arguments raise here."""
    known = criteria.CRITERIA | {name: measure.criterion for name, measure in MEASURES.items()}
    published = MEASURES.get(criterion) if isinstance(criterion, str) else None
    bound = criteria.bind(criterion, data, loss_fn, seed, options, weights, known=known, example_inputs=example_inputs)
    return bound, published.reduction if published else "sum"


def filter_weights(target: Target) -> dict[str, nn.Parameter]:
    """Return {weight name: weight} of all prunable layers with filters, in module order, shared ones once."""
    weights = {name: w for name, w in target.prunable.items() if 0 not in w.shape}
    return {n: w for n, w in weights.items() if isinstance(target.module(n), (*FILTERING, nn.MultiheadAttention))}


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
        self._model, self._reference = model, reference
        self._history: deque[Scores] = deque(maxlen=whole("track_batches", track_batches))
        biases(model, filter_weights(Target.of(model, strict=False)), reference)

    def __enter__(self) -> "track_importance":
        self._hook = register_optimizer_step_post_hook(self._after_step)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hook.remove()

    def _after_step(self, optimizer, *_) -> None:
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        if any(id(p) in stepped for p in self._model.parameters()):
            weights = filter_weights(Target.of(self._model, strict=False))
            self.add(weights, {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in weights.items()})

    def add(self, weights: Mapping[str, nn.Parameter], gradients: Mapping[str, torch.Tensor]) -> None:
        """Take the next batch into the average."""
        factors, modules = biases(self._model, weights, self._reference), dict(self._model.named_modules())
        products = {name: factors[name] * (w.detach() * gradients[name]).abs() for name, w in weights.items()}
        scores = {name: REDUCTIONS["sum"](_rows(modules, name, product)) for name, product in products.items()}
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
        first = state.get(name)
        first = first if first is None or first.shape == w.shape else sliced(first, cuts.get(name, []))
        if first is None or first.shape != w.shape:
            raise ValueError(f"reference has no {name!r} of the model's shape {tuple(w.shape)}")
        factors[name] = (w.detach() - first.to(w)).abs()
    return factors


def softened(loss_fn: Callable, temperature: float) -> Callable:
    """Return the loss of logits divided by a temperature."""
    return lambda outputs, targets: loss_fn(outputs / temperature, targets)


def first_samples(data: object, n_samples: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the batches of the first `n_samples` samples."""
    parts, left = [], whole("n_samples", n_samples)
    for inputs, targets in batches(data):
        parts.append((take(inputs, slice(left)), targets[:left]))
        left -= len(targets)
        if left <= 0:
            break
    return parts


def _classes(model, weights, data, n_samples) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A batch a class, of its first samples, equally many of each where there are enough."""
    found, n_each, n_classes = {}, 0, 0
    for inputs, targets in batches(data):
        if not torch.is_tensor(inputs) or targets.ndim != 1:
            raise ValueError(f"as many samples of each class need targets (N,) and a tensor, not {shapes(targets)}")
        if not found:
            with torch.no_grad():
                n_classes = forward(model, inputs[:1].to(next(iter(weights.values())).device)).shape[-1]
            n_each = max(1, n_samples // n_classes)
        for c in targets.unique().tolist():
            found[c] = torch.cat([found.get(c, inputs[:0]), inputs[targets == c]])[:n_each]
        if len(found) == n_classes and all(len(inputs) == n_each for inputs in found.values()):
            break
    return [(inputs, torch.full((len(inputs),), c)) for c, inputs in sorted(found.items())]


def norms_behind(model: nn.Module, weights: Mapping[str, nn.Parameter], inputs: Inputs) -> dict[str, nn.Module]:
    """Return {weight name: the first batch norm that reads its channels}; those of a sum count as of its last layer."""
    target = Target.of(model, strict=False)
    trace, found = Trace(target, to_device(inputs, next(iter(weights.values())).device)), {}
    layers = {tuple(labels): f"{layer}.weight".lstrip(".") for layer, labels in trace.filters.items()}
    for (name, _), labels in trace.reads.items():
        norm, weight = target.modules[name], layers.get(tuple(labels))
        if weight and isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.affine:
            found.setdefault(weight, norm)
    if not found:
        raise ValueError(f"{type(model).__name__} has no batch norm with a scale behind any layer: use another measure")
    return found
