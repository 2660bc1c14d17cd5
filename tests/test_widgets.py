"""The explorer shows what `prune` would do, to the bit, and leaves the model alone until it is told to apply."""

import asyncio
import copy
import gc
import io
import threading
import time
import warnings
import weakref

import ipywidgets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from PIL import Image
from torch import nn

import pruneutils as pu
from pruneutils._masks.mask import MASKS
from pruneutils.costs import cost
from pruneutils.plots.look import contrast
from pruneutils.pruning import criteria, granularities
from pruneutils.widgets import SparsityExplorer, explorer, sparsity_explorer, trial, words

DATA = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3


def network(seed=0, batch_norm=True):
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(4) if batch_norm else nn.Identity()
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)
    )


def everything(model):
    """All that an explorer must not touch."""
    values = [tensor.clone() for tensor in model.state_dict().values()]
    return values, [module.training for module in model.modules()], [p.grad for p in model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True)) and one[1:] == other[1:]


def pruned(model, panel, **options):
    """What `prune` makes of the panel's choice: the masks, and whether it warns of ties."""
    model, fixed = copy.deepcopy(model), ":" in panel.granularity.value
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        masks = pu.prune(
            model, panel.criterion.value, None if fixed else panel.slider.value, panel.scope.value,
            panel.granularity.value, data=panel.scoring_data, **options,
        )  # fmt: skip
    return masks, [str(w.message) for w in caught if w.category is pu.TiedScoresWarning], model


def equal(masks, others):
    return list(masks) == list(others) and all(torch.equal(masks[name], others[name]) for name in masks)


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(SparsityExplorer, "_show", lambda self, later=True: self._select())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 3),
    levels=st.sampled_from([1, 2, 5, 1000]),
    criterion=st.sampled_from(["magnitude", "snip", "random"]),
    scope=st.sampled_from(["global", "layer", "erk"]),
    granularity=st.sampled_from(["weight", "kernel", "filter"]),
    start=st.sampled_from([0.0, 0.37]),
    sparsities=st.lists(st.floats(0.5, 1.0), min_size=1, max_size=4),
    double=st.booleans(),
)
def test_masks_are_those_of_prune_ties_included(
    undrawn, seed, levels, criterion, scope, granularity, start, sparsities, double
):
    model = network(seed)
    model = model.double() if double else model
    data = (DATA[0].double(), DATA[1]) if double else DATA
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_((weight * levels).round() / levels if levels < 1000 else weight)
    if start:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pu.prune(model, "random", start, scope)
    before = everything(model)
    panel = sparsity_explorer(model, data, criterion=criterion, scope=scope, granularity=granularity, sparsity=0.5)
    for sparsity in sparsities:
        panel.slider.value = sparsity
        masks, tied, twin = pruned(model, panel)
        assert equal(panel.masks, masks)
        assert bool(panel.ties) == bool(tied)
        if tied:
            assert f"{sum(panel.ties.values()):,} weights tie" in tied[0]
        assert all(
            torch.equal(a, b)
            for a, b in zip(panel._trial.network(panel.masks).parameters(), twin.parameters(), strict=True)
        )
    assert same(everything(model), before)


class Attention(nn.Module):
    """A transformer on the rows of the images; its attention keeps three projections in one weight."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs):
        return self.head(self.encoder(inputs[:, 0]).mean(1))


@pytest.mark.parametrize("granularity", ["weight", "filter"])
@pytest.mark.parametrize("criterion", ["magnitude", "snip"])
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_the_projections_of_attention_compete_as_in_prune(undrawn, scope, criterion, granularity):
    torch.manual_seed(0)
    model = Attention()
    with torch.no_grad():
        model.encoder.self_attn.in_proj_weight[:8].mul_(0.1)  # together, the queries would lose nearly all
    panel = sparsity_explorer(model, DATA, criterion=criterion, scope=scope, granularity=granularity)
    for sparsity in (0.3, 0.5, 0.8):
        panel.slider.value = sparsity
        masks, _, _ = pruned(model, panel)
        assert equal(panel.masks, masks)
    if scope == "layer":
        parts = panel.masks["encoder.self_attn.in_proj_weight"].chunk(3)
        assert len({int(part.sum()) for part in parts}) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pu.LayerCollapseWarning)
        pu.prune(model, criterion, 0.3, scope, granularity, data=panel.scoring_data)  # and on top of masks
    panel.slider.value = 0.9
    assert equal(panel.masks, pruned(model, panel)[0])


def test_an_empty_projection_of_attention_is_told_as_prune_does():
    torch.manual_seed(0)
    model = Attention()
    with torch.no_grad():
        model.encoder.self_attn.in_proj_weight[:8].mul_(1e-4)
        model.encoder.self_attn.in_proj_weight[8:16] = 1e-3
    panel = sparsity_explorer(model, DATA, sparsity=0.18)
    told = "encoder.self_attn.in_proj_weight[{}]"
    assert f"collapsed, no weight is left: {told.format('q')}" in panel.text.value
    assert list(panel.ties) == [told.format("k")] and f"({told.format('k')}: 64)" in panel.text.value
    assert count_pixels(panel.image.value, words.TIE) > 50
    assert panel._trial.collapse(panel.choice) == pytest.approx(64 / 536, abs=0.01)
    with pytest.warns(pu.LayerCollapseWarning, match=r"1 of 7 layers .*in_proj_weight\[q\]"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pu.TiedScoresWarning)
            pu.prune(model, sparsity=0.18)


def test_two_of_four_has_no_slider():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 3))
    panel = sparsity_explorer(model, DATA, granularity="2:4")
    assert panel.slider.disabled and equal(panel.masks, pruned(model, panel)[0])
    panel.granularity.value = "weight"
    assert not panel.slider.disabled
    with pytest.raises(ValueError, match="inputs in multiples of 4"):
        sparsity_explorer(network(), DATA, granularity="2:4")


def test_excluded_layers_stay(undrawn):
    model = network()
    pu.prune(model, sparsity={"0": 0.5})
    panel = sparsity_explorer(model, DATA, exclude=["0"], sparsity=0.7)
    assert equal(panel.masks, pruned(model, panel, exclude=["0"])[0])


def test_a_move_is_a_threshold_and_not_a_sort(undrawn, monkeypatch):
    calls = []
    for module, name in ((granularities, "rank"), (criteria, "scores"), (torch, "sort"), (torch.Tensor, "sort")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function, n=name, **k: calls.append(n) or f(*a, **k))
    panel = sparsity_explorer(network(), DATA, criterion="snip")
    assert calls == ["scores", "rank", "sort"]
    for sparsity in (0.9, 0.2, 0.7):
        panel.slider.value = sparsity
    assert len(calls) == 3
    panel.scope.value = "layer"
    assert calls[3:] == ["rank", "sort"] * 3
    panel.scope.value = "erk"
    panel.slider.value = 0.8
    panel.scope.value = "global"
    assert len(calls) == 9


def test_moving_the_slider_redraws_picture_and_numbers():
    model = network()
    before = everything(model)
    panel = sparsity_explorer(model, DATA)
    seen = set()
    for sparsity in (0.5, 0.9, 0.95):
        panel.slider.value = sparsity
        _, _, twin = pruned(model, panel)
        counted, price = pu.count(twin), cost(twin, DATA[0])
        assert f"<b>{counted.sparsity:.2%} pruned</b>: {counted.kept:,} of {counted.total:,}" in panel.text.value
        assert f"<b>accuracy {pu.accuracy(twin, DATA):.1%}</b> on 40 images" in panel.text.value
        assert f"accumulates {words.si(price.sparse_macs)}</b> of {words.si(price.macs)}" in panel.text.value
        assert f"on disk {words.si(price.sparse_bytes)}B" in panel.text.value
        pixels = np.asarray(Image.open(io.BytesIO(panel.image.value)))
        assert pixels.std() > 10
        seen.add(pixels.tobytes())
    assert len(seen) == 3
    assert same(everything(model), before)
    assert pu.get_masks(model) == {}
    assert repr(panel) == "sparsity_explorer(magnitude, 0.95, global, weight)"


def test_accuracy_on_a_subset_first_then_in_full_and_kept(monkeypatch):
    model, evaluated = network(), []
    function = trial.accuracy
    monkeypatch.setattr(trial, "accuracy", lambda m, data: evaluated.append(len(data[1])) or function(m, data))
    panel = sparsity_explorer(model, DATA, subset=10)
    assert evaluated == [10, 10]  # before, and as chosen
    assert "on 10 images" in panel.text.value
    assert panel.accuracy() == pu.accuracy(pruned(model, panel)[2], DATA)
    assert evaluated == [10, 10, 40, 40] and "on all 40 images" in panel.text.value
    panel.slider.value = 0.8
    panel.slider.value = 0.5
    panel.accuracy()
    assert evaluated == [10, 10, 40, 40, 10]
    assert "on all 40 images" in panel.text.value


def test_the_full_accuracy_comes_by_itself_where_an_event_loop_runs(monkeypatch):
    monkeypatch.setattr(explorer, "_PAUSE", 0.0)
    model = network()

    async def session():
        panel = sparsity_explorer(model, DATA, subset=10)
        panel.slider.value = 0.7
        panel.slider.value = 0.8
        assert "on 10 images" in panel.text.value
        await asyncio.wait_for(panel._task, 30)
        return panel

    panel = asyncio.run(session())
    reached = pu.accuracy(pruned(model, panel)[2], DATA)
    assert f"accuracy {reached:.1%}</b> on all 40 images" in panel.text.value
    in_full = {choice for choice, full in panel._trial.reached if full}
    assert in_full == {trial.UNPRUNED, panel.choice}  # 0.7 did not stand
    curve = {choice.sparsity for choice, full in panel._trial.reached if not full}
    assert curve >= set(explorer._PLACES)


def test_apply_prunes_the_model_and_the_slider_cannot_go_back():
    model = network()
    panel = sparsity_explorer(model, DATA, sparsity=0.8, scope="layer")
    masks, _, twin = pruned(model, panel)
    before = {name: weight.clone() for name, weight in panel._trial.ghost.items()}
    panel.button.click()
    assert all(torch.equal(panel._trial.ghost[name], before[name]) for name in before)  # the pale histogram stays
    assert equal(pu.get_masks(model), masks)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert panel.slider.min == pytest.approx(pu.count(model).sparsity)
    panel.slider.value = 0.1
    assert panel.slider.value == panel.slider.min
    panel.slider.value = 0.9
    assert equal(panel.apply(), panel.masks) and pu.count(model).sparsity == pytest.approx(0.9, abs=0.01)


def test_training_in_between_is_seen(undrawn):
    model = network()
    panel = sparsity_explorer(model, DATA, sparsity=0.6)
    panel.apply()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(DATA[0]).square().sum().backward()
    optimizer.step()
    panel.slider.value = 0.75
    assert equal(panel.masks, pruned(model, panel)[0])
    pu.make_permanent(model)
    panel.slider.value = 0.65
    assert equal(panel.masks, pruned(model, panel)[0])


def test_collapse_and_ties_light_up():
    model = network()
    with torch.no_grad():
        model[0].weight.fill_(1e-3)
    panel = sparsity_explorer(model, DATA, sparsity=0.05)
    assert "weights tie at the cut" in panel.text.value and "0: 36" in panel.text.value
    tied = panel.image.value
    panel.slider.value = 0.2
    assert "tie" not in panel.text.value and "collapsed, no weight is left: 0" in panel.text.value
    collapsed = panel.image.value
    assert "▲" not in sparsity_explorer(network(), DATA).text.value
    lit = [tied, collapsed, sparsity_explorer(network(), DATA).image.value]
    assert [count_pixels(png, words.TIE) > 50 for png in lit] == [True, False, False]
    assert [count_pixels(png, words.ALARM) > 50 for png in lit] == [False, True, False]


def test_lines_that_warn_stand_out_from_what_is_behind_them():
    for ink in (words.ALARM, words.TIE):
        assert f"color: {ink}; background: #fff" in words.line("a layer is empty", ink)
        assert contrast(ink, "#fff") >= 4.5, ink


def count_pixels(png, colour):
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) == rgb).all(axis=2).sum())


def test_what_prune_refuses_is_told_in_the_panel():
    model = network()
    pu.prune(model, sparsity={"0": 0.9})
    panel = sparsity_explorer(model, DATA, sparsity=0.8)
    assert panel.masks is not None
    panel.scope.value = "layer"
    assert "pruned already" in panel.text.value and panel.masks is None and panel.button.disabled
    with pytest.raises(ValueError, match="pruned already"):
        panel.apply()
    panel.slider.value = 0.95
    assert equal(panel.masks, pruned(model, panel)[0]) and not panel.button.disabled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "magnitud"}, "magnitude"),
        ({"scope": "globl"}, "global"),
        ({"granularity": "filtr"}, "filter"),
        ({"sparsity": 90}, r"fraction in \[0, 1\]"),
        ({"subset": 0}, "at least 1"),
        ({"style": "drk"}, "dark"),
        ({"exclude": ["nowhere"]}, "nowhere"),
    ],
)
def test_wrong_arguments_raise_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        sparsity_explorer(network(), DATA, **options)


def test_criteria_offered(undrawn):
    def mine(model, data):
        return {name: -weight.abs() for name, weight in pu.prunable_weights(model).items()}

    offered = sparsity_explorer(network(), DATA).criterion.options
    names = [name for name, _ in offered]
    assert set(names) == set(pu.list_criteria()) - {"movement"}  # which needs a reference
    panel = sparsity_explorer(network(), DATA, criterion=mine, choices=["magnitude", "synflow"])
    assert [name for name, _ in panel.criterion.options] == ["magnitude", "synflow", "mine"]
    assert equal(panel.masks, pruned(panel.model, panel)[0])


def test_any_kind_of_data(undrawn):
    pairs = [(DATA[0][i : i + 8], DATA[1][i : i + 8]) for i in range(0, 40, 8)]
    model, expected = network(), None
    for data in (DATA, pairs, iter(pairs), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*DATA), 8)):
        panel = sparsity_explorer(model, data, subset=12)
        assert len(panel.scoring_data[1]) == 12
        for _ in panel._in_full():
            pass
        expected = expected or panel._trial.reached
        assert panel._trial.reached == expected
    with pytest.raises(ValueError, match="no sample"):
        sparsity_explorer(model, [])


def test_a_timm_model_and_a_static_picture(tmp_path):
    model = pu.models.create("timm/test_resnet", in_chans=1, num_classes=3)
    before = everything(model)
    inputs = torch.randn(6, 1, 32, 32)
    panel = sparsity_explorer(model, (inputs, torch.arange(6) % 3), criterion="synflow", sparsity=0.9)
    assert equal(panel.masks, pruned(model, panel)[0])
    assert same(everything(model), before)
    figure = panel.picture(save=tmp_path / "explorer")
    assert len(figure.axes) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["explorer.png", "explorer.svg", "explorer_dark.png"]
    plt.close(figure)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_masks_on_a_gpu_are_those_of_the_cpu(undrawn):
    panels = [sparsity_explorer(network().to(device), DATA, sparsity=0.7) for device in ("cpu", "cuda")]
    cpu, gpu = (panel.masks for panel in panels)
    assert all(mask.is_cuda and torch.equal(mask.cpu(), cpu[name]) for name, mask in gpu.items())


# --- The curve, and what a reader takes along ------------------------------------------------------------------------


def test_the_curve_is_what_prune_gives_at_each_place_and_earlier_ones_stay():
    model = network()
    panel = sparsity_explorer(model, DATA, sparsity=0.55)
    places = (0.2, 0.5, 0.9)
    curve = panel.curve(places)
    assert list(curve["sparsity"]) == list(places) and set(curve["method"]) == {"magnitude"}
    for row in curve.itertuples():
        twin = copy.deepcopy(model)
        pu.prune(twin, "magnitude", row.sparsity)
        assert row.accuracy == pu.accuracy(twin, DATA)
    before = panel.course.value
    panel.scope.value = "layer"
    assert set(panel._lines()) == {"magnitude", "magnitude, layer"} and panel.course.value != before
    assert len(panel._lines()["magnitude"]) == 3


@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_the_mark_of_a_collapse_is_where_prune_empties_a_layer(scope, granularity):
    def empties(sparsity):
        twin = copy.deepcopy(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            masks = pu.prune(twin, "magnitude", sparsity, scope, granularity)
        return any(not mask.any() for mask in masks.values())

    model = network()
    with torch.no_grad():
        model[3].weight.mul_(0.3)
    panel = sparsity_explorer(model, DATA, scope=scope, granularity=granularity)
    panel.curve(())
    place = panel._trial.collapse(panel.choice)
    if place is None:
        assert not empties(0.999)
    else:
        assert empties(place) and not empties(place - 2e-3)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"criterion": "magnitude", "sparsity": 0.7}, {}),
        ({"criterion": "snip", "scope": "layer"}, {"exclude": ["0"], "seed": 3}),
        ({"criterion": "random", "granularity": "kernel", "scope": "erk"}, {"seed": 3}),
    ],
)
def test_the_code_shown_gives_the_masks_shown(settings, options):
    model = network()
    panel = sparsity_explorer(model, DATA, **settings, **options)
    panel.recalibrated.value = True
    names = {"pu": pu, "model": copy.deepcopy(model), "batch": panel.scoring_data}
    exec(panel.code, names)
    assert equal(names["masks"], panel.masks)
    assert pu.accuracy(names["model"], DATA) == panel.accuracy()
    assert words.html.escape(panel.code) in panel._code.value and "<button" in panel._code.value


@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_the_code_rounds_no_layer_otherwise(scope):
    """0.019 and 0.02 of these 564 weights are 11, but of the layer of 144 they are 3 and 2."""
    panel = sparsity_explorer(network(), DATA, scope=scope)
    for sparsity in (0.019, 0.041, 0.079, 0.319, 0.919):
        panel.slider.value = sparsity
        names = {"pu": pu, "model": network()}
        exec(panel.code, names)
        assert equal(names["masks"], panel.masks), (panel.code, sparsity)


def test_the_code_asks_for_what_is_pruned_already_in_few_digits():
    model = network()
    total = pu.count(model).total
    pu.prune(model, "magnitude", 0.7)
    panel = sparsity_explorer(model, DATA, sparsity=0.0)
    assert panel.slider.value == pu.count(model).sparsity != 0.7
    names = {"pu": pu, "model": copy.deepcopy(model)}
    exec(panel.code, names)
    assert equal(names["masks"], panel.masks)
    assert len(panel.code.split("sparsity=")[1].split(",")[0]) <= len("0.") + len(str(total))


def test_code_of_functions_and_objects_names_them():
    def mine(model, data):
        return {name: weight.abs() for name, weight in pu.prunable_weights(model).items()}

    panel = sparsity_explorer(network(), DATA, criterion=mine, granularity=pu.Block(2, 1))
    names = {"pu": pu, "mine": mine, "model": network(), "batch": DATA}
    exec(panel.code, names)
    assert equal(names["masks"], panel.masks)
    fixed = sparsity_explorer(
        nn.Sequential(nn.Linear(8, 3)), (torch.randn(9, 8), torch.arange(9) % 3), granularity="2:4"
    )
    assert fixed.code == 'masks = pu.prune(model, "magnitude", granularity="2:4")'


def test_recalibrated_accuracy_is_that_of_recalibrate_and_can_be_switched_off():
    model = network()
    model.train()(DATA[0])
    panel = sparsity_explorer(model, DATA, sparsity=0.6)
    plain = panel.accuracy()
    panel.recalibrated.value = True
    twin = copy.deepcopy(model)
    pu.prune(twin, sparsity=0.6)
    pu.recalibrate(twin, DATA[0])
    assert panel.accuracy() == pu.accuracy(twin, DATA) and "recal." in next(iter(panel._lines()))
    panel.recalibrated.value = False
    assert panel.accuracy() == plain
    assert sparsity_explorer(network(batch_norm=False), DATA).recalibrated.disabled


def test_an_error_beside_the_panel_is_told_on_it(monkeypatch):
    monkeypatch.setattr(explorer, "_PAUSE", 0.0)
    broken = (DATA[0], DATA[1].clone())
    model = network()

    async def session():
        panel = sparsity_explorer(model, broken, subset=10)
        monkeypatch.setattr(trial, "accuracy", lambda *_: (_ for _ in ()).throw(RuntimeError("out of <memory>")))
        await asyncio.wait_for(panel._task, 30)
        return panel

    panel = asyncio.run(session())
    assert "RuntimeError: out of &lt;memory&gt;" in panel.text.value and "pruned" in panel.text.value


def test_large_networks_are_evaluated_after_the_picture_and_not_before(monkeypatch):
    monkeypatch.setattr(trial, "images_at_a_time", lambda macs: 8)
    monkeypatch.setattr(explorer, "_PAUSE", 0.0)

    async def session():
        panel = sparsity_explorer(network(), DATA)
        seen = [panel.text.value]
        await asyncio.wait_for(panel._task, 30)
        return [*seen, panel.text.value]

    first, last = asyncio.run(session())
    assert "accuracy …" in first and "on all 40 images" in last


def test_many_layers_with_long_names_stay_legible():
    names = [
        f"encoder.stages.{stage}.blocks.{block}.attention.output.dense" for stage in range(5) for block in range(10)
    ]
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(64, 64) for _ in names))
    panel = sparsity_explorer(model, (DATA[0], DATA[1]), sparsity=1.0)
    assert "and 45 more" in panel.text.value and panel.text.value.count("<br>") < 8
    short = pu.plots.panel.shortened(names)
    assert max(map(len, short)) == 34 and len(set(short)) == 50
    apart_in_the_middle = ["a" * 40 + "x" + "b" * 40, "a" * 40 + "y" + "b" * 40]
    assert pu.plots.panel.shortened(apart_in_the_middle) == apart_in_the_middle


# --- What is left behind ---------------------------------------------------------------------------------------------


def living():
    """Widgets, masks and copies of the model that are alive."""
    gc.collect()
    copies = sum(1 for thing in gc.get_objects() if type(thing) is nn.Sequential)
    return len(ipywidgets.widgets.widget._instances), len(MASKS), copies


@pytest.mark.parametrize("ending", ["deleted", "closed", "shown and gone from the page", "shown and closed"])
def test_panels_leave_nothing_behind(ending, monkeypatch):
    model, draw = network(), explorer.png
    sparsity_explorer(model, DATA).close()  # what is made once stays: matplotlib's fonts, scores of torch's warnings
    before, drawn = living(), SparsityExplorer._draw
    for i in range(98 if ending == "deleted" else 10):
        monkeypatch.setattr(explorer, "png", lambda figure, i=i: b"" if i % 10 else draw(figure))
        monkeypatch.setattr(SparsityExplorer, "_draw", lambda self, f, s, i=i: f if i % 10 else drawn(self, f, s))
        panel = sparsity_explorer(model, DATA, sparsity=0.5)
        if i % 10 == 0:
            panel.slider.value = 0.8
            panel.curve((0.3, 0.6))
        if "shown" in ending:
            assert "application/vnd.jupyter.widget-view+json" in panel._repr_mimebundle_()
            panel.box._view_count = 1
        if ending == "shown and gone from the page":
            panel.box._view_count = 0
            assert panel._trial._twin is None
        if "closed" in ending:
            panel.close()
            assert panel.masks is None
    del panel
    assert living() == before


def test_a_panel_that_is_on_the_page_stays_and_one_that_comes_back_goes_on():
    panel = sparsity_explorer(network(), DATA, sparsity=0.5)
    panel._repr_mimebundle_()
    box, reference = panel.box, weakref.ref(panel)
    del panel
    gc.collect()
    assert reference() is not None
    box._view_count = 1
    panel = reference()
    box._view_count = 0
    panel.slider.value = 0.9
    assert panel.masks.sparsity == pytest.approx(0.9, abs=0.01) and "90." in panel.text.value


def test_moves_of_another_thread_take_turns_with_what_is_measured():
    """JupyterLab brings moves on a thread with a loop of its own, while the kernel's main loop fills the curve."""
    model = network()
    model.register_forward_pre_hook(lambda *_: time.sleep(0.003))
    panel, wrong = sparsity_explorer(model, DATA, sparsity=0.5), []
    panel._trial.is_quick = lambda: False
    report = panel._report
    panel._report = lambda error: (wrong.append(error), report(error))

    async def moving(values):
        for value in values:
            panel.slider.value = value
            await asyncio.sleep(0.02)
        if panel._task is not None and panel._task.get_loop() is asyncio.get_running_loop():
            await asyncio.wait_for(panel._task, 60)

    movers = [[0.3 + 0.001 * (2 * i + odd) for i in range(40)] for odd in (0, 1)]
    threads = [threading.Thread(target=asyncio.run, args=[moving(values)]) for values in movers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and "Error" not in panel.text.value
    assert panel.masks.sparsity == pytest.approx(panel.slider.value, abs=0.01)
