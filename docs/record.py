"""Record the pictures of the explorer that README, notebook and site show, from the panel itself.

    python docs/record.py film     images/sparsity_explorer*.gif: the slider from 0 to 99 %, light and dark
    python docs/record.py asked    images/grasp_threshold_debug*.gif: a share asked for, and the threshold that sticks
    python docs/record.py synflow  images/pruning_at_initialization.gif: SynFlow in one step beside many, layer by layer
    python docs/record.py panel    images/sparsity_explorer_panel*.png: the panel in JupyterLab, light and dark

The last needs a Chromium.
"""

import sys
import tempfile
from pathlib import Path

import pruneutils as pu

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "images"
STYLES = {"light": "", "dark": "_dark"}  # and what files are called


def trained_panel(style: str = "light", epochs: int = 6):
    """Return the explorer of LeNet-300-100, trained on the embedded digits, with accuracy on all 1,000 test images."""
    train, test = pu.data.load("digits")
    model = pu.models.create("lenet300")
    pu.fit(model, train, None, epochs, "adam")
    return pu.widgets.sparsity_explorer(model, test, train.batch(256), sparsity=0.0, subset=1000, style=style)


def film(width: int = 840) -> None:
    """Write the slider's way from 0 to 99 % as animated GIFs."""
    from PIL import Image

    panel = trained_panel()
    panel.curve()
    places = [*(i / 40 for i in range(32)), *(0.8 + i / 100 for i in range(20))]
    frames = {style: [] for style in STYLES}
    for place in places:
        panel.slider.value = place
        for style in STYLES:
            whole = panel.frame(style)
            size = width, round(whole.height * width / whole.width)
            frames[style].append(whole.resize(size, Image.Resampling.LANCZOS))
    stay = [800, *[90] * (len(places) - 2), 2500]  # milliseconds
    for style, suffix in STYLES.items():
        write_gif(IMAGES / f"sparsity_explorer{suffix}.gif", frames[style], stay)


def write_gif(path: Path, frames: list, milliseconds: list[int]) -> None:
    """Write frames of equal size as an animated GIF with one palette for all: colours must not flicker."""
    from PIL import Image

    width, height = frames[0].size
    sample = Image.new("RGB", (width, 4 * height))
    for row in range(4):
        sample.paste(frames[row * (len(frames) - 1) // 3], (0, row * height))
    palette = sample.quantize(96, dither=Image.Dither.NONE)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    options = {"duration": milliseconds, "loop": 0, "optimize": False}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    print(f"{path}: {len(frames)} frames, {path.stat().st_size / 1e6:.2f} MB")


def image_of(figure):
    """Return a figure as an image."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def asked() -> None:
    """Write a share asked for that moves, while the threshold of GraSP's scores sticks at zero: resnet10t on digits."""
    import torch
    from matplotlib import pyplot as plt

    train, _ = pu.data.load("digits")
    inputs, labels = train.balanced_batch(5, seed=0)
    inputs = torch.nn.functional.interpolate(inputs.expand(-1, 3, -1, -1), size=(32, 32), mode="bilinear")
    model = pu.models.create("timm/resnet10t", num_classes=10)
    found = pu.scores(model, "grasp", (inputs, labels), train_mode=True)
    scores = torch.cat([-score.flatten() for score in found.values()])
    places = [0.0, 0.01, 0.02, *(i / 20 for i in range(1, 20)), 0.97, 0.979, 0.98, 0.99, 1.0]
    stay = [1200 if place in (0.5, 0.97, 0.98) else 300 for place in places]
    title = "GraSP on resnet10t: the published rule, whatever it is asked for"
    for style, suffix in STYLES.items():
        frames = []
        for place in places:
            figure = plt.figure(figsize=(8.4, 2.6), layout="constrained")
            pu.plots.stuck_threshold(scores, place, title=title, ax=figure.add_subplot(), style=style)
            frames.append(image_of(figure))
            plt.close(figure)
        write_gif(IMAGES / f"grasp_threshold_debug{suffix}.gif", frames, stay)


def synflow(steps: int = 100, shown: int = 40, compression: float = 2.0) -> None:
    """Write how SynFlow empties the layers of a 784-100x5-10 network: scored once, and anew before every step."""
    from matplotlib import pyplot as plt

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
    """Write what the explorer's notebook shows in JupyterLab, with the curves of three criteria."""
    sys.path.insert(0, str(ROOT / "docs"))
    import browser

    with tempfile.TemporaryDirectory() as folder:
        for style, suffix in STYLES.items():
            with browser.notebook(ROOT / "notebooks/sparsity_explorer.ipynb", Path(folder) / style, style) as page:
                browser.show_three_curves(page)
                path = IMAGES / f"sparsity_explorer_panel{suffix}.png"
                browser.panel(page).screenshot(path=path)
                print(path)


if __name__ == "__main__":
    {"film": film, "asked": asked, "synflow": synflow, "panel": panel}[sys.argv[1]]()
