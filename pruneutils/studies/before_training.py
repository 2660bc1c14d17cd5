"""Networks pruned before training and then trained: the runs, their grid, and what they say."""

import copy
import math
import warnings
from collections.abc import Sequence
from functools import partial

import pandas as pd
import torch
from torch import nn

from .. import _checks, data, models
from ..controls import inverted, redraw, shuffle_masks
from ..experiments.statistics import compare
from ..model_utils import count, layer_table, set_masks
from ..pruning import (
    LayerCollapseWarning,
    TiedScoresWarning,
    prune,
    scores,
)
from ..training import fit
from .while_training import ENOUGH_SEEDS, _points


def train_pruned(
    method: str, compression: float, control: str, seed: int, *, iterations: int = 1, pre_epochs: int = 0,
    epochs: int = 30, network: str = "fc", dataset: str = "mnist", optimizer: str = "adam", lr: float = 1e-3,
    lr_schedule: str = "constant", weight_decay: float = 0.0, batch_size: int = 256, test_every: int = 10,
    precision: str = "float32", device: str = "cpu",
) -> list[dict]:  # fmt: skip
    """Prune a network at its initialisation (or after some epochs), train it, and measure it on the way.

    The defaults are those of a published comparison: Adam with a constant learning rate, one optimizer before and after
    the pruning, 100 random training images for the criteria that look at data. Since the learning rate is constant, a
    run of 30 epochs is the beginning of one of 150.

    Args:
        method: A criterion's name, which further words may follow ("synflow one-shot"); or "dense".
        compression: The density is 10 ** -compression.
        control: "none"; "shuffled" (each mask permuted within its layer); "redrawn" (the mask on other random weights,
            which then train for all epochs); or "inverted" (the lowest scores stay).
        seed: Of the weights, the images, the order of the data and what the control draws.
        iterations: In how many exponential steps to prune.
        pre_epochs: Epochs before the pruning.
        epochs: Epochs after it.
        network: A name for `models.create`.
        dataset: A name for `data.load`.
        optimizer: "adam", or "sgd" (momentum .9).
        lr: The first learning rate.
        lr_schedule: As for `fit`; the training after the pruning begins it anew.
        weight_decay: As for `fit`.
        batch_size: Of the training.
        test_every: Measure after every so many epochs.
        precision: Of the training.
        device: Where to train.

    Returns:
        A row per measurement: epoch (counted from the pruning), accuracy, sparsity, empty_layers, commonest (the share
        of the commonest class among the test images), precision, data.
    """
    _checks.one_of("control", control, ("none", "shuffled", "redrawn", "inverted"))
    _checks.one_of("optimizer", optimizer, _OPTIMIZERS)
    train, test = data.load(dataset, device=device)
    model = models.create(network, seed=seed).to(device)
    settings = {"batch_size": batch_size, "precision": precision, "lr_schedule": lr_schedule}
    stepping = _OPTIMIZERS[optimizer](model.parameters(), lr=lr, weight_decay=weight_decay)
    if pre_epochs:
        fit(model, train, epochs=pre_epochs, optimizer=stepping, seed=seed + 1000, **settings)
    if method != "dense":
        criterion = method.split()[0]
        some = train.subset(10 * len(train.classes), seed)
        batch = next(iter(some.batches(len(some), generator=torch.Generator().manual_seed(seed))))
        chosen = inverted(criterion) if control == "inverted" else criterion
        with warnings.catch_warnings(action="ignore"):  # empty layers are counted
            scored = copy.deepcopy(model)  # a control needs the weights that the method prunes
            masks = prune(scored, chosen, 1 - 10**-compression, data=batch, iterations=iterations, seed=seed)
        if control == "shuffled":
            masks = shuffle_masks(masks, seed)
        if control == "redrawn":
            redraw(model, seed + 1000)
            stepping = _OPTIMIZERS[optimizer](model.parameters(), lr=lr, weight_decay=weight_decay)
            epochs += pre_epochs
        set_masks(model, masks)
    table = fit(model, train, test, epochs, optimizer=stepping, seed=seed, test_every=test_every, **settings)
    facts = {
        "sparsity": count(model).sparsity,
        "empty_layers": int((layer_table(model).kept == 0).sum()),
        "commonest": test.targets.bincount().max().item() / len(test),
        "data": train.name,
    }
    measured = table.dropna(subset="test_accuracy").rename(columns={"test_accuracy": "accuracy"})
    return [row | facts for row in measured[["epoch", "accuracy", "precision"]].to_dict("records")]


_OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, fused=True),
    "sgd": partial(torch.optim.SGD, momentum=0.9, fused=True),
}
FRANKLE = (0.59, 0.79, 0.893, 0.956, 0.982)  # the sparsities of the table of Frankle et al. 2021


def from_scratch_grid(
    seeds: Sequence[int], sparsities: Sequence[float] = (0.956, 0.982, 0.893, 0.79, 0.59), epochs: int = 30,
    **common: object,
) -> list[dict]:  # fmt: skip
    """List the runs of `train_pruned` that stand beside the table of Frankle et al.: ResNet-20 trained by SGD.

    Every arm trains for `epochs` after its pruning; "magnitude after training" trains for as long before it, too. A
    sparsity is complete before the next one begins, and of it a seed.

    Args:
        seeds: The seeds.
        sparsities: The sparsities, the most important one first.
        epochs: After the pruning; the paper has 160.
        **common: Further arguments of `train_pruned`, the same for all runs.

    Returns:
        One config per run.
    """
    once = {"control": "none", "iterations": 1, "pre_epochs": 0, "epochs": epochs}
    recipe = {"network": "resnet20", "dataset": "cifar10", "optimizer": "sgd", "lr": 0.1, "lr_schedule": "one-cycle",
              "weight_decay": 1e-4, "batch_size": 128, **common}  # fmt: skip
    arms = {name: once for name in ("random", "magnitude", "snip", "grasp")}
    arms |= {"synflow": once | {"iterations": 100}, "magnitude after training": once | {"pre_epochs": epochs}}
    dense = [{"method": "dense", "compression": 0, "seed": seed, **once, **recipe} for seed in seeds]
    pruned = [
        {"method": method, "compression": -math.log10(1 - sparsity), "seed": seed, **arm, **recipe}
        for sparsity in sparsities
        for seed in seeds
        for method, arm in arms.items()
    ]
    return dense + pruned


def train_pruned_grid(
    seeds: Sequence[int], compressions: Sequence[float], *, epochs: int, pre_epochs: int, long_epochs: int,
    iterations: int, controlled: Sequence[str] = ("snip", "grasp", "synflow"), **common: object,
) -> list[dict]:  # fmt: skip
    """List the runs of `train_pruned`, compression by compression, with all arms of a seed before the next seed.

    What has run when time ends is balanced: whole compressions, and of the last one whole seeds.

    Args:
        seeds: The seeds.
        compressions: The compressions, the most important one first; the controls are run at 1.
        epochs: Of every arm, those before the pruning included.
        pre_epochs: Of these, how many "magnitude after training" trains before the pruning.
        long_epochs: At a compression of 1, SynFlow and the dense network train for so many epochs.
        iterations: Of SynFlow.
        controlled: The methods that have to pass the controls.
        **common: Further arguments of `train_pruned`, the same for all runs.

    Returns:
        One config per run.
    """
    once = {"iterations": 1, "pre_epochs": 0, "epochs": epochs}
    later = once | {"pre_epochs": pre_epochs, "epochs": epochs - pre_epochs}
    arms = {name: once for name in ("random", "magnitude", "snip", "grasp", "synflow", "synflow one-shot")}
    arms |= {"synflow": once | {"iterations": iterations}, "magnitude after training": later}
    grid = []
    for compression in compressions:
        for seed in seeds:
            here = {"compression": compression, "control": "none", "seed": seed, **common}
            longer = {"epochs": long_epochs} if compression == 1 else {}
            grid += [
                {"method": method, **here, **arm, **(longer if method.startswith("synflow") else {})}
                for method, arm in arms.items()
            ]
            if compression != 1:
                continue
            grid.append({"method": "dense", **here, **once, "compression": 0, "epochs": long_epochs})
            for method in controlled:
                grid += [{"method": method, **here, **arms[method], "control": c} for c in ("shuffled", "redrawn")]
                # one step: in many, the inverse would soon cut every path, and all scores would tie at zero
                grid.append({"method": method, **here, **once, "control": "inverted"})
    return grid


def after_equal_epochs(runs: pd.DataFrame) -> pd.DataFrame:
    """Select the measurements of `train_pruned` after equally many epochs in all, a row per run.

    Compressions at which an arm has fewer than five seeds so far are left out.
    """
    runs = runs[runs.pre_epochs + runs.epoch == (runs.pre_epochs + runs.epochs).min()]
    seeds = runs.groupby(["compression", "method", "control"]).seed.nunique()
    enough = seeds.groupby("compression").min() >= ENOUGH_SEEDS
    return runs[runs.compression.isin(enough[enough].index)]


def with_all_layers(runs: pd.DataFrame) -> pd.DataFrame:
    """Leave out the arms of which most seeds have lost a whole layer: they are at chance, and flatten any picture."""
    return runs[runs.groupby(["method", "compression", "control"]).empty_layers.transform("median") == 0]


_IN_ORDER = (
    "dense", "magnitude after training", "random", "magnitude", "snip", "grasp", "synflow", "synflow one-shot",
)  # fmt: skip
_IN_FULL = {
    "fc": "784-100x5-10", "vgg16": "VGG-16", "resnet20": "ResNet-20", "mnist": "MNIST", "cifar10": "CIFAR-10",
    "cifar10 (image folder)": "CIFAR-10 (JPEG)",
}  # fmt: skip


def in_full(name: str) -> str:
    """Name a network or data as people do.

    Args:
        name: As in a record.

    Returns:
        The usual name, or the same name if there is none.

    Example:
        >>> from pruneutils import studies
        >>> studies.in_full("cifar10 (image folder)")
        'CIFAR-10 (JPEG)'
    """
    return _IN_FULL.get(name, name)


QUESTIONS = {
    "is it better than random?": [(method, "random") for method in ("magnitude", "snip", "grasp", "synflow")],
    "does it reach magnitude pruning after training?": [
        (method, "magnitude after training") for method in ("magnitude", "snip", "grasp", "synflow")
    ],
    "do iterations help SynFlow?": [("synflow", "synflow one-shot")],
    "is it the weights, or how many in each layer?": [("as scored", c) for c in ("shuffled", "redrawn", "inverted")],
}


def answers(runs: pd.DataFrame, question: str) -> pd.DataFrame:
    """Test what one of the `QUESTIONS` asks: pairs of equal seed, corrected after Holm over this question alone.

    Args:
        runs: One row per run, from `train_pruned`, all after equally many epochs.
        question: One of `QUESTIONS`.

    Returns:
        The table of `statistics.compare`, at each compression; for the controls, of each method at a compression of 1.
    """
    pairs = QUESTIONS[question]
    if pairs[0][0] == "as scored":
        tested = runs[(runs.compression == 1) & runs.method.isin(runs.method[runs.control != "none"])]
        return compare(tested.replace({"control": {"none": "as scored"}}), "control", against=pairs, within="method")
    tested = runs[(runs.control == "none") & runs.method.isin({arm for pair in pairs for arm in pair})]
    return compare(tested, against=pairs, within="compression")


def in_words(row: pd.Series) -> str:
    """Say what one row of `answers` found, with the difference in percentage points and its 95 % interval."""
    told = "equals" if row["verdict"] == "identical" else "cannot be told apart from"
    if row["differs"]:
        told = "beats" if row["larger"] == row["a"] else "loses to"
    name = row["method"] if row["a"] == "as scored" else row["a"]
    other = row["b"] if row["a"] != "as scored" else {"inverted": "its own inverse"}.get(row["b"], f"itself {row['b']}")
    return f"{name} {told} {other} ({_points(row)})"


def against_random_before_training(runs: pd.DataFrame) -> str:
    """Say how the criteria compare with random pruning at a density of 10 %, at 1 %, and at others where none differs.

    Args:
        runs: One row per run, from `after_equal_epochs`.

    Returns:
        Sentences. The verdicts are those of the whole question, corrected over all compressions.
    """
    rows = answers(runs, "is it better than random?")
    told = []
    for compression, density in ((1, "10 %"), (2, "1 %")):
        found = rows[rows.compression == compression]
        if len(found):
            told.append(f"With {density} of the weights, {_in_one_sentence(found, 'random pruning')}.")
    others = rows[~rows.compression.isin([1, 2])]
    if len(others) and not others.differs.any():
        least, most = (100 * 10 ** -others.compression.agg(end) for end in ("max", "min"))
        reach = 100 * max(others.high.max(), -others.low.min())
        told.append(
            f"With {least:.0f} to {most:.0f} %, none can be told apart from it (intervals up to {reach:.1f} points)."
        )
    return " ".join(told)


def _in_one_sentence(rows: pd.DataFrame, other: str) -> str:
    """Sort the arms that were compared with one other arm by what was found, with their differences."""
    better, worse = rows.differs & (rows.larger == rows.a), rows.differs & (rows.larger != rows.a)
    told = []
    for found, verbs in ((better, "beat(s)"), (worse, "lose(s) to"), (~rows.differs, "cannot be told apart from")):
        arms = [f"{row.a} ({_points(row)})" for row in rows[found].sort_values("difference").itertuples()][::-1]
        if arms:
            named = " and ".join(filter(None, [", ".join(arms[:-1]), arms[-1]]))
            verb = verbs.replace("(s)", "s" if len(arms) == 1 else "")
            told.append(f"{named} {verb} {'it' if told else other}")
    return "; ".join(told)


def headline(runs: pd.DataFrame) -> str:
    """Say in a few sentences what happened at a density of 10 %: accuracies, random pruning, the controls that fail.

    Args:
        runs: One row per run, from `after_equal_epochs`.

    Returns:
        Markdown.
    """
    if runs.empty:
        return f"No compression is recorded with {ENOUGH_SEEDS} seeds of every arm yet, so there is no verdict."
    chosen = runs[(runs.control == "none") & runs.compression.isin([0, 1])]
    epochs, seeds = (runs.pre_epochs + runs.epoch).iloc[0], chosen.seed.nunique()
    network, on = in_full(runs.network.iloc[0]), in_full(runs.data.iloc[0])
    of = f"{network} with 10 % of its weights, after {epochs} epochs on {on}"
    learned, arms, stuck = chosen[chosen.accuracy >= chosen.commonest + 0.02], [], []
    for name in [name for name in _IN_ORDER if name in set(chosen.method)]:
        found = 100 * learned.accuracy[learned.method == name]
        if len(found) == seeds:
            arms.append(f"{name} {found.mean():.1f} %")
        elif len(found):
            arms.append(f"{name} {found.min():.0f} to {found.max():.0f} % in {len(found)} of {seeds} seeds")
        else:
            stuck.append(name)
    told = f"**{of}** (mean of {seeds} seeds, or the range of those that learned): {', '.join(arms)}."
    if stuck:
        told += f" These learned nothing, being within 2 points of the commonest class's share: {', '.join(stuck)}."
    told += f"\n\n**Is it better than random?** {against_random_before_training(runs)}"
    if runs.control.nunique() > 1:
        rows = answers(runs, "is it the weights, or how many in each layer?")
        failed = [in_words(row) for _, row in rows.iterrows() if row["larger"] != "as scored"]
        told += f"\n\n**Controls:** {len(rows) - len(failed)} of {len(rows)} are passed. "
        told += "Not passed: " + "; ".join(failed) + "." if failed else ""
    return told


def until_collapse(method: str, seed: int, zero_biases: bool = False, per_class: int = 10) -> list[dict]:
    """Prune the 784-100x5-10 network in steps of 0.1 in compression, until the next step would empty a layer.

    Args:
        method: A criterion's name, whose scores are taken once; or "synflow", which scores anew at each step.
        seed: Of the weights and of the embedded digits that criteria look at.
        zero_biases: Whether to set the biases to zero; torch draws them at random.
        per_class: Digits of each class.

    Returns:
        A row per compression and layer: kept weights, and `flow`, the sum of the layer's SynFlow scores.
    """
    train, _ = data.load("digits")
    batch, model = train.balanced_batch(per_class, seed), models.create("fc", seed=seed)
    if zero_biases:
        for bias in (parameter for parameter in model.parameters() if parameter.ndim == 1):
            nn.init.zeros_(bias)
    once = scores(model, method.split()[0], data=batch, seed=seed)
    chosen = method if method == "synflow" else lambda model, data: once
    rows = []
    with warnings.catch_warnings(action="error", category=LayerCollapseWarning):
        warnings.simplefilter("ignore", TiedScoresWarning)
        for step in range(50):
            try:
                prune(model, chosen, 1 - 10 ** (-step / 10), data=batch)
            except LayerCollapseWarning:  # raised before the model is changed
                break
            flows = scores(model, "synflow", data=batch)
            for layer, flow in zip(layer_table(model).itertuples(), flows.values(), strict=True):
                rows.append(
                    {"compression": step / 10, "layer": layer.layer, "kept": layer.kept, "flow": float(flow.sum())}
                )
    return rows


def _told_at(table: pd.DataFrame, ratio: float, words: str) -> str:
    """Say what a table of `compare` with one row per ratio found at this ratio."""
    row = next(table[table.asked == ratio].itertuples(), None)
    if row is None:
        return f"not compared at {ratio:.0%}, where one of the networks is near chance"
    verdict = words.format(row.larger) if row.differs else "which cannot be told from zero"
    return f"{_points(row)} at {ratio:.0%}, {verdict}"


def _told(table: pd.DataFrame, words: str) -> str:
    """Say in words what a table of `compare` with one row per ratio found; `words` is for what differs."""
    told = [
        f"{_points(row)} at {row.asked:.0%}, "
        + (words.format(row.larger) if row.differs else "which cannot be told from zero")
        for row in table.itertuples()
    ]
    return ", and ".join(told) or "nothing that could be measured above chance"
