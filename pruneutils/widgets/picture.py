"""The two pictures of the explorer, in plain matplotlib: accuracy over sparsity, and the weights of every layer."""

import io
import math

import matplotlib as mpl
import numpy as np
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure

from ..plots import layer_histograms
from ..plots.look import Style, dress, find_style, method_styles
from ..plots.weights import LayerHistogram

_FEW, _MOST = 7, 25  # layers that a 3D view can hold, and names that a picture can
_LEAST = 0.01  # share of the weights that is left at the right end of the curve
_PRUNED = (0, 50, 80, 90, 95, 98, 99)  # percent named on the axis of the curve


def draw_curve(reached, choice, place: float, n: int, style: str) -> Figure:
    """Draw a `Trial`'s accuracies on `n` images; 90 to 99 % sparsity have as much room as 0 to 90 %."""
    current, lines, empty = choice.label, {choice.label: []}, []
    for tried, found in reached.items():
        if tried is not None and tried.sparsity is not None:
            lines.setdefault(tried.label, []).append((tried.sparsity, found.accuracy))
            empty += [tried.sparsity] if found.collapsed and tried.label == current else []
    look = find_style(style)
    with mpl.rc_context(look.rc()):
        figure = Figure(figsize=(6.4, 2.6))
        ax = figure.add_axes((0.1, 0.2, 0.66, 0.68))
        dress(ax, look, f"Accuracy over sparsity ({n:,} images)", grid="both")
        ax.set(xscale="log", xlim=(1, _LEAST), ylim=(0, 1), xlabel="weights pruned (%)", ylabel="accuracy (%)")
        ax.set_xticks([1 - percent / 100 for percent in _PRUNED], map(str, _PRUNED))
        ax.set_xticks([], minor=True)
        ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
        looks = method_styles([*lines, current], look)
        shown = {name: points for name, points in lines.items() if name == current or len(points) > 2}
        ranked = sorted(shown, key=lambda name: -np.mean([y for _, y in shown[name]] or [0]))  # the best one first
        for row, name in enumerate(ranked):
            here, (places, heights) = name == current, np.reshape(sorted(shown[name]), (-1, 2)).T
            strength = {"linewidth": 2.2, "markersize": 3.5} if here else {"linewidth": 0.9, "markersize": 0}
            ax.plot(_left(places), heights, zorder=3 if here else 2, **looks[name], **strength)
            text = {"color": looks[name]["color"], "fontweight": "bold" if here else "normal"}
            ax.text(1.03, 0.97 - 0.115 * row, name, transform=ax.transAxes, fontsize=8, va="center", **text)
        if None in reached:
            ax.axhline(reached[None].accuracy, color=look.muted, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        if empty:
            where, ink = _left(min(empty)), {"color": look.alarm, "ha": "right" if min(empty) > 0.6 else "left"}
            ax.axvline(where, color=look.alarm, linewidth=1.4, zorder=1.5)
            ax.text(where, 0.04, f" from {_percent(min(empty))} a layer is empty ", fontsize=8, **ink)
        ax.axvline(_left(place), color=look.muted, linewidth=0.9, linestyle=":")
        if choice in reached:
            ink = {"color": looks[current]["color"], "mec": look.text}
            ax.plot(_left(place), reached[choice].accuracy, "o", ms=9, clip_on=False, zorder=5, **ink)
    return figure


def _left(sparsity):
    return np.maximum(1 - np.asarray(sparsity, dtype=float), _LEAST)


def draw_layers(layers: list[LayerHistogram], style: str) -> Figure:
    """Draw the weights left in flat rows of histograms, with the share kept; of few layers, a 3D view beside them."""
    look, n = find_style(style), len(layers)
    height = max(5.0, 1.7 + min(0.33, max(0.12, 8 / n)) * n)
    low, high, view = 0.85 / height, 1 - 0.5 / height, 0.46 if n <= _FEW else 0.0
    start = view + 0.02 + 0.0055 * max(len(layer.layer) for layer in layers)  # the names have room
    middle = start + 0.58 * (0.94 - start)
    with mpl.rc_context(look.rc()):
        figure = Figure(figsize=(12, height))
        rows = figure.add_axes((start, low, middle - start, high - low))
        shares = figure.add_axes((middle + 0.015, low, 0.94 - middle, high - low), sharey=rows)
        if view:
            ax = figure.add_axes((0, 0, view, 1), projection="3d")
            layer_histograms(layers, kind="3d", title="", ax=ax, style=style)
        _draw_rows(rows, layers, look)
        _draw_shares(shares, layers, look)
    return figure


def _draw_rows(ax, layers, look: Style) -> None:
    """Draw a histogram a row, the first on top; none lies on another. One collection holds all: that is quick."""
    kept, limit = sum(layer.kept for layer in layers), max(layer.limit for layer in layers)
    dress(ax, look, f"Weights by layer, {_percent(kept / sum(layer.total for layer in layers))} kept", grid="x")
    polygons, faces, floors = [], [], []
    for i, (layer, color) in enumerate(zip(layers, look.ordered(len(layers)))):
        now, ghost = layer.heights()
        for heights, alpha in ((ghost, 0.25), (now, 1.0)):
            if heights is not None:
                outline = np.concatenate([[0], np.repeat(heights, 2), [0]])
                polygons.append(np.column_stack([np.repeat(layer.edges, 2), i + 0.45 - 0.85 * outline]))
                faces.append((*color[:3], alpha))
        floors.append([(-limit, i + 0.45), (limit, i + 0.45)])
    inks = [look.grid if layer.kept else look.alarm for layer in layers]
    ax.add_collection(PolyCollection(polygons, facecolors=faces, linewidths=0, zorder=2), autolim=False)
    ax.add_collection(LineCollection(floors, colors=inks, linewidths=0.8, zorder=1), autolim=False)
    step = math.ceil(len(layers) / _MOST)
    for i in range(0, len(layers), step):  # much quicker than ticks
        ax.text(-1.02 * limit, i, layers[i].layer, fontsize=8, ha="right", va="center")
    ax.spines["left"].set_visible(False)
    ax.set(xlim=(-limit, limit), ylim=(len(layers) - 0.5, -0.5), yticks=[])
    ax.locator_params(axis="x", nbins=5)
    said = ["weight value"] + ["pale: before pruning"] * (layers[0].before is not None)
    said += [f"one layer in {step} is named"] * (step > 1)
    ax.set_xlabel("; ".join(said) + "\nheight: weights per bin, over the layer's fullest bin")


def _draw_shares(ax, layers, look: Style) -> None:
    """Draw the share that each layer keeps as a bar, and write it beside."""
    dress(ax, look, grid="x")
    shares = [layer.kept / layer.total for layer in layers]
    bars = [[(0, i), (share, i)] for i, share in enumerate(shares)]
    thick = min(0.6 * ax.bbox.height * 72 / ax.figure.dpi / len(layers), 24)  # points
    ax.add_collection(LineCollection(bars, colors=look.ordered(len(layers)), linewidths=thick), autolim=False)
    for i in range(0, len(layers), math.ceil(len(layers) / _MOST)):
        ink = {"color": look.text if shares[i] else look.alarm, "fontsize": 8}
        ax.text(shares[i] + 0.02, i, _percent(shares[i]), va="center", **ink)
    ax.set(xlim=(0, 1), xticks=[0, 0.5, 1], xticklabels=["0", "50", "100"], xlabel="weights kept (%)")


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG, little compressed: it travels to the browser next door."""
    figure.savefig(file := io.BytesIO(), format="png", dpi=120, pil_kwargs={"compress_level": 1})
    return file.getvalue()
