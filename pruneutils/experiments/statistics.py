"""Statistics of repeated runs: a mean with its interval, and which arms differ, paired by seed or by test image."""

import itertools
import warnings
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
import pandas as pd

from .. import _checks
from ._estimates import bootstrap, check_level, holm, t_interval, tested
from .images import Difference, bootstrap_images, by_image, mcnemar

__all__ = ["Difference", "bootstrap_images", "by_image", "compare", "mcnemar", "summary"]


def summary(
    frame: pd.DataFrame,
    by: str | Sequence[str],
    value: str = "accuracy",
    *,
    interval: str = "t",
    level: float = 0.95,
    seed: str | None = "seed",
) -> pd.DataFrame:
    """Summarize each group of runs: mean, interval, number of runs and standard deviation.

    Rows without a value (runs that failed or are missing) are left out with a warning.

    Args:
        frame: One row for each run, such as the table that `sweep` returns.
        by: The column, or the columns, that name the groups.
        value: The column to summarize.
        interval: "t" for Student's interval of the mean, or "bootstrap" for percentiles of 9,999 resampled means from a
            fixed seed, which is too narrow below about ten runs.
        level: The coverage of the interval, a fraction.
        seed: The column that tells the runs of a group apart; None if the runs have none.

    Returns:
        One row for each group, in order of appearance: the columns of `by`, mean, low, high, n, std. A single run has
        no interval (NaN).

    Raises:
        ValueError: If a group has a seed twice (epochs or sizes counted as runs would make the interval too narrow), a
            column does not exist, or an option is unknown.
        TypeError: If the column `value` does not hold numbers.

    Example:
        >>> import pandas as pd
        >>> runs = pd.DataFrame({"method": ["snip"] * 3, "seed": [0, 1, 2], "accuracy": [0.90, 0.92, 0.94]})
        >>> pu.statistics.summary(runs, by="method").round(3)
          method  mean   low  high  n   std
        0   snip  0.92  0.87  0.97  3  0.02
    """
    by = _names(by)
    _checks.one_of("interval", interval, ("t", "bootstrap"))
    _check(frame, by, value, level, [seed] if seed in frame.columns else [])
    rows = []
    for group, values in _with_value(frame, value).groupby(by, sort=False, dropna=False)[value]:
        sample = values.to_numpy(float)
        low, high = t_interval(sample, level) if interval == "t" else bootstrap(sample, level)[:2]
        std = sample.std(ddof=1) if len(sample) > 1 else np.nan
        rows.append((*group, sample.mean(), low, high, len(sample), std))
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "n", "std"])


def compare(
    frame: pd.DataFrame,
    by: str = "method",
    value: str = "accuracy",
    *,
    against: Hashable | list[tuple] | None = None,
    pair_on: str | Sequence[str] = "seed",
    within: str | Sequence[str] = (),
    test: str = "t",
    level: float = 0.95,
) -> pd.DataFrame:
    """Compare arms pair by pair: which differ, by how much, and which cannot be told apart.

    The p-values are corrected after Holm (1979) over the rows of the table, so ask only for the comparisons that you
    want to report: every further row makes each of them harder to show.

    Two arms without any difference in any pair are reported as "identical" but not tested: no test could ever tell
    them apart, so they do not enlarge the family (Tarone 1990).

    Args:
        frame: One row for each run, such as the table that `sweep` returns.
        by: The column that names the arms.
        value: The column to compare.
        against: The arm that each other arm is compared with, or a list of pairs `(a, b)`; None compares all pairs.
        pair_on: The column, or the columns, that make two runs a pair (same seed, same data, same start). Runs without
            a partner are left out with a warning.
        within: The column, or the columns, at whose equal values arms are compared, such as the sparsity.
        test: "t" for the paired t-test; "wilcoxon" for the signed-rank test, which needs six pairs to reach 5 %; or
            "mcnemar" for McNemar's exact test of values that are 0 or 1, one for each image (see `by_image`). Equal
            differences have no variance, so the sign test takes the place of the first two.
        level: The coverage of the intervals; arms differ if the corrected p is below 1 - level.

    Returns:
        One row for each pair of arms in each group of `within`: the columns of `within`, a, b, n (pairs), difference
        (mean of a - b), low, high (its own interval: Student's, or for "mcnemar" from a bootstrap over images), p
        (two-sided), p_holm (corrected), differs (bool), larger (the arm with the larger mean, None if they do not
        differ) and verdict (the same in words; larger need not be better).

    Raises:
        ValueError: If there are no two arms to compare, a group has a run twice, or a column, an arm or an option is
            unknown.
        TypeError: If the column `value` does not hold numbers.

    Example:
        >>> import pandas as pd
        >>> start = pd.DataFrame({"seed": range(5), "accuracy": [0.80, 0.85, 0.90, 0.95, 0.70]})
        >>> better = start.assign(accuracy=start.accuracy + [0.010, 0.011, 0.009, 0.010, 0.012])
        >>> runs = pd.concat([start.assign(method="random"), better.assign(method="snip")])
        >>> table = pu.statistics.compare(runs, against="random")
        >>> table[["a", "b", "n", "difference", "differs", "larger"]].round(3)
              a       b  n  difference  differs larger
        0  snip  random  5        0.01     True   snip
    """
    within, pair_on = _names(within), _names(pair_on)
    _checks.one_of("test", test, ("t", "wilcoxon", "mcnemar"))
    _check(frame, [*within, by], value, level, pair_on)
    asked = _pairs(by, frame[by].unique().tolist(), against)
    present = _with_value(frame, value)
    if test == "mcnemar" and not present[value].isin([0, 1]).all():
        raise ValueError(f"column {value!r} holds more than 0 and 1, so McNemar's test does not apply; see `by_image`")
    rows, unpaired = [], []
    for group, part in present.groupby(within, sort=False, dropna=False) if within else [((), present)]:
        runs = part.pivot(index=pair_on, columns=by, values=value).astype(float)
        for a, b in [pair for pair in asked if runs.columns.isin(pair).sum() == 2]:
            both = runs[[a, b]].dropna().to_numpy()
            if len(both) < max(runs[a].count(), runs[b].count()):
                unpaired.append(f"{a} and {b}" + (f" at {dict(zip(within, group, strict=True))}" if within else ""))
            mean = (both[:, 0] - both[:, 1]).mean() if len(both) else np.nan
            rows.append((*group, a, b, len(both), mean, *tested(both, test, level)))
    if not rows:
        raise ValueError(f"no two of the arms to compare have values {value!r} at the same {within}")
    if unpaired:
        warnings.warn(
            f"runs without a partner of the same {', '.join(pair_on)} are left out ({len(unpaired)} comparisons, "
            f"first {unpaired[0]})",
            stacklevel=2,
        )
    table = pd.DataFrame(rows, columns=[*within, "a", "b", "n", "difference", "low", "high", "p"])
    table["p_holm"] = holm(table["p"].to_numpy(float))
    table["differs"] = table["p_holm"] < 1 - level
    larger = [(row.a if row.difference > 0 else row.b) if row.differs else None for row in table.itertuples()]
    table["larger"] = pd.Series(larger, dtype=object)
    table["verdict"] = [_verdict(row) for row in table.itertuples()]
    return table


def _verdict(row):
    if row.n < 2:
        return f"too few pairs ({row.n})"
    if np.isnan(row.p):
        return "identical"
    return f"{row.larger} > {row.a if row.larger == row.b else row.b}" if row.differs else "cannot be told apart"


def _pairs(by, arms, against):
    """Return the pairs of arms to compare."""
    if len(arms) < 2:
        raise ValueError(f"column {by!r} has one arm only, {arms}: nothing to compare")
    if against is None:
        return list(itertools.combinations(arms, 2))
    if not isinstance(against, list):
        if against not in arms:
            raise _checks.unknown("arm", against, arms)
        return [(arm, against) for arm in arms if arm != against]
    pairs = [tuple(pair) if isinstance(pair, (tuple, list)) else (pair,) for pair in against]
    for pair in pairs:
        if len(pair) != 2 or pair[0] == pair[1]:
            raise ValueError(f"against must be one arm or a list of pairs of two different arms, not {against!r}")
        for arm in pair:
            if arm not in arms:
                raise _checks.unknown("arm", arm, arms)
    if not pairs or len({frozenset(pair) for pair in pairs}) < len(pairs):
        raise ValueError(f"against must hold at least one pair, and none twice, not {against!r}")
    return pairs


def _names(columns: str | Iterable[str]) -> list[str]:
    return [columns] if isinstance(columns, str) else list(columns)


def _with_value(frame, value):
    left_out = frame[value].isna()
    if left_out.any():
        warnings.warn(f"{left_out.sum()} of {len(frame)} rows have no {value} and are left out", stacklevel=3)
    return frame[~left_out]


def _check(frame, groups, value, level, runs):
    """Check before anything is computed: the columns, the level, sizes kept apart, and each run once in its group."""
    for name in (*groups, *runs, value):
        if name not in frame.columns:
            raise _checks.unknown("column", name, frame.columns)
    if not pd.api.types.is_numeric_dtype(frame[value]):
        raise TypeError(f"column {value!r} holds {frame[value].dtype}, not numbers")
    check_level(level)
    if "size" in frame.columns and "size" not in groups and frame["size"].nunique() > 1:
        raise ValueError(f"sizes {list(frame['size'].unique())} do not mix: choose one, or group by 'size' too")
    if runs:
        repeated = frame[frame[value].notna() & frame.duplicated([*groups, *runs], keep=False)]
        if len(repeated):
            raise ValueError(
                f"{', '.join(runs)} {repeated[runs].iloc[0].tolist()} comes more than once in the group "
                f"{repeated[groups].iloc[0].to_dict()}: group by the columns in which these rows differ as well"
            )
