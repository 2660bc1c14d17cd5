"""The look of the pictures: colours in light and dark, a colour for each method, and files that are always the same."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure

from .._checks import one_of

WIDTH = 8.4  # inches of a whole picture: at the inline backend's 100 dots an inch the 840 pixels of a README
_METHOD_SLOTS = {"magnitude": 0, "snip": 1, "grasp": 2, "synflow": 3, "gradient": 4, "ramp": 5, "random": 6}
_MARKERS = "osD^vP>X"
_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), "-", (0, (8, 2)))

P = ParamSpec("P")
Drawn = TypeVar("Drawn", bound=Axes)


@dataclass(frozen=True)
class Style:
    """The colours of a picture, and how its figure is made.

    Texts have a contrast of at least 4.5 to 1 with the canvas, lines and markers of at least 3 to 1.
    """

    name: str
    canvas: str
    text: str
    muted: str  # what is said beside: notes, ticks
    grid: str
    alarm: str  # what has collapsed
    tie: str  # scores that tie at the cut
    methods: tuple[str, ...]  # Okabe and Ito's hues, safe for the colour-blind, as light or dark as lines have to be
    layers: tuple[float, float]  # the part of viridis that stands out from the canvas
    pyplot: bool = True

    def axes(self, size: tuple[float, float], projection: str | None = None) -> Axes:
        """Return the one Axes of a new figure of `size` inches."""
        options = {"figsize": size, "layout": None if projection else "constrained"}
        figure = plt.figure(**options) if self.pyplot else Figure(**options)
        # A tight bounding box, which the notebooks' backend asks for, then holds the whole figure.
        figure.patch.set_in_layout(True)
        if projection:
            return figure.add_axes((0, 0, 1, 1), projection=projection)
        return figure.add_subplot()

    def rc(self) -> dict[str, Any]:
        """Return the matplotlib settings of this style."""
        text, muted, grid, canvas = self.text, self.muted, self.grid, self.canvas
        return {
            "font.family": ["DejaVu Sans"], "font.size": 9, "text.color": text,
            "figure.facecolor": canvas, "axes.facecolor": canvas, "axes.edgecolor": muted, "axes.labelcolor": text,
            "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 10,
            "axes.titlecolor": text, "xtick.color": muted, "ytick.color": muted, "grid.color": grid,
            "legend.frameon": False, "legend.labelcolor": text, "legend.fontsize": 8.5, "legend.title_fontsize": 8.5,
            "lines.linewidth": 1.6, "lines.markersize": 5, "hatch.linewidth": 0.6,
        }  # fmt: skip

    def ordered(self, n: int) -> np.ndarray:
        """Return `n` colours in order, (n, 4)."""
        places = np.linspace(*self.layers, n) if n > 1 else [sum(self.layers) / 2]
        return np.array([_readable(tuple(color), self.canvas) for color in mpl.colormaps["viridis"](places)])


_STYLES = {
    "light": Style("light", "#ffffff", "#1f2328", "#59636e", "#d1d9e0", "#BC4C00", "#A8548A",
                   ("#005A9C", "#CB8400", "#009E73", "#A83A00", "#CC79A7", "#3A9AD9", "#1f2328", "#6B6100"),
                   (0.08, 0.80)),
    "dark": Style("dark", "#0d1117", "#f0f6fc", "#9198a1", "#3d444d", "#FF7B2E", "#E08FC0",
                  ("#3D9BE0", "#E69F00", "#00B383", "#F0662A", "#D98ABF", "#9AD8F7", "#f0f6fc", "#F0E442"),
                  (0.28, 0.92)),
}  # fmt: skip
_NAME: ContextVar[str] = ContextVar("style", default="light")


@contextmanager
def style(name: str) -> Iterator[None]:
    """Draw the pictures within the block in this style, where their call does not name one.

    Args:
        name: "light" or "dark".

    Yields:
        Nothing; the style ends with the block.

    Raises:
        ValueError: If there is no such style.

    Example:
        >>> with pu.plots.style("dark"):
        ...     ax = pu.plots.layer_bars(pu.layer_table(torch.nn.Linear(4, 2)))
        >>> ax.figure.get_facecolor()[:3] == (13 / 255, 17 / 255, 23 / 255)
        True
    """
    token = _NAME.set(find_style(name).name)
    try:
        yield
    finally:
        _NAME.reset(token)


def find_style(style: str | Style | None) -> Style:
    """Return the style with this name; that of the enclosing `with style(...)` for None."""
    if isinstance(style, Style):
        return style
    return _STYLES[one_of("style", _NAME.get() if style is None else style, _STYLES)]


def contrast(a, b) -> float:
    """Return the contrast of two colours by the Web Content Accessibility Guidelines, from 1 to 21."""
    bright = []
    for color in (a, b):
        channels = np.array(to_rgb(color))
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        bright.append(float(linear @ (0.2126, 0.7152, 0.0722)) + 0.05)
    return max(bright) / min(bright)


@functools.cache
def _readable(color, canvas, least=3.05):
    """Mix black into a colour, or white on a dark canvas, until it stands out."""
    color, ink = np.array(to_rgba(color)), np.array(to_rgba("black" if canvas == "#ffffff" else "white"))
    return next(
        tuple(mixed)
        for mixed in (color + share * (ink - color) for share in np.linspace(0, 1, 51))
        if contrast(mixed, canvas) >= least
    )


def method_styles(names: Iterable, style: str | Style | None = None) -> dict:
    """Give each method the colour, marker and line that it has in every picture.

    The criteria that many pictures share have looks of their own. Other names fill the free ones in sorted order;
    numbers are ordered, and so are their colours.

    Args:
        names: The methods, in any order.
        style: "light" or "dark"; by default that of the enclosing `with pu.plots.style(...)`, else "light".

    Returns:
        {name: {"color", "marker", "linestyle"}}, keywords for `ax.plot`.

    Raises:
        ValueError: If there is no such style.

    Example:
        >>> pu.plots.method_styles(["snip", "magnitude"])["snip"]
        {'color': '#CB8400', 'marker': 's', 'linestyle': '--'}
    """
    look = find_style(style)
    names = list(dict.fromkeys(names))
    if all(isinstance(name, (int, float, np.number)) for name in names):
        names = sorted(names)
        colors = [tuple(c) for c in look.ordered(len(names))]
        slots = dict(zip(names, range(len(names))))
    else:
        slots = {name: _METHOD_SLOTS[name] for name in names if name in _METHOD_SLOTS}
        free = [slot for slot in range(len(look.methods) + len(names)) if slot not in slots.values()]
        slots |= dict(zip(sorted((n for n in names if n not in slots), key=str), free))
        colors = look.methods
    # Past the last colour the markers shift by one, so that no two methods look the same.
    return {
        name: {
            "color": colors[slots[name] % len(colors)],
            "marker": _MARKERS[(slots[name] + slots[name] // len(colors)) % len(_MARKERS)],
            "linestyle": _LINES[slots[name] % len(_LINES)],
        }
        for name in names
    }


def picture(draw: Callable[P, Drawn]) -> Callable[P, Drawn]:
    """Give a function what every picture has: it finds the `style`, draws in it, and writes the files of `save`."""

    @functools.wraps(draw)
    def call(*args, **options):
        look, path, ax = find_style(options.pop("style", None)), options.pop("save", None), options.get("ax")
        with mpl.rc_context(look.rc()):
            drawn = draw(*args, style=look, **options)
        if path is not None and ax is not None:
            save(drawn, path)
        elif path is not None:
            stem = str(path).removesuffix(".png").removesuffix(".svg")
            for variant in _STYLES.values():
                twin = drawn
                if variant != look:
                    with mpl.rc_context(variant.rc()):
                        twin = draw(*args, style=replace(variant, pyplot=False), **options)
                save(twin, path if variant.name == "light" else f"{stem}_dark.png")
        return drawn

    return call


def save(figure: Figure | Axes, path: str | Path, dpi: int = 200) -> list[Path]:
    """Write a figure so that the same figure gives the same bytes each time: no dates, no versions, fixed ids.

    Args:
        figure: A Figure, or an Axes of it.
        path: path.png and path.svg are written, or `path` alone if it ends in .png or .svg.
        dpi: Dots an inch of the PNG.

    Returns:
        The paths that were written.

    Example:
        >>> import tempfile
        >>> ax = pu.plots.layer_bars(pu.layer_table(torch.nn.Linear(4, 2)))
        >>> [path.name for path in pu.plots.save(ax, tempfile.mkdtemp() + "/bars")]
        ['bars.png', 'bars.svg']
    """
    figure, path = getattr(figure, "figure", None) or figure, Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name such as "at_0.9" has a suffix that is none of a picture's: it is part of the name.
    paths = [path] if path.suffix in (".png", ".svg") else [path.with_name(path.name + s) for s in (".png", ".svg")]
    with mpl.rc_context({"svg.hashsalt": "pruneutils", "svg.fonttype": "path"}):
        for target in paths:
            metadata = {"Software": None} if target.suffix == ".png" else {"Date": None, "Creator": None}
            figure.savefig(target, dpi=dpi, metadata=metadata, facecolor=figure.get_facecolor())
    return paths


def dress(ax: Axes, style: Style, title: str | None = None, grid: str | None = None) -> None:
    """Do what settings cannot do: for an Axes made elsewhere, and for ticks that are made when the figure is drawn."""
    ax.figure.set_facecolor(style.canvas)
    ax.set_facecolor(style.canvas)
    ax.tick_params(colors=style.muted, labelsize=8.5, labelfontfamily="DejaVu Sans")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(style.muted)
    for axis in (ax.xaxis, ax.yaxis):
        axis.label.set(color=style.text, fontsize=9, fontfamily="DejaVu Sans")
    if grid:
        ax.grid(axis=grid, color=style.grid, linewidth=0.6)
        ax.set_axisbelow(True)
    if title:
        ax.set_title(title, y=1, wrap=True)  # matplotlib would look for its height among the labels of all ticks
