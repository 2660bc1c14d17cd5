"""Pictures of tables, layer by layer and mask by mask: densities as bars, sparsities and overlaps as matrices."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection

from .flat import aside, columns_with_names, rows_with_names, shares_at_the_right
from .look import WIDTH, Style, contrast, dress, picture
from .tables import need
from .ticks import EachPercent, RoundTicks, percent, spread

_BAR_TICKS = (0, 0.9, 0.99, 0.999, 0.9999, 0.5, 0.95, 0.995, 0.8, 0.98, 0.998)  # the most useful ones first


@picture
def layer_bars(
    table: pd.DataFrame,
    *,
    title: str | None = None,
    ax: Axes | None = None,
    style: str | Style | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Draw the density of each layer as a bar; layers without a weight light up.

    Args:
        table: A `layer_table`: columns layer, total, kept.
        title: The headline; by default it says how many weights are kept.
        ax: The Axes to draw into.
        style: "light" or "dark".
        save: A path without suffix; writes path.png, path.svg and path_dark.png.

    Returns:
        The Axes.

    Raises:
        ValueError: If a column is missing or there is no row.

    Example:
        >>> model = pu.models.create("lenet300", num_classes=10)
        >>> _ = pu.prune(model, "magnitude", sparsity=0.5, scope="layer")
        >>> pu.plots.layer_bars(pu.layer_table(model)).get_title(loc="left")
        'Density by layer, 50 % kept'
    """
    need(table, "layer", "total", "kept")
    density, n = (table["kept"] / table["total"]).to_numpy(), len(table)
    share = table["kept"].sum() / table["total"].sum()
    ax = ax or style.axes((WIDTH, 1.3 + min(0.155 * n if n > 24 else 0.3 * max(n, 3), 9.3)))
    dress(ax, style, f"Density by layer, {percent(share)} kept" if title is None else title, grid="x")
    ax.set_ylim(n - 0.4, -0.6)
    empty = density == 0
    named = rows_with_names(ax, [str(name) for name in table["layer"]], list(np.flatnonzero(empty)), style)
    draw_bars(ax, density, style, hatched=len(named) == n)
    if len(named) < n:  # in a column of their own, as they would lie on the bars above and below
        shares_at_the_right(ax, {row: density[row] for row in named}, style)
    for row in named if len(named) == n else ():
        text, ink = (percent(density[row]), style.text) if density[row] else ("0 %: collapsed", style.alarm)
        box = {"facecolor": style.canvas, "edgecolor": "none", "pad": 0.8}  # on hatching, grid and the line below
        look = {"color": ink, "va": "center", "fontsize": 8, "bbox": box}
        ax.text(density[row], row, text, transform=ax.transData + aside(ax, 4), **look)
    ax.axvline(share, color=style.muted, linewidth=0.9, linestyle=":", zorder=0.9)
    ax.set(
        xlim=(0, max(1.18 * density.max(), 1.0 if empty.any() else 0)), xlabel="weights kept (dotted: in all layers)"
    )
    return ax


def draw_bars(ax: Axes, density: np.ndarray, style: Style, hatched: bool = True) -> None:
    """Draw a bar for each row, and light up the rows without a weight."""
    n, empty = len(density), density == 0
    rows = np.arange(n)
    if n > 24:  # one collection for all: a patch for each takes longer to make than to draw
        corners = [
            [(0, row - 0.36), (share, row - 0.36), (share, row + 0.36), (0, row + 0.36)]
            for row, share in enumerate(density)
        ]
        ax.add_collection(PolyCollection(corners, facecolors=style.ordered(n), zorder=1), autolim=False)
    else:
        ax.barh(rows, density, height=0.72, color=style.ordered(n))
    lit = {"facecolor": "none", "hatch": "////"} if hatched else {"facecolor": style.alarm, "alpha": 0.4}
    if empty.any():
        ax.barh(rows[empty], np.ones(empty.sum()), height=0.72, edgecolor=style.alarm, **lit)
    ax.xaxis.set_major_formatter(EachPercent())
    ax.xaxis.set_major_locator(RoundTicks(6))


@picture
def sparsity_heatmap(
    tables: Mapping[str, pd.DataFrame] | pd.DataFrame,
    *,
    title: str | None = "Sparsity by layer",
    ax: Axes | None = None,
    style: str | Style | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Draw the sparsity of every layer under every method; layers without a weight are crossed out.

    Methods are rows and layers columns, the other way round from 17 layers on. The numbers are percentages with one
    decimal, as `percent` writes them; the colour follows -log10(density), which tells 98 % from 99 %.

    Args:
        tables: {method: layer_table}, or a tidy frame with columns method, layer, sparsity.
        title: The headline.
        ax: The Axes to draw into.
        style: "light" or "dark".
        save: A path without suffix; writes path.png, path.svg and path_dark.png.

    Returns:
        The Axes.

    Raises:
        ValueError: If a column is missing, there is no table, or a method has a layer twice.

    Example:
        >>> model = pu.models.create("lenet300", num_classes=10)
        >>> _ = pu.prune(model, "magnitude", sparsity=0.5, scope="layer")
        >>> ax = pu.plots.sparsity_heatmap({"magnitude": pu.layer_table(model)})
        >>> [text.get_text() for text in ax.texts]
        ['50.0', '50.0', '50.0']
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
    rows, columns = [str(m) for m in methods], [str(name) for name in layers]
    upright = len(layers) > 16
    if upright:
        grid, rows, columns = grid.T, columns, rows
    height, width = grid.shape
    tall = 1.9 + (min(0.18 * height, 9.0) if upright else 0.42 * height + 0.05 * max(map(len, columns)))
    ax = ax or style.axes((WIDTH if upright else max(5.5, min(WIDTH, 2.8 + 0.55 * width)), tall))
    dress(ax, style, title)
    shade = spread(np.where(grid < 1, grid, np.nan))
    image = ax.imshow(shade, cmap="viridis", aspect="auto", vmin=0, vmax=max(1.0, np.nanmax(shade, initial=1.0)))
    named = _cell_frame(ax, rows, columns, style)
    numbers = width * 30 <= ax.get_window_extent().width * 72 / ax.figure.dpi and len(named) == height
    for row, column in np.ndindex(height, width):
        value = grid[row, column]
        look = {"ha": "center", "va": "center"}
        if value == 1:
            ax.text(column, row, "×", color=style.alarm, fontsize=9 if upright else 14, weight="bold", **look)
        elif numbers and np.isfinite(value):
            ink = _ink(image, shade[row, column])
            ax.text(column, row, percent(value, decimals=1, sign=""), color=ink, fontsize=7.5, **look)
    ticks = [t for t in _BAR_TICKS if spread(t) <= image.norm.vmax]
    _color_bar(ax, image, spread(ticks), [EachPercent()(t) for t in ticks], "sparsity (log scale; cells in %)", style)
    if (grid == 1).any():
        ax.set_xlabel("× no weight is left", color=style.alarm, loc="left")
    return ax


@picture
def mask_overlap(
    matrix: pd.DataFrame,
    *,
    title: str | None = "Overlap of masks",
    label: str = "intersection over union",
    ax: Axes | None = None,
    style: str | Style | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Draw a matrix of overlaps between named masks, with its numbers.

    Args:
        matrix: Overlaps in [0, 1], a square frame with the same names as index and columns.
        title: The headline.
        label: What the numbers are.
        ax: The Axes to draw into.
        style: "light" or "dark".
        save: A path without suffix; writes path.png, path.svg and path_dark.png.

    Returns:
        The Axes.

    Raises:
        TypeError: If `matrix` is no DataFrame.
        ValueError: If it is not square, or leaves [0, 1].

    Example:
        >>> import pandas as pd
        >>> names = ["snip", "grasp"]
        >>> ax = pu.plots.mask_overlap(pd.DataFrame([[1, 0.4], [0.4, 1]], names, names))
        >>> [text.get_text() for text in ax.texts]
        ['1.00', '0.40', '0.40', '1.00']
    """
    if not isinstance(matrix, pd.DataFrame):
        raise TypeError(f"mask_overlap draws a DataFrame of overlaps, got {type(matrix).__name__}")
    values = matrix.to_numpy(float)
    if not values.size or list(matrix.index) != list(matrix.columns):
        raise ValueError(f"rows {list(matrix.index)} and columns {list(matrix.columns)} must be the same names")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"overlaps must lie in [0, 1], got {values.min():g} to {values.max():g}")
    n, names = len(values), [str(name) for name in matrix.index]
    longest = max(map(len, names))
    wide = min(WIDTH, 2.2 + 0.55 * n + 0.075 * longest)
    ax = ax or style.axes((max(wide, 5.0), min(9.0, 1.7 + 0.48 * n + 0.05 * longest)))
    dress(ax, style, title)
    image = ax.imshow(values, cmap="viridis", vmin=0, vmax=1)
    for row, column in np.ndindex(n, n) if n <= 12 else ():
        look = {"color": _ink(image, values[row, column]), "ha": "center", "va": "center", "fontsize": 8}
        ax.text(column, row, f"{values[row, column]:.2f}", **look)
    _cell_frame(ax, names, names, style)
    ticks = (0, 1, 0.5, 0.25, 0.75)
    _color_bar(ax, image, ticks, [f"{t:g}" for t in ticks], label, style)
    return ax


def _ink(image, value) -> str:
    """Black or white, whichever is easier to read on the colour of this value."""
    behind = image.cmap(image.norm(value))
    return max(("black", "white"), key=lambda ink: contrast(ink, behind))


def _cell_frame(ax, rows, columns, style) -> list[int]:
    """Name rows and columns and draw lines between the cells; returns the rows named."""
    named = rows_with_names(ax, rows, [], style, size=8.5 if len(rows) <= 16 else 8)
    columns_with_names(ax, columns)
    ax.tick_params(axis="x", length=0, labelcolor=style.text)
    ax.spines[:].set_visible(False)
    ax.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
    ax.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
    ax.tick_params(which="minor", length=0)
    ax.grid(which="minor", color=style.canvas, linewidth=1.5 if len(rows) <= 16 else 0.6)
    return named


def _color_bar(ax, image, ticks, labels, label, style):
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02, fraction=0.05, aspect=18, anchor=(0, 1))
    apart = 14 / (ax.get_window_extent().height * 72 / ax.figure.dpi) * (image.norm.vmax - image.norm.vmin)
    shown = {}  # of ticks in the order of their use, those that have room
    for tick, text in zip(ticks, labels):
        if all(abs(tick - other) >= apart for other in shown):
            shown[tick] = text
    bar.set_ticks(list(shown), labels=list(shown.values()))
    bar.minorticks_off()
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=style.muted, labelsize=8, length=0)
    bar.set_label(label, color=style.muted)
