"""Drawings that explain: what a rule does to six kernels, and where a threshold sticks."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from .._checks import fraction
from .look import WIDTH, Style, dress, picture
from .ticks import Percent, percent


@picture
def ranked_kernels(
    kernels: Mapping[str, torch.Tensor],
    share: float = 0.5,
    *,
    title: str | None = "Which kernels go depends on the rule",
    ax: Axes | None = None,
    style: str | Style | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Draw kernels in two rows, ranked by the sum and by the mean of |w|, and cross out those that go.

    Args:
        kernels: {name: weights of one kernel, (height, width)}.
        share: The fraction of the kernels that is pruned.
        title: The headline.
        ax: The Axes to draw into.
        style: "light" or "dark".
        save: A path without suffix; writes path.png, path.svg and path_dark.png.

    Returns:
        The Axes.

    Raises:
        ValueError: If there is no kernel, one is not a matrix, or `share` is outside [0, 1].

    Example:
        >>> kernels = {"large": torch.full((3, 3), 0.2), "small": torch.full((1, 1), 0.9)}
        >>> ax = pu.plots.ranked_kernels(kernels)
        >>> [text.get_text() for text in ax.texts if text.get_text() in kernels]  # lowest first, by sum and by mean
        ['small', 'large', 'large', 'small']
    """
    fraction("share", share)
    odd = [name for name, kernel in kernels.items() if kernel.ndim != 2]
    if not kernels or odd:
        raise ValueError(f"kernels must be matrices (height, width), at least one; not so: {odd or 'none was given'}")
    n, ax = len(kernels), ax or style.axes((WIDTH, 4.4))
    dress(ax, style, title)
    peak = max(float(kernel.abs().max()) for kernel in kernels.values()) or 1.0
    side = max(max(kernel.shape) for kernel in kernels.values())
    for row, (rule, score) in enumerate((("sum", torch.sum), ("mean", torch.mean))):
        ranked = sorted(kernels.items(), key=lambda pair: float(score(pair[1].abs())))
        top = -row * 1.75
        ax.text(-0.12, top, f"by the {rule}\nof |w|", ha="right", va="center", fontsize=10, color=style.text)
        for place, (name, kernel) in enumerate(ranked):
            _draw_kernel(ax, kernel.abs() / peak, (place + 0.5, top), 0.8 / side, style)
            told = f"{float(score(kernel.abs())):.2f}"
            ax.text(place + 0.5, top + 0.48, name, ha="center", va="bottom", fontsize=8.5, color=style.text)
            gone = place < round(share * n)
            words, ink = (f"{told}: goes", style.alarm) if gone else (f"{told}: stays", style.text)
            ax.text(place + 0.5, top - 0.48, words, ha="center", va="top", fontsize=8.5, color=ink)
            if gone:
                for sign in (-1, 1):
                    ends = [place + 0.5 - 0.42, place + 0.5 + 0.42], [top - sign * 0.42, top + sign * 0.42]
                    ax.plot(*ends, color=style.alarm, linewidth=2)
    ax.annotate("", (n, -2.65), (0, -2.65), arrowprops={"arrowstyle": "->", "color": style.muted})
    ax.text(n / 2, -2.72, "lower scores go first", ha="center", va="top", fontsize=8.5, color=style.muted)
    ax.set(xlim=(-1.1, n), ylim=(-2.95, 0.75), aspect="equal", xticks=[], yticks=[])
    ax.set_axis_off()
    return ax


def _draw_kernel(ax, values, center, size, style) -> None:
    """A kernel as squares, the darker (on a dark page the brighter) the larger."""
    height, width = values.shape
    corner = center[0] - width * size / 2, center[1] + height * size / 2
    for (i, j), value in np.ndenumerate(values.detach().cpu().double().numpy()):
        place = corner[0] + j * size, corner[1] - (i + 1) * size
        ax.add_patch(Rectangle(place, size, size, facecolor=style.canvas, edgecolor=style.muted, linewidth=0.8))
        ink = {"facecolor": style.methods[0], "edgecolor": "none", "alpha": float(0.1 + 0.9 * value)}
        ax.add_patch(Rectangle(place, size, size, **ink))


@picture
def stuck_threshold(
    scores: torch.Tensor,
    asked: float,
    *,
    title: str | None = "The threshold sticks where scores tie",
    ax: Axes | None = None,
    style: str | Style | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Draw all scores in order as a strip with two marks: the share asked for, and the share that a threshold takes.

    The threshold is the score at the place asked for, and whatever lies above it goes. Where many scores are equal,
    none of them is above it.

    Args:
        scores: The scores, in any shape; the highest go first.
        asked: The fraction asked for.
        title: The headline.
        ax: The Axes to draw into.
        style: "light" or "dark".
        save: A path without suffix; writes path.png, path.svg and path_dark.png.

    Returns:
        The Axes.

    Raises:
        ValueError: If there is no score, or `asked` is outside [0, 1].

    Example:
        >>> scores = torch.tensor([2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
        >>> ax = pu.plots.stuck_threshold(scores, asked=0.5)
        >>> [text.get_text() for text in ax.texts[-2:]]
        ['asked for 50 %', 'removed 10 %, threshold 0']
    """
    fraction("asked", asked)
    values = scores.detach().flatten().cpu()
    if not len(values):
        raise ValueError("scores is empty")
    k = min(int(len(values) * asked), len(values) - 1)
    threshold = float(values.kthvalue(len(values) - k).values)
    above, zero = float((values > 0).double().mean()), float((values == 0).double().mean())
    removed = float((values > threshold).double().mean())
    ax = ax or style.axes((WIDTH, 2.5))
    dress(ax, style, title)
    parts = [(0, above, style.methods[1], "above 0"), (above, zero, style.grid, "exactly 0")]
    parts.append((above + zero, 1 - above - zero, style.methods[0], "below 0"))
    for start, width, color, name in parts:
        ax.barh(0, width, left=start, height=0.34, color=color)
        if width > 0.15:
            ax.text(start + width / 2, 0, f"{percent(width, 1)} of the scores are {name}", color=style.text,
                    ha="center", va="center", fontsize=9.5)  # fmt: skip
    for place, y, marker, color in ((asked, 0.34, "v", style.text), (removed, -0.34, "^", style.alarm)):
        ax.plot([place, place], [y / 2, y], color=color, linewidth=1.6)
        ax.plot(place, y, marker, color=color, markersize=11)
    numeral = "0" if threshold == 0 else "above 0" if threshold > 0 else "below 0"
    for place, y, words, color in (
        (asked, 0.52, f"asked for {percent(asked)}", style.text),
        (removed, -0.56, f"removed {percent(removed)}, threshold {numeral}", style.alarm),
    ):
        side = "left" if place < 0.12 else "right" if place > 0.88 else "center"
        ax.text(place, y, words, color=color, ha=side, va="center", fontsize=11, fontweight="bold")
    ax.set(xlim=(-0.01, 1.01), ylim=(-0.8, 0.75), yticks=[], xlabel="all scores in order, the highest at the left")
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_formatter(Percent())
    return ax
