"""Pictures of the layers: their densities as bars, and their weights as a waterfall in 3D or as flat rows."""

import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.transforms import Bbox
from mpl_toolkits.mplot3d import proj3d
from mpl_toolkits.mplot3d.art3d import Line3DCollection, Poly3DCollection
from torch import nn

from .._checks import one_of
from ..model_utils import prunable_weights
from .look import WIDTH, Style, dress, percent, picture, short
from .runs import need
from .weights import weight_histograms

MOST_IN_3D = 7  # layers that stay legible one behind the other
_ASPECT = (2.9, 1.4, 0.75)
_SIZE = 9  # points of the names in 3D


@picture
def layer_bars(table: pd.DataFrame, *, title, ax, style) -> Axes:
    """Draw the density of each layer as a bar; layers without a weight light up.

    Args:
        table: A `layer_table`: columns layer, total, kept.

    Example:
        >>> pu.plots.layer_bars(pu.layer_table(pu.models.create("lenet300"))).get_title(loc="left")
        'Density by layer, 100 % kept'
    """
    need(table, "layer", "total", "kept")
    density, n = (table["kept"] / table["total"]).to_numpy(), len(table)
    share = table["kept"].sum() / table["total"].sum()
    ax = ax or style.axes((WIDTH, _height_for(n)))
    dress(ax, style, f"Density by layer, {percent(share)} kept" if title is None else title, grid="x")
    ax.barh(range(n), density, height=0.72, color=style.ordered(n))
    empty = np.flatnonzero(density == 0)
    ax.barh(empty, np.ones(len(empty)), height=0.72, color="none", edgecolor=style.alarm, hatch="////")
    for row in _name_rows(ax, list(table["layer"]), empty, style):
        text, ink = (percent(density[row]), style.text) if density[row] else ("0 %: collapsed", style.alarm)
        box = {"facecolor": style.canvas, "edgecolor": "none", "pad": 0.8}  # on hatching and grid
        place = {"xy": (density[row], row), "xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        ax.annotate(text, color=ink, fontsize=8.5, bbox=box, **place)
    ax.axvline(share, color=style.muted, linewidth=0.9, linestyle=":", zorder=0.9)
    ax.set(ylim=(n - 0.4, -0.6), xlabel="weights kept (dotted: in all layers)")
    ax.set_xlim(0, max(1.2 * density.max(), 1.0 if len(empty) else 0.01))
    ax.xaxis.set_major_formatter(short)
    return ax


@picture
def layer_histograms(
    model: nn.Module, before: nn.Module | Mapping | None = None, *, kind: str = "auto", title, ax, style
) -> Axes:
    """Draw the weights kept in each layer, on those before pruning if `before` is given, at one scale within a layer.

    Args:
        model, before: The network; and its weights before pruning, as for `weight_histograms`.
        kind: "3d", one behind the other, "flat", one above the other, or "auto": what fits `ax`, or up to seven in 3d.

    Example:
        >>> pu.plots.layer_histograms(pu.models.create("lenet300")).name
        '3d'
    """
    one_of("kind", kind, ("auto", "3d", "flat"))
    n = len(prunable_weights(model))
    if kind == "auto":
        kind = "3d" if (n <= MOST_IN_3D if ax is None else ax.name == "3d") else "flat"
    if ax is not None and (ax.name == "3d") != (kind == "3d"):
        raise ValueError(f'kind="{kind}" cannot be drawn into a {ax.name} Axes; the 3d one needs projection="3d"')
    layers = weight_histograms(model, before)
    kept, total = np.transpose([(layer.kept, layer.total) for layer in layers])
    title = f"Weights by layer, {percent(kept.sum() / total.sum())} kept" if title is None else title
    if kind == "3d":
        return waterfall(ax or style.axes((WIDTH, 5.0), "3d"), layers, style, title)
    ax, limit = ax or style.axes((WIDTH, _height_for(n) + 0.3)), max(layer.limit for layer in layers)
    dress(ax, style, title, grid="x")
    ax.spines["left"].set_visible(False)
    ax.set(xlim=(-limit, limit), ylim=(n - 0.45, -0.55))
    draw_rows(ax, layers, style)
    for row in _name_rows(ax, [layer.layer for layer in layers], np.flatnonzero(kept == 0), style):
        place = {"xy": (1, row), "xycoords": ax.get_yaxis_transform(), "xytext": (6, 0), "textcoords": "offset points"}
        ink = style.text if kept[row] else style.alarm
        ax.annotate(percent(kept[row] / total[row]), color=ink, fontsize=8.5, va="center", **place)
    ax.set_xlabel(f"weight value ({_note(layers)})\nheight: weights per bin, relative to the layer's fullest bin")
    return ax


def draw_rows(ax: Axes, layers: list, style: Style) -> None:
    """Draw histograms into rows 0 (at the top) to n - 1, as two collections: that is quick."""
    outlines, colors, floors, limit = [], [], [], max(layer.limit for layer in layers)
    for row, (layer, color) in enumerate(zip(layers, style.ordered(len(layers)))):
        edges = np.repeat(np.clip(layer.edges, -layer.limit, layer.limit), 2)
        for heights, alpha in zip(layer.heights()[::-1], (0.28 if style.name == "light" else 0.42, 1.0)):
            if heights is not None:
                outline = np.concatenate([[0], np.repeat(heights, 2), [0]])
                outlines.append(np.column_stack([edges, row + 0.45 - 0.9 * outline]))
                colors.append((*color, alpha))
        floors.append([(-limit, row + 0.45), (limit, row + 0.45)])
    inks = [style.grid if layer.kept else style.alarm for layer in layers]
    ax.add_collection(PolyCollection(outlines, facecolors=colors, linewidths=0, zorder=2), autolim=False)
    lines = LineCollection(floors, colors=inks, linewidths=min(0.8, 30 / len(layers)), zorder=1.5)
    ax.add_collection(lines, autolim=False)


def waterfall(ax: Axes, layers: list, style: Style, title: str) -> Axes:
    """Draw the histograms into a 3D Axes, the first layer at the back; all on the scale of the page, without depth."""
    n, limit = len(layers), max(layer.limit for layer in layers)
    ax.figure.set_facecolor(style.canvas)
    ax.set_facecolor(style.canvas)
    ax.set_axis_off()
    ax.set_in_layout(False)  # it is a square that reaches out of the figure
    ax.computed_zorder = False  # matplotlib sorts by mean depth and gets overlapping histograms wrong

    front, back, whole = -0.45, n - 0.55, {"clip_on": False}
    ticks = [t for t in ticker.MaxNLocator(5, steps=(1, 2, 5, 10)).tick_values(-limit, limit) if abs(t) <= limit]
    lines = [[(t, front, 0), (t, back, 0), (t, back, 1)] for t in ticks]
    lines += [[(-limit, back, z), (limit, back, z)] for z in (0, 0.5, 1)]
    ax.add_collection3d(Line3DCollection(lines, colors=style.grid, linewidths=0.6, zorder=0, **whole), autolim=False)
    ax.set(xlim=(-limit, limit), ylim=(front, back), zlim=(0, 1))
    names = [f"{layer.layer}  {percent(layer.kept / layer.total)}" for layer in layers]
    place = ax.get_position(original=True)
    ax.view_init(24, -68)
    title = textwrap.fill(title, int(9 * place.width * ax.figure.get_figwidth()))
    head = 28 + 16 * (title.count("\n") + 1)  # points
    depth = _fit(ax, place, left=30, right=0.62 * _SIZE * max(map(len, names)) + 14, top=head, bottom=50)
    step = math.ceil(n * _SIZE * 1.25 / depth)
    for i, (layer, color, name) in enumerate(zip(layers, style.ordered(n), names)):
        y, order = n - 1 - i, 10 * (i + 1)
        base, ink = (style.grid, style.text) if layer.kept else (style.alarm, style.alarm)
        line = {"colors": base, "linewidths": 1, "zorder": order + 2.5}
        ax.add_collection3d(Line3DCollection([[(-limit, y, 0), (limit, y, 0)]], **line, **whole), autolim=False)
        edges = np.clip(layer.edges, -layer.limit, layer.limit)
        for heights, alpha, edge in zip(layer.heights()[::-1], (0.2, 0.94), (color, style.canvas)):
            look = {"facecolors": [(*color, alpha)], "edgecolors": [edge], "zorder": order + 1 + alpha, **whole}
            if heights is not None and heights.any():
                outline = np.repeat(edges, 2), np.full(2 * len(edges), y), [0, *np.repeat(heights, 2), 0]
                ax.add_collection3d(Poly3DCollection([np.column_stack(outline)], linewidths=0.6, **look), autolim=False)
        if i % step == 0:
            ax.text(limit * 1.04, y, 0, name, color=ink, fontsize=_SIZE, va="center", zorder=10 * n + 20)
    look = {"color": style.muted, "fontsize": 8.5, "ha": "center", "va": "top"}
    for tick in ticks:
        ax.text(tick, front - 0.06 * n, 0, f"{tick:.3g}".replace("-", "−"), **look)
    note = _note(layers) + (f"; every {step} layers one is named" if step > 1 else "")
    foot = "floor: weight value; height: weights per bin, relative to the layer's fullest bin"
    left, top, small = place.x0 + 0.012, place.y1 - 0.012, {"fontsize": 8.8, "color": style.muted}
    ax.figure.text(left, top, title, fontsize=12, weight="bold", color=style.text, va="top")
    ax.figure.text(left, top - (head - 24) / 72 / ax.figure.get_figheight(), note, va="top", **small)
    ax.figure.text(left, place.y0 + 0.012, foot, va="bottom", **small)
    return ax


def _fit(ax, place, left, right, top, bottom) -> float:
    """Give the box of the histograms all of the Axes' place but margins, in points; return its depth on the page."""
    ax.set_proj_type("ortho")  # sizes at the back are those in front
    ax.set_box_aspect(_ASPECT, zoom=1)
    ax.apply_aspect()
    dot = ax.figure.dpi / 72
    room = place.transformed(ax.figure.transSubfigure)
    room = Bbox([[room.x0 + left * dot, room.y0 + bottom * dot], [room.x1 - right * dot, room.y1 - top * dot]])
    corners = np.array(np.meshgrid(ax.get_xlim(), ax.get_ylim(), ax.get_zlim(), indexing="ij")).reshape(3, -1)
    x, y, _ = proj3d.proj_transform(*corners, ax.get_proj())
    corners = ax.transData.transform(np.column_stack([x, y]))
    box = Bbox([corners.min(0), corners.max(0)])
    scale = max(min(room.width / box.width, room.height / box.height), 0.05)
    center = (ax.bbox.min + ax.bbox.max) / 2
    shift = (room.min + room.max) / 2 - center - scale * ((box.min + box.max) / 2 - center)
    square = Bbox([ax.bbox.min + shift, ax.bbox.max + shift])
    ax.set_position(square.transformed(ax.figure.transSubfigure.inverted()))
    ax.set_box_aspect(_ASPECT, zoom=scale)
    return scale * abs(corners[6, 1] - corners[4, 1]) / dot  # along y, at the right end of the floor


def _note(layers) -> str:
    return "share kept at the right" + ("" if layers[0].before is None else "; pale: before pruning")


def _height_for(rows: int) -> float:
    """Return the inches of a figure with so many named rows."""
    return 1.3 + min((0.3 if rows <= 24 else 0.155) * max(rows, 3), 9.3)


def _name_rows(ax: Axes, names: Sequence[str], empty: Sequence[int], style: Style) -> list[int]:
    """Name rows 0 (at the top) to n - 1 at the left, or every few where there is no room; the empty ones light up."""
    step = math.ceil(9.5 * len(names) * ax.figure.dpi / (72 * ax.get_window_extent().height))
    rows = list(range(0, len(names), step))
    ax.set_yticks(rows, [str(names[row]) for row in rows])
    ax.tick_params(axis="y", length=0, labelsize=8.5)
    for row, label in zip(rows, ax.get_yticklabels()):
        label.set_color(style.alarm if row in empty else style.text)
    if step > 1:
        ax.set_ylabel(f"{len(rows)} of {len(names)} layers are named", color=style.muted)
    return rows
