"""Pictures are whole and legible: those stored in the notebooks, and whatever the functions of `plots` draw."""

import base64
import io
import itertools
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from IPython.core.pylabtools import print_figure  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axis import Axis  # noqa: E402
from matplotlib.path import Path as MplPath  # noqa: E402
from matplotlib.text import Text  # noqa: E402
from matplotlib.transforms import Affine2D  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402

import pruneutils as pu  # noqa: E402
from pruneutils import plots, studies  # noqa: E402
from pruneutils.plots.panel import draw_panel  # noqa: E402

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FILES = sorted((ROOT / "images").glob("*.png"))


# --- What is stored --------------------------------------------------------------------------------------------------


def touches_the_border(png: bytes) -> bool:
    """Tell whether anything but the canvas lies in the outermost two pixels: it is cut off there."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    strips = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
    return any((abs(strip - pixels[0, 0]).sum(-1) > 60).sum() > 3 for strip in strips)


def stored(notebook: Path):
    """Yield (cell, PNG) of each picture among the outputs."""
    for number, cell in enumerate(json.loads(notebook.read_text())["cells"]):
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                yield number, base64.b64decode("".join(output["data"]["image/png"]))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_pictures_stored_in_notebooks_are_whole(notebook):
    cut = [number for number, png in stored(notebook) if touches_the_border(png)]
    assert not cut, f"cells whose picture is cut off: {cut}"


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_pictures_in_files_are_whole(file):
    assert not touches_the_border(file.read_bytes())


def test_there_is_something_to_look_at():
    assert FILES and sum(1 for notebook in NOTEBOOKS for _ in stored(notebook)) > len(NOTEBOOKS)


# --- What is drawn ---------------------------------------------------------------------------------------------------


def named_as(names, width=8, seed=0):
    """A small network with layers of these names: what matters here are their number and their names."""
    torch.manual_seed(seed)
    model = nn.Module()
    for name in names:
        inner, (*path, last) = model, name.split(".")
        for part in path:
            if not hasattr(inner, part):
                setattr(inner, part, nn.Module())
            inner = getattr(inner, part)
        setattr(inner, last, nn.Linear(width, width))
    return model


def resnet(blocks, layers=3):
    """Names of a residual network with bottleneck blocks: 54 for (3, 4, 6, 3)."""
    names = ["conv1"]
    for stage, n in enumerate(blocks, 1):
        for block in range(n):
            names += [f"layer{stage}.{block}.conv{i}" for i in range(1, layers + 1)]
            names += [f"layer{stage}.{block}.downsample.0"] if block == 0 else []
    return [*names, "fc"]


LENET300 = ["fc1", "fc2", "fc3"]
RESNET10 = resnet((1, 1, 1, 1), 2)
RESNET50 = resnet((3, 4, 6, 3))
DEEP = [f"stages.{stage}.blocks.{block}.token_mixer.reduction" for stage in range(10) for block in range(20)]
LONG = ["encoder.first_stage.first_block.depthwise_convolution", "encoder.second_stage.pointwise", "head"]


def dense_and_pruned(names, empty=()):
    dense, model = named_as(names), named_as(names)
    keep = {name: torch.rand_like(w) < 0.4 for name, w in pu.prunable_weights(model).items()}
    keep |= {f"{name}.weight": torch.zeros(8, 8, dtype=torch.bool) for name in empty}
    pu.set_masks(model, keep)
    return model, dense


def histograms(names, empty=(), **fixed):
    def draw(**options):
        model, dense = dense_and_pruned(names, empty)
        return plots.layer_histograms(model, dense, **fixed, **options)

    return draw


def table(names, empty=()):
    return pu.layer_table(dense_and_pruned(names, empty)[0])


def runs(methods, sparsities, seeds=5):
    noise = np.random.default_rng(0)
    return pd.DataFrame(
        {"method": m, "sparsity": s, "seed": k, "flops": 4e8 * (1 - s) * (1 + i / 9),
         "accuracy": 0.95 - 0.06 * i * s**4 + noise.normal(0, 0.006)}
        for i, m in enumerate(methods)
        for s in sparsities
        for k in range(seeds)
    )  # fmt: skip


def epochs(arms):
    rows = runs(arms, np.arange(9) / 10).rename(columns={"accuracy": "test_accuracy"})
    return rows.assign(epoch=(10 * rows["sparsity"]).round().astype(int))


CRITERIA = ["random", "magnitude", "snip", "grasp", "synflow", "magnitude after training", "synflow one-shot"]
GRADUAL = ["1 pruning", "2 prunings", "4 prunings", "8 prunings"]
WORDY = ["published rule", "published rule, with zero_init_last=False", "pu.prune"]
SIX = [1 - 10**-a for a in (0.05, 0.1, 0.2, 0.5, 1, 2)]
EIGHT = [1 - 0.1 ** (k / 8) for k in range(1, 9)]
OVERLAP = pd.DataFrame(
    np.eye(8) + 0.3 * (1 - np.eye(8)), [*CRITERIA, "snip, other batch"], [*CRITERIA, "snip, other batch"]
)
SCORES = torch.cat([torch.zeros(4000), 1e-7 * torch.randn(900).exp(), -1e-7 * torch.randn(900).exp()])

COURSES = studies.courses([1, 2, 8, 0], 0.95, 8, points=41)
COURSE_RUNS = pd.DataFrame(
    {"epoch": epoch, "arm": arm, "equal": equal, "seed": seed, "test_accuracy": 0.5 + epoch / 20 + seed / 100}
    for arm, equal in [*COURSES[["arm", "equal"]].drop_duplicates().itertuples(index=False), ("dense", None)]
    for epoch in range(1, 9)
    for seed in range(3)
)
PICTURES = {
    "waterfall of 3": histograms(LENET300),
    "waterfall, all empty": histograms(LENET300, LENET300),
    "waterfall, long names": histograms(LONG),
    "waterfall, long title": histograms(LENET300, title="A title that is longer than the picture is wide " * 3),
    "waterfall of 54": histograms(RESNET50, kind="3d"),
    "ridges of 14": histograms(RESNET10, ["layer2.0.downsample.0"]),
    "ridges, long names": histograms(LONG, kind="ridge"),
    "heat map of 54": histograms(RESNET50, ["layer1.0.conv1", "layer1.0.conv2", "fc"]),
    "heat map of 200": histograms(DEEP, DEEP[:30]),
    "bars of 3": lambda **o: plots.layer_bars(table(LENET300), **o),
    "bars of 54": lambda **o: plots.layer_bars(table(RESNET50, ["fc"]), **o),
    "bars of 200": lambda **o: plots.layer_bars(table(DEEP, DEEP[:9]), **o),
    "sparsities of 3": lambda **o: plots.sparsity_heatmap({"snip": table(LENET300), "grasp": table(LENET300)}, **o),
    "sparsities of 14": lambda **o: plots.sparsity_heatmap(
        {"snip": table(RESNET10, ["fc"]), "grasp": table(RESNET10)}, **o
    ),
    "sparsities of 54": lambda **o: plots.sparsity_heatmap(dict.fromkeys(CRITERIA, table(RESNET50, ["fc"])), **o),
    "sparsities of 200": lambda **o: plots.sparsity_heatmap(dict.fromkeys(CRITERIA, table(DEEP)), **o),
    "overlap": lambda **o: plots.mask_overlap(OVERLAP, title="Which weights are kept at a = 1", **o),
    "accuracy, exponential": lambda **o: plots.accuracy_vs_sparsity(runs(GRADUAL, EIGHT), dense=[0.94, 0.95], **o),
    "accuracy, seven methods": lambda **o: plots.accuracy_vs_sparsity(runs(CRITERIA, SIX), dense=0.97, **o),
    "accuracy, one curve": lambda **o: plots.accuracy_vs_sparsity(runs(["snip"], [0.5, 0.9, 0.98]), **o),
    "accuracy, linear": lambda **o: plots.accuracy_vs_sparsity(
        runs(WORDY, np.arange(11) / 10), scale="linear", bands=True, **o
    ),
    "accuracy, very sparse": lambda **o: plots.accuracy_vs_sparsity(runs(["snip"], [0.9, 0.99, 0.999, 0.9999], 1), **o),
    "curves": lambda **o: plots.curves(epochs(GRADUAL), by="method", title="lenet300 on digits, epoch by epoch", **o),
    "curves, one run each": lambda **o: plots.curves(epochs(WORDY).query("seed == 0"), by="method", events=[], **o),
    "curves, logarithmic": lambda **o: plots.curves(
        runs(["snip", "grasp"], SIX), x="flops", y="accuracy", by="method", events=[], interval="minmax",
        xscale="log", yscale="log", **o),
    "flops": lambda **o: plots.accuracy_vs_flops(runs(CRITERIA, SIX), title="Accuracy over computation", **o),
    "flops, linear": lambda **o: plots.accuracy_vs_flops(runs(["snip"], [0.1, 0.3, 0.5]), **o),
    "differences": lambda **o: plots.differences(runs(GRADUAL, [0.5, 0.8, 0.9, 0.95]), title="Paired", **o),
    "differences, a row an arm": lambda **o: plots.differences(
        runs([f"a rather long name {i}" for i in range(12)], [0.5, 0.9]), title="Paired", **o
    ),
    "differences, many": lambda **o: plots.differences(
        runs(["instant", *WORDY], EIGHT).assign(setting=lambda f: "sparsity of " + f["sparsity"].round(3).astype(str)),
        x="setting", **o),
    "scores": lambda **o: plots.score_distribution(SCORES, threshold=0.0, title="The pile at zero", **o),
    "scores, positive": lambda **o: plots.score_distribution(torch.arange(1.0, 500), 3.0, **o),
    "kernels": lambda **o: plots.ranked_kernels(
        {f"{n}x{n} ({i})": torch.full((n, n), 0.1 * (i + 1)) for i, n in enumerate((1, 3, 1, 3, 5, 1))}, **o),
    "stuck threshold": lambda **o: plots.stuck_threshold(SCORES, 0.5, **o),
    "threshold at the end": lambda **o: plots.stuck_threshold(SCORES, 0.999, **o),
    "courses": lambda **o: plots.pruning_courses(COURSES, COURSE_RUNS, title="Pruned while it trains", **o).axes[0],
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_figure_is_left_behind():
    yield
    plt.close("all")


def texts(figure) -> list[Text]:
    """All texts that one sees: those of ticks only where matplotlib draws them."""
    found = []
    for ax in figure.axes:
        parts = [child for child in ax.get_children() if not isinstance(child, Axis)]
        found += [text for part in parts for text in part.findobj(Text)]
        for axis in (ax.xaxis, ax.yaxis) if ax.name != "3d" else ():
            drawn = [label for tick in axis._update_ticks() for label in (tick.label1, tick.label2)]
            found += [*drawn, axis.label, axis.offsetText]
    seen = {id(text): text for text in found if text.get_visible() and text.get_text().strip()}
    return list(seen.values())


def outline(text) -> MplPath:
    """The text's box, turned as the text is."""
    angle = text.get_rotation()
    if not angle % 90:
        return MplPath(text.get_window_extent().padded(-1).corners()[[0, 1, 3, 2]])
    anchor = text.get_transform().transform(text.get_position())
    text.set_rotation(0)
    corners = text.get_window_extent().padded(-1).corners()[[0, 1, 3, 2]]
    text.set_rotation(angle)
    return Affine2D().rotate_deg_around(*anchor, angle).transform_path(MplPath(corners))


def assert_texts_are_legible(figure):
    """No text reaches out of the figure, and none lies on another."""
    figure.draw_without_rendering()
    box, shapes = figure.bbox, [(text.get_text(), outline(text)) for text in texts(figure)]
    for text, shape in shapes:
        low, high = shape.vertices.min(0), shape.vertices.max(0)
        assert (low >= box.min).all() and (high <= box.max).all(), f"{text!r} reaches out of the picture: {low}, {high}"
    for (one, a), (other, b) in itertools.combinations(shapes, 2):
        apart = (a.vertices.max(0) < b.vertices.min(0)) | (b.vertices.max(0) < a.vertices.min(0))
        assert apart.any() or not a.intersects_path(b, filled=True), f"{one!r} lies on {other!r}"


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_whole_and_nothing_lies_on_a_text(name):
    figure = PICTURES[name](style="dark" if "of 54" in name else "light").figure  # a style sets colours only
    # as the notebooks' backend does it, which asks for a tight bounding box
    assert not touches_the_border(print_figure(figure, bbox_inches="tight"))
    plain = io.BytesIO()
    figure.savefig(plain)
    assert not touches_the_border(plain.getvalue())
    assert_texts_are_legible(figure)
    for ax in figure.axes:
        legend = ax.get_legend()
        if legend:
            covered = [other for other in figure.axes if legend.get_window_extent().overlaps(other.bbox.padded(-1))]
            assert not covered, "the legend lies on data"


@pytest.mark.parametrize("name", ["waterfall of 3", "accuracy, seven methods", "curves", "differences", "scores"])
@pytest.mark.parametrize("layout", [None, "constrained"])
def test_pictures_beside_each_other_leave_each_other_alone(name, layout):
    options = {"subplot_kw": {"projection": "3d"}} if name.startswith("waterfall") else {}
    figure, axes = plt.subplots(1, 2, figsize=(14, 4.5), layout=layout, **options)
    for ax in axes:
        PICTURES[name](ax=ax)
    assert not touches_the_border(print_figure(figure, bbox_inches="tight"))
    assert_texts_are_legible(figure)
    for ax, other in (axes, axes[::-1]):
        legend = ax.get_legend() if ax.name != "3d" else None
        assert not (legend and legend.get_window_extent().overlaps(other.bbox))


def test_what_matplotlib_cuts_off_is_noticed():
    figure = plt.figure(figsize=(8, 5))
    ax = figure.add_axes((0, 0, 1, 1), projection="3d")
    ax.set_axis_off()
    ax.plot([0, 1], [0, 1], [0, 0], clip_on=False)
    ax.text(1.2, 0, 0, "the name of a layer at the right of the picture")
    assert touches_the_border(print_figure(figure, bbox_inches="tight"))


def test_names_of_a_waterfall_stay_in_the_picture_when_it_is_turned():
    figure = PICTURES["waterfall of 3"]().figure
    (ax,) = figure.axes
    for elevation, azimuth in ((24, -68), (10, -30), (40, -110)):
        ax.view_init(elevation, azimuth)
        assert not touches_the_border(print_figure(figure, bbox_inches="tight"))


def test_the_explorers_picture_is_whole():
    for names, style in ((LENET300, "light"), (RESNET10, "light"), (RESNET50, "dark"), (DEEP, "light")):
        model, dense = dense_and_pruned(names, names[:1])
        layers, figure = plots.weight_histograms(model, dense), plt.figure()
        draw_panel(figure, layers, pu.layer_table(model), names[1:2], "dotted: 7 scores tie at the cut", style)
        assert not touches_the_border(print_figure(figure, bbox_inches="tight"))
        assert_texts_are_legible(figure)


def test_the_explorers_picture_does_not_depend_on_what_was_drawn_before():
    for names in (LENET300, RESNET10):
        model, dense = dense_and_pruned(names, names[1:])
        drawn = []
        for earlier in ((), (names[:1], []), (names[2:], names)):
            figure = plt.figure()
            for empty in (*earlier, names[1:]):
                model, dense = dense_and_pruned(names, empty)
                layers = plots.weight_histograms(model, dense)
                draw_panel(figure, layers, pu.layer_table(model), empty, f"{len(empty)} layers", "light")
            drawn.append(io.BytesIO())
            figure.savefig(drawn[-1])
        assert len({png.getvalue() for png in drawn}) == 1
