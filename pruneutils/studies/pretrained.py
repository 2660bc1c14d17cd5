"""One-shot pruning of pretrained networks of one kind and three sizes, and what repairs them without training."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from .. import _checks, data, models
from .._torch import autocast, device_of, in_mode, resolve_precision
from ..data import Images
from ..data.datasets import data_folder
from ..experiments.statistics import compare
from ..pruning import recalibrate, reconstruct
from .one_shot import census, prune_convolutions
from .while_training import _points

PRETRAINED_ARMS = {
    "weights, global": {"granularity": "weight"},
    "weights, per layer": {"granularity": "weight", "scope": "layer"},
    "weights, ERK": {"granularity": "weight", "scope": "erk"},
    "kernels by mean, global": {"rank": "mean"},
    "kernels by sum, global": {"rank": "sum"},
    "kernels by mean, per layer": {"rank": "mean", "scope": "layer"},
    "kernels by sum, per layer": {"rank": "sum", "scope": "layer"},
    "filters, global": {"granularity": "filter"},
    "filters, per layer": {"granularity": "filter", "scope": "layer"},
}

REPAIRS = {"none": ["plain"], "recalibrated": ["recalibrated"], "reconstructed": ["reconstructed", "both"]}

LITE = {"lite0": 224, "lite1": 240, "lite2": 260}  # EfficientNet-Lite: one kind of block in three sizes; pixels a side

CHANCE = 0.01  # an accuracy below this, ten times chance among 1,000 classes, is no longer followed


def hits_of(model: nn.Module, images: Images, precision: str = "float32") -> torch.Tensor:
    """Tell for each image whether a network classifies it correctly, in evaluation mode.

    Args:
        model: A classifier.
        images: The images, which keep their order.
        precision: As for `accuracy`.

    Returns:
        Booleans, shape (images,), on the CPU.
    """
    device, precision = device_of(model), resolve_precision(precision, model)
    found = []
    with torch.no_grad(), in_mode(model, training=False):
        for inputs, targets in images.batches(50, shuffle=False, augment=False):
            with autocast(precision, device):
                found.append((model(inputs.to(device)).argmax(1) == targets.to(device)).cpu())
    return torch.cat(found)


def prune_and_repair(
    model: nn.Module, images: Images, arm: str, repair: str, ratios: Sequence[float], seed: int = 0, *,
    calibration: int = 250, tested: int | None = None, precision: str = "float32",
) -> list[dict]:  # fmt: skip
    """Prune a trained network once at each ratio, repair it without training, and test it on every image by itself.

    The linear layers, so the classifier too, are left alone.

    Args:
        model: The trained network; it stays as it is.
        images: Images to test on.
        arm: One of `PRETRAINED_ARMS`; or "dense", which prunes nothing, for the ratio 0.
        repair: "none"; "recalibrated" (the statistics of batch norm are measured anew); or "reconstructed" (the kept
            weights are fitted to the outputs of the dense layers, then the statistics are measured anew as well).
        ratios: Ascending fractions of the convolutions' weights. Once an accuracy is below `CHANCE`, larger ratios are
            left out.
        seed: Decides which images repair the network. They are not tested; the tested ones are drawn from the others.
        calibration: How many images repair the network.
        tested: How many of the others are tested; None tests all. Without a repair all images are tested.
        precision: Of the tests; repairs are computed in float32.

    Returns:
        A row per ratio and state ("plain", "recalibrated", "reconstructed", or "both" for the two in this order):
        asked, state, accuracy, weights_gone (the fraction of the convolutions' weights), hits (a text with a character
        for each image: 1, 0, or - where it was not tested).
    """
    _checks.one_of("repair", repair, REPAIRS)
    options = {} if arm == "dense" else PRETRAINED_ARMS[_checks.one_of("arm", arm, PRETRAINED_ARMS)]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    shown, others = images.subset(order[:calibration]), order[calibration:][:tested].sort().values
    others = torch.arange(len(images)) if repair == "none" else others
    batches = [inputs for inputs, _ in shown.batches(50, shuffle=False, augment=False)] if repair != "none" else []
    rows = []
    for ratio in [0.0] if arm == "dense" else ratios:
        pruned, masks = copy.deepcopy(model), {}
        with warnings.catch_warnings(action="ignore"):  # an emptied layer shows in the accuracy
            if options:
                masks = prune_convolutions(pruned, ratio, seed=seed, **options)
            for state in REPAIRS[repair]:
                if state == "reconstructed":
                    reconstruct(pruned, model, batches)
                elif state != "plain":
                    recalibrate(pruned, batches)
                hits = hits_of(pruned, images.subset(others), precision)
                marks = np.full(len(images), "-")
                marks[others.numpy()] = np.where(hits.numpy(), "1", "0")
                counts = census(pruned, masks, "weight")
                gone = counts["weights gone"] / counts["weights"]
                row = {"asked": ratio, "state": state, "accuracy": hits.double().mean().item(), "weights_gone": gone}
                rows.append(row | {"hits": "".join(marks)})
        if rows[-1]["accuracy"] < CHANCE:
            break
    return rows


def prune_pretrained(
    network: str, arm: str, repair: str, seed: int, ratios: list[float], folder: str = "imagenet",
    calibration: int = 250, tested: int | None = 500, precision: str = "bfloat16", device: str = "cpu",
) -> list[dict]:  # fmt: skip
    """Prune an EfficientNet-Lite with its ImageNet weights, as `prune_and_repair` does.

    Args:
        network: One of `LITE`.
        arm: As for `prune_and_repair`.
        repair: As for `prune_and_repair`.
        seed: As for `prune_and_repair`.
        ratios: As for `prune_and_repair`.
        folder: The folder of images in the data folder; one folder for each of the 1,000 classes, in sorted order.
        calibration: As for `prune_and_repair`.
        tested: As for `prune_and_repair`.
        precision: As for `prune_and_repair`.
        device: Where everything runs.

    Returns:
        The rows of `prune_and_repair`.
    """
    pixels = LITE[_checks.one_of("network", network, LITE)]
    name = f"timm/tf_efficientnet_{network}"
    model = models.create(name, num_classes=1000)
    models.load_weights(model, models.imagenet_weights(name), by_position=True)
    model = model.to(device, memory_format=torch.channels_last)
    root = Path(data_folder()) / folder
    images = data.load_folder(root, size=pixels, crop=0.875, interpolation="bicubic")
    images = replace(images, mean=(0.5,) * 3, std=(0.5,) * 3)
    options = {"calibration": calibration, "tested": tested, "precision": precision}
    return prune_and_repair(model, images, arm, repair, ratios, seed, **options)


def pretrained_grid(
    seeds: Sequence[int], ratios: Sequence[float], repaired: Sequence[float], networks: Sequence[str] = tuple(LITE)
) -> list[dict]:
    """List the runs of `prune_pretrained`, the most important ones first.

    Args:
        seeds: Which images repair the networks, a resampling each.
        ratios: The fractions to prune where nothing is repaired.
        repaired: The fractions to prune where something is.
        networks: Some of `LITE`, the smallest first; it alone is reconstructed.

    Returns:
        One config per run.
    """
    first, second, *others = PRETRAINED_ARMS
    runs = [(network, arm, "none", 0, ratios) for arm in ("dense", first, second) for network in networks]
    runs += [
        (network, arm, "recalibrated", s, repaired) for arm in ("dense", first) for s in seeds for network in networks
    ]
    runs += [(network, arm, "none", 0, ratios) for arm in others for network in networks]
    runs += [(networks[0], first, "reconstructed", seed, repaired) for seed in seeds]
    runs += [(network, second, "recalibrated", seed, repaired) for seed in seeds for network in networks]
    keys = ("network", "arm", "repair", "seed", "ratios")
    return [dict(zip(keys, (*run[:4], list(run[4])), strict=True)) for run in runs]


def hits_by_image(frame: pd.DataFrame) -> pd.DataFrame:
    """Turn the runs into a row for each image: what the network gets right, the mean over the seeds that tested it.

    Args:
        frame: The finished runs of `prune_and_repair`, with their network.

    Returns:
        The columns network, arm, state, asked, image, and hit (a fraction).
    """
    key, rows = ["network", "arm", "state", "asked"], []
    for place, runs in frame.groupby(key, sort=False):
        marks = np.array([list(text) for text in runs.hits])
        tested = (marks != "-").sum(0)
        image = np.flatnonzero(tested)
        hit = (marks == "1").sum(0)[image] / tested[image]
        rows.append(pd.DataFrame({"image": image, "hit": hit}).assign(**dict(zip(key, place, strict=True))))
    return pd.concat(rows, ignore_index=True)[[*key, "image", "hit"]]


def _measurable(images: pd.DataFrame, least: float = 0.05) -> pd.DataFrame:
    """Leave out what is near chance in one of the networks that are compared: there nothing more can be lost."""
    means = images.groupby(["arm", "state", "asked", "network"]).hit.mean().groupby(["arm", "state", "asked"]).min()
    return images[images.set_index(["arm", "state", "asked"]).index.isin(means[means >= least].index)]


def compare_sizes(
    images: pd.DataFrame, pairs: Sequence[tuple[str, str]], state: str = "plain", dense: str = "plain"
) -> pd.DataFrame:
    """Compare what two networks lose by the same pruning, image by image.

    Args:
        images: The table of `hits_by_image`.
        pairs: Pairs of networks.
        state: "plain", "recalibrated", "reconstructed" or "both".
        dense: The state of the dense networks from which the losses are counted. A repair costs a dense network
            something, too; counted from dense networks with the same repair, this cost is left out.

    Returns:
        The table of `compare`, a row per arm, ratio and pair; a positive difference says that the first one loses more.
        An arm that leaves one of the networks below 5 % at a ratio is left out at that ratio.
    """
    rows = images[(images.state == state) & (images.arm != "dense")]
    start = images[(images.state == dense) & (images.arm == "dense")].set_index(["network", "image"]).hit
    rows = rows.join(start.rename("start"), on=["network", "image"])
    rows = rows.assign(lost=rows.start - rows.hit).dropna(subset="lost")
    return compare(
        _measurable(rows), by="network", value="lost", against=list(pairs), within=["arm", "asked"], pair_on="image"
    )


def count_verdicts(table: pd.DataFrame) -> str:
    """Say in how many rows of `compare_sizes` which network loses more.

    Args:
        table: The table; of each pair the smaller network comes first.

    Returns:
        A sentence without its full stop.
    """
    a, b = (int((table.differs & (table.larger == table[side])).sum()) for side in ("a", "b"))
    told = f"the smaller network loses more in {a} of {len(table)} comparisons, the larger one in {b}"
    return f"{told}, and {len(table) - a - b} are open"


def compare_states(images: pd.DataFrame, state: str, against: str = "plain") -> pd.DataFrame:
    """Compare a repaired network with the same network repaired otherwise or not at all, on the images both have seen.

    Args:
        images: The table of `hits_by_image`.
        state: "recalibrated", "reconstructed" or "both".
        against: Another one, or "plain".

    Returns:
        The table of `compare`, a row per network, arm and ratio.
    """
    rows = images[images.state.isin([state, against])]
    key = ["network", "arm", "asked", "image"]
    rows = rows[rows.groupby(key).state.transform("nunique") == 2]
    return compare(
        rows, by="state", value="hit", against=[(state, against)], within=["network", "arm", "asked"],
        pair_on="image",
    )  # fmt: skip


def _share(images: pd.DataFrame, network: str, state: str, arm: str, asked: float) -> str:
    rows = images[(images.network == network) & (images.state == state) & (images.arm == arm) & (images.asked == asked)]
    return f"{network} {rows.hit.mean():.1%}"


def tell_sizes(
    images: pd.DataFrame, pair: tuple[str, str], asked: float,
    arms: Sequence[str] = ("weights, global", "weights, per layer"), family: Sequence[tuple[str, str]] = (),
) -> str:  # fmt: skip
    """Answer in sentences whether the larger network loses less, as it is and with its batch norm recalibrated.

    Losses of recalibrated networks are counted from dense networks that are recalibrated, too.

    Args:
        images: The table of `hits_by_image`.
        pair: The smaller and the larger network.
        asked: The ratio to tell of.
        arms: Some of `PRETRAINED_ARMS`.
        family: All pairs that are compared, over which the verdicts are corrected; by default this one.

    Returns:
        A sentence and a list in Markdown, with differences in percentage points and their 95 % intervals over images.
    """
    before = " and ".join(_share(images, name, "plain", "dense", 0.0) for name in pair)
    told = f"Accuracy of the dense networks: {before}. With {asked:.0%} of the convolutions' weights removed:\n"
    table = images[images.network.isin(pair) & (images.asked == asked)]
    for arm in arms:
        for state, words in {"plain": "as they are", "recalibrated": "with batch norm recalibrated"}.items():
            here = table[(table.state == state) & (table.arm == arm)]
            if here.network.nunique() < 2:
                continue
            left = " and ".join(_share(images, name, state, arm, asked) for name in pair)
            told += f"\n- *{arm}, {words}:* {left}; "
            if _measurable(here).empty:
                told += "one of them is near chance."
                continue
            found = compare_sizes(images, family or [pair], state, state).set_index(["arm", "asked", "a", "b"])
            row = found.loc[(arm, asked, *pair)]
            told += f"the loss of {pair[0]} minus that of {pair[1]} is {_points(row)}, "
            told += f"so {row.larger} is less robust." if row.differs else "which cannot be told from zero."
    return told


def tell_repairs(images: pd.DataFrame, network: str, arm: str = "weights, global") -> str:
    """Answer in a list what each repair gives a network back at each ratio.

    Args:
        images: The table of `hits_by_image`.
        network: The network to tell of.
        arm: One of `PRETRAINED_ARMS`.

    Returns:
        The list in Markdown: the accuracy as it is, and what each repair adds in points, with 95 % intervals.
    """
    rows, told = images[(images.network == network) & images.arm.isin([arm, "dense"])], []
    states = [state for state in ("recalibrated", "reconstructed", "both") if (rows.state == state).any()]
    found = [compare_states(rows, state) for state in states]
    for asked, part in pd.concat(found).groupby("asked"):
        plain = _share(rows, network, "plain", "dense" if asked == 0 else arm, asked)
        gains = ", ".join(f"{row.a} {_points(row)}{'' if row.differs else ' (not to be told from zero)'}"
                          for row in part.itertuples())  # fmt: skip
        told.append(f"- *{'dense' if asked == 0 else f'{asked:.0%} removed'}:* {plain} as it is; {gains}.")
    return "\n".join(told)
