"""Curves over runs: accuracy over sparsity, and training curves."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from .._checks import one_of, unknown
from ..experiments.statistics import summary, t_interval
from .axes import fractions_on, gather, legend, note_of, percent, sparsities_on, spread, words
from .look import WIDTH, dress, method_styles, picture

_MOST_DOTS = 30  # runs of a point


@picture
def accuracy_vs_sparsity(
    frame: pd.DataFrame,
    x: str = "sparsity",
    y: str = "accuracy",
    by: str | Sequence[str] | None = "method",
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
        frame: A row a run.
        x, y: The columns of sparsities and accuracies, fractions.
        by: The column that names the curves, several columns, or None for one curve.
        dense: The accuracy of the unpruned network, or one for each seed: a dashed line with its interval.
        scale: "linear"; "log", where 90 to 99 % have the room of 0 to 90 %; or "density", "log" naming weights left.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"sparsity": [0.5, 0.8, 0.9], "accuracy": [0.9, 0.8, 0.5]})
        >>> pu.plots.accuracy_vs_sparsity(frame, by=None, dense=0.98, scale="density").get_xlabel()
        'weights left (logarithmic)'
    """
    one_of("scale", scale, ("linear", "log", "density"))
    runs, means = tidy(frame, x, y, by)
    low, high = runs["x"].min(), runs["x"].max()
    if low < 0 or high > 1 or (scale != "linear" and high == 1):
        bound = "[0, 1]" if scale == "linear" else f'[0, 1) for scale="{scale}"'
        raise ValueError(f"{x} runs from {low:g} to {high:g}; it must lie in {bound}")
    ax = ax or style.axes((WIDTH, 4.2))
    dress(ax, style, title, grid="both")
    to_page, back = (np.asarray, np.asarray) if scale == "linear" else (spread, gather)
    ax.set_xscale("function", functions=(to_page, back))
    looks = method_styles(means["curve"], style)
    width = 0.009 * max(float(to_page(high) - to_page(low)), 0.1)
    for place, (name, look) in enumerate(looks.items()):
        aside = width * (place - (len(looks) - 1) / 2)
        own = runs[runs["curve"] == name]
        own = own.assign(x=back(to_page(own["x"]) + aside))
        draw_curve(ax, own, look, "bars")
        if 1 < means["n"].max() <= _MOST_DOTS:
            ax.scatter(own["x"], own["y"], s=16, color=look["color"], alpha=0.5, linewidths=0, zorder=1.8)
    level = [] if dense is None else [reference_line(ax, style, dense, "dense")]
    sparsities_on(ax, scale, words(x), high)
    _finish(ax, style, y, looks, note_of(means["n"], frame.columns), level)
    return ax


@picture
def curves(
    frame: pd.DataFrame,
    x: str = "epoch",
    y: str = "test_accuracy",
    by: str | Sequence[str] | None = None,
    *,
    title,
    ax,
    style,
) -> Axes:
    """Draw curves such as those of training: `y` over `x`, a line for each `by`, with its t-interval over seeds.

    Args:
        frame: A row for each run and place on `x`, such as the tables of `fit` and `gradual` put together.
        x, y: The column to go along, such as epochs, and the one to show.
        by: The column that names the curves, several columns, or None for one curve.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"epoch": [1, 2, 3], "test_accuracy": [0.7, 0.8, 0.85]})
        >>> pu.plots.curves(frame).get_ylabel()
        'test accuracy'
    """
    runs, means = tidy(frame, x, y, by)
    looks = {name: look | {"marker": None} for name, look in method_styles(means["curve"], style).items()}
    ax = ax or style.axes((WIDTH, 4.2))
    dress(ax, style, title, grid="y")
    for name, look in looks.items():
        draw_curve(ax, runs[runs["curve"] == name], look, "band")
    if pd.api.types.is_integer_dtype(frame[x]):
        ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    ax.set_xlabel(words(x))
    _finish(ax, style, y, looks, note_of(means["n"], frame.columns))
    return ax


def need(frame: pd.DataFrame, *columns: str) -> None:
    """Raise ValueError unless the frame has these columns and at least one row."""
    for column in columns:
        if column not in frame.columns:
            raise unknown("column", column, frame.columns)
    if frame.empty:
        raise ValueError("the table has no rows")


def tidy(frame: pd.DataFrame, x: str, y: str, by) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Check runs; return them as columns curve, x and y, and the mean and n of each point."""
    by = [by] if isinstance(by, str) else list(by or ())
    need(frame, x, y, *by)
    frame = frame.dropna(subset=[x]).round({x: 6})  # achieved sparsities differ in their last digits only
    summary(frame, [*by, x], y)  # checks that no seed comes twice in a point and that no sizes mix
    frame = frame.dropna(subset=[y])
    if frame.empty:
        raise ValueError(f"no row has both {x!r} and {y!r}")
    curve = frame[by].astype(str).agg(", ".join, axis=1) if len(by) > 1 else frame[by[0]] if by else words(y)
    runs = pd.DataFrame({"curve": curve, "x": frame[x], "y": frame[y]}, index=frame.index)
    return runs, runs.groupby(["curve", "x"], sort=False)["y"].agg(mean="mean", n="size").reset_index()


def draw_curve(ax, runs, look, how) -> None:
    """Draw the means of one curve with their intervals, as bars or as a band."""
    edge = {"markeredgecolor": ax.get_facecolor(), "markeredgewidth": 0.6}
    error = {"capsize": 3, "elinewidth": 1, "capthick": 1} if how == "bars" else {"alpha": 0.15}
    drawn = {"errorbar": t_interval, "err_style": how, "err_kws": error, "legend": False}
    sns.lineplot(runs, x="x", y="y", ax=ax, **drawn, **look, **edge)


def reference_line(ax, style, values, label) -> Line2D:
    """Draw a dashed line at the mean of one or several values, with their t-interval, and name it."""
    values = np.atleast_1d(np.asarray(values, float))
    mean, (low, high) = values.mean(), t_interval(values)
    text = f"{label} {percent(mean, 1)}" if 0 <= mean <= 1 else f"{label} {mean:.4g}"
    if math.isfinite(low):
        ax.axhspan(low, high, color=style.muted, alpha=0.15, linewidth=0, zorder=0.5)
    return ax.axhline(mean, color=style.muted, linewidth=1, linestyle=(0, (4, 3)), zorder=1, label=text)


def _finish(ax, style, y, looks, note, more=()) -> None:
    """Label the y axis and put the legend of the curves and reference lines beside them."""
    ax.set_ylabel(words(y))
    if "accuracy" in y:
        fractions_on(ax.yaxis)
    handles = [Line2D([], [], label=str(name), **look) for name, look in looks.items()] if len(looks) > 1 else []
    legend(ax, style, [*handles, *more], note)
