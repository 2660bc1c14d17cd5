"""Drawings that explain: six kernels under two rules, where a threshold sticks, what happens while a network trains."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from .._checks import fraction
from .curves import draw_points
from .look import WIDTH, Style, dress, method_styles, picture
from .tables import groups_of, need, note_of
from .ticks import Percent, RoundTicks, fractions_on_y, percent


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


@picture
def pruning_courses(
    courses: pd.DataFrame,
    runs: pd.DataFrame,
    y: str = "test_accuracy",
    *,
    title: str | None = None,
    style: str | Style | None = None,
    save: str | Path | None = None,
) -> Figure:
    """Draw sparsity and learning rate over the epochs above the accuracy, a column for each design.

    Args:
        courses: What the designs prescribe: epoch, sparsity, "learning rate" (a fraction of the first), arm, and equal,
            which names the column.
        runs: A row for each run and epoch: epoch, the accuracy, arm and equal. Rows whose `equal` is missing, such as
            those of the network that is not pruned, are drawn in every column.
        y: The column of accuracies.
        title: The headline.
        style: "light" or "dark".
        save: A path without suffix; writes path.png, path.svg and path_dark.png.

    Returns:
        The Figure.

    Raises:
        ValueError: If a column is missing.

    Example:
        >>> import pandas as pd
        >>> courses = pd.DataFrame({"epoch": [0, 1, 2], "sparsity": [0, 0.5, 0.9], "learning rate": [1, 0.5, 0]})
        >>> runs = pd.DataFrame({"epoch": [1, 2], "test_accuracy": [0.8, 0.7]})
        >>> figure = pu.plots.pruning_courses(*(t.assign(arm="2 prunings", equal="total") for t in (courses, runs)))
        >>> [ax.get_ylabel() for ax in figure.axes]
        ['sparsity (%)', 'learning rate', 'test accuracy']
    """
    need(courses, "epoch", "sparsity", "learning rate", "arm", "equal"), need(runs, "epoch", y, "arm", "equal")
    designs = list(courses["equal"].unique())
    figure = style.axes((4.6 * len(designs) + 1.4, 6.4)).figure
    figure.clear()
    heights = {"height_ratios": (0.8, 0.5, 1.7)}
    grid = figure.subplots(3, len(designs), sharex=True, sharey="row", squeeze=False, gridspec_kw=heights)
    arms = list(dict.fromkeys([*courses["arm"], *runs["arm"]]))
    looks = method_styles(arms, style)
    shown: dict = {}
    for design, (above, middle, below) in zip(designs, grid.T):
        dress(above, style, str(design), grid="y"), dress(middle, style, grid="y"), dress(below, style, grid="y")
        for arm, rows in courses[courses["equal"] == design].groupby("arm", sort=False):
            look = looks[arm] | {"marker": None, "linewidth": 1.6}
            above.plot(rows["epoch"], rows["sparsity"], **look)
            middle.plot(rows["epoch"], rows["learning rate"], **look)
        groups = groups_of(runs[(runs["equal"] == design) | runs["equal"].isna()], "epoch", y, "arm", "t")
        for arm in groups:
            draw_points(below, groups[arm], looks[arm] | {"marker": None}, arm, bands=True, pale=True)
        shown |= groups
        below.set_xlabel("epoch")
        below.xaxis.set_major_locator(RoundTicks(integer=True))
    for row, label in zip(grid, ("sparsity (%)", "learning rate", y.replace("_", " "))):
        row[0].set_ylabel(label)
    grid[0, 0].yaxis.set_major_formatter(Percent(""))
    grid[1, 0].set(yticks=[0, 1], yticklabels=["0", "first"])
    fractions_on_y(grid[2, 0])
    handles = [Line2D([], [], **(looks[arm] | {"marker": None, "linewidth": 1.6})) for arm in arms]
    note = note_of(pd.concat(shown.values())["n"], "t", runs)
    legend = figure.legend(handles, arms, loc="outside right center", title=note or None, alignment="left")
    legend.get_title().set_color(style.muted)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12, color=style.text)
    return figure
