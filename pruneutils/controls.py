"""Controls that a claim about masks has to pass, and how much masks have in common."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ._checks import masks_by_name, one_of
from .model_utils import Masks, attach_masks, get_masks, layer_name
from .pruning import criteria

if TYPE_CHECKING:
    import pandas as pd

Tensors = Mapping[str, torch.Tensor]


def shuffle_masks(masks: Tensors, seed: int = 0) -> Masks:
    """Permute each mask at random within its layer, which leaves only a method's number of weights per layer.

    This is also random pruning with the same layer ratios, since every mask with a layer's count is equally likely
    (Frankle et al. 2021, "Pruning neural networks at initialization: why are we missing the mark?").

    Args:
        masks: {parameter name: bool tensor}.
        seed: Of the permutations; they are drawn on the CPU, so that all devices agree.

    Returns:
        New masks with the same counts.

    Example:
        >>> masks = pu.prune(pu.models.create("lenet300"), sparsity=0.9)
        >>> shuffled = pu.shuffle_masks(masks)
        >>> [int(shuffled[name].sum() - masks[name].sum()) for name in masks]
        [0, 0, 0]
    """
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that all devices agree
    return Masks(
        {
            name: mask.reshape(-1)[torch.randperm(mask.numel(), generator=generator).to(mask.device)].view(mask.shape)
            for name, mask in masks_by_name(masks).items()
        }
    )


def redraw(model: nn.Module, seed: int = 0, init: Callable[[nn.Module], object] | None = None) -> nn.Module:
    """Draw the weights of a model anew under its masks, in place: does the mask matter, or its weights?

    Optimizers keep their state: make a new one.

    Args:
        model: A masked model.
        seed: Of the new weights; the global random state is left alone.
        init: `init(model)` draws the weights. By default every module resets itself by its `reset_parameters`,
            batch-norm statistics included.

    Returns:
        The same model.

    Raises:
        ValueError: If there is no `init` and some parameters have no `reset_parameters` beside them. Nothing changes.

    Example:
        >>> model = pu.models.create("lenet300")
        >>> masks = pu.prune(model, sparsity=0.9)
        >>> pu.redraw(model, seed=1)[1].weight[~masks["fc1.weight"]].abs().max().item()
        0.0
    """
    if init is None:
        init = _reset_all
        if left := [n for n, module in model.named_modules() if module._parameters and _reset_of(module) is None]:
            raise ValueError(
                f"{', '.join(n or type(model).__name__ for n in left)}: parameters without reset_parameters; give init"
            )
    masks = get_masks(model)
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        init(model)
    attach_masks(model, masks)
    return model


def _reset_of(module) -> Callable[[], None] | None:
    return getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))


def _reset_all(model):
    def reset(module):
        if module._parameters:
            _reset_of(module)()

    model.apply(reset)  # children first: nn.MultiheadAttention has the last word on its projection's bias


def inverted(criterion: str | Callable = "magnitude", **options: object) -> Callable[..., dict[str, torch.Tensor]]:
    """Make a criterion that keeps what another one would prune: its scores negated.

    Reciprocals would do as well but for scores of zero, which have none.

    Args:
        criterion: A name from `list_criteria()`, or a criterion.
        **options: Options of that criterion.

    Returns:
        A criterion, for wherever one is asked for.

    Raises:
        ValueError: For an unknown name.

    Example:
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[3.0, -1.0, 2.0, -4.0]]))
        >>> pu.prune(model, pu.inverted("magnitude"), sparsity=0.5)["weight"].tolist()
        [[False, True, True, False]]
    """

    if isinstance(criterion, str):
        one_of("criterion", criterion, criteria.list_criteria())

    def score(model, data=None, loss_fn=None, seed=0):
        chosen = criteria.bind(criterion, data, loss_fn, seed, options)
        return {name: -values for name, values in chosen.call(model).items()}

    name = criterion if isinstance(criterion, str) else getattr(criterion, "__name__", type(criterion).__name__)
    score.__name__ = f"inverted {name}"
    return score


# --- What masks have in common ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlap:
    """Intersection over union of the kept weights of two sets of masks.

    `iou` in [0, 1], NaN where neither keeps a weight; `expected`, the same for independent random masks with these
    counts per layer (the expected intersection over the expected union); `layers`, a DataFrame with a row per layer:
    layer, total, kept_a, kept_b, both, iou, expected.
    """

    iou: float
    expected: float
    layers: "pd.DataFrame"

    def __repr__(self):
        return f"Overlap(iou {self.iou:.4f}, {self.expected:.4f} expected of random masks, {len(self.layers)} layers)"


def overlap(masks_a: Tensors, masks_b: Tensors) -> Overlap:
    """Measure how much two sets of masks have in common.

    Args:
        masks_a: {parameter name: bool tensor}.
        masks_b: The same names and shapes.

    Returns:
        The intersection over union of the kept weights, what independent random masks would have, and both by layer.

    Raises:
        ValueError: If names or shapes differ.

    Example:
        >>> first = pu.prune(pu.models.create("lenet300"), "random", 0.9, seed=0)
        >>> second = pu.prune(pu.models.create("lenet300"), "random", 0.9, seed=1)
        >>> found = pu.overlap(first, second)
        >>> round(found.iou, 2), round(found.expected, 2)
        (0.05, 0.05)
    """
    _check_alike(masks_a, masks_b)
    rows = []
    for name, a in masks_a.items():
        a = a.bool()
        b = masks_b[name].to(a.device, torch.bool)
        counts = [int(mask.count_nonzero()) for mask in (a, b, a & b)]
        rows.append((layer_name(name), a.numel(), *counts))
    import pandas as pd

    layers = pd.DataFrame(rows, columns=["layer", "total", "kept_a", "kept_b", "both"])
    chance = layers.kept_a * layers.kept_b / layers.total
    either = layers.kept_a + layers.kept_b
    layers["iou"] = layers.both / (either - layers.both)
    layers["expected"] = chance / (either - chance)
    return Overlap(_ratio(layers.both, either), _ratio(chance, either), layers)


def overlap_matrix(masks: Mapping[str, Tensors], value: str = "iou") -> "pd.DataFrame":
    """Measure the overlap of every pair of several sets of masks.

    Args:
        masks: {label: masks}, all of the same names and shapes.
        value: "iou", or "expected", which is that of two different random masks, on the diagonal too.

    Returns:
        A symmetric table, labels by labels.

    Raises:
        ValueError: For another value, and for masks of different names or shapes.

    Example:
        >>> masks = {name: pu.prune(pu.models.create("lenet300"), name, 0.9) for name in ("random", "magnitude")}
        >>> pu.overlap_matrix(masks).round(2).loc["magnitude"].tolist()
        [0.05, 1.0]
    """
    one_of("value", value, ("iou", "expected"))
    labels = list(masks)
    import pandas as pd

    matrix = pd.DataFrame(float("nan"), index=labels, columns=labels)
    for i, first in enumerate(labels):
        for second in labels[i:]:
            try:
                found = getattr(overlap(masks[first], masks[second]), value)
            except ValueError as error:
                raise ValueError(f"{first!r} and {second!r} cannot be compared: {error}") from None
            matrix.loc[first, second] = matrix.loc[second, first] = found
    return matrix


def _ratio(both, either) -> float:
    """Intersection over union, summed over layers; NaN for 0 / 0."""
    union = float((either - both).sum())
    return float(both.sum()) / union if union else float("nan")


def _check_alike(masks_a, masks_b):
    masks_by_name(masks_a), masks_by_name(masks_b)
    if masks_a.keys() != masks_b.keys():
        only_a, only_b = (sorted(x.keys() - y.keys()) for x, y in ((masks_a, masks_b), (masks_b, masks_a)))
        told = [f"{', '.join(o)} only in {which}" for o, which in ((only_a, "the first"), (only_b, "the second")) if o]
        raise ValueError(f"the masks are of different weights: {'; '.join(told)}")
    for name, a in masks_a.items():
        if a.shape != masks_b[name].shape:
            raise ValueError(f"{name}: the masks have shapes {tuple(a.shape)} and {tuple(masks_b[name].shape)}")
