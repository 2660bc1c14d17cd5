"""Histograms one behind the other in 3D, and the room that they and their names have on the page."""

import textwrap

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from mpl_toolkits.mplot3d import proj3d
from mpl_toolkits.mplot3d.art3d import Line3DCollection, Poly3DCollection, Text3D

from .look import Style
from .ticks import percent

_ASPECT, _ZOOM = (2.2, 1.25, 0.72), 1.3
_PAD = 0.015  # of the smaller side of the picture, left free at its borders


class Label(Text3D):
    """A text at a place in 3D that counts when the whole picture is measured, which matplotlib's does not."""

    def get_window_extent(self, renderer=None, dpi=None):
        """Return the box of the text as it is drawn, in pixels."""
        place, flat = (self._x, self._y), proj3d.proj_transform(self._x, self._y, self._z, self.axes.get_proj())
        try:
            self._x, self._y = flat[:2]
            return Text.get_window_extent(self, renderer, dpi)
        finally:
            self._x, self._y = place

    def get_tightbbox(self, renderer=None):
        """Return the same box: matplotlib's own would be None."""
        return self.get_window_extent(renderer)


def outlines(edges: np.ndarray, heights: np.ndarray):
    """Yield the outlines of a step histogram as (x, height) rows, one for each run of bins that are not empty."""
    filled = np.flatnonzero(heights)
    for run in np.split(filled, np.flatnonzero(np.diff(filled) > 1) + 1) if filled.size else ():
        x = np.repeat(edges[run[0] : run[-1] + 2], 2)
        yield np.column_stack([x, np.concatenate([[0], np.repeat(heights[run], 2), [0]])])


def waterfall(ax: Axes, layers: list, style: Style, title: str) -> Axes:
    """Draw the histograms into a 3D Axes, the first layer at the back."""
    n, limit = len(layers), max(layer.limit for layer in layers)
    ax.figure.set_facecolor(style.canvas)
    ax.set_facecolor(style.canvas)
    ax.set_axis_off()
    ax.computed_zorder = False  # matplotlib sorts by mean depth and gets overlapping ridges wrong

    def add(kind, parts, **look):
        collection = kind(parts, **look)
        collection.set_clip_on(False)  # the Axes is a square that would cut the ridges at its sides
        ax.add_collection(collection, autolim=False)  # add_collection3d spends most of its time on limits, set below

    def upright(edges, heights, y):
        return [np.insert(outline, 1, y, axis=1) for outline in outlines(edges, heights)]

    front, back = -0.45, n - 1 + 0.45
    ticks = ticker.MaxNLocator(8, steps=(1, 2, 5, 10)).tick_values(-limit, limit)
    ticks = [tick for tick in ticks if abs(tick) <= limit * 1.001]
    floor = [[(t, front, 0), (t, back, 0)] for t in ticks]
    wall = [[(t, back, 0), (t, back, 1)] for t in ticks] + [[(-limit, back, z), (limit, back, z)] for z in (0.5, 1)]
    add(Line3DCollection, floor + wall, colors=style.grid, linewidths=0.6, zorder=0)
    names = []
    for i, (layer, color) in enumerate(zip(layers, style.ordered(n))):
        y, order, (r, g, b, _) = n - 1 - i, 10 * (i + 1), color
        base = style.grid if layer.kept else style.alarm
        add(Line3DCollection, [[(-limit, y, 0), (limit, y, 0)]], colors=base, linewidths=1, zorder=order)
        edges = np.clip(layer.edges.astype(float), -layer.limit, layer.limit)
        heights, ghost = layer.heights()
        if ghost is not None:
            look = {"facecolors": (r, g, b, 0.20), "edgecolors": color, "linewidths": 0.6, "zorder": order + 1}
            add(Poly3DCollection, upright(edges, ghost, y), **look)
        if layer.kept:
            look = {"facecolors": (r, g, b, 0.94), "edgecolors": style.canvas, "linewidths": 0.6, "zorder": order + 2}
            add(Poly3DCollection, upright(edges, heights, y), **look)
        text = f"{_broken(layer.layer)}  {percent(layer.kept / layer.total)}"
        names.append(_label(ax, limit * 1.04, y, text, style.text if layer.kept else style.alarm, 9, va="center"))
    look = {"color": style.muted, "size": 8.5, "ha": "center", "va": "top"}
    values = [_label(ax, tick, front - 0.04 * n, f"{tick:.3g}".replace("-", "−"), **look) for tick in ticks]
    ax.set(xlim=(-limit, limit), ylim=(front, back), zlim=(0, 1))
    ax.view_init(24, -68)
    place = _place(ax)
    note = "weights kept, share kept at the right" + ("" if layers[0].before is None else "; pale: before pruning")
    foot = "height: weights per bin, relative to the layer's fullest bin; floor: weight value"
    top = _written(ax, place, place.y1, [(title, 13, style.text, "bold"), (note, 9.5, style.muted, "normal")])
    said = ax.texts[-1]
    bottom = _written(ax, place, None, [(foot, 8.5, style.muted, "normal")])
    _fit(ax, Bbox([[place.x0, bottom], [place.x1, top]]), names + values)
    named = _name_where_free(layers, names)
    if named < n:
        said.set_text(f"{said.get_text()}; {named} of {n} layers are named")
    _thin(values)
    return ax


def _label(ax, x, y, text, color, size, **options):
    label = ax.add_artist(Label(x, y, 0, text, zdir=None, color=color, fontsize=size, **options))
    label.set_clip_on(False)
    return label


def _broken(name, longest=26) -> str:
    """A long name in two lines, broken at a point near its middle; nothing of it is left out."""
    points = [i + 1 for i, letter in enumerate(name) if letter == "."]
    if len(name) <= longest or not points:
        return name
    at = min(points, key=lambda point: abs(point - len(name) / 2))
    return f"{name[:at]}\n{name[at:]}"


def _place(ax) -> Bbox:
    """The place on the page that the Axes was given, in pixels, less a small margin."""
    spec = ax.get_subplotspec()
    given = spec.get_position(ax.figure) if spec else ax.get_position(original=True)
    box = given.transformed(ax.figure.transSubfigure)
    pad = _PAD * min(box.width, box.height)
    return Bbox([[box.x0 + pad, box.y0 + pad], [box.x1 - pad, box.y1 - pad]])


def _written(ax, place, top, lines) -> float:
    """Write lines below `top`, or at the bottom of the place; return where the free room begins, in pixels."""
    to_figure, gap = ax.figure.transSubfigure.inverted(), 4 * ax.figure.dpi / 72
    y = place.y0 if top is None else top
    for text, size, color, weight in lines:
        if not text:
            continue
        look = {"fontsize": size, "color": color, "weight": weight, "va": "bottom" if top is None else "top"}
        artist = ax.text2D(*to_figure.transform((place.x0, y)), text, transform=ax.figure.transSubfigure, **look)
        for width in range(len(text), 8, -2):
            if artist.get_window_extent().width <= place.width:
                break
            artist.set_text(textwrap.fill(text, width))
        height = artist.get_window_extent().height + gap
        y += height if top is None else -height
    return y


def _fit(ax, room: Bbox, labels) -> None:
    """Make the box of the histograms and its labels as large as the room allows, without moving the view."""
    ax.set_proj_type("persp", focal_length=1)
    ax.set_box_aspect(_ASPECT, zoom=_ZOOM)
    ax.apply_aspect()
    limits = [ax.get_xlim(), ax.get_ylim(), ax.get_zlim()]
    corners = np.array(np.meshgrid(*limits)).reshape(3, -1)
    places = np.column_stack([corners, np.array([label.get_position_3d() for label in labels]).T])
    x, y, _ = proj3d.proj_transform(*places, ax.get_proj())
    points = ax.transData.transform(np.column_stack([x, y]))
    boxes = np.array([label.get_window_extent().extents for label in labels])
    # Texts keep their size however large the box is drawn: how far they reach from their places, in pixels.
    reach = np.zeros((len(points), 4))
    reach[8:] = boxes - np.tile(points[8:], 2)
    side = ax.bbox.width
    points = (points - [(ax.bbox.x0 + ax.bbox.x1) / 2, (ax.bbox.y0 + ax.bbox.y1) / 2]) / side

    def extents(scale):
        return np.concatenate([(scale * points + reach[:, :2]).min(0), (scale * points + reach[:, 2:]).max(0)])

    small, large = 0.0, 20 * max(room.width, room.height)
    for _ in range(40):
        scale = (small + large) / 2
        x0, y0, x1, y1 = extents(scale)
        small, large = (scale, large) if x1 - x0 <= room.width and y1 - y0 <= room.height else (small, scale)
    x0, y0, x1, y1 = extents(small)
    center = np.array([(room.x0 + room.x1 - x0 - x1) / 2, (room.y0 + room.y1 - y0 - y1) / 2])
    # The Axes itself, a square, stays within the room, as it counts for the tight bounding box; the view is enlarged
    # instead, by zoom and focal length together, which keeps the perspective.
    half = max(min(*(center - room.min), *(room.max - center)), 1.0)
    square = Bbox([center - half, center + half]).transformed(ax.figure.transSubfigure.inverted())
    ax.set_position(square)
    factor = max(small / (2 * half), 1e-3)
    ax.set_proj_type("persp", focal_length=factor)
    ax.set_box_aspect(_ASPECT, zoom=_ZOOM * factor)


def _name_where_free(layers, names) -> int:
    """Hide names that would lie on others, and count the rest: layers that have collapsed are named first."""
    shown = []
    for _, name in sorted(zip(layers, names), key=lambda pair: pair[0].kept > 0):
        box = name.get_window_extent().padded(-0.5)
        name.set_visible(not any(box.overlaps(other) for other in shown))
        if name.get_visible():
            shown.append(box)
    return len(shown)


def _thin(values) -> None:
    """Leave out every second number on the floor until they stand apart; zero stays."""
    step = 1
    while step < len(values):
        kept = values[(len(values) // 2) % step :: step]
        boxes = [value.get_window_extent() for value in kept]
        if not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:])):
            break
        step *= 2
    for i, value in enumerate(values):
        value.set_visible(i % step == (len(values) // 2) % step)
