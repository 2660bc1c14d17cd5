"""The picture of the sparsity explorer: the weights that stay and their share, side by side, drawn at every move.

Most of the time of a picture goes into names and axes, which stay while a slider moves. They are drawn once, and `png`
puts what moves on top.
"""

import io
from collections.abc import Iterable
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import ScaledTranslation
from PIL import Image

from . import flat
from .layers import draw_bars, layer_bars
from .look import Style, dress, find_style
from .ticks import percent
from .waterfall import waterfall
from .weights import LayerHistogram, kind_for

DPI = 120
_WIDTH = 12.0  # inches
_LEFT = (0, 0, 0.56, 1)  # the place of a waterfall
_EDGE = 0.012  # of the width, left free at the sides and between
_LONGEST = 34  # letters of a layer's name


def draw_panel(
    figure: Figure, layers: list[LayerHistogram], table: pd.DataFrame, tied: Iterable[str], note: str, style: str
) -> Figure:
    """Draw anew what an explorer shows.

    Args:
        figure: The figure to draw into; what it shows is replaced, and its size set.
        layers: The histograms.
        table: The `layer_table` of the same layers.
        tied: Names of layers with scores that tie at the cut: they are dotted.
        note: What the dots mean; written below.
        style: "light" or "dark".

    Returns:
        The figure.
    """
    look, kind = find_style(style), kind_for(len(layers))
    names, tied = shortened([layer.layer for layer in layers]), set(tied)
    lit = [row for row, name in enumerate(table["layer"]) if name in tied]
    layers = [replace(layer, layer=name) for layer, name in zip(layers, names)]
    table = table.assign(layer=names)
    with mpl.rc_context(look.rc()):
        _draw(figure, layers, table, kind, look)
        right = figure.axes[1]
        right.set_xlim(0, 1.12)  # the same for all choices: bars are to move, not the axis
        if lit:
            right.barh(lit, 1, height=0.72, color="none", edgecolor=look.tie, hatch="...", linewidth=1.2)
            down = ScaledTranslation(0, -0.66, figure.dpi_scale_trans)
            right.text(1, 0, note, color=look.tie, fontsize=8.5, ha="right", transform=right.transAxes + down)
    return figure


def _draw(figure, layers, table, kind, look: Style) -> None:
    ghost, limit = layers[0].before is not None, max(layer.limit for layer in layers)
    share = table["kept"].sum() / table["total"].sum()
    title = f"Weights by layer, {percent(share)} kept"
    shape = repr((kind, look.name, list(table["layer"])))
    # What stays of a flat picture changes with the names that light up, and with the axis below.
    frame = repr((shape, flat.empty_rows(layers), ghost, limit)) if kind != "3d" else ""
    if not figure.get_label().startswith(shape):
        figure.clear()
        _lay_out(figure, kind, table["layer"])
    left, right = figure.axes
    for ax in figure.axes:
        for artist in (*ax.collections, *ax.texts, *ax.patches, *ax.lines, *ax.images):
            artist.remove()
    if kind == "3d":
        left.set_position(_LEFT)  # drawing has changed it
        waterfall(left, layers, look, title)
        layer_bars(table, ax=right, style=look)
    else:
        if figure.get_label() != shape + frame:
            flat.frame(left, layers, look, title, kind)
            dress(right, look, grid="x")
            right.set(yticks=[], xlabel="weights kept")
        flat.content(left, layers, look, kind)
        left.set_title(title, y=1)
        # The rows are those at the left, and so are their names and shares.
        draw_bars(right, (table["kept"] / table["total"]).to_numpy(), look, hatched=len(layers) <= 60)
        right.set(ylim=left.get_ylim())
    figure.set_label(shape + frame)


def _lay_out(figure, kind, names) -> None:
    """Give a figure its size and its two Axes."""
    figure.patch.set_in_layout(True)
    row = {"3d": 0.0, "ridge": 0.33, "heatmap": min(0.155, 9.3 / len(names))}[kind]
    height = max(5.0, 1.7 + row * len(names))
    figure.set_size_inches(_WIDTH, height)
    low, high = 0.85 / height, 1 - 0.5 / height
    longest = Text(0, 0, max(names, key=len), fontsize=8.5, figure=figure)
    room = longest.get_window_extent().width / figure.bbox.width + 2 * _EDGE
    if kind == "3d":
        start = 0.56 + room
        figure.add_axes(_LEFT, projection="3d")
    else:
        start = 0.64
        figure.add_axes((room, low, start - 0.06 - room, high - low))
    figure.add_axes((start, low, 1 - start - _EDGE, high - low))


def shortened(names: list[str], longest: int = _LONGEST) -> list[str]:
    """Leave out a part of names that are too long, the same for all, such that they can still be told apart."""
    for head in (longest // 3, longest // 2, 2 * longest // 3, longest - 4, 4):
        tail = longest - head - 1
        short = [name if len(name) <= longest else f"{name[:head]}…{name[-tail:]}" for name in names]
        if len(set(short)) == len(set(names)):
            return short
    return names


def png(figure: Figure, background: object = None) -> bytes:
    """Draw a figure into a PNG; if its label is that of the last time, only what lies in its Axes is drawn anew.

    Args:
        figure: A figure without pyplot, whose label changes with whatever does not lie in its Axes.
        background: Something else that has to be the same for the rest to stay.

    Returns:
        The file.
    """
    canvas = figure.canvas
    if not isinstance(canvas, FigureCanvasAgg) or figure.dpi != DPI:
        figure.set_dpi(DPI)
        canvas = FigureCanvasAgg(figure)
    if any(ax.name == "3d" for ax in figure.axes):
        canvas.draw()
    else:
        _draw_moving(figure, canvas, (figure.get_label(), background))
    file = io.BytesIO()
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _draw_moving(figure, canvas, key) -> None:
    known, kept = getattr(canvas, "_background", (None, None))
    moving = []
    for ax in figure.axes:
        parts = (*ax.collections, *ax.texts, *ax.patches, *ax.lines, *ax.images, ax._left_title)
        moving += sorted((part for part in parts if part.get_gid() != "stays"), key=lambda part: part.get_zorder())
    if known == key:
        canvas.restore_region(kept)
    else:
        for part in moving:
            part.set_animated(True)
        canvas.draw()
        for part in moving:
            part.set_animated(False)
        canvas._background = key, canvas.copy_from_bbox(figure.bbox)
    for part in moving:
        part.axes.draw_artist(part)
