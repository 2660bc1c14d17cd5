"""The curve below the explorer's slider: accuracy over sparsity, with the present place and where a layer collapses."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from .look import dress, find_style, method_styles
from .ticks import Percent, percent

_SIZE = (6.4, 2.6)  # inches


def draw_course(
    figure: Figure,
    lines: dict[str, Sequence[tuple[float, float]]],
    current: str,
    dot: tuple[float, float | None],
    collapse: float | None,
    before: float | None,
    n: int,
    style: str,
) -> Figure:
    """Draw accuracy over sparsity anew.

    Args:
        figure: The figure to draw into; what it shows is replaced, and its size set.
        lines: {name: (sparsity, accuracy) points, fractions, in order}; all but `current` are drawn thin.
        current: The name of the line that is chosen.
        dot: The sparsity chosen, and the accuracy there, None if it is not known yet.
        collapse: The sparsity from which on a layer is empty, None if there is none or it is not known yet.
        before: The accuracy before pruning.
        n: The number of images that accuracies were measured on.
        style: "light" or "dark".

    Returns:
        The figure.
    """
    look = find_style(style)
    key = repr((style, lines, current, collapse, before, n))
    with mpl.rc_context(look.rc()):
        if figure.get_label() != key:
            _draw_lines(figure, lines, current, collapse, before, n, look)
            figure.set_label(key)
        (ax,) = figure.axes
        for artist in [part for part in (*ax.lines, *ax.texts) if part.get_gid() != "stays"]:
            artist.remove()
        ax.axvline(dot[0], color=look.muted, linewidth=0.9, linestyle=":")
        if dot[1] is not None:
            color = method_styles([*lines, current], look)[current]["color"]
            ax.plot(*dot, "o", color=color, markersize=9, markeredgecolor=look.text, clip_on=False, zorder=5)
    return figure


def _draw_lines(figure, lines, current, collapse, before, n, look) -> None:
    """Draw what stays while the dot moves."""
    figure.clear()
    figure.set_size_inches(*_SIZE)
    figure.patch.set_in_layout(True)
    ax = figure.add_axes((0.1, 0.2, 0.66, 0.68))
    dress(ax, look, f"Accuracy over sparsity ({n:,} images)", grid="both")
    looks = method_styles([*lines, current], look)
    names = []
    for name, points in lines.items():
        here = name == current
        if here or len(points) > 2:
            shape = {"linewidth": 2.2, "markersize": 3.5} if here else {"linewidth": 0.9, "markersize": 0}
            own = looks[name] | {"linestyle": "-" if here else looks[name]["linestyle"]}
            ax.plot(*np.reshape(points, (-1, 2)).T, gid="stays", zorder=3 if here else 2, **own, **shape)
            names.append((np.mean([y for _, y in points]) if points else 0, name, here))
    if before is not None:
        ax.axhline(before, color=look.muted, linewidth=1, linestyle=(0, (4, 3)), gid="stays", zorder=1)
    if collapse is not None:
        ax.axvline(collapse, color=look.alarm, linewidth=1.4, gid="stays", zorder=1.5)
        ax.plot(collapse, 0, "X", color=look.alarm, markersize=8, clip_on=False, gid="stays", zorder=4)
        side = {"ha": "right", "x": collapse - 0.01} if collapse > 0.4 else {"ha": "left", "x": collapse + 0.01}
        words = f"from {percent(collapse)} a layer is empty"
        ax.text(y=0.04, s=words, color=look.alarm, fontsize=8, gid="stays", **side)
    for row, (_, name, here) in enumerate(sorted(names, reverse=True)):  # the best one first
        weight, y = "bold" if here else "normal", 0.97 - 0.115 * row
        ax.text(1.03, y, name, color=looks[name]["color"], fontsize=8, fontweight=weight, va="center", gid="stays")
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="weights pruned (%)")
    ax.xaxis.set_major_formatter(Percent(""))
    ax.yaxis.set_major_formatter(Percent(""))
    ax.set_ylabel("accuracy (%)")
    ax.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 0.9, 1])
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
