"""The two pictures of the explorer, in plain matplotlib: accuracy over sparsity, and the weights of every layer."""

import functools
import io
import math

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from ..plots.layers import MOST_IN_3D, draw_rows, waterfall
from ..plots.look import dress, find_style, method_styles, percent, short
from ..plots.weights import LayerHistogram

_MOST = 25  # names of layers that a picture can hold
_LEAST = 0.01  # share of the weights that is left at the right end of the curve
_VIEW = 0.46  # of the picture's width is the 3D view's
_PRUNED = (0, 50, 80, 90, 95, 98, 99)  # percent named on the axis of the curve


class Frame:
    """A figure whose axes, ticks and names are drawn once: `png` draws what has come since, and takes it off again."""

    def __init__(self, figure: Figure):
        self.figure, self.axes = figure, tuple(figure.axes)
        self._canvas = FigureCanvasAgg(figure)
        self._canvas.draw()
        self._drawn, self._pixels = set(self._parts()), self._canvas.copy_from_bbox(figure.bbox)

    def _parts(self):
        return [part for owner in (self.figure, *self.axes) for part in owner.get_children()]

    def png(self) -> bytes:
        """Return the picture as a PNG, little compressed: it travels to the browser next door."""
        self._canvas.restore_region(self._pixels)
        moving = [part for part in self._parts() if part not in self._drawn]
        for part in sorted(moving, key=lambda part: part.zorder):
            part.draw(self._canvas.get_renderer())
            part.remove()
        pixels = np.asarray(self._canvas.buffer_rgba())[..., :3]
        Image.fromarray(pixels).save(file := io.BytesIO(), "PNG", compress_level=1)
        return file.getvalue()


class Pictures:
    """The pictures of one panel, as PNG: most of the time of a picture goes into its frame, which a move leaves."""

    def __init__(self, style: str, measure: str = "accuracy"):
        self._look, self._measure = find_style(style), measure
        self._curve_frame, self._rows_frame = (functools.lru_cache(1)(f) for f in (self._empty_curve, self._empty_rows))

    def curve(self, reached, choice, place: float, n: int) -> bytes:
        """Draw what a `Trial` has reached on `n` samples; 90 to 99 % sparsity have as much room as 0 to 90 %."""
        current, lines, empty, look = choice.label, {choice.label: []}, [], self._look
        for tried, found in reached.items():
            if tried is not None and tried.sparsity is not None:
                lines.setdefault(tried.label, []).append((tried.sparsity, found.level))
                empty += [tried.sparsity] if found.collapsed and tried.label == current else []
        looks = method_styles([*lines, current], look)
        shown = {name: points for name, points in lines.items() if name == current or len(points) > 2}
        ranked = sorted(shown, key=lambda name: -np.mean([y for _, y in shown[name]] or [0]))  # from top to bottom
        with mpl.rc_context(look.rc()):
            frame = self._curve_frame(n)
            (ax,) = frame.axes
            for row, name in enumerate(ranked):
                here, (places, heights) = name == current, np.reshape(sorted(shown[name]), (-1, 2)).T
                strength = {"linewidth": 2.2, "markersize": 3.5} if here else {"linewidth": 0.9, "markersize": 0}
                ax.plot(_left(places), heights, zorder=3 if here else 2, **looks[name], **strength)
                text = {"color": looks[name]["color"], "fontweight": "bold" if here else "normal"}
                ax.text(1.03, 0.97 - 0.115 * row, name, transform=ax.transAxes, fontsize=8, va="center", **text)
            if None in reached:
                ax.axhline(reached[None].level, color=look.muted, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            if empty:
                where, ink = _left(min(empty)), {"color": look.alarm, "ha": "right" if min(empty) > 0.6 else "left"}
                ax.axvline(where, color=look.alarm, linewidth=1.4, zorder=1.5)
                ax.text(where, 0.04, f" from {short(min(empty))} a layer is empty ", fontsize=8, **ink)
            ax.axvline(_left(place), color=look.muted, linewidth=0.9, linestyle=":")
            if choice in reached:
                ink = {"color": looks[current]["color"], "mec": look.text}
                height = min(reached[choice].level, ax.get_ylim()[1])
                ax.plot(_left(place), height, "o", ms=9, clip_on=False, zorder=5, **ink)
            return frame.png()

    def _empty_curve(self, n) -> Frame:
        figure = Figure(figsize=(6.4, 2.6), dpi=120)
        ax = figure.add_axes((0.1, 0.2, 0.66, 0.68))
        accuracy = self._measure == "accuracy"
        of, unit = ("images", "%") if accuracy else ("blocks", "lower is better")
        dress(ax, self._look, f"{self._measure.title()} over sparsity ({n:,} {of})", grid="both")
        ax.set(xscale="log", xlim=(1, _LEAST), xlabel="weights pruned (%)", ylabel=f"{self._measure} ({unit})")
        ax.set_xticks([1 - pruned / 100 for pruned in _PRUNED], map(str, _PRUNED))
        ax.set_xticks([], minor=True)
        if accuracy:
            ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
            ax.set_ylim(0, 1)
        else:
            ax.set(yscale="log", ylim=(1, 10_000))
            ax.yaxis.set_major_formatter("{x:,.0f}")
        return Frame(figure)

    def layers(self, layers: list[LayerHistogram]) -> bytes:
        """Draw the weights left in flat rows of histograms, with the share kept; of few layers, a 3D view beside."""
        look, n, shares = self._look, len(layers), [layer.kept / layer.total for layer in layers]
        known = max(layer.limit for layer in layers), layers[0].before is not None
        with mpl.rc_context(look.rc()):
            frame = self._rows_frame(tuple(layer.layer for layer in layers), *known)
            rows, bars = frame.axes
            if n <= MOST_IN_3D:
                waterfall(frame.figure.add_axes((0, 0, _VIEW, 1), projection="3d"), layers, look, "")
            draw_rows(rows, layers, look)
            kept = sum(layer.kept for layer in layers) / sum(layer.total for layer in layers)
            above = {"xy": (0, 1), "xycoords": "axes fraction", "xytext": (0, 10), "textcoords": "offset points"}
            title = f"Weights by layer, {percent(kept)} kept"
            rows.annotate(title, **above, color=look.text, fontsize=11, fontweight="bold")
            lines = [[(0, i), (share, i)] for i, share in enumerate(shares)]
            thick = min(0.6 * bars.bbox.height * 72 / frame.figure.dpi / n, 24)  # points
            bars.add_collection(LineCollection(lines, colors=look.ordered(n), linewidths=thick), autolim=False)
            for i in range(0, n, math.ceil(n / _MOST)):
                ink = {"color": look.text if shares[i] else look.alarm, "fontsize": 8}
                bars.text(shares[i] + 0.02, i, percent(shares[i]), va="center", **ink)
            return frame.png()

    def _empty_rows(self, names, limit, ghost) -> Frame:
        n, step = len(names), math.ceil(len(names) / _MOST)
        height = max(5.0, 1.7 + min(0.33, max(0.12, 8 / n)) * n)
        low, high = 0.85 / height, 1 - 0.5 / height
        start = _VIEW * (n <= MOST_IN_3D) + 0.02 + 0.0055 * max(map(len, names))  # the names have room
        middle = start + 0.58 * (0.94 - start)
        figure = Figure(figsize=(12, height), dpi=120)
        rows = figure.add_axes((start, low, middle - start, high - low))
        bars = figure.add_axes((middle + 0.015, low, 0.94 - middle, high - low), sharey=rows)
        for ax in (rows, bars):
            dress(ax, self._look, grid="x")
        for i in range(0, n, step):  # much quicker than ticks
            rows.text(-1.02 * limit, i, names[i], fontsize=8, ha="right", va="center")
        rows.spines["left"].set_visible(False)
        rows.set(xlim=(-limit, limit), ylim=(n - 0.5, -0.5), yticks=[])
        rows.locator_params(axis="x", nbins=5)
        notes = ["weight value"] + ["pale: before pruning"] * ghost + [f"one layer in {step} is named"] * (step > 1)
        rows.set_xlabel("; ".join(notes) + "\nheight: weights per bin, over the layer's fullest bin")
        bars.set(xlim=(0, 1), xticks=[0, 0.5, 1], xticklabels=["0", "50", "100"], xlabel="weights kept (%)")
        return Frame(figure)


def _left(sparsity):
    return np.maximum(1 - np.asarray(sparsity, dtype=float), _LEAST)
