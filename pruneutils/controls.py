"""Controls that a claim about masks has to pass, and how much masks have in common."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ._checks import masks_by_name
from ._torch import device_of, own_random_state
from .masks import attach
from .model_utils import Masks, get_masks
from .pruning import criteria

Tensors = Mapping[str, torch.Tensor]


def shuffle_masks(masks: Tensors, seed: int = 0) -> Masks:
    """Permute each mask at random within its layer: random pruning with a method's layer ratios (Frankle et al. 2021).

    Args:
        masks: {parameter name: bool tensor}.
        seed: Of the permutations; they are drawn on the CPU, so that all devices agree.

    Returns:
        New masks with the same counts.

    Example:
        >>> masks = pu.prune(pu.models.create("lenet300"), sparsity=0.9)
        >>> pu.controls.shuffle_masks(masks)
        Masks(3 weights, 26,620 of 266,200 kept, sparsity 0.9000)
    """
    generator, shuffled = torch.Generator().manual_seed(seed), Masks()
    for name, mask in masks_by_name(masks).items():
        order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
        shuffled[name] = mask.reshape(-1)[order].view(mask.shape)
    return shuffled


def redraw(model: nn.Module, seed: int = 0, init: Callable[[nn.Module], object] | None = None) -> nn.Module:
    """Draw the weights of a model anew under its masks, in place: does the mask matter, or its weights?

    Optimizers keep their state: make a new one.

    Args:
        model: A masked model.
        seed: Of the new weights; the global random state is left alone.
        init: `init(model)` draws the weights; by default every module does so by its `reset_parameters`.

    Returns:
        The same model.

    Example:
        >>> model = pu.models.create("lenet300")
        >>> masks = pu.prune(model, sparsity=0.9)
        >>> pu.controls.redraw(model, seed=1)[1].weight[~masks["fc1.weight"]].abs().max().item()
        0.0
    """
    own = {name: module for name, module in model.named_modules() if module._parameters}
    if init is None and (left := [name or type(model).__name__ for name, m in own.items() if _reset_of(m) is None]):
        raise ValueError(f"{', '.join(left)}: parameters without reset_parameters; give init")
    masks = get_masks(model)
    with own_random_state(device_of(model), seed), torch.no_grad():
        if init is None:  # children first: nn.MultiheadAttention has the last word on its projection's bias
            model.apply(lambda module: _reset_of(module)() if module._parameters else None)
        else:
            init(model)
    attach(dict(model.named_modules()), masks)
    return model


def _reset_of(module) -> Callable[[], None] | None:
    return getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))


def inverted(criterion: str | Callable = "magnitude", **options: object) -> Callable[..., dict[str, torch.Tensor]]:
    """Make a criterion that keeps what another one would prune: its scores negated.

    Args:
        criterion: A name from `list_criteria()`, or a criterion.
        **options: Options of that criterion.

    Returns:
        A criterion, for wherever one is asked for.

    Example:
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> model.weight.data = torch.tensor([[3.0, -1.0, 2.0, -4.0]])
        >>> pu.prune(model, pu.controls.inverted("magnitude"), sparsity=0.5)["weight"].tolist()
        [[False, True, True, False]]
    """

    def score(model, weights, data=None, loss_fn=None, seed=0):
        chosen = criteria.bind(criterion, data, loss_fn, seed, options, weights)
        return {name: -values for name, values in chosen.call(model).items()}

    name = criterion if isinstance(criterion, str) else getattr(criterion, "__name__", type(criterion).__name__)
    score.__name__ = f"inverted {name}"
    return score


@dataclass(frozen=True)
class Overlap:
    """Intersection over union of the kept weights of two sets of masks."""

    iou: float  # in [0, 1], NaN where neither keeps a weight
    expected: float  # of independent random masks with these counts per layer: expected intersection over union
    n_layers: int


def overlap(masks_a: Tensors, masks_b: Tensors) -> Overlap:
    """Measure how much two sets of masks have in common.

    Args:
        masks_a, masks_b: {parameter name: bool tensor}, of the same names and shapes.

    Returns:
        `.iou`, the intersection over union of the kept weights, and `.expected`, that of independent random masks.

    Example:
        >>> first = pu.prune(pu.models.create("lenet300"), "random", 0.9, seed=0)
        >>> second = pu.prune(pu.models.create("lenet300"), "random", 0.9, seed=1)
        >>> round(pu.controls.overlap(first, second).iou, 3)
        0.052
    """
    masks_a, masks_b = masks_by_name(masks_a), masks_by_name(masks_b)
    if different := sorted(masks_a.keys() ^ masks_b.keys()):
        raise ValueError(f"the masks are of different weights: {', '.join(different)} only in one of them")
    kept, both, chance = 0, 0, 0.0
    for name in masks_a:
        a, b = masks_a[name].bool(), masks_b[name].bool()
        if a.shape != b.shape:
            raise ValueError(f"{name}: the masks have shapes {tuple(a.shape)} and {tuple(b.shape)}")
        kept_a, kept_b = int(a.count_nonzero()), int(b.count_nonzero())
        kept += kept_a + kept_b
        both += int((a & b.to(a.device)).count_nonzero())
        chance += kept_a * kept_b / a.numel()
    iou, expected = (n / (kept - n) if kept else float("nan") for n in (both, chance))
    return Overlap(iou, expected, len(masks_a))
