"""Filters removed from a trained network: which measure of importance, in how many rounds, and what repairs it."""

import contextlib
import copy
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from .. import _checks, data, models
from .._files import repository
from .._torch import batches, in_mode
from ..checkpoints import load
from ..costs import cost
from ..data import Images
from ..experiments.statistics import compare
from ..model_utils import accuracy
from ..pruning import list_importances, prune_filters, recalibrate
from ..training import fit, gradual_filters
from .one_shot import residual_network
from .public_networks import NETWORKS, cifar10_as_published
from .while_training import ENOUGH_SEEDS, _points

MEASURES = list_importances()  # "random" among them, the control that every measure has to beat


def gradient_norm(model: nn.Module, samples: object) -> float:
    """Measure the norm of the gradient of the mean loss with respect to all parameters, in evaluation mode.

    Args:
        model: A classifier.
        samples: One (inputs, targets) batch, or an iterable of batches of equal size.

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
        for inputs, targets in batches(samples):
            found = torch.autograd.grad(F.cross_entropy(model(inputs), targets), parameters, allow_unused=True)
            n += 1
            for sum_, gradient in zip(total, found, strict=True):
                if gradient is not None:
                    sum_ += gradient
    return sum((sum_ / n).square().sum().item() for sum_ in total) ** 0.5


def remove_and_repair(
    model: nn.Module, train: Images, test: Images, importance: str, ratio: float, seed: int = 0, *,
    of: str = "macs", min_density: float = 0.0,
    samples: int = 640, steps: int = 50, lr: float = 0.01, precision: str = "float32",
) -> list[dict]:  # fmt: skip
    """Remove filters from a trained network at once, then measure it as it is, recalibrated, and shortly fine-tuned.

    Args:
        model: The trained network; it stays as it is.
        train: Images for the importance, the recalibration and the fine-tuning.
        test: Images for the accuracy.
        importance: One of `MEASURES`.
        ratio: The fraction to remove.
        of: Of what: "filters", "parameters" or "macs". Measures that remove equally many filters leave networks of very
            different work, so measures are compared at equal MACs too.
        min_density: The fraction of its filters that every layer keeps.
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
    small = prune_filters(
        copy.deepcopy(model), importance, ratio, of=of, data=batched, min_density=min_density, seed=seed, **options
    )
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


@functools.lru_cache(maxsize=8)
def residual_on_digits(seed: int, width: int = 16) -> tuple[nn.Module, Images, Images]:
    """Train a small residual network on the digits that come with a package; a process trains each one once.

    Args:
        seed: Of weights and data order.
        width: Channels of the first of three stages.

    Returns:
        The network, not to be changed, with the training and the test images.
    """
    train, test = data.load("digits")
    model = residual_network("basic", blocks=1, stages=3, width=width, channels=1, stem=4, seed=seed)
    fit(model, train, None, 3, "adam", lr=5e-3, lr_schedule="one-cycle", seed=seed)
    return model, train, test


def filters_of_adapted(
    importance: str, ratio: float, seed: int, rounds: int = 0, of: str = "macs", network: str = "resnet20",
    tested: int = 2000, precision: str = "auto", device: str = "cpu",
) -> list[dict]:  # fmt: skip
    """Remove filters from an adapted network on CIFAR-10: `remove_and_repair`, or `remove_in_rounds` for rounds.

    The network is the same one for every seed: a seed is a choice and an order of the images, not a network.

    Args:
        importance: One of `MEASURES`.
        ratio: The fraction to remove.
        seed: As for `remove_and_repair`.
        rounds: 0 removes at once and repairs; otherwise in how many rounds, with training.
        of: As for `remove_and_repair`; rounds always count MACs.
        network: "resnet20" or "resnet56".
        tested: How many of the test images are used, the same ones in every run.
        precision: Of training and tests.
        device: Where to compute.

    Returns:
        The rows of either, with the name of the data.
    """
    train, test = cifar10_as_published(device)
    test = test.subset(tested)
    model = load(repository() / NETWORKS / f"{network}_seed0.safetensors").to(device)
    if rounds:
        sampled = {} if importance in ("random", "mag_based", "l1", "bn", "biased_loss_tracked") else {"n_samples": 640}
        rows = remove_in_rounds(model, train, test, importance, ratio, rounds, seed, precision=precision, **sampled)
    else:
        rows = remove_and_repair(model, train, test, importance, ratio, seed, of=of, precision=precision)
    return [row | {"data": train.name} for row in rows]


def filters_grid(
    seeds: Sequence[int], ratios: Sequence[float], in_rounds: Sequence[str] = ("mag_based", "grad_preserve"),
    rounds: Sequence[int] = (1, 5), **common: object,
) -> list[dict]:  # fmt: skip
    """List the runs of `filters_of_adapted`: the first ratio of MACs, rounds, the same ratio of filters, other ratios.

    Args:
        seeds: The seeds.
        ratios: The ratios; the rounds are compared at the first.
        in_rounds: The measures whose rounds are compared.
        rounds: The numbers of rounds.
        **common: Further arguments of `filters_of_adapted`, the same for all runs.

    Returns:
        One config per run.
    """

    def at_once(ratio: float, **of: str) -> list[dict]:
        settings = {"ratio": ratio, "rounds": 0, **of, **common}
        return [{"importance": measure, "seed": seed, **settings} for seed in seeds for measure in MEASURES]

    grid = at_once(ratios[0])
    grid += [
        {"importance": measure, "seed": seed, "ratio": ratios[0], "rounds": n, **common}
        for seed in seeds
        for measure in in_rounds
        for n in rounds
    ]
    grid += at_once(ratios[0], of="filters")
    return grid + [config for ratio in ratios[1:] for config in at_once(ratio)]


def filters_from_scratch(
    network: str, importance: str, ratio: float, seed: int, rounds: int = 10, total_epochs: int = 40,
    precision: str = "auto", device: str = "cuda",
) -> list[dict]:  # fmt: skip
    """Train a network, remove its filters in rounds on the way, and train it to the end, with the original's settings.

    Only the lengths differ: the original has 25 rounds and 160 epochs. SGD with momentum 0.9, weight decay 1e-4,
    batches of 128; an epoch before each removal at a learning rate of 0.1; then 0.1 that falls to a tenth after half of
    the remaining epochs and to a hundredth after three quarters.

    Args:
        network: "vgg13_relu_bn", "mobilenet_v1" or "resnet56_b".
        importance: One of `MEASURES`.
        ratio: The fraction of the filters to remove.
        seed: Of weights and data order.
        rounds: In how many rounds.
        total_epochs: Of the rounds and the final training together.
        precision: Of training and tests.
        device: Where to train.

    Returns:
        A row per epoch: epoch, stage, accuracy, parameters, data.
    """
    train, test = data.load("cifar10", device=device)
    model = models.create(network, seed=seed).to(device)
    table = gradual_filters(
        model, train, test, importance, ratio, rounds, total_epochs - rounds, lr=0.1, weight_decay=1e-4,
        lr_schedule="step", precision=precision, seed=seed,
    )  # fmt: skip
    table = table.rename(columns={"test_accuracy": "accuracy"}).assign(data=train.name)
    return table[["epoch", "stage", "accuracy", "parameters", "data"]].to_dict("records")


def from_scratch_filters_grid(seeds: Sequence[int], ratio: float = 0.75) -> list[dict]:
    """List the runs of `filters_from_scratch`: three networks and four measures for a seed, before the next seed.

    Args:
        seeds: The seeds.
        ratio: The fraction of the filters to remove.

    Returns:
        One config per run.
    """
    networks, measures = ("vgg13_relu_bn", "mobilenet_v1", "resnet56_b"), ("random", "mag_based", "loss_based", "grasp")
    return [
        {"network": network, "importance": measure, "ratio": ratio, "seed": seed}
        for seed in seeds
        for network in networks
        for measure in measures
    ]


def latencies(networks: Mapping[str, nn.Module], inputs: torch.Tensor, passes: int = 30) -> pd.DataFrame:
    """Measure the latency of networks in turn, so that whatever else the machine does meets all of them alike.

    Args:
        networks: The networks by name; the first is the reference.
        inputs: A batch (N, ...).
        passes: Forward passes of each, after three that are not counted; one thread computes.

    Returns:
        A row per network: network, milliseconds (median), and how many times faster than the first (the median of the
        ratios of neighbouring passes, with its quartiles).

    Example:
        >>> from pruneutils import studies
        >>> table = studies.latencies({"a": pu.models.create("lenet300")}, torch.rand(1, 1, 28, 28), passes=3)
        >>> table.network.tolist(), table.faster.tolist()
        (['a'], [1.0])
    """
    from torch.utils import benchmark  # takes half a second to import

    timers = [benchmark.Timer("run(x)", globals={"run": net, "x": inputs}, num_threads=1) for net in networks.values()]
    with torch.no_grad(), contextlib.ExitStack() as modes:
        for network in networks.values():
            modes.enter_context(in_mode(network, training=False))
        for timer in timers:
            timer.timeit(3)
        times = np.array([[timer.timeit(1).median for timer in timers] for _ in range(passes)])
    low, faster, high = np.quantile(times[:, :1] / times, [0.25, 0.5, 0.75], axis=0)
    milliseconds = 1000 * np.median(times, axis=0)
    return pd.DataFrame(
        {"network": list(networks), "milliseconds": milliseconds, "faster": faster, "low": low, "high": high}
    )


def removed_runs(frame: pd.DataFrame) -> pd.DataFrame:
    """Take the finished runs of a sweep, and say in every row which quantity was held equal.

    Args:
        frame: The table of a sweep over `filters_grid`.

    Returns:
        The rows, with `of` ("macs" where it is not given) and `equal` ("equal MACs", "equal filters").
    """
    done = frame[frame.status == "done"]
    of = done.of.fillna("macs") if "of" in done else "macs"
    done = done.assign(of=of)
    return done.assign(equal="equal " + done.of.replace("macs", "MACs"))


def against_random(frame: pd.DataFrame, state: str = "fine-tuned") -> pd.DataFrame:
    """Compare each measure with removing filters at random, as one family.

    Args:
        frame: The finished runs of `remove_and_repair`, with the column `of`.
        state: "removed", "recalibrated" or "fine-tuned".

    Returns:
        The table of `compare`, for each quantity that was held equal and each ratio.
    """
    return compare(frame[frame.state == state], by="importance", against="random", within=["of", "ratio"])


def with_every_measure(frame: pd.DataFrame) -> pd.DataFrame:
    """Leave out what was held equal, and the ratios, of which a measure has fewer than five seeds so far."""
    seeds = frame.groupby(["of", "ratio", "importance"]).seed.nunique().groupby(["of", "ratio"])
    enough = (seeds.min() >= ENOUGH_SEEDS) & (seeds.size() == frame.importance.nunique())
    return frame[[enough[pair] for pair in zip(frame["of"], frame.ratio)]]


def rounds_compared(frame: pd.DataFrame) -> pd.DataFrame:
    """Compare many rounds with one, by the accuracy after the last epoch, for each measure.

    Args:
        frame: The finished runs of `remove_in_rounds`.

    Returns:
        The table of `compare`.
    """
    last = frame[frame.epoch == frame.epoch.max()]
    return compare(last, by="rounds", against=last.rounds.min(), within="importance")


def tell_rounds(frame: pd.DataFrame) -> str:
    """Answer in a sentence whether many rounds differ from one.

    Args:
        frame: The finished runs of `remove_in_rounds`.

    Returns:
        The sentence, with the paired differences in percentage points.
    """
    if frame.empty or (seeds := frame.groupby(["importance", "rounds"]).seed.nunique().min()) < ENOUGH_SEEDS:
        return f"{0 if frame.empty else seeds} of {ENOUGH_SEEDS} seeds have run in rounds, which gives no verdict."
    told = [
        f"by `{row.importance}` {_points(row)}{'' if row.differs else ', which is open'}"
        for row in rounds_compared(frame).itertuples()
    ]
    most, least = frame.rounds.max(), frame.rounds.min()
    return (
        f"Accuracy after {most} rounds of removal minus that after {least}, equally long training: {'; '.join(told)}."
    )


def tell_filters(frame: pd.DataFrame, ratio: float, of: str, state: str = "fine-tuned") -> str:
    """Answer in sentences which measure keeps most, and which ones random removal equals or beats.

    Args:
        frame: The finished runs of `remove_and_repair`, with the column `of`.
        ratio: The ratio to tell of.
        of: The quantity that was held equal, "macs" or "filters".
        state: As for `against_random`.

    Returns:
        The sentences, with the paired differences in percentage points.
    """
    rows = frame[(frame.state == state) & (frame.ratio == ratio) & (frame.of == of)]
    if rows.empty or (seeds := rows.groupby("importance").seed.nunique().min()) < ENOUGH_SEEDS:
        return f"{0 if rows.empty else seeds} of {ENOUGH_SEEDS} seeds have run, which gives no verdict."
    complete = with_every_measure(frame[(frame.state == state) & (frame.ratio == ratio)])
    found = against_random(complete, state)  # one family, whatever was held equal, as the picture shows them
    found = found[found["of"] == of]
    means = rows.groupby("importance").accuracy.mean().sort_values(ascending=False)
    told = f"With {100 * ratio:.0f} % of the {of.replace('macs', 'MACs')} removed and the network {state}, "
    if means.index[0] == "random":
        told += f"no measure is above random removal, which leaves {100 * means['random']:.1f} %. "
    else:
        told += f"the highest mean is that of `{means.index[0]}`, {100 * means.iloc[0]:.1f} %; "
        told += f"random removal leaves {100 * means['random']:.1f} %. "
    better = [row.a for row in found.itertuples() if row.differs and row.larger == row.a]
    named = ", ".join(f"`{row.a}` ({_points(row)})" for row in found.itertuples() if row.a in better)
    worse = [f"`{row.a}` ({_points(row)})" for row in found.itertuples() if row.differs and row.larger == "random"]
    same = [f"`{row.a}`" for row in found.itertuples() if not row.differs]
    told += f"{len(better)} of {len(found)} measures beat random removal{': ' + named if named else ''}."
    told += f" Worse than random: {', '.join(worse)}." if worse else ""
    return told + (f" Not to be told apart from random: {', '.join(same)}." if same else "")


def tell_flow(frame: pd.DataFrame, ratio: float, of: str, state: str = "fine-tuned") -> str:
    """Answer in a sentence whether networks that keep the norm of the gradient keep the accuracy.

    Args:
        frame: As for `tell_filters`.
        ratio: As for `tell_filters`.
        of: As for `tell_filters`.
        state: As for `tell_filters`.

    Returns:
        The sentence, with Spearman's rank correlation over the measures, its range over the seeds.
    """
    rows = frame[(frame.state == state) & (frame.ratio == ratio) & (frame.of == of)]
    found = [part.gradient_norm.corr(part.accuracy, method="spearman") for _, part in rows.groupby("seed")]
    norms = rows.groupby("importance").gradient_norm.mean()
    return (
        f"Removal multiplies the gradient's norm by {norms.min():.3g} (`{norms.idxmin()}`) to {norms.max():.3g} "
        f"(`{norms.idxmax()}`). Over the {len(norms)} measures, the rank correlation of this factor "
        "with the accuracy (positive: where the norm rises more, the accuracy is higher) "
        f"lies between {min(found):+.2f} and {max(found):+.2f} in the {len(found)} seeds."
    )
