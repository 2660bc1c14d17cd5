"""Statistics of single networks, where seeds do not exist: two networks compared on the same test images."""

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from ._estimates import bootstrap, check_level, mcnemar_p


@dataclass(frozen=True)
class Difference:
    """How much two networks differ on the same images: a mean over `n` images, its interval, and a two-sided p."""

    difference: float
    low: float
    high: float
    p: float
    n: int


def mcnemar(hits_a: ArrayLike, hits_b: ArrayLike, *, level: float = 0.95) -> Difference:
    """Compare two networks on the same test images, by McNemar's exact test.

    Only the images that one network gets right and the other wrong say which is better (McNemar 1947; exact: the
    binomial test). The interval says how much other images of the same kind would change the difference; it says
    nothing about other seeds.

    Args:
        hits_a: For each image, whether the first network classifies it correctly: booleans, shape (images,).
        hits_b: The same for the second network, of the same images in the same order.
        level: The coverage of the interval.

    Returns:
        The difference of the accuracies (a - b), its interval from a bootstrap over images, p, and the images' number.

    Raises:
        ValueError: If the two do not belong to the same images, hold no image, or hold more than 0 and 1.

    Example:
        >>> a, b = torch.arange(100) < 80, torch.arange(100) < 70
        >>> found = pu.statistics.mcnemar(a, b)
        >>> round(found.difference, 2), round(found.p, 4)
        (0.1, 0.002)
    """
    both = _two(hits_a, hits_b, level)
    if not np.isin(both, (0, 1)).all():
        raise ValueError("hits must be 0 or 1 (False or True) for each image")
    return _of_images(both, level, mcnemar_p(both))


def bootstrap_images(values_a: ArrayLike, values_b: ArrayLike, *, level: float = 0.95) -> Difference:
    """Compare two networks on the same test images, by resampling the images 9,999 times from a fixed seed.

    Unlike `mcnemar` this takes any number for each image, for example the drop from the dense network:
    `bootstrap_images(small_pruned - small_dense, large_pruned - large_dense)`.

    Args:
        values_a: A number for each image of the first network, such as its hits: shape (images,).
        values_b: The same for the second network, of the same images in the same order.
        level: The coverage of the interval.

    Returns:
        The mean difference (a - b), its percentile interval, p (twice the share of the resampled means on the other
        side of zero), and the number of images.

    Raises:
        ValueError: If the two do not belong to the same images, or hold no image.

    Example:
        >>> a, b = torch.arange(100) < 80, torch.arange(100) < 70
        >>> found = pu.statistics.bootstrap_images(a, b)
        >>> found.low > 0, found.n
        (True, 100)
    """
    both = _two(values_a, values_b, level)
    return _of_images(both, level, bootstrap(both[:, 0] - both[:, 1], level)[2])


def by_image(frame: pd.DataFrame, hits: str = "hits") -> pd.DataFrame:
    """Turn each row of single networks into one row for each test image, so that images take the place of seeds.

    `summary(table, by, "hit", interval="bootstrap", seed="image")` and `compare(table, by, "hit", pair_on="image",
    test="mcnemar")` then do for networks what they do for arms of repeated runs.

    Args:
        frame: One row for each network, such as the table that `sweep` returns.
        hits: The column that holds what each network got right: a list of 0 and 1 (or its JSON text, as a sweep's table
            holds it), an array or a tensor, each of the same images in the same order.

    Returns:
        The other columns of `frame`, then image (counted from 0) and hit (0.0 or 1.0).

    Raises:
        ValueError: If a row has another number of images than the first one.

    Example:
        >>> import pandas as pd
        >>> networks = pd.DataFrame({"method": ["snip", "random"], "hits": [[1, 1, 0], [1, 0, 0]]})
        >>> pu.statistics.by_image(networks)
           method  image  hit
        0    snip      0  1.0
        1    snip      1  1.0
        2    snip      2  0.0
        3  random      0  1.0
        4  random      1  0.0
        5  random      2  0.0
    """
    columns = [_per_image(json.loads(row) if isinstance(row, str) else row) for row in frame[hits]]
    lengths = [len(column) for column in columns]
    if len({*lengths}) > 1:
        raise ValueError(f"column {hits!r} holds rows of {' and '.join(map(str, sorted({*lengths})))} images")
    table = frame.drop(columns=hits).iloc[np.repeat(np.arange(len(frame)), lengths)].reset_index(drop=True)
    images = [np.arange(length) for length in lengths]
    return table.assign(image=np.concatenate([*images, []]).astype(int), hit=np.concatenate([*columns, []]))


def _per_image(values) -> np.ndarray:
    """Return numbers of one network, one for each image, as floats."""
    values = np.asarray(values.cpu() if hasattr(values, "cpu") else values, dtype=float)
    if values.ndim != 1:
        raise ValueError(f"one number for each image is needed, not values of shape {values.shape}")
    return values


def _two(values_a, values_b, level) -> np.ndarray:
    """Return the values of two networks as an array of shape (images, 2)."""
    check_level(level)
    a, b = _per_image(values_a), _per_image(values_b)
    if len(a) != len(b) or not len(a):
        raise ValueError(f"the networks must have seen the same images, but one has {len(a)} and the other {len(b)}")
    return np.stack([a, b], axis=1)


def _of_images(both, level, p) -> Difference:
    difference = both[:, 0] - both[:, 1]
    low, high, _ = bootstrap(difference, level)
    return Difference(float(difference.mean()), float(low), float(high), float(p), len(both))
