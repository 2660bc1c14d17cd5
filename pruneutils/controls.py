"""Controls that a claim about masks has to pass, and how much masks have in common."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn

from .model_utils import Masks, attach_masks, get_masks, layer_name
from .pruning import criteria

Tensors = Mapping[str, torch.Tensor]


def shuffle_masks(masks: Tensors, seed: int = 0) -> Masks:
    """Permute each mask at random within its layer: what is left of a method is its number of weights per layer.

    This is also the random pruning with the same layer ratios, since every mask with a layer's count is equally likely
    (Frankle et al. 2021, "Pruning neural networks at initialization: why are we missing the mark?").
    """
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that all devices agree
    return Masks(
        {
            name: mask.reshape(-1)[torch.randperm(mask.numel(), generator=generator).to(mask.device)].view(mask.shape)
            for name, mask in masks.items()
        }
    )


def redraw(model: nn.Module, seed: int = 0, init: Callable[[nn.Module], object] | None = None) -> nn.Module:
    """Draw the weights of `model` anew under its masks, in place, and return it: does the mask matter, or its weights?

    By default every module resets itself by its `reset_parameters` (batch-norm statistics included); otherwise
    `init(model)` does it all, such as `lambda model: model.load_state_dict(pu.models.create("vgg16", seed=1).
    state_dict())`. It draws from `seed`; the global random state is left alone. Optimizers keep their state: make a
    new one. Raises ValueError, and changes nothing, if there is no `init` and some parameters have no
    `reset_parameters` beside them.
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


def inverted(criterion: str | Callable = "magnitude", **options) -> Callable[..., dict[str, torch.Tensor]]:
    """A criterion that keeps what `criterion` would prune: its scores (with `options` of its own) negated.

    Reciprocals would do as well but for scores of zero, which have none. Goes wherever a criterion does.
    """

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
    layers: pd.DataFrame

    def __repr__(self):
        return f"Overlap(iou {self.iou:.4f}, {self.expected:.4f} expected of random masks, {len(self.layers)} layers)"


def overlap(masks_a: Tensors, masks_b: Tensors) -> Overlap:
    """Compare two sets of masks of the same names and shapes; ValueError where these differ."""
    _check_alike(masks_a, masks_b)
    rows = []
    for name, a in masks_a.items():
        a = a.bool()
        b = masks_b[name].to(a.device, torch.bool)
        counts = [int(mask.count_nonzero()) for mask in (a, b, a & b)]
        rows.append((layer_name(name), a.numel(), *counts))
    layers = pd.DataFrame(rows, columns=["layer", "total", "kept_a", "kept_b", "both"])
    chance = layers.kept_a * layers.kept_b / layers.total
    either = layers.kept_a + layers.kept_b
    layers["iou"] = layers.both / (either - layers.both)
    layers["expected"] = chance / (either - chance)
    return Overlap(_ratio(layers.both, either), _ratio(chance, either), layers)


def overlap_matrix(masks: Mapping[str, Tensors], value: str = "iou") -> pd.DataFrame:
    """`overlap` of every pair in {label: masks}: a symmetric DataFrame of `value`, "iou" or "expected".

    The expectation is that of two different random masks, on the diagonal too. Raises ValueError for masks of
    different names or shapes.
    """
    if value not in ("iou", "expected"):
        raise ValueError(f"unknown value {value!r}; known: iou, expected")
    labels = list(masks)
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
    if masks_a.keys() != masks_b.keys():
        only_a, only_b = (sorted(x.keys() - y.keys()) for x, y in ((masks_a, masks_b), (masks_b, masks_a)))
        told = [f"{', '.join(o)} only in {which}" for o, which in ((only_a, "the first"), (only_b, "the second")) if o]
        raise ValueError(f"the masks are of different weights: {'; '.join(told)}")
    for name, a in masks_a.items():
        if a.shape != masks_b[name].shape:
            raise ValueError(f"{name}: the masks have shapes {tuple(a.shape)} and {tuple(masks_b[name].shape)}")
