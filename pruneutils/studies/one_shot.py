"""One-shot pruning of a small and a large residual network: the arms, the runs, and what they say."""

import warnings
from collections.abc import Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from .. import _checks, data
from ..experiments.statistics import compare
from ..model_utils import Masks, accuracy, prunable_weights, restore
from ..pruning import granularities, prune, prune_threshold, scores
from ..training import backward_pruned, fit
from .before_training import _told
from .while_training import ENOUGH_SEEDS

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
        A row per rule and ratio, as from `compare`, first network minus second. The verdicts are corrected for all
        rules and ratios, also for those that are left out because of what they measured.
    """
    lost = accuracy_lost(frame[frame.network.isin(pair)])
    lost = lost[lost.asked.isin(asked) & lost.arm.isin(ONE_SHOT_RULES)]
    table = compare(lost, by="network", value="lost", against=[tuple(pair)], within=["arm", "asked"])
    cells = above_chance(lost).set_index(["arm", "asked"]).index
    return table[table.set_index(["arm", "asked"]).index.isin(cells)].reset_index(drop=True)


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
        f"{second} one {dense[second]:.1%}. The original rule ranks kernels by the sum of their magnitudes; the "
        f"difference in accuracy lost, {first} minus {second}, is "
        f"{_told(original, 'so the {} network loses more')}. If we rank kernels by their mean, this difference "
        f"changes: counted in kernels, by {_told(by_kernels, 'which the test confirms')}; counted in weights, so that "
        f"both rankings remove equally many, by {_told(by_weights, 'which the test confirms')}."
    )
