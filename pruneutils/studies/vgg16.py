"""VGG-16 before training as a course report published it: the runs, the tables beside it, and the histograms."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import nn

from .. import data, models
from .._torch import note_precision
from ..controls import redraw
from ..costs import cost, cost_table
from ..data import Images
from ..model_utils import layer_table, prunable_weights, set_masks
from ..pruning import (
    prune,
    scores,
)

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
    note_precision("float32")  # of the scores
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
    untrained = table[table.criterion != "magnitude"]
    close = (untrained.difference.abs() <= CLOSE).sum()
    work = work_left(frame)
    work = work[(work.iterations == 1) & (work.compression == 1) & ~work.criterion.str.endswith(AS_PUBLISHED)]
    shares = work.groupby("criterion").mac_density.mean().sort_values()
    told = f"With 10 % of the weights, {', '.join(f'{100 * share:.0f} % ({name})' for name, share in shares.items())} "
    told += f"of the multiply-accumulates (MACs) are left (mean of {work.seed.nunique()} seeds).\n\n"
    told += f"**{close} of {len(untrained)} published shares of the MACs are rebuilt to within {CLOSE}.** "
    told += "Those of magnitude cannot be: the original trained that network before it pruned. The largest "
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
