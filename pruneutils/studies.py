"""The runs of the larger studies, a function each: what `experiments.sweep` calls with one config of its grid.

Notebooks that ask different questions of the same runs share them here.
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from . import data, models
from ._files import repository
from .checkpoints import load, save
from .controls import redraw
from .costs import cost, cost_table
from .data import IMAGENET_MEAN_STD, Images
from .data.images import _root
from .model_utils import accuracy, layer_table
from .pruning import prune, scores, sparsity_at
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


def prune_adapted(
    seed: int, design: str, prunings: int, target: float, network: str = "resnet20", epochs: int = 8,
    precision: str = "auto",
) -> list[dict]:  # fmt: skip
    """Prune an adapted network while it trains, in one of the designs that are compared.

    All arms train `epochs` epochs by SGD with momentum .9 (Nesterov), weight decay 5e-4 and batches of 128. The network
    is the same one for every seed: a seed is an order of the images and their augmentation, not a network.

    Args:
        seed: Of data order and augmentation.
        design: "restarts" (equal total: each pruning is followed by `epochs / prunings` epochs with an optimizer and a
            cosine of their own), "recovery" (one optimizer and one cosine; the prunings are spread over the first half,
            and the second half is the recovery of every arm), "ramp" (the same with Zhu and Gupta's cubic ramp over the
            first half, a pruning every 100 steps), or "dense" (no pruning, the reference of equal length).
        prunings: How many prunings; 1 is instant. 0 for "ramp" and "dense".
        target: The sparsity at the end, a fraction; 0 for "dense".
        network: "resnet20" or "resnet56".
        epochs: How often each image is seen.
        precision: Of training and evaluation.

    Returns:
        A row per epoch: epoch, sparsity, test_accuracy, lr, precision, data.
    """
    train, test = cifar10_as_published()
    model = load(repository() / NETWORKS / f"{network}_seed0.safetensors")
    options = {
        "optimizer": "sgd", "lr": 0.05, "weight_decay": 5e-4, "lr_schedule": "cosine", "precision": precision,
        "seed": seed,
    }  # fmt: skip
    steps = [sparsity_at(i / prunings, target) for i in range(1, prunings + 1)]
    if design == "restarts":
        table = gradual(model, train, test, steps, epochs // prunings, **options)
    elif design == "recovery":
        table = gradual(model, train, test, steps, epochs=epochs, recovery=epochs / 2, **options)
    elif design == "ramp":
        table = fit(model, train, test, epochs, on_step=gradual_sparsity(target, end=0.5, every=100), **options)
    elif design == "dense":
        table = fit(model, train, test, epochs, **options)
    else:
        raise ValueError(f"unknown design {design!r}; known: restarts, recovery, ramp, dense")
    table = table[["epoch", "sparsity", "test_accuracy", "lr", "precision"]]
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


def at_initialization(criterion: str, iterations: int, compressions: list[float], seed: int) -> list[dict]:
    """Prune VGG-16 before training, at several compressions, and count what is left of every layer.

    As published: 100 random training images with crops and mirror images for the criteria that look at data, evaluation
    mode, all layers competing. The images are those of `data.load("cifar10")`, which may be JPEG files.

    Args:
        criterion: A criterion's name.
        iterations: In how many exponential steps to prune.
        compressions: Each leaves a density of 10 ** -compression.
        seed: Of the weights and the images.

    Returns:
        A row per compression and layer: kept and total weights, dense and sparse MACs, and `mac_density` of the whole.
    """
    train, _ = data.load("cifar10")
    train = replace(train, mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.262))
    batch = next(iter(train.subset(100, seed).batches(100, generator=torch.Generator().manual_seed(seed))))
    dense = vgg16_as_published(seed)
    options = {"data": batch, "seed": seed}
    once = scores(dense, criterion, **options) if iterations == 1 else None
    rows = []
    for compression in compressions:
        model = copy.deepcopy(dense)
        with warnings.catch_warnings(action="ignore"):  # empty layers are counted
            if iterations == 1:
                prune(model, lambda model, data: once, 1 - 10**-compression)
            else:
                prune(model, criterion, 1 - 10**-compression, iterations=iterations, **options)
        left, whole = cost_table(model, batch[0]), cost(model, batch[0])
        kept = layer_table(model)
        for layer, count in zip(left.itertuples(), kept.itertuples(), strict=True):
            rows.append({
                "compression": compression, "layer": layer.layer, "total": count.total, "kept": count.kept,
                "macs": layer.macs, "sparse_macs": layer.sparse_macs, "mac_density": whole.mac_density,
                "data": train.name,
            })  # fmt: skip
    return rows


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
