"""The picture of the sparsity explorer: the weights that stay and their share, side by side, drawn at every move."""

from collections.abc import Iterable

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import ScaledTranslation

from .layers import draw_bars, layer_bars
from .look import dress, find_style
from .weights import LayerHistogram, kind_for, layer_histograms

_WIDTH = 12.0  # inches
_LEFT = (0, 0, 0.56, 1)  # the place of a waterfall
_EDGE = 0.012  # of the width, left free at the sides and between


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
    look, n, kind = find_style(style), len(layers), kind_for(len(layers))
    shape = repr((kind, style, list(table["layer"])))
    if figure.get_label() != shape:
        figure.clear()
        _lay_out(figure, kind, table["layer"])
        figure.set_label(shape)
    left, right = figure.axes
    for ax in figure.axes:
        for artist in (*ax.collections, *ax.texts, *ax.patches, *ax.lines, *ax.images):
            artist.remove()
    if kind == "3d":
        left.set_position(_LEFT)  # drawing has changed it
    layer_histograms(layers, kind=kind, ax=left, style=style)
    if kind == "3d":
        layer_bars(table, ax=right, style=style)
    else:  # the rows are those at the left, and so are their names and shares
        dress(right, look, grid="x")
        draw_bars(right, (table["kept"] / table["total"]).to_numpy(), look, hatched=n <= 60)
        right.set(ylim=left.get_ylim(), yticks=[], xlabel="weights kept")
    right.set_xlim(0, 1.12)  # the same for all choices: bars are to move, not the axis
    tied = set(tied)
    if tied:
        rows = [row for row, layer in enumerate(table["layer"]) if layer in tied]
        right.barh(rows, 1, height=0.72, color="none", edgecolor=look.tie, hatch="...", linewidth=1.2)
        down = ScaledTranslation(0, -0.66, figure.dpi_scale_trans)
        right.text(1, 0, note, color=look.tie, fontsize=8.5, ha="right", transform=right.transAxes + down)
    return figure


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
