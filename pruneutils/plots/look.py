"""The look of the pictures: colours in light and dark, a colour for each method, and files that are always the same."""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .._checks import one_of

WIDTH = 8.4  # inches of a whole picture: at the inline backend's 100 dots an inch the 840 pixels of a README

# The place of each well-known method among a style's colours: it looks the same in every picture.
METHODS = {"magnitude": 0, "snip": 1, "grasp": 2, "synflow": 3, "gradient": 4, "ramp": 5, "random": 6}
_MARKERS = "osD^vP>X"
_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (9, 1)), (0, (8, 2, 2, 2)))


@dataclass(frozen=True)
class Style:
    """The colours of a picture: texts have a contrast of at least 4.5 to 1 with the canvas, lines of 3 to 1."""

    name: str = "light"
    canvas: str = "#ffffff"
    text: str = "#1f2328"
    muted: str = "#59636e"  # notes and ticks
    grid: str = "#d1d9e0"
    alarm: str = "#BC4C00"  # what has collapsed
    # Okabe and Ito's hues, safe for the colour-blind, as light or dark as lines have to be
    methods: tuple = ("#005A9C", "#CB8400", "#009E73", "#A83A00", "#CC79A7", "#3A9AD9", "#1f2328", "#6B6100")
    layers: tuple = (0.08, 0.6)  # the part of viridis that stands out from the canvas
    pyplot: bool = True

    def axes(self, size: tuple[float, float], projection: str | None = None) -> Axes:
        """Return the one Axes of a new figure of `size` inches."""
        options = {"figsize": size, "layout": None if projection else "constrained"}
        figure = plt.figure(**options) if self.pyplot else FigureCanvasAgg(Figure(**options)).figure
        figure.patch.set_in_layout(True)  # the tight bounding box of the notebooks' backend then holds all of it
        return figure.add_axes((0, 0, 1, 1), projection=projection) if projection else figure.add_subplot()

    def rc(self) -> dict[str, Any]:
        """Return the matplotlib settings of this style: seaborn's theme in our colours."""
        inks = {
            self.text: ("text.color", "axes.labelcolor", "axes.titlecolor", "legend.labelcolor"),
            self.muted: ("axes.edgecolor", "xtick.color", "ytick.color"),
            self.canvas: ("figure.facecolor", "axes.facecolor"),
            self.grid: ("grid.color",),
        }
        title = {"axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 10}
        lines = {"lines.linewidth": 1.6, "lines.markersize": 5, "grid.linewidth": 0.6, "hatch.linewidth": 0.6}
        frame = {"axes.spines.top": False, "axes.spines.right": False, "patch.force_edgecolor": False}
        letters = {"font.family": ["DejaVu Sans"], "legend.title_fontsize": 8.8, "legend.frameon": False}
        theme = sns.axes_style("whitegrid") | sns.plotting_context("paper") | title | lines | frame | letters
        theme["axes.prop_cycle"] = mpl.cycler(color=self.methods)
        return theme | {key: ink for ink, keys in inks.items() for key in keys}

    def ordered(self, n: int) -> np.ndarray:
        """Return `n` colours in order, (n, 3)."""
        places = np.linspace(*self.layers, n) if n > 1 else [sum(self.layers) / 2]
        return mpl.colormaps["viridis"](places)[:, :3]


_STYLES = {
    "light": Style(),
    "dark": Style(
        name="dark",
        canvas="#0d1117",
        text="#f0f6fc",
        muted="#9198a1",
        grid="#3d444d",
        alarm="#FF7B2E",
        methods=("#3D9BE0", "#E69F00", "#00B383", "#F0662A", "#D98ABF", "#9AD8F7", "#f0f6fc", "#F0E442"),
        layers=(0.34, 0.92),
    ),
}
_NAME: ContextVar[str] = ContextVar("style", default="light")


@contextmanager
def style(name: str) -> Iterator[None]:
    """Draw the pictures within the block in this style, those of `pu.plots` and your own.

    Args:
        name: "light" or "dark".

    Yields:
        Nothing; the style ends with the block.

    Example:
        >>> with pu.plots.style("dark"):
        ...     ax = pu.plots.layer_bars(pu.layer_table(torch.nn.Linear(4, 2)))
    """
    chosen = find_style(name)
    token = _NAME.set(chosen.name)
    try:
        with _settings(chosen):
            yield
    finally:
        _NAME.reset(token)


def _settings(style):
    plt.draw_if_interactive()  # loads the backend first, or its settings would end with these
    return mpl.rc_context(style.rc())


def find_style(style: str | Style | None) -> Style:
    """Return the style with this name; that of the enclosing `with style(...)` for None."""
    if isinstance(style, Style):
        return style
    return _STYLES[one_of("style", _NAME.get() if style is None else style, _STYLES)]


def method_styles(names: Iterable, style: str | Style | None = None) -> dict:
    """Give each method the colour, marker and line (keywords of `ax.plot`) that it has in every picture.

    Names that are not in METHODS fill the free ones in sorted order; numbers are ordered, and so are their colours.
    """
    look, names = find_style(style), list(dict.fromkeys(names))
    if all(isinstance(name, (int, float, np.number)) for name in names):
        names = sorted(names)
        colors = [tuple(color) for color in look.ordered(len(names))]
        slots = dict(zip(names, range(len(names))))
    else:
        colors = look.methods
        slots = {name: METHODS[name] for name in names if name in METHODS}
        free = [slot for slot in range(len(colors) + len(names)) if slot not in slots.values()]
        slots |= dict(zip(sorted((name for name in names if name not in slots), key=str), free))
    looks = {}
    for name in names:
        shifted = slots[name] + slots[name] // len(colors)  # past the last colour, so that no two methods look the same
        looks[name] = {
            "color": colors[slots[name] % len(colors)],
            "marker": _MARKERS[shifted % len(_MARKERS)],
            "linestyle": _LINES[shifted % len(_LINES)],
        }
    return looks


_SHARED = {"title": str | None, "ax": Axes | None, "style": str | Style | None}
_SHARED |= {"save": str | Path | None, "axes": Mapping | None}
_DOCUMENTED = """
        title, ax: The headline, and the Axes to draw into; without it a new figure is made.
        style: "light" or "dark"; by default that of the enclosing `with pu.plots.style(...)`.
        save: A path without suffix: writes path.png in light and path_dark.png in dark.
        axes: Properties of the Axes as its `set` takes them, such as {"yscale": "log"}.

    Returns:
        The Axes. Raises ValueError if a column is missing, an option is unknown, or values lie where they cannot.

    Example:"""


def picture(draw: Callable[..., Axes]) -> Callable[..., Axes]:
    """Give a drawing function the keywords of every picture, as in _SHARED, and what its docstring says of them."""

    @functools.wraps(draw)
    def call(*args, title=None, ax=None, style=None, **options):
        look, path, axes = find_style(style), options.pop("save", None), options.pop("axes", None) or {}

        def drawn_in(look, ax):
            with _settings(look):
                drawn = draw(*args, title=title, ax=ax, style=look, **options)
                drawn.set(**axes)
                return drawn

        drawn, path = drawn_in(look, ax), path and str(path).removesuffix(".png")
        if path and ax is not None:
            _save(drawn, f"{path}.png")
        elif path:
            for name, end in (("light", ""), ("dark", "_dark")):
                twin = drawn if name == look.name else drawn_in(replace(_STYLES[name], pyplot=False), None)
                _save(twin, f"{path}{end}.png")
        return drawn

    signature = inspect.signature(draw)
    own = [parameter for name, parameter in signature.parameters.items() if name not in _SHARED]
    keyword = functools.partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY, default=None)
    shared = [keyword(name, annotation=annotation) for name, annotation in _SHARED.items()]
    call.__signature__ = signature.replace(parameters=own + shared)
    call.__doc__ = draw.__doc__.replace("\n\n    Example:", _DOCUMENTED, 1)
    return call


def _save(ax: Axes, path: str) -> None:
    """Write the figure, so that the same one gives the same bytes each time."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    ax.figure.savefig(path, dpi=200, metadata={"Software": None}, facecolor=ax.figure.get_facecolor())


def percent(fraction: float, decimals: int | None = None) -> str:
    """Write a fraction as a percentage that says 0 or 100 only where it is exactly so."""
    if decimals is None:  # one near 0 and 1, where it matters
        decimals = 1 if (fraction < 0.0995 or fraction > 0.9905) and round(1000 * fraction) % 10 else 0
    if fraction in (0, 1) or not math.isfinite(fraction):
        return f"{100 * fraction:.0f} %"
    text, least = f"{100 * fraction:.{decimals}f}", 10.0**-decimals
    if float(text) == 0:
        return f"<{least:.{decimals}f} %"
    return (f">{100 - least:.{decimals}f}" if float(text) == 100 else text) + " %"


def short(fraction: float, _=None) -> str:
    """Write a fraction as a percentage with as many decimals as it needs: 99.5 % beside 50 %."""
    return f"{100 * fraction:.6g} %"


def dress(ax: Axes, style: Style, title: str | None = None, grid: str | None = None) -> None:
    """Do what settings cannot do: for an Axes made elsewhere, and for ticks that are made when the figure is drawn."""
    ax.figure.set_facecolor(style.canvas)
    ax.set_facecolor(style.canvas)
    ax.tick_params(colors=style.muted, length=0, labelsize=8.8, labelfontfamily="DejaVu Sans")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(style.muted)
    for axis in (ax.xaxis, ax.yaxis):
        axis.label.set(color=style.text, fontsize=9.6, fontfamily="DejaVu Sans")
    ax.grid(False)
    if grid:
        ax.grid(axis=grid, color=style.grid, linewidth=0.6)
        ax.set_axisbelow(True)
    if title:
        ax.set_title(title, color=style.text, wrap=True)
