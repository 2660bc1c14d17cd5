"""Pictures are whole and legible: those stored in the notebooks, and whatever the functions of `plots` draw."""

import base64
import io
import itertools
import json
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from IPython.core.pylabtools import print_figure
from matplotlib import pyplot as plt
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from mpl_toolkits.mplot3d.art3d import Text3D
from PIL import Image
from torch import nn

import pruneutils as pu
from pruneutils import plots

matplotlib.use("Agg")
ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "images").glob("*.png")])


def touches_the_border(png: bytes) -> bool:
    """Whether anything but the canvas lies in the outermost two pixels: it is cut off there."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    strips = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
    return any((abs(strip - pixels[0, 0]).sum(-1) > 60).sum() > 3 for strip in strips)


def stored(file: Path) -> list[bytes]:
    """The PNG in a file, or those among the outputs of a notebook."""
    if file.suffix == ".png":
        return [file.read_bytes()]
    outputs = [output for cell in json.loads(file.read_text())["cells"] for output in cell.get("outputs", [])]
    return [base64.b64decode("".join(o["data"]["image/png"])) for o in outputs if "image/png" in o.get("data", {})]


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_pictures_stored_in_notebooks_and_files_are_whole(file):
    assert [number for number, png in enumerate(stored(file)) if touches_the_border(png)] == []


def named_as(names):
    """A small network with layers of these names: what matters here are their number and their names."""
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(8, 8) for name in names})


def pruned(names, empty=()):
    model = named_as(names)
    pu.set_masks(model, {f"{name}.weight": torch.rand(8, 8) < 0.4 * (name not in empty) for name in names})
    return model


def histograms(names, empty=(), **fixed):
    return lambda **o: plots.layer_histograms(pruned(names, empty), named_as(names), **fixed, **o)


def runs(methods, sparsities):
    noise = np.random.default_rng(0)
    grid = itertools.product(enumerate(methods), sparsities, range(5))
    rows = [(m, s, seed, 4e8 * (1 - s), 0.95 - 0.06 * i * s**4 + noise.normal(0, 0.006)) for (i, m), s, seed in grid]
    return pd.DataFrame(rows, columns=["method", "sparsity", "seed", "flops", "accuracy"])


LENET300 = ["fc1", "fc2", "fc3"]
DEEP = [f"stages_{stage}_blocks_{block}_reduction" for stage in range(9) for block in range(6)]
LONG = ["encoder_first_stage_first_block_depthwise_convolution", "encoder_second_stage_pointwise", "head"]
CRITERIA = ["random", "magnitude", "snip", "grasp", "synflow", "magnitude after training", "synflow one-shot"]
WORDY = ["published rule", "published rule, with zero_init_last=False", "pu.prune"]
SIX = [1 - 10**-a for a in (0.05, 0.1, 0.2, 0.5, 1, 2)]
EPOCHS = runs(WORDY, np.arange(9) / 10).assign(epoch=lambda f: (10 * f["sparsity"]).round().astype(int))
PICTURES = {
    "waterfall": histograms(LENET300),
    "waterfall, long names": histograms(LONG),
    "waterfall, long title": histograms(LENET300, title="A title longer than the picture is wide " * 4),
    "waterfall of 54": histograms(DEEP, kind="3d"),
    "flat of 54": histograms(DEEP, DEEP[:2]),
    "bars": lambda **o: plots.layer_bars(pu.layer_table(pruned(LENET300)), **o),
    "accuracy": lambda **o: plots.accuracy_vs_sparsity(runs(CRITERIA, SIX), dense=0.97, **o),
    "accuracy, linear": lambda **o: plots.accuracy_vs_sparsity(runs(WORDY, np.arange(11) / 10), scale="linear", **o),
    "curves": lambda **o: plots.curves(EPOCHS, y="accuracy", by="method", title="Epoch by epoch", **o),
    "curves, logarithmic": lambda **o: plots.curves(EPOCHS, "flops", "accuracy", "method", axes={"xscale": "log"}, **o),
    "dots": lambda **o: plots.dots(runs(CRITERIA, [0.9]), reference=0.97, **o),
    "dots, in groups": lambda **o: plots.dots(runs(WORDY, SIX), x="sparsity", by="method", title="Runs", **o),
    "differences": lambda **o: plots.differences(runs(WORDY, SIX), title="Paired", **o),
}


@pytest.fixture(autouse=True)
def no_figure_or_setting_is_left_behind():
    settings = matplotlib.rcParams.copy()
    yield
    assert matplotlib.rcParams == settings
    plt.close("all")


def texts(figure) -> list[Text]:
    """All texts that one sees: those of ticks only where matplotlib draws them."""
    found = list(figure.texts)
    for ax in figure.axes:
        found += [text for part in ax.get_children() if not isinstance(part, Axis) for text in part.findobj(Text)]
        for axis in (ax.xaxis, ax.yaxis) if ax.name != "3d" else ():
            drawn = [label for tick in axis._update_ticks() for label in (tick.label1, tick.label2)]
            found += [*drawn, axis.label]
    return list({id(text): text for text in found if text.get_visible() and text.get_text().strip()}.values())


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_whole_its_letters_large_enough_and_apart(name):
    figure = PICTURES[name](style="dark" if "of" in name else "light").figure  # a style sets colours only
    # as the notebooks' backend does it, which asks for a tight bounding box
    assert not touches_the_border(print_figure(figure, bbox_inches="tight"))
    figure.draw_without_rendering()
    # matplotlib does not know where texts in 3D lie on the page
    boxes = [(text, text.get_window_extent()) for text in texts(figure) if not isinstance(text, Text3D)]
    for text, box in boxes:
        assert text.get_fontsize() >= 8, f"{text.get_text()!r} is smaller than 8 points at README's width"
        inside = (box.min >= figure.bbox.min).all() and (box.max <= figure.bbox.max).all()
        assert inside, f"{text.get_text()!r} reaches out of the picture"
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        slanted = one.get_rotation() % 90 or other.get_rotation() % 90  # their boxes overlap where they do not
        assert slanted or not a.padded(-1).overlaps(b.padded(-1)), f"{one.get_text()!r} lies on {other.get_text()!r}"
    for ax in figure.axes:
        legend = ax.get_legend()
        assert not (legend and legend.get_window_extent().overlaps(ax.bbox.padded(-1))), "the legend lies on data"


@pytest.mark.parametrize("name", ["waterfall", "bars", "accuracy", "dots", "differences"])
def test_a_picture_has_the_style_asked_for_and_takes_axes(name):
    for style, canvas in (("light", "#ffffff"), ("dark", "#0d1117")):
        assert to_hex(PICTURES[name](style=style).figure.get_facecolor()) == canvas
        with plots.style(style):
            assert to_hex(PICTURES[name]().figure.get_facecolor()) == canvas
            assert matplotlib.rcParams["axes.facecolor"] == canvas  # for what a notebook draws by itself
    ax = Figure().add_subplot(projection="3d" if name == "waterfall" else None)
    assert PICTURES[name](ax=ax, style="dark", axes={"ylabel": "level"}) is ax and ax.get_ylabel() == "level"
    ax.figure.draw_without_rendering()
    labels = [*ax.get_xticklabels(), *ax.get_yticklabels()]
    assert ax.name == "3d" or "#000000" not in {to_hex(label.get_color()) for label in labels}
    assert len(plt.get_fignums()) == 4


@pytest.mark.parametrize("name", ["waterfall", "accuracy", "dots"])
def test_saving_writes_light_and_dark_the_same_each_time(name, tmp_path):
    for folder, style in (("a", "light"), ("b", "dark")):
        PICTURES[name](save=tmp_path / folder / "at_0.9", style=style)
    written = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert set(written) == {"at_0.9.png", "at_0.9_dark.png"}
    assert written["at_0.9.png"] != written["at_0.9_dark.png"] and b"Software" not in written["at_0.9.png"]
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert len(plt.get_fignums()) == 2  # the twins are no pyplot figures
