"""Pictures of tables, layer by layer and mask by mask: densities as bars, sparsities and overlaps as matrices."""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb

from .look import SPARSITY_TICKS, dress, need, percent, picture, short, spread


@picture
def layer_bars(table: pd.DataFrame, *, title=None, ax=None, style=None, save=None):
    """The density of each layer as a bar; collapsed layers light up.

    `table` is a `layer_table`: columns layer, total, kept. Raises ValueError if one is missing or there is no row.
    """
    need(table, "layer", "total", "kept")
    density, n = (table["kept"] / table["total"]).to_numpy(), len(table)
    share = table["kept"].sum() / table["total"].sum()
    ax = ax or style.axes((6.4, min(9.0, 1.1 + 0.27 * n)))
    dress(ax, style, f"Density by layer, {percent(share)} kept" if title is None else title, grid="x")
    rows = np.arange(n)
    empty = density == 0
    ax.barh(rows, density, height=0.72, color=style.ordered(n))
    ax.barh(rows[empty], np.ones(empty.sum()), height=0.72, color="none", edgecolor=style.alarm, hatch="////")
    step = math.ceil(n / 30)
    for row, value in zip(rows, density, strict=True):
        if row % step and value:
            continue
        text, ink = (percent(value), style.text) if value else ("0 %: collapsed", style.alarm)
        box = None if value else {"facecolor": style.canvas, "edgecolor": "none", "pad": 1}  # on hatching
        look = {"color": ink, "va": "center", "fontsize": 8, "bbox": box}
        ax.annotate(text, (value, row), (4, 0), textcoords="offset points", **look)
    ax.axvline(share, color=style.muted, linewidth=0.9, linestyle=":", zorder=0.9)
    shown = [row for row in rows if row % step == 0 or empty[row]]
    ax.set_yticks(shown, [short(str(table["layer"].iloc[row])) for row in shown])
    ax.tick_params(axis="y", length=0, labelcolor=style.text)
    ax.xaxis.set_major_formatter(lambda value, _: percent(round(value, 6)))
    ax.set(xlim=(0, max(1.12 * density.max(), 1.0 if empty.any() else 0)), ylim=(n - 0.4, -0.6), xlabel="weights kept")
    return ax


@picture
def sparsity_heatmap(tables, *, title="Sparsity by layer", ax=None, style=None, save=None):
    """The sparsity of every layer (column) under every method (row); collapsed layers are crossed out.

    `tables` is {method: layer_table} or a tidy frame with columns method, layer, sparsity. The colour follows
    -log10(density), which tells 98 % from 99 %. Raises ValueError if a column is missing or a layer comes twice.
    """
    if isinstance(tables, Mapping):
        if not tables:
            raise ValueError("tables is empty")
        for table in tables.values():
            need(table, "layer", "sparsity")
        tables = pd.concat([table.assign(method=method) for method, table in tables.items()])
    need(tables, "method", "layer", "sparsity")
    twice = tables.duplicated(["method", "layer"])
    if twice.any():
        first = tables[twice].iloc[0]
        raise ValueError(f"method {first['method']!r} has layer {first['layer']!r} more than once: average seeds first")
    methods, layers = tables["method"].unique(), tables["layer"].unique()
    grid = tables.pivot(index="method", columns="layer", values="sparsity").loc[methods, layers].to_numpy(float)
    height, width = grid.shape
    ax = ax or style.axes((max(4.0, min(9.5, 2.2 + 0.55 * width)), 1.9 + 0.42 * height))
    dress(ax, style, title)
    shade = spread(np.where(grid < 1, grid, np.nan))
    image = ax.imshow(shade, cmap="viridis", aspect="auto", vmin=0, vmax=max(1.0, np.nanmax(shade, initial=1.0)))
    for row, column in np.ndindex(height, width):
        value = grid[row, column]
        if value == 1:
            ax.text(column, row, "×", color=style.alarm, ha="center", va="center", fontsize=14, weight="bold")
        elif width <= 24 and np.isfinite(value):
            light = np.dot(to_rgb(image.cmap(image.norm(shade[row, column]))), (0.299, 0.587, 0.114)) > 0.55
            text = f"{math.floor(1000 * value) / 10:.1f}"  # rounded down: 99.96 % must not read 100
            ax.text(column, row, text, color="black" if light else "white", ha="center", va="center", fontsize=7)
    _cell_frame(ax, [str(m) for m in methods], [short(str(name), 16) for name in layers], style)
    ticks = [t for t in SPARSITY_TICKS if spread(t) <= image.norm.vmax]
    _color_bar(ax, image, spread(np.array(ticks)), [percent(t) for t in ticks], "sparsity", style)
    if (grid == 1).any():
        ax.set_xlabel("× no weight is left", color=style.alarm, loc="left")
    return ax


@picture
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
    dress(ax, style, title)
    image = ax.imshow(values, cmap="viridis", vmin=0, vmax=1)
    for row, column in np.ndindex(n, n) if n <= 16 else ():
        ink = "black" if values[row, column] > 0.6 else "white"
        ax.text(column, row, f"{values[row, column]:.2f}", color=ink, ha="center", va="center", fontsize=8)
    names = [short(str(name)) for name in matrix.index]
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
