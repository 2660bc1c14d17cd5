"""Statistics of repeated runs: a mean with its interval, and which arms differ, paired by seed or by test image."""

import itertools
import warnings
from collections.abc import Hashable, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from .. import _checks
from ._estimates import bootstrap_images, check_level, holm, paired_t, t_interval

__all__ = ["bootstrap_images", "compare", "dunnett", "summary", "t_interval"]


def summary(
    frame: pd.DataFrame,
    by: str | Sequence[str],
    value: str = "accuracy",
    *,
    level: float = 0.95,
    seed: str | None = "seed",
) -> pd.DataFrame:
    """Summarize each group of runs: mean, Student's interval, number of runs and standard deviation.

    Args:
        frame: One row for each run, as `sweep` returns; a run without a value is left out with a warning.
        by, value: The column, or the columns, that name the groups; and the column to summarize.
        level: The coverage of the interval.
        seed: The column that distinguishes the runs of a group; None if the runs have none.

    Returns:
        One row for each group, in order of appearance: the columns of `by`, mean, low, high, n, std. A single run has
        no interval (NaN), a group without any value no mean either.

    Raises:
        ValueError, TypeError: If a group has a seed twice, a column does not exist, or `value` holds no numbers.

    Example:
        >>> import pandas as pd
        >>> runs = pd.DataFrame({"method": "snip", "seed": [0, 1, 2], "accuracy": [0.90, 0.92, 0.94]})
        >>> pu.statistics.summary(runs, by="method").round(3)
          method  mean   low  high  n   std
        0   snip  0.92  0.87  0.97  3  0.02
    """
    by = _names(by)
    _check(frame, by, value, level, [seed] if seed in frame.columns else [])
    _with_value(frame, value)
    rows = []
    for group, values in frame.groupby(by, sort=False, dropna=False)[value]:
        sample = values.dropna().to_numpy(float)
        low, high = t_interval(sample, level)
        with np.errstate(invalid="ignore"):  # the spread of infinite values is NaN
            std = sample.std(ddof=1) if len(sample) > 1 else np.nan
        rows.append((*group, sample.mean() if len(sample) else np.nan, low, high, len(sample), std))
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "n", "std"])


def compare(
    frame: pd.DataFrame,
    by: str = "method",
    value: str = "accuracy",
    against: Hashable | list[tuple] | None = None,
    *,
    pair_on: str | Sequence[str] = "seed",
    within: str | Sequence[str] = (),
    level: float = 0.95,
    resolution: float = 1e-4,
) -> pd.DataFrame:
    """Compare arms pair by pair, with Student's paired test. For many arms against one control see `dunnett`.

    The p-values are corrected after Holm (1979) over all rows of the table: ask only for what you want to report.

    Args:
        frame: One row for each run, such as the table that `sweep` returns.
        by, value: The column that names the arms, and the column to compare.
        against: The arm that each other arm is compared with, or a list of pairs `(a, b)`; None compares all pairs.
        pair_on: The column(s) that make two runs a pair, such as the seed. A run without a partner is left out, warned.
        within: The column, or the columns, at whose equal values arms are compared, such as the sparsity.
        level: The coverage of the intervals; arms differ if the corrected p is below 1 - level.
        resolution: The least standard deviation of differences, as a share of the largest value: one of 10,000 images.

    Returns:
        One row for each pair of arms in each group: the columns of `within`, a, b, n (pairs), difference (mean of
        a - b), low, high, p (two-sided), p_holm (corrected), differs, and larger (an arm, or None if they do not).

    Raises:
        ValueError, TypeError: If a column or arm is unknown, a group has a run twice, or a value is no finite number.

    Example:
        >>> import pandas as pd
        >>> runs = pd.DataFrame({"method": ["random"] * 3 + ["snip"] * 3, "seed": [0, 1, 2] * 2})
        >>> runs["accuracy"] = [0.80, 0.85, 0.90, 0.82, 0.87, 0.921]
        >>> pu.statistics.compare(runs, against="random")[["a", "b", "n", "difference", "larger"]].round(3)
              a       b  n  difference larger
        0  snip  random  3        0.02   snip
    """
    within, pair_on = _names(within), _names(pair_on)
    _check(frame, [*within, by], value, level, pair_on)
    asked = _pairs(by, frame[by].dropna().unique().tolist(), against)
    present = _with_value(frame, value, finite=True)
    for name in pair_on:
        if present[name].isna().any():
            raise ValueError(f"column {name!r} is empty in some rows, which have no partner: leave these runs out")
    rows, unpaired = [], []
    for group, part in frame.groupby(within, sort=False, dropna=False) if within else [((), frame)]:
        planned = set(part[by])  # runs that are missing included
        runs = part[part[value].notna()].pivot(index=pair_on, columns=by, values=value).astype(float)
        for a, b in [pair for pair in asked if planned.issuperset(pair)]:
            both = runs.reindex(columns=[a, b])
            pairs = both.dropna().to_numpy()
            if len(pairs) < both.count().max():
                unpaired.append(f"{a} and {b}" + (f" at {dict(zip(within, group, strict=True))}" if within else ""))
            mean = (pairs[:, 0] - pairs[:, 1]).mean() if len(pairs) else np.nan
            rows.append((*group, a, b, len(pairs), mean, *paired_t(pairs, level, resolution)))
    if not rows:
        raise ValueError(f"no two of the arms to compare have values {value!r} at the same {within}")
    if unpaired:
        where = f"{len(unpaired)} comparisons, first {unpaired[0]}"
        warnings.warn(f"runs without a partner of the same {', '.join(pair_on)} are left out ({where})", stacklevel=2)
    table = pd.DataFrame(rows, columns=[*within, "a", "b", "n", "difference", "low", "high", "p"])
    table["p_holm"] = holm(table["p"].to_numpy(float))
    table["differs"] = table["p_holm"] < 1 - level
    table["larger"] = _larger(table)
    return table


def dunnett(
    frame: pd.DataFrame, by: str, value: str, control: Hashable, *, level: float = 0.95, seed: str | None = "seed"
) -> pd.DataFrame:
    """Compare many arms with one control by Dunnett's test (1955), whose intervals hold for all arms together.

    The runs are not paired, and all arms are taken to have the same variance.

    Args:
        frame: One row for each run, such as the table that `sweep` returns.
        by, value: The column that names the arms, and the column to compare.
        control, level: The arm that each other arm is compared with, and the coverage of all intervals together.
        seed: The column that distinguishes the runs of an arm; None if the runs have none.

    Returns:
        One row for each other arm, with the columns of `compare`: b is the control, p is corrected for all arms, and
        arms differ where the interval leaves zero out.

    Raises:
        ValueError, TypeError: If a column or arm is unknown, an arm has fewer than two runs, a run twice, or no spread.

    Example:
        >>> import pandas as pd
        >>> runs = pd.DataFrame({"method": ["random", "l1"] * 3, "accuracy": [0.60, 0.70, 0.61, 0.72, 0.59, 0.71]})
        >>> pu.statistics.dunnett(runs, "method", "accuracy", "random")[["a", "difference", "differs"]].round(2)
            a  difference  differs
        0  l1        0.11     True
    """
    _check(frame, [by], value, level, [seed] if seed in frame.columns else [])
    present = _with_value(frame, value, finite=True)
    samples = {arm: present[value][present[by] == arm].to_numpy(float) for arm in frame[by].dropna().unique().tolist()}
    if control not in samples or len(samples) < 2:
        raise _checks.unknown("arm", control, samples)
    for arm, sample in samples.items():
        if len(sample) < 2:
            raise ValueError(f"arm {arm!r} has {len(sample)} runs with a value, and Dunnett's test needs two of each")
    if all(np.ptp(sample) == 0 for sample in samples.values()):
        raise ValueError(f"no two runs of an arm differ in {value!r}, so there is no spread to compare the arms by")
    b = samples.pop(control)
    found = stats.dunnett(*samples.values(), control=b, rng=np.random.default_rng(0))
    low, high = found.confidence_interval(level)
    rows = [(arm, control, len(sample), sample.mean() - b.mean()) for arm, sample in samples.items()]
    table = pd.DataFrame(rows, columns=["a", "b", "n", "difference"])
    table = table.assign(low=low, high=high, p=np.clip(found.pvalue, 0, 1))
    table["differs"] = (table["low"] > 0) | (table["high"] < 0)
    table["larger"] = _larger(table)
    return table


def _larger(table):
    larger = [(row.a if row.difference > 0 else row.b) if row.differs else None for row in table.itertuples()]
    return pd.Series(larger, dtype=object)


def _pairs(by, arms, against):
    """Return the pairs of arms to compare."""
    if len(arms) < 2:
        raise ValueError(f"column {by!r} has one arm only, {arms}: nothing to compare")
    if against is None:
        return list(itertools.combinations(arms, 2))
    pairs = against if isinstance(against, list) else [(arm, against) for arm in arms if arm != against]
    distinct = {frozenset(pair) for pair in pairs if isinstance(pair, (tuple, list)) and len({*pair}) == len(pair) == 2}
    if not pairs or len(distinct) < len(pairs):
        raise ValueError(f"against must be one arm or a list of different pairs of two arms, not {against!r}")
    for arm in itertools.chain(*pairs):
        if arm not in arms:
            raise _checks.unknown("arm", arm, arms)
    return [tuple(pair) for pair in pairs]


def _names(columns) -> list[str]:
    return [columns] if isinstance(columns, str) else list(columns)


def _with_value(frame, value, finite=False):
    """Return the rows that have a value; warn of the others."""
    left_out = frame[value].isna()
    if left_out.any():
        warnings.warn(f"{left_out.sum()} of {len(frame)} rows have no {value} and are left out", stacklevel=3)
    if finite and np.isinf(frame[value]).any():
        raise ValueError(f"column {value!r} holds infinite values, which have no difference: leave these runs out")
    return frame[~left_out]


def _check(frame, groups, value, level, runs):
    """Check the columns, the level, sizes kept apart, and each run once in its group."""
    for name in (*groups, *runs, value):
        if name not in frame.columns:
            raise _checks.unknown("column", name, frame.columns)
    if not pd.api.types.is_numeric_dtype(frame[value]):
        raise TypeError(f"column {value!r} holds {frame[value].dtype}, not numbers")
    check_level(level)
    if "size" in frame.columns and "size" not in groups and frame["size"].nunique() > 1:
        raise ValueError(f"sizes {list(frame['size'].unique())} do not mix: choose one, or group by 'size' too")
    present = frame[frame[value].notna()]
    repeated = present[present.duplicated([*groups, *runs])] if runs else present[:0]
    for _, row in repeated[:1].iterrows():
        where = f"{', '.join(runs)} {row[runs].tolist()} comes more than once in the group {row[groups].to_dict()}"
        raise ValueError(f"{where}: group by the columns in which these rows differ as well")
