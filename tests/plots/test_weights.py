"""Histograms of layers: the counts are exact, and what is drawn are these counts."""

import math
import warnings

import matplotlib

matplotlib.use("Agg")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from torch import nn  # noqa: E402

from pruneutils import plots  # noqa: E402
from pruneutils.model_utils import get_masks, make_permanent, prunable_weights, set_masks  # noqa: E402
from pruneutils.plots import flat, waterfall  # noqa: E402
from pruneutils.plots import weights as plots_weights  # noqa: E402


@pytest.fixture(autouse=True)
def no_figure_is_left_behind():
    yield
    plt.close("all")


def network(seed=0, sizes=(20, 15, 12, 10)):
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)])


def pruned(model, density=0.3, empty=()):
    weights = prunable_weights(model)
    masks = {n: torch.rand_like(w) < (0 if n in empty else density) for n, w in weights.items()}
    set_masks(model, masks)
    return masks


def copies(model):
    return {name: weight.detach().clone() for name, weight in prunable_weights(model).items()}


# --- Counts ----------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
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
    before = copies(model)
    masks = pruned(model, density)
    for layer, (name, mask) in zip(plots.weight_histograms(model, before, bins), masks.items(), strict=True):
        kept, all_weights = before[name][mask].numpy(), before[name].numpy()
        assert np.array_equal(layer.counts, np.histogram(kept, layer.edges)[0])
        assert np.array_equal(layer.before, np.histogram(all_weights, layer.edges)[0])
        assert layer.kept == int(mask.sum()) and layer.before.sum() == layer.total == mask.numel()
        assert (layer.counts <= layer.before).all()
        # No bin is shifted: the inner edges divide [-limit, limit] evenly.
        width = 2 * layer.limit / len(layer.counts)
        even = -layer.limit + width * np.arange(1, len(layer.counts))
        assert np.allclose(layer.edges[1:-1], even, rtol=1e-5, atol=1e-6 * width)
        assert len(layer.counts) == (bins or min(max(int(2.2 * math.sqrt(layer.total)), 19), 81) // 2 * 2 + 1)


@pytest.mark.parametrize("n", [3, 20, 81])
@pytest.mark.parametrize("limit", [0.07, 1.0, 3e-9])
def test_the_ends_of_the_bins_are_exact_to_the_last_bit(n, limit):
    edges = plots_weights._edges(limit, n, (-limit, limit), np.dtype("float32"))[1:-1]
    below = np.nextafter(edges, np.float32(-np.inf))
    assert plots_weights._bins(torch.from_numpy(edges), limit, n).tolist() == list(range(1, n))
    assert plots_weights._bins(torch.from_numpy(below), limit, n).tolist() == list(range(n - 1))


def test_large_layers_are_counted_in_pieces_and_by_masks_of_any_layout(monkeypatch):
    model = nn.Sequential(nn.Conv2d(16, 8, 3).to(memory_format=torch.channels_last))
    before = copies(model)
    (mask,) = pruned(model).values()
    (whole,) = plots.weight_histograms(model, before)
    monkeypatch.setattr(plots_weights, "_PIECE", 100)
    (pieces,) = plots.weight_histograms(model, before)
    assert np.array_equal(whole.counts, pieces.counts) and np.array_equal(whole.before, pieces.before)
    assert np.array_equal(whole.counts, np.histogram(before["0.weight"][mask].numpy(), whole.edges)[0])


def test_the_range_of_a_large_layer_comes_from_a_sample_unless_few_weights_are_left(monkeypatch):
    monkeypatch.setattr(plots_weights, "_SAMPLE", 1000)
    weights = torch.linspace(-1, 1, 10_001)
    assert plots_weights._reach(weights) == pytest.approx(0.9995, abs=3e-3)
    keep = torch.zeros(10_001, dtype=torch.bool)
    keep[7003] = True
    assert plots_weights._reach(weights, keep) == pytest.approx(abs(float(weights[7003])))
    assert plots_weights._reach(weights, keep & False) == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 1), st.floats(0, 1))
def test_weights_that_are_binned_once_are_counted_alike_for_any_masks(seed, first, second):
    model = network(seed)
    before = copies(model)
    binned = plots_weights.BinnedWeights(before)
    for density in (first, second):
        twin = network(seed)
        pruned(twin, density)
        expected = plots.weight_histograms(twin, before)
        for layer, other in zip(expected, binned.histograms(get_masks(twin)), strict=True):
            assert np.array_equal(layer.counts, other.counts) and np.array_equal(layer.before, other.before)
            assert np.array_equal(layer.edges, other.edges) and layer.limit == other.limit


def test_without_a_mask_zeros_are_what_was_pruned():
    model = network()
    masks = pruned(model)
    make_permanent(model)
    sums = [int(mask.sum()) for mask in masks.values()]
    assert [layer.kept for layer in plots.weight_histograms(model)] == sums
    binned = plots_weights.BinnedWeights(copies(model))
    assert [layer.kept for layer in binned.histograms({})] == sums


def test_one_outlier_does_not_set_the_axis_and_is_still_counted():
    model = nn.Sequential(nn.Linear(100, 100))
    with torch.no_grad():
        model[0].weight[3, 4] = 1000
    (layer,) = plots.weight_histograms(model)
    assert layer.limit < 1 and layer.kept == 10_000 and layer.counts[-1] >= 1
    assert plots.layer_histograms(model).get_xlim()[1] < 1


def test_before_must_name_every_layer_and_be_finite():
    before = network().state_dict()
    del before["1.weight"]
    with pytest.raises(ValueError, match="before has no '1.weight'"):
        plots.weight_histograms(network(), before)
    for bad in (math.inf, -math.inf, math.nan):
        before["1.weight"] = torch.zeros(12, 15)
        before["1.weight"][2, 3] = bad
        with pytest.raises(ValueError, match="before: 1.weight.*not finite"):
            plots.weight_histograms(network(), before)
    with pytest.raises(ValueError, match="bins=0"):
        plots.weight_histograms(network(), bins=0)


# --- What is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, name", [(3, "3d"), (7, "3d"), (8, "rectilinear"), (24, "rectilinear")])
def test_the_form_follows_the_number_of_layers(n, name):
    model = network(0, (6,) * (n + 1))
    ax = plots.layer_histograms(model)
    assert ax.name == name and (name == "3d" or not ax.images)
    assert plots.layer_histograms(model, ax=Figure().add_subplot()).name == "rectilinear"
    assert plots.layer_histograms(model, ax=Figure().add_subplot(projection="3d")).name == "3d"


def test_very_many_layers_become_a_heat_map():
    assert plots.layer_histograms(network(0, (6,) * 26)).images


@pytest.fixture
def polygons(monkeypatch):
    """(outlines, zorder) of each collection of 3D ridges drawn, which does not give its vertices back unpadded."""
    drawn, kind = [], waterfall.Poly3DCollection

    def record(outlines, **look):
        drawn.append((np.concatenate(outlines), look["zorder"]))
        return kind(outlines, **look)

    monkeypatch.setattr(waterfall, "Poly3DCollection", record)
    return drawn


def test_the_waterfall_draws_the_counts_on_one_scale_from_the_back_to_the_front(polygons):
    model = network()
    before = copies(model)
    pruned(model, 0.4)
    ax = plots.layer_histograms(model, before)
    first = plots.weight_histograms(model, before)[0]
    assert len(polygons) == 6
    tops = [{round(float(z), 6) for z in vertices[:, 2]} - {0} for vertices, _ in polygons[:2]]
    assert all(np.isin(vertices[:, 0], first.edges.astype(float)).all() for vertices, _ in polygons[:2])
    peak = first.before.max()
    assert tops[0] == {round(n / peak, 6) for n in first.before if n}
    assert tops[1] == {round(n / peak, 6) for n in first.counts if n}
    depths, orders = [vertices[0, 1] for vertices, _ in polygons], [order for _, order in polygons]
    assert depths == [2, 2, 1, 1, 0, 0] and orders == sorted(set(orders))
    assert not ax.computed_zorder


def test_ridges_are_the_counts_on_one_scale_in_one_collection():
    model = network()
    before = copies(model)
    pruned(model, 0.4)
    ax = plots.layer_histograms(model, before, kind="ridge")
    (shapes,) = [c for c in ax.collections if isinstance(c, flat.PolyCollection)]
    rows = {}
    for path in shapes.get_paths():
        base = path.vertices[:, 1].max()
        rows.setdefault(round(base - 0.5), set()).update(np.round((base - path.vertices[:, 1]) / flat._OVERLAP, 6))
    for row, layer in enumerate(plots.weight_histograms(model, before)):
        heights = [n / layer.before.max() for n in (*layer.counts, *layer.before)]
        assert rows[row] == {0.0} | {round(height, 6) for height in heights}


def test_the_heat_map_is_darker_where_more_weights_are_kept_and_grey_where_they_were():
    model = nn.Sequential(nn.Linear(100, 100))
    with torch.no_grad():
        model[0].weight.copy_(torch.linspace(-1, 1, 10_000).reshape(100, 100))
    before = copies(model)
    set_masks(model, {"0.weight": before["0.weight"].abs() > 0.5})
    (image,) = plots.layer_histograms(model, before, kind="heatmap").images
    row = image.get_array()[0]
    middle, side = row[len(row) // 2], row[len(row) // 8]
    assert side.sum() < 0.7 < 1.5 < middle.sum() < 2.5 and np.ptp(middle) < 0.1


@pytest.mark.parametrize("kind", ["3d", "ridge", "heatmap"])
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


@pytest.mark.parametrize("kind", ["3d", "ridge", "heatmap"])
def test_histograms_counted_before_are_drawn_as_they_are(kind):
    model = network()
    layers = plots.weight_histograms(model, bins=5)
    texts = [text.get_text() for text in plots.layer_histograms(layers, kind=kind).texts]
    assert texts == [text.get_text() for text in plots.layer_histograms(model, kind=kind, bins=5).texts]


def test_where_not_all_layers_have_room_for_a_name_the_picture_says_so_and_names_empty_ones():
    model = network(0, (8,) * 41)
    pruned(model, 0.5, empty=("7.weight", "8.weight"))
    ax = plots.layer_histograms(model, kind="3d")
    shown = [t.get_text() for t in ax.texts if t.get_visible()]
    assert "7  0 %" in shown and any(text.endswith("of 40 layers are named") for text in shown)
    ax = plots.layer_histograms(model, ax=Figure((6, 3)).add_subplot())
    named = [t.get_text() for t in ax.get_yticklabels()]
    assert "7" in named and len(named) < 40 and ax.get_ylabel() == f"{len(named)} of 40 layers are named"
    assert len(plots.layer_histograms(model).get_yticklabels()) == 40


def test_long_names_are_told_whole():
    name = "a_long_name_of_a_stage.a_long_name_of_a_block.downsample"
    model = nn.Module()
    inner = model
    for part in name.split(".")[:-1]:
        setattr(inner, part, nn.Module())
        inner = getattr(inner, part)
    inner.downsample = nn.Linear(9, 9)
    (label,) = [t.get_text() for t in plots.layer_histograms(model).texts if "downsample" in t.get_text()]
    assert label.replace("\n", "").startswith(name)
    for kind in ("ridge", "heatmap"):
        assert [t.get_text() for t in plots.layer_histograms(model, kind=kind).get_yticklabels()] == [name]
