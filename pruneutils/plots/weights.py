"""Pictures of numbers, weight by weight: the histograms of every layer, in 3D or flat, and that of the scores."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import ticker
from mpl_toolkits.mplot3d.art3d import Line3DCollection, Poly3DCollection

from .._checks import nearest
from ..model_utils import get_masks, layer_name, prunable_weights
from .look import METHOD_COLORS, choice, dress, percent, picture, short

# --- Layers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerHistogram:
    """Counts of one layer's weights: `counts[i]` lie in [edges[i], edges[i + 1]), in the last bin also its end.

    The bins are equally wide between -limit and limit; the two outermost reach on to the smallest and largest weight.
    """

    layer: str
    edges: np.ndarray  # (bins + 1,)
    counts: np.ndarray  # (bins,), of the weights kept
    before: np.ndarray | None  # (bins,), of the weights before pruning
    limit: float
    total: int

    @property
    def kept(self) -> int:
        return int(self.counts.sum())

    def heights(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Counts kept and before, both over the same number: the layer's fullest bin."""
        peak = max(self.counts.max(), 0 if self.before is None else self.before.max(), 1)
        return self.counts / peak, None if self.before is None else self.before / peak


def weight_histograms(model, before=None, bins: int | None = None) -> list[LayerHistogram]:
    """A histogram per prunable layer of the weights that are kept: by its mask, without one those that are not zero.

    `before` is a model, a state_dict or {parameter name: tensor}: the weights before pruning, counted in the same
    bins. `bins` is their number in every layer; by default it is odd, 19 to 81, and grows with the layer.
    Raises ValueError for bins < 1, a layer that `before` lacks, and weights that are not finite.
    """
    if bins is not None and bins < 1:
        raise ValueError(f"bins={bins}: at least 1")
    weights, masks = prunable_weights(model), get_masks(model)
    if before is not None and not isinstance(before, Mapping):
        before = prunable_weights(before)
    rows = []
    for name, weight in weights.items():
        if before is not None and name not in before:
            raise ValueError(f"before has no {name!r}; {nearest(name, before)}")
        now = _numbers(weight, name)
        kept = now[masks[name].cpu().numpy().ravel() if name in masks else now != 0]
        old = None if before is None else _numbers(before[name], f"before: {name}")
        # With `before` the range follows all weights, so that it stands still while a slider moves the sparsity.
        limit = _reach(kept) if old is None else max(_reach(old), _reach(now))
        rows.append((name, kept, old, limit, now.size if old is None else old.size))
    widest = max(limit for *_, limit, _ in rows) or 1.0
    histograms = []
    for name, kept, old, limit, total in rows:
        limit = limit or widest  # an empty layer has no range of its own
        edges = np.linspace(-limit, limit, 1 + (bins or _odd(2.2 * math.sqrt(total)))).astype(kept.dtype)
        for values in (kept, old):
            if values is not None and values.size:
                edges[0], edges[-1] = min(edges[0], values.min()), max(edges[-1], values.max())
        counts = np.histogram(kept, edges)[0]
        ghost = None if old is None else np.histogram(old, edges)[0]
        histograms.append(LayerHistogram(layer_name(name), edges, counts, ghost, float(limit), total))
    return histograms


def _numbers(tensor, name) -> np.ndarray:
    tensor = torch.as_tensor(tensor).detach()
    array = (tensor if tensor.dtype == torch.float64 else tensor.float()).cpu().numpy().ravel()
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds values that are not finite")
    return array


def _reach(values, quantile=0.9995) -> float:
    """The magnitude that `quantile` of the values do not exceed: one outlier must not set the axis."""
    if not values.size:
        return 0.0
    place = math.ceil(quantile * (values.size - 1))
    return float(np.partition(np.abs(values), place)[place])


def _odd(number) -> int:
    return int(np.clip(number, 19, 81)) // 2 * 2 + 1


@picture
def layer_histograms(model, before=None, *, kind="3d", bins=None, title=None, ax=None, style=None, save=None):
    """The weights kept in each layer, one ridge a layer, on that before pruning if `before` is given.

    `before` and `bins` are those of `weight_histograms`. Within a layer both histograms have one scale, so that what
    is missing of the ghost is what was pruned. `kind` is "3d" (a waterfall; `ax` needs projection="3d") or "ridge".
    Raises ValueError as `weight_histograms` does, and for an unknown `kind` or an Axes that does not fit it.
    """
    choice("kind", kind, ("3d", "ridge"))
    if ax is not None and (ax.name == "3d") != (kind == "3d"):
        raise ValueError(f'kind="{kind}" cannot be drawn into a {ax.name} Axes; the 3d one needs projection="3d"')
    layers = weight_histograms(model, before, bins)
    share = sum(layer.kept for layer in layers) / sum(layer.total for layer in layers)
    title = f"Weights by layer, {percent(share)} kept" if title is None else title
    note = "weights kept, share kept at the right" + ("" if before is None else "; pale: before pruning")
    if kind == "ridge":
        return _ridges(ax or style.axes((7.0, 1.6 + 0.5 * min(len(layers), 14))), layers, style, title, note)
    own, ax = ax is None, ax or style.axes((8.4, 5.0), "3d")
    _waterfall(ax, layers, style, title, note)
    if own:  # room at the right for the names of the layers
        ax.set_position((-0.02 - 0.005 * max(len(short(layer.layer, 16)) for layer in layers), -0.02, 1, 1))
    return ax


def _labels(layers, most) -> list[LayerHistogram | None]:
    """The layers to be named: all, or if they are too many every n-th; empty ones always."""
    step = math.ceil(len(layers) / most)
    empty = [i for i, layer in enumerate(layers) if layer.kept == 0]
    free = [i for i in range(0, len(layers), step) if all(3 * abs(i - other) >= 2 * step for other in empty)]
    return [layer if i in {*empty, *free} else None for i, layer in enumerate(layers)]


def _steps(edges, heights, y):
    """The outlines of a step histogram at depth `y`, one for each run of bins that are not empty."""
    filled = np.flatnonzero(heights)
    for run in np.split(filled, np.flatnonzero(np.diff(filled) > 1) + 1) if filled.size else ():
        x = np.repeat(edges[run[0] : run[-1] + 2], 2)
        z = np.concatenate([[0], np.repeat(heights[run], 2), [0]])
        yield np.column_stack([x, np.full_like(x, y), z])


def _waterfall(ax, layers, style, title, note):
    n, limit = len(layers), max(layer.limit for layer in layers)
    ax.figure.set_facecolor(style.canvas)
    ax.set_facecolor(style.canvas)
    ax.set_axis_off()
    ax.computed_zorder = False  # matplotlib sorts by mean depth and gets overlapping ridges wrong

    def add(collection):
        collection.set_clip_on(False)  # the Axes is a square that would cut the ridges at its sides
        ax.add_collection(collection, autolim=False)  # add_collection3d spends most of its time on limits, set below

    depth = np.arange(n)[::-1]  # the first layer at the back
    front, back = -0.45, n - 1 + 0.45
    ticks = [
        t for t in ticker.MaxNLocator(8, steps=(1, 2, 5, 10)).tick_values(-limit, limit) if abs(t) <= limit * 1.001
    ]
    floor = [[(t, front, 0), (t, back, 0)] for t in ticks]
    wall = [[(t, back, 0), (t, back, 1)] for t in ticks] + [[(-limit, back, z), (limit, back, z)] for z in (0.5, 1)]
    add(Line3DCollection(floor + wall, colors=style.grid, linewidths=0.6, zorder=0))
    labels = _labels(layers, 9)
    for i, (layer, y, color) in enumerate(zip(layers, depth, style.ordered(n), strict=True)):
        order = 10 * (i + 1)
        base = style.grid if layer.kept else style.alarm
        add(Line3DCollection([[(-limit, y, 0), (limit, y, 0)]], colors=base, linewidths=1, zorder=order))
        edges = np.clip(layer.edges.astype(float), -layer.limit, layer.limit)
        heights, ghost = layer.heights()
        if ghost is not None:
            look = {"facecolors": (*color[:3], 0.20), "edgecolors": (*color[:3], 0.55), "linewidths": 0.7}
            add(Poly3DCollection(list(_steps(edges, ghost, y)), zorder=order + 1, **look))
        if layer.kept:
            look = {"facecolors": (*color[:3], 0.94), "edgecolors": style.canvas, "linewidths": 0.6}
            add(Poly3DCollection(list(_steps(edges, heights, y)), zorder=order + 2, **look))
        if labels[i]:
            text, ink = f"{short(layer.layer, 16)}  {percent(layer.kept / layer.total)}", style.text
            ax.text(limit * 1.04, y, 0, text, color=ink if layer.kept else style.alarm, fontsize=9, va="center")
    for tick in ticks:
        look = {"color": style.muted, "fontsize": 8.5, "ha": "center", "va": "top"}
        ax.text(tick, front - 0.06 * n, 0, f"{tick:.3g}".replace("-", "−"), **look)
    ax.set(xlim=(-limit, limit), ylim=(front, back), zlim=(0, 1))
    ax.set_box_aspect((2.2, 1.25, 0.72), zoom=1.32)
    ax.view_init(24, -68)
    # A 3D Axes shrinks to a square in the middle of its place: texts are put into the place itself.
    left, bottom, width, height = ax.get_position(original=True).bounds
    for y, size, color, text in (
        (0.93, 13, style.text, title),
        (0.88, 9.5, style.muted, note),
        (0.03, 8.5, style.muted, "height: weights per bin, relative to the layer's fullest bin; floor: weight value"),
    ):
        weight = "bold" if text is title else "normal"
        look = {"fontsize": size, "color": color, "weight": weight, "transform": ax.figure.transFigure}
        ax.text2D(left + 0.03 * width, bottom + y * height, text, **look)
    return ax


def _ridges(ax, layers, style, title, note):
    n, limit = len(layers), max(layer.limit for layer in layers)
    dress(ax, style, title, grid="x")
    named = _labels(layers, 24)
    for i, (layer, color) in enumerate(zip(layers, style.ordered(n), strict=True)):
        base, order = n - 1 - i, 3 * i + 2
        edges = np.clip(layer.edges.astype(float), -layer.limit, layer.limit)
        heights, ghost = (None if h is None else base + 1.35 * h for h in layer.heights())
        if ghost is not None:
            pale = {"fill": True, "facecolor": (*color[:3], 0.22), "edgecolor": (*color[:3], 0.55), "linewidth": 0.6}
            ax.stairs(ghost, edges, baseline=base, zorder=order, **pale)
        solid = {"fill": True, "facecolor": color, "edgecolor": style.canvas, "linewidth": 0.4}
        ax.stairs(heights, edges, baseline=base, zorder=order + 1, **solid)
        ink = style.text if layer.kept else style.alarm
        ax.plot([-limit, limit], [base, base], color=color if layer.kept else ink, linewidth=0.8, zorder=order + 2)
        if named[i]:
            share = percent(layer.kept / layer.total)
            ax.annotate(share, (limit, base), (6, 0), textcoords="offset points", color=ink, fontsize=8.5, va="bottom")
    places = [(n - 1 - i, short(layer.layer)) for i, layer in enumerate(named) if layer]
    ax.set_yticks([place for place, _ in places], [name for _, name in places], va="bottom")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set(xlim=(-limit, limit), ylim=(-0.15, n + 0.5), xlabel=f"weight value ({note})")
    return ax


# --- Scores ----------------------------------------------------------------------------------------------------------


@picture
def score_distribution(scores, threshold=None, *, bins=48, title=None, ax=None, style=None, save=None):
    """How many weights have which score, logarithmic on both sides of zero; a bar of their own for those at zero.

    `scores` is {parameter name: tensor} or one tensor; what lies below `threshold` goes. Raises ValueError for an empty
    tensor and for scores that are not finite.
    """
    parts = scores.items() if isinstance(scores, Mapping) else [("scores", scores)]
    values = np.concatenate([_numbers(tensor, name) for name, tensor in parts] or [np.empty(0)])
    if not values.size:
        raise ValueError("scores is empty")
    ax = ax or style.axes((6.4, 3.8))
    dress(ax, style, title, grid="y")
    size = np.abs(values[values != 0])
    zeros = values.size - size.size
    top = float(size.max()) if size.size else 1.0
    # One in a thousand may lie nearer to zero than the logarithmic part reaches: they are counted in its first bin.
    near = max(float(np.quantile(size, 0.001)), top * 1e-9) if size.size else top / 10
    near = min(near, top / 10)
    steps = np.geomspace(near, top, bins + 1)
    ax.set_xscale("symlog", linthresh=near, linscale=0.5)
    for sign in (1, -1):
        side = sign * values[sign * values > 0]
        if side.size:
            edges = steps.copy()
            edges[-1] = top * 1.0001
            counts = np.histogram(np.maximum(side, near), edges)[0]
            bars = (counts, steps) if sign > 0 else (counts[::-1], -steps[::-1])
            ax.stairs(*bars, fill=True, color=METHOD_COLORS[0] if style.name == "light" else METHOD_COLORS[5])
    ax.set_yscale("log")
    if zeros:
        ax.bar(0, zeros, width=near, color=style.alarm, zorder=3)
        note = f"{zeros:,} of {values.size:,} ({percent(zeros / values.size)}) are exactly zero"
        place = {"ha": "center"} if (values < 0).any() else {"ha": "left"}
        spot = (0 if (values < 0).any() else -near / 2, zeros)
        ax.annotate(note, spot, (0, 4), textcoords="offset points", va="bottom", color=style.alarm, **place)
    if threshold is not None:
        below = int((values < threshold).sum())
        ax.axvline(threshold, color=style.text, linewidth=1.2, linestyle="--", zorder=4)
        note = f"threshold {threshold:.3g}: {below:,} ({percent(below / values.size)}) below"
        right = abs(threshold) < math.sqrt(near * top) or threshold < 0
        place = {"ha": "left" if right else "right", "va": "top", "textcoords": "offset points"}
        ax.annotate(note, (threshold, 0.985), (5 if right else -5, 0), xycoords=("data", "axes fraction"), **place)
    low = -top if (values < 0).any() else -near
    ax.set(xlim=(1.3 * low, 1.3 * top), xlabel="score", ylabel="weights", title=title or "Scores")
    ax.set_ylim(0.7, ax.get_ylim()[1] * 8)
    first, last = math.ceil(math.log10(near)), math.floor(math.log10(top))
    decades = range(last, first - 1, -math.ceil((last - first + 1) / 5))
    ticks = {0: "0"} | {10.0**d: f"$10^{{{d}}}$" for d in decades}
    ticks |= {-(10.0**d): f"$-10^{{{d}}}$" for d in decades if low < 0 and (values < 0).any()}
    ax.set_xticks(list(ticks), list(ticks.values()))
    ax.minorticks_off()
    return ax
