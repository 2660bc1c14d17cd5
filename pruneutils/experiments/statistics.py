"""Statistics of repeated runs: a mean with its interval, and which arms differ, paired by seed or by test image."""

import itertools
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from .. import _checks

__all__ = ["bootstrap_images", "compare", "dunnett", "summary", "t_interval"]

_ROUNDING = 1e-12  # differences below this share of the values are rounding
# The least standard deviation of differences, likewise: a few equal ones of one image in 10,000 are no proof.
_RESOLUTION = 1e-4


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
    asked = _pairs(frame[by].dropna().unique().tolist(), against)
    _with_value(frame, value, finite=True)
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
            rows.append((*group, a, b, len(pairs), mean, *_paired_t(pairs, level)))
    if not rows:
        raise ValueError(f"no two of the arms to compare have values {value!r} at the same {within}")
    if unpaired:
        where = f"{len(unpaired)} comparisons, first {unpaired[0]}"
        warnings.warn(f"runs without a partner of the same {', '.join(pair_on)} are left out ({where})", stacklevel=2)
    table = pd.DataFrame(rows, columns=[*within, "a", "b", "n", "difference", "low", "high", "p"])
    table["p_holm"] = _holm(table["p"].to_numpy(float))
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


@dataclass(frozen=True)
class Difference:
    """How much two networks differ on the same images: a mean over `n` images, its interval, and a two-sided p."""

    difference: float
    low: float
    high: float
    p: float
    n: int


def t_interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Compute Student's interval of the mean, for seaborn's `errorbar=pu.statistics.t_interval` too.

    Args:
        values, level: One number for each run, and the coverage, a fraction (ValueError if it is none).

    Returns:
        (low, high); NaN where there are fewer than two values, or one is not finite.

    Example:
        >>> [round(end, 2) for end in pu.statistics.t_interval([0.90, 0.92, 0.94])]
        [0.87, 0.97]
    """
    _check_level(level)
    sample = np.asarray(values, dtype=float)
    if len(sample) < 2 or not np.isfinite(sample).all():
        return np.nan, np.nan
    half = stats.t.ppf((1 + level) / 2, len(sample) - 1) * sample.std(ddof=1) / np.sqrt(len(sample))
    return float(sample.mean() - half), float(sample.mean() + half)


def bootstrap_images(values_a: ArrayLike, values_b: ArrayLike, *, level: float = 0.95) -> Difference:
    """Compare two networks on the same test images, by resampling the images, and the runs if there are several.

    Of one run each, the interval says how much other images of the same kind would change the difference, nothing about
    other seeds. It resamples 9,999 times from a fixed seed. With few runs it is too narrow.

    Args:
        values_a, values_b: A number of each network, such as whether it hits, for each of the same images in order; of
            several runs (runs, images), paired, with NaN in both where a run does not test an image.
        level: The coverage of the interval.

    Returns:
        The mean difference (a - b), its percentile interval (NaN below six images, for 95 %), p (twice the share of
        resampled means beyond zero, no less than the sign test's), and the number of images. ValueError if the two do
        not belong to the same images, or a value is not finite.

    Example:
        >>> images = torch.arange(100)
        >>> pu.statistics.bootstrap_images(images < 80, images < 70).low > 0
        True
    """
    _check_level(level)
    a, b = (np.asarray(each.cpu() if hasattr(each, "cpu") else each, dtype=float) for each in (values_a, values_b))
    if a.ndim not in (1, 2) or a.shape != b.shape or not a.size:
        raise ValueError(f"a number of each network is needed for each of the same images, not {a.shape} and {b.shape}")
    difference, tested = np.atleast_2d(a - b), np.atleast_2d((a.ndim == 1) | ~(np.isnan(a) & np.isnan(b)))
    for run, image in np.argwhere(~np.isfinite(difference) & tested)[:1]:
        pair = " and ".join(str(np.atleast_2d(each)[run, image]) for each in (a, b))
        raise ValueError(f"image {image} has {pair}: every image needs two finite numbers")
    difference, (n_runs, n) = np.where(tested, difference, 0), tested.shape
    low, high, p, rng, means = np.nan, np.nan, np.nan, np.random.default_rng(0), []
    if n > 1:
        for runs in np.array_split(rng.multinomial(n_runs, np.full(n_runs, 1 / n_runs), size=9999).astype(float), 99):
            images = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in runs]).astype(float)
            sums, counts = (np.einsum("ij,ij->i", runs @ each, images) for each in (difference, tested.astype(float)))
            means.append(sums / counts)
        means, least = np.concatenate(means), 2.0 ** (1 - n)  # p of values of one sign in the sign test
        p = min(1, max(least, 2 * (1 + min((means <= 0).sum(), (means >= 0).sum())) / (1 + len(means))))
        low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2]) if least <= 1 - level else (np.nan, np.nan)
    return Difference(float(difference.sum() / tested.sum()), float(low), float(high), float(p), n)


def _paired_t(both: np.ndarray, level: float) -> tuple[float, float, float]:
    """Return (low, high, p) of Student's paired test of values of shape (pairs, 2); NaN below two pairs."""
    n, scale = len(both), np.abs(both).max(initial=0)
    difference = both[:, 0] - both[:, 1]
    if n < 2:
        return np.nan, np.nan, np.nan
    if (np.abs(difference) <= _ROUNDING * scale).all():
        return 0.0, 0.0, 1.0
    mean, error = difference.mean(), max(difference.std(ddof=1), _RESOLUTION * scale) / np.sqrt(n)
    half = stats.t.ppf((1 + level) / 2, n - 1) * error
    return mean - half, mean + half, 2 * stats.t.sf(abs(mean) / error, n - 1)


def _holm(p: np.ndarray) -> np.ndarray:
    """Correct after Holm (1979), step down; NaN, which is not tested yet, stays and belongs to the family."""
    order = np.argsort(p)  # NaN comes last
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return corrected


def _larger(table):
    larger = [(row.a if row.difference > 0 else row.b) if row.differs else None for row in table.itertuples()]
    return pd.Series(larger, dtype=object)


def _pairs(arms, against):
    """Return the pairs of arms to compare."""
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
    """Check the columns, the level, and that each run is once in its group."""
    for name in (*groups, *runs, value):
        if name not in frame.columns:
            raise _checks.unknown("column", name, frame.columns)
    if not pd.api.types.is_numeric_dtype(frame[value]):
        raise TypeError(f"column {value!r} holds {frame[value].dtype}, not numbers")
    _check_level(level)
    present = frame[frame[value].notna()]
    repeated = present[present.duplicated([*groups, *runs])] if runs else present[:0]
    for _, row in repeated[:1].iterrows():
        where = f"{', '.join(runs)} {row[runs].tolist()} comes more than once in the group {row[groups].to_dict()}"
        raise ValueError(f"{where}: group by the columns in which these rows differ as well")


def _check_level(level: float) -> None:
    """Check that a coverage is one."""
    if not 0 < level < 1:
        raise ValueError(f"level must be a fraction between 0 and 1, such as 0.95, not {level!r}")
