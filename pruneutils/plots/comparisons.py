"""The picture of a comparison: the paired difference of each arm to a reference, with its interval."""

from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from .._checks import one_of
from ..experiments.statistics import compare
from .curves import side_by_side
from .flat import columns_with_names
from .legends import legend_outside
from .look import WIDTH, Style, dress, method_styles, picture
from .tables import need
from .ticks import Percent, RoundTicks

_COLUMNS = 8  # arms beside each other; with more of them, colours would come twice


@picture
def differences(
    frame: pd.DataFrame,
    by: str = "method",
    x: str | None = "sparsity",
    y: str = "accuracy",
    *,
    against: Hashable | None = None,
    pair_on: str | Sequence[str] = "seed",
    level: float = 0.95,
    title: str | None = None,
    ax: Axes | None = None,
    style: str | Style | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Draw how far each arm lies above or below a reference: the mean paired difference with its interval.

    Pairs are runs of the same seed. Filled points differ from the reference, by the paired test of
    `pu.statistics.compare`, corrected after Holm over all points of the picture; hollow ones cannot be told apart.
    More than eight arms get a row each, the best on top, and the values of `x` the colours.

    Args:
        frame: A row a run.
        by: The column that names the arms.
        x: The column at whose values arms are compared one by one, such as the sparsity; None for one comparison.
        y: The column to compare; differences of an accuracy are shown in percentage points.
        against: The reference arm; by default the one that comes first in the frame.
        pair_on: The column, or columns, that make two runs a pair.
        level: The coverage of the intervals, and of the test.
        title: The headline.
        ax: The Axes to draw into.
        style: "light" or "dark".
        save: A path without suffix; writes path.png, path.svg and path_dark.png.

    Returns:
        The Axes.

    Raises:
        ValueError: If a column or the reference is missing, there is one arm only, or a seed comes twice.

    Example:
        >>> import pandas as pd
        >>> gains = {"gradual": 0.0, "instant": -0.02}
        >>> runs = [(arm, s, seed, 0.9 + gain * s + seed * s / 100) for arm, gain in gains.items()
        ...         for s in (0.5, 0.9) for seed in range(3)]
        >>> frame = pd.DataFrame(runs, columns=["method", "sparsity", "seed", "accuracy"])
        >>> ax = pu.plots.differences(frame, against="gradual")
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['instant', 'differs (p < 5 %, Holm)', 'cannot be told apart']
    """
    need(frame, by, y, *([x] if x else []))
    arms = list(frame[by].dropna().unique())
    reference = arms[0] if against is None else one_of("against", against, arms)
    if x and pd.api.types.is_float_dtype(frame[x]):
        frame = frame.assign(**{x: frame[x].round(6)})  # achieved sparsities differ in their last digits only
    table = compare(frame, by=by, value=y, within=[x] if x else [], pair_on=pair_on, against=reference, level=level)
    table = _from_reference(table, reference)
    values = table[x].unique() if x else [None]  # words stay in their order, numbers have one of their own
    in_order = sorted(values) if x and pd.api.types.is_numeric_dtype(frame[x]) else list(values)
    table = table.assign(at=table[x] if x else 0)
    names = dict(zip(in_order if x else [0], _names(in_order, frame, x)))
    shown = [arm for arm in method_styles(arms, style) if arm in set(table["arm"])]
    in_rows = len(shown) > _COLUMNS
    own, ax = ax is None, ax or style.axes((WIDTH, 0.9 + (0.12 + 0.1 * len(names)) * len(shown) if in_rows else 4.2))
    dress(ax, style, title, grid="x" if in_rows else "y")
    if in_rows:
        best = table[table["at"] == next(iter(names))].sort_values("difference", ascending=False)["arm"]
        looks = dict(zip(names, method_styles(names.values(), style).values()))
        places = {arm: place for place, arm in enumerate(dict.fromkeys([*best, *shown]))}
        handles = _draw(ax, table, "at", "arm", looks, places, style, upright=False)
        ax.set_yticks(range(len(places)), [str(arm) for arm in places])
        ax.tick_params(axis="y", length=0, labelcolor=style.text)
        ax.set_ylim(len(places) - 0.5, -0.5)
        labels = [*names.values()]
    else:
        looks, places = method_styles(arms, style), {value: place for place, value in enumerate(names)}
        handles = _draw(ax, table, "arm", "at", {arm: looks[arm] for arm in shown}, places, style, upright=True)
        columns_with_names(ax, [*names.values()])
        ax.set_xlim(-0.5, len(places) - 0.5)
        ax.set_xlabel(x.replace("_", " ") if x else "")
        labels = [*map(str, shown)]
    (ax.axvline if in_rows else ax.axhline)(0, color=style.text, linewidth=1, zorder=1.5)
    if "accuracy" in y:
        axis = ax.xaxis if in_rows else ax.yaxis
        axis.set_major_formatter(Percent("", signed=True))
        axis.set_major_locator(RoundTicks())
    unit = f"{' ' if in_rows else chr(10)}(percentage points)" if "accuracy" in y else ""
    (ax.set_xlabel if in_rows else ax.set_ylabel)(f"{y.replace('_', ' ')} minus that of {reference}{unit}")
    hollow = {"color": style.muted, "linestyle": "none", "marker": "o"}
    handles += [Line2D([], [], **hollow), Line2D([], [], markerfacecolor=style.canvas, **hollow)]
    labels += [f"differs (p < {100 * (1 - level):.2g} %, Holm)", "cannot be told apart"]
    n = sorted(set(table["n"]))
    counts = f"{n[0]}" if len(n) == 1 else f"{n[0]} to {n[-1]}"
    note = f"mean paired difference,\n{100 * level:g} % interval, n = {counts} pairs"
    legend_outside(ax, style, handles, labels, note, own)
    return ax


def _from_reference(table, reference) -> pd.DataFrame:
    """Turn all rows so that they read: arm minus reference."""
    turned = (table["a"] == reference).to_numpy()
    low = np.where(turned, -table["high"], table["low"])
    high = np.where(turned, -table["low"], table["high"])
    arm = np.where(turned, table["b"], table["a"])
    sign = np.where(turned, -1, 1)
    return table.assign(arm=arm, difference=sign * table["difference"], low=low, high=high)


def _draw(ax, table, by, along, looks, places, style, upright) -> list[Line2D]:
    """Draw a series for each look, side by side where they share a place; return what a legend shows of them."""
    for name, aside in zip(looks, (1.6 if upright else 2.2) * side_by_side(len(looks))):
        shift = (aside / 72, 0) if upright else (0, -aside / 72)
        transform = ax.transData + ScaledTranslation(*shift, ax.figure.dpi_scale_trans)
        color, marker = looks[name]["color"], looks[name]["marker"]
        for row in table[table[by] == name].itertuples():
            place = places[getattr(row, along)]
            ends = [(place, value) for value in (row.low, row.high, row.difference) if np.isfinite(value)]
            ax.update_datalim(ends if upright else [end[::-1] for end in ends])
            if np.isfinite(row.low):
                draw = ax.vlines if upright else ax.hlines
                draw(place, row.low, row.high, color=color, linewidth=1.6, transform=transform)
            face = color if row.differs else style.canvas
            point = {"marker": marker, "markerfacecolor": face, "markeredgecolor": color, "markersize": 6.5}
            point |= {"linestyle": "none", "markeredgewidth": 1.4, "transform": transform, "zorder": 3}
            ax.plot(*((place, row.difference) if upright else (row.difference, place)), **point)
    ax.autoscale_view()
    return [Line2D([], [], color=look["color"], marker=look["marker"], linestyle="none") for look in looks.values()]


def _names(values, frame, x) -> list[str]:
    """Percent for fractions, else the values as they are."""
    if x and pd.api.types.is_float_dtype(frame[x]) and min(values) >= 0 and max(values) <= 1:
        told = ([f"{100 * value:.{digits}g} %" for value in values] for digits in (3, 4, 6))
        return next((names for names in told if len(set(names)) == len(names)), [f"{100 * v} %" for v in values])
    return ["" if value is None else str(value) for value in values]
