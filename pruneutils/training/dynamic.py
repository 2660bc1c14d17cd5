"""Dynamic sparse training: masks that move, as in SET (Mocanu et al. 2018) and RigL (Evci et al. 2020)."""

import math

import torch
from torch import nn

from .. import _checks
from .._torch import derive_seed, generator
from ..masks import attach, gradients_masked
from ..model_utils import Masks, get_masks
from ..pruning import scores
from ..pruning.selection import select
from ..target import Target
from .loop import OnStep

GROWTH = ("gradient", "random")


def regrow(model: nn.Module, fraction: float, grow: str = "gradient", seed: int = 0) -> Masks:
    """Move weights within each masked layer, in place: drop the smallest kept ones and grow as many elsewhere.

    All weights that are then pruned can grow, as in both papers. One that is dropped and grown again stays as it was;
    all others start at zero, with their optimizer state cleared.

    Args:
        model: A model with masks.
        fraction: The fraction of each layer's kept weights to move; `round(fraction * kept)` of them.
        grow: "gradient": where `.grad` is largest in magnitude after a backward pass inside `with
            pu.model_utils.dense_gradients(model):` (RigL); "random": anywhere (SET).
        seed: Of random growth.

    Returns:
        The new masks, with as many weights in each layer as before.

    Raises:
        ValueError: For a model without masks, or a gradient that is missing, masked, NaN or infinite.

    Example:
        >>> model = torch.nn.Linear(10, 10)
        >>> masks = pu.prune(model, "random", 0.9)
        >>> int(pu.training.regrow(model, 0.25, grow="random")["weight"].sum())
        10
    """
    _checks.one_of("grow", grow, GROWTH)
    _checks.fraction("fraction", fraction)
    target = Target.of(model, strict=False)
    weights, masks = target.prunable, target.masks
    if not masks:
        raise ValueError("the model has no masks to move; start with prune(model, 'random', sparsity, scope='erk')")
    if grow == "random":
        # a seed of its own: masks that were drawn from this one would grow back what is dropped
        wanted = scores(model, "random", seed=generator(seed, "grow").initial_seed())
    else:
        wanted = _present_gradients({name: weights[name] for name in masks}, masks)
    moved = {name: _move(name, weights[name], mask, wanted[name], fraction) for name, mask in masks.items()}
    attach(target.modules, masks)  # an optimizer that is not torch's may have written into pruned weights
    attach(target.modules, moved)
    return get_masks(model)


def dynamic_sparsity(
    grow: str = "gradient", every: int = 100, until: float = 0.75, initial: float = 0.3, seed: int = 0
) -> OnStep:
    """Make a function that calls `regrow` now and then while a model trains; the defaults are RigL's.

    Pass it to `fit` as `on_step`, or call it after each step of any loop, inside `with
    pu.model_utils.dense_gradients(model):` where weights grow by the gradient in `.grad`.

    Args:
        grow, seed: As for `regrow`.
        every, until: Move weights after every so many steps, until this fraction of all steps.
        initial: The fraction of weights to move at the beginning; it falls to 0 along a cosine.

    Returns:
        A function `(model, step, steps)`: `step` counts from 1, `steps` is how many there are in all.

    Example:
        >>> train, test = pu.data.load("digits")
        >>> model = pu.models.create("lenet300")
        >>> masks = pu.prune(model, "random", 0.9, scope="erk")
        >>> pu.fit(model, train, epochs=1, on_step=pu.dynamic_sparsity(every=10)).sparsity.round(4).tolist()
        [0.9]
    """
    _checks.one_of("grow", grow, GROWTH)
    _checks.fraction("initial", initial)
    _checks.fraction("until", until)
    _checks.whole("every", every)

    def on_step(model: nn.Module, step: int, steps: int) -> None:
        if step % every == 0 and step < until * steps:
            fraction = initial / 2 * (1 + math.cos(math.pi * (step / (until * steps))))
            regrow(model, fraction, grow, derive_seed(seed, step))

    on_step.dense_gradients = grow == "gradient"  # see `fit`
    return on_step


def _move(name, weight, mask, wanted, fraction) -> torch.Tensor:
    """One layer's new mask: as many True entries as in `mask`."""
    kept = int(mask.count_nonzero())
    moving = round(fraction * kept)
    stay = select({name: weight.detach()}, moving, {name: mask}, torch.abs).keep[name]
    free = mask.numel() - (kept - moving)
    return stay | select({name: wanted}, free - moving, {name: ~stay}, torch.abs).keep[name]


def _present_gradients(weights, masks) -> dict[str, torch.Tensor]:
    """Return what the last backward pass has left, unless the gradients of pruned weights were masked."""
    if missing := [name for name, weight in weights.items() if weight.grad is None]:
        raise ValueError(f"no gradient on {', '.join(missing)}; call regrow after backward()")
    if gradients_masked(weights.values()) and not any(weights[n].grad[~mask].any() for n, mask in masks.items()):
        way = "run the backward pass inside `with pu.model_utils.dense_gradients(model):`"
        raise ValueError(f"the gradients of all pruned weights were masked; {way}")
    return {name: weight.grad for name, weight in weights.items()}
