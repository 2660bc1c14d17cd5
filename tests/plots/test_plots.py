"""What the pictures draw are the numbers: of runs, of tables, of scores and of weights."""

import itertools
import math
import warnings

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from scipy import stats
from torch import nn

from pruneutils import plots
from pruneutils.model_utils import layer_table, prunable_weights, set_masks
from pruneutils.plots.look import find_style, method_styles
from pruneutils.plots.runs import spread

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def no_figure_is_left_behind():
    yield
    plt.close("all")


def network(seed=0, sizes=(20, 15, 12, 10)):
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)])


def pruned(model, density=0.3, empty=()):
    weights = prunable_weights(model)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    masks = {n: torch.rand_like(w) < (0 if n in empty else density) for n, w in weights.items()}
    set_masks(model, masks)
    return before, masks


def runs(methods=("magnitude", "snip"), sparsities=(0.5, 0.9, 0.98), seeds=4):
    noise = np.random.default_rng(0)
    grid = itertools.product(methods, sparsities, range(seeds))
    rows = [(method, s, seed, 0.9 - s / 5 + noise.normal(0, 0.01)) for method, s, seed in grid]
    return pd.DataFrame(rows, columns=["method", "sparsity", "seed", "accuracy"])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: plots.layer_histograms(network(), kind="3d", ax=Figure().add_subplot()), 'projection="3d"'),
        (lambda: plots.accuracy_vs_sparsity(runs(sparsities=(0.5, 1.0))), r"\[0, 1\)"),
        (lambda: plots.differences(runs(), against="snap"), "'snap'; did you mean 'snip'"),
    ],
)
def test_an_error_names_what_is_wrong_and_leaves_no_figure(call, message):
    open_before = plt.get_fignums()  # by whatever ran before in this process
    with pytest.raises(ValueError, match=message):
        call()
    assert plt.get_fignums() == open_before


def test_colours_do_not_depend_on_the_order_or_the_company_of_known_methods():
    names = ["snip", "mine", "magnitude", "yours", "random"]
    looks = method_styles(names)
    assert looks == method_styles(names[::-1]) and method_styles(["snip"])["snip"] == looks["snip"]
    many = method_styles([f"m{i}" for i in range(30)]).values()
    assert len({(look["color"], look["marker"]) for look in many}) == 30
    assert len({(look["color"], str(look["linestyle"])) for look in many}) == 30
    numbers = method_styles([8, 1, 4])
    assert list(numbers) == [1, 4, 8] and len({look["color"] for look in numbers.values()}) == 3


def contrast(a, b) -> float:
    """The contrast of two colours by the Web Content Accessibility Guidelines, from 1 to 21."""
    channels = np.array([to_rgb(a), to_rgb(b)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    bright = linear @ (0.2126, 0.7152, 0.0722) + 0.05
    return bright.max() / bright.min()


@pytest.mark.parametrize("name", ["light", "dark"])
def test_everything_stands_out_from_the_canvas(name):
    style = find_style(name)
    assert all(contrast(ink, style.canvas) >= 4.5 for ink in (style.text, style.muted, style.alarm))
    assert min(contrast(line, style.canvas) for line in (*style.methods, *style.ordered(60))) >= 2.9


def test_bars_have_the_densities_and_collapsed_layers_are_lit():
    model = network()
    pruned(model, empty=("1.weight",))
    data = layer_table(model)
    ax = plots.layer_bars(data)
    bars, lit = ax.containers
    assert [bar.get_width() for bar in bars] == list(data["kept"] / data["total"])
    assert len(lit) == 1 and lit[0].get_hatch() and lit[0].get_y() == bars[1].get_y()
    assert "0 %: collapsed" in [t.get_text() for t in ax.texts]


def test_curves_show_means_t_intervals_and_every_run():
    frame = runs(("magnitude", "snip", "random")).sample(frac=1, random_state=1)
    ax = plots.accuracy_vs_sparsity(frame)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    for name, bars, dots in zip(names, ax.containers, ax.collections[1::2], strict=True):
        cells = [frame[(frame["method"] == name) & (frame["sparsity"] == s)]["accuracy"] for s in (0.5, 0.9, 0.98)]
        low, high = np.transpose([segment[:, 1] for segment in bars.lines[2][0].get_segments()])
        ends = [stats.t.interval(0.95, 3, c.mean(), stats.sem(c)) for c in cells]
        assert np.allclose(np.column_stack([low, high]), ends)
        assert to_hex(dots.get_facecolor()[0]) == to_hex(method_styles(["snip", name])[name]["color"])
    drawn = np.concatenate([dots.get_offsets()[:, 1] for dots in ax.collections[1::2]])
    assert np.allclose(sorted(drawn), sorted(frame["accuracy"]))
    assert ax.get_legend().get_title().get_text() == "mean, 95 % t-interval,\nn = 4 seeds"
    many = plots.accuracy_vs_sparsity(runs(("snip",), seeds=40))
    assert not any(hasattr(part, "get_sizes") for part in many.collections)  # forty dots would hide the interval


@pytest.mark.parametrize("scale, shown", [("log", ["50 %", "90 %", "99 %"]), ("density", ["50 %", "10 %", "1 %"])])
def test_the_last_ten_percent_have_as_much_room_as_the_first_ninety(scale, shown):
    ax = plots.accuracy_vs_sparsity(runs(sparsities=(0, 0.5, 0.9, 0.95, 0.98, 0.99)), scale=scale)
    ax.figure.draw_without_rendering()
    places = ax.transData.transform([(s, 0.5) for s in (0, 0.9, 0.99)])[:, 0]
    assert np.isclose(places[1] - places[0], places[2] - places[1])
    labels = {t.get_text(): t.get_position()[0] for t in ax.get_xticklabels()}
    assert [labels[text] for text in shown] == pytest.approx([0.5, 0.9, 0.99])
    assert np.allclose(np.diff(spread(ax.lines[0].get_xdata())), np.diff(spread([0, 0.5, 0.9, 0.95, 0.98, 0.99])))


def test_curves_have_a_band_only_where_there_are_several_runs():
    frame = pd.DataFrame({"epoch": [*range(6)] * 3, "test_accuracy": np.arange(18) / 20, "seed": np.arange(18) // 6})
    ax = plots.curves(frame)
    assert len(ax.collections) == 1 and "n = 3 seeds" in ax.get_legend().get_title().get_text()
    assert np.allclose(ax.lines[0].get_ydata(), frame.groupby("epoch")["test_accuracy"].mean())
    assert plots.curves(frame[:6]).get_legend() is None


def test_dots_are_the_runs_with_their_mean_interval_and_reference():
    frame = runs(sparsities=(0.9,))
    ax = plots.dots(frame, reference={"published": 0.75})
    drawn = np.concatenate([part.get_offsets()[:, 1] for part in ax.collections if len(part.get_offsets()) == 4])
    assert np.allclose(sorted(drawn), sorted(frame["accuracy"]))
    means = [np.nanmax(line.get_ydata()) for line in ax.lines if line.get_marker() == "_"]
    assert np.allclose(means, frame.groupby("method")["accuracy"].mean())
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["published 75.0 %"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["magnitude", "snip"]
    assert ax.get_legend().get_title().get_text() == "dots: n = 4 seeds\nmarks: mean, 95 % t-interval"
    grouped = plots.dots(runs(), x="sparsity", by="method", interval=False)
    assert [t.get_text() for t in grouped.get_xticklabels()] == ["50 %", "90 %", "98 %"] and not grouped.lines


def test_two_runs_make_a_mean_and_no_interval():
    frame = runs(sparsities=(0.9,), seeds=5)
    frame = frame[(frame["method"] == "snip") | (frame["seed"] < 2)]
    ax = plots.dots(frame)
    bars = [line for line in ax.lines if len({*line.get_ydata()[np.isfinite(line.get_ydata())]}) > 1]
    assert [round(np.nanmean(bar.get_xdata())) for bar in bars] == [1]  # that of snip, the second arm
    assert ax.get_legend().get_title().get_text().endswith("95 % t-interval\nof three or more")


@pytest.mark.parametrize("reference, sign", [("magnitude", 1), ("snip", -1)])
def test_differences_are_paired_with_their_interval_and_filled_where_arms_differ(reference, sign):
    frame = runs(sparsities=(0.5, 0.9), seeds=6)
    frame["accuracy"] += 0.1 * frame["seed"]  # what differs between seeds does not concern the comparison
    frame.loc[(frame["method"] == "snip") & (frame["sparsity"] == 0.9), "accuracy"] -= 0.05
    ax = plots.differences(frame.sample(frac=1, random_state=1), against=reference)
    bars, points = ax.collections
    for place, sparsity in enumerate((0.5, 0.9)):
        cell = frame[frame["sparsity"] == sparsity].pivot(index="seed", columns="method", values="accuracy")
        gap = sign * (cell["snip"] - cell["magnitude"])
        low, high = stats.t.interval(0.95, 5, gap.mean(), stats.sem(gap))
        assert np.allclose(points.get_offsets()[place], (place, gap.mean()))
        assert np.allclose(bars.get_segments()[place][:, 1], (low, high))
    hollow, filled = (to_hex(color) for color in points.get_facecolor())
    assert hollow == "#ffffff" and filled == to_hex(points.get_edgecolor()[0])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["50 %", "90 %"]
    assert "n = 6 pairs" in ax.get_legend().get_title().get_text()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.floats(0, 1),
    st.sampled_from([None, 1, 2, 30, 81, 300]),
    st.sampled_from(["float32", "float64"]),
    st.sampled_from([1.0, 1e-6, 3e5]),
)
def test_counts_are_numpys_on_the_weights_that_the_mask_keeps(seed, density, bins, dtype, scale):
    model = network(seed, (30, 40, 7)).to(getattr(torch, dtype))
    with torch.no_grad():
        for weight in prunable_weights(model).values():
            weight.mul_(scale)
        model[0].weight[0, :3] = 0  # kept weights that happen to be zero count too
    before, masks = pruned(model, density)
    for layer, (name, mask) in zip(plots.weight_histograms(model, before, bins), masks.items(), strict=True):
        inside = layer.limit * (1 - 1e-6)  # what lies beyond the limit is counted in the outermost bins
        kept, everything = (v.clamp(-inside, inside).numpy() for v in (before[name][mask], before[name].reshape(-1)))
        assert np.array_equal(layer.counts, np.histogram(kept, layer.edges)[0])
        assert np.array_equal(layer.before, np.histogram(everything, layer.edges)[0])
        assert layer.kept == int(mask.sum()) and layer.before.sum() == layer.total == mask.numel()
        assert layer.edges[0] <= before[name].min() and layer.edges[-1] >= before[name].max()
        assert len(layer.counts) == (bins or min(max(int(2.2 * math.sqrt(layer.total)), 19), 81) // 2 * 2 + 1)


def test_outliers_do_not_set_the_axis_and_make_no_spike_at_its_ends():
    model = nn.Sequential(nn.Linear(100, 100))
    with torch.no_grad():
        model[0].weight.copy_(torch.linspace(-1, 1, 10_000).reshape(100, 100))
        model[0].weight[3, :3] = torch.tensor([900, 1000, 1100])
    (layer,) = plots.weight_histograms(model)
    assert layer.limit <= 1 and layer.kept == 10_000 and layer.counts[-1] > 3
    heights, before = layer.heights()
    assert before is None and heights[-1] < 0.01 and heights[1:-1].min() > 0.9
    assert plots.layer_histograms(model).get_xlim()[1] <= 1


@pytest.mark.parametrize("kind", ["3d", "flat"])
@pytest.mark.parametrize("before", [None, network()])
@pytest.mark.parametrize("empty", [("2.weight",), ("0.weight", "1.weight", "2.weight")])
def test_an_empty_layer_is_shown_as_empty(kind, before, empty):
    model = network()
    pruned(model, empty=empty)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax = plots.layer_histograms(model, before, kind=kind)
        ax.figure.canvas.draw()
    lit = [t.get_text() for t in ax.texts if to_hex(t.get_color()) == "#bc4c00"]
    assert len(lit) == len(empty) and all(text.split()[-2:] == ["0", "%"] for text in lit)
