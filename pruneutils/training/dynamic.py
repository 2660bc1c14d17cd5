"""Dynamic sparse training: the masks move while the model trains, and each layer keeps its number of weights.

Start from `prune(model, "random", sparsity, scope="erk")`, then drop and grow weights every so many steps of any
training loop: SET (Mocanu et al. 2018) grows at random, RigL (Evci et al. 2020) where the gradient is largest.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from .._checks import fraction as check_fraction
from .._checks import one_of, whole
from .._masks import gradients_masked
from .._torch import generator
from ..model_utils import Masks, attach_masks, get_masks, prunable_weights
from ..pruning import scores
from ..pruning.selection import select

GROWTH = ("gradient", "random")


def regrow(
    model: nn.Module,
    fraction: float,
    grow: str = "gradient",
    data: object = None,
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    seed: int = 0,
) -> Masks:
    """Move weights within each masked layer, in place: drop the smallest kept ones and grow as many elsewhere.

    Candidates for growth are all weights that are then pruned, as in both papers: those just dropped, too. One that is
    dropped and grown again stays as it was; all others start at zero, with their optimizer state cleared. Ties go by
    position.

    Args:
        model: A model with masks.
        fraction: The fraction of each layer's kept weights to move; `round(fraction * kept)` of them.
        grow: Where weights grow: "gradient" where the gradient of the loss is largest in magnitude (RigL), "random"
            anywhere (SET).
        data: One (inputs, targets) batch or an iterable of them for the gradient, in the model's present train or eval
            mode. Without it, the gradient is what the last backward pass has left in `.grad`, at no cost; that pass has
            to run inside `with pu.dense_gradients(model):`, since gradients of pruned weights are zero otherwise.
        loss_fn: `(outputs, targets) -> mean loss over the batch`; cross-entropy by default.
        seed: Of random growth.

    Returns:
        The new masks, with as many weights in each layer as before.

    Raises:
        ValueError: For a model without masks, a fraction outside [0, 1], an unknown `grow`, or a gradient that is
            missing, masked, NaN or infinite; the model is then as it was.

    Example:
        >>> model = pu.models.create("lenet300")
        >>> before = pu.prune(model, "random", 0.9, scope="erk")
        >>> after = pu.regrow(model, 0.25, grow="random")
        >>> int(before["fc1.weight"].sum()) == int(after["fc1.weight"].sum())
        True
        >>> torch.equal(before["fc1.weight"], after["fc1.weight"])
        False

    Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse connectivity" (SET);
    Evci et al. 2020, "Rigging the lottery" (RigL).
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
        # of its own: the masks may have been drawn from this very seed, and then what is dropped would come back
        wanted = scores(model, "random", seed=generator(seed, "grow").initial_seed())
    elif data is not None:
        wanted = scores(model, "gradient", data, loss_fn=loss_fn, seed=seed, train_mode=model.training)
    else:
        wanted = _present_gradients({name: weights[name] for name in masks}, masks)
    moved = {name: _move(name, weights[name], mask, wanted[name], fraction) for name, mask in masks.items()}
    with torch.no_grad():
        for name, mask in masks.items():  # what another optimizer than torch's has left there must not come to life
            weights[name].masked_fill_(~mask, 0)
    attach_masks(model, moved)
    return get_masks(model)


def drop_fraction_at(progress: float, initial: float = 0.3) -> float:
    """Compute the fraction of weights to move at some point of training: a cosine that falls from `initial` to 0.

    Args:
        progress: How much of the time for moving has gone by, in [0, 1].
        initial: The fraction at the beginning, in [0, 1].

    Returns:
        initial / 2 * (1 + cos(pi * progress)).

    Raises:
        ValueError: If either is outside [0, 1].

    Example:
        >>> [round(pu.drop_fraction_at(progress), 3) for progress in (0, 0.5, 1)]
        [0.3, 0.15, 0.0]

    Evci et al. 2020, "Rigging the lottery".
    """
    check_fraction("progress", progress)
    check_fraction("initial", initial)
    return initial / 2 * (1 + math.cos(math.pi * progress))


def dynamic_sparsity(
    grow: str = "gradient",
    every: int = 100,
    until: float = 0.75,
    initial: float = 0.3,
    data: object = None,
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    seed: int = 0,
) -> Callable[[nn.Module, int, int], None]:
    """Make a function that calls `regrow` now and then while a model trains.

    Pass it to `fit` as `on_step`, or call it after each step of any loop, which has to run inside `with
    pu.dense_gradients(model):` where weights grow by the gradient in `.grad`. It keeps nothing between calls: random
    growth depends on `seed` and the step alone, so training that goes on from a checkpoint repeats. The defaults are
    RigL's.

    Args:
        grow: As for `regrow`.
        every: Move weights after every so many steps.
        until: The fraction of all steps after which no weight moves any more.
        initial: The fraction of weights to move at the beginning; it falls to 0 as `drop_fraction_at` says.
        data: As for `regrow`.
        loss_fn: As for `regrow`.
        seed: Of random growth.

    Returns:
        A function `(model, step, steps)`: `step` counts from 1, `steps` is how many there are in all.

    Raises:
        ValueError: For an unknown `grow`, `every` below 1, or a fraction outside [0, 1].

    Example:
        >>> train, test = pu.data.load("digits")
        >>> model = pu.models.create("lenet300")
        >>> before = pu.prune(model, "random", 0.9, scope="erk")
        >>> table = pu.fit(model, train.subset(640), epochs=2, optimizer="adam", on_step=pu.dynamic_sparsity(every=3))
        >>> torch.equal(before["fc1.weight"], pu.get_masks(model)["fc1.weight"]), table.sparsity.round(4).tolist()
        (False, [0.9, 0.9])

    Mocanu et al. 2018 (SET); Evci et al. 2020 (RigL).
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

    on_step.dense_gradients = grow == "gradient" and data is None  # what `fit` asks
    return on_step


def _move(name, weight, mask, wanted, fraction) -> torch.Tensor:
    """One layer's new mask: as many True entries as in `mask`."""
    kept = int(mask.count_nonzero())
    moving = round(fraction * kept)
    stay = select({name: weight.detach()}, moving, {name: mask}, torch.abs).keep[name]
    free = mask.numel() - (kept - moving)
    return stay | select({name: wanted}, free - moving, {name: ~stay}, torch.abs).keep[name]


def _present_gradients(weights, masks) -> dict[str, torch.Tensor]:
    """Return what the last backward pass has left; ValueError where that tells nothing of pruned weights."""
    if missing := [name for name, weight in weights.items() if weight.grad is None]:
        raise ValueError(
            f"no gradient on {', '.join(missing)}; call regrow between backward() and the next zero_grad(), or give it "
            "data"
        )
    if gradients_masked(weights.values()) and not any(weights[n].grad[~mask].any() for n, mask in masks.items()):
        raise ValueError(
            "the gradients of all pruned weights were masked; run the backward pass inside "
            "`with pu.dense_gradients(model):`, or give regrow data"
        )
    return {name: weight.grad for name, weight in weights.items()}
