"""Legends outside of the data: beside an Axes, or below it."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.legend import Legend
from matplotlib.transforms import ScaledTranslation

from .look import Style

_BESIDE = 10  # points from an Axes to its legend


def legend_outside(
    ax: Axes, style: Style, handles: Sequence, labels: Sequence[str], note: str = "", grow: bool = False
) -> Legend | None:
    """Put a legend with a note as its head to the right of the Axes; below it where that would take too much width.

    In a figure with a layout engine the engine makes room; elsewhere the Axes gives some of its own. With `grow` the
    figure becomes higher by what lies below.
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
        x, y, corner = 0, -_below(ax), (0, 0)
    else:
        x, y, corner = _BESIDE, 0, (1, 1)
    aside = ax.transAxes + ScaledTranslation(x / 72, y / 72, ax.figure.dpi_scale_trans)
    legend = ax.legend(handles, labels, loc="upper left", bbox_to_anchor=corner, bbox_transform=aside, **options)
    legend.get_title().set_color(style.muted)
    legend.set_zorder(5)
    extent, dots = legend.get_window_extent(), ax.figure.dpi / 72
    if corner == (1, 1):
        shrink(ax, right=extent.width / dots + _BESIDE)
    else:
        shrink(ax, bottom=extent.height / dots + 8)
        if grow:
            width, height = ax.figure.get_size_inches()
            ax.figure.set_size_inches(width, height + (extent.height / dots + max(0, -y - 45)) / 72)
    return legend


def _below(ax) -> float:
    """How far below an Axes its ticks and the label of its axis end, in points, and a little more."""
    taken = ax.xaxis.get_tightbbox()
    return 8 + max(0, ax.bbox.y0 - taken.y0 if taken else 0) * 72 / ax.figure.dpi


def shrink(ax: Axes, right: float = 0, top: float = 0, bottom: float = 0) -> None:
    """Take so many points from an Axes, if its figure has no layout engine that makes room by itself."""
    if ax.figure.get_layout_engine() is not None:
        return
    place, width, height = ax.get_position(), *(72 * ax.figure.get_size_inches())
    place.x1 -= right / width
    place.y1 -= top / height
    place.y0 += bottom / height
    if place.width > 0.1 and place.height > 0.1:
        ax.set_position(place)
