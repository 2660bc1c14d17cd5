"""Record the pictures of the explorer that README, notebook and site show, from the panel itself.

    python docs/record.py film     images/sparsity_explorer*.gif: the slider from 0 to 99 %, light and dark
    python docs/record.py asked    images/grasp_threshold_debug*.gif: a share asked for, and the threshold that sticks
    python docs/record.py synflow  images/pruning_at_initialization.gif: SynFlow in one step beside many, layer by layer
    python docs/record.py panel    images/sparsity_explorer_panel*.png: the panel in JupyterLab, light and dark

The last needs a Chromium.
"""

import html
import io
import re
import sys
import tempfile
import textwrap
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import pruneutils as pu
from pruneutils.plots.look import find_style

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "images"
STYLES = {"light": "", "dark": "_dark"}  # and what files are called


def trained_panels(epochs: int = 6) -> dict[str, pu.widgets.SparsityExplorer]:
    """Return explorers, light and dark, of LeNet-300-100 on the embedded digits, with accuracy on all test images."""
    train, test = pu.data.load("digits")
    model = pu.models.create("lenet300")
    pu.fit(model, train, None, epochs, "adam")
    options = {"sparsity": 0.0, "subset": len(test)}
    return {s: pu.widgets.sparsity_explorer(model, test, train.batch(256), style=s, **options) for s in STYLES}


def frame(panel: pu.widgets.SparsityExplorer, style: str, slider: bool = True) -> Image.Image:
    """Return what a panel shows as one image: the slider, the curve, the numbers, and below the weights."""
    look = find_style(style)
    course, picture = (Image.open(io.BytesIO(widget.value)) for widget in (panel.course, panel.image))
    with mpl.rc_context(look.rc()):
        above = image_of(_slider(panel, look)) if slider else Image.new("RGB", (picture.width, 0))
        numbers = image_of(_numbers(panel, look))
    whole = Image.new("RGB", (picture.width, above.height + course.height + picture.height), look.canvas)
    whole.paste(above, (0, 0))
    whole.paste(course, (0, above.height))
    whole.paste(numbers, (course.width, above.height))
    whole.paste(picture, (0, above.height + course.height))
    return whole


def _slider(panel, look) -> Figure:
    """The slider as a line with a knob, on the axis of the curve below, and what is chosen beside it."""
    figure = Figure(figsize=(12, 0.62), dpi=120)
    ax = figure.add_axes((0.1 * 6.4 / 12, 0, 0.66 * 6.4 / 12, 1))
    ax.set(xscale="log", xlim=(1, 0.01), ylim=(-1, 1))
    ax.set_axis_off()
    left, ink = max(1 - panel.slider.value, 0.01), look.methods[0]
    ax.plot([1, 0.01], [-0.2, -0.2], color=look.muted, linewidth=3, solid_capstyle="round", clip_on=False)
    ax.plot([1, left], [-0.2, -0.2], color=ink, linewidth=5, solid_capstyle="round", clip_on=False)
    ax.plot(left, -0.2, "o", color=ink, markersize=15, markeredgecolor=look.canvas, clip_on=False)
    figure.text(0.435, 0.4, f"sparsity {panel.slider.value:.1%}", fontsize=15, fontweight="bold", va="center")
    words = f"criterion {panel.criterion.label}   scope {panel.scope.label}   granularity {panel.granularity.label}"
    figure.text(0.99, 0.4, words, fontsize=10.5, color=look.muted, va="center", ha="right")
    return figure


def lines_of(panel: pu.widgets.SparsityExplorer) -> list[str]:
    """Return the panel's numbers and warnings as plain lines."""
    return [html.unescape(re.sub(r"<[^>]+>", "", line)) for line in panel.text.value.split("<br>")]


def _numbers(panel, look) -> Figure:
    """The panel's text."""
    figure, y = Figure(figsize=(5.6, 2.6), dpi=120), 0.82
    for row, line in enumerate(lines_of(panel)):
        style = {"color": look.alarm if "▲" in line else look.text, "fontweight": "bold" if row < 2 else "normal"}
        for part in textwrap.wrap(line, 62):
            figure.text(0.02, y, part, fontsize=11.5, parse_math=False, **style)
            y -= 0.125
    return figure


def image_of(figure: Figure) -> Image.Image:
    """Return a figure as an image."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def film(width: int = 840) -> None:
    """Write the slider's way from 0 to 99 % as animated GIFs."""
    places = [round(1 - 10 ** (-i / 25), 4) for i in range(51)]
    for style, panel in trained_panels().items():
        panel.curve()
        frames = []
        for place in places:
            panel.slider.value = place
            whole = frame(panel, style)
            frames.append(whole.resize((width, round(whole.height * width / whole.width)), Image.Resampling.LANCZOS))
        stay = [800, *[90] * (len(places) - 2), 2500]  # milliseconds
        write_gif(IMAGES / f"sparsity_explorer{STYLES[style]}.gif", frames, stay)


def write_gif(path: Path, frames: list, milliseconds: list[int]) -> None:
    """Write frames of equal size as an animated GIF with one palette for all: colours must not flicker."""
    width, height = frames[0].size
    sample = Image.new("RGB", (width, 4 * height))
    for row in range(4):
        sample.paste(frames[row * (len(frames) - 1) // 3], (0, row * height))
    palette = sample.quantize(96, dither=Image.Dither.NONE)
    frames = [one.quantize(palette=palette, dither=Image.Dither.NONE) for one in frames]
    options = {"duration": milliseconds, "loop": 0, "optimize": False}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    print(f"{path}: {len(frames)} frames, {path.stat().st_size / 1e6:.2f} MB")


def asked() -> None:
    """Write a share asked for that moves, while the threshold of GraSP's scores sticks at zero: resnet10t on digits."""
    train, _ = pu.data.load("digits")
    inputs, labels = train.balanced_batch(5, seed=0)
    inputs = torch.nn.functional.interpolate(inputs.expand(-1, 3, -1, -1), size=(32, 32), mode="bilinear")
    model = pu.models.create("timm/resnet10t", num_classes=10)
    found = pu.scores(model, "grasp", (inputs, labels), train_mode=True)
    scores = torch.cat([-score.flatten() for score in found.values()]).sort(descending=True).values
    places = [0.0, 0.01, 0.02, *(i / 20 for i in range(1, 20)), 0.97, 0.979, 0.98, 0.99, 1.0]
    stay = [1200 if place in (0.5, 0.97, 0.98) else 300 for place in places]
    for style, suffix in STYLES.items():
        frames = [image_of(stuck_threshold(scores, place, style)) for place in places]
        write_gif(IMAGES / f"grasp_threshold_debug{suffix}.gif", frames, stay)


def stuck_threshold(scores: torch.Tensor, share: float, style: str) -> Figure:
    """Draw sorted scores as a strip, with the share asked for and the share above the threshold at that place."""
    look, n = find_style(style), len(scores)
    threshold = scores[min(int(n * share), n - 1)] + 0.0  # no -0
    removed, above, below = (float((part).double().mean()) for part in (scores > threshold, scores > 0, scores < 0))
    with mpl.rc_context(look.rc()):
        figure = Figure(figsize=(8.4, 2.6), dpi=100, layout="constrained")
        ax = figure.add_subplot(title="GraSP on resnet10t: the rule highest_go, cut at a threshold")
        ax.barh([0] * 3, [above, 1 - above - below, below], left=[0, above, 1 - below], height=0.34,
                color=[look.methods[1], look.grid, look.methods[0]])  # fmt: skip
        ax.text(0.5, 0, f"{1 - above - below:.1%} of the scores are exactly 0", ha="center", va="center")
        for place, y, words, ink in (
            (share, 0.34, f"asked for {share:.1%}", look.text),
            (removed, -0.34, f"removed {removed:.2%}, threshold {threshold:.2g}", look.alarm),
        ):
            ax.plot([place, place], [y / 2, y], color=ink)
            ax.plot(place, y, "v" if y > 0 else "^", color=ink, markersize=11)
            side = "left" if place < 0.12 else "right" if place > 0.88 else "center"
            ax.text(place, 1.6 * y, words, color=ink, ha=side, va="center", fontsize=11, fontweight="bold")
        ax.set(xlim=(-0.01, 1.01), ylim=(-0.8, 0.75), yticks=[], xlabel="all scores in order, the highest at the left")
        ax.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))
        ax.spines[["left", "top", "right"]].set_visible(False)
    return figure


def synflow(steps: int = 100, shown: int = 40, compression: float = 2.0) -> None:
    """Write how SynFlow empties the layers of a 784-100x5-10 network: scored once, and anew before every step."""
    once, anew = (pu.models.create("fc", num_classes=10) for _ in range(2))
    data = pu.data.load("digits")[0].batch(1)
    fixed = pu.scores(once, "synflow", data)
    frames = []
    for step in range(steps + 1):
        sparsity = 1 - 10 ** (-compression * step / steps)
        pu.prune(once, lambda model, data: fixed, sparsity, data=data)
        pu.prune(anew, "synflow", sparsity, data=data)
        if step % max(1, steps // shown) and step < steps:
            continue
        figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.0), layout="constrained", sharex=True)
        for ax, model, title in ((left, once, "SynFlow in one step"), (right, anew, f"SynFlow in {steps} steps")):
            pu.plots.layer_bars(pu.layer_table(model), title=title, ax=ax)
            ax.set(xlim=(0, 1.45), xticks=[0, 0.5, 1])
        figure.suptitle(f"{1 - sparsity:.2%} of all weights kept", fontsize=11, fontweight="bold")
        frames.append(image_of(figure))
        plt.close(figure)
    write_gif(IMAGES / "pruning_at_initialization.gif", frames, [900, *[120] * (len(frames) - 2), 2500])


def panel() -> None:
    """Write what JupyterLab shows of an explorer, with the curves of three criteria."""
    import browser

    with tempfile.TemporaryDirectory() as folder:
        for style, suffix in STYLES.items():
            notebook = browser.explorer_notebook(Path(folder), style)
            with browser.notebook(notebook, Path(folder) / style, style) as page:
                criterion = browser.panel(page).locator("select").first
                for name in ("synflow", "snip", "magnitude"):
                    criterion.select_option(label=name)
                    page.wait_for_timeout(12_000)
                path = IMAGES / f"sparsity_explorer_panel{suffix}.png"
                browser.panel(page).screenshot(path=path)
                print(path)


if __name__ == "__main__":
    {"film": film, "asked": asked, "synflow": synflow, "panel": panel}[sys.argv[1]]()
