"""The numbers behind the statistics: intervals, p-values and their correction, of plain arrays."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

_ROUNDING = 1e-12  # differences below this share of the values are rounding


@dataclass(frozen=True)
class Difference:
    """How much two networks differ on the same images: a mean over `n` images, its interval, and a two-sided p."""

    difference: float
    low: float
    high: float
    p: float
    n: int


def check_level(level: float) -> None:
    """Check that a coverage is one."""
    if not 0 < level < 1:
        raise ValueError(f"level must be a fraction between 0 and 1, such as 0.95, not {level!r}")


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
    check_level(level)
    sample = np.asarray(values, dtype=float)
    if len(sample) < 2 or not np.isfinite(sample).all():
        return np.nan, np.nan
    half = stats.t.ppf((1 + level) / 2, len(sample) - 1) * sample.std(ddof=1) / np.sqrt(len(sample))
    return float(sample.mean() - half), float(sample.mean() + half)


def paired_t(both: np.ndarray, level: float, resolution: float) -> tuple[float, float, float]:
    """Return (low, high, p) of Student's paired test of values of shape (pairs, 2); NaN below two pairs."""
    n, scale = len(both), np.abs(both).max(initial=0)
    difference = both[:, 0] - both[:, 1]
    if n < 2:
        return np.nan, np.nan, np.nan
    if (np.abs(difference) <= _ROUNDING * scale).all():
        return 0.0, 0.0, 1.0
    # A few equal differences of counted images are no proof, and rounding must not decide.
    mean, error = difference.mean(), max(difference.std(ddof=1), resolution * scale) / np.sqrt(n)
    half = stats.t.ppf((1 + level) / 2, n - 1) * error
    return mean - half, mean + half, 2 * stats.t.sf(abs(mean) / error, n - 1)


def bootstrap_images(values_a: ArrayLike, values_b: ArrayLike, *, level: float = 0.95) -> Difference:
    """Compare two networks on the same test images, by resampling the images 9,999 times from a fixed seed.

    The interval says how much other images of the same kind would change the difference, nothing about other seeds.

    Args:
        values_a, values_b: A number of each network, such as whether it hits, for each of the same images in order.
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
    check_level(level)
    a, b = (np.asarray(each.cpu() if hasattr(each, "cpu") else each, dtype=float) for each in (values_a, values_b))
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"a number of each network is needed for each of the same images, not {a.shape} and {b.shape}")
    for values in (a, b):
        for image in np.flatnonzero(~np.isfinite(values))[:1]:
            raise ValueError(f"the value of image {image} is {values[image]}: every image needs a finite number")
    low, high, p = np.nan, np.nan, np.nan
    if len(a) > 1:
        options = {"confidence_level": level, "method": "percentile", "rng": np.random.default_rng(0)}
        drawn = stats.bootstrap((a - b,), np.mean, batch=100, **options)  # thousands of images fit into a cache
        means, least = drawn.bootstrap_distribution, 2.0 ** (1 - len(a))  # p of values of one sign in the sign test
        p = min(1, max(least, 2 * (1 + min((means <= 0).sum(), (means >= 0).sum())) / (1 + len(means))))
        low, high = drawn.confidence_interval if least <= 1 - level else (np.nan, np.nan)
    return Difference(float((a - b).mean()), float(low), float(high), float(p), len(a))


def holm(p: np.ndarray) -> np.ndarray:
    """Correct after Holm (1979), step down; NaN, which is not tested yet, stays and belongs to the family."""
    order = np.argsort(p)  # NaN comes last
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return corrected
