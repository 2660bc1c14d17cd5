"""The look of the pictures: colours in light and dark, a colour for each method, and files that are always the same."""

import functools
import math
from collections.abc import Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from .._checks import nearest

# Okabe & Ito's colours, safe for the colour-blind; None is the text colour. Their yellow vanishes on white: it is last.
METHOD_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", None, "#F0E442")
_METHOD_SLOTS = {"magnitude": 0, "snip": 1, "grasp": 2, "synflow": 3, "gradient": 4, "random": 6}
_MARKERS = "osD^vP>X"
_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), "-", (0, (8, 2)))


@dataclass(frozen=True)
class Style:
    """The colours of a picture, and how its figure is made."""

    name: str
    canvas: str
    text: str
    muted: str
    grid: str
    alarm: str
    layers: tuple[float, float]  # the part of viridis that stands out from the canvas
    pyplot: bool = True

    def axes(self, size: tuple[float, float], projection: str | None = None):
        """A new figure of `size` inches with one Axes."""
        options = {"figsize": size, "layout": None if projection else "constrained"}
        figure = plt.figure(**options) if self.pyplot else Figure(**options)
        if projection:
            return figure.add_axes((0, 0, 1, 1), projection=projection)
        return figure.add_subplot()

    def rc(self) -> dict:
        text, muted, grid, canvas = self.text, self.muted, self.grid, self.canvas
        return {
            "font.family": ["DejaVu Sans"], "font.size": 9, "text.color": text,
            "figure.facecolor": canvas, "axes.facecolor": canvas, "axes.edgecolor": muted, "axes.labelcolor": text,
            "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 10,
            "axes.titlecolor": text, "xtick.color": muted, "ytick.color": muted, "grid.color": grid,
            "legend.frameon": True, "legend.framealpha": 0.85, "legend.facecolor": canvas, "legend.edgecolor": "none",
            "legend.labelcolor": text, "legend.fontsize": 8.5, "legend.title_fontsize": 8, "lines.linewidth": 1.6,
            "lines.markersize": 5, "hatch.linewidth": 0.6,
        }  # fmt: skip

    def ordered(self, n: int) -> np.ndarray:
        """`n` colours in order, (n, 4)."""
        return mpl.colormaps["viridis"](np.linspace(*self.layers, n) if n > 1 else [sum(self.layers) / 2])


_STYLES = {
    "light": Style("light", "#ffffff", "#1f2328", "#59636e", "#d1d9e0", "#D55E00", (0.10, 0.80)),
    "dark": Style("dark", "#0d1117", "#f0f6fc", "#9198a1", "#3d444d", "#FF7B2E", (0.28, 0.92)),
}
_STYLE = ContextVar("style", default="light")


@contextmanager
def style(name: str):
    """Within the block, pictures are drawn "light" or "dark" where their call does not say."""
    token = _STYLE.set(_style(name).name)
    try:
        yield
    finally:
        _STYLE.reset(token)


def _style(name) -> Style:
    name = _STYLE.get() if name is None else name
    return _STYLES[choice("style", name, _STYLES)]


def method_styles(names: Iterable, style: str | None = None) -> dict:
    """{name: {"color", "marker", "linestyle"}}, whatever the order of `names`.

    The criteria that many pictures share have a colour of their own; other names fill the free ones in sorted order;
    numbers are ordered, and so are their colours.
    """
    look = style if isinstance(style, Style) else _style(style)
    names = list(dict.fromkeys(names))
    if all(isinstance(name, (int, float, np.number)) for name in names):
        names = sorted(names)
        colors = [tuple(c) for c in look.ordered(len(names))]
        slots = dict(zip(names, range(len(names)), strict=True))
    else:
        slots = {name: _METHOD_SLOTS[name] for name in names if name in _METHOD_SLOTS}
        free = [slot for slot in range(len(METHOD_COLORS) + len(names)) if slot not in slots.values()]
        slots |= dict(zip(sorted((n for n in names if n not in slots), key=str), free, strict=False))
        colors = [color or look.text for color in METHOD_COLORS]
    # Past the last colour the markers shift by one, so that no two methods look the same.
    return {
        name: {
            "color": colors[slots[name] % len(colors)],
            "marker": _MARKERS[(slots[name] + slots[name] // len(colors)) % len(_MARKERS)],
            "linestyle": _LINES[slots[name] % len(_LINES)],
        }
        for name in names
    }


def picture(draw):
    """Give `draw(..., ax, style)` the arguments that every picture has: `ax`, `style` and `save`, as in `plots`."""

    @functools.wraps(draw)
    def call(*args, **options):
        look, path, ax = _style(options.pop("style", None)), options.pop("save", None), options.get("ax")
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


def save(figure, path, dpi: int = 200) -> list[Path]:
    """Write a Figure (or an Axes' figure) to path.png and path.svg, or to `path` alone if it ends in .png or .svg.

    The same figure gives the same bytes on every call: no dates, no versions, fixed ids. Returns the paths written.
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


# --- What the pictures share -----------------------------------------------------------------------------------------


def dress(ax, style: Style, title=None, grid=None):
    """What rcParams cannot do: an Axes made elsewhere, and ticks that are made only when the figure is drawn."""
    ax.figure.set_facecolor(style.canvas)
    ax.set_facecolor(style.canvas)
    ax.tick_params(colors=style.muted, labelsize=8.5, labelfontfamily="DejaVu Sans")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(style.muted)
    if grid:
        ax.grid(axis=grid, color=style.grid, linewidth=0.6)
        ax.set_axisbelow(True)
    if title:
        ax.set_title(title)


def percent(fraction: float) -> str:
    """A percentage that says 0 or 100 only where it is exactly so."""
    if fraction in (0, 1) or not math.isfinite(fraction):
        return f"{100 * fraction:.0f} %"
    if fraction < 0.001:
        return "<0.1 %"
    if fraction > 0.999:
        return ">99.9 %"
    text = f"{100 * fraction:.1f}" if fraction < 0.0995 or fraction > 0.9905 else f"{100 * fraction:.0f}"
    return text.removesuffix(".0") + " %"


def short(name: str, longest: int = 22) -> str:
    return name if len(name) <= longest else "…" + name[1 - longest :]


SPARSITY_TICKS = (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9999)


def spread(sparsity):
    """-log10(density): as far from 0.9 to 0.99 as from 0 to 0.9."""
    return -np.log10(np.maximum(1 - np.asarray(sparsity, float), 1e-12))


def choice(argument, value, choices):
    if value not in tuple(choices):
        raise ValueError(f"{argument}={value!r}: {nearest(value, choices)}")
    return value


def need(frame, *columns):
    for column in columns:
        if column not in frame.columns:
            raise ValueError(f"the table has no column {column!r}; {nearest(column, frame.columns)}")
    if frame.empty:
        raise ValueError("the table has no rows")
