"""The runs of the larger studies, a function each: what `experiments.sweep` calls with one config of its grid.

Notebooks that ask different questions of the same runs share them here.
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from . import _checks, data, models
from ._files import repository
from .checkpoints import load, save
from .controls import inverted, redraw, shuffle_masks
from .costs import cost, cost_table
from .data import IMAGENET_MEAN_STD, Images
from .data.datasets import _root
from .experiments.statistics import compare
from .model_utils import accuracy, count, layer_table, prunable_weights, set_masks
from .pruning import LayerCollapseWarning, TiedScoresWarning, prune, scores, sparsity_at
from .training import fit, gradual, gradual_sparsity

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


def evaluation_mode(network: str, mode: str, normalisation: str, batch_size: int = 128) -> dict:
    """Measure a public checkpoint with running or batch statistics, normalised as trained or by (.5, .5).

    A published pruning study never called `model.eval()` and normalised by (.5, .5); this takes the two apart.

    Args:
        network: "resnet20" or "resnet56".
        mode: "running" (evaluation mode) or "batch" (training mode, whose statistics depend on the batch).
        normalisation: "as trained" (ImageNet's mean and deviation) or "half".
        batch_size: Of the evaluation.

    Returns:
        The accuracy on the 10,000 test images in their order, a fraction, and the name of the data.
    """
    mean, std = IMAGENET_MEAN_STD if normalisation == "as trained" else ((0.5,) * 3, (0.5,) * 3)
    _, test = data.load("cifar10")
    test = replace(test, mean=mean, std=std)
    model = models.load_weights(models.create(network), _root(None) / "checkpoints" / CHECKPOINTS[network])
    model.train(mode == "batch")
    hits = 0
    with torch.no_grad():
        for inputs, targets in test.subset(range(len(test))).batches(batch_size, shuffle=False, augment=False):
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


def last_epochs(frame: pd.DataFrame, target: float | None = None) -> pd.DataFrame:
    """Take the last epoch of each finished run, of one target only if it is given, with its arm and its design."""
    done = frame[frame.status == "done"]
    done = done[done.epoch == done.epoch.max()]
    if target is not None:
        done = done[(done.target == target) | (done.design == "dense")]
    return done.assign(arm=arm_names(done), equal=done.design.map(LABELS))


def prunings_against_one(final: pd.DataFrame) -> pd.DataFrame:
    """Compare several prunings and the ramp with one pruning, in each design; each design is a family of its own."""
    pruned = final[final.design != "dense"].sort_values(["design", "prunings"], ascending=[False, True])
    tables = []
    for equal, rows in pruned.groupby("equal", sort=False):
        if rows.arm.nunique() > 1 and "1 pruning" in set(rows.arm):
            found = compare(rows, by="arm", value="test_accuracy", against="1 pruning")
            tables.append(found.assign(equal=equal))
    columns = ["equal", "a", "b", "n", "difference", "low", "high", "p_holm", "differs", "larger"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


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
            told += f"{';' if apart else ''} {', '.join(rest)} cannot be told apart from it"
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
    """Select the measurements of `train_pruned` after equally many epochs in all, a row per run."""
    epochs = runs.epochs[runs.method == "random"].iloc[0]
    return runs[runs.pre_epochs + runs.epoch == epochs]


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
    told = "cannot be told apart from"
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
    chosen = runs[(runs.control == "none") & runs.compression.isin([0, 1])]
    means = 100 * chosen.groupby("method").accuracy.mean().sort_values(ascending=False)
    epochs, seeds = runs.epochs[runs.method == "random"].iloc[0], chosen.seed.nunique()
    told = f"**With 10 % of the weights, after {epochs} epochs on {runs.data.iloc[0]}** (mean of {seeds} seeds): "
    told += ", ".join(f"{name} {mean:.1f} %" for name, mean in means.items()) + ".\n\n"
    if seeds < ENOUGH_SEEDS:
        return told + f"{seeds} of {ENOUGH_SEEDS} seeds give no verdict."
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
