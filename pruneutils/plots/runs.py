"""Pictures of runs: accuracy over sparsity, training curves, a dot for every run, and paired differences."""

import math
import textwrap
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from .._checks import one_of
from ..experiments.statistics import compare, summary, t_interval
from .look import WIDTH, Style, dress, method_styles, percent, picture, short

_MOST_DOTS = 30  # runs of a point
_LEAST = 3  # runs that make an interval; that of two is 13 times as wide as they lie apart


@picture
def accuracy_vs_sparsity(
    frame: pd.DataFrame,
    x: str = "sparsity",
    y: str = "accuracy",
    by: str | None = "method",
    *,
    dense: float | Sequence[float] | None = None,
    scale: str = "log",
    title,
    ax,
    style,
) -> Axes:
    """Draw accuracy over sparsity: a curve for each `by` with its 95 % t-interval, and a dot for every run.

    Curves lie a little aside, so that none hides another; where a point has more than 30 runs there are no dots.

    Args:
        frame, x, y: A table with a row a run, and its columns of sparsities and accuracies, fractions.
        by: The column that names the curves, or None for one curve.
        dense: The accuracy of the unpruned network, or one for each seed: a dashed line with its interval.
        scale: "linear"; "log", where 90 to 99 % have the room of 0 to 90 %; or "density", "log" naming weights left.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"sparsity": [0.5, 0.8, 0.9], "accuracy": [0.9, 0.8, 0.5]})
        >>> pu.plots.accuracy_vs_sparsity(frame, by=None, dense=0.98, scale="density").get_xlabel()
        'weights left (logarithmic)'
    """
    one_of("scale", scale, ("linear", "log", "density"))
    runs, means = _tidy(frame, x, y, by)
    low, high = runs["x"].min(), runs["x"].max()
    if low < 0 or high > 1 or (scale != "linear" and high == 1):
        bound = "[0, 1]" if scale == "linear" else f'[0, 1) for scale="{scale}"'
        raise ValueError(f"{x} runs from {low:g} to {high:g}; it must lie in {bound}")
    ax = ax or style.axes((WIDTH, 4.2))
    dress(ax, style, title, grid="both")
    to_page, back = np.asarray, np.asarray
    if scale != "linear":
        to_page, back = spread, lambda place: 1 - 10.0 ** -np.asarray(place, float)
    ax.set_xscale("function", functions=(to_page, back))
    looks = method_styles(means["curve"], style)
    width = 0.009 * max(float(to_page(high) - to_page(low)), 0.1)
    for place, (name, look) in enumerate(looks.items()):
        aside = width * (place - (len(looks) - 1) / 2)
        own = runs[runs["curve"] == name]
        own = own.assign(x=back(to_page(own["x"]) + aside))
        _draw_curve(ax, own, look, "bars")
        if 1 < means["n"].max() <= _MOST_DOTS:
            ax.scatter(own["x"], own["y"], s=16, color=look["color"], alpha=0.5, linewidths=0, zorder=1.8)
    level = [] if dense is None else [_reference_line(ax, style, dense, "dense")]
    _sparsities_on(ax, scale, _words(x), high)
    _finish(ax, style, y, looks, means["n"], frame.columns, level)
    return ax


@picture
def curves(
    frame: pd.DataFrame, x: str = "epoch", y: str = "test_accuracy", by: str | None = None, *, title, ax, style
) -> Axes:
    """Draw curves such as those of training: `y` over `x`, a line for each `by`, with its t-interval over seeds.

    Args:
        frame: A row for each run and place on `x`, such as the tables of `fit` and `gradual` put together.
        x, y: The column to go along, such as epochs, and the one to show.
        by: The column that names the curves, or None for one curve.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"epoch": [1, 2, 3], "test_accuracy": [0.7, 0.8, 0.85]})
        >>> pu.plots.curves(frame).get_ylabel()
        'test accuracy'
    """
    runs, means = _tidy(frame, x, y, by)
    looks = {name: look | {"marker": None} for name, look in method_styles(means["curve"], style).items()}
    ax = ax or style.axes((WIDTH, 4.2))
    dress(ax, style, title, grid="y")
    for name, look in looks.items():
        _draw_curve(ax, runs[runs["curve"] == name], look, "band")
    if pd.api.types.is_integer_dtype(frame[x]):
        ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    ax.set_xlabel(_words(x))
    _finish(ax, style, y, looks, means["n"], frame.columns)
    return ax


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
        frame, x, y: A row a run; the column whose values lie beside each other, and the column to show.
        by: The column that gives the colours; by default that of `x`.
        reference: A value, or one for each seed, drawn as a dashed line named "dense"; {name: value} for other names.
        interval: Draw the mean, and of three runs or more its 95 % t-interval; leave it out where only some runs learn.

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
        error = {"errorbar": lambda values: t_interval(values) if len(values) >= _LEAST else (np.nan, np.nan)}
        error |= {"capsize": 0.06, "err_kws": {"linewidth": 1.4}}
        edge = {"markeredgecolor": style.text, "markeredgewidth": 0.8, "zorder": 3} if by else {}
        sns.pointplot(**shared, dodge=width, linestyles="none", **marks, **error, **edge)
    named = reference if isinstance(reference, Mapping) else {} if reference is None else {"dense": reference}
    handles = [_reference_line(ax, style, values, name) for name, values in named.items()]
    ax.set_xlabel(_words(x))
    _label_y(ax, y)
    if max(len(word) for name in names for word in name.split("\n")) * len(names) > 95:
        ax.set_xticks(ax.get_xticks(), names, rotation=30, ha="right", rotation_mode="anchor")
    if by:
        marks = [look | {"linestyle": "none", "label": str(name)} for name, look in looks.items()]
        handles = [Line2D([], [], **mark) for mark in marks] + handles
    counts = frame.groupby([x, hue] if by else x)[y].size()
    note = f"dots: {_n_of(counts, frame.columns)}" if max(counts) > 1 else ""
    if interval and note:
        note += "\nmarks: mean" + ", 95 % t-interval" * (max(counts) >= _LEAST)
        note += "\nof three or more" * (min(counts) < _LEAST <= max(counts))
    _legend(ax, style, handles, note)
    return ax


@picture
def differences(
    frame: pd.DataFrame,
    by: str = "method",
    x: str | None = "sparsity",
    value: str = "accuracy",
    *,
    against: Hashable | None = None,
    title,
    ax,
    style,
) -> Axes:
    """Draw how far each arm lies above or below a reference: the mean paired difference with its interval.

    Filled points differ from the reference by the test of `pu.statistics.compare`, corrected over all points of the
    picture; hollow ones show no difference.

    Args:
        frame, by: A row a run, and the column that names the arms.
        x: The column at whose values arms are compared one by one, such as the sparsity; None for one comparison.
        value: The column to compare; differences of an accuracy are shown in percentage points.
        against: The reference arm; by default the one that comes first in the frame.

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
    table = compare(frame, by=by, value=value, within=[x] if x else [], against=pairs)
    at = _in_order(table[x]) if x else [""]
    names = _names(at)
    table = table.rename(columns={"a": "arm"}).assign(at=table[x].map(dict(zip(at, names))) if x else "")
    looks = {arm: look for arm, look in method_styles(arms, style).items() if arm in set(table["arm"])}
    ax = ax or style.axes((WIDTH, 4.2))
    dress(ax, style, title, grid="y")
    ax.axhline(0, color=style.text, linewidth=1, zorder=1.5)
    for number, (arm, look) in enumerate(looks.items()):
        rows, aside = table[table["arm"] == arm], (number - (len(looks) - 1) / 2) * 0.7 / max(len(looks), 4)
        places, mean = [names.index(name) + aside for name in rows["at"]], rows["difference"]
        error = np.nan_to_num([mean - rows["low"], rows["high"] - mean])
        ax.errorbar(places, mean, error, color=look["color"], fmt="none", elinewidth=1.6)
        faces = [look["color"] if differs else style.canvas for differs in rows["differs"]]
        mark = {"marker": look["marker"], "edgecolors": look["color"], "s": 42, "linewidths": 1.4, "zorder": 3}
        ax.scatter(places, mean, c=faces, **mark)
    ax.set_xticks(range(len(names)), names)
    label = f"{_words(value)} minus that of {against}" + "\n(percentage points)" * ("accuracy" in value)
    ax.set(xlim=(-0.5, len(names) - 0.5), xlabel=_words(x or ""), ylabel=label)
    if "accuracy" in value:
        ax.yaxis.set_major_formatter(lambda gap, _: f"{100 * gap:+.4g}".replace("-", "−") if abs(gap) > 1e-9 else "0")
    handles = [Line2D([], [], **look | {"linestyle": "none", "label": str(arm)}) for arm, look in looks.items()]
    mark = {"color": style.muted, "linestyle": "none", "marker": "o"}
    handles.append(Line2D([], [], label="differs (p < 5 %, Holm)", **mark))
    handles.append(Line2D([], [], label="no difference shown", markerfacecolor=style.canvas, **mark))
    _legend(ax, style, handles, f"mean paired difference,\n95 % interval,\n{_n_of(table['n'], 'pairs')}")
    return ax


def need(frame: pd.DataFrame, *columns: str) -> None:
    """Raise ValueError unless the frame has these columns and at least one row."""
    for column in columns:
        one_of("column", column, frame.columns)
    if frame.empty:
        raise ValueError("the table has no rows")


def _tidy(frame: pd.DataFrame, x: str, y: str, by: str | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Check runs; return them as columns curve, x and y, and the mean and n of each point."""
    need(frame, x, y, *([by] if by else []))
    frame = frame.dropna(subset=[x]).round({x: 6})  # achieved sparsities differ in their last digits only
    summary(frame, [by, x] if by else [x], y)  # checks that no seed comes twice in a point
    frame = frame.dropna(subset=[y])
    if frame.empty:
        raise ValueError(f"no row has both {x!r} and {y!r}")
    runs = pd.DataFrame({"curve": frame[by] if by else _words(y), "x": frame[x], "y": frame[y]}, index=frame.index)
    return runs, runs.groupby(["curve", "x"], sort=False)["y"].agg(mean="mean", n="size").reset_index()


def _draw_curve(ax, runs, look, how) -> None:
    """Draw the means of one curve with their intervals, as bars or as a band."""
    edge = {"markeredgecolor": ax.get_facecolor(), "markeredgewidth": 0.6}
    error = {"capsize": 3, "elinewidth": 1, "capthick": 1} if how == "bars" else {"alpha": 0.15}
    drawn = {"errorbar": t_interval, "err_style": how, "err_kws": error, "legend": False}
    sns.lineplot(runs, x="x", y="y", ax=ax, **drawn, **look, **edge)


def _reference_line(ax, style, values, label) -> Line2D:
    """Draw a dashed line at the mean of one or several values, with their t-interval, and name it."""
    values = np.atleast_1d(np.asarray(values, float))
    mean, (low, high) = values.mean(), t_interval(values)
    text = f"{label} {percent(mean, 1)}" if 0 <= mean <= 1 else f"{label} {mean:.4g}"
    if math.isfinite(low):
        ax.axhspan(low, high, color=style.muted, alpha=0.15, linewidth=0, zorder=0.5)
    return ax.axhline(mean, color=style.muted, linewidth=1, linestyle=(0, (4, 3)), zorder=1, label=text)


def _finish(ax, style, y, looks, counts, columns, more=()) -> None:
    """Label the y axis and put the legend of the curves and reference lines beside them."""
    _label_y(ax, y)
    handles = [Line2D([], [], label=str(name), **look) for name, look in looks.items()] if len(looks) > 1 else []
    note = f"mean, 95 % t-interval,\n{_n_of(counts, columns)}" if max(counts) > 1 else ""
    _legend(ax, style, [*handles, *more], note)


def _in_order(column) -> list:
    """The values of a column: numbers sorted, words in the order of their appearance."""
    values = list(column.unique())
    return sorted(values) if pd.api.types.is_numeric_dtype(column) else values


def _names(values) -> list[str]:
    """Percent for fractions, with as few digits as distinguish them, else the values as they are."""
    if not all(isinstance(value, float) and 0 <= value <= 1 for value in values):
        return [str(value) for value in values]
    tried = [[f"{100 * value:.{digits}g} %" for value in values] for digits in (3, 4, 6)]
    return next((names for names in tried if len(set(names)) == len(names)), tried[-1])


def _words(column: str) -> str:
    return column.replace("_", " ")


def spread(sparsity) -> np.ndarray:
    """Return -log10(density): as far from 0.9 to 0.99 as from 0 to 0.9."""
    return -np.log10(np.maximum(1 - np.asarray(sparsity, float), 1e-12))


def _label_y(ax: Axes, column: str) -> None:
    """Name the y axis; accuracies are shown in percent, and there is no room for those that cannot be."""
    ax.set_ylabel(_words(column))
    if "accuracy" in column:
        ax.yaxis.set_major_formatter(short)
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, -0.03), min(high, 1.03))


def _sparsities_on(ax: Axes, scale: str, label: str, largest: float) -> None:
    """Give the x axis ticks for sparsities on this scale, and say in its label which scale it is."""
    kept = scale == "density"
    ax.xaxis.set_major_formatter(lambda sparsity, _: short(1 - sparsity if kept else sparsity))
    if scale != "linear":
        decades = math.ceil(spread(largest) + 1e-9)
        steps = (1, 0.5, 0.2) if decades <= 3 else (1,)
        ticks = 1 - np.array([step * 10.0**-decade for decade in range(decades + 1) for step in steps])
        low, high = ax.get_xlim()
        ax.set_xticks([tick for tick in ticks.round(decades + 1) if low <= tick <= high])
        ax.minorticks_off()
        ax.set_xlim(low, high)
        label = "weights left (logarithmic)" if kept else f"{label} (log scale of the weights left)"
    ax.set_xlabel(label)


def _legend(ax: Axes, style: Style, handles: Sequence, note: str) -> None:
    """Put a legend with a note as its head to the right of the Axes; long labels are broken into lines."""
    if handles or note:
        labels = [textwrap.fill(handle.get_label(), 26) for handle in handles]
        place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "borderaxespad": 0, "alignment": "left"}
        drawn = ax.legend(handles, labels, title=note or None, handlelength=2.6, **place)
        drawn.get_title().set_color(style.muted)


def _n_of(counts: pd.Series, what: str | Sequence[str]) -> str:
    """Write how many there are, such as "n = 3 to 5 seeds": of what, or of the rows of a table with these columns."""
    if not isinstance(what, str):
        what = next((f"{name}s" for name in ("image", "seed") if name in what), "runs")
    low, high = min(counts), max(counts)
    return f"n = {low if low == high else f'{low} to {high}'} {what}"
