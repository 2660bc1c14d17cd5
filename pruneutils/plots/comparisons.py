"""Pictures of comparisons: a dot for every run, and paired differences to a reference."""

import textwrap
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from .._checks import one_of
from ..experiments.statistics import compare, t_interval
from .axes import fractions_on, legend, n_of, note_of, points, words
from .curves import need, reference_line
from .look import WIDTH, dress, method_styles, picture

_COLUMNS = 8  # arms beside each other; with more of them, colours would come twice


@picture
def dots(
    frame: pd.DataFrame,
    x: str = "method",
    y: str = "accuracy",
    by: str | None = None,
    *,
    reference: float | Sequence[float] | Mapping[str, float | Sequence[float]] | None = None,
    interval: bool = True,
    title,
    ax,
    style,
) -> Axes:
    """Draw a dot for every run at each value of `x`, and beside them the mean with its interval.

    Args:
        frame: A row a run.
        x, y: The column whose values lie beside each other, and the column to show.
        by: The column that gives the colours; by default that of `x`.
        reference: A value, or one for each seed, drawn as a dashed line named "dense"; {name: value} for other names.
        interval: Draw the mean with its 95 % t-interval; leave it out where some runs learn and others do not.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"method": ["snip", "random"] * 3, "accuracy": [0.8, 0.7, 0.9, 0.6, 0.8, 0.8]})
        >>> pu.plots.dots(frame, reference=0.92).get_legend().get_texts()[0].get_text()
        'dense 92.0 %'
    """
    need(frame, x, y, *([by] if by else []))
    frame = frame.dropna(subset=[x, y])
    hue = by or x
    order, looks = _in_order(frame[x]), method_styles(frame[hue], style)
    names = [textwrap.fill(name, max(8, 80 // len(order)), break_long_words=False) for name in _names(order)]
    frame = frame.assign(place=frame[x].map(dict(zip(order, names))))
    ax = ax or style.axes((WIDTH, 4.2))
    dress(ax, style, title, grid="y")
    width = 0.8 - 0.8 / len(looks) if by and len(looks) > 1 else False
    shared = {"data": frame, "x": "place", "y": y, "order": names, "hue": hue, "hue_order": list(looks)}
    shared |= {"palette": {name: look["color"] for name, look in looks.items()}, "legend": False, "ax": ax}
    sns.swarmplot(**shared, dodge=bool(width), size=4.5, alpha=0.6, warn_thresh=1, zorder=2)
    if interval:
        marks = {"markers": [look["marker"] for look in looks.values()] if by else "_", "markersize": 6 if by else 22}
        error = {"errorbar": t_interval, "capsize": 0.06, "err_kws": {"linewidth": 1.4}}
        edge = {"markeredgecolor": style.text, "markeredgewidth": 0.8, "zorder": 3} if by else {}
        sns.pointplot(**shared, dodge=width, linestyles="none", **marks, **error, **edge)
    named = reference if isinstance(reference, Mapping) else {} if reference is None else {"dense": reference}
    handles = [reference_line(ax, style, values, name) for name, values in named.items()]
    ax.set(xlabel=words(x), ylabel=words(y))
    if max(len(word) for name in names for word in name.split("\n")) * len(names) > 95:
        ax.set_xticks(ax.get_xticks(), names, rotation=30, ha="right", rotation_mode="anchor")
    if "accuracy" in y:
        fractions_on(ax.yaxis)
    if by:
        marks = [look | {"linestyle": "none", "label": str(name)} for name, look in looks.items()]
        handles = [Line2D([], [], **mark) for mark in marks] + handles
    counts = frame.groupby([x, hue] if by else x)[y].size()
    note = note_of(counts, frame.columns) if interval else ""
    legend(ax, style, handles, note)
    return ax


@picture
def differences(
    frame: pd.DataFrame,
    by: str = "method",
    x: str | None = "sparsity",
    value: str = "accuracy",
    *,
    against: Hashable | None = None,
    pair_on: str | Sequence[str] = "seed",
    level: float = 0.95,
    title,
    ax,
    style,
) -> Axes:
    """Draw how far each arm lies above or below a reference: the mean paired difference with its interval.

    Filled points differ from the reference by the test of `pu.statistics.compare`, corrected over all points of the
    picture; hollow ones cannot be told apart. More than eight arms get a row each, and the values of `x` the colours.

    Args:
        frame: A row a run.
        by: The column that names the arms.
        x: The column at whose values arms are compared one by one, such as the sparsity; None for one comparison.
        value: The column to compare; differences of an accuracy are shown in percentage points.
        against: The reference arm; by default the one that comes first in the frame.
        pair_on, level: The columns that make two runs a pair, and the coverage of the intervals and the test.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"method": ["snip", "random"] * 3, "seed": [0, 0, 1, 1, 2, 2]})
        >>> frame["accuracy"] = [0.8, 0.7, 0.9, 0.6, 0.8, 0.8]
        >>> pu.plots.differences(frame, x=None, against="random").get_ylabel()
        'accuracy minus that of random\\n(percentage points)'
    """
    need(frame, by, value, *([x] if x else []))
    arms = list(frame[by].dropna().unique())
    against = arms[0] if against is None else one_of("against", against, arms)
    if x and pd.api.types.is_float_dtype(frame[x]):
        frame = frame.assign(**{x: frame[x].round(6)})  # achieved sparsities differ in their last digits only
    pairs = [(arm, against) for arm in arms if arm != against] or against
    within = [x] if x else []
    table = compare(frame, by=by, value=value, within=within, pair_on=pair_on, against=pairs, level=level)
    at = _in_order(table[x]) if x else [""]
    names = _names(at)
    table = table.rename(columns={"a": "arm"}).assign(at=table[x].map(dict(zip(at, names))) if x else "")
    shown = [arm for arm in method_styles(arms, style) if arm in set(table["arm"])]
    in_rows = len(shown) > _COLUMNS
    ax = ax or style.axes((WIDTH, 1.1 + (0.14 + 0.1 * len(names)) * len(shown) if in_rows else 4.2))
    dress(ax, style, title, grid="x" if in_rows else "y")
    if in_rows:
        best = table[table["at"] == names[0]].sort_values("difference", ascending=False)["arm"]
        places, looks = list(dict.fromkeys([*best, *shown])), method_styles(names, style)
    else:
        places, looks = names, {arm: method_styles(arms, style)[arm] for arm in shown}
    handles = _draw_differences(ax, table, looks, places, style, in_rows)
    along, across = (ax.yaxis, ax.xaxis) if in_rows else (ax.xaxis, ax.yaxis)
    along.set_ticks(range(len(places)), [str(place) for place in places])
    unit = f"{' ' if in_rows else chr(10)}(percentage points)" if "accuracy" in value else ""
    across.set_label_text(f"{words(value)} minus that of {against}{unit}")
    if "accuracy" in value:
        across.set_major_formatter(points)
    if in_rows:
        ax.set_ylim(len(places) - 0.5, -0.5)
        ax.tick_params(axis="y", labelcolor=style.text)
    else:
        ax.set(xlim=(-0.5, len(places) - 0.5), xlabel=words(x) if x else "")
    mark = {"color": style.muted, "linestyle": "none", "marker": "o"}
    handles.append(Line2D([], [], label=f"differs (p < {100 * (1 - level):.2g} %, Holm)", **mark))
    handles.append(Line2D([], [], label="cannot be told apart", markerfacecolor=style.canvas, **mark))
    legend(ax, style, handles, f"mean paired difference,\n{100 * level:g} % interval,\n{n_of(table['n'], 'pairs')}")
    return ax


def _draw_differences(ax, table, looks, places, style, in_rows) -> list[Line2D]:
    """Draw each series, side by side where they share a place; return what a legend shows of them."""
    series, along = ("at", "arm") if in_rows else ("arm", "at")
    handles = []
    (ax.axvline if in_rows else ax.axhline)(0, color=style.text, linewidth=1, zorder=1.5)
    for number, (name, look) in enumerate(looks.items()):
        aside = (number - (len(looks) - 1) / 2) * 0.7 / max(len(looks), 4)
        rows = table[table[series] == name]
        at = [places.index(place) + aside for place in rows[along]]
        error = np.nan_to_num([rows["difference"] - rows["low"], rows["high"] - rows["difference"]])
        value, spread = ("x", "xerr") if in_rows else ("y", "yerr")
        data = {value: rows["difference"], "y" if in_rows else "x": at}
        ax.errorbar(**data, **{spread: error}, color=look["color"], fmt="none", elinewidth=1.6)
        faces = [look["color"] if differs else style.canvas for differs in rows["differs"]]
        mark = {"marker": look["marker"], "edgecolors": look["color"], "s": 42, "linewidths": 1.4, "zorder": 3}
        ax.scatter(**data, c=faces, **mark)
        handles.append(Line2D([], [], **look | {"linestyle": "none", "label": str(name)}))
    return handles if looks.keys() != {""} else []


def _in_order(column) -> list:
    """The values of a column: numbers sorted, words in the order of their appearance."""
    values = list(column.unique())
    return sorted(values) if pd.api.types.is_numeric_dtype(column) else values


def _names(values) -> list[str]:
    """Percent for fractions, with as few digits as tell them apart, else the values as they are."""
    if all(isinstance(value, float) and 0 <= value <= 1 for value in values):
        for digits in (3, 4, 6):
            names = [f"{100 * value:.{digits}g} %" for value in values]
            if len(set(names)) == len(names):
                return names
    return [str(value) for value in values]
