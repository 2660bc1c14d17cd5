"""GraSP: the thresholds of a published puzzle, its unit, its sign, and how much two batches agree."""

import copy
import warnings
from collections.abc import Mapping

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from .. import _checks, data, models
from .._torch import note_precision
from ..controls import redraw
from ..model_utils import prunable_weights
from ..pruning import (
    prune,
    scores,
)


def grasp_thresholds(seed: int, targets: list[float], per_class: int = 25) -> list[dict]:
    """Score timm's resnet10t by GraSP on CIFAR-10 as the published debug study did, and cut by its thresholds and ours.

    With S = -w (Hg), divided by the magnitude of its sum as in the published code, the rules are: "highest go" (keep
    S <= the k-th highest, the code of today), "lowest go" (keep S >= the k-th highest, the code that made the published
    tables), and "exact" (`prune`).

    Args:
        seed: Of the weights and of the batches.
        targets: The sparsities asked for.
        per_class: Images of each class.

    Returns:
        A row per target, rule and layer: weights before and after, how many score exactly zero, and the threshold.
    """
    note_precision("float32")  # of the scores
    train, _ = data.load("cifar10")
    model = models.create("timm/resnet10t", num_classes=10, seed=seed)
    found = scores(model, "grasp", train.balanced_batch(per_class, seed), train_mode=True, seed=seed)
    published = {name: -score.double() for name, score in found.items()}
    flat = torch.cat([score.flatten() for score in published.values()])
    total, scale = len(flat), float(flat.sum().abs()) + 1e-10
    rows = []
    for target in targets:
        with warnings.catch_warnings(action="ignore"):  # ties are counted
            exact = prune(copy.deepcopy(model), lambda model, data: found, target)
        high = float(flat.kthvalue(total - int(total * target) + 1).values)  # the k-th highest, k to remove
        low = float(flat.kthvalue(total - int(total * (1 - target)) + 1).values)  # the k-th highest, k to keep
        for name, score in published.items():
            kept = {"highest go": (score <= high, high), "lowest go": (score >= low, low), "exact": (exact[name], None)}
            for rule, (mask, threshold) in kept.items():
                rows.append({
                    "target": target, "rule": rule, "layer": name.removesuffix(".weight"), "before": score.numel(),
                    "after": int(mask.sum()), "zeros": int((score == 0).sum()),
                    "threshold": None if threshold is None else threshold / scale, "data": train.name,
                })  # fmt: skip
    return rows


def grasp_agreement(seed: int, per_class: int = 25, share: float = 0.05) -> dict:
    """Measure how much two batches agree on the weights that GraSP scores highest.

    Args:
        seed: Of the weights and of the two batches.
        per_class: Images of each class in a batch.
        share: The fraction of the weights that count as highest.

    Returns:
        `overlap`: the share of one batch's highest weights that are also the other's; by chance it equals `share`.
    """
    note_precision("float32")  # of the scores
    train, _ = data.load("cifar10")
    # with batch norms that start at zero nearly all scores tie at zero: see grasp_thresholds
    model = models.create("timm/resnet10t", num_classes=10, seed=seed, zero_init_last=False)
    tops = []
    for batch in (train.balanced_batch(per_class, seed), train.balanced_batch(per_class, seed + 1000)):
        found = scores(model, "grasp", batch, train_mode=True, seed=seed)
        flat = torch.cat([score.flatten() for score in found.values()])
        tops.append(set(flat.topk(int(share * len(flat))).indices.tolist()))
    return {"overlap": len(tops[0] & tops[1]) / len(tops[0]), "data": train.name}


def published_grasp_table() -> pd.DataFrame:
    """Return the tables of the published GraSP check of resnet10t, with the layers under their right names.

    The original paired the masks with the names of all modules, so containers and activations came to have weights.

    Returns:
        A row per layer, in the order of the model: layer, listed_as (the name in the published tables), before, and the
        weights left when 50, 97 and 98 % were asked for: after_50, after_97, after_98.

    Example:
        >>> from pruneutils import studies
        >>> studies.published_grasp_table().sum(numeric_only=True).tolist()
        [4921736, 4820397, 4820336, 98434]
    """
    rows = [
        ("conv1.0", "-", 648, 324, 323, 328),
        ("conv1.3", "conv1", 6912, 3502, 3538, 3485),
        ("conv1.6", "conv1.0", 18432, 9340, 9252, 9163),
        ("layer1.0.conv1", "conv1.1", 36864, 36864, 36864, 0),
        ("layer1.0.conv2", "conv1.2", 36864, 36864, 36864, 0),
        ("layer2.0.conv1", "conv1.3", 73728, 73728, 73728, 0),
        ("layer2.0.conv2", "conv1.4", 147456, 147456, 147456, 0),
        ("layer2.0.downsample.1", "conv1.5", 8192, 4159, 4079, 4123),
        ("layer3.0.conv1", "conv1.6", 294912, 294912, 294912, 0),
        ("layer3.0.conv2", "bn1", 589824, 589824, 589824, 0),
        ("layer3.0.downsample.1", "act1", 32768, 16379, 16471, 16159),
        ("layer4.0.conv1", "maxpool", 1179648, 1179648, 1179648, 0),
        ("layer4.0.conv2", "layer1", 2359296, 2359296, 2359296, 0),
        ("layer4.0.downsample.1", "layer1.0", 131072, 65750, 65737, 62906),
        ("fc", "layer1.0.conv1", 5120, 2351, 2344, 2270),
    ]
    return pd.DataFrame(rows, columns=["layer", "listed_as", "before", "after_50", "after_97", "after_98"])


def grasp_normaliser(
    seed: int, classifier: str = "as created", batches: str = "one", target: float = 0.98, per_class: int = 25
) -> dict:
    """Measure what GraSP's threshold is in the published unit, and how far the sum that makes the unit cancels.

    The published code divides the scores of resnet10t by the magnitude of their sum before it prints the threshold. The
    scores have both signs, so the sum is a small remainder, and details decide how small it is.

    Args:
        seed: Of the weights and of the batch.
        classifier: "as created", or "redrawn" from Xavier's normal distribution, as in the published code.
        batches: "one" batch of all classes, or "halves" of five classes each, as in the published code.
        target: The sparsity asked for.
        per_class: Images of each class.

    Returns:
        `threshold` of the rule that keeps the highest S, in that unit; `remainder`, the magnitude of the sum over the
        sum of the magnitudes; `positive`, the number of positive S; and the name of the data.
    """
    _checks.one_of("classifier", classifier, ("as created", "redrawn"))
    _checks.one_of("batches", batches, ("one", "halves"))
    note_precision("float32")  # of the scores
    train, _ = data.load("cifar10")
    model = models.create("timm/resnet10t", num_classes=10, seed=seed)
    if classifier == "redrawn":
        redraw(model, seed=seed, init=lambda model: nn.init.xavier_normal_(model.fc.weight))
    inputs, targets = train.balanced_batch(per_class, seed)
    parts = [slice(None)] if batches == "one" else targets.argsort(stable=True).chunk(2)
    found = scores(model, "grasp", [(inputs[part], targets[part]) for part in parts], train_mode=True, seed=seed)
    flat = torch.cat([-score.flatten().double() for score in found.values()])
    threshold = flat.kthvalue(len(flat) - int(len(flat) * (1 - target)) + 1).values
    unit = flat.sum().abs()
    return {
        "threshold": float(threshold / (unit + 1e-10)),
        "remainder": float(unit / flat.abs().sum()),
        "positive": int((flat > 0).sum()),
        "data": train.name,
    }


def grasp_by_differences(
    model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], temperature: float = 200.0, reach: float = 1e-8
) -> dict[str, torch.Tensor]:
    """Score by GraSP without a second derivative: H g is the difference of two gradients, a small step along g apart.

    Args:
        model: A network in float64; batch norm uses batch statistics.
        batch: One (inputs, targets) pair.
        temperature: What the outputs are divided by.
        reach: The norm of the step: small, so that no ReLU switches on the way.

    Returns:
        {parameter name: w * (H g)}, as from `scores(model, "grasp", train_mode=True)` up to the error of the step.

    Example:
        >>> from pruneutils import studies
        >>> model = pu.models.create("lenet300").double()
        >>> batch = torch.rand(4, 1, 28, 28, dtype=torch.float64), torch.arange(4)
        >>> exact = pu.scores(model, "grasp", batch, train_mode=True)["fc2.weight"]
        >>> found = studies.grasp_by_differences(model, batch)["fc2.weight"]
        >>> bool((found - exact).norm() < 1e-3 * exact.norm())
        True
    """
    g = _gradient(_moved(model, {}, 0), batch, temperature)
    step = reach / torch.cat([layer.flatten() for layer in g.values()]).norm()
    ahead, behind = (_gradient(_moved(model, g, sign * step), batch, temperature) for sign in (1, -1))
    weights = prunable_weights(model)
    return {name: w.detach() * (ahead[name] - behind[name]) / (2 * step) for name, w in weights.items()}


def gradient_norm_change(
    model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], masks: Mapping[str, torch.Tensor],
    temperature: float = 200.0,
) -> dict[str, float]:  # fmt: skip
    """Measure how the squared gradient norm changes when weights are removed, and what GraSP's scores predict.

    Args:
        model: A network in float64, dense.
        batch: One (inputs, targets) pair.
        masks: True = kept; the others are removed.
        temperature: What the outputs are divided by.

    Returns:
        The change relative to the norm before: `predicted` by the sum of the scores to first order, `shrunk` when the
        weights shrink by a millionth (times a million), and `removed` when they go altogether.

    Example:
        >>> from pruneutils import studies
        >>> model = pu.models.create("lenet300").double()
        >>> batch = torch.rand(4, 1, 28, 28, dtype=torch.float64), torch.arange(4)
        >>> masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in pu.prunable_weights(model).items()}
        >>> studies.gradient_norm_change(model, batch, masks)["removed"]
        0.0
    """
    found = scores(model, "grasp", batch, train_mode=True, temperature=temperature)
    away = {name: -weight.detach() * ~masks[name] for name, weight in prunable_weights(model).items()}

    def squared_norm(step):
        return sum(float(g.square().sum()) for g in _gradient(_moved(model, away, step), batch, temperature).values())

    before = squared_norm(0)
    gone = sum(float(found[name][~masks[name]].sum()) for name in found)
    return {
        "predicted": -2 * gone / before,
        "shrunk": (squared_norm(1e-6) / before - 1) / 1e-6,
        "removed": squared_norm(1) / before - 1,
    }


def _gradient(model, batch, temperature):
    weights = prunable_weights(model)
    loss = F.cross_entropy(model(batch[0]) / temperature, batch[1])
    return dict(zip(weights, torch.autograd.grad(loss, weights.values()), strict=True))


def _moved(model, direction, step):
    """Return a copy in training mode, its weights moved by `step` times `direction`."""
    result = copy.deepcopy(model).train()
    with torch.no_grad():
        for name, weight in prunable_weights(result).items():
            weight += step * direction[name] if name in direction else 0
    return result
