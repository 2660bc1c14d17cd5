"""Statistics of repeated runs: a mean with its interval, and which arms differ, paired by seed."""

import itertools
import warnings

import numpy as np
import pandas as pd
from scipy import stats


def summary(frame, by, value="accuracy", *, interval="t", level=0.95, seed="seed") -> pd.DataFrame:
    """Mean, interval, number of runs and standard deviation of a value in each group: a row a group, in order.

    by: a column or a list of columns.
    interval: "t", Student's for the mean of n runs; or "bootstrap", percentiles of 9,999 resampled means from a fixed
        seed, which is too narrow below about ten runs. NaN for a single run. level: its coverage, a fraction.
    seed: the column that tells the runs of a group apart; None where runs have none.

    Rows without a value (runs that failed or are missing) are left out with a warning. Raises ValueError where a group
    has a seed twice, as epochs or sizes counted as runs would make the interval too narrow.
    """
    by = _names(by)
    if interval not in ("t", "bootstrap"):
        raise ValueError(f"interval {interval!r}: possible are 't' and 'bootstrap'")
    _check(frame, by, value, level, [seed] if seed in frame.columns else [])
    rows = []
    for group, values in _with_value(frame, value).groupby(by, sort=False, dropna=False)[value]:
        sample = values.to_numpy(float)
        low, high = _t_interval(sample, level) if interval == "t" else _bootstrap_interval(sample, level)
        std = sample.std(ddof=1) if len(sample) > 1 else np.nan
        rows.append((*group, sample.mean(), low, high, len(sample), std))
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "n", "std"])


def compare(frame, by="method", value="accuracy", *, pair_on="seed", within=(), test="t", level=0.95) -> pd.DataFrame:
    """Which arms differ, by how much, and which cannot be told apart: a row a pair of arms and group of `within`.

    by: the column that names the arms. pair_on: what makes two runs a pair (same seed, same data, same start).
    within: columns compared at equal values only, such as the sparsity.
    test: "t", the paired t-test (where all differences are equal it knows no variance, and the sign test stands in), or
        "wilcoxon", the signed-rank test, which cannot reach 5 % with fewer than six pairs.

    Columns: within, a, b, n (pairs), difference (mean of a - b), low, high (Student's interval of this difference
    alone, at `level`), p (two-sided), p_holm (corrected after Holm over all rows of the table), verdict: "a > b" where
    p_holm is below 1 - level (larger, not better), else "cannot be told apart", or "too few pairs" below two.
    """
    within, pair_on = _names(within), _names(pair_on)
    if test not in ("t", "wilcoxon"):
        raise ValueError(f"test {test!r}: possible are 't' and 'wilcoxon'")
    _check(frame, [*within, by], value, level, pair_on)
    arms = list(frame[by].unique())
    if len(arms) < 2:
        raise ValueError(f"column {by!r} has one arm only, {arms}: nothing to compare")
    present = _with_value(frame, value)
    rows, unpaired = [], []
    for group, part in present.groupby(within, sort=False, dropna=False) if within else [((), present)]:
        runs = part.pivot(index=pair_on, columns=by, values=value)
        for a, b in itertools.combinations([arm for arm in arms if arm in runs], 2):
            difference = (runs[a] - runs[b]).dropna().to_numpy(float)
            if len(difference) < max(runs[a].count(), runs[b].count()):
                unpaired.append(f"{a} and {b}" + (f" at {dict(zip(within, group, strict=True))}" if within else ""))
            mean = difference.mean() if len(difference) else np.nan
            rows.append((*group, a, b, len(difference), mean, *_t_interval(difference, level), _p(difference, test)))
    if unpaired:
        warnings.warn(
            f"runs without a partner of the same {', '.join(pair_on)} are left out ({len(unpaired)} comparisons, "
            f"first {unpaired[0]})",
            stacklevel=2,
        )
    table = pd.DataFrame(rows, columns=[*within, "a", "b", "n", "difference", "low", "high", "p"])
    table["p_holm"] = _holm(table["p"].to_numpy(float))
    table["verdict"] = [_verdict(row, level) for row in table.itertuples()]
    return table


def _verdict(row, level):
    if row.n < 2:
        return f"too few pairs ({row.n})"
    if row.p_holm < 1 - level:
        return f"{row.a} > {row.b}" if row.difference > 0 else f"{row.b} > {row.a}"
    return "cannot be told apart"


def _t_interval(sample, level):
    n = len(sample)
    if n < 2:
        return np.nan, np.nan
    half = stats.t.ppf((1 + level) / 2, n - 1) * stats.sem(sample)
    return sample.mean() - half, sample.mean() + half


def _bootstrap_interval(sample, level):
    if len(sample) < 2:
        return np.nan, np.nan
    drawn = stats.bootstrap(
        (sample,), np.mean, confidence_level=level, method="percentile", rng=np.random.default_rng(0)
    )
    return drawn.confidence_interval


def _p(difference, test):
    if len(difference) < 2:
        return np.nan
    # Accuracies are counts of images, so a few equal differences are no proof: not p = 0 for want of variance.
    if np.allclose(difference, difference[0], rtol=0, atol=1e-12):
        return 1.0 if abs(difference[0]) <= 1e-12 else stats.binomtest(len(difference), len(difference)).pvalue
    if test == "t":
        return stats.ttest_1samp(difference, 0).pvalue
    return stats.wilcoxon(difference).pvalue


def _holm(p):
    """Holm's step-down correction (1979); NaN where nothing was tested, which counts for nothing."""
    order = np.argsort(p)[: np.isfinite(p).sum()]
    corrected = np.full(len(p), np.nan)
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return corrected


def _names(columns):
    return [columns] if isinstance(columns, str) else list(columns)


def _with_value(frame, value):
    left_out = frame[value].isna()
    if left_out.any():
        warnings.warn(f"{left_out.sum()} of {len(frame)} rows have no {value} and are left out", stacklevel=3)
    return frame[~left_out]


def _check(frame, groups, value, level, runs):
    """Before anything is computed: columns there, a level that is one, sizes apart, and each run once in its group."""
    unknown = [name for name in (*groups, *runs, value) if name not in frame.columns]
    if unknown:
        raise ValueError(f"no column {unknown[0]!r}; possible are {', '.join(map(str, frame.columns))}")
    if not pd.api.types.is_numeric_dtype(frame[value]):
        raise TypeError(f"column {value!r} holds {frame[value].dtype}, not numbers")
    if not 0 < level < 1:
        raise ValueError(f"level {level}: a fraction between 0 and 1, such as 0.95")
    if "size" in frame.columns and "size" not in groups and frame["size"].nunique() > 1:
        raise ValueError(f"sizes {list(frame['size'].unique())} do not mix: choose one, or group by 'size' too")
    if runs:
        repeated = frame[frame[value].notna() & frame.duplicated([*groups, *runs], keep=False)]
        if len(repeated):
            raise ValueError(
                f"{', '.join(runs)} {repeated[runs].iloc[0].tolist()} comes more than once in the group "
                f"{repeated[groups].iloc[0].to_dict()}: group by the columns in which these rows differ as well"
            )
