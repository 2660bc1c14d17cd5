"""Histograms of many layers that stay legible: one above the other, or as rows of colours."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.transforms import ScaledTranslation

from .look import Style, dress
from .ticks import EM, percent
from .waterfall import outlines

_OVERLAP = 1.35  # the height of a histogram, in rows: a little of it may lie on the row above
_COLUMNS = 240  # of the heat map: more than any layer has bins


def rows_with_names(ax: Axes, names: list[str], lit: list[int], style: Style, size: float = 8) -> list[int]:
    """Name rows 0 (at the top) to n - 1 at the left: all of them if there is room, else every few and the lit ones.

    Returns the rows named. Where some are not, the label of the axis says so.
    """
    n = len(names)
    points = ax.get_window_extent().height * 72 / ax.figure.dpi / n
    step = max(1, math.ceil(1.18 * size / points))
    shown: list[int] = []
    for row in [*lit, *range(0, n, step)]:
        if all(abs(row - other) >= step for other in shown):
            shown.append(row)
    shown.sort()
    texts = [names[row] for row in shown]
    if list(ax.get_yticks()) != shown or [label.get_text() for label in ax.get_yticklabels()] != texts:
        ax.set_yticks(shown, texts)  # the explorer draws into the same Axes at every move, and making ticks is slow
    ax.tick_params(axis="y", length=0, labelsize=size, labelcolor=style.text)
    for row, label in zip(shown, ax.get_yticklabels()):
        label.set_color(style.alarm if row in lit else style.text)
    if step > 1:
        ax.set_ylabel(f"{len(shown)} of {n} layers are named", color=style.muted)
    return shown


def columns_with_names(ax: Axes, names: list[str]) -> None:
    """Name columns 0 to n - 1 below the Axes, slanted where they would not have room beside each other."""
    cell = ax.get_window_extent().width * 72 / ax.figure.dpi / len(names)  # points
    slanted = max(map(len, names)) * EM * 8.5 + 9 > cell
    turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    step = math.ceil(12 / cell)
    ax.set_xticks(range(0, len(names), step), names[::step], **turned)


def aside(ax: Axes, points: float) -> ScaledTranslation:
    """Return the transform that moves to the right by so many points."""
    return ScaledTranslation(points / 72, 0, ax.figure.dpi_scale_trans)


def shares_at_the_right(ax: Axes, shares: dict[int, float], style: Style) -> None:
    """Write {row: share kept} at the right of the Axes; where nothing is left it lights up."""
    place = ax.get_yaxis_transform() + aside(ax, 6)
    for row, share in shares.items():
        ink = style.text if share else style.alarm
        ax.text(1, row, percent(share), transform=place, color=ink, fontsize=8, va="center")


def frame(ax: Axes, layers: list, style: Style, title: str, kind: str) -> None:
    """Draw what stays while masks change: rows with their names, the axis below and what it says."""
    n, limit = len(layers), max(layer.limit for layer in layers)
    dress(ax, style, title, grid="x")
    ax.set_ylim(n - 0.5, -0.5)
    rows_with_names(ax, [layer.layer for layer in layers], empty_rows(layers), style)
    ax.spines["left"].set_visible(False)
    ghost = "" if layers[0].before is None else f"; {'pale' if kind == 'ridge' else 'grey'}: before pruning"
    note = f"weight value (share kept at the right{ghost})\n"
    if kind == "ridge":
        note += "height: weights per bin, relative to the layer's fullest bin"
        ax.set(xlim=(-limit, limit), ylim=(n - 0.4, 0.4 - _OVERLAP), xlabel=note)
    else:
        stronger = "darker" if style.name == "light" else "brighter"
        note += f"{stronger}: more weights per bin, relative to the layer's fullest bin"
        ax.set(xlim=(-limit, limit), xlabel=note)


def empty_rows(layers: list) -> list[int]:
    """Return the rows of layers that have lost all of their weights: their names light up."""
    return [row for row, layer in enumerate(layers) if not layer.kept]


def content(ax: Axes, layers: list, style: Style, kind: str) -> None:
    """Draw what changes with the masks into a `frame`: the histograms and the shares kept."""
    (fill_ridges if kind == "ridge" else fill_heat_map)(ax, layers, style)
    shown = [int(row) for row in ax.get_yticks()]
    shares_at_the_right(ax, {row: layers[row].kept / layers[row].total for row in shown}, style)


def ridges(ax: Axes, layers: list, style: Style, title: str) -> Axes:
    """Draw the histograms one above the other, the first layer on top."""
    frame(ax, layers, style, title, "ridge")
    content(ax, layers, style, "ridge")
    return ax


def fill_ridges(ax: Axes, layers: list, style: Style) -> None:
    """Draw the histograms themselves."""
    n, limit, lit = len(layers), max(layer.limit for layer in layers), empty_rows(layers)
    polygons, faces, inks = [], [], []
    for row, (layer, color) in enumerate(zip(layers, style.ordered(n))):
        edges = np.clip(layer.edges.astype(float), -layer.limit, layer.limit)
        heights, ghost = layer.heights()
        for values, face, ink in ((ghost, (*color[:3], 0.22), color), (heights, color, style.canvas)):
            for outline in outlines(edges, values) if values is not None else ():
                polygons.append(outline * (1, -_OVERLAP) + (0, row + 0.5))
                faces.append(face)
                inks.append(ink)
    # One collection for all: it draws its polygons in their order, each layer over the one above.
    ax.add_collection(
        PolyCollection(polygons, facecolors=faces, edgecolors=inks, linewidths=0.5, zorder=2), autolim=False
    )
    floors = [[(-limit, row + 0.5), (limit, row + 0.5)] for row in range(n)]
    inks = [style.alarm if row in lit else style.grid for row in range(n)]
    ax.add_collection(LineCollection(floors, colors=inks, linewidths=0.8, zorder=1.5), autolim=False)


def heat_map(ax: Axes, layers: list, style: Style, title: str) -> Axes:
    """Draw a row of colours for each layer, the first one on top: the stronger, the more weights are there."""
    frame(ax, layers, style, title, "heatmap")
    content(ax, layers, style, "heatmap")
    return ax


def fill_heat_map(ax: Axes, layers: list, style: Style) -> None:
    """Draw the rows of colours themselves."""
    n, limit = len(layers), max(layer.limit for layer in layers)
    at = (np.arange(_COLUMNS) + 0.5) * (2 * limit / _COLUMNS) - limit
    kept, ghost = np.zeros((n, _COLUMNS)), np.zeros((n, _COLUMNS))
    for row, layer in enumerate(layers):
        edges = np.clip(layer.edges.astype(float), -layer.limit, layer.limit)
        inside = abs(at) < layer.limit
        places = np.searchsorted(edges[1:-1], at[inside], side="right")
        heights, before = layer.heights()
        kept[row, inside] = heights[places]
        if before is not None:
            ghost[row, inside] = before[places]
    ramp = LinearSegmentedColormap.from_list("kept", [style.canvas, style.methods[0], style.text])
    canvas, grey = np.array(to_rgb(style.canvas)), np.array(to_rgb(style.muted))
    pale = canvas + 0.6 * ghost[..., None] * (grey - canvas)
    share = np.minimum(1, 4 * kept)[..., None]  # where little is kept the pale colour shines through
    image = (1 - share) * pale + share * ramp(kept)[..., :3]
    ax.imshow(image, extent=(-limit, limit, n - 0.5, -0.5), aspect="auto", interpolation="nearest", zorder=0.5)
    for row in empty_rows(layers):
        ax.plot([-limit, limit], [row, row], color=style.alarm, linewidth=min(1.0, 120 / n))
