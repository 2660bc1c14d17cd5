"""Pruning while training: the designs that are compared, their runs, and what the runs say."""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from torch import nn

from .. import _checks
from .._files import repository
from ..checkpoints import load
from ..experiments.statistics import compare
from ..pruning import (
    sparsity_at,
)
from ..training import fit, gradual, gradual_sparsity
from .public_networks import NETWORKS, cifar10_as_published

DESIGNS = ("restarts", "recovery", "ramp", "dense")


def in_design(
    model: nn.Module, train: object, test: object, design: str, prunings: int, target: float, epochs: int,
    every: int = 100, **options: object,
) -> pd.DataFrame:  # fmt: skip
    """Train a network for a number of epochs and prune it on the way, in one of the designs that are compared.

    Args:
        model: A trained network; it is pruned and trained in place.
        train: As for `fit`.
        test: As for `fit`.
        design: "restarts" (equal total: each pruning is followed by `epochs / prunings` epochs with an optimizer and a
            learning-rate schedule of their own), "recovery" (one optimizer and one schedule; the prunings are spread
            over the first half, and the second half is the recovery of every arm), "ramp" (the same with Zhu and
            Gupta's cubic ramp over the first half), or "dense" (no pruning: the reference of equal length).
        prunings: How many prunings; 1 is instant. It does not matter to "ramp" and "dense".
        target: The sparsity at the end, a fraction.
        epochs: Epochs of `fit` in all; with `steps_per_epoch` each sees only a part of the images.
        every: Steps between two prunings of the ramp.
        **options: Options of `fit`.

    Returns:
        A row per epoch: epoch, sparsity, test_accuracy, lr, precision.
    """
    _checks.one_of("design", design, DESIGNS)
    steps = [sparsity_at(i / prunings, target) for i in range(1, prunings + 1)]
    if design == "restarts":
        table = gradual(model, train, test, steps, epochs // prunings, **options)
    elif design == "recovery":
        table = gradual(model, train, test, steps, epochs=epochs, recovery=epochs / 2, **options)
    elif design == "ramp":
        table = fit(model, train, test, epochs, on_step=gradual_sparsity(target, end=0.5, every=every), **options)
    else:
        table = fit(model, train, test, epochs, **options)
    return table[["epoch", "sparsity", "test_accuracy", "lr", "precision"]]


def prune_adapted(
    seed: int, design: str, prunings: int, target: float, network: str = "resnet20", epochs: int = 8,
    steps_per_epoch: int | None = 195, precision: str = "auto", device: str = "cpu",
) -> list[dict]:  # fmt: skip
    """Prune an adapted network while it trains by SGD (momentum .9, lr .05 to 0, weight decay 5e-4, batches of 128).

    The network is the same one for every seed: a seed is an order of the images and their augmentation, not a network.

    Args:
        seed: Of data order and augmentation.
        design: As for `in_design`.
        prunings: As for `in_design`.
        target: As for `in_design`.
        network: "resnet20" or "resnet56".
        epochs: How many epochs a run has.
        steps_per_epoch: Steps of an epoch: 195 see another random half of the 50,000 images in every epoch, so that
            8 epochs see each image 4 times; None sees all.
        precision: Of training and evaluation.
        device: Where to train.

    Returns:
        A row per epoch: epoch, sparsity, test_accuracy, lr, precision, data.
    """
    train, test = cifar10_as_published(device)
    model = load(repository() / NETWORKS / f"{network}_seed0.safetensors").to(device)
    table = in_design(
        model, train, test, design, prunings, target, epochs, optimizer="sgd", lr=0.05, weight_decay=5e-4,
        lr_schedule="cosine", precision=precision, seed=seed,
        steps_per_epoch=steps_per_epoch,
    )  # fmt: skip
    return table.assign(data=train.name).to_dict("records")


def prune_adapted_grid(
    seeds: Sequence[int], target: float = 0.95, also: Sequence[float] = (0.98, 0.8, 0.9), second: float = 0.9,
    **common: object,
) -> list[dict]:  # fmt: skip
    """List the runs of `prune_adapted`, the most important ones first, and every seed complete before the next begins.

    Args:
        seeds: The seeds.
        target: The sparsity at which all arms run: dense, the ramp, and both designs with 1, 2, 4 and 8 prunings.
        also: The sparsities at which gradual and instant pruning are compared, with four arms.
        second: One of these, at which the remaining arms run last.
        **common: Further arguments of `prune_adapted`, the same for all runs.

    Returns:
        One config per run.
    """
    counts = [(design, n) for n in (1, 8, 2, 4) for design in ("restarts", "recovery")]
    two = [("ramp", 0), ("recovery", 1), ("restarts", 8), ("restarts", 1)]
    parts = [(target, [("dense", 0), ("ramp", 0), *counts])] + [(sparsity, two) for sparsity in also]
    parts.append((second, [arm for arm in counts if arm not in two]))
    return [
        {"seed": seed, "design": design, "prunings": n, "target": 0.0 if design == "dense" else sparsity, **common}
        for sparsity, arms in parts
        for seed in seeds
        for design, n in arms
    ]


LABELS = {"restarts": "equal total", "recovery": "equal recovery", "ramp": "equal recovery"}
OWN_WAY = "each its own way"  # the ramp against one pruning before the first epoch: equal epochs, and no more is equal


ENOUGH_SEEDS = 5  # fewer give no verdict


def arm_names(frame: pd.DataFrame) -> pd.Series:
    """Name the arm of each row: "dense", "ramp", "1 pruning", "2 prunings", ..."""
    words = frame.prunings.map(lambda n: f"{n} pruning" if n == 1 else f"{n} prunings")
    return words.where(~frame.design.isin(["dense", "ramp"]), frame.design)


def courses(
    prunings: Sequence[int], target: float, epochs: int, points: int = 401, every: float = 0.0
) -> pd.DataFrame:  # fmt: skip
    """Compute how sparsity and learning rate run in both designs, for pictures of the designs.

    Args:
        prunings: The numbers of prunings to show; 0 is the ramp, which has no restarts.
        target: The sparsity at the end, a fraction.
        epochs: Of pruning and recovery together.
        points: How many places in time.
        every: Epochs between two prunings of the ramp; 0 draws the curve that it follows.

    Returns:
        A row per design, number of prunings and place: epoch (from 0), sparsity, and learning rate as a fraction of the
        first one.
    """
    frames, epoch = [], np.linspace(0, epochs, points)
    climbed = np.where(epoch < epochs / 2, np.floor(epoch / every + 1e-9) * every if every else epoch, epochs / 2)
    for design, n in itertools.product(("restarts", "recovery"), prunings):
        if n == 0 and design == "restarts":
            continue
        first, end = (0, epochs) if design == "restarts" else (epochs / 2 / max(n, 1), epochs / 2 * (1 + 1 / max(n, 1)))
        done = np.clip(np.floor((epoch - first) / ((end - first) / max(n, 1)) + 1 + 1e-9), 0, n)
        steps = [sparsity_at(i / n, target) for i in done] if n else [
            sparsity_at(2 * at / epochs, target, schedule="cubic") for at in climbed
        ]  # fmt: skip
        stage = epochs / n if design == "restarts" else epochs
        rate = 0.5 * (1 + np.cos(np.pi * np.where(epoch == epochs, 1.0, epoch % stage / stage)))
        course = {"epoch": epoch, "sparsity": steps, "learning rate": rate, "prunings": n}
        frames.append(pd.DataFrame(course).assign(design=design if n else "ramp", equal=LABELS[design]))
    found = pd.concat(frames, ignore_index=True)
    return found.assign(arm=arm_names(found))


def last_epochs(frame: pd.DataFrame, target: float | None = None) -> pd.DataFrame:
    """Take the last epoch of each finished run, of one target only if it is given, with its arm and its design."""
    done = frame[frame.status == "done"]
    done = done[done.epoch == done.epoch.max()]
    if target is not None:
        done = done[(done.target == target) | (done.design == "dense")]
    return done.assign(arm=arm_names(done), equal=done.design.map(LABELS))


def with_every_seed(final: pd.DataFrame) -> pd.DataFrame:
    """Leave out the arms that lack a seed so far, of a study that is not complete: they would be compared on few."""
    return final[final.groupby(["design", "prunings", "target"]).seed.transform("nunique") == final.seed.nunique()]


def own_ways(final: pd.DataFrame) -> pd.DataFrame:
    """Take the ramp and the single pruning before the first epoch, which the designs of equal things keep apart."""
    chosen = (final.design == "ramp") | ((final.design == "restarts") & (final.prunings == 1))
    return final[chosen].assign(equal=OWN_WAY)


def prunings_against_one(final: pd.DataFrame) -> pd.DataFrame:
    """Compare several prunings and the ramp with one pruning, within each design, all questions as one family."""
    final = with_every_seed(final)
    final = pd.concat([final, own_ways(final)], ignore_index=True)
    pruned = final[final.design != "dense"].sort_values(["equal", "prunings"], ascending=[False, True])
    both = pruned.groupby("equal").arm.transform(lambda arms: "1 pruning" in set(arms) and arms.nunique() > 1)
    pruned = pruned[both.astype(bool)]  # a study that still runs may have only one arm of a design
    if pruned.empty:
        columns = ["equal", "a", "b", "n", "difference", "low", "high", "p_holm", "differs", "verdict"]
        return pd.DataFrame(columns=columns)
    return compare(pruned, by="arm", value="test_accuracy", within="equal", against="1 pruning")


def gradual_and_instant(final: pd.DataFrame, prunings: int | None = None) -> pd.DataFrame:
    """Pair the arms of each design: one pruning is instant; the ramp, or most prunings with restarts, are gradual."""
    final = with_every_seed(final)
    own = own_ways(final)
    own = own.assign(method=own.design.map({"ramp": "gradual", "restarts": "instant"}), sparsity=own.target)
    most = final[final.design == "restarts"].prunings.max() if prunings is None else prunings
    gradual_arm = (final.design == "ramp") | ((final.design == "restarts") & (final.prunings == most))
    instant_arm = final.design.isin(["restarts", "recovery"]) & (final.prunings == 1)
    rows = final[gradual_arm | instant_arm]
    method = gradual_arm[rows.index].map({True: "gradual", False: "instant"})
    rows = rows.assign(method=method, equal=rows.design.map(LABELS), sparsity=rows.target)
    rows = pd.concat([rows, own], ignore_index=True)
    return rows.sort_values(["equal", "method", "sparsity"], ascending=[False, True, True])


def gradual_against_instant(final: pd.DataFrame) -> pd.DataFrame:
    """Compare gradual with instant pruning at each sparsity; each design is a family of its own."""
    tables = []
    for equal, rows in gradual_and_instant(final).groupby("equal", sort=False):
        both = rows.groupby("sparsity").method.transform("nunique") == 2
        if both.any():
            found = compare(rows[both], by="method", value="test_accuracy", within="sparsity", against="instant")
            tables.append(found.assign(equal=equal))
    columns = ["equal", "sparsity", "a", "b", "n", "difference", "low", "high", "p_holm", "differs", "larger"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def recorded_facts(frame: pd.DataFrame) -> str:
    """Say in a line what recorded runs are: how many, on what, and in which precision and on which device they ran."""
    runs = frame[frame.status == "done"].drop_duplicates(["seed", "design", "prunings", "target"])
    told = {name: ", ".join(map(str, runs[name].unique())) for name in ("data", "precision", "run_device")}
    return (
        f"{len(runs)} runs, seeds {', '.join(map(str, sorted(runs.seed.unique())))}, on {told['data']}, "
        f"in {told['precision']} on {told['run_device']}"
    )


def _points(row) -> str:
    return f"{100 * row.difference:+.1f} points [{100 * row.low:+.1f}, {100 * row.high:+.1f}]"


def _too_few(frame: pd.DataFrame | None, record: str) -> str | None:
    """Say that there is no verdict yet, and what makes one."""
    if frame is None or frame[frame.status == "done"].empty:
        return f"No larger run is recorded yet; `make study NAME={record} SIZE=medium` records it."
    seeds = frame[frame.status == "done"].seed.nunique()
    if seeds < ENOUGH_SEEDS:
        return f"{seeds} of {ENOUGH_SEEDS} seeds are recorded so far, which gives no verdict; {recorded_facts(frame)}."
    return None


def tell_prunings(frame: pd.DataFrame | None, target: float) -> str:
    """Answer in a list whether several prunings differ from one, in each design, with the paired differences."""
    if missing := _too_few(frame, "gradual_pruning"):
        return missing
    found, lines = prunings_against_one(last_epochs(frame, target)), []
    for equal, rows in found.groupby("equal", sort=False):
        verdicts = {"better": rows.larger == rows.a, "worse": rows.larger == rows.b, "open": ~rows.differs.astype(bool)}
        told = [
            f"{words} with {', '.join(f'{row.a} ({_points(row)})' for row in rows[chosen].itertuples())}"
            for words, chosen in verdicts.items()
            if chosen.any()
        ]
        lines.append(f"- *{_told_of(equal)}:* {'; '.join(told)}.")
    head = f"Several prunings compared with one, to a sparsity of {100 * target:.0f} %:"
    return head + "\n\n" + "\n".join(lines)


def tell_gradual(frame: pd.DataFrame | None) -> str:
    """Answer in a list at which sparsities gradual and instant pruning differ, in each design and in all of them."""
    if missing := _too_few(frame, "gradual_vs_instant"):
        return missing
    found, lines = gradual_against_instant(last_epochs(frame)), []
    for equal, rows in found.groupby("equal", sort=False):
        told = [
            f"{f'{row.larger} is better' if row.differs else 'open'} at {100 * row.sparsity:.0f} % ({_points(row)})"
            for row in rows.itertuples()
        ]
        lines.append(f"- *{_told_of(equal)}:* {'; '.join(told)}.")
    told = "Gradual minus instant pruning:\n\n" + "\n".join(lines)
    return f"{told}\n\n**What survives all comparisons:** {surviving(frame)}." if len(lines) > 1 else told


def surviving(frame: pd.DataFrame) -> str:
    """Say at which sparsities every comparison of gradual and instant pruning has the same verdict, and which."""
    found = gradual_against_instant(last_epochs(frame))
    verdicts = found[found.differs.astype(bool)].groupby("sparsity").larger
    same = verdicts.agg(["nunique", "size", "first"]).query("nunique == 1 and size == @found.equal.nunique()")
    told = [f"{row['first']} pruning is better at {100 * sparsity:.0f} %" for sparsity, row in same.iterrows()]
    return ", ".join(told) or "nothing"


def _told_of(equal: str) -> str:
    return f"{equal} (the ramp against one pruning before the first epoch)" if equal == OWN_WAY else equal


def beside_published(published: dict[int, float], frame: pd.DataFrame | None, target: float) -> pd.DataFrame:
    """Put the mean accuracy of our runs with equal total beside the published one, by the number of prunings."""
    ours = pd.Series(dtype=float)
    if frame is not None:
        final = last_epochs(frame, target)
        ours = final[final.design == "restarts"].groupby("prunings").test_accuracy.agg(["mean", "count"])
    rows = [
        {"prunings": n, "published": f"{accuracy:.4f} (1 run)",
         "ours": f"{ours.loc[n, 'mean']:.4f} ({ours.loc[n, 'count']} runs)" if n in ours.index else "not recorded yet"}
        for n, accuracy in published.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)
