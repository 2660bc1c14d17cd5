"""The density of each layer as a bar, and how rows of layers are named."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from .axes import percent, short
from .curves import need
from .look import WIDTH, Style, dress, picture


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
    ax = ax or style.axes((WIDTH, height_for(n)))
    dress(ax, style, f"Density by layer, {percent(share)} kept" if title is None else title, grid="x")
    ax.barh(range(n), density, height=0.72, color=style.ordered(n))
    empty = np.flatnonzero(density == 0)
    ax.barh(empty, np.ones(len(empty)), height=0.72, color="none", edgecolor=style.alarm, hatch="////")
    for row in name_rows(ax, list(table["layer"]), empty, style):
        text, ink = (percent(density[row]), style.text) if density[row] else ("0 %: collapsed", style.alarm)
        box = {"facecolor": style.canvas, "edgecolor": "none", "pad": 0.8}  # on hatching and grid
        place = {"xy": (density[row], row), "xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        ax.annotate(text, color=ink, fontsize=8.5, bbox=box, **place)
    ax.axvline(share, color=style.muted, linewidth=0.9, linestyle=":", zorder=0.9)
    ax.set(ylim=(n - 0.4, -0.6), xlabel="weights kept (dotted: in all layers)")
    ax.set_xlim(0, max(1.2 * density.max(), 1.0 if len(empty) else 0.01))
    ax.xaxis.set_major_formatter(short)
    return ax


def height_for(rows: int) -> float:
    """Return the inches of a figure with so many named rows."""
    return 1.3 + min((0.3 if rows <= 24 else 0.155) * max(rows, 3), 9.3)


def name_rows(ax: Axes, names: Sequence[str], empty: Sequence[int], style: Style) -> list[int]:
    """Name rows 0 (at the top) to n - 1 at the left, or every few where there is no room; the empty ones light up."""
    points = 72 * ax.get_window_extent().height / ax.figure.dpi
    step = math.ceil(9.5 * len(names) / points)
    rows = list(range(0, len(names), step))
    ax.set_yticks(rows, [str(names[row]) for row in rows])
    ax.tick_params(axis="y", length=0, labelsize=8.5)
    for row, label in zip(rows, ax.get_yticklabels()):
        label.set_color(style.alarm if row in empty else style.text)
    if step > 1:
        ax.set_ylabel(f"{len(rows)} of {len(names)} layers are named", color=style.muted)
    return rows
