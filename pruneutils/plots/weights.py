"""The weights of every layer: their histograms, counted in a few passes, and the picture of these."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import nn

from .._checks import nearest, one_of
from ..model_utils import get_masks, layer_name, prunable_weights
from .flat import heat_map, ridges
from .look import WIDTH, Style, picture
from .ticks import percent
from .waterfall import waterfall

KINDS = ("auto", "3d", "ridge", "heatmap")
_PIECE = 1 << 17  # weights at a time: what is computed on the way stays in the cache
_SAMPLE = 1 << 15  # weights that tell how wide a layer's axis is


@dataclass(frozen=True)
class LayerHistogram:
    """Counts of one layer's weights: `counts[i]` lie in [edges[i], edges[i + 1]), in the last bin also its end.

    The bins are equally wide between -limit and limit; the two outermost reach on to the smallest and largest weight.

    Attributes:
        layer: The layer's name.
        edges: Ends of the bins, (bins + 1,), in the weights' precision.
        counts: Weights kept in each bin, (bins,).
        before: Weights before pruning in each bin, (bins,), or None.
        limit: Where the inner bins end.
        total: The number of weights, kept or not.
    """

    layer: str
    edges: np.ndarray
    counts: np.ndarray
    before: np.ndarray | None
    limit: float
    total: int

    @property
    def kept(self) -> int:
        """The number of weights kept."""
        return int(self.counts.sum())

    def heights(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the counts kept and before, both over the same number: the layer's fullest bin."""
        peak = max(self.counts.max(), 0 if self.before is None else self.before.max(), 1)
        return self.counts / peak, None if self.before is None else self.before / peak


def weight_histograms(
    model: nn.Module, before: nn.Module | Mapping | None = None, bins: int | None = None
) -> list[LayerHistogram]:
    """Count the weights that are kept in each prunable layer: by its mask, without a mask those that are not zero.

    Args:
        model: The network.
        before: The weights before pruning, counted in the same bins: a model, a state_dict or {parameter name: tensor}.
        bins: Their number in every layer; by default it is odd, 19 to 81, and grows with the layer.

    Returns:
        One histogram a layer, in the order of the model.

    Raises:
        ValueError: If bins < 1, `before` lacks a layer, or weights are not finite.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> _ = torch.nn.init.constant_(model.weight, 0.5)
        >>> [(h.kept, h.total, h.counts.tolist()) for h in pu.plots.weight_histograms(model, bins=3)]
        [(4, 4, [0, 0, 4])]
    """
    if bins is not None and bins < 1:
        raise ValueError(f"bins={bins}: at least 1")
    weights, masks = prunable_weights(model), get_masks(model)
    if before is not None and not isinstance(before, Mapping):
        before = prunable_weights(before)
    layers = {}
    for name, weight in weights.items():
        if before is not None and name not in before:
            raise ValueError(f"before has no {name!r}; {nearest(name, before)}")
        now, ends = flat(weight, name)
        keep = masks[name].reshape(-1).cpu() if name in masks else now != 0
        old, more = (None, ()) if before is None else flat(before[name], f"before: {name}")
        # With `before` the range follows all weights, so that it stands still while a slider moves the sparsity.
        limit = _reach(now, keep) if old is None else max(_reach(old), _reach(now))
        layers[name] = now, keep, old, (*ends, *more), limit
    widest = max(limit for *_, limit in layers.values()) or 1.0
    rows = []
    for name, (now, keep, old, ends, limit) in layers.items():
        limit, n = limit or widest, bins or _odd(2.2 * math.sqrt(now.numel()))  # an empty layer has no range of its own
        ghost = None if old is None else _count(_bins(old, limit, n), None, n)
        counts = _count(_bins(now, limit, n), keep, n)
        edges = _edges(limit, n, ends, now.numpy().dtype)
        rows.append(LayerHistogram(layer_name(name), edges, counts, ghost, limit, now.numel()))
    return rows


class BinnedWeights:
    """Weights sorted into their bins once, so that one choice of masks after the other is counted in no time.

    Args:
        weights: {parameter name: weights before pruning}.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor]):
        self._layers = []  # name, bins, edges, counts of all, counts of those that are not zero, limit
        self._last: dict[str, tuple[torch.Tensor, np.ndarray]] = {}  # by name: the mask counted last, and its counts
        values = {name: flat(weight, name) for name, weight in weights.items()}
        limits = {name: _reach(value) for name, (value, _) in values.items()}
        widest = max(limits.values()) or 1.0
        for name, (value, ends) in values.items():
            limit, n = limits[name] or widest, _odd(2.2 * math.sqrt(value.numel()))
            bins = _bins(value, limit, n)
            counts = _count(bins, None, n), _count(bins, value != 0, n)
            self._layers.append((name, bins, _edges(limit, n, ends, value.numpy().dtype), *counts, limit))

    def histograms(self, masks: Mapping[str, torch.Tensor], before: bool = True) -> list[LayerHistogram]:
        """Count what masks keep; in a layer without one, the weights that are not zero."""
        rows = []
        for name, bins, edges, everything, not_zero, limit in self._layers:
            counts = not_zero if name not in masks else self._kept(name, bins, masks[name], len(everything))
            ghost = everything if before else None
            rows.append(LayerHistogram(layer_name(name), edges, counts, ghost, limit, bins.numel()))
        return rows

    def _kept(self, name, bins, mask, n) -> np.ndarray:
        """Count what a mask keeps, from what has changed since the last one if that is little."""
        keep = mask.detach().reshape(-1).cpu()
        last, counts = self._last.get(name, (None, None))
        changed = None if last is None else keep.numpy() != last.numpy()
        n_changed = bins.numel() if last is None else np.count_nonzero(changed)
        if n_changed > bins.numel() // 16:
            counts = _count(bins, keep, n)
        elif n_changed:
            places = np.flatnonzero(changed)
            came = keep.numpy()[places]
            moves = np.bincount(bins.numpy()[places] + n * came.astype(np.int64), minlength=2 * n)
            counts = counts + moves[n:] - moves[:n]
        self._last[name] = keep, counts
        return counts


def flat(tensor, name: str) -> tuple[torch.Tensor, tuple[float, ...]]:
    """Return the values of a tensor in one dimension, on the CPU, as float32 or float64, and the smallest and largest.

    Raises ValueError if one is not finite.
    """
    tensor = torch.as_tensor(tensor).detach().cpu()
    values = (tensor if tensor.dtype == torch.float64 else tensor.float()).reshape(-1)
    ends = tuple(end.item() for end in torch.aminmax(values)) if values.numel() else ()
    if not math.isfinite(sum(ends)):
        raise ValueError(f"{name} holds values that are not finite")
    return values, ends


def _reach(values, keep=None, quantile=0.9995) -> float:
    """The magnitude that `quantile` of the values do not exceed: one outlier must not set the axis."""
    step = math.ceil(values.numel() / _SAMPLE)
    part = values[::step] if keep is None else values[::step][keep[::step]]
    if keep is not None and step > 1 and len(part) < _SAMPLE // 8:
        part = values[keep]  # few enough to be looked at one by one
    if not len(part):
        return 0.0
    beyond = len(part) - math.ceil(quantile * (len(part) - 1))
    return part.abs().topk(beyond).values[-1].item()


def _odd(number) -> int:
    return int(np.clip(number, 19, 81)) // 2 * 2 + 1


def _bins(values, limit, n) -> torch.Tensor:
    """The bin of each value: those beyond the limit are in the outermost."""
    scale, half = n / (2 * limit), n // 2
    whole = torch.round if n % 2 else torch.floor
    found = torch.empty(values.numel(), dtype=torch.uint8 if n <= 128 else torch.int32)
    for piece, part in zip(values.split(_PIECE), found.split(_PIECE)):
        place = torch.mul(piece, scale)  # and nothing is added to it, which would round once more
        part.copy_(whole(place, out=place).clamp_(-half, n - 1 - half).add_(half))
    return found


def _edges(limit, n, ends, dtype) -> np.ndarray:
    """Where the bins of `_bins` end, to the last bit: the nominal ends may be off by a rounding."""
    nominal = ((np.arange(1, n) - n / 2) * (2 * limit / n)).astype(dtype)
    around = [nominal]
    for _ in range(4):
        around = [np.nextafter(around[0], dtype.type(-np.inf)), *around, np.nextafter(around[-1], dtype.type(np.inf))]
    around = np.stack(around)
    reached = _bins(torch.from_numpy(around.reshape(-1)), limit, n).numpy().reshape(around.shape) >= np.arange(1, n)
    inner = np.take_along_axis(around, reached.argmax(0)[None], 0)[0]
    return np.concatenate([[min(-limit, *ends)], inner, [max(limit, *ends)]]).astype(dtype)


def _count(bins, keep, n) -> np.ndarray:
    """How many of the values that are kept lie in each bin."""
    counts = torch.zeros(2 * n, dtype=torch.int64)
    for start in range(0, bins.numel(), _PIECE):
        piece = bins[start : start + _PIECE]
        if keep is not None:  # those kept are counted n bins further on: much faster than to pick them out
            piece = torch.add(piece, keep[start : start + _PIECE].view(torch.uint8), alpha=n)
        counts += torch.bincount(piece, minlength=2 * n)
    return (counts[:n] if keep is None else counts[n:]).numpy()


def kind_for(n: int, flat: bool = False) -> str:
    """Return the kind of picture in which `n` layers stay legible."""
    return "3d" if n <= 7 and not flat else "ridge" if n <= 24 else "heatmap"


@picture
def layer_histograms(
    model: nn.Module | list[LayerHistogram],
    before: nn.Module | Mapping | None = None,
    *,
    kind: str = "auto",
    bins: int | None = None,
    title: str | None = None,
    ax: Axes | None = None,
    style: str | Style | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Draw the weights kept in each layer, on those before pruning if `before` is given.

    Within a layer both histograms have one scale, so what is missing of the pale one is what was pruned.

    Args:
        model: The network, or the histograms that `weight_histograms` has counted.
        before: The weights before pruning, as for `weight_histograms`.
        kind: "3d" is a waterfall, "ridge" one flat histogram above the other, "heatmap" a row of colours a layer.
            "auto" takes the one that stays legible: 3d to 7 layers, ridge to 24, a heat map beyond; in a given `ax`
            that is not 3D one of the latter two.
        bins: The number of bins, as for `weight_histograms`.
        title: The headline; by default it says how many weights are kept.
        ax: The Axes to draw into; `kind="3d"` needs one with projection="3d".
        style: "light" or "dark".
        save: A path without suffix; writes path.png, path.svg and path_dark.png.

    Returns:
        The Axes, 3D for the waterfall.

    Raises:
        ValueError: As `weight_histograms` does, and for an unknown `kind` or an Axes that does not fit it.

    Example:
        >>> model = pu.models.create("lenet300", num_classes=10)
        >>> ax = pu.plots.layer_histograms(model)
        >>> ax.name, pu.plots.layer_histograms(model, kind="ridge").name
        ('3d', 'rectilinear')
    """
    one_of("kind", kind, KINDS)
    given = isinstance(model, list) and all(isinstance(layer, LayerHistogram) for layer in model)
    n = len(model) if given else len(prunable_weights(model))
    if kind == "auto":
        kind = "3d" if ax is not None and ax.name == "3d" else kind_for(n, flat=ax is not None)
    if ax is not None and (ax.name == "3d") != (kind == "3d"):
        raise ValueError(f'kind="{kind}" cannot be drawn into a {ax.name} Axes; the 3d one needs projection="3d"')
    layers = model if given else weight_histograms(model, before, bins)
    share = sum(layer.kept for layer in layers) / sum(layer.total for layer in layers)
    title = f"Weights by layer, {percent(share)} kept" if title is None else title
    if kind == "3d":
        return waterfall(ax or style.axes((WIDTH, 5.0), "3d"), layers, style, title)
    if kind == "ridge":
        return ridges(ax or style.axes((WIDTH, 1.5 + 0.36 * max(n, 4))), layers, style, title)
    return heat_map(ax or style.axes((WIDTH, 1.5 + min(0.155 * max(n, 8), 9.3))), layers, style, title)
