"""Curves over runs: accuracy over sparsity, training curves, accuracy over computation."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.transforms import ScaledTranslation

from .._checks import nearest
from ..experiments.statistics import summary
from .look import SPARSITY_TICKS, choice, dress, method_styles, need, picture, spread

_INTERVALS = {"t": "95 % t-interval", "bootstrap": "95 % bootstrap interval", "minmax": "smallest and largest"}


@picture
def accuracy_vs_sparsity(frame: pd.DataFrame, x="sparsity", y="accuracy", by="method", *, interval="t", bands=False,
                         dense=None, scale="log", title=None, ax=None, style=None, save=None):  # fmt: skip
    """Accuracy over sparsity, a curve for each `by`, with its interval over seeds; the legend states which and n.

    `frame` has a row a run; `by` is a column, several, or None. `interval` is "t" or "bootstrap" (95 %, of the mean) or
    "minmax", drawn as bars (of several curves side by side, a few points apart) or `bands`. `dense` is the unpruned
    accuracy, or one for each seed. `scale` is "log" (of the density: 0.9, 0.95, 0.98 are apart) or "linear". Raises
    ValueError for a missing column, several sizes or a repeated seed in one point, and sparsities outside [0, 1]
    ([0, 1) on the log scale).
    """
    choice("scale", scale, ("log", "linear"))
    groups = _groups(frame, x, y, by, interval)
    places = np.unique(np.concatenate([group["x"] for group in groups.values()]))
    if places[0] < 0 or places[-1] > 1 or (scale == "log" and places[-1] == 1):
        raise ValueError(
            f'{x} runs from {places[0]:g} to {places[-1]:g}; it must lie in [0, 1], below 1 if scale="log"'
        )
    ax = ax or style.axes((6.4, 4.2))
    dress(ax, style, title, grid="both")
    if scale == "log":
        ax.set_xscale("function", functions=(spread, lambda value: 1 - 10.0 ** -np.asarray(value)))
    looks = method_styles(groups, style)
    names = sorted(groups, key=list(looks).index)
    for name, aside in zip(names, _side_by_side(len(names)), strict=True):
        _error_bars(ax, groups[name], looks[name], str(name), bands, aside)
    if dense is not None:
        runs = pd.DataFrame({"dense": True, "value": np.atleast_1d(np.asarray(dense, float))})
        (level,) = _groups(runs, "dense", "value", None, interval).values()
        mean, low, high = level[["mean", "low", "high"]].iloc[0]
        look = {"color": style.muted, "linewidth": 1, "linestyle": (0, (4, 3)), "label": f"dense {100 * mean:.1f} %"}
        ax.axhline(mean, zorder=1, **look)
        if math.isfinite(low):
            ax.axhspan(low, high, color=style.muted, alpha=0.15, linewidth=0, zorder=0.5)
    ends = (spread if scale == "log" else np.asarray)(places[[0, -1]])
    _sparsity_ticks(ax, places, scale, float(np.ptp(ends)) or 1.0)
    ax.set_xlabel(x.replace("_", " "))
    _fraction_axis(ax, y, groups)
    _legend(ax, groups, interval, frame, loc="best")
    return ax


def _sparsity_ticks(ax, places, scale, width):
    """Ticks where there are points, as many as do not collide; round numbers where there are too many points."""
    if scale == "linear":
        ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
        return
    wanted = places if len(places) <= 10 else [t for t in SPARSITY_TICKS if places[0] <= t <= places[-1]]
    ticks = []
    for place in reversed(list(wanted)):  # from the right, where results are the most interesting
        if not ticks or abs(spread(place) - spread(ticks[-1])) > 0.075 * width:
            ticks.append(place)
    ax.set_xticks(ticks, [f"{100 * t:.4g} %" for t in ticks])
    ax.minorticks_off()


@picture
def curves(frame: pd.DataFrame, x="epoch", y="test_accuracy", by=None, *, interval="t", events=None, title=None,
           ax=None, style=None, save=None):  # fmt: skip
    """Training curves: `y` over `x`, a line for each `by`, with a band over seeds and a tick at each pruning.

    `events` are the places on `x` where weights were pruned, or {name: places}; without it, those where the column
    `sparsity`, if there is one, has grown. Raises ValueError as `accuracy_vs_sparsity` does.
    """
    groups = _groups(frame, x, y, by, interval)
    if events is None:
        growing = "sparsity" in frame.columns and y != "sparsity"
        events = _prunings(_groups(frame, x, "sparsity", by, interval)) if growing else {}
    elif not isinstance(events, Mapping):
        events = dict.fromkeys(groups, events)
    for name in events:
        if name not in groups:
            raise ValueError(f"events: no curve is called {name!r}; {nearest(name, groups)}")
    ax = ax or style.axes((6.4, 4.0))
    dress(ax, style, title, grid="y")
    looks = method_styles(groups, style)
    for name in sorted(groups, key=list(looks).index):
        _error_bars(ax, groups[name], looks[name] | {"marker": None}, str(name), bands=True)
    ax.set_xlabel(x.replace("_", " "))
    _fraction_axis(ax, y, groups)
    rows = [name for name in sorted(groups, key=list(looks).index) if len(events.get(name, ()))]
    for row, name in enumerate(rows):  # one above the other, as methods prune at the same epochs; outside of the curves
        low, high = 1.012 + 0.03 * row, 1.034 + 0.03 * row
        look = {"color": looks[name]["color"], "linewidth": 2, "transform": ax.get_xaxis_transform()}
        ax.vlines(events[name], low, high, clip_on=False, **look)
    if rows:
        ax.plot([], [], linestyle="none", marker="|", color=style.muted, markeredgewidth=2, label="pruned (top)")
        ax.set_title(ax.get_title("left"), pad=10 + 8 * len(rows))
    ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=pd.api.types.is_integer_dtype(frame[x])))
    _legend(ax, groups, interval, frame, loc="best")
    return ax


def _prunings(groups) -> dict:
    """{name: the places at which the mean sparsity has grown}"""
    return {
        name: group["x"][group["mean"].diff().fillna(group["mean"]) > 1e-9].tolist() for name, group in groups.items()
    }


@picture
def accuracy_vs_flops(frame: pd.DataFrame, x="flops", y="accuracy", by="method", at="sparsity", *, interval="t",
                      title=None, ax=None, style=None, save=None):  # fmt: skip
    """Accuracy over computation, a point for each `by` and value of `at` with its interval over seeds, and the front.

    The Pareto front is that of the means. Raises ValueError as `accuracy_vs_sparsity` does.
    """
    groups = _groups(frame, x, y, by, interval, at)
    ax = ax or style.axes((6.4, 4.2))
    dress(ax, style, title, grid="both")
    points = pd.concat(groups.values(), ignore_index=True)
    front = points.iloc[pareto_front(points["x"], points["mean"])]
    end = points["x"].max()
    ax.plot([*front["x"], end], [*front["mean"], front["mean"].iloc[-1]], drawstyle="steps-post", color=style.muted,
            linewidth=5, alpha=0.35, solid_capstyle="round", zorder=1, label="Pareto front of the means")  # fmt: skip
    looks = method_styles(groups, style)
    for name in sorted(groups, key=list(looks).index):
        _error_bars(ax, groups[name], looks[name] | {"linewidth": 1}, str(name))
    if points["x"].min() > 0 and end / points["x"].min() > 8:
        ax.set_xscale("log")
    else:
        ax.xaxis.set_major_formatter(ticker.EngFormatter(sep=" "))
    ax.set_xlabel("FLOPs" if x == "flops" else x.replace("_", " "))
    _fraction_axis(ax, y, groups)
    _legend(ax, groups, interval, frame, loc="best")
    return ax


def pareto_front(cost: Sequence[float], gain: Sequence[float]) -> list[int]:
    """The indices, by growing cost, of the points that no other one beats in both cost and gain."""
    cost, gain = np.asarray(cost, float), np.asarray(gain, float)
    front, best = [], -math.inf
    for index in np.lexsort((-gain, cost)):
        if gain[index] > best:
            front.append(int(index))
            best = gain[index]
    return front


# --- What the curves share -------------------------------------------------------------------------------------------


def _groups(frame, x, y, by, interval, at=None) -> dict:
    """{name: DataFrame of x, mean, low, high, n}, a row for each value of `at`, which is `x` if x is no measurement."""
    choice("interval", interval, _INTERVALS)
    by, at = [by] if isinstance(by, str) else list(by or ()), at or x
    need(frame, x, y, at, *by)
    frame = frame.dropna(subset=[x, at])
    if frame[y].isna().all():
        raise ValueError(f"no row has both {x!r} and {y!r}")
    frame = frame.assign(**{at: frame[at].round(6)})  # achieved sparsities differ in their last digits only
    table = summary(frame, [*by, at], y, interval="t" if interval == "minmax" else interval)
    cells = frame.dropna(subset=[y]).groupby([*by, at], sort=False, dropna=False)
    if interval == "minmax":
        several = table["n"] > 1
        table["low"] = np.where(several, cells[y].min(), np.nan)
        table["high"] = np.where(several, cells[y].max(), np.nan)
    table["x"] = cells[x].mean().to_numpy()
    if len(by) == 1:
        names = table[by[0]]
    else:
        names = table[by].astype(str).agg(", ".join, axis=1) if by else pd.Series(y.replace("_", " "), table.index)
    return {name: rows.sort_values("x") for name, rows in table.groupby(names, sort=False)}


def _legend(ax, groups, interval, frame, **options):
    """The legend, whose title says what the intervals are and how many runs are behind them."""
    counts = pd.concat(groups.values())["n"]
    low, high = counts.min(), counts.max()
    runs = "seeds" if "seed" in frame.columns else "runs"
    n = f"n = {low}" if low == high else f"n = {low} to {high}"
    note = f"one run each ({n}): no interval" if high == 1 else f"mean, {_INTERVALS[interval]}, {n} {runs}"
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) == 1:
        handles, labels = [], []
    legend = ax.legend(handles, labels, title=note, alignment="left", **options)
    legend.get_title().set_color(ax.xaxis.label.get_color())
    legend.set_zorder(5)


def _side_by_side(n: int) -> np.ndarray:
    """How far to draw each of `n` curves aside, in points, so that none hides the error bars of another."""
    return (np.arange(n) - (n - 1) / 2) * min(5.0, 20 / n)


def _error_bars(ax, group, look, label, bands=False, aside=0.0):
    line = {"label": label, **look, "markeredgecolor": ax.get_facecolor(), "markeredgewidth": 0.6}
    if bands:
        ax.fill_between(group["x"], group["low"], group["high"], color=look["color"], alpha=0.2, linewidth=0)
        ax.plot(group["x"], group["mean"], **line)
    else:
        error = np.nan_to_num([group["mean"] - group["low"], group["high"] - group["mean"]])
        shown = np.where(group["n"] > 1, 1, np.nan)
        bars = ax.errorbar(group["x"], group["mean"], error * shown, capsize=3, elinewidth=1, capthick=1, **line)
        if aside:  # on the page only: the data stay exact, and with them the limits, which are known by now
            shift = ScaledTranslation(aside / 72, 0, ax.figure.dpi_scale_trans)
            for artist in bars.get_children():
                artist.set_transform(ax.transData + shift)


def _fraction_axis(ax, y, groups):
    """Percent on the y axis of an accuracy, and no room for what cannot be."""
    label = y.replace("_", " ")
    ax.set_ylabel(label)
    if "accuracy" in label:
        ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, -0.02), min(high, 1.02))
