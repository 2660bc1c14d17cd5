"""The runs of the larger studies, a function each: what `experiments.sweep` calls with one config of its grid.

Notebooks that ask different questions of the same runs share them here.
"""

import copy
import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from . import _checks, data, models
from ._files import repository
from .checkpoints import load, save
from .controls import inverted, redraw, shuffle_masks
from .costs import cost, cost_table
from .data import IMAGENET_MEAN_STD, Images
from .data.datasets import _root
from .experiments.statistics import compare
from .model_utils import Masks, accuracy, count, layer_table, prunable_weights, restore, set_masks
from .pruning import LayerCollapseWarning, TiedScoresWarning, granularities, prune, prune_threshold, scores, sparsity_at
from .training import backward_pruned, fit, gradual, gradual_sparsity

CHECKPOINTS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}


def cifar10_as_published() -> tuple[Images, Images]:
    """Load CIFAR-10 with the normalisation that the public ResNet checkpoints were trained with (ImageNet's).

    Returns:
        The training and the test images; `name` tells whether they are an image folder of JPEG files.
    """
    mean, std = IMAGENET_MEAN_STD
    train, test = data.load("cifar10")
    return replace(train, mean=mean, std=std), replace(test, mean=mean, std=std)


def adapt(network: str, folder: str, epochs: int = 10, seed: int = 0, precision: str = "auto") -> list[dict]:
    """Adapt a public CIFAR-10 checkpoint to the images at hand, and save the network.

    JPEG images cost these checkpoints about ten points, so they are trained on: SGD with momentum .9 (Nesterov), a
    learning rate of .01 that falls to 0 as a cosine, weight decay 5e-4, batches of 128, crops and mirror images.

    Args:
        network: "resnet20" or "resnet56"; the checkpoint lies in `checkpoints/` of the data folder.
        folder: Where the network is saved, as `<network>_seed<seed>.safetensors`.
        epochs: How often each image is seen.
        seed: Of data order and augmentation.
        precision: Of training and evaluation.

    Returns:
        A row per epoch as from `fit`, epoch 0 being the checkpoint as it came.
    """
    train, test = cifar10_as_published()
    model = models.load_weights(models.create(network), _root(None) / "checkpoints" / CHECKPOINTS[network])
    before = {"epoch": 0, "test_accuracy": accuracy(model, test, precision=precision), "precision": precision}

    def decayed(parameters):
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)

    table = fit(
        model,
        train,
        test,
        epochs,
        optimizer=decayed,
        lr_schedule="cosine",
        seed=seed,
        precision=precision,
        test_every=2,
    )
    after = accuracy(model, test)
    facts = {"data": train.name, "epochs": epochs, "seed": seed, "accuracy": after}
    save(model, Path(folder) / f"{network}_seed{seed}.safetensors", **facts)
    rows = [before, *table.drop(columns="seconds").to_dict("records")]
    return [row | {"data": train.name, "float32_accuracy": after} for row in rows]


NETWORKS = "results/networks"  # where `adapt` has saved the dense networks of this repository
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
        epochs: How often each image is seen in all.
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
    precision: str = "auto",
) -> list[dict]:  # fmt: skip
    """Prune an adapted network while it trains by SGD (momentum .9, lr .05 to 0, weight decay 5e-4, batches of 128).

    The network is the same one for every seed: a seed is an order of the images and their augmentation, not a network.

    Args:
        seed: Of data order and augmentation.
        design: As for `in_design`.
        prunings: As for `in_design`.
        target: As for `in_design`.
        network: "resnet20" or "resnet56".
        epochs: How often each image is seen.
        precision: Of training and evaluation.

    Returns:
        A row per epoch: epoch, sparsity, test_accuracy, lr, precision, data.
    """
    train, test = cifar10_as_published()
    model = load(repository() / NETWORKS / f"{network}_seed0.safetensors")
    table = in_design(
        model, train, test, design, prunings, target, epochs, optimizer="sgd", lr=0.05, weight_decay=5e-4,
        lr_schedule="cosine", precision=precision, seed=seed,
    )  # fmt: skip
    return table.assign(data=train.name).to_dict("records")


def prune_adapted_grid(seeds: Sequence[int], targets: Sequence[float] = (0.95, 0.9)) -> list[dict]:
    """List the runs of `prune_adapted`, every seed complete before the next begins.

    Args:
        seeds: The seeds.
        targets: The sparsities at the end.

    Returns:
        One config per run: dense, then for each target one ramp and both designs with 1, 2, 4 and 8 prunings.
    """
    grid = []
    for target in targets:
        for seed in seeds:
            arms = [("ramp", 0)] + [(design, n) for n in (1, 8, 2, 4) for design in ("restarts", "recovery")]
            if target == targets[0]:
                grid.append({"seed": seed, "design": "dense", "prunings": 0, "target": 0.0})
            grid += [{"seed": seed, "design": design, "prunings": n, "target": target} for design, n in arms]
    return grid


# --- Before training -------------------------------------------------------------------------------------------------

AS_PUBLISHED = ", as published"


def vgg16_as_published(seed: int) -> nn.Module:
    """Create VGG-16 without batch norm with the random numbers of the published comparison (its seed is 1).

    The original draws one permutation of the training set first, then PyTorch's initialisation, then Kaiming's.
    """

    def draw(model):
        torch.randperm(50_000)
        layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        for layer in layers:
            layer.reset_parameters()
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    return redraw(models.create("vgg16"), seed=seed, init=draw)


def at_initialization(
    criterion: str, iterations: int, compressions: list[float], seed: int, dataset: str = "cifar10"
) -> list[dict]:
    """Prune VGG-16 before training, at several compressions, and count what is left of every layer.

    As published: 100 random training images with crops and mirror images for the criteria that look at data, evaluation
    mode, all layers competing. The images are those of `data.load("cifar10")`, which may be JPEG files.

    Args:
        criterion: A criterion's name, alone or with ", as published": then all weights that tie with the last one to go
            go too, and "grasp" takes its two gradients from different crops, see `grasp_of_two`.
        iterations: In how many exponential steps to prune.
        compressions: Each leaves a density of 10 ** -compression.
        seed: Of the weights and the images.
        dataset: "cifar10", or "digits", which are padded to 32 x 32 pixels and copied into three channels.

    Returns:
        A row per compression and layer: kept and total weights, dense and sparse MACs, and `mac_density` of the whole.
    """
    train = in_colour(dataset)
    some, generator = train.subset(100, seed), torch.Generator().manual_seed(seed)
    batch = next(iter(some.batches(100, generator=generator)))
    dense = vgg16_as_published(seed)
    options = {"data": batch, "seed": seed}
    name = criterion.removesuffix(AS_PUBLISHED)
    if criterion == "grasp" + AS_PUBLISHED:
        name, options["data"] = grasp_of_two, [batch, next(iter(some.batches(100, generator=generator)))]
    once = scores(dense, name, **options) if iterations == 1 else None
    rows = []
    for compression in compressions:
        model = copy.deepcopy(dense)
        with warnings.catch_warnings(action="ignore"):  # empty layers are counted
            if criterion.endswith(AS_PUBLISHED):
                set_masks(model, above_threshold(once, 1 - 10**-compression))
            elif iterations == 1:
                prune(model, lambda model, data: once, 1 - 10**-compression)
            else:
                prune(model, name, 1 - 10**-compression, iterations=iterations, **options)
        left, whole = cost_table(model, batch[0]), cost(model, batch[0])
        kept = layer_table(model)
        for layer, weights in zip(left.itertuples(), kept.itertuples(), strict=True):
            rows.append({
                "compression": compression, "layer": layer.layer, "total": weights.total, "kept": weights.kept,
                "macs": layer.macs, "sparse_macs": layer.sparse_macs, "mac_density": whole.mac_density,
                "data": train.name,
            })  # fmt: skip
    return rows


def in_colour(dataset: str) -> Images:
    """Load training images of 32 x 32 pixels in three channels, CIFAR-10 with the published normalisation."""
    train, _ = data.load(dataset)
    if dataset == "cifar10":
        return replace(train, mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.262))
    images = nn.functional.pad(train.images, (2, 2, 2, 2)).expand(-1, 3, -1, -1)
    return replace(train, images=images, mean=train.mean * 3, std=train.std * 3)


def above_threshold(scores: dict[str, torch.Tensor], sparsity: float) -> dict[str, torch.Tensor]:
    """Keep what scores above a threshold, as the published code does: of tied scores none stays.

    Args:
        scores: {parameter name: scores}.
        sparsity: The threshold is the score of the last weight of this fraction; more go where scores tie with it.

    Returns:
        {parameter name: bool tensor}, True = kept.
    """
    flat = torch.cat([score.flatten() for score in scores.values()])
    threshold = flat.kthvalue(int(sparsity * len(flat))).values
    return {name: score > threshold for name, score in scores.items()}


def grasp_of_two(model: nn.Module, batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Score w * (H g) with the gradient g of one batch and the Hessian H of another.

    GraSP wants both of the same images. The published code reads its images twice, and its loader crops and mirrors
    them anew each time.

    Args:
        model: The network.
        batches: Two (inputs, targets) pairs: for g, and for H.

    Returns:
        {parameter name: scores}, higher = keep.
    """
    weights = prunable_weights(model)
    of_one, of_other = (nn.functional.cross_entropy(model(inputs) / 200, targets) for inputs, targets in batches)
    g = torch.autograd.grad(of_one, weights.values())
    graph = torch.autograd.grad(of_other, weights.values(), create_graph=True)
    hg = torch.autograd.grad(graph, weights.values(), grad_outputs=g)
    return {name: weight * h for (name, weight), h in zip(weights.items(), hg, strict=True)}


def evaluation_mode(
    network: str, mode: str, normalisation: str, batch_size: int = 128, order: int | None = None
) -> dict:
    """Measure a public checkpoint with running or batch statistics, normalised as trained or by (.5, .5).

    A published pruning study never called `model.eval()` and normalised by (.5, .5); this takes the two apart.

    Args:
        network: "resnet20" or "resnet56".
        mode: "running" (evaluation mode) or "batch" (training mode, whose statistics depend on the batch).
        normalisation: "as trained" (ImageNet's mean and deviation) or "half".
        batch_size: Of the evaluation.
        order: The seed that shuffles the test images, as CIFAR-10's own files are shuffled; None leaves the images in
            the order of the data. An image folder is read class by class, so its batches hold one class, or two.

    Returns:
        The accuracy on the 10,000 test images, a fraction, and the name of the data.
    """
    mean, std = IMAGENET_MEAN_STD if normalisation == "as trained" else ((0.5,) * 3, (0.5,) * 3)
    _, test = data.load("cifar10")
    test = replace(test, mean=mean, std=std)
    if order is not None:
        test = test.subset(len(test), order)
    model = models.load_weights(models.create(network), _root(None) / "checkpoints" / CHECKPOINTS[network])
    model.train(mode == "batch")
    hits = 0
    with torch.no_grad():
        for inputs, targets in test.batches(batch_size, shuffle=False, augment=False):
            hits += int((model(inputs).argmax(1) == targets).sum())
    return {"accuracy": hits / len(test), "data": test.name}


def grasp_thresholds(seed: int, targets: list[float], per_class: int = 25) -> list[dict]:
    """Score timm's resnet10t by GraSP on CIFAR-10 as the published debug study did, and cut by its thresholds and ours.

    With S = -w (Hg), divided by the magnitude of its sum as in the published code, the rules are: "highest go" (keep
    S <= the k-th highest, the code of today), "lowest go" (keep S >= the k-th highest, the code that made the published
    tables), and "exact" (`prune`).

    Args:
        seed: Of the weights and of the batches.
        targets: The sparsities asked for.
        per_class: Images of each class.

    Returns:
        A row per target, rule and layer: weights before and after, how many score exactly zero, and the threshold.
    """
    train, _ = data.load("cifar10")
    model = models.create("timm/resnet10t", num_classes=10, seed=seed)
    found = scores(model, "grasp", train.balanced_batch(per_class, seed), train_mode=True, seed=seed)
    published = {name: -score.double() for name, score in found.items()}
    flat = torch.cat([score.flatten() for score in published.values()])
    total, scale = len(flat), float(flat.sum().abs()) + 1e-10
    rows = []
    for target in targets:
        with warnings.catch_warnings(action="ignore"):  # ties are counted
            exact = prune(copy.deepcopy(model), lambda model, data: found, target)
        high = float(flat.kthvalue(total - int(total * target) + 1).values)  # the k-th highest, k to remove
        low = float(flat.kthvalue(total - int(total * (1 - target)) + 1).values)  # the k-th highest, k to keep
        for name, score in published.items():
            kept = {"highest go": (score <= high, high), "lowest go": (score >= low, low), "exact": (exact[name], None)}
            for rule, (mask, threshold) in kept.items():
                rows.append({
                    "target": target, "rule": rule, "layer": name.removesuffix(".weight"), "before": score.numel(),
                    "after": int(mask.sum()), "zeros": int((score == 0).sum()),
                    "threshold": None if threshold is None else threshold / scale, "data": train.name,
                })  # fmt: skip
    return rows


def grasp_agreement(seed: int, per_class: int = 25, share: float = 0.05) -> dict:
    """Measure how much two batches agree on the weights that GraSP scores highest.

    Args:
        seed: Of the weights and of the two batches.
        per_class: Images of each class in a batch.
        share: The fraction of the weights that count as highest.

    Returns:
        `overlap`: the share of one batch's highest weights that are also the other's; by chance it equals `share`.
    """
    train, _ = data.load("cifar10")
    # with batch norms that start at zero nearly all scores tie at zero: see grasp_thresholds
    model = models.create("timm/resnet10t", num_classes=10, seed=seed, zero_init_last=False)
    tops = []
    for batch in (train.balanced_batch(per_class, seed), train.balanced_batch(per_class, seed + 1000)):
        found = scores(model, "grasp", batch, train_mode=True, seed=seed)
        flat = torch.cat([score.flatten() for score in found.values()])
        tops.append(set(flat.topk(int(share * len(flat))).indices.tolist()))
    return {"overlap": len(tops[0] & tops[1]) / len(tops[0]), "data": train.name}


# --- What the runs of pruning while training say ---------------------------------------------------------------------

LABELS = {"restarts": "equal total", "recovery": "equal recovery", "ramp": "equal recovery"}
ENOUGH_SEEDS = 5  # fewer give no verdict


def arm_names(frame: pd.DataFrame) -> pd.Series:
    """Name the arm of each row: "dense", "ramp", "1 pruning", "2 prunings", ..."""
    words = frame.prunings.map(lambda n: f"{n} pruning" if n == 1 else f"{n} prunings")
    return words.where(~frame.design.isin(["dense", "ramp"]), frame.design)


def courses(prunings: Sequence[int], target: float, epochs: int, points: int = 401) -> pd.DataFrame:
    """Compute how sparsity and learning rate run in both designs, for pictures of the designs.

    Args:
        prunings: The numbers of prunings to show.
        target: The sparsity at the end, a fraction.
        epochs: Of pruning and recovery together.
        points: How many places in time.

    Returns:
        A row per design, number of prunings and place: epoch (from 0), sparsity, and learning rate as a fraction of the
        first one.
    """
    frames = []
    for design, n in itertools.product(("restarts", "recovery"), prunings):
        epoch = np.linspace(0, epochs, points)
        first, end = (0, epochs) if design == "restarts" else (epochs / 2 / n, epochs / 2 + epochs / 2 / n)
        done = np.clip(np.floor((epoch - first) / ((end - first) / n) + 1 + 1e-9), 0, n)
        stage = epochs / n if design == "restarts" else epochs
        rate = 0.5 * (1 + np.cos(np.pi * np.where(epoch == epochs, 1.0, epoch % stage / stage)))
        course = {"epoch": epoch, "sparsity": [sparsity_at(i / n, target) for i in done], "learning rate": rate}
        frames.append(pd.DataFrame(course).assign(design=design, equal=LABELS[design], prunings=n))
    found = pd.concat(frames, ignore_index=True)
    return found.assign(arm=arm_names(found))


def last_epochs(frame: pd.DataFrame, target: float | None = None) -> pd.DataFrame:
    """Take the last epoch of each finished run, of one target only if it is given, with its arm and its design."""
    done = frame[frame.status == "done"]
    done = done[done.epoch == done.epoch.max()]
    if target is not None:
        done = done[(done.target == target) | (done.design == "dense")]
    return done.assign(arm=arm_names(done), equal=done.design.map(LABELS))


def prunings_against_one(final: pd.DataFrame) -> pd.DataFrame:
    """Compare several prunings and the ramp with one pruning, within each design, all questions as one family."""
    pruned = final[final.design != "dense"].sort_values(["design", "prunings"], ascending=[False, True])
    return compare(pruned, by="arm", value="test_accuracy", within="equal", against="1 pruning")


def gradual_and_instant(final: pd.DataFrame, prunings: int | None = None) -> pd.DataFrame:
    """Pair the arms of each design: one pruning is instant; the ramp, or most prunings with restarts, are gradual."""
    most = final[final.design == "restarts"].prunings.max() if prunings is None else prunings
    gradual_arm = (final.design == "ramp") | ((final.design == "restarts") & (final.prunings == most))
    instant_arm = final.design.isin(["restarts", "recovery"]) & (final.prunings == 1)
    rows = final[gradual_arm | instant_arm]
    method = gradual_arm[rows.index].map({True: "gradual", False: "instant"})
    rows = rows.assign(method=method, equal=rows.design.map(LABELS), sparsity=rows.target)
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
    """Answer in sentences whether several prunings differ from one, in each design, with the paired differences."""
    if missing := _too_few(frame, "gradual_pruning"):
        return missing
    found, sentences = prunings_against_one(last_epochs(frame, target)), []
    for equal, rows in found.groupby("equal", sort=False):
        apart = [f"{row.a} ({_points(row)})" for row in rows.itertuples() if row.differs]
        rest = [f"{row.a} ({_points(row)})" for row in rows.itertuples() if not row.differs]
        told = f"With {equal}, at {target:.0%}:"
        if apart:
            told += f" {', '.join(apart)} {'differs' if len(apart) == 1 else 'differ'} from one pruning"
        if rest:
            told += f"{';' if apart else ''} {', '.join(rest)} cannot be told apart from one pruning"
        sentences.append(told + ".")
    return " ".join(sentences)


def tell_gradual(frame: pd.DataFrame | None) -> str:
    """Answer in sentences at which sparsities gradual and instant pruning differ, in each design."""
    if missing := _too_few(frame, "gradual_vs_instant"):
        return missing
    found, sentences = gradual_against_instant(last_epochs(frame)), []
    for equal, rows in found.groupby("equal", sort=False):
        apart = [f"{row.larger} is better at {row.sparsity:.0%} (gradual minus instant {_points(row)})"
                 for row in rows.itertuples() if row.differs]  # fmt: skip
        rest = [f"{row.sparsity:.0%}" for row in rows.itertuples() if not row.differs]
        told = f"With {equal}: {'; '.join(apart)}" if apart else f"With {equal}:"
        if rest:
            told += f"{';' if apart else ''} the two cannot be told apart at {', '.join(rest)}"
        sentences.append(told + ".")
    return " ".join(sentences)


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


# --- One-shot pruning of a small and a large residual network ---------------------------------------------------------

# The first four rank kernels by sum or mean and count what goes in kernels or weights: every combination of the two.
ONE_SHOT_ARMS = {
    "sum, by kernels": {"rank": "sum", "count": "kernels"},
    "mean, by kernels": {"rank": "mean", "count": "kernels"},
    "sum, by weights": {"rank": "sum", "count": "weights"},
    "mean, by weights": {"rank": "mean", "count": "weights"},
    "shortcuts spared": {"rank": "sum", "count": "kernels", "exclude": ["*shortcut*"]},
    "dropped by half": {"rank": "sum", "count": "kernels", "drop_probability": 0.5},
    "kernels, per layer": {"scope": "layer"},
    "weights, global": {"granularity": "weight"},
    "weights, per layer": {"granularity": "weight", "scope": "layer"},
    "filters, global": {"granularity": "filter"},
    "filters, per layer": {"granularity": "filter", "scope": "layer"},
}

ONE_SHOT_RULES = list(ONE_SHOT_ARMS)[:5]  # those of which the study asks a verdict, the original rule first


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """Return a convolution that keeps the image's size at stride 1, and its batch norm."""
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]


class ResidualBlock(nn.Module):
    """A basic or a bottleneck block; its shortcut is a 1x1 convolution where the shape changes.

    Args:
        kind: "basic" (two 3x3 convolutions) or "bottleneck" (1x1, 3x3, 1x1, with four times the channels at the end).
        inputs: Channels that come in.
        width: Channels inside.
        stride: Of the first 3x3 convolution and of the shortcut.
    """

    def __init__(self, kind: str, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        if _checks.one_of("kind", kind, ("basic", "bottleneck")) == "basic":
            self.outputs = width
            layers = _convolution(inputs, width, 3, stride) + [nn.ReLU()] + _convolution(width, width, 3)
        else:
            self.outputs = 4 * width
            layers = _convolution(inputs, width, 1) + [nn.ReLU()] + _convolution(width, width, 3, stride)
            layers += [nn.ReLU()] + _convolution(width, self.outputs, 1)
        self.body = nn.Sequential(*layers)
        changes = stride > 1 or inputs != self.outputs
        self.shortcut = nn.Sequential(*(_convolution(inputs, self.outputs, 1, stride) if changes else []))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def residual_network(
    kind: str, blocks: int, stages: int, width: int, *, channels: int = 3, stem: int = 1, seed: int = 0
) -> nn.Sequential:
    """Build a residual network for ten classes; each stage after the first halves the image and doubles the width.

    Args:
        kind: "basic" or "bottleneck", as for `ResidualBlock`.
        blocks: Blocks in each stage.
        stages: How many stages.
        width: Channels of the first stage.
        channels: Channels of the images.
        stem: The stride of the first convolution; above 1 it has 5x5 kernels in place of 3x3.
        seed: Of the initial weights; the global random state stays as it is.

    Returns:
        The network, in training mode.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers, inputs = [*_convolution(channels, width, 3 if stem == 1 else 5, stem), nn.ReLU()], width
        for stage in range(stages):
            for number in range(blocks):
                block = ResidualBlock(kind, inputs, width * 2**stage, 2 if stage > 0 and number == 0 else 1)
                layers.append(block)
                inputs = block.outputs
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def prune_convolutions(
    model: nn.Module,
    ratio: float,
    *,
    granularity: str = "kernel",
    rank: str = "mean",
    count: str = "weights",
    exclude: Sequence[str] = (),
    **options: object,
) -> Masks:
    """Prune convolutions by magnitude, and leave linear layers alone.

    Ranked by their sum and counted in kernels, this is the rule of the repository whose claim is examined: the cut is
    the quantile of the sums over all convolutions, and what lies strictly below it goes.

    Args:
        model: A network with convolutions; it is changed in place.
        ratio: The fraction to prune.
        granularity: "weight", "kernel" or "filter"; "kernel" only where kernels are counted.
        rank: "sum" or "mean" of the magnitudes in a kernel or filter.
        count: What `ratio` is a fraction of, "kernels" or "weights".
        exclude: Names or globs of further layers to leave alone.
        **options: Options of `prune_threshold` where kernels are counted, of `prune` where weights are.

    Returns:
        The masks, as from `prune`.
    """
    normalize = _checks.one_of("rank", rank, ("sum", "mean")) == "mean"
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    options |= {"granularity": granularity, "normalize": normalize, "exclude": [*linear, *exclude]}
    if _checks.one_of("count", count, ("kernels", "weights")) == "weights":
        return prune(model, "magnitude", ratio, **options)
    unit = granularities.find(_checks.one_of("granularity", granularity, ("kernel",)))
    found = scores(model, "magnitude", exclude=options["exclude"]).values()
    kernels = torch.cat([unit.scores(score, None, normalize)[:, :, 0, 0].flatten() for score in found])
    cut = kernels.kthvalue(int(ratio * len(kernels)) + 1).values.item()
    return prune_threshold(model, cut, **options)


def census(model: nn.Module, masks: Masks, granularity: str = "kernel") -> dict[str, int]:
    """Count what the convolutions have and what has gone, in units, in weights, and in weights of 1x1 kernels.

    Args:
        model: A network with convolutions.
        masks: True for what is kept; convolutions without a mask are whole.
        granularity: The unit, "weight", "kernel" or "filter".

    Returns:
        The numbers `units`, `weights` and `1x1`, each again as `... gone`, and `empty`: convolutions without a weight.
    """
    dims = {"weight": 4, "kernel": 2, "filter": 1}[granularity]  # dimensions that tell one unit from another
    counts = dict.fromkeys(("units", "units gone", "weights", "weights gone", "1x1", "1x1 gone", "empty"), 0)
    for name, weight in prunable_weights(model).items():
        if weight.dim() != 4:
            continue
        keep = masks.get(name, torch.ones_like(weight, dtype=torch.bool))
        units = keep.reshape(*keep.shape[:dims], -1).any(-1)
        parts = {"units": units, "weights": keep}
        if weight[0, 0].numel() == 1:
            parts["1x1"] = keep
        for part, kept in parts.items():
            counts[part] += kept.numel()
            counts[f"{part} gone"] += kept.numel() - int(kept.sum())
        counts["empty"] += not keep.any()
    return counts


def _prune_arm(model: nn.Module, arm: str, ratio: float, seed: int) -> Masks:
    """Prune by an arm of the study, so that `restore` undoes it."""
    with warnings.catch_warnings(action="ignore"):  # emptied layers are counted
        return prune_convolutions(model, ratio, seed=seed, restorable=True, **ONE_SHOT_ARMS[arm])


def one_shot(
    network: str,
    plan: dict,
    seed: int,
    ratios: list[float],
    dataset: str,
    train_size: int,
    test_size: int,
    epochs: int,
    stem: int,
    precision: str = "float32",
    device: str = "cpu",
) -> list[dict]:
    """Train a residual network, then prune it by every arm at every ratio, without fine-tuning.

    Args:
        network: Its name in the table.
        plan: The arguments kind, blocks, stages and width of `residual_network`.
        seed: Of weights, data order and random choices.
        ratios: The fractions asked for.
        dataset: A name that `data.load` knows.
        train_size: Images to train on.
        test_size: Images to test on.
        epochs: Of training, by Adam with a one-cycle learning rate up to 5e-3.
        stem: The stride of the first convolution.
        precision: Of the training.
        device: Where everything runs.

    Returns:
        A row per arm and ratio, ratio 0 being the dense network: the accuracy, the fractions gone and the number of
        emptied layers; then the rows of `input_gradients`.
    """
    train, test = data.load(dataset, device=device)
    train, test = train.subset(train_size), test.subset(test_size)
    batches = list(test)
    model = residual_network(**plan, channels=train.images.shape[1], stem=stem, seed=seed).to(device)
    fit(model, train, None, epochs, "adam", lr=5e-3, lr_schedule="one-cycle", precision=precision, seed=seed)
    dense = accuracy(model, batches)
    rows = [{"arm": arm, "asked": 0.0, "weights_gone": 0.0, "accuracy": dense} for arm in ONE_SHOT_ARMS]
    for arm, options in ONE_SHOT_ARMS.items():
        for ratio in ratios:
            masks = _prune_arm(model, arm, ratio, seed)
            counts = census(model, masks, options.get("granularity", "kernel"))
            gone = {f"{part}_gone": counts[f"{part} gone"] / counts[part] for part in ("units", "weights", "1x1")}
            row = {"arm": arm, "asked": ratio, "accuracy": accuracy(model, batches), "empty": counts["empty"]}
            rows.append(row | gone)
            restore(model)
    return rows + input_gradients(model, test.batch(128, seed=seed), ratios)


def input_gradients(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], ratios: list[float]) -> list[dict]:
    """Compare the loss's gradient at the images before pruning with that after pruning one way or both ways.

    Args:
        model: A dense network, left as it is but in evaluation mode.
        batch: Inputs (N, C, H, W) and targets (N,).
        ratios: The fractions of weights to prune, by global magnitude.

    Returns:
        Two rows per ratio, "backward only" and "forward and backward": the cosine similarity to the dense gradient,
        its mean over the images, and whether the outputs of backward-only pruning equal the dense ones bit for bit.
    """
    outputs, dense = _input_gradient(model.eval(), batch)
    rows = []
    for ratio in ratios:
        masks = _prune_arm(model, "weights, global", ratio, 0)
        _, both = _input_gradient(model, batch)
        restore(model)
        with backward_pruned(model, masks):
            unchanged, backward = _input_gradient(model, batch)
        for way, gradient in {"backward only": backward, "forward and backward": both}.items():
            cosine = F.cosine_similarity(dense, gradient).mean().item()
            rows.append({"arm": way, "asked": ratio, "cosine": cosine, "same": torch.equal(outputs, unchanged)})
    return rows


def _input_gradient(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs, and the loss's gradient with respect to the inputs, flat (N, C * H * W)."""
    inputs = batch[0].clone().requires_grad_()
    outputs = model(inputs)
    gradient = torch.autograd.grad(F.cross_entropy(outputs, batch[1]), inputs)[0]
    return outputs.detach(), gradient.flatten(1)


def accuracy_lost(frame: pd.DataFrame) -> pd.DataFrame:
    """Add to the runs of `one_shot` the column `lost`: the accuracy before pruning minus that after it.

    Args:
        frame: The finished runs; rows without an accuracy are left out, and so are those of the dense networks.

    Returns:
        The other rows, with the column.
    """
    key = ["network", "seed", "arm"]
    rows = frame[frame.accuracy.notna()]
    dense = rows[rows.asked == 0].set_index(key).accuracy.rename("dense")
    rows = rows[rows.asked > 0].join(dense, on=key)
    return rows.assign(lost=rows.dense - rows.accuracy)


def above_chance(frame: pd.DataFrame, least: float = 0.2) -> pd.DataFrame:
    """Keep the arms and ratios whose mean accuracy is at least `least` in every network of the frame.

    Near chance nothing more can be lost, so a gap that closes there says nothing about a rule.

    Args:
        frame: Rows with the columns network, arm, asked and accuracy.
        least: The smallest mean accuracy to keep, a fraction.

    Returns:
        The rows that remain.
    """
    means = frame.groupby(["arm", "asked", "network"]).accuracy.mean().groupby(["arm", "asked"]).min()
    return frame[frame.set_index(["arm", "asked"]).index.isin(means[means >= least].index)]


def robustness_gap(lost: pd.DataFrame, pair: Sequence[str]) -> pd.DataFrame:
    """Subtract the accuracy that the second network loses from what the first loses, for each seed, arm and ratio.

    Args:
        lost: The table of `accuracy_lost`.
        pair: The names of two networks.

    Returns:
        A row per arm, ratio and seed with the column `accuracy_gap`; positive where the first network loses more.
    """
    wide = lost.pivot(index=["arm", "asked", "seed"], columns="network", values="lost")
    gap = (wide[pair[0]] - wide[pair[1]]).dropna().rename("accuracy_gap").reset_index()
    return gap.sort_values("arm", key=lambda arm: arm.map(list(ONE_SHOT_ARMS).index), kind="stable")


def compare_networks(frame: pd.DataFrame, pair: Sequence[str], asked: Sequence[float]) -> pd.DataFrame:
    """Compare the accuracy that two networks lose, under each rule for kernels that leaves both above chance.

    Args:
        frame: The finished runs of `one_shot`.
        pair: The names of two networks.
        asked: The ratios at which they are compared.

    Returns:
        A row per rule and ratio, as from `compare`, first network minus second.
    """
    lost = accuracy_lost(frame[frame.network.isin(pair)])
    lost = above_chance(lost[lost.asked.isin(asked) & lost.arm.isin(ONE_SHOT_RULES)])
    return compare(lost, by="network", value="lost", against=[tuple(pair)], within=["arm", "asked"])


def gaps_above_chance(frame: pd.DataFrame, pair: Sequence[str], asked: Sequence[float]) -> pd.DataFrame:
    """Return the robustness gap of each seed, under each rule for kernels that leaves both networks above chance.

    Args:
        frame: The finished runs of `one_shot`.
        pair: The names of two networks.
        asked: The ratios wanted.

    Returns:
        The table of `robustness_gap`.
    """
    lost = accuracy_lost(frame[frame.network.isin(pair)])
    return robustness_gap(above_chance(lost[lost.asked.isin(asked) & lost.arm.isin(ONE_SHOT_RULES)]), pair)


def compare_gaps(gaps: pd.DataFrame, against: str | list[tuple[str, str]] = "sum, by kernels") -> pd.DataFrame:
    """Compare the robustness gap between rules at each ratio, by default that of every rule with the original one's.

    Args:
        gaps: The table of `gaps_above_chance`.
        against: The rule that the others are compared with, or a list of pairs of rules.

    Returns:
        A row per comparison, as from `compare`.
    """
    return compare(gaps, by="arm", value="accuracy_gap", against=against, within="asked")


def tell_one_shot(frame: pd.DataFrame, pair: Sequence[str], asked: Sequence[float]) -> str:
    """Answer in three sentences which network loses more under the original rule, and what ranking by mean changes.

    Args:
        frame: The finished runs of `one_shot`.
        pair: The names of two networks.
        asked: The ratios of the verdicts.

    Returns:
        The sentences, with differences in percentage points and their 95 % intervals.
    """
    if (seeds := frame.seed.nunique()) < ENOUGH_SEEDS:
        return f"{seeds} of {ENOUGH_SEEDS} seeds have run, which gives no verdict."
    first, second = pair
    dense = frame[frame.asked == 0].groupby("network").accuracy.mean()
    robust, gaps = compare_networks(frame, pair, asked), gaps_above_chance(frame, pair, asked)
    original = robust[robust.arm == ONE_SHOT_RULES[0]]
    by_kernels = compare_gaps(gaps)
    by_kernels = by_kernels[by_kernels.a == "mean, by kernels"]
    by_weights = compare_gaps(gaps, [("mean, by weights", "sum, by weights")])
    return (
        f"Before pruning, the {first} network classifies {dense[first]:.1%} of the test images correctly and the "
        f"{second} one {dense[second]:.1%}. The original rule ranks kernels by their sum; the difference in accuracy "
        f"lost, {first} minus {second}, is {_told(original, 'so the {} network loses more')}. If we rank kernels by "
        f"their mean, this difference changes: counted in kernels, by {_told(by_kernels, 'which the test confirms')}; "
        f"counted in weights, so that both rankings remove equally many, by "
        f"{_told(by_weights, 'which the test confirms')}."
    )


# --- Published tables and pictures, rebuilt --------------------------------------------------------------------------


def published_grasp_table() -> pd.DataFrame:
    """Return the tables of the published GraSP check of resnet10t, with the layers under their right names.

    The original paired the masks with the names of all modules, so containers and activations came to have weights.

    Returns:
        A row per layer, in the order of the model: layer, listed_as (the name in the published tables), before, and the
        weights left when 50, 97 and 98 % were asked for: after_50, after_97, after_98.

    Example:
        >>> from pruneutils import studies
        >>> studies.published_grasp_table().sum(numeric_only=True).tolist()
        [4921736, 4820397, 4820336, 98434]
    """
    rows = [
        ("conv1.0", "-", 648, 324, 323, 328),
        ("conv1.3", "conv1", 6912, 3502, 3538, 3485),
        ("conv1.6", "conv1.0", 18432, 9340, 9252, 9163),
        ("layer1.0.conv1", "conv1.1", 36864, 36864, 36864, 0),
        ("layer1.0.conv2", "conv1.2", 36864, 36864, 36864, 0),
        ("layer2.0.conv1", "conv1.3", 73728, 73728, 73728, 0),
        ("layer2.0.conv2", "conv1.4", 147456, 147456, 147456, 0),
        ("layer2.0.downsample.1", "conv1.5", 8192, 4159, 4079, 4123),
        ("layer3.0.conv1", "conv1.6", 294912, 294912, 294912, 0),
        ("layer3.0.conv2", "bn1", 589824, 589824, 589824, 0),
        ("layer3.0.downsample.1", "act1", 32768, 16379, 16471, 16159),
        ("layer4.0.conv1", "maxpool", 1179648, 1179648, 1179648, 0),
        ("layer4.0.conv2", "layer1", 2359296, 2359296, 2359296, 0),
        ("layer4.0.downsample.1", "layer1.0", 131072, 65750, 65737, 62906),
        ("fc", "layer1.0.conv1", 5120, 2351, 2344, 2270),
    ]
    return pd.DataFrame(rows, columns=["layer", "listed_as", "before", "after_50", "after_97", "after_98"])


def grasp_normaliser(
    seed: int, classifier: str = "as created", batches: str = "one", target: float = 0.98, per_class: int = 25
) -> dict:
    """Measure what GraSP's threshold is in the published unit, and how far the sum that makes the unit cancels.

    The published code divides the scores of resnet10t by the magnitude of their sum before it prints the threshold. The
    scores have both signs, so the sum is a small remainder, and details decide how small it is.

    Args:
        seed: Of the weights and of the batch.
        classifier: "as created", or "redrawn" from Xavier's normal distribution, as in the published code.
        batches: "one" batch of all classes, or "halves" of five classes each, as in the published code.
        target: The sparsity asked for.
        per_class: Images of each class.

    Returns:
        `threshold` of the rule that keeps the highest S, in that unit; `remainder`, the magnitude of the sum over the
        sum of the magnitudes; `positive`, the number of positive S; and the name of the data.
    """
    _checks.one_of("classifier", classifier, ("as created", "redrawn"))
    _checks.one_of("batches", batches, ("one", "halves"))
    train, _ = data.load("cifar10")
    model = models.create("timm/resnet10t", num_classes=10, seed=seed)
    if classifier == "redrawn":
        redraw(model, seed=seed, init=lambda model: nn.init.xavier_normal_(model.fc.weight))
    inputs, targets = train.balanced_batch(per_class, seed)
    parts = [slice(None)] if batches == "one" else targets.argsort(stable=True).chunk(2)
    found = scores(model, "grasp", [(inputs[part], targets[part]) for part in parts], train_mode=True, seed=seed)
    flat = torch.cat([-score.flatten().double() for score in found.values()])
    threshold = flat.kthvalue(len(flat) - int(len(flat) * (1 - target)) + 1).values
    unit = flat.sum().abs()
    return {
        "threshold": float(threshold / (unit + 1e-10)),
        "remainder": float(unit / flat.abs().sum()),
        "positive": int((flat > 0).sum()),
        "data": train.name,
    }


def grasp_by_differences(
    model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], temperature: float = 200.0, reach: float = 1e-8
) -> dict[str, torch.Tensor]:
    """Score by GraSP without a second derivative: H g is the difference of two gradients, a small step along g apart.

    Args:
        model: A network in float64; batch norm uses batch statistics.
        batch: One (inputs, targets) pair.
        temperature: What the outputs are divided by.
        reach: The norm of the step: small, so that no ReLU switches on the way.

    Returns:
        {parameter name: w * (H g)}, as from `scores(model, "grasp", train_mode=True)` up to the error of the step.

    Example:
        >>> from pruneutils import studies
        >>> model = pu.models.create("lenet300").double()
        >>> batch = torch.rand(4, 1, 28, 28, dtype=torch.float64), torch.arange(4)
        >>> exact = pu.scores(model, "grasp", batch, train_mode=True)["fc2.weight"]
        >>> found = studies.grasp_by_differences(model, batch)["fc2.weight"]
        >>> bool((found - exact).norm() < 1e-3 * exact.norm())
        True
    """
    g = _gradient(_moved(model, {}, 0), batch, temperature)
    step = reach / torch.cat([layer.flatten() for layer in g.values()]).norm()
    ahead, behind = (_gradient(_moved(model, g, sign * step), batch, temperature) for sign in (1, -1))
    weights = prunable_weights(model)
    return {name: w.detach() * (ahead[name] - behind[name]) / (2 * step) for name, w in weights.items()}


def gradient_norm_change(
    model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], masks: Mapping[str, torch.Tensor],
    temperature: float = 200.0,
) -> dict[str, float]:  # fmt: skip
    """Measure how the squared gradient norm changes when weights are removed, and what GraSP's scores predict.

    Args:
        model: A network in float64, dense.
        batch: One (inputs, targets) pair.
        masks: True = kept; the others are removed.
        temperature: What the outputs are divided by.

    Returns:
        The change relative to the norm before: `predicted` by the sum of the scores to first order, `shrunk` when the
        weights shrink by a millionth (times a million), and `removed` when they go altogether.

    Example:
        >>> from pruneutils import studies
        >>> model = pu.models.create("lenet300").double()
        >>> batch = torch.rand(4, 1, 28, 28, dtype=torch.float64), torch.arange(4)
        >>> masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in pu.prunable_weights(model).items()}
        >>> studies.gradient_norm_change(model, batch, masks)["removed"]
        0.0
    """
    found = scores(model, "grasp", batch, train_mode=True, temperature=temperature)
    away = {name: -weight.detach() * ~masks[name] for name, weight in prunable_weights(model).items()}

    def squared_norm(step):
        return sum(float(g.square().sum()) for g in _gradient(_moved(model, away, step), batch, temperature).values())

    before = squared_norm(0)
    gone = sum(float(found[name][~masks[name]].sum()) for name in found)
    return {
        "predicted": -2 * gone / before,
        "shrunk": (squared_norm(1e-6) / before - 1) / 1e-6,
        "removed": squared_norm(1) / before - 1,
    }


def _gradient(model, batch, temperature):
    weights = prunable_weights(model)
    loss = F.cross_entropy(model(batch[0]) / temperature, batch[1])
    return dict(zip(weights, torch.autograd.grad(loss, weights.values()), strict=True))


def _moved(model, direction, step):
    """Return a copy in training mode, its weights moved by `step` times `direction`."""
    result = copy.deepcopy(model).train()
    with torch.no_grad():
        for name, weight in prunable_weights(result).items():
            weight += step * direction[name] if name in direction else 0
    return result


def published_vgg16_table() -> pd.DataFrame:
    """Return the published fraction of each VGG-16 layer's weights that five criteria keep at compression 0.5.

    The original lists the multiply-accumulates that are left of each layer; over those of the dense layer they give the
    density. Its networks are pruned before training, but for magnitude, whose network is trained for 200 epochs first.

    Returns:
        A row per layer: layer, listed_as (the published name), and a column of fractions for each criterion.

    Example:
        >>> from pruneutils import studies
        >>> studies.published_vgg16_table().set_index("layer").loc["features.28"].drop("listed_as").map("{:.3f}".format)
        random       0.316
        magnitude    0.121
        snip         0.246
        grasp        0.262
        synflow      0.210
        Name: features.28, dtype: str
    """
    rows = [
        (0, 0, 1769472, 541695, 1501183, 1704960, 985088, 1765376),
        (1, 2, 37748736, 11867135, 27796479, 29917183, 18281471, 37137408),
        (3, 5, 18874368, 5992704, 14198528, 12952831, 8534271, 18300928),
        (4, 7, 37748736, 11856127, 28079361, 20818944, 15328512, 35502079),
        (6, 10, 18874368, 5943296, 14003136, 9233535, 7212287, 16645631),
        (7, 12, 37748736, 11949055, 27708608, 14927487, 13233983, 28944256),
        (8, 14, 37748736, 11956288, 27095935, 16215359, 14178047, 28932671),
        (10, 17, 18874368, 5974976, 13638895, 7740864, 6951488, 10316815),
        (11, 19, 37748736, 11935391, 20104512, 11484336, 12541855, 8774719),
        (12, 21, 37748736, 11964463, 8695023, 12011791, 13159455, 8783952),
        (14, 24, 9437184, 2980576, 1030796, 3001123, 2925716, 1995555),
        (15, 26, 9437184, 2982560, 749572, 2290064, 2429731, 1996460),
        (16, 28, 9437184, 2982684, 1139607, 2320448, 2471884, 1982292),
        (None, None, 5120, 1620, 2201, 4572, 2810, 5107),
    ]
    criteria = ["random", "magnitude", "snip", "grasp", "synflow"]
    table = pd.DataFrame(
        [[left / dense for left in kept] for _, _, dense, *kept in rows], columns=criteria
    )  # fmt: skip
    table.insert(0, "layer", ["linear" if ours is None else f"features.{ours}" for _, ours, *_ in rows])
    table.insert(1, "listed_as", ["fc" if theirs is None else f"layers.{theirs}.conv" for theirs, *_ in rows])
    return table


def histograms_as_published(weights: Mapping[str, torch.Tensor], bins: int = 50) -> list[tuple]:
    """Count weights as the published 3D histograms of VGG-16 did, faults included.

    They took every weight, pruned or not; gave each layer its own bins from its smallest to its largest weight; divided
    the counts by their sum; and drew the bars 0.25 to the right of the bins, the classifier first.

    Args:
        weights: {parameter name: tensor}, the classifier last.
        bins: Of each layer.

    Returns:
        (layer, edges where the bars were drawn, heights) in the order of the picture.

    Example:
        >>> from pruneutils import studies
        >>> weights = {"first.weight": torch.tensor([-1.0, 0.0, 1.0]), "fc.weight": torch.tensor([0.0, 1.0])}
        >>> for layer, edges, heights in studies.histograms_as_published(weights, bins=2):
        ...     print(layer, edges, heights.round(2))
        fc [0.25 0.75 1.25] [0.5 0.5]
        first [-0.75  0.25  1.25] [0.33 0.67]
    """
    rows = []
    for name, weight in weights.items():
        counts, edges = np.histogram(weight.detach().cpu().flatten().numpy(), bins)
        rows.append((name.removesuffix(".weight"), edges + 0.25, counts / counts.sum()))
    return [rows[-1], *rows[:-1]]


def accuracy_in_training_mode(
    model: nn.Module, images: Images, batch_size: int = 128, order: int | None = None
) -> float:
    """Measure the accuracy of a network that was left in training mode, and leave the traces that this leaves.

    Batch norm uses the statistics of each batch, so the answer to an image depends on its neighbours, and the running
    statistics move towards those of the images.

    Args:
        model: Any classifier; it is in training mode afterwards.
        images: What the accuracy is measured on.
        batch_size: Images of a batch.
        order: The seed that shuffles the images; None leaves them in their order.

    Returns:
        The accuracy, a float in [0, 1].

    Example:
        >>> from pruneutils import studies
        >>> train, test = pu.data.load("digits")
        >>> model = pu.models.create("lenet300")  # no batch norm: the mode makes no difference
        >>> studies.accuracy_in_training_mode(model, test) == pu.accuracy(model, test)
        True
    """
    shown = images if order is None else images.subset(len(images), order)
    model.train()
    with torch.no_grad():
        hits = [
            int((model(x).argmax(1) == y).sum()) for x, y in shown.batches(batch_size, shuffle=False, augment=False)
        ]
    return sum(hits) / len(images)


# --- Before training, and then trained -------------------------------------------------------------------------------


def train_pruned(
    method: str, compression: float, control: str, seed: int, *, iterations: int = 1, pre_epochs: int = 0,
    epochs: int = 30, network: str = "fc", dataset: str = "mnist", lr: float = 1e-3, batch_size: int = 256,
    test_every: int = 10, precision: str = "float32", device: str = "cpu",
) -> list[dict]:  # fmt: skip
    """Prune a network at its initialisation (or after some epochs), train it, and measure it on the way.

    As published: Adam with a constant learning rate, one optimizer before and after the pruning, 100 random training
    images for the criteria that look at data. Since the learning rate is constant, a run of 30 epochs is the beginning
    of one of 150.

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
        lr: Of Adam.
        batch_size: Of the training.
        test_every: Measure after every so many epochs.
        precision: Of the training.
        device: Where to train.

    Returns:
        A row per measurement: epoch (counted from the pruning), accuracy, sparsity, empty_layers, commonest (the share
        of the commonest class among the test images), precision, data.
    """
    _checks.one_of("control", control, ("none", "shuffled", "redrawn", "inverted"))
    train, test = data.load(dataset, device=device)
    model = models.create(network, seed=seed).to(device)
    settings = {"batch_size": batch_size, "precision": precision}
    adam = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    if pre_epochs:
        fit(model, train, epochs=pre_epochs, optimizer=adam, seed=seed + 1000, **settings)
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
            adam, epochs = torch.optim.Adam(model.parameters(), lr=lr, fused=True), epochs + pre_epochs
        set_masks(model, masks)
    table = fit(model, train, test, epochs, optimizer=adam, seed=seed, test_every=test_every, **settings)
    facts = {
        "sparsity": count(model).sparsity,
        "empty_layers": int((layer_table(model).kept == 0).sum()),
        "commonest": test.targets.bincount().max().item() / len(test),
        "data": train.name,
    }
    measured = table.dropna(subset="test_accuracy").rename(columns={"test_accuracy": "accuracy"})
    return [row | facts for row in measured[["epoch", "accuracy", "precision"]].to_dict("records")]


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
    means = 100 * chosen.groupby("method").accuracy.mean().sort_values(ascending=False)
    epochs, seeds = (runs.pre_epochs + runs.epoch).iloc[0], chosen.seed.nunique()
    told = f"**With 10 % of the weights, after {epochs} epochs on {runs.data.iloc[0]}** (mean of {seeds} seeds): "
    told += ", ".join(f"{name} {mean:.1f} %" for name, mean in means.items()) + ".\n\n"
    rows = answers(chosen, "is it better than random?")
    told += "**Against random pruning:** " + "; ".join(in_words(row) for _, row in rows.iterrows()) + "."
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
# --- VGG-16 before training, beside the published table --------------------------------------------------------------

PUBLISHED_WORK = pd.DataFrame(
    {
        "random": [0.8916, 0.7945, 0.6310, 0.3165, 0.1009, 0.0108],
        "magnitude": [0.9477, 0.8991, 0.8151, 0.5634, 0.2283, 0.0322],  # after 200 epochs of training
        "snip": [0.9377, 0.9268, 0.7812, 0.4622, 0.1979, 0.0411],
        "grasp": [0.8201, 0.7295, 0.5711, 0.3781, 0.1751, 0.0586],
        "synflow": [0.9488, 0.9026, 0.8217, 0.6423, 0.4571, 0.1845],
    },
    index=pd.Index([0.05, 0.1, 0.2, 0.5, 1, 2], name="compression"),
)
CLOSE = 0.002  # shares of the MACs that we call the same


def work_left(frame: pd.DataFrame) -> pd.DataFrame:
    """Reduce the rows of `at_initialization` to one per run and compression, with its share of the MACs left."""
    columns = ["criterion", "iterations", "seed", "compression"]
    return frame.drop_duplicates(columns)[[*columns, "mac_density"]].reset_index(drop=True)


def beside_published_work(frame: pd.DataFrame) -> pd.DataFrame:
    """Put our shares of the MACs beside the published ones.

    Args:
        frame: The rows of `at_initialization`.

    Returns:
        A row per criterion and compression: published, ours (seed 1), difference, lowest and highest of the seeds, and
        `copied` (seed 1 with the ties and crops of the published code; NaN where the code makes no difference).
    """
    work = work_left(frame[frame.iterations == 1])
    rows = []
    for (name, compression), published in PUBLISHED_WORK.T.stack().items():
        ours = work[(work.criterion == name) & (work.compression == compression)].set_index("seed").mac_density
        copied = work[(work.criterion == name + AS_PUBLISHED) & (work.compression == compression) & (work.seed == 1)]
        if 1 in ours.index:
            rows.append({
                "criterion": name, "compression": compression, "published": published, "ours": ours[1],
                "difference": ours[1] - published, "lowest": ours.min(), "highest": ours.max(), "seeds": len(ours),
                "copied": copied.mac_density.iloc[0] if len(copied) else float("nan"),
            })  # fmt: skip
    return pd.DataFrame(rows)


def emptied(frame: pd.DataFrame, criterion: str, iterations: int, compression: float) -> list[str]:
    """List the layers that this run of seed 1 has left without any weight."""
    run = frame[(frame.seed == 1) & (frame.criterion == criterion) & (frame.iterations == iterations)]
    return run.layer[(run.compression == compression) & (run.kept == 0)].tolist()


def tell_vgg16(frame: pd.DataFrame) -> str:
    """Say in sentences how the counts agree with the published ones, and what several steps change for SynFlow.

    Args:
        frame: The rows of `at_initialization`.

    Returns:
        Markdown.
    """
    table = beside_published_work(frame)
    far = table.assign(far=table.difference.abs()).groupby("criterion", sort=False).far
    close = (table.difference.abs() <= CLOSE).sum()
    told = f"**{close} of {len(table)} published shares of the MACs are rebuilt to within {CLOSE}.** The largest "
    told += "difference is " + ", ".join(f"{value:.4f} for {name}" for name, value in far.max().items()) + ". "
    copied = table.dropna(subset="copied")
    after = (copied.copied - copied.published).abs().groupby(copied.criterion, sort=False).max()
    if len(after):
        told += "With the ties and the crops of the published code it falls to "
        told += ", ".join(f"{value:.4f} for {name}" for name, value in after.items()) + ". "
    several = frame[(frame.criterion == "synflow") & (frame.iterations > 1) & (frame.compression == 2)]
    if len(several):
        steps, empty = several.iterations.iloc[0], emptied(frame, "synflow", 1, 2)
        told += f"\n\n**SynFlow at a = 2:** one step empties {len(empty)} layers ({', '.join(empty)}), so the network "
        told += f"puts out the same for every image. {steps} steps leave at least {several.kept.min():,} weights in "
        told += f"every layer, and {several.mac_density.iloc[0]:.4f} of the MACs instead of "
        told += f"{table.ours[(table.criterion == 'synflow') & (table.compression == 2)].iloc[0]:.4f}."
    return told
