"""Record the pictures of the explorer that README, notebook and site show, from the panel itself.

    python docs/record.py film     images/sparsity_explorer.gif: the slider from 0 to 99 %
    python docs/record.py panel    images/sparsity_explorer_panel*.png: the panel in JupyterLab, light and dark

The second needs a Chromium.
"""

import sys
import tempfile
from pathlib import Path

import pruneutils as pu

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "images"


def trained_panel(style: str = "light", epochs: int = 6):
    """Return the explorer of LeNet-300-100, trained on the embedded digits, with accuracy on all 1,000 test images."""
    train, test = pu.data.load("digits")
    model = pu.models.create("lenet300")
    pu.fit(model, train, None, epochs, "adam")
    return pu.widgets.sparsity_explorer(model, test, train.batch(256), sparsity=0.0, subset=1000, style=style)


def film(path: Path = IMAGES / "sparsity_explorer.gif", width: int = 840) -> None:
    """Write the slider's way from 0 to 99 % as an animated GIF."""
    from PIL import Image

    panel = trained_panel()
    panel.curve()
    places = [*(i / 40 for i in range(32)), *(0.8 + i / 100 for i in range(20))]
    frames = []
    for place in places:
        panel.slider.value = place
        whole = panel.frame("light")
        frames.append(whole.resize((width, round(whole.height * width / whole.width)), Image.Resampling.LANCZOS))
    # One palette for all, of frames from the whole way: colours must not flicker.
    sample = Image.new("RGB", (width, 4 * frames[0].height))
    for row, place in enumerate((0, 20, 40, len(frames) - 1)):
        sample.paste(frames[place], (0, row * frames[0].height))
    palette = sample.quantize(96, dither=Image.Dither.NONE)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    stay = [800, *[90] * (len(frames) - 2), 2500]  # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=stay, loop=0, optimize=False)
    print(f"{path}: {len(frames)} frames, {path.stat().st_size / 1e6:.2f} MB")


def panel() -> None:
    """Write what the explorer's notebook shows in JupyterLab, with the curves of three criteria."""
    sys.path.insert(0, str(ROOT / "docs"))
    import browser

    with tempfile.TemporaryDirectory() as folder:
        for style in ("light", "dark"):
            with browser.notebook(ROOT / "notebooks/sparsity_explorer.ipynb", Path(folder) / style, style) as page:
                browser.show_three_curves(page)
                path = IMAGES / f"sparsity_explorer_panel{'_dark' if style == 'dark' else ''}.png"
                browser.panel(page).screenshot(path=path)
                print(path)


if __name__ == "__main__":
    {"film": film, "panel": panel}[sys.argv[1]]()
