"""Dynamic sparse training: the masks move while the model trains, and every layer's number of weights stays the same.

Start from `prune(model, "random", sparsity, scope="erk")`, then drop and grow every so many steps of any training loop:
SET (Mocanu et al. 2018) grows at random, RigL (Evci et al. 2020) where the gradient is largest.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from .._checks import fraction as check_fraction
from .._checks import one_of, whole
from ..model_utils import Masks, attach_masks, get_masks, prunable_weights
from ..pruning import scores
from ..pruning.selection import select

GROWTH = ("gradient", "random")


def regrow(
    model: nn.Module, fraction: float, grow: str = "gradient", data=None, loss_fn: Callable | None = None, seed: int = 0
) -> Masks:
    """Move `round(fraction * kept)` weights of every masked layer of `model`, in place, and return its new masks.

    The kept weights lowest in |w| are dropped and as many are grown: with "gradient" where the gradient of the loss is
    largest in magnitude (RigL), with "random" anywhere (SET). Candidates are all weights then pruned, those just
    dropped included as in both papers; one that is chosen again stays as it was. All others start at zero, with their
    optimizer state cleared. The gradient is that of `loss_fn` on `data` (see `scores`) in the model's present train or
    eval mode; without `data`, what the last backward pass has left in `.grad`, at no cost. Ties go by position.

    Raises ValueError, and changes nothing, for a model without masks, a fraction outside [0, 1], an unknown `grow`, and
    a gradient that is missing, NaN or infinite.
    """
    one_of("grow", grow, GROWTH)
    check_fraction("fraction", fraction)
    masks = get_masks(model)
    if not masks:
        raise ValueError(
            f"{type(model).__name__} has no masks to move; start with prune(model, 'random', sparsity, scope='erk')"
        )
    weights = prunable_weights(model)
    if grow == "random":
        wanted = scores(model, "random", seed=seed)
    elif data is not None:
        wanted = scores(model, "gradient", data, loss_fn=loss_fn, seed=seed, train_mode=model.training)
    else:
        wanted = _present_gradients({name: weights[name] for name in masks})
    moved = {name: _move(name, weights[name], mask, wanted[name], fraction) for name, mask in masks.items()}
    with torch.no_grad():
        for name, mask in masks.items():  # what another optimizer than torch's has left there must not come to life
            weights[name].masked_fill_(~mask, 0)
    attach_masks(model, moved)
    return get_masks(model)


def drop_fraction_at(progress: float, initial: float = 0.3) -> float:
    """The fraction to move at `progress` in [0, 1]: initial / 2 * (1 + cos(pi * progress)) (Evci et al. 2020)."""
    check_fraction("progress", progress)
    check_fraction("initial", initial)
    return initial / 2 * (1 + math.cos(math.pi * progress))


def dynamic_sparsity(
    grow: str = "gradient",
    every: int = 100,
    until: float = 0.75,
    initial: float = 0.3,
    data=None,
    loss_fn: Callable | None = None,
    seed: int = 0,
) -> Callable[[nn.Module, int, int], None]:
    """A function `(model, step, steps)` for `fit(..., on_step=)`, or to call after each step (from 1) of any loop.

    It calls `regrow` at every `every`-th step as long as step / steps < `until`, with the fraction that
    `drop_fraction_at` gives for the part of that time gone by. The defaults are RigL's. Random growth depends on `seed`
    and the step alone, so training that goes on from a checkpoint repeats. Raises ValueError for an unknown `grow`,
    `every` below 1 and fractions outside [0, 1].
    """
    one_of("grow", grow, GROWTH)
    check_fraction("initial", initial)
    check_fraction("until", until)
    whole("every", every)

    def on_step(model: nn.Module, step: int, steps: int) -> None:
        if step % every == 0 and step < until * steps:
            fraction = drop_fraction_at(step / (until * steps), initial)
            own_seed = int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
            regrow(model, fraction, grow, data, loss_fn, own_seed)

    return on_step


def _move(name, weight, mask, wanted, fraction) -> torch.Tensor:
    """One layer's new mask: as many True entries as in `mask`."""
    kept = int(mask.count_nonzero())
    moving = round(fraction * kept)
    stay = select({name: weight.detach()}, moving, {name: mask}, torch.abs).keep[name]
    free = mask.numel() - (kept - moving)
    return stay | select({name: wanted}, free - moving, {name: ~stay}, torch.abs).keep[name]


def _present_gradients(weights) -> dict[str, torch.Tensor]:
    if missing := [name for name, weight in weights.items() if weight.grad is None]:
        raise ValueError(
            f"no gradient on {', '.join(missing)}; call regrow between backward() and the next zero_grad(), or give it "
            "data"
        )
    return {name: weight.grad for name, weight in weights.items()}
