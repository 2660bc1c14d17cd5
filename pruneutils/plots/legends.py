"""Legends outside of the data: beside an Axes, or below it."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.legend import Legend
from matplotlib.transforms import ScaledTranslation

from .look import Style

_BELOW = 36  # points from an Axes to the legend below: ticks and the label of the axis lie between
_BESIDE = 10


def legend_outside(ax: Axes, style: Style, handles: Sequence, labels: Sequence[str], note: str = "") -> Legend | None:
    """Put a legend with a note as its head to the right of the Axes; below it where that would take too much width.

    In a figure with a layout engine the engine makes room; elsewhere the Axes gives some of its own.
    """
    if not handles and not note:
        return None
    options = {"title": note or None, "alignment": "left", "borderaxespad": 0, "borderpad": 0, "handlelength": 2.6}
    legend = ax.legend(handles, labels, loc="upper left", bbox_to_anchor=(0, 0), **options)
    extent, room = legend.get_window_extent(), ax.get_window_extent()
    if not handles or extent.width > 0.4 * room.width:
        if handles:
            widest = max(text.get_window_extent().width for text in legend.get_texts())
            columns = max(1, math.floor(room.width / (widest + 5 * 8.5 * ax.figure.dpi / 72)))
            options["ncols"] = min(columns, len(labels))
        options["title"] = note.replace("\n", " ") or None
        x, y, corner = 0, -_BELOW, (0, 0)
    else:
        x, y, corner = _BESIDE, 0, (1, 1)
    aside = ax.transAxes + ScaledTranslation(x / 72, y / 72, ax.figure.dpi_scale_trans)
    legend = ax.legend(handles, labels, loc="upper left", bbox_to_anchor=corner, bbox_transform=aside, **options)
    legend.get_title().set_color(style.muted)
    legend.set_zorder(5)
    if ax.figure.get_layout_engine() is None:
        _make_room(ax, legend, right=corner == (1, 1))
    return legend


def _make_room(ax, legend, right):
    """Shrink an Axes by what its legend takes."""
    place, extent, figure = ax.get_position(), legend.get_window_extent(), ax.figure.bbox
    if right:
        place.x1 -= (extent.width + _BESIDE * ax.figure.dpi / 72) / figure.width
    else:
        place.y0 += (extent.height + (_BELOW + 8) * ax.figure.dpi / 72) / figure.height
    if place.width > 0.1 and place.height > 0.1:
        ax.set_position(place)
