"""Filters removed from a trained network: which measure of importance, in how many rounds, and what repairs it."""

import copy
from collections.abc import Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from .. import _checks
from .._files import repository
from .._torch import batches, in_mode
from ..checkpoints import load
from ..costs import cost
from ..data import Images
from ..experiments.statistics import compare
from ..model_utils import accuracy
from ..pruning import list_importances, prune_filters, recalibrate
from ..training import fit, gradual_filters
from .public_networks import NETWORKS, cifar10_as_published
from .while_training import _points

MEASURES = list_importances()  # "random" among them, the control that every measure has to beat


def gradient_norm(model: nn.Module, data: object) -> float:
    """Measure the norm of the gradient of the mean loss with respect to all parameters, in evaluation mode.

    Args:
        model: A classifier.
        data: One (inputs, targets) batch, or an iterable of batches of equal size.

    Returns:
        The L2 norm of the mean of the batches' gradients.

    Example:
        >>> from pruneutils import studies
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> torch.nn.init.zeros_(model.weight)
        Parameter containing:
        tensor([[0., 0.],
                [0., 0.]], requires_grad=True)
        >>> studies.gradient_norm(model, (torch.tensor([[2.0, 0.0]]), torch.tensor([0])))
        1.4142135381698608
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    total, n = [torch.zeros_like(p) for p in parameters], 0
    with in_mode(model, training=False):
        for inputs, targets in batches(data):
            found = torch.autograd.grad(F.cross_entropy(model(inputs), targets), parameters, allow_unused=True)
            n += 1
            for sum_, gradient in zip(total, found, strict=True):
                if gradient is not None:
                    sum_ += gradient
    return sum((sum_ / n).square().sum().item() for sum_ in total) ** 0.5


def remove_and_repair(
    model: nn.Module, train: Images, test: Images, importance: str, ratio: float, seed: int = 0, *,
    of: str = "macs", samples: int = 640, steps: int = 50, lr: float = 0.01, precision: str = "float32",
) -> list[dict]:  # fmt: skip
    """Remove filters from a trained network at once, then measure it as it is, recalibrated, and shortly fine-tuned.

    Args:
        model: The trained network; it stays as it is.
        train: Images for the importance, the recalibration and the fine-tuning.
        test: Images for the accuracy.
        importance: One of `MEASURES`.
        ratio: The fraction to remove.
        of: Of what: "filters", "parameters" or "macs". Measures that remove equally many filters leave networks of very
            different work, so measures are compared at equal MACs.
        seed: Decides which training images are seen, and in which order.
        samples: Images for the importance, the recalibration and the gradient norm; the same ones.
        steps: Of the fine-tuning, by SGD with batches of 128 and a cosine from `lr` to 0.
        lr: The first learning rate of the fine-tuning.
        precision: Of fine-tuning and tests.

    Returns:
        A row per state ("removed", "recalibrated", "fine-tuned"): accuracy; then the same for all three: filters_left,
        parameters_left and macs_left as fractions, and gradient_norm, that of the network with filters removed (as it
        is) relative to the dense one.
    """
    _checks.one_of("importance", importance, MEASURES)
    shown = train.subset(samples, seed)
    batched = list(shown.batches(64, shuffle=False, augment=False))
    options = {} if importance in ("random", "mag_based", "l1", "bn") else {"n_samples": samples}
    if importance == "biased_loss_tracked":
        options = {}
    before, dense_norm = cost(model, batched[0][0]), gradient_norm(model, batched)
    widths = _filters(model)
    small = prune_filters(copy.deepcopy(model), importance, ratio, of=of, data=batched, seed=seed, **options)
    after = cost(small, batched[0][0])
    facts = {
        "filters_left": _filters(small) / widths,
        "parameters_left": after.parameters / before.parameters,
        "macs_left": after.macs / before.macs,
        "gradient_norm": gradient_norm(small, batched) / dense_norm,
    }
    found = {"removed": accuracy(small, test, precision=precision)}
    recalibrate(small, [inputs for inputs, _ in batched])
    found["recalibrated"] = accuracy(small, test, precision=precision)
    tuning = {"lr": lr, "lr_schedule": "cosine", "steps_per_epoch": steps, "precision": precision, "seed": seed}
    found["fine-tuned"] = float(fit(small, train, test, 1, "sgd", **tuning).test_accuracy.iloc[-1])
    return [{"state": state, "accuracy": value} | facts for state, value in found.items()]


def _filters(model: nn.Module) -> int:
    """Count the filters of all convolutions."""
    return sum(module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d))


def remove_in_rounds(
    model: nn.Module, train: Images, test: Images, importance: str, ratio: float, rounds: int, seed: int = 0, *,
    pruning_epochs: int = 5, epochs: int = 5, steps: int = 40, lr: float = 0.01, precision: str = "float32",
    **options: object,
) -> list[dict]:  # fmt: skip
    """Remove filters in one round or in many, with the same training before the last removal and the same after it.

    Args:
        model: The trained network; it stays as it is.
        train: As for `remove_and_repair`.
        test: As for `remove_and_repair`.
        importance: As for `remove_and_repair`.
        ratio: The fraction of the MACs to remove.
        rounds: A divisor of `pruning_epochs`.
        seed: As for `remove_and_repair`.
        pruning_epochs: Epochs before the last removal, shared evenly by the rounds.
        epochs: Epochs after it, with a cosine from `lr` to 0.
        steps: Of an epoch, batches of 128.
        lr: The learning rate of SGD in the rounds.
        precision: Of training and tests.
        **options: Options of the importance.

    Returns:
        A row per epoch as from `gradual_filters`: epoch, stage, accuracy, parameters.
    """
    each, rest = divmod(pruning_epochs, rounds)
    if rest:
        raise ValueError(f"rounds={rounds} does not divide pruning_epochs={pruning_epochs}")
    small = copy.deepcopy(model)
    table = gradual_filters(
        small, train, test, importance, ratio, rounds, epochs, epochs_each=each, lr=lr, lr_schedule="cosine",
        steps_per_epoch=steps, precision=precision, preserve_momentum=True, of="macs", seed=seed, options=options,
    )  # fmt: skip
    table = table.rename(columns={"test_accuracy": "accuracy"})
    return table[["epoch", "stage", "accuracy", "parameters"]].to_dict("records")


def filters_of_adapted(
    importance: str, ratio: float, seed: int, rounds: int = 0, network: str = "resnet20", tested: int = 2000,
    precision: str = "auto",
) -> list[dict]:  # fmt: skip
    """Remove filters from an adapted network on CIFAR-10: `remove_and_repair`, or `remove_in_rounds` for rounds.

    The network is the same one for every seed: a seed is a choice and an order of the images, not a network.

    Args:
        importance: One of `MEASURES`.
        ratio: The fraction of the MACs to remove.
        seed: As for `remove_and_repair`.
        rounds: 0 removes at once and repairs; otherwise in how many rounds, with training.
        network: "resnet20" or "resnet56".
        tested: How many of the test images are used, the same ones in every run.
        precision: Of training and tests.

    Returns:
        The rows of either, with the name of the data.
    """
    train, test = cifar10_as_published()
    test = test.subset(tested)
    model = load(repository() / NETWORKS / f"{network}_seed0.safetensors")
    if rounds:
        sampled = {} if importance in ("random", "mag_based", "l1", "bn", "biased_loss_tracked") else {"n_samples": 640}
        rows = remove_in_rounds(model, train, test, importance, ratio, rounds, seed, precision=precision, **sampled)
    else:
        rows = remove_and_repair(model, train, test, importance, ratio, seed, precision=precision)
    return [row | {"data": train.name} for row in rows]


def filters_grid(
    seeds: Sequence[int], ratios: Sequence[float], in_rounds: Sequence[str] = ("mag_based", "grad_preserve"),
    rounds: Sequence[int] = (1, 5),
) -> list[dict]:  # fmt: skip
    """List the runs of `filters_of_adapted`, the first ratio before the others and every seed complete.

    Args:
        seeds: The seeds.
        ratios: The ratios; the rounds are compared at the first.
        in_rounds: The measures whose rounds are compared.
        rounds: The numbers of rounds.

    Returns:
        One config per run.
    """

    def at_once(ratio: float) -> list[dict]:
        return [
            {"importance": measure, "ratio": ratio, "seed": seed, "rounds": 0} for seed in seeds for measure in MEASURES
        ]

    grid = at_once(ratios[0])
    grid += [
        {"importance": measure, "ratio": ratios[0], "seed": seed, "rounds": n}
        for seed in seeds
        for measure in in_rounds
        for n in rounds
    ]
    return grid + [config for ratio in ratios[1:] for config in at_once(ratio)]


def against_random(frame: pd.DataFrame, state: str = "recalibrated") -> pd.DataFrame:
    """Compare each measure with removing filters at random, at each ratio, as one family.

    Args:
        frame: The finished runs of `remove_and_repair`.
        state: "removed", "recalibrated" or "fine-tuned".

    Returns:
        The table of `compare`.
    """
    return compare(frame[frame.state == state], by="importance", against="random", within="ratio")


def rounds_compared(frame: pd.DataFrame) -> pd.DataFrame:
    """Compare many rounds with one, by the accuracy after the last epoch, for each measure.

    Args:
        frame: The finished runs of `remove_in_rounds`.

    Returns:
        The table of `compare`.
    """
    last = frame[frame.epoch == frame.epoch.max()]
    return compare(last, by="rounds", against=last.rounds.min(), within="importance")


def tell_filters(frame: pd.DataFrame, ratio: float, state: str = "recalibrated") -> str:
    """Answer in two sentences which measures beat random removal, and which one keeps most.

    Args:
        frame: The finished runs of `remove_and_repair`.
        ratio: The ratio to tell of.
        state: As for `against_random`.

    Returns:
        The sentences.
    """
    rows = frame[(frame.state == state) & (frame.ratio == ratio)]
    found = against_random(rows, state)
    means = rows.groupby("importance").accuracy.mean().sort_values(ascending=False)
    best = found[found.a == means.index[0]] if means.index[0] != "random" else None
    told = f"With {ratio:.0%} of the MACs gone and the network {state}, {means.index[0]} is best: {means.iloc[0]:.1%}"
    if best is not None:
        told += f", against {means['random']:.1%} for filters chosen at random ({_points(next(best.itertuples()))})"
    worse = [f"{row.a} ({_points(row)})" for row in found.itertuples() if row.differs and row.larger == "random"]
    same = [f"{row.a} ({_points(row)})" for row in found.itertuples() if not row.differs]
    told += "."
    if same:
        told += f" No better than random, as far as these runs can tell: {', '.join(same)}."
    if worse:
        told += f" Worse than random: {', '.join(worse)}."
    if not same and not worse:
        told += f" All {len(found)} measures beat random removal."
    return told
