"""The pictures of the weights of every layer: a waterfall in 3D, or flat rows."""

import math
import textwrap
from collections.abc import Mapping

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox
from mpl_toolkits.mplot3d import proj3d
from mpl_toolkits.mplot3d.art3d import Line3DCollection, Poly3DCollection
from torch import nn

from .._checks import one_of
from ..model_utils import prunable_weights
from .axes import percent
from .layers import height_for, name_rows
from .look import WIDTH, Style, dress, picture
from .weights import LayerHistogram, weight_histograms

MOST_IN_3D = 7  # layers that stay legible one behind the other
_ASPECT = (2.9, 1.4, 0.75)
_SIZE = 9  # points of the names in 3D


@picture
def layer_histograms(
    model: nn.Module | list[LayerHistogram],
    before: nn.Module | Mapping | None = None,
    *,
    kind: str = "auto",
    bins: int | None = None,
    title,
    ax,
    style,
) -> Axes:
    """Draw the weights kept in each layer, on those before pruning if `before` is given, at one scale within a layer.

    Args:
        model: The network, or the histograms that `weight_histograms` has counted.
        before, bins: The weights before pruning, and the number of bins, as for `weight_histograms`.
        kind: "3d", one behind the other, "flat", one above the other, or "auto": what fits `ax`, or up to seven in 3d.

    Example:
        >>> pu.plots.layer_histograms(pu.models.create("lenet300")).name
        '3d'
    """
    one_of("kind", kind, ("auto", "3d", "flat"))
    counted = isinstance(model, list) and all(isinstance(layer, LayerHistogram) for layer in model)
    n = len(model) if counted else len(prunable_weights(model))
    if kind == "auto":
        kind = "3d" if (n <= MOST_IN_3D if ax is None else ax.name == "3d") else "flat"
    if ax is not None and (ax.name == "3d") != (kind == "3d"):
        raise ValueError(f'kind="{kind}" cannot be drawn into a {ax.name} Axes; the 3d one needs projection="3d"')
    layers = model if counted else weight_histograms(model, before, bins)
    share = sum(layer.kept for layer in layers) / sum(layer.total for layer in layers)
    title = f"Weights by layer, {percent(share)} kept" if title is None else title
    if kind == "3d":
        return waterfall(ax or style.axes((WIDTH, 5.0), "3d"), layers, style, title)
    return rows(ax or style.axes((WIDTH, height_for(n) + 0.3)), layers, style, title)


def rows(ax: Axes, layers: list, style: Style, title: str) -> Axes:
    """Draw the histograms one above the other, the first layer on top."""
    n, limit = len(layers), max(layer.limit for layer in layers)
    dress(ax, style, title, grid="x")
    ax.spines["left"].set_visible(False)
    ax.set(xlim=(-limit, limit), ylim=(n - 0.45, -0.55))
    for row, (layer, color) in enumerate(zip(layers, style.ordered(n))):
        edges, floor = np.clip(layer.edges, -layer.limit, layer.limit), row + 0.45
        heights, ghost = layer.heights()
        look = {"baseline": floor, "fill": True, "linewidth": 0, "color": color}
        if ghost is not None:
            ax.stairs(floor - 0.9 * ghost, edges, alpha=0.28 if style.name == "light" else 0.42, **look)
        ax.stairs(floor - 0.9 * heights, edges, **look)
        ax.axhline(floor, color=style.grid if layer.kept else style.alarm, linewidth=min(0.8, 30 / n), zorder=1.5)
    for row in name_rows(ax, [layer.layer for layer in layers], [r for r, x in enumerate(layers) if not x.kept], style):
        share = layers[row].kept / layers[row].total
        place = {"xy": (1, row), "xycoords": ax.get_yaxis_transform(), "xytext": (6, 0), "textcoords": "offset points"}
        ax.annotate(percent(share), color=style.text if share else style.alarm, fontsize=8.5, va="center", **place)
    ax.set_xlabel(f"weight value ({_note(layers)})\nheight: weights per bin, relative to the layer's fullest bin")
    return ax


def waterfall(ax: Axes, layers: list, style: Style, title: str) -> Axes:
    """Draw the histograms into a 3D Axes, the first layer at the back; all on the scale of the page, without depth."""
    n, limit = len(layers), max(layer.limit for layer in layers)
    ax.figure.set_facecolor(style.canvas)
    ax.set_facecolor(style.canvas)
    ax.set_axis_off()
    ax.set_in_layout(False)  # it is a square that reaches out of the figure
    ax.computed_zorder = False  # matplotlib sorts by mean depth and gets overlapping histograms wrong

    def add(kind, parts, **look):
        collection = kind(parts, **look)
        collection.set_clip_on(False)
        ax.add_collection(collection, autolim=False)

    front, back = -0.45, n - 0.55
    ticks = [t for t in ticker.MaxNLocator(5, steps=(1, 2, 5, 10)).tick_values(-limit, limit) if abs(t) <= limit]
    lines = [[(t, front, 0), (t, back, 0), (t, back, 1)] for t in ticks]
    lines += [[(-limit, back, z), (limit, back, z)] for z in (0, 0.5, 1)]
    add(Line3DCollection, lines, colors=style.grid, linewidths=0.6, zorder=0)
    ax.set(xlim=(-limit, limit), ylim=(front, back), zlim=(0, 1))
    names = [_in_two_lines(f"{layer.layer}  {percent(layer.kept / layer.total)}") for layer in layers]
    longest = max(len(line) for name in names for line in name.split("\n"))
    place = ax.get_position(original=True)
    broken = any("\n" in name for name in names)
    ax.view_init(40 if broken else 24, -68)  # from higher up, names in two lines have room one above the other
    title = textwrap.fill(title, int(9 * place.width * ax.figure.get_figwidth()))
    head = 28 + 16 * (title.count("\n") + 1)  # points
    depth = _fit(ax, place, left=30, right=0.62 * _SIZE * longest + 14, top=head, bottom=50)
    step = math.ceil((n * _SIZE * (2.5 if broken else 1.25)) / depth)
    for i, (layer, color, name) in enumerate(zip(layers, style.ordered(n), names)):
        y, order = n - 1 - i, 10 * (i + 1)
        base, ink = (style.grid, style.text) if layer.kept else (style.alarm, style.alarm)
        add(Line3DCollection, [[(-limit, y, 0), (limit, y, 0)]], colors=base, linewidths=1, zorder=order)
        edges = np.clip(layer.edges, -layer.limit, layer.limit)
        for heights, alpha, edge in zip(layer.heights()[::-1], (0.2, 0.94), (color, style.canvas)):
            look = {"facecolors": [(*color, alpha)], "edgecolors": [edge], "linewidths": 0.6}
            if heights is not None and heights.any():
                add(Poly3DCollection, _outlines(edges, y, heights), zorder=order + 1 + alpha, **look)
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


def _outlines(edges, y, heights) -> np.ndarray:
    """The outlines of a step histogram, (runs, points, 3): one for each run of bins that are not empty."""
    filled = np.flatnonzero(heights)
    lines = []
    for run in np.split(filled, np.flatnonzero(np.diff(filled) > 1) + 1):
        x, z = np.repeat(edges[run[0] : run[-1] + 2], 2), np.concatenate([[0], np.repeat(heights[run], 2), [0]])
        last = (0, 2 * (len(filled) - len(run)))  # all alike, as matplotlib fills up with whatever is in memory
        lines.append(np.pad(np.column_stack([x, np.full(len(x), y), z]), (last, (0, 0)), mode="edge"))
    return np.stack(lines)


def _in_two_lines(name, longest=26) -> str:
    """A long name in two lines, broken at a point near its middle; nothing of it is left out."""
    points = [i + 1 for i, letter in enumerate(name) if letter == "."]
    if len(name) <= longest or not points:
        return name
    at = min(points, key=lambda point: abs(point - len(name) / 2))
    return f"{name[:at]}\n{name[at:]}"


def _note(layers) -> str:
    return "share kept at the right" + ("" if layers[0].before is None else "; pale: before pruning")
