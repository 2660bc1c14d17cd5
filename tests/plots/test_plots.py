import math

import matplotlib

matplotlib.use("Agg")

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from scipy import stats  # noqa: E402
from torch import nn  # noqa: E402

from pruneutils import plots  # noqa: E402
from pruneutils.model_utils import layer_table, prunable_weights, set_masks  # noqa: E402
from pruneutils.plots.look import contrast, find_style  # noqa: E402
from pruneutils.plots.ticks import percent, spread  # noqa: E402


@pytest.fixture(autouse=True)
def no_figure_or_setting_is_left_behind():
    settings_before = matplotlib.rcParams.copy()
    yield
    assert matplotlib.rcParams == settings_before
    plt.close("all")


def network(seed=0, sizes=(20, 15, 12, 10)):
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)])


def pruned(model, density=0.3, empty=()):
    weights = prunable_weights(model)
    masks = {n: torch.rand_like(w) < (0 if n in empty else density) for n, w in weights.items()}
    set_masks(model, masks)
    return masks


def runs(methods=("magnitude", "snip"), sparsities=(0.5, 0.9, 0.98), seeds=4):
    noise = np.random.default_rng(0)
    return pd.DataFrame(
        {"method": m, "sparsity": s, "seed": k, "flops": 1e6 * (1 - s), "accuracy": 0.9 - s / 5 + noise.normal(0, 0.01)}
        for m in methods
        for s in sparsities
        for k in range(seeds)
    )


OVERLAP = pd.DataFrame([[1, 0.4], [0.4, 1]], ["snip", "grasp"], ["snip", "grasp"])


def table(empty=("0.weight",)):
    model = network()
    pruned(model, empty=empty)
    return layer_table(model)


PICTURES = {
    "heatmap": lambda **o: plots.layer_histograms(network(), network(1), kind="heatmap", **o),
    "differences": lambda **o: plots.differences(runs(), against="snip", **o),
    "layer_histograms": lambda **o: plots.layer_histograms(network(), network(1).state_dict(), **o),
    "ridge": lambda **o: plots.layer_histograms(network(), network(1), kind="ridge", **o),
    "layer_bars": lambda **o: plots.layer_bars(table(), **o),
    "sparsity_heatmap": lambda **o: plots.sparsity_heatmap({"snip": table(), "grasp": table(())}, **o),
    "mask_overlap": lambda **o: plots.mask_overlap(OVERLAP, **o),
    "accuracy_vs_sparsity": lambda **o: plots.accuracy_vs_sparsity(runs(), dense=[0.9, 0.91, 0.92], **o),
    "curves": lambda **o: plots.curves(runs().assign(epoch=lambda f: f["sparsity"]), y="accuracy", by="method", **o),
    "accuracy_vs_flops": lambda **o: plots.accuracy_vs_flops(runs(), **o),
    "score_distribution": lambda **o: plots.score_distribution(torch.arange(-5.0, 50), 1.0, **o),
}


# --- What every picture does -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_returns_its_axes_in_the_style_asked_for(name):
    for style, canvas in (("light", "#ffffff"), ("dark", "#0d1117")):
        ax = PICTURES[name](style=style)
        ax.figure.draw_without_rendering()
        assert isinstance(ax, Axes)
        assert to_hex(ax.figure.get_facecolor()) == canvas
    assert len(plt.get_fignums()) == 2
    with plots.style("dark"):
        assert to_hex(PICTURES[name]().figure.get_facecolor()) == "#0d1117"
    assert to_hex(PICTURES[name]().figure.get_facecolor()) == "#ffffff"


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_drawn_into_given_axes_makes_no_figure(name):
    ax = Figure().add_subplot(projection="3d" if name == "layer_histograms" else None)
    assert PICTURES[name](ax=ax, style="dark") is ax
    assert to_hex(ax.get_facecolor()) == "#0d1117"
    ax.figure.draw_without_rendering()
    inks = {to_hex(t.get_color()) for t in [*ax.get_xticklabels(), *ax.get_yticklabels()]}
    assert ax.name == "3d" or "#000000" not in inks
    assert plt.get_fignums() == []


@pytest.mark.parametrize("name", ["layer_histograms", "accuracy_vs_sparsity"])
def test_saving_writes_png_svg_and_dark_the_same_each_time(name, tmp_path):
    written = []
    for folder in ("a", "b"):
        PICTURES[name](save=tmp_path / folder / "at_0.9")
        written.append({p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()})
    assert set(written[0]) == {"at_0.9.png", "at_0.9.svg", "at_0.9_dark.png"}
    assert written[0] == written[1]
    assert written[0]["at_0.9.png"] != written[0]["at_0.9_dark.png"]
    assert b"dc:date" not in written[0]["at_0.9.svg"] and b"Software" not in written[0]["at_0.9.png"]
    assert len(plt.get_fignums()) == 2  # the dark twins are no pyplot figures


def test_saving_is_the_same_whichever_style_is_shown(tmp_path):
    for style in ("light", "dark"):
        plots.layer_bars(table(), style=style, save=tmp_path / style)
    for suffix in (".png", ".svg", "_dark.png"):
        assert (tmp_path / f"light{suffix}").read_bytes() == (tmp_path / f"dark{suffix}").read_bytes()


def test_save_takes_a_figure_and_one_suffix(tmp_path):
    ax = plots.layer_bars(table())
    assert plots.save(ax, tmp_path / "x.svg") == [tmp_path / "x.svg"]
    assert plots.save(ax.figure, str(tmp_path / "y")) == [tmp_path / "y.png", tmp_path / "y.svg"]


def test_an_error_leaves_no_figure():
    for call, message in (
        (lambda: plots.layer_bars(table(), style="drak"), "did you mean 'dark'"),
        (lambda: plots.layer_bars(table().drop(columns="kept")), "no column 'kept'"),
        (lambda: plots.layer_histograms(network(), kind="4d"), "unknown kind '4d'.*3d"),
        (lambda: plots.layer_histograms(network(), kind="3d", ax=Figure().add_subplot()), 'projection="3d"'),
        (lambda: plots.accuracy_vs_sparsity(runs(), interval="std"), "unknown interval 'std'"),
        (lambda: plots.accuracy_vs_sparsity(runs(), y="acuracy"), "did you mean 'accuracy'"),
        (lambda: plots.accuracy_vs_sparsity(runs(sparsities=(0.5, 1.0))), "below 1"),
        (lambda: plots.score_distribution({"a": torch.tensor([1, math.nan])}), "a holds values that are not finite"),
        (lambda: plots.score_distribution({}), "empty"),
        (lambda: plots.differences(runs(), against="snap"), "unknown against 'snap'; did you mean 'snip'"),
        (lambda: plots.differences(runs(("snip",))), "one arm"),
        (lambda: plots.mask_overlap(OVERLAP * 2), r"\[0, 1\]"),
        (lambda: plots.sparsity_heatmap({"a": pd.concat([table(), table()])}), "more than once"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="dict"):
        plots.mask_overlap({})
    assert plt.get_fignums() == []


def test_colours_do_not_depend_on_the_order_or_the_company_of_known_methods():
    names = ["snip", "mine", "magnitude", "yours", "random"]
    looks = plots.method_styles(names)
    assert looks == plots.method_styles(names[::-1])
    assert plots.method_styles(["snip"])["snip"] == looks["snip"]
    many = plots.method_styles([f"m{i}" for i in range(30)]).values()
    assert len({(look["color"], look["marker"]) for look in many}) == 30
    numbers = plots.method_styles([8, 1, 4])
    assert list(numbers) == [1, 4, 8] and len({look["color"] for look in numbers.values()}) == 3


@pytest.mark.parametrize("name", ["light", "dark"])
def test_everything_stands_out_from_the_canvas(name):
    style = find_style(name)
    assert contrast("black", "white") == contrast("white", "black") == pytest.approx(21)
    for ink in (style.text, style.muted, style.alarm, style.tie):
        assert contrast(ink, style.canvas) >= 4.5, ink
    ordered = [color for n in (1, 2, 8, 60) for color in style.ordered(n)]
    for line in (*style.methods, *ordered):
        assert contrast(line, style.canvas) >= 3, line
    assert len({tuple(color) for color in style.ordered(60)}) == 60


def test_numbers_in_cells_stand_out_from_their_colour():
    grid = pd.DataFrame(np.linspace(0, 1, 36).reshape(6, 6), range(6), range(6))
    for ax in (plots.mask_overlap(grid), plots.sparsity_heatmap({"snip": table(), "grasp": table(())})):
        (image,) = ax.images
        for text in ax.texts:
            if text.get_text() != "×":
                column, row = text.get_position()
                behind = image.cmap(image.norm(image.get_array()[row, column]))
                assert contrast(text.get_color(), behind) >= 4.5


@pytest.mark.parametrize(
    "fraction, text",
    [(0, "0 %"), (1e-6, "<0.1 %"), (0.012, "1.2 %"), (0.5, "50 %"), (0.9999, ">99.9 %"), (1, "100 %")],
)  # fmt: skip
def test_only_nothing_is_zero_percent_and_only_all_is_a_hundred(fraction, text):
    assert percent(fraction) == text


@given(st.floats(0, 1), st.integers(0, 3))
def test_percentages_are_rounded_as_text_beside_them_is(fraction, decimals):
    text, plain = percent(fraction, decimals, sign=""), f"{100 * fraction:.{decimals}f}"
    if fraction in (0, 1):
        assert text in ("0", "100")
    elif float(plain) in (0, 100):
        assert text[0] in "<>"
    else:
        assert text == plain == f"{fraction:.{decimals}%}"[:-1]


# --- Tables ----------------------------------------------------------------------------------------------------------


def test_bars_have_the_densities_and_collapsed_layers_are_lit():
    data = table(empty=("1.weight",))
    ax = plots.layer_bars(data)
    bars, lit = ax.containers
    assert [bar.get_width() for bar in bars] == list(data["kept"] / data["total"])
    assert len(lit) == 1 and lit[0].get_hatch() and lit[0].get_y() == bars[1].get_y()
    assert "0 %: collapsed" in [t.get_text() for t in ax.texts]


def test_heat_map_has_a_cell_for_each_sparsity_and_crosses_out_what_collapsed():
    tables = {"snip": table(), "grasp": table(())}
    ax = plots.sparsity_heatmap(tables)
    texts = [t.get_text() for t in ax.texts]
    assert texts[0] == "×" and texts.count("×") == 1
    expected = [f"{100 * s:.1f}" for t in tables.values() for s in t["sparsity"]]
    assert texts[1:] == expected[1:]
    shade = ax.images[0].get_array()
    assert shade.mask[0, 0] and shade.mask.sum() == 1
    assert np.allclose(shade[1], -np.log10(1 - tables["grasp"]["sparsity"]))
    tidy = pd.concat([t.assign(method=name) for name, t in tables.items()])
    assert [t.get_text() for t in plots.sparsity_heatmap(tidy).texts] == texts


def test_overlap_numbers():
    assert [t.get_text() for t in plots.mask_overlap(OVERLAP).texts] == ["1.00", "0.40", "0.40", "1.00"]


# --- Runs ------------------------------------------------------------------------------------------------------------


def error_bars(ax):
    """{label: (x, mean, low, high)} as drawn."""
    drawn = {}
    for bars in ax.containers:
        segments = np.array(bars.lines[2][0].get_segments())
        x, mean = bars.lines[0].get_data()
        drawn[bars.get_label()] = (x, mean, segments[:, 0, 1], segments[:, 1, 1])
    return drawn


@pytest.mark.parametrize("interval", ["t", "minmax"])
def test_error_bars_are_the_interval_that_the_legend_names(interval):
    frame = runs().sample(frac=1, random_state=1)
    ax = plots.accuracy_vs_sparsity(frame, interval=interval)
    for name, (x, mean, low, high) in error_bars(ax).items():
        cells = [frame[(frame["method"] == name) & (frame["sparsity"] == s)]["accuracy"] for s in (0.5, 0.9, 0.98)]
        assert list(x) == [0.5, 0.9, 0.98] and np.allclose(mean, [c.mean() for c in cells])
        if interval == "t":
            ends = [stats.t.interval(0.95, 3, c.mean(), stats.sem(c)) for c in cells]
        else:
            ends = [(c.min(), c.max()) for c in cells]
        assert np.allclose(np.column_stack([low, high]), ends)
    title = ax.get_legend().get_title().get_text()
    assert "n = 4 seeds" in title and ("t-interval" if interval == "t" else "smallest") in title


def test_several_curves_are_drawn_side_by_side_a_few_points_apart():
    figure = Figure(dpi=144)  # two pixels a point
    ax = plots.accuracy_vs_sparsity(runs(("magnitude", "snip", "random")), ax=figure.add_subplot())
    ax.figure.draw_without_rendering()
    exact = ax.transData.transform([(s, 0.8) for s in (0.5, 0.9, 0.98)])[:, 0]
    shifts = []
    for bars in ax.containers:
        means = bars.lines[0].get_transform().transform(bars.lines[0].get_xydata())[:, 0]
        caps = [cap.get_transform().transform(cap.get_xydata())[:, 0] for cap in bars.lines[1]]
        (sticks,) = bars.lines[2]
        sticks = sticks.get_transform().transform([segment[0] for segment in sticks.get_segments()])[:, 0]
        assert len(caps) == 2 and np.allclose([*caps, sticks], means)
        shifts.append((means - exact) / 2)
    assert np.allclose(shifts, np.array([[-5], [0], [5]]) * np.ones(3))
    low, high = spread(ax.get_xlim())  # the limits are those of the exact places, the margins alike
    assert np.isclose(spread(0.5) - low, high - spread(0.98))


def test_a_single_curve_is_drawn_where_it_is():
    (bars,) = plots.accuracy_vs_sparsity(runs(("snip",))).containers
    assert all(artist.get_transform() == bars.lines[0].axes.transData for artist in bars.get_children())


def test_a_single_run_has_no_interval_and_nothing_is_said_of_one():
    ax = plots.accuracy_vs_sparsity(runs(seeds=1))
    assert ax.get_legend().get_title().get_text() == ""
    assert plots.curves(runs(("snip",), seeds=1), x="sparsity", y="accuracy").get_legend() is None
    assert all(not len(s) or np.isnan(s).any() for bars in ax.containers for s in bars.lines[2][0].get_segments())


def test_the_axis_spreads_high_sparsities():
    ax = plots.accuracy_vs_sparsity(runs(sparsities=(0, 0.5, 0.9, 0.95, 0.98, 0.99)))
    ax.figure.draw_without_rendering()
    place = ax.transData.transform([(s, 0.5) for s in (0, 0.9, 0.99)])[:, 0]
    assert np.isclose(place[1] - place[0], place[2] - place[1])
    shown = {t.get_text() for t in ax.get_xticklabels()}
    assert {"99 %", "98 %", "95 %", "90 %", "50 %", "0 %"} <= shown
    assert ax.get_xlabel() == "sparsity (log scale of the weights kept)"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9999), min_size=1, max_size=12, unique=True), st.floats(2, 12))
def test_ticks_of_sparsity_are_round_and_stand_apart(sparsities, inches):
    frame = runs(("snip",), [s / 10_000 for s in sparsities], 1)
    ax = plots.accuracy_vs_sparsity(frame, ax=Figure((inches, 3)).add_subplot())
    ax.figure.draw_without_rendering()
    texts = [t for t in ax.get_xticklabels() if t.get_text()]
    assert all(len(t.get_text().rstrip(" %").lstrip("-").replace(".", "")) <= 4 for t in texts)
    assert not any(a.get_window_extent().overlaps(b.get_window_extent()) for a, b in zip(texts, texts[1:]))
    assert all(spread(float(t.get_text()[:-2]) / 100) <= spread(ax.get_xlim()[1]) + 1e-6 for t in texts)


def test_percentages_on_an_axis_have_the_same_decimals():
    ax = plots.curves(pd.DataFrame({"epoch": [1, 2, 3], "test_accuracy": [0.941, 0.9437, 0.9462]}))
    ax.figure.draw_without_rendering()
    texts = [t.get_text() for t in ax.get_yticklabels()]
    assert len({len(text.partition(".")[2]) for text in texts}) == 1 and len(texts) >= 3


def test_logarithmic_axes_say_so():
    frame = pd.DataFrame({"n": [1, 10, 1000], "score": [1, 2, 300.0]})
    ax = plots.curves(frame, x="n", y="score", xscale="log", yscale="log")
    assert ax.get_xlabel() == "n (log scale)" and ax.get_ylabel() == "score (log scale)"
    flops = plots.accuracy_vs_flops(runs(sparsities=(0, 0.5, 0.99)))
    assert flops.get_xscale() == "log" and flops.get_xlabel() == "FLOPs (log scale)"
    scores = plots.score_distribution(torch.arange(-5.0, 50))
    assert "log scale" in scores.get_xlabel() and "log scale" in scores.get_ylabel()
    with pytest.raises(ValueError, match="unknown yscale 'logit'"):
        plots.curves(frame, x="n", y="score", yscale="logit")


def test_rows_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="size"):
        plots.accuracy_vs_sparsity(runs().assign(size=lambda f: np.where(f["seed"] > 1, "full", "quick")))
    with pytest.raises(ValueError, match="seed"):
        plots.accuracy_vs_sparsity(pd.concat([runs(), runs()]))
    with pytest.raises(ValueError, match="seed"):
        plots.accuracy_vs_sparsity(runs(), by=None)


def test_curves_show_when_weights_were_pruned():
    frame = pd.DataFrame(
        {"method": m, "seed": k, "epoch": e, "test_accuracy": 0.5 + e / 100 + k / 50, "sparsity": 0.3 * (e // step)}
        for m, step in (("snip", 3), ("grasp", 4))
        for k in range(3)
        for e in range(1, 9)
    )
    ax = plots.curves(frame, by="method")
    ticks = [[float(s[0, 0]) for s in c.get_segments()] for c in ax.collections if hasattr(c, "get_segments")]
    assert sorted(ticks) == [[3, 6], [4, 8]]
    band = ax.collections[0].get_paths()[0].vertices
    half = stats.t.ppf(0.975, 2) * 0.02 / math.sqrt(3)
    first = band[band[:, 0] == 1][:, 1]
    assert np.isclose(first.max() - first.min(), 2 * half)
    with pytest.raises(ValueError, match="unknown curve in events 'spin'; known: snip, grasp"):
        plots.curves(frame, by="method", events={"spin": [1]})


def test_one_curve_shows_its_prunings_too():
    frame = pd.DataFrame({"epoch": range(6), "test_accuracy": 0.9, "sparsity": [0, 0, 0.5, 0.5, 0.9, 0.9]})
    (marks,) = [c for c in plots.curves(frame).collections if hasattr(c, "get_segments")]
    assert [segment[0, 0] for segment in marks.get_segments()] == [2, 4]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_front_holds_what_nothing_beats(points):
    cost, gain = zip(*points, strict=True)
    front = plots.pareto_front(cost, gain)
    beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] >= p[1]}
    assert {points[i] for i in front} == set(points) - beaten
    assert [cost[i] for i in front] == sorted({cost[i] for i in front})


def test_flops_are_averaged_over_seeds():
    frame = runs()
    frame["flops"] += frame["seed"]
    ax = plots.accuracy_vs_flops(frame)
    assert np.allclose(error_bars(ax)["snip"][0], np.array([0.02, 0.1, 0.5]) * 1e6 + 1.5)


# --- Differences -----------------------------------------------------------------------------------------------------


def drawn_differences(ax):
    """{(colour, place): (difference, low, high, filled)} as drawn."""
    marks = [line for line in ax.lines if line.get_marker() not in ("", "None", None)]
    spans = {(to_hex(c.get_color()[0]), s[0, 0]): s[:, 1] for c in ax.collections for s in c.get_segments()}
    drawn = {}
    for mark in marks:
        ((place, mean),) = mark.get_xydata()
        color = to_hex(mark.get_markeredgecolor())
        drawn[color, place] = (mean, *spans[color, place], to_hex(mark.get_markerfacecolor()) == color)
    return drawn


@pytest.mark.parametrize("reference, sign", [("magnitude", 1), ("snip", -1)])
def test_differences_are_paired_with_their_interval_and_filled_where_arms_differ(reference, sign):
    noise = np.random.default_rng(1)
    frame = runs(sparsities=(0.5, 0.9), seeds=6)
    frame["accuracy"] += 0.1 * frame["seed"]  # what differs between seeds is none of the comparison's business
    frame.loc[(frame["method"] == "snip") & (frame["sparsity"] == 0.9), "accuracy"] -= 0.05
    ax = plots.differences(frame.sample(frac=1, random_state=noise), against=reference)
    other = {"magnitude": "snip", "snip": "magnitude"}[reference]
    color = to_hex(plots.method_styles([reference, other])[other]["color"])
    filled = []
    for place, sparsity in enumerate((0.5, 0.9)):
        cell = frame[frame["sparsity"] == sparsity].pivot(index="seed", columns="method", values="accuracy")
        gap = sign * (cell["snip"] - cell["magnitude"])
        low, high = stats.t.interval(0.95, 5, gap.mean(), stats.sem(gap))
        assert drawn_differences(ax)[color, place][:3] == pytest.approx((gap.mean(), low, high))
        filled.append(drawn_differences(ax)[color, place][3])
    assert filled == [False, True]
    ax.figure.draw_without_rendering()
    assert [t.get_text() for t in ax.get_xticklabels()] == ["50 %", "90 %"]
    assert any("+" in t.get_text() or "−" in t.get_text() for t in ax.get_yticklabels())
    assert "n = 6 pairs" in ax.get_legend().get_title().get_text()


def test_differences_need_no_x_and_take_names():
    plots.differences(runs(sparsities=(0.9,)), x=None).figure.draw_without_rendering()
    named = runs(sparsities=(0.9,)).assign(network="VGG-16")
    assert [t.get_text() for t in plots.differences(named, x="network").get_xticklabels()] == ["VGG-16"]
    both = pd.concat([named, named.assign(network="LeNet-5")])  # words stay in their order
    assert [t.get_text() for t in plots.differences(both, x="network").get_xticklabels()] == ["VGG-16", "LeNet-5"]


def test_many_arms_get_a_row_each_with_the_best_on_top():
    """Nine arms and a reference: eight colours would come twice, so the values of x have the colours."""
    gains = {f"arm {i}": gain for i, gain in enumerate((0.0, 0.03, -0.01, 0.02, 0.05, -0.04, 0.01, 0.04, -0.02, 0.06))}
    rows = [
        (arm, held, seed, 0.8 + gain * (1 if held == "work" else -1) + 0.001 * seed * (1 + gain))
        for held in ("work", "filters")
        for arm, gain in gains.items()
        for seed in range(4)
    ]
    frame = pd.DataFrame(rows, columns=["method", "held", "seed", "accuracy"])
    ax = plots.differences(frame, x="held", against="arm 0", title="Ten arms")
    ax.figure.draw_without_rendering()
    named = [text.get_text() for text in ax.get_yticklabels()]
    assert named == sorted(set(gains) - {"arm 0"}, key=gains.get, reverse=True)
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first row is on top
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend[:2] == ["work", "filters"]
    marks = [line for line in ax.lines if line.get_marker() not in ("", "None", None)]
    assert len(marks) == 18 and len({to_hex(mark.get_markeredgecolor()) for mark in marks}) == 2
    color = to_hex(ax.get_legend().legend_handles[0].get_color())
    drawn = {named[int(y)]: x for m in marks if to_hex(m.get_markeredgecolor()) == color for x, y in m.get_xydata()}
    assert drawn == pytest.approx({arm: gain + 0.0015 * gain for arm, gain in gains.items() if arm != "arm 0"})


def test_courses_stand_above_the_accuracy_and_dense_runs_in_every_column():
    courses = pd.DataFrame({"epoch": [0, 1, 2], "sparsity": [0, 0.5, 0.9], "learning rate": [1, 0.5, 0]})
    courses = pd.concat([courses.assign(arm=f"{n} prunings", equal=equal) for n, equal in ((2, "total"), (4, "rest"))])
    runs = pd.DataFrame({"epoch": [1, 2], "test_accuracy": [0.8, 0.7]})
    arms = [("2 prunings", "total"), ("4 prunings", "rest"), ("dense", None)]
    runs = pd.concat([runs.assign(arm=arm, equal=equal, seed=0) for arm, equal in arms])
    axes = np.reshape(plots.pruning_courses(courses, runs).axes, (3, 2))
    assert [ax.get_title("left") for ax in axes[0]] == ["total", "rest"]
    assert [len(ax.lines) for ax in axes.T.flat] == [1, 1, 2, 1, 1, 2]
    assert axes[0, 1].lines[0].get_ydata().tolist() == [0, 0.5, 0.9]
    with pytest.raises(ValueError, match="no column 'arm'"):
        plots.pruning_courses(courses, runs.drop(columns="arm"))


# --- Scores ----------------------------------------------------------------------------------------------------------


def test_zeros_are_a_bar_of_their_own_and_every_score_is_counted():
    scores = {"a": torch.tensor([0.0] * 70 + [1e-3] * 5), "b": -torch.logspace(-4, 2, 25)}
    ax = plots.score_distribution(scores, threshold=1e-3)
    (zeros,) = ax.containers[0]
    assert zeros.get_height() == 70 and zeros.get_x() == -zeros.get_width() / 2
    stairs = [p.get_data() for p in ax.patches if hasattr(p, "get_data")]
    assert [int(s.values.sum()) for s in stairs] == [5, 25]
    assert all((np.diff(s.edges) > 0).all() for s in stairs)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [
        "exactly zero: 70 of 100 (70 %)",
        "threshold 0.001: 95 below (95 %)",
    ]


def test_scores_that_are_all_zero_or_all_equal_can_be_drawn():
    for scores in (torch.zeros(9), torch.ones(9)):
        plots.score_distribution(scores).figure.canvas.draw()
