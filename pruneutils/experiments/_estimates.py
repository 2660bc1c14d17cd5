"""The numbers behind the statistics: intervals, p-values and their correction, of plain arrays."""

import warnings

import numpy as np
from scipy import stats

_ROUNDING = 1e-12  # differences below this share of the values are rounding


def check_level(level):
    """Check that a coverage is one."""
    if not 0 < level < 1:
        raise ValueError(f"level must be a fraction between 0 and 1, such as 0.95, not {level!r}")


def tested(both, test, level):
    """Return (low, high, p) of the difference of values of shape (pairs, 2); p is NaN where nothing is tested."""
    difference = both[:, 0] - both[:, 1]
    low, high = bootstrap(difference, level)[:2] if test == "mcnemar" else t_interval(difference, level)
    if len(both) < 2:
        return low, high, np.nan
    rounding = _ROUNDING * np.abs(both).max()
    if (np.abs(difference) <= rounding).all():
        return low, high, np.nan
    if test == "mcnemar":
        return low, high, mcnemar_p(both)
    # Accuracies are counts of images, so a few equal differences are no proof: not p = 0 for want of variance.
    if np.ptp(difference) <= rounding:
        return low, high, stats.binomtest(len(both), len(both)).pvalue
    return low, high, (stats.ttest_1samp(difference, 0) if test == "t" else stats.wilcoxon(difference)).pvalue


def mcnemar_p(both):
    """Return the exact p of the images that one network gets right and the other wrong."""
    only_a, only_b = (both[:, 0] > both[:, 1]).sum(), (both[:, 0] < both[:, 1]).sum()
    return stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0


def t_interval(sample, level):
    """Return Student's interval of the mean."""
    if len(sample) < 2:
        return np.nan, np.nan
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)  # equal values: an interval of width zero
        return stats.ttest_1samp(sample, 0).confidence_interval(level)


def bootstrap(sample, level):
    """Return (low, high, p) of the mean, from resampled means."""
    if len(sample) < 2:
        return np.nan, np.nan, np.nan
    options = {"confidence_level": level, "method": "percentile", "rng": np.random.default_rng(0)}
    drawn = stats.bootstrap((sample,), np.mean, batch=100, **options)  # batches: thousands of images fit into a cache
    means = drawn.bootstrap_distribution
    p = 2 * (1 + min((means <= 0).sum(), (means >= 0).sum())) / (1 + len(means))
    return *drawn.confidence_interval, min(p, 1.0)


def holm(p):
    """Correct after Holm (1979), step down; NaN where nothing was tested, which counts for nothing."""
    order = np.argsort(p)[: np.isfinite(p).sum()]
    corrected = np.full(len(p), np.nan)
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return corrected
