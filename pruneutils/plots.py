"""Pictures in one style: for a paper, for a README in light and dark, and fast enough for a slider.

Every function draws one picture and returns its Axes. All of them take
    ax     the Axes to draw into; without it a pyplot figure is made, which notebooks show and `plt.close()` frees
    style  "light" or "dark"; without it that of the enclosing `with style(...)`, else "light"
    save   a path without suffix: writes path.png and path.svg in light and path_dark.png in dark
Fractions go in, percent is shown.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.art3d import Line3DCollection, Poly3DCollection

from .model_utils import get_masks, layer_name, nearest, prunable_weights
from .statistics import summary

# --- Style -----------------------------------------------------------------------------------------------------------

# Okabe & Ito's colours, safe for the colour-blind; None is the text colour. Their yellow vanishes on white: it is last.
_METHOD_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", None, "#F0E442")
_METHOD_SLOTS = {"magnitude": 0, "snip": 1, "grasp": 2, "synflow": 3, "gradient": 4, "random": 6}
_MARKERS = "osD^vP>X"
_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), "-", (0, (8, 2)))


@dataclass(frozen=True)
class Style:
    """The colours of a picture, and how its figure is made."""

    name: str
    canvas: str
    text: str
    muted: str
    grid: str
    alarm: str
    layers: tuple[float, float]  # the part of viridis that stands out from the canvas
    pyplot: bool = True

    def axes(self, size: tuple[float, float], projection: str | None = None):
        """A new figure of `size` inches with one Axes."""
        options = {"figsize": size, "layout": None if projection else "constrained"}
        figure = plt.figure(**options) if self.pyplot else Figure(**options)
        if projection:
            return figure.add_axes((0, 0, 1, 1), projection=projection)
        return figure.add_subplot()

    def rc(self) -> dict:
        text, muted, grid, canvas = self.text, self.muted, self.grid, self.canvas
        return {
            "font.family": ["DejaVu Sans"], "font.size": 9, "text.color": text,
            "figure.facecolor": canvas, "axes.facecolor": canvas, "axes.edgecolor": muted, "axes.labelcolor": text,
            "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 10,
            "axes.titlecolor": text, "xtick.color": muted, "ytick.color": muted, "grid.color": grid,
            "legend.frameon": True, "legend.framealpha": 0.85, "legend.facecolor": canvas, "legend.edgecolor": "none",
            "legend.labelcolor": text, "legend.fontsize": 8.5, "legend.title_fontsize": 8, "lines.linewidth": 1.6,
            "lines.markersize": 5, "hatch.linewidth": 0.6,
        }  # fmt: skip

    def ordered(self, n: int) -> np.ndarray:
        """`n` colours in order, (n, 4)."""
        return mpl.colormaps["viridis"](np.linspace(*self.layers, n) if n > 1 else [sum(self.layers) / 2])


_STYLES = {
    "light": Style("light", "#ffffff", "#1f2328", "#59636e", "#d1d9e0", "#D55E00", (0.10, 0.80)),
    "dark": Style("dark", "#0d1117", "#f0f6fc", "#9198a1", "#3d444d", "#FF7B2E", (0.28, 0.92)),
}
_STYLE = ContextVar("style", default="light")


@contextmanager
def style(name: str):
    """Within the block, pictures are drawn "light" or "dark" where their call does not say."""
    token = _STYLE.set(_style(name).name)
    try:
        yield
    finally:
        _STYLE.reset(token)


def _style(name) -> Style:
    name = _STYLE.get() if name is None else name
    return _STYLES[_choice("style", name, _STYLES)]


def _choice(argument, value, choices):
    if value not in tuple(choices):
        raise ValueError(f"{argument}={value!r}: {nearest(value, choices)}")
    return value


def save(figure, path, dpi: int = 200) -> list[Path]:
    """Write a Figure (or an Axes' figure) to path.png and path.svg, or to `path` alone if it ends in .png or .svg.

    The same figure gives the same bytes on every call: no dates, no versions, fixed ids. Returns the paths written.
    """
    figure, path = getattr(figure, "figure", None) or figure, Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name such as "at_0.9" has a suffix that is none of a picture's: it is part of the name.
    paths = [path] if path.suffix in (".png", ".svg") else [path.with_name(path.name + s) for s in (".png", ".svg")]
    with mpl.rc_context({"svg.hashsalt": "pruneutils", "svg.fonttype": "path"}):
        for target in paths:
            metadata = {"Software": None} if target.suffix == ".png" else {"Date": None, "Creator": None}
            figure.savefig(target, dpi=dpi, metadata=metadata, facecolor=figure.get_facecolor())
    return paths


def _picture(draw):
    """Give `draw(..., ax, style)` the arguments that every picture has: see the module's docstring."""

    @functools.wraps(draw)
    def call(*args, **options):
        look, path, ax = _style(options.pop("style", None)), options.pop("save", None), options.get("ax")
        with mpl.rc_context(look.rc()):
            drawn = draw(*args, style=look, **options)
        if path is not None and ax is not None:
            save(drawn, path)
        elif path is not None:
            stem = str(path).removesuffix(".png").removesuffix(".svg")
            for variant in _STYLES.values():
                picture = drawn
                if variant != look:
                    with mpl.rc_context(variant.rc()):
                        picture = draw(*args, style=replace(variant, pyplot=False), **options)
                save(picture, path if variant.name == "light" else f"{stem}_dark.png")
        return drawn

    return call


def method_styles(names: Iterable, style: str | None = None) -> dict:
    """{name: {"color", "marker", "linestyle"}}, whatever the order of `names`.

    The criteria that many pictures share have a colour of their own; other names fill the free ones in sorted order;
    numbers are ordered, and so are their colours.
    """
    look = style if isinstance(style, Style) else _style(style)
    names = list(dict.fromkeys(names))
    if all(isinstance(name, (int, float, np.number)) for name in names):
        names = sorted(names)
        colors = [tuple(c) for c in look.ordered(len(names))]
        slots = dict(zip(names, range(len(names)), strict=True))
    else:
        slots = {name: _METHOD_SLOTS[name] for name in names if name in _METHOD_SLOTS}
        free = [slot for slot in range(len(_METHOD_COLORS) + len(names)) if slot not in slots.values()]
        slots |= dict(zip(sorted((n for n in names if n not in slots), key=str), free, strict=False))
        colors = [color or look.text for color in _METHOD_COLORS]
    # Past the last colour the markers shift by one, so that no two methods look the same.
    return {
        name: {
            "color": colors[slots[name] % len(colors)],
            "marker": _MARKERS[(slots[name] + slots[name] // len(colors)) % len(_MARKERS)],
            "linestyle": _LINES[slots[name] % len(_LINES)],
        }
        for name in names
    }


def _dress(ax, style: Style, title=None, grid=None):
    """What rcParams cannot do: an Axes made elsewhere, and ticks that are made only when the figure is drawn."""
    ax.figure.set_facecolor(style.canvas)
    ax.set_facecolor(style.canvas)
    ax.tick_params(colors=style.muted, labelsize=8.5, labelfontfamily="DejaVu Sans")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(style.muted)
    if grid:
        ax.grid(axis=grid, color=style.grid, linewidth=0.6)
        ax.set_axisbelow(True)
    if title:
        ax.set_title(title)


def _percent(fraction: float) -> str:
    """A percentage that says 0 or 100 only where it is exactly so."""
    if fraction in (0, 1) or not math.isfinite(fraction):
        return f"{100 * fraction:.0f} %"
    if fraction < 0.001:
        return "<0.1 %"
    if fraction > 0.999:
        return ">99.9 %"
    text = f"{100 * fraction:.1f}" if fraction < 0.0995 or fraction > 0.9905 else f"{100 * fraction:.0f}"
    return text.removesuffix(".0") + " %"


def _short(name: str, longest: int = 22) -> str:
    return name if len(name) <= longest else "…" + name[1 - longest :]


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


@_picture
def layer_histograms(model, before=None, *, kind="3d", bins=None, title=None, ax=None, style=None, save=None):
    """The weights kept in each layer, one ridge a layer, on that before pruning if `before` is given.

    `before` and `bins` are those of `weight_histograms`. Within a layer both histograms have one scale, so that what
    is missing of the ghost is what was pruned. `kind` is "3d" (a waterfall; `ax` needs projection="3d") or "ridge".
    Raises ValueError as `weight_histograms` does, and for an unknown `kind` or an Axes that does not fit it.
    """
    _choice("kind", kind, ("3d", "ridge"))
    if ax is not None and (ax.name == "3d") != (kind == "3d"):
        raise ValueError(f'kind="{kind}" cannot be drawn into a {ax.name} Axes; the 3d one needs projection="3d"')
    layers = weight_histograms(model, before, bins)
    share = sum(layer.kept for layer in layers) / sum(layer.total for layer in layers)
    title = f"Weights by layer, {_percent(share)} kept" if title is None else title
    note = "weights kept, share kept at the right" + ("" if before is None else "; pale: before pruning")
    if kind == "ridge":
        return _ridges(ax or style.axes((7.0, 1.6 + 0.5 * min(len(layers), 14))), layers, style, title, note)
    own, ax = ax is None, ax or style.axes((8.4, 5.0), "3d")
    _waterfall(ax, layers, style, title, note)
    if own:  # room at the right for the names of the layers
        ax.set_position((-0.02 - 0.005 * max(len(_short(layer.layer, 16)) for layer in layers), -0.02, 1, 1))
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
            text, ink = f"{_short(layer.layer, 16)}  {_percent(layer.kept / layer.total)}", style.text
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
    _dress(ax, style, title, grid="x")
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
            share = _percent(layer.kept / layer.total)
            ax.annotate(share, (limit, base), (6, 0), textcoords="offset points", color=ink, fontsize=8.5, va="bottom")
    places = [(n - 1 - i, _short(layer.layer)) for i, layer in enumerate(named) if layer]
    ax.set_yticks([place for place, _ in places], [name for _, name in places], va="bottom")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set(xlim=(-limit, limit), ylim=(-0.15, n + 0.5), xlabel=f"weight value ({note})")
    return ax


@_picture
def layer_bars(table: pd.DataFrame, *, title=None, ax=None, style=None, save=None):
    """The density of each layer as a bar; collapsed layers light up.

    `table` is a `layer_table`: columns layer, total, kept. Raises ValueError if one is missing or there is no row.
    """
    _need(table, "layer", "total", "kept")
    density, n = (table["kept"] / table["total"]).to_numpy(), len(table)
    share = table["kept"].sum() / table["total"].sum()
    ax = ax or style.axes((6.4, min(9.0, 1.1 + 0.27 * n)))
    _dress(ax, style, f"Density by layer, {_percent(share)} kept" if title is None else title, grid="x")
    rows = np.arange(n)
    empty = density == 0
    ax.barh(rows, density, height=0.72, color=style.ordered(n))
    ax.barh(rows[empty], np.ones(empty.sum()), height=0.72, color="none", edgecolor=style.alarm, hatch="////")
    step = math.ceil(n / 30)
    for row, value in zip(rows, density, strict=True):
        if row % step and value:
            continue
        text, ink = (_percent(value), style.text) if value else ("0 %: collapsed", style.alarm)
        box = None if value else {"facecolor": style.canvas, "edgecolor": "none", "pad": 1}  # on hatching
        look = {"color": ink, "va": "center", "fontsize": 8, "bbox": box}
        ax.annotate(text, (value, row), (4, 0), textcoords="offset points", **look)
    ax.axvline(share, color=style.muted, linewidth=0.9, linestyle=":", zorder=0.9)
    shown = [row for row in rows if row % step == 0 or empty[row]]
    ax.set_yticks(shown, [_short(str(table["layer"].iloc[row])) for row in shown])
    ax.tick_params(axis="y", length=0, labelcolor=style.text)
    ax.xaxis.set_major_formatter(lambda value, _: _percent(round(value, 6)))
    ax.set(xlim=(0, max(1.12 * density.max(), 1.0 if empty.any() else 0)), ylim=(n - 0.4, -0.6), xlabel="weights kept")
    return ax


@_picture
def sparsity_heatmap(tables, *, title="Sparsity by layer", ax=None, style=None, save=None):
    """The sparsity of every layer (column) under every method (row); collapsed layers are crossed out.

    `tables` is {method: layer_table} or a tidy frame with columns method, layer, sparsity. The colour follows
    -log10(density), which tells 98 % from 99 %. Raises ValueError if a column is missing or a layer comes twice.
    """
    if isinstance(tables, Mapping):
        if not tables:
            raise ValueError("tables is empty")
        for table in tables.values():
            _need(table, "layer", "sparsity")
        tables = pd.concat([table.assign(method=method) for method, table in tables.items()])
    _need(tables, "method", "layer", "sparsity")
    twice = tables.duplicated(["method", "layer"])
    if twice.any():
        first = tables[twice].iloc[0]
        raise ValueError(f"method {first['method']!r} has layer {first['layer']!r} more than once: average seeds first")
    methods, layers = tables["method"].unique(), tables["layer"].unique()
    grid = tables.pivot(index="method", columns="layer", values="sparsity").loc[methods, layers].to_numpy(float)
    height, width = grid.shape
    ax = ax or style.axes((max(4.0, min(9.5, 2.2 + 0.55 * width)), 1.9 + 0.42 * height))
    _dress(ax, style, title)
    shade = _spread(np.where(grid < 1, grid, np.nan))
    image = ax.imshow(shade, cmap="viridis", aspect="auto", vmin=0, vmax=max(1.0, np.nanmax(shade, initial=1.0)))
    for row, column in np.ndindex(height, width):
        value = grid[row, column]
        if value == 1:
            ax.text(column, row, "×", color=style.alarm, ha="center", va="center", fontsize=14, weight="bold")
        elif width <= 24 and np.isfinite(value):
            light = np.dot(to_rgb(image.cmap(image.norm(shade[row, column]))), (0.299, 0.587, 0.114)) > 0.55
            text = f"{math.floor(1000 * value) / 10:.1f}"  # rounded down: 99.96 % must not read 100
            ax.text(column, row, text, color="black" if light else "white", ha="center", va="center", fontsize=7)
    _cell_frame(ax, [str(m) for m in methods], [_short(str(name), 16) for name in layers], style)
    ticks = [t for t in _SPARSITY_TICKS if _spread(t) <= image.norm.vmax]
    _color_bar(ax, image, _spread(np.array(ticks)), [_percent(t) for t in ticks], "sparsity", style)
    if (grid == 1).any():
        ax.set_xlabel("× no weight is left", color=style.alarm, loc="left")
    return ax


@_picture
def mask_overlap(matrix: pd.DataFrame, *, title="Overlap of masks", label="intersection over union", ax=None,
                 style=None, save=None):  # fmt: skip
    """A matrix of overlaps in [0, 1] between named masks, with its numbers.

    Raises TypeError if `matrix` is not a DataFrame and ValueError if it is not square or leaves [0, 1].
    """
    if not isinstance(matrix, pd.DataFrame):
        raise TypeError(f"mask_overlap draws a DataFrame of overlaps, got {type(matrix).__name__}")
    values = matrix.to_numpy(float)
    if not values.size or list(matrix.index) != list(matrix.columns):
        raise ValueError(f"rows {list(matrix.index)} and columns {list(matrix.columns)} must be the same names")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"overlaps must lie in [0, 1], got {values.min():g} to {values.max():g}")
    n = len(values)
    ax = ax or style.axes((2.6 + 0.55 * n, 1.9 + 0.5 * n))
    _dress(ax, style, title)
    image = ax.imshow(values, cmap="viridis", vmin=0, vmax=1)
    for row, column in np.ndindex(n, n) if n <= 16 else ():
        ink = "black" if values[row, column] > 0.6 else "white"
        ax.text(column, row, f"{values[row, column]:.2f}", color=ink, ha="center", va="center", fontsize=8)
    names = [_short(str(name)) for name in matrix.index]
    _cell_frame(ax, names, names, style)
    ticks = np.linspace(0, 1, 5)
    _color_bar(ax, image, ticks, [f"{t:g}" for t in ticks], label, style)
    return ax


def _cell_frame(ax, rows, columns, style):
    ax.set_yticks(range(len(rows)), rows)
    step = math.ceil(len(columns) / 40)
    ax.set_xticks(range(0, len(columns), step), columns[::step], rotation=40, ha="right", rotation_mode="anchor")
    ax.tick_params(length=0, labelcolor=style.text)
    ax.spines[:].set_visible(False)
    ax.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
    ax.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
    ax.tick_params(which="minor", length=0)
    ax.grid(which="minor", color=style.canvas, linewidth=1.5)


def _color_bar(ax, image, ticks, labels, label, style):
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02, fraction=0.05, aspect=18)
    bar.set_ticks(ticks, labels=labels)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=style.muted, labelsize=8, length=0)
    bar.set_label(label, color=style.muted)


# --- Runs ------------------------------------------------------------------------------------------------------------

_SPARSITY_TICKS = (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9999)
_INTERVALS = {"t": "95 % t-interval", "bootstrap": "95 % bootstrap interval", "minmax": "smallest and largest"}


def _spread(sparsity):
    """-log10(density): as far from 0.9 to 0.99 as from 0 to 0.9."""
    return -np.log10(np.maximum(1 - np.asarray(sparsity, float), 1e-12))


def _need(frame, *columns):
    for column in columns:
        if column not in frame.columns:
            raise ValueError(f"the table has no column {column!r}; {nearest(column, frame.columns)}")
    if frame.empty:
        raise ValueError("the table has no rows")


def _groups(frame, x, y, by, interval, at=None) -> dict:
    """{name: DataFrame of x, mean, low, high, n}, a row for each value of `at`, which is `x` if x is no measurement."""
    _choice("interval", interval, _INTERVALS)
    by, at = [by] if isinstance(by, str) else list(by or ()), at or x
    _need(frame, x, y, at, *by)
    frame = frame.dropna(subset=[x, at])
    if frame[y].isna().all():
        raise ValueError(f"no row has both {x!r} and {y!r}")
    frame = frame.assign(**{at: frame[at].round(6)})  # achieved sparsities differ in their last digits only
    table = summary(frame, [*by, at], y, interval="t" if interval == "minmax" else interval)
    cells = frame.dropna(subset=[y]).groupby([*by, at], sort=False, dropna=False)
    if interval == "minmax":
        several = table["n"] > 1
        table["low"] = np.where(several, cells[y].min(), np.nan)
        table["high"] = np.where(several, cells[y].max(), np.nan)
    table["x"] = cells[x].mean().to_numpy()
    if len(by) == 1:
        names = table[by[0]]
    else:
        names = table[by].astype(str).agg(", ".join, axis=1) if by else pd.Series(y.replace("_", " "), table.index)
    return {name: rows.sort_values("x") for name, rows in table.groupby(names, sort=False)}


def _legend(ax, groups, interval, frame, **options):
    """The legend, whose title says what the intervals are and how many runs are behind them."""
    counts = pd.concat(groups.values())["n"]
    low, high = counts.min(), counts.max()
    runs = "seeds" if "seed" in frame.columns else "runs"
    n = f"n = {low}" if low == high else f"n = {low} to {high}"
    note = f"one run each ({n}): no interval" if high == 1 else f"mean, {_INTERVALS[interval]}, {n} {runs}"
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) == 1:
        handles, labels = [], []
    legend = ax.legend(handles, labels, title=note, alignment="left", **options)
    legend.get_title().set_color(ax.xaxis.label.get_color())
    legend.set_zorder(5)


def _error_bars(ax, group, look, label, bands=False):
    line = {"label": label, **look, "markeredgecolor": ax.get_facecolor(), "markeredgewidth": 0.6}
    if bands:
        ax.fill_between(group["x"], group["low"], group["high"], color=look["color"], alpha=0.2, linewidth=0)
        ax.plot(group["x"], group["mean"], **line)
    else:
        error = np.nan_to_num([group["mean"] - group["low"], group["high"] - group["mean"]])
        shown = np.where(group["n"] > 1, 1, np.nan)
        ax.errorbar(group["x"], group["mean"], error * shown, capsize=3, elinewidth=1, capthick=1, **line)


def _fraction_axis(ax, y, groups):
    """Percent on the y axis of an accuracy, and no room for what cannot be."""
    label = y.replace("_", " ")
    ax.set_ylabel(label)
    if "accuracy" in label:
        ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, -0.02), min(high, 1.02))


@_picture
def accuracy_vs_sparsity(frame: pd.DataFrame, x="sparsity", y="accuracy", by="method", *, interval="t", bands=False,
                         dense=None, scale="log", title=None, ax=None, style=None, save=None):  # fmt: skip
    """Accuracy over sparsity, a curve for each `by`, with its interval over seeds; the legend states which and n.

    `frame` has a row a run; `by` is a column, several, or None. `interval` is "t" or "bootstrap" (95 %, of the mean) or
    "minmax", drawn as bars or `bands`. `dense` is the unpruned accuracy, or one for each seed. `scale` is "log" (of the
    density: 0.9, 0.95, 0.98 are apart) or "linear". Raises ValueError for a missing column, several sizes or a repeated
    seed in one point, and sparsities outside [0, 1] ([0, 1) on the log scale).
    """
    _choice("scale", scale, ("log", "linear"))
    groups = _groups(frame, x, y, by, interval)
    places = np.unique(np.concatenate([group["x"] for group in groups.values()]))
    if places[0] < 0 or places[-1] > 1 or (scale == "log" and places[-1] == 1):
        raise ValueError(
            f'{x} runs from {places[0]:g} to {places[-1]:g}; it must lie in [0, 1], below 1 if scale="log"'
        )
    ax = ax or style.axes((6.4, 4.2))
    _dress(ax, style, title, grid="both")
    if scale == "log":
        ax.set_xscale("function", functions=(_spread, lambda value: 1 - 10.0 ** -np.asarray(value)))
    looks = method_styles(groups, style)
    for name in sorted(groups, key=list(looks).index):
        _error_bars(ax, groups[name], looks[name], str(name), bands)
    if dense is not None:
        runs = pd.DataFrame({"dense": True, "value": np.atleast_1d(np.asarray(dense, float))})
        (level,) = _groups(runs, "dense", "value", None, interval).values()
        mean, low, high = level[["mean", "low", "high"]].iloc[0]
        look = {"color": style.muted, "linewidth": 1, "linestyle": (0, (4, 3)), "label": f"dense {100 * mean:.1f} %"}
        ax.axhline(mean, zorder=1, **look)
        if math.isfinite(low):
            ax.axhspan(low, high, color=style.muted, alpha=0.15, linewidth=0, zorder=0.5)
    ends = (_spread if scale == "log" else np.asarray)(places[[0, -1]])
    _sparsity_ticks(ax, places, scale, float(np.ptp(ends)) or 1.0)
    ax.set_xlabel(x.replace("_", " "))
    _fraction_axis(ax, y, groups)
    _legend(ax, groups, interval, frame, loc="best")
    return ax


def _sparsity_ticks(ax, places, scale, width):
    """Ticks where there are points, as many as do not collide; round numbers where there are too many points."""
    if scale == "linear":
        ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
        return
    wanted = places if len(places) <= 10 else [t for t in _SPARSITY_TICKS if places[0] <= t <= places[-1]]
    ticks = []
    for place in reversed(list(wanted)):  # from the right, where results are the most interesting
        if not ticks or abs(_spread(place) - _spread(ticks[-1])) > 0.075 * width:
            ticks.append(place)
    ax.set_xticks(ticks, [f"{100 * t:.4g} %" for t in ticks])
    ax.minorticks_off()


@_picture
def curves(frame: pd.DataFrame, x="epoch", y="test_accuracy", by=None, *, interval="t", events=None, title=None,
           ax=None, style=None, save=None):  # fmt: skip
    """Training curves: `y` over `x`, a line for each `by`, with a band over seeds and a tick at each pruning.

    `events` are the places on `x` where weights were pruned, or {name: places}; without it, those where the column
    `sparsity`, if there is one, has grown. Raises ValueError as `accuracy_vs_sparsity` does.
    """
    groups = _groups(frame, x, y, by, interval)
    if events is None:
        growing = "sparsity" in frame.columns and y != "sparsity"
        events = _prunings(_groups(frame, x, "sparsity", by, interval)) if growing else {}
    elif not isinstance(events, Mapping):
        events = dict.fromkeys(groups, events)
    for name in events:
        if name not in groups:
            raise ValueError(f"events: no curve is called {name!r}; {nearest(name, groups)}")
    ax = ax or style.axes((6.4, 4.0))
    _dress(ax, style, title, grid="y")
    looks = method_styles(groups, style)
    for name in sorted(groups, key=list(looks).index):
        _error_bars(ax, groups[name], looks[name] | {"marker": None}, str(name), bands=True)
    ax.set_xlabel(x.replace("_", " "))
    _fraction_axis(ax, y, groups)
    rows = [name for name in sorted(groups, key=list(looks).index) if len(events.get(name, ()))]
    for row, name in enumerate(rows):  # one above the other, as methods prune at the same epochs; outside of the curves
        low, high = 1.012 + 0.03 * row, 1.034 + 0.03 * row
        look = {"color": looks[name]["color"], "linewidth": 2, "transform": ax.get_xaxis_transform()}
        ax.vlines(events[name], low, high, clip_on=False, **look)
    if rows:
        ax.plot([], [], linestyle="none", marker="|", color=style.muted, markeredgewidth=2, label="pruned (top)")
        ax.set_title(ax.get_title("left"), pad=10 + 8 * len(rows))
    ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=pd.api.types.is_integer_dtype(frame[x])))
    _legend(ax, groups, interval, frame, loc="best")
    return ax


def _prunings(groups) -> dict:
    """{name: the places at which the mean sparsity has grown}"""
    return {
        name: group["x"][group["mean"].diff().fillna(group["mean"]) > 1e-9].tolist() for name, group in groups.items()
    }


def pareto_front(cost: Sequence[float], gain: Sequence[float]) -> list[int]:
    """The indices, by growing cost, of the points that no other one beats in both cost and gain."""
    cost, gain = np.asarray(cost, float), np.asarray(gain, float)
    front, best = [], -math.inf
    for index in np.lexsort((-gain, cost)):
        if gain[index] > best:
            front.append(int(index))
            best = gain[index]
    return front


@_picture
def accuracy_vs_flops(frame: pd.DataFrame, x="flops", y="accuracy", by="method", at="sparsity", *, interval="t",
                      title=None, ax=None, style=None, save=None):  # fmt: skip
    """Accuracy over computation, a point for each `by` and value of `at` with its interval over seeds, and the front.

    The Pareto front is that of the means. Raises ValueError as `accuracy_vs_sparsity` does.
    """
    groups = _groups(frame, x, y, by, interval, at)
    ax = ax or style.axes((6.4, 4.2))
    _dress(ax, style, title, grid="both")
    points = pd.concat(groups.values(), ignore_index=True)
    front = points.iloc[pareto_front(points["x"], points["mean"])]
    end = points["x"].max()
    ax.plot([*front["x"], end], [*front["mean"], front["mean"].iloc[-1]], drawstyle="steps-post", color=style.muted,
            linewidth=5, alpha=0.35, solid_capstyle="round", zorder=1, label="Pareto front of the means")  # fmt: skip
    looks = method_styles(groups, style)
    for name in sorted(groups, key=list(looks).index):
        _error_bars(ax, groups[name], looks[name] | {"linewidth": 1}, str(name))
    if points["x"].min() > 0 and end / points["x"].min() > 8:
        ax.set_xscale("log")
    else:
        ax.xaxis.set_major_formatter(ticker.EngFormatter(sep=" "))
    ax.set_xlabel("FLOPs" if x == "flops" else x.replace("_", " "))
    _fraction_axis(ax, y, groups)
    _legend(ax, groups, interval, frame, loc="best")
    return ax


# --- Scores ----------------------------------------------------------------------------------------------------------


@_picture
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
    _dress(ax, style, title, grid="y")
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
            ax.stairs(*bars, fill=True, color=_METHOD_COLORS[0] if style.name == "light" else _METHOD_COLORS[5])
    ax.set_yscale("log")
    if zeros:
        ax.bar(0, zeros, width=near, color=style.alarm, zorder=3)
        note = f"{zeros:,} of {values.size:,} ({_percent(zeros / values.size)}) are exactly zero"
        place = {"ha": "center"} if (values < 0).any() else {"ha": "left"}
        spot = (0 if (values < 0).any() else -near / 2, zeros)
        ax.annotate(note, spot, (0, 4), textcoords="offset points", va="bottom", color=style.alarm, **place)
    if threshold is not None:
        below = int((values < threshold).sum())
        ax.axvline(threshold, color=style.text, linewidth=1.2, linestyle="--", zorder=4)
        note = f"threshold {threshold:.3g}: {below:,} ({_percent(below / values.size)}) below"
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
