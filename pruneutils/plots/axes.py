"""Axes of fractions, and legends beside them."""

import math
import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis

from .look import Style


def percent(fraction: float, decimals: int | None = None, sign: str = " %") -> str:
    """Write a fraction as a percentage that says 0 or 100 only where it is exactly so."""
    if decimals is None:  # one near 0 and 1, where it matters
        decimals = 1 if (fraction < 0.0995 or fraction > 0.9905) and round(1000 * fraction) % 10 else 0
    if fraction in (0, 1) or not math.isfinite(fraction):
        return f"{100 * fraction:.0f}{sign}"
    text, least = f"{100 * fraction:.{decimals}f}", 10.0**-decimals
    if float(text) == 0:
        return f"<{least:.{decimals}f}{sign}"
    return (f">{100 - least:.{decimals}f}" if float(text) == 100 else text) + sign


def short(fraction: float, _=None) -> str:
    """Write a fraction as a percentage with as many decimals as it needs: 99.5 % beside 50 %."""
    return f"{100 * fraction:.6g} %"


def points(difference: float, _=None) -> str:
    """Write a difference of fractions as percentage points, with its sign."""
    return "0" if abs(difference) < 1e-9 else f"{100 * difference:+.4g}".replace("-", "−")


def words(column: str) -> str:
    """The name of a column as people write it."""
    return column.replace("_", " ")


def spread(sparsity) -> np.ndarray:
    """Return -log10(density): as far from 0.9 to 0.99 as from 0 to 0.9."""
    return -np.log10(np.maximum(1 - np.asarray(sparsity, float), 1e-12))


def gather(place) -> np.ndarray:
    """Return the sparsity at a place of `spread`."""
    return 1 - 10.0 ** -np.asarray(place, float)


def fractions_on(axis: Axis) -> None:
    """Show percent on an axis, and no room for what cannot be."""
    axis.set_major_formatter(short)
    low, high = axis.get_view_interval()
    axis.axes.set(**{f"{axis.axis_name}lim": (max(low, -0.03), min(high, 1.03))})


def sparsities_on(ax: Axes, scale: str, label: str, largest: float) -> None:
    """Give the x axis ticks for sparsities on this scale, and say in its label which scale it is."""
    if scale == "linear":
        ax.xaxis.set_major_formatter(short)
        ax.set_xlabel(label)
        return
    decades = math.ceil(spread(largest) + 1e-9)
    steps = (1, 0.5, 0.2) if decades <= 3 else (1,)
    ticks = 1 - np.array([step * 10.0**-decade for decade in range(decades + 1) for step in steps])
    low, high = ax.get_xlim()
    ax.set_xticks([tick for tick in ticks.round(decades + 1) if low <= tick <= high])
    ax.minorticks_off()
    ax.set_xlim(low, high)
    kept = scale == "density"
    ax.xaxis.set_major_formatter(lambda sparsity, _: short(1 - sparsity if kept else sparsity))
    ax.set_xlabel("weights left (logarithmic)" if kept else f"{label} (log scale of the weights left)")


def legend(ax: Axes, style: Style, handles: Sequence, note: str = "") -> None:
    """Put a legend with a note as its head to the right of the Axes; long labels are broken into lines."""
    if handles or note:
        labels = [handle.get_label() for handle in handles]
        labels = [textwrap.fill(label, 26) if "\n" not in label else label for label in labels]
        place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "borderaxespad": 0, "alignment": "left"}
        drawn = ax.legend(handles, labels, title=note or None, handlelength=2.6, **place)
        drawn.get_title().set_color(style.muted)


def note_of(counts: pd.Series, columns: Sequence[str]) -> str:
    """Say what the intervals are and how many runs are behind them; nothing where every point is a single run."""
    runs = next((f"{name}s" for name in ("image", "seed") if name in columns), "runs")
    return f"mean, 95 % t-interval,\n{n_of(counts, runs)}" if max(counts) > 1 else ""


def n_of(counts: pd.Series, what: str) -> str:
    """Write how many there are, such as "n = 3 to 5 seeds"."""
    low, high = min(counts), max(counts)
    return f"n = {low if low == high else f'{low} to {high}'} {what}"
