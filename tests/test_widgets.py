"""The explorer shows what `prune` would do, to the bit, and leaves the model alone until it is asked to apply."""

import asyncio
import copy
import gc
import html
import io
import threading
import time
import warnings

import ipywidgets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import pruneutils as pu
from pruneutils.widgets import explorer, sparsity_explorer, trial

DATA = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
ALARM = (188, 76, 0)


def network():
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3, groups=2)
    return nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))


def attention():
    """A transformer on the rows of the images; its attention keeps three projections in one weight."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Flatten(1, 2), encoder, nn.Flatten(), nn.Linear(64, 3))


def pruned(panel, **options):
    """What `prune` makes of the panel's choice, on a copy: the masks, and the copy."""
    model, choice = copy.deepcopy(panel.model), panel.choice
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        how = choice.criterion, choice.sparsity, choice.scope, choice.granularity
        return pu.prune(model, *how, data=panel.scoring_data, **options), model


def equal(masks, others):
    return list(masks) == list(others) and all(torch.equal(masks[name], others[name]) for name in masks)


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


@pytest.fixture
def undrawn(monkeypatch):
    for name in ("curve", "layers"):
        monkeypatch.setattr(explorer.Pictures, name, lambda *_: b"")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    made=st.sampled_from([network, attention]),
    levels=st.sampled_from([1, 5, 1000]),
    criterion=st.sampled_from(["magnitude", "snip", "random"]),
    scope=st.sampled_from(["global", "layer", "erk"]),
    granularity=st.sampled_from(["weight", "kernel", "filter"]),
    start=st.sampled_from([0.0, 0.37]),
    exclude=st.sampled_from([(), ["3"]]),
    sparsities=st.lists(st.floats(0.5, 1.0), min_size=1, max_size=4),
)
def test_masks_are_those_of_prune_ties_included(
    undrawn, made, levels, criterion, scope, granularity, start, exclude, sparsities
):
    model = made()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for weight in model.parameters():
            weight.copy_((weight * levels).round() / levels if levels < 1000 else weight)
        if start:
            pu.prune(model, "random", start, scope)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    options = {"criterion": criterion, "scope": scope, "granularity": granularity, "exclude": exclude}
    panel = sparsity_explorer(model, DATA, sparsity=0.5, **options)
    for sparsity in sparsities:
        panel.slider.value = sparsity
        masks, twin = pruned(panel, exclude=exclude)
        assert equal(panel.masks, masks)
        assert all(map(torch.equal, panel._trial.network.state_dict().values(), twin.state_dict().values()))
    assert all(map(torch.equal, model.state_dict().values(), before.values()))  # the model itself stays
    assert modes == [module.training for module in model.modules()] and (start or pu.get_masks(model) == {})
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_move_scores_nothing_anew(undrawn, monkeypatch):
    calls, score = [], trial.scores
    monkeypatch.setattr(trial, "scores", lambda *a, **k: calls.append(a[1]) or score(*a, **k))
    panel = sparsity_explorer(network(), DATA, criterion="snip")
    for sparsity in (0.9, 0.2, 0.7):
        panel.slider.value = sparsity
    panel.scope.value = "layer"
    panel.criterion.value = "magnitude"
    panel.criterion.value = "snip"
    assert calls == ["snip", "magnitude"]


def test_moving_the_slider_redraws_picture_curve_and_numbers():
    panel, seen = sparsity_explorer(network(), DATA), set()
    for sparsity in (0.5, 0.9, 0.95):
        panel.slider.value = sparsity
        _, twin = pruned(panel)
        counted, price = pu.count(twin), pu.cost(twin, DATA[0])
        assert f"<b>{counted.sparsity:.2%} pruned</b>: {counted.kept:,} of {counted.total:,}" in panel.text.value
        assert f"<b>accuracy {pu.accuracy(twin, DATA):.1%}</b> on 40 images" in panel.text.value
        assert f"accumulates {price.sparse_macs:,}</b> of {price.macs:,}" in panel.text.value
        assert pixels(panel.image.value).std() > 10 and pixels(panel.course.value).std() > 10
        seen |= {panel.image.value, panel.course.value}
    assert len(seen) == 6


def test_of_a_language_model_the_panel_shows_perplexity_and_samples_large_layers(monkeypatch):
    monkeypatch.setattr(trial, "_MOST", 50)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32))
    tokens = torch.randint(32, (12, 9))
    panel = sparsity_explorer(model, tokens, criterion="wanda", scope="output", subset=6)
    masks, twin = pruned(panel)
    before, now = (pu.perplexity(net, tokens[::2]) for net in (model, twin))
    assert equal(panel.masks, masks)
    assert f"<b>perplexity {now:.1f}</b> on 6 blocks (before: {before:.1f})" in panel.text.value
    assert panel.curve((0.5,)).perplexity[0] == pytest.approx(now, rel=1e-6)
    assert [row.kept for row in panel._trial.histograms()] == [512, 1024]
    with pytest.raises(ValueError, match="no blocks of tokens"):
        sparsity_explorer(model, DATA[0])


def test_two_of_four_has_no_slider_and_a_model_without_data_no_accuracy():
    panel = sparsity_explorer(attention(), granularity="2:4")
    assert panel.slider.disabled and equal(panel.masks, pruned(panel)[0])
    assert panel.code == 'masks = pu.prune(model, "magnitude", granularity="2:4")'
    panel.granularity.value, panel.slider.value = "weight", 0.9
    assert not panel.slider.disabled and equal(panel.masks, pruned(panel)[0]) and "accuracy" not in panel.text.value
    assert [name for name, _ in panel.criterion.options] == ["random", "magnitude", "lamp"]
    assert panel.recalibrated.disabled and panel.course not in panel.box.children[2].children
    with pytest.raises(TypeError, match="no data"):
        panel.curve()


def test_apply_prunes_the_model_and_the_slider_cannot_go_back():
    model = network()
    panel = sparsity_explorer(model, DATA, sparsity=0.8, scope="layer")
    masks, _ = pruned(panel)
    panel.button.click()
    assert equal(pu.get_masks(model), masks)
    assert panel.slider.min == pytest.approx(pu.count(model).sparsity)
    panel.slider.value = 0.1
    assert panel.slider.value == panel.slider.min
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(DATA[0]).square().sum().backward()
    optimizer.step()
    panel.slider.value = 0.9
    assert equal(panel.masks, pruned(panel)[0])  # training in between is seen
    assert equal(panel.apply(), panel.masks) and pu.count(model).sparsity == pytest.approx(0.9, abs=0.01)


def test_ties_and_collapse_show():
    model = network()
    with torch.no_grad():
        model[0].weight.fill_(1e-3)
    panel = sparsity_explorer(model, DATA, sparsity=0.05)
    assert "36 weights tie at the cut" in panel.text.value
    assert not (pixels(panel.image.value) == ALARM).all(axis=2).any()
    panel.slider.value = 0.2
    assert "tie" not in panel.text.value and "1 of 3 layers have no weight left: 0" in panel.text.value
    for picture in (panel.image, panel.course):  # the layer, and where it begins
        assert (pixels(picture.value) == ALARM).all(axis=2).sum() > 50


def test_what_prune_refuses_shows_in_the_panel():
    model = network()
    pu.prune(model, sparsity={"0": 0.9})
    panel = sparsity_explorer(model, DATA, sparsity=0.8)
    panel.scope.value = "layer"
    assert "pruned already" in panel.text.value and panel.masks is None and panel.button.disabled
    with pytest.raises(ValueError, match="pruned already"):
        panel.apply()
    panel.slider.value = 0.95
    assert equal(panel.masks, pruned(panel)[0]) and not panel.button.disabled


WRONG = {"criterion": "magnitud", "scope": "globl", "granularity": "2:4", "sparsity": 90, "subset": 0, "style": "drk"}


@pytest.mark.parametrize("option", WRONG)
def test_wrong_arguments_raise_at_once(option):
    with pytest.raises(ValueError, match=f"{WRONG[option]}"):
        sparsity_explorer(network(), DATA, **{option: WRONG[option]})


def test_the_curve_is_what_prune_gives_at_each_place():
    model = network()
    panel = sparsity_explorer(model, DATA, sparsity=0.55)
    curve = panel.curve((0.9, 0.2, 0.5))
    assert list(curve["sparsity"]) == [0.2, 0.5, 0.9] and set(curve["method"]) == {"magnitude"}
    for row in curve.itertuples():
        twin = copy.deepcopy(model)
        pu.prune(twin, "magnitude", row.sparsity)
        assert row.accuracy == pu.accuracy(twin, DATA)
    assert equal(panel.masks, pruned(panel)[0])
    panel.scope.value = "layer"
    assert set(panel.curve((0.2,))["method"]) == {"magnitude, layer"}
    assert len(panel.curve((0.2, 0.9))) == 2 and len(panel._trial.reached) == 1 + 4 + 3  # the earlier ones stay


def mine(model, data):
    return {name: -weight.abs() for name, weight in pu.prunable_weights(model).items()}


CHOICES = {
    "magnitude": {"sparsity": 0.7},
    "snip": {"criterion": "snip", "scope": "layer", "sparsity": 0.319, "exclude": ["0"], "seed": 3},
    "random": {"criterion": "random", "granularity": "kernel", "scope": "erk", "seed": 3},
    "own": {"criterion": mine, "granularity": pu.Block(2, 1)},
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_code_shown_gives_the_masks_shown(name):
    panel = sparsity_explorer(network(), DATA, **CHOICES[name])
    for recalibrated in (True, False):
        panel.recalibrated.value = recalibrated
        names = {"pu": pu, "mine": mine, "model": copy.deepcopy(panel.model), "batch": panel.scoring_data}
        exec(panel.code, names)
        assert equal(names["masks"], panel.masks) and ("recalibrate" in panel.code) == recalibrated
        assert f"accuracy {pu.accuracy(names['model'], DATA):.1%}" in panel.text.value
    assert html.escape(panel.code) in panel._code.value and "<button" in panel._code.value


def test_the_curve_fills_in_by_itself_and_large_networks_are_evaluated_after_the_picture(monkeypatch):
    async def session(work):
        monkeypatch.setattr(trial, "_WORK", work)
        panel = sparsity_explorer(network(), DATA)
        panel.slider.value = 0.7
        panel.slider.value = 0.8
        seen = panel.text.value
        await asyncio.wait_for(panel._task, 60)
        return panel, seen

    for work in (2_000_000_000, 1):
        panel, seen = asyncio.run(session(work))
        assert ("accuracy" in seen) == (work > 1) and "accuracy" in panel.text.value
        measured = {choice.sparsity for choice in panel._trial.reached if choice}
        assert measured >= {*explorer._PLACES, 0.8} and equal(panel.masks, pruned(panel)[0])


def living():
    """Widgets and copies of the model that are alive."""
    gc.collect()
    copies = sum(1 for thing in gc.get_objects() if type(thing) is nn.Sequential)
    return len(ipywidgets.widgets.widget._instances), copies


@pytest.mark.parametrize("ending", ["deleted", "closed", "shown and gone from the page", "shown and closed"])
def test_panels_leave_nothing_behind(undrawn, ending):
    model = network()
    sparsity_explorer(model, DATA).close()  # what is made once stays
    before = living()
    for _ in range(52 if ending == "deleted" else 6):
        panel = sparsity_explorer(model, DATA, sparsity=0.5)
        panel.slider.value = 0.8
        if "shown" in ending:
            assert "application/vnd.jupyter.widget-view+json" in panel._repr_mimebundle_()
            panel.box._view_count = 1
        if ending == "shown and gone from the page":
            panel.box._view_count = 0
            assert panel._trial.network is None
            panel.slider.value = 0.9  # from code it goes on
            assert panel._trial.network is not None and panel.masks.sparsity == pytest.approx(0.9, abs=0.01)
        if "closed" in ending:
            panel.close()
    del panel
    assert living() == before


def test_moves_of_another_thread_take_turns_with_what_is_measured(monkeypatch):
    """JupyterLab brings moves on a thread with a loop of its own, while the kernel's main loop fills the curve."""
    monkeypatch.setattr(trial, "_WORK", 1)
    model = network()
    model.register_forward_pre_hook(lambda *_: time.sleep(0.003))
    panel, wrong = sparsity_explorer(model, DATA, sparsity=0.5), []
    write = panel._write
    panel._write = lambda error=None: (wrong.append(error) if error else None, write(error))

    async def moving(values):
        for value in values:
            panel.slider.value = value
            await asyncio.sleep(0.02)
        if panel._task is not None and panel._task.get_loop() is asyncio.get_running_loop():
            await asyncio.wait_for(panel._task, 60)

    movers = [[0.3 + 0.001 * (2 * i + odd) for i in range(12)] for odd in (0, 1)]
    threads = [threading.Thread(target=asyncio.run, args=[moving(values)]) for values in movers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and "Error" not in panel.text.value
    assert panel.masks.sparsity == pytest.approx(panel.slider.value, abs=0.01)
