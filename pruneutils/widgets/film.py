"""Pictures of a whole panel, for readers without a kernel: films, and pages that have a slider of their own."""

import html
import io
import re

import matplotlib as mpl
from matplotlib.figure import Figure
from PIL import Image

from ..plots.look import find_style
from ..plots.panel import png

_SLIDER, _HEAD = 0.62, 2.6  # inches high
_WIDTH = 12.0


def frame(panel: object, style: str, slider: bool = True) -> Image.Image:
    """Return what a panel shows as one image: the slider, the curve, the numbers, and below the weights.

    Args:
        panel: A `SparsityExplorer`.
        style: "light" or "dark".
        slider: Whether to draw the slider.

    Returns:
        The image, as wide as the panel's picture.
    """
    look = find_style(style)
    parts = [panel._draw_course_on(Figure(), style), _numbers(panel, look), panel._draw(Figure(), style)]
    course, numbers, picture = (Image.open(io.BytesIO(png(part))) for part in parts)
    above = [Image.open(io.BytesIO(png(_slider(panel, look))))] if slider else []
    top = sum(image.height for image in above)
    whole = Image.new("RGB", (picture.width, top + course.height + picture.height), look.canvas)
    for image in above:
        whole.paste(image, (0, 0))
    whole.paste(course, (0, top))
    whole.paste(numbers, (course.width, top))
    whole.paste(picture, (0, top + course.height))
    return whole


def _slider(panel, look) -> Figure:
    """The slider as a line with a knob, and what is chosen beside it."""
    with mpl.rc_context(look.rc()):
        figure = Figure(figsize=(_WIDTH, _SLIDER))
        ax = figure.add_axes((0.1 * 6.4 / _WIDTH, 0, 0.66 * 6.4 / _WIDTH, 1))
        ax.set(xlim=(0, 1), ylim=(-1, 1))
        ax.set_axis_off()
        place = panel.masks.sparsity if panel.choice.sparsity is None else panel.choice.sparsity
        ink = look.methods[0]
        ax.plot([0, 1], [-0.2, -0.2], color=look.muted, linewidth=3, solid_capstyle="round", clip_on=False)
        ax.plot([0, place], [-0.2, -0.2], color=ink, linewidth=5, solid_capstyle="round", clip_on=False)
        ax.plot(place, -0.2, "o", color=ink, markersize=15, markeredgecolor=look.canvas, clip_on=False)
        figure.text(0.435, 0.4, f"sparsity {place:.1%}", fontsize=15, fontweight="bold", va="center")
        words = f"criterion {panel.criterion.label}   scope {panel.scope.label}   granularity {panel.granularity.label}"
        figure.text(0.99, 0.4, words, fontsize=10.5, color=look.muted, va="center", ha="right")
    return figure


def _numbers(panel, look) -> Figure:
    """The panel's text."""
    with mpl.rc_context(look.rc()):
        figure = Figure(figsize=(_WIDTH - 6.4, _HEAD))
        for row, line in enumerate(re.sub(r"^<div[^>]*>|</div>$", "", panel.text.value).split("<br>")):
            color = look.alarm if "▲ collapsed" in line else look.tie if "▲" in line else look.text
            plain = html.unescape(re.sub(r"<[^>]+>|&nbsp;", "", line))
            weight = "bold" if row < 2 else "normal"
            text = figure.text(0.02, 0.82 - 0.125 * row, plain, fontsize=11.5, color=color, fontweight=weight)
            text.set_parse_math(False)
    return figure
