"""The picture of the scores by which weights are pruned."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes

from .legends import legend_outside
from .look import WIDTH, Style, dress, picture
from .ticks import percent
from .weights import flat


@picture
def score_distribution(
    scores: Mapping[str, torch.Tensor] | torch.Tensor,
    threshold: float | None = None,
    *,
    bins: int = 48,
    title: str | None = None,
    ax: Axes | None = None,
    style: str | Style | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Draw how many weights have which score, logarithmic on both sides of zero; those at zero have their own bar.

    Args:
        scores: {parameter name: tensor}, as `pu.scores` returns them, or one tensor of any shape.
        threshold: Weights that score below it go: a line is drawn there, and the legend counts them.
        bins: The number of bins on each side of zero.
        title: The headline.
        ax: The Axes to draw into.
        style: "light" or "dark".
        save: A path without suffix; writes path.png, path.svg and path_dark.png.

    Returns:
        The Axes.

    Raises:
        ValueError: If there is no score, or a score is not finite.

    Example:
        >>> ax = pu.plots.score_distribution(torch.tensor([0.0, 0.0, 1e-3, 0.5]), threshold=0.1)
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['exactly zero: 2 of 4 (50 %)', 'threshold 0.1: 3 below (75 %)']
    """
    parts = scores.items() if isinstance(scores, Mapping) else [("scores", scores)]
    values = np.concatenate([flat(tensor, name)[0].numpy() for name, tensor in parts] or [np.empty(0)])
    if not values.size:
        raise ValueError("scores is empty")
    own, ax = ax is None, ax or style.axes((WIDTH, 4.0))
    dress(ax, style, title or "Scores", grid="y")
    size = np.abs(values[values != 0])
    zeros = values.size - size.size
    top = float(size.max()) if size.size else 1.0
    # One in a thousand may lie nearer to zero than the logarithmic part reaches: they are counted in its first bin.
    near = max(float(np.quantile(size, 0.001)), top * 1e-9) if size.size else top / 10
    near = min(near, top / 10)
    steps = np.geomspace(near, top, bins + 1)
    ax.set_xscale("symlog", linthresh=near, linscale=0.5)
    for sign in (1, -1):
        side = sign * values[sign * values > 0]
        if side.size:
            edges = steps.copy()
            edges[-1] = top * 1.0001
            counts = np.histogram(np.maximum(side, near), edges)[0]
            bars = (counts, steps) if sign > 0 else (counts[::-1], -steps[::-1])
            ax.stairs(*bars, fill=True, color=style.methods[0])
    ax.set_yscale("log")
    handles, labels = [], []
    if zeros:
        handles.append(ax.bar(0, zeros, width=near, color=style.alarm, zorder=3))
        labels.append(f"exactly zero: {zeros:,} of {values.size:,} ({percent(zeros / values.size)})")
    if threshold is not None:
        below = int((values < threshold).sum())
        handles.append(ax.axvline(threshold, color=style.text, linewidth=1.2, linestyle="--", zorder=4))
        labels.append(f"threshold {threshold:.3g}: {below:,} below ({percent(below / values.size)})")
    negative = bool((values < 0).any())
    low = -top if negative else -near
    ax.set(xlim=(1.3 * low, 1.3 * top), ylabel="weights (log scale)")
    ax.set_xlabel("score (log scale on both sides of zero)" if negative else "score (log scale)")
    ax.set_ylim(0.7, ax.get_ylim()[1] * 1.5)
    first, last = math.ceil(math.log10(near)), math.floor(math.log10(top))
    decades = range(last, first - 1, -math.ceil((last - first + 1) / 5))
    ticks = {0: "0"} | {10.0**d: f"$10^{{{d}}}$" for d in decades}
    ticks |= {-(10.0**d): f"$-10^{{{d}}}$" for d in decades if negative}
    ax.set_xticks(list(ticks), list(ticks.values()))
    ax.minorticks_off()
    legend_outside(ax, style, handles, labels, grow=own)
    return ax
