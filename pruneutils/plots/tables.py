"""Runs as curves: a mean with its interval at each place, checked and named."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from .._checks import nearest, one_of
from ..experiments.statistics import summary

INTERVALS = {"t": "95 % t-interval", "bootstrap": "95 % bootstrap interval", "minmax": "smallest and largest"}


def need(frame: pd.DataFrame, *columns: str) -> None:
    """Raise ValueError unless the frame has these columns and at least one row."""
    for column in columns:
        if column not in frame.columns:
            raise ValueError(f"the table has no column {column!r}; {nearest(column, frame.columns)}")
    if frame.empty:
        raise ValueError("the table has no rows")


def groups_of(frame: pd.DataFrame, x: str, y: str, by, interval: str, at: str | None = None) -> dict:
    """Return {name: frame of x, mean, low, high, n}, a row for each value of `at` (`x`, if that is no measurement)."""
    one_of("interval", interval, INTERVALS)
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


def note_of(counts: Sequence[int], interval: str, frame: pd.DataFrame) -> str:
    """Say what the intervals are and how many runs are behind them; nothing where every point is a single run."""
    low, high = min(counts), max(counts)
    if high == 1:
        return ""
    runs = next((f"{name}s" for name in ("image", "seed") if name in frame.columns), "runs")
    return f"mean, {INTERVALS[interval]},\nn = {low if low == high else f'{low} to {high}'} {runs}"
