"""Curves over runs: accuracy over sparsity, training curves, accuracy over computation."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.transforms import ScaledTranslation

from .._checks import one_of, unknown
from .legends import legend_outside, shrink
from .look import WIDTH, Style, dress, method_styles, picture
from .tables import groups_of, note_of
from .ticks import EachPercent, Percent, RoundTicks, SparsityTicks, fractions_on_y, gather, logarithmic, spread

_SCALES = ("linear", "log")


@picture
def accuracy_vs_sparsity(
    frame: pd.DataFrame,
    x: str = "sparsity",
    y: str = "accuracy",
    by: str | Sequence[str] | None = "method",
    *,
    interval: str = "t",
    bands: bool = False,
    dense: float | Sequence[float] | None = None,
    scale: str = "log",
    title: str | None = None,
    ax: Axes | None = None,
    style: str | Style | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Draw accuracy over sparsity, a curve for each `by`, with its interval over seeds; the legend states which and n.

    Args:
        frame: A row a run.
        x: The column of sparsities, fractions.
        y: The column of accuracies, fractions.
        by: The column that names the curves, several columns, or None for one curve.
        interval: "t" or "bootstrap" (95 %, of the mean) or "minmax" (the smallest and largest run).
        bands: Draw intervals as bands. By default they are bars, those of several curves a few points apart.
        dense: The accuracy of the unpruned network, or one for each seed: a dashed line with its interval.
        scale: "log", of the density, so that 0.9, 0.95 and 0.98 are apart; or "linear".
        title: The headline.
        ax: The Axes to draw into.
        style: "light" or "dark".
        save: A path without suffix; writes path.png, path.svg and path_dark.png.

    Returns:
        The Axes.

    Raises:
        ValueError: If a column is missing, a point holds several sizes or a seed twice, or a sparsity is outside
            [0, 1], on the log scale outside [0, 1).

    Example:
        >>> import pandas as pd
        >>> runs = [("snip", s, seed, 1 - s**4 - seed / 50) for s in (0.5, 0.8, 0.9) for seed in range(3)]
        >>> frame = pd.DataFrame(runs, columns=["method", "sparsity", "seed", "accuracy"])
        >>> ax = pu.plots.accuracy_vs_sparsity(frame, dense=0.98)
        >>> ax.get_xlabel()
        'sparsity (log scale of the weights kept)'
    """
    one_of("scale", scale, _SCALES)
    groups = groups_of(frame, x, y, by, interval)
    places = np.unique(np.concatenate([group["x"] for group in groups.values()]))
    if places[0] < 0 or places[-1] > 1 or (scale == "log" and places[-1] == 1):
        raise ValueError(
            f'{x} runs from {places[0]:g} to {places[-1]:g}; it must lie in [0, 1], below 1 if scale="log"'
        )
    own, ax = ax is None, ax or style.axes((WIDTH, 4.2))
    dress(ax, style, title, grid="both")
    label = x.replace("_", " ")
    if scale == "log":
        ax.set_xscale("function", functions=(spread, gather))
        label += " (log scale of the weights kept)"
    looks = method_styles(groups, style)
    names = sorted(groups, key=list(looks).index)
    for name, aside in zip(names, side_by_side(len(names))):
        draw_points(ax, groups[name], looks[name], str(name), bands, aside)
    if dense is not None:
        _level(ax, dense, interval, style)
    ax.xaxis.set_major_formatter(EachPercent() if scale == "log" else Percent())
    ax.xaxis.set_major_locator(SparsityTicks(places) if scale == "log" else RoundTicks())
    ax.minorticks_off()
    ax.set_xlabel(label)
    _y_axis(ax, y)
    _legend(ax, style, groups, interval, frame, own)
    return ax


def _level(ax, dense, interval, style):
    """The accuracy of the unpruned network: a line across, with its interval over seeds."""
    runs = pd.DataFrame({"dense": True, "value": np.atleast_1d(np.asarray(dense, float))})
    (level,) = groups_of(runs, "dense", "value", None, interval).values()
    mean, low, high = level[["mean", "low", "high"]].iloc[0]
    look = {"color": style.muted, "linewidth": 1, "linestyle": (0, (4, 3)), "label": f"dense {100 * mean:.1f} %"}
    ax.axhline(mean, zorder=1, **look)
    if math.isfinite(low):
        ax.axhspan(low, high, color=style.muted, alpha=0.15, linewidth=0, zorder=0.5)


@picture
def curves(
    frame: pd.DataFrame,
    x: str = "epoch",
    y: str = "test_accuracy",
    by: str | Sequence[str] | None = None,
    *,
    interval: str = "t",
    events: Sequence | Mapping | None = None,
    xscale: str = "linear",
    yscale: str = "linear",
    title: str | None = None,
    ax: Axes | None = None,
    style: str | Style | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Draw training curves: `y` over `x`, a line for each `by`, with a band over seeds and a mark at each pruning.

    Args:
        frame: A row for each run and place on `x`, such as the tables of `fit` and `gradual` put together.
        x: The column to go along, such as epochs.
        y: The column to show.
        by: The column that names the curves, several columns, or None for one curve.
        interval: As in `accuracy_vs_sparsity`.
        events: Places on `x` where weights were pruned, marked above the curves, or {name: places}. By default those
            where the column `sparsity`, if there is one, has grown.
        xscale: "linear" or "log".
        yscale: "linear" or "log".
        title: The headline.
        ax: The Axes to draw into.
        style: "light" or "dark".
        save: A path without suffix; writes path.png, path.svg and path_dark.png.

    Returns:
        The Axes.

    Raises:
        ValueError: As `accuracy_vs_sparsity` does, and if `events` names a curve that is not there.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"epoch": [1, 2, 3], "test_accuracy": [0.7, 0.8, 0.85]})
        >>> ax = pu.plots.curves(frame, events=[2])
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('epoch', 'test accuracy')
    """
    one_of("xscale", xscale, _SCALES), one_of("yscale", yscale, _SCALES)
    groups = groups_of(frame, x, y, by, interval)
    if events is None:
        told = "sparsity" in frame.columns and "sparsity" not in (x, y)
        growth = groups_of(frame, x, "sparsity", by, interval) if told else {}
        # without `by` a curve bears the name of its column
        events = _prunings(growth if by else dict(zip(groups, growth.values())))
    elif not isinstance(events, Mapping):
        events = dict.fromkeys(groups, events)
    for name in events:
        if name not in groups:
            raise unknown("curve in events", name, groups)
    own, ax = ax is None, ax or style.axes((WIDTH, 4.2))
    dress(ax, style, title, grid="y")
    ax.set(xscale=xscale, yscale=yscale)
    looks = method_styles(groups, style)
    names = sorted(groups, key=list(looks).index)
    for name in names:
        draw_points(ax, groups[name], looks[name] | {"marker": None}, str(name), bands=True, pale=len(names) > 2)
    if xscale == "linear":
        ax.xaxis.set_major_locator(RoundTicks(integer=pd.api.types.is_integer_dtype(frame[x])))
    ax.set_xlabel(x.replace("_", " ") + (" (log scale)" if xscale == "log" else ""))
    _y_axis(ax, y, yscale)
    rows = [name for name in names if len(events.get(name, ()))]
    for row, name in enumerate(rows):  # one above the other, as methods prune at the same epochs; outside of the curves
        low, high = 1.012 + 0.03 * row, 1.034 + 0.03 * row
        look = {"color": looks[name]["color"], "linewidth": 2, "transform": ax.get_xaxis_transform()}
        ax.vlines(events[name], low, high, clip_on=False, **look)
    if rows:
        ax.plot([], [], linestyle="none", marker="|", color=style.muted, markeredgewidth=2, label="pruned (above)")
        ax.set_title(ax.get_title("left"), y=1, pad=10 + 8 * len(rows), wrap=True)
        shrink(ax, top=8 * len(rows))
    _legend(ax, style, groups, interval, frame, own)
    return ax


def _prunings(groups) -> dict:
    """{name: the places at which the mean sparsity has grown}"""
    return {
        name: group["x"][group["mean"].diff().fillna(group["mean"]) > 1e-9].tolist() for name, group in groups.items()
    }


@picture
def accuracy_vs_flops(
    frame: pd.DataFrame,
    x: str = "flops",
    y: str = "accuracy",
    by: str | Sequence[str] | None = "method",
    at: str = "sparsity",
    *,
    interval: str = "t",
    title: str | None = None,
    ax: Axes | None = None,
    style: str | Style | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Draw accuracy over computation, a point for each `by` and value of `at`, and the Pareto front of the means.

    Args:
        frame: A row a run.
        x: The column of costs, such as FLOPs, averaged over the runs of a point.
        y: The column of accuracies, fractions.
        by: The column that names the curves, several columns, or None for one curve.
        at: The column whose values make a point: runs at the same one belong together.
        interval: As in `accuracy_vs_sparsity`.
        title: The headline.
        ax: The Axes to draw into.
        style: "light" or "dark".
        save: A path without suffix; writes path.png, path.svg and path_dark.png.

    Returns:
        The Axes.

    Raises:
        ValueError: As `accuracy_vs_sparsity` does.

    Example:
        >>> import pandas as pd
        >>> runs = [("snip", s, 0, 1e6 * (1 - s), 1 - s**4) for s in (0.5, 0.8, 0.98)]
        >>> frame = pd.DataFrame(runs, columns=["method", "sparsity", "seed", "flops", "accuracy"])
        >>> pu.plots.accuracy_vs_flops(frame).get_xlabel()
        'FLOPs (log scale)'
    """
    groups = groups_of(frame, x, y, by, interval, at)
    own, ax = ax is None, ax or style.axes((WIDTH, 4.2))
    dress(ax, style, title, grid="both")
    points = pd.concat(groups.values(), ignore_index=True)
    front = points.iloc[pareto_front(points["x"], points["mean"])]
    start, end = points["x"].min(), points["x"].max()
    ax.plot([*front["x"], end], [*front["mean"], front["mean"].iloc[-1]], drawstyle="steps-post", color=style.muted,
            linewidth=5, alpha=0.35, solid_capstyle="round", zorder=1, label="Pareto front of the means")  # fmt: skip
    looks = method_styles(groups, style)
    for name in sorted(groups, key=list(looks).index):
        draw_points(ax, groups[name], looks[name] | {"linewidth": 1}, str(name))
    label = "FLOPs" if x == "flops" else x.replace("_", " ")
    if start > 0 and end / start > 8:
        ax.set_xscale("log")
        logarithmic(ax.xaxis, start, end)
        label += " (log scale)"
    else:
        ax.xaxis.set_major_formatter(ticker.EngFormatter(sep=" "))
        ax.xaxis.set_major_locator(RoundTicks())
    ax.set_xlabel(label)
    _y_axis(ax, y)
    _legend(ax, style, groups, interval, frame, own)
    return ax


def pareto_front(cost: Sequence[float], gain: Sequence[float]) -> list[int]:
    """Find the points that no other one beats in both cost and gain.

    Args:
        cost: A number a point, such as FLOPs: less is better.
        gain: A number a point, such as accuracy: more is better.

    Returns:
        The indices of these points, by growing cost.

    Example:
        >>> pu.plots.pareto_front([3, 1, 2], [0.9, 0.7, 0.6])
        [1, 0]
    """
    cost, gain = np.asarray(cost, float), np.asarray(gain, float)
    front, best = [], -math.inf
    for index in np.lexsort((-gain, cost)):
        if gain[index] > best:
            front.append(int(index))
            best = gain[index]
    return front


# --- What the curves share -------------------------------------------------------------------------------------------


def _legend(ax, style, groups, interval, frame, own):
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) == 1:  # the axis says what a single curve is
        handles, labels = [], []
    legend_outside(ax, style, handles, labels, note_of(pd.concat(groups.values())["n"], interval, frame), own)


def side_by_side(n: int) -> np.ndarray:
    """How far to draw each of `n` curves aside, in points, so that none hides the error bars of another."""
    return (np.arange(n) - (n - 1) / 2) * min(5.0, 20 / n)


def draw_points(ax, group, look, label, bands=False, aside=0.0, pale=False):
    """Draw the means of one curve with their intervals, as bars or as a band."""
    line = {"label": label, **look, "markeredgecolor": ax.get_facecolor(), "markeredgewidth": 0.6}
    if bands:
        alpha = 0.13 if pale else 0.2  # where several overlap
        ax.fill_between(group["x"], group["low"], group["high"], color=look["color"], alpha=alpha, linewidth=0)
        ax.plot(group["x"], group["mean"], **line)
    else:
        error = np.nan_to_num([group["mean"] - group["low"], group["high"] - group["mean"]])
        shown = np.where(group["n"] > 1, 1, np.nan)
        bars = ax.errorbar(group["x"], group["mean"], error * shown, capsize=3, elinewidth=1, capthick=1, **line)
        if aside:  # on the page only: the data stay exact, and with them the limits, which are known by now
            shift = ScaledTranslation(aside / 72, 0, ax.figure.dpi_scale_trans)
            for artist in bars.get_children():
                artist.set_transform(ax.transData + shift)


def _y_axis(ax, y, scale="linear"):
    label = y.replace("_", " ")
    ax.set_ylabel(label + (" (log scale)" if scale == "log" else ""))
    if "accuracy" in label and scale == "linear":
        fractions_on_y(ax)
