"""Numbers in pictures: percentages, and ticks that are round and have room for their labels."""

import math

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes

# Sparsities worth a tick, the most useful ones first.
_SPARSITIES = (0.9, 0.99, 0.5, 0, 0.999, 0.95, 0.98, 0.8, 0.9999, 0.995, 0.7, 0.998, 0.6, 0.2, 0.4, 0.97, 0.3, 0.1)
EM = 0.64  # the width of a digit of DejaVu Sans, over the font size


def percent(fraction: float, decimals: int | None = None, sign: str = " %") -> str:
    """Write a fraction as a percentage that says 0 or 100 only where it is exactly so.

    Args:
        fraction: A number in [0, 1].
        decimals: How many decimals to show, rounded as Python's `format` does. By default one near 0 and 1, where
            it matters, and none between.
        sign: What stands behind the number.

    Returns:
        The text.

    Example:
        >>> [pu.plots.percent(fraction) for fraction in (0, 0.0004, 0.012, 0.5, 0.9996)]
        ['0 %', '<0.1 %', '1.2 %', '50 %', '>99.9 %']
        >>> pu.plots.percent(0.6838, decimals=1, sign="")
        '68.4'
    """
    if fraction in (0, 1) or not math.isfinite(fraction):
        return f"{100 * fraction:.0f}{sign}"
    near = fraction < 0.0995 or fraction > 0.9905
    shown = (1 if near else 0) if decimals is None else decimals
    text, least = f"{100 * fraction:.{shown}f}", 10.0**-shown
    if float(text) == 0:
        return f"<{least:.{shown}f}{sign}"
    if float(text) == 100:
        return f">{100 - least:.{shown}f}{sign}"
    return (text.removesuffix(".0") if decimals is None else text) + sign


def spread(sparsity):
    """Return -log10(density): as far from 0.9 to 0.99 as from 0 to 0.9."""
    return -np.log10(np.maximum(1 - np.asarray(sparsity, float), 1e-12))


def gather(place):
    """Return the sparsity at a place of `spread`."""
    return 1 - 10.0 ** -np.asarray(place, float)


class Percent(ticker.Formatter):
    """Fractions as percentages or percentage points: all ticks of an axis with the same decimals, as few as do."""

    def __init__(self, unit: str = " %", signed: bool = False):
        self.unit, self.signed, self.decimals = unit, signed, 0

    def set_locs(self, locs):
        """Choose the decimals."""
        values = 100 * np.asarray(locs, float)
        self.decimals = next((d for d in range(6) if np.allclose(values, values.round(d), rtol=0, atol=1e-6)), 6)

    def __call__(self, value, pos=None):
        text = f"{abs(100 * value):.{self.decimals}f}"
        sign = "" if float(text) == 0 else "-" if value < 0 else "+" if self.signed else ""
        return self.fix_minus(sign + text) + self.unit


class EachPercent(ticker.Formatter):
    """Fractions as percentages, each with the decimals that it needs, as 99.5 % beside 50 %."""

    def __call__(self, value, pos=None):
        return f"{100 * value:.6g} %"


class _WithRoom(ticker.Locator):
    """What locators share that look at the room on the page."""

    def _free(self, places, labels) -> bool:
        """Tell whether labels at these places, fractions of a horizontal axis, stand apart."""
        axis = self.axis
        points = axis.axes.get_window_extent().width * 72 / axis.get_figure(root=True).dpi
        size = axis.get_tick_params().get("labelsize", 8.5)
        half = np.array([max(map(len, label.split("\n"))) for label in labels]) * EM * float(size) / 2 / points
        order = np.argsort(places)
        places, half = np.asarray(places)[order], half[order]
        return bool((np.diff(places) > half[1:] + half[:-1] + 9 / points).all())


class RoundTicks(ticker.MaxNLocator, _WithRoom):
    """Round numbers, as many as have room beside each other."""

    def __init__(self, most: int = 9, integer: bool = False):
        super().__init__(nbins=most, steps=(1, 2, 5, 10), integer=integer)
        self._most = most

    def tick_values(self, vmin, vmax):
        for n in range(self._most, 0, -1):
            self.set_params(nbins=n)
            ticks = super().tick_values(vmin, vmax)
            seen = ticks[(ticks >= min(vmin, vmax)) & (ticks <= max(vmin, vmax))]
            if len(seen) < 2 or self.axis.axis_name != "x":
                break
            labels = self.axis.get_major_formatter().format_ticks(seen)
            if self._free((seen - vmin) / (vmax - vmin), labels):
                break
        return ticks


class SparsityTicks(_WithRoom):
    """Sparsities on an axis that is logarithmic in the density: those of the points where they are round, or near."""

    def __init__(self, points=()):
        self.points = [float(p) for p in points if _is_round(p)]

    def __call__(self):
        return self.tick_values(*sorted(self.axis.get_view_interval()))

    def tick_values(self, vmin, vmax):
        low, high = spread(vmin), spread(vmax)
        wanted = [*sorted(self.points, reverse=True), *_SPARSITIES]
        ticks = []
        for tick in dict.fromkeys(tick for tick in wanted if vmin - 1e-9 <= tick <= vmax + 1e-9):
            tried = [*ticks, tick]
            if self._free((spread(tried) - low) / (high - low), [EachPercent()(t) for t in tried]):
                ticks = tried
        return np.array(sorted(ticks))


def _is_round(fraction: float) -> bool:
    """Tell whether this is a percentage that one would write on an axis: 85 % or 99.5 %, but not 68.38 %."""
    decimals = 2 + sum(fraction > bound for bound in (0.99, 0.999, 0.9999))
    return abs(round(fraction, decimals) - fraction) < 1e-9


def logarithmic(axis, low: float, high: float) -> None:
    """Give a logarithmic axis ticks with a unit prefix, such as 200 k, at 1, 2 and 5 where there are few decades."""
    decades = math.log10(high / low)
    subs = (1, 2, 5) if decades < 2 else (1, 3) if decades < 3.5 else (1,)
    axis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.set_major_formatter(ticker.EngFormatter(sep=" "))
    axis.set_minor_formatter(ticker.NullFormatter())


def fractions_on_y(ax: Axes) -> None:
    """Show percent on the y axis, and no room for what cannot be."""
    ax.yaxis.set_major_formatter(Percent())
    ax.yaxis.set_major_locator(RoundTicks())
    low, high = ax.get_ylim()
    ax.set_ylim(max(low, -0.02), min(high, 1.02))
