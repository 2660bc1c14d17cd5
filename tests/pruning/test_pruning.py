"""prune() is exact, cumulative, and changes nothing when it refuses."""

import copy
import itertools
import math
import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pruneutils as pu
from pruneutils.pruning import LayerCollapseWarning, granularities, schedules, scopes
from pruneutils.pruning.schedules import sparsity_at

BATCH = torch.ones(2, 10), torch.zeros(2, dtype=torch.long)
quiet = pytest.mark.filterwarnings("ignore")


def mlp(*widths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:])]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
            layer.bias.zero_()
    return nn.Sequential(*layers)


def random_model(draw):
    """A few layers of any kind, with ties and zeros among the weights; only counted, never run."""
    layers = []
    for _ in range(draw.randint(1, 5)):
        kind = draw.choice([nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d])
        inputs, outputs = 2 * draw.randint(1, 6), 2 * draw.randint(1, 6)
        options = {} if kind is nn.Linear else dict(kernel_size=draw.choice([1, 2, 3]), groups=draw.choice([1, 2]))
        layers.append(kind(inputs, outputs, **options))
    generator = torch.Generator().manual_seed(draw.randint(0, 10**6))
    with torch.no_grad():
        for layer in layers:
            w = torch.randn(layer.weight.shape, generator=generator)
            layer.weight.copy_(draw.choice([w, (w * 2).round() / 2, w * (w > 0.8), w * 0 + 0.5]))
    return nn.Sequential(*layers)


def kept_by_output(layer, mask):
    """How many weights each output unit keeps, and how many it has."""
    if isinstance(layer, nn.ConvTranspose2d):  # (in, out / groups, height, width)
        mask = mask.unflatten(0, (layer.groups, -1)).movedim(1, 2).flatten(0, 1)
    return mask.flatten(1).sum(1), mask[0].numel()


def snapshot(model):
    return copy.deepcopy(model.state_dict()), pu.get_masks(model)


def assert_unchanged(model, before):
    state, masks = before
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    now = pu.get_masks(model)
    assert list(now) == list(masks) and all(torch.equal(masks[name], now[name]) for name in masks)


# --- Exact -----------------------------------------------------------------------------------------------------------


@quiet
@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_counts_are_exact_for_random_models_in_every_scope(seed):
    draw = random.Random(seed)
    model = random_model(draw)
    weights = pu.prunable_weights(model)
    sizes = {name: w.numel() for name, w in weights.items()}
    total, fraction = sum(sizes.values()), draw.choice([0, 1, 0.5, 0.9, 0.999, draw.random()])
    for scope in ("global", "layer", "erk", "output"):
        each = copy.deepcopy(model)
        criterion, iterations = draw.choice(["magnitude", "random"]), draw.choice([1, 1, 3])
        masks = pu.prune(each, criterion, fraction, scope, iterations=iterations)
        table = pu.layer_table(each)
        if scope == "layer":
            assert (table.total - table.kept).tolist() == [round(fraction * n) for n in sizes.values()]
        elif scope == "output":
            for layer, mask in zip(each, masks.values()):
                kept, n = kept_by_output(layer, mask)
                assert (n - kept == round(fraction * n)).all()
        else:
            assert masks.total - masks.kept == round(fraction * total)
        assert pu.get_masks(each).keys() == masks.keys() == sizes.keys()
        again = pu.prune(each, "random", fraction, scope)
        assert all(torch.equal(again[name], mask) for name, mask in masks.items())
        for name, w in pu.prunable_weights(each).items():
            assert torch.equal(w, weights[name] * masks[name])


@quiet
@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_tiles_come_as_near_to_the_count_as_whole_ones_allow(seed):
    draw = random.Random(seed)
    model, fraction = random_model(draw), draw.random()
    transposed = any(isinstance(layer, nn.ConvTranspose2d) for layer in model)
    weights, total = pu.prunable_weights(model), pu.count(model).total
    for granularity in ("kernel", "filter", pu.Block(draw.randint(1, 5), draw.randint(1, 5))):
        if transposed and granularity != "kernel":
            continue
        each = copy.deepcopy(model)
        masks = pu.prune(each, "magnitude", fraction, granularity=granularity)
        tiles = {name: granularities.find(granularity).tile(tuple(w.shape)) for name, w in weights.items()}
        largest = max(math.prod(map(min, tile, weights[name].shape)) for name, tile in tiles.items())
        assert abs(masks.total - masks.kept - round(fraction * total)) <= largest / 2
        again = pu.prune(each, "magnitude", fraction, granularity=granularity)
        for name, mask in masks.items():
            assert torch.equal(again[name], mask)
            for corner in itertools.product(*(range(0, n, t) for n, t in zip(mask.shape, tiles[name]))):
                tile = mask[tuple(slice(start, start + span) for start, span in zip(corner, tiles[name]))]
                assert tile.all() or not tile.any()


def test_n_of_m_prunes_exactly_and_names_layers_that_do_not_fit():
    model = nn.Sequential(nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(12, 5))
    masks = pu.prune(model, "magnitude", granularity="2:4")
    assert pu.count(model).sparsity == 0.5
    assert (masks["0.weight"].view(4, 2, 4, 3, 3).sum(2) == 2).all()
    assert (masks["2.weight"].view(5, 3, 4).sum(2) == 2).all()
    again = pu.prune(model, "magnitude", granularity="2:4")
    assert all(torch.equal(again[name], mask) for name, mask in masks.items())
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match=r"2:4 needs inputs in multiples of 4; exclude 0.weight \(3 inputs\)"):
        pu.prune(model, "magnitude", granularity="2:4")
    with pytest.raises(ValueError, match="2:4 makes the sparsity 0.5, not 0.7"):
        pu.prune(model, "magnitude", 0.7, granularity="2:4", exclude=["0"])
    assert pu.prune(model, "magnitude", granularity="1:4", exclude=["0"]).kept == 36


def test_per_layer_fractions_by_name_and_glob_the_first_that_fits():
    model = mlp(10, 10, 10, 10)
    with pytest.warns(LayerCollapseWarning):
        masks = pu.prune(model, "magnitude", {"0": 0.25, "1.weight": 1, "*": 0.5}, exclude=["2"])
    assert list(masks) == ["0.weight", "1.weight"]
    assert pu.layer_table(model).kept.tolist() == [75, 0, 100]
    pu.prune(model, "random", {"[02]": 0.5})
    assert pu.layer_table(model).kept.tolist() == [50, 0, 50]


def test_outputs_lose_their_own_lowest_and_no_more_than_was_asked_for():
    model = nn.Sequential(nn.Linear(10, 4), nn.MultiheadAttention(6, 2))
    lowest = model[0].weight.abs().argsort(1)[:, :3]
    masks = pu.prune(model, "magnitude", {"0": 0.3, "*": 0.5}, "output")
    assert not masks["0.weight"].gather(1, lowest).any() and (masks["0.weight"].sum(1) == 7).all()
    assert (masks["1.in_proj_weight"].sum(1) == 3).all()
    nn.init.constant_(model[0].weight, 0.1)
    with pytest.warns(pu.TiedScoresWarning, match="24 weights tie"):  # in the last of the three steps
        masks = pu.prune(model, "magnitude", 0.5, "output", iterations=3, exclude="1*")
    assert (masks["0.weight"].sum(1) == 5).all()
    model = mlp(10, 10)
    pu.prune(model, "magnitude", 0.5)
    with pytest.raises(ValueError, match=r"output \d of 0: \d weights are pruned already, more than the 5 asked for"):
        pu.prune(model, "magnitude", 0.5, "output")


def test_erk_is_exact_in_all_and_in_proportion_per_layer():
    draw = random.Random(0)
    for _ in range(1000):
        weights = {str(i): torch.empty(draw.randint(1, 30), draw.randint(1, 30)) for i in range(draw.randint(1, 5))}
        sparsity, total = draw.choice([draw.random(), 0.05]), sum(w.numel() for w in weights.values())
        groups = scopes.competitions(weights, sparsity, "erk")
        assert sum(k for _, k in groups) == round(sparsity * total)
        assert all(0 <= k <= weights[name].numel() for (name,), k in groups), (weights, sparsity, groups)
    trailing = {"a": torch.empty(11, 10), "b": torch.empty(20, 29), "c": torch.empty(1, 16)}
    assert [k for _, k in scopes.competitions(trailing, 0.25, "erk")] == [0, 176, 0]  # c is dense, and last
    shapes = {"a": (64, 3, 3, 3), "b": (64, 64, 3, 3), "c": (128, 64, 1, 1), "d": (10, 128)}
    density = {n: 1 - s for n, s in scopes.erk_sparsities({n: torch.empty(s) for n, s in shapes.items()}, 0.85).items()}
    assert density["d"] == 1 > density["a"]
    ratio = (64 + 64 + 3 + 3) / (64 * 64 * 9) / ((128 + 64 + 1 + 1) / (128 * 64))
    assert density["b"] / density["c"] == pytest.approx(ratio)
    sizes = {"a": 1728, "b": 36864, "c": 8192, "d": 1280}
    assert sum(density[name] * n for name, n in sizes.items()) == pytest.approx(0.15 * sum(sizes.values()))


# --- Cumulative ------------------------------------------------------------------------------------------------------


def weights(model):
    return pu.prunable_weights(model).items()


@quiet
@pytest.mark.parametrize("schedule", sorted(schedules.SCHEDULES))
@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_iterations_never_revive_a_weight_and_follow_the_schedule(schedule, granularity):
    model, seen = mlp(20, 20, 20), []

    def reversing(model, data):
        """Turns its opinion round at every call."""
        assert len(list(data)) == 2
        seen.append({name: w.detach() != 0 for name, w in weights(model)})
        return {name: w.abs() * (-1) ** len(seen) for name, w in weights(model)}

    data = iter([BATCH, BATCH])  # an iterator serves every iteration
    masks = pu.prune(model, reversing, 0.9, data=data, iterations=6, schedule=schedule, granularity=granularity)
    assert masks.kept == 80 and len(seen) == 6
    seen.append(masks)
    for before, after in zip(seen, seen[1:]):
        assert not any((after[name] & ~before[name]).any() for name in masks)
    reached = [sum(int((~m).sum()) for m in step.values()) for step in seen]
    wanted = [round(800 * sparsity_at(i / 6, 0.9, 0.0, schedule)) for i in range(7)]
    assert all(abs(a - b) <= (0 if granularity == "weight" else 10) for a, b in zip(reached, wanted))


def test_schedules_in_closed_form():
    assert sparsity_at(0.5, 0.99) == pytest.approx(0.9)
    assert sparsity_at(0.5, 0.96, 0.36) == pytest.approx(1 - (0.64 * 0.04) ** 0.5)
    assert sparsity_at(0.25, 0.8, 0.4, "linear") == pytest.approx(0.5)
    assert sparsity_at(0.5, 0.8, 0.0, "cubic") == pytest.approx(0.7)
    for schedule in sorted(schedules.SCHEDULES):
        assert sparsity_at(0, 0.8, 0.2, schedule) == pytest.approx(0.2)
        assert sparsity_at(1, 0.8, 0.2, schedule) == pytest.approx(0.8)


def test_less_than_is_pruned_already_is_an_error_with_layer_and_numbers():
    model = mlp(10, 10, 10)
    pu.prune(model, "magnitude", {"1": 0.5})
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"the 2 layers together: 50 of 200 .*than the 20 asked for \(0.1000"):
        pu.prune(model, "magnitude", 0.1)
    with pytest.raises(ValueError, match="^1: 50 of 100 weights are pruned already"):
        pu.prune(model, "magnitude", 0.4, "layer")
    assert_unchanged(model, before)
    assert pu.prune(model, "magnitude", 0.25).kept == 150


def test_blocks_are_ranked_by_their_mean_also_at_the_edge():
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1, 4], [1, 1, 4], [2.5, 2.5, 9]]))
    masks = pu.prune(copy.deepcopy(model), sparsity=6 / 9, granularity=pu.Block(2, 2))
    assert masks["0.weight"].tolist() == [[False, False, True], [False, False, True], [False, False, True]]
    masks = pu.prune(model, sparsity=3 / 9, granularity=pu.Block(2, 2), normalize=False)  # sums: 4, 8, 5 and 9
    assert masks["0.weight"].sum() == 5  # four or two weights can go, and 4 is as near to 3: fewer are taken first
    for sizes in ((0, 4), (4, 2.5), ("4", 4)):
        with pytest.raises(ValueError, match="whole numbers of at least 1"):
            pu.Block(*sizes)


def nan_scores(model, data):
    return {name: w / 0 for name, w in weights(model)}


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(sparsity=1.1), ValueError, "not 1.1"),
        (dict(sparsity={}), ValueError, "empty mapping"),
        (dict(scope=lambda w, s: [(["nope"], 1)]), ValueError, "scope '<lambda>' names nope"),
        (dict(scope=lambda w, s: [(["0.weight"], 101)]), ValueError, "asks for 101 of all weights of 0.weight"),
        (dict(scope="output", granularity="kernel"), ValueError, "scope 'output' is for single weights"),
        (dict(granularity="filtr"), ValueError, "unknown granularity 'filtr'; did you mean 'filter'"),
        (dict(granularity=4), TypeError, r"a name or an object such as pu.Block\(4, 4\), not 4"),
        (dict(iterations=2, granularity="2:5", sparsity=None), ValueError, "iterations=2 goes neither"),
        (dict(drop_probability=2), ValueError, "drop_probability must be a fraction"),
        (dict(criterion=nan_scores), ValueError, "'nan_scores': 0.weight has 100 of 100 scores that are NaN"),
        (dict(criterion=lambda m, d: {}), ValueError, "gives no scores for 0.weight"),
        (dict(criterion=lambda m, d: {n: w[:1] for n, w in weights(m)}), ValueError, r"0.weight has shape \(10, 10\)"),
    ],
)
def test_errors_say_what_and_where_and_change_nothing(arguments, error, message):
    model = mlp(10, 10, 10)
    pu.prune(model, "magnitude", 0.2)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        pu.prune(model, **dict(criterion="magnitude", sparsity=0.5) | arguments)
    assert_unchanged(model, before)


def test_an_error_in_a_later_iteration_changes_nothing():
    model = mlp(10, 10, 10)
    pu.prune(model, "magnitude", 0.2)
    before = snapshot(model)

    def failing(model, data):
        if not model[0].weight.count_nonzero() == before[0]["0.weight"].count_nonzero():
            raise KeyboardInterrupt
        return {name: w.abs() for name, w in weights(model)}

    with pytest.raises(KeyboardInterrupt):
        pu.prune(model, failing, 0.9, iterations=5)
    assert_unchanged(model, before)


def test_ties_and_empty_layers_are_reported_at_the_callers_line():
    model = mlp(10, 10, 10)
    model[0].weight.data[:5] = 0
    model[1].weight.data[:3] = 0
    with pytest.warns(pu.TiedScoresWarning, match="80 weights tie .*'magnitude' .*0: 50, 1: 30") as caught:
        pu.prune(model, "magnitude", 0.3)
    assert caught[0].filename == __file__ and pu.layer_table(model).kept.tolist() == [50, 90]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pu.prune(model, "magnitude", 0.3)  # nothing left to do, so nothing ties
        nn.init.ones_((model := mlp(10, 10))[0].weight)
        before = snapshot(model)
        with pytest.raises(pu.TiedScoresWarning):  # warnings are errors here, and come before anything is changed
            pu.prune(model, "magnitude", 0.5, iterations=2)
    assert_unchanged(model, before)
    model = mlp(10, 10, 10)
    model[1].weight.data *= 1e-3
    with pytest.warns(LayerCollapseWarning, match="1 of 2 layers have no weight left: 1") as caught:
        pu.prune(model, "magnitude", 0.6)
    with pytest.warns(LayerCollapseWarning, match="2 of 2 layers") as again:
        pu.prune_threshold(model, 100.0)
    assert caught[0].filename == again[0].filename == __file__


def test_the_global_random_state_is_left_alone(monkeypatch):
    def never(seed):
        raise AssertionError("this reseeds every GPU")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", never)
    model = mlp(10, 10)
    state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*BATCH), 1)
    for options in (dict(criterion="random"), dict(criterion="snip", data=loader, drop_probability=0.5)):
        masks = [pu.prune(copy.deepcopy(model), sparsity=0.5, seed=seed, **options)["0.weight"] for seed in (1, 1, 2)]
        assert torch.equal(state, torch.get_rng_state()), options
        assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert (numpy_state == np.random.get_state()[1]).all() and python_state == random.getstate()


def test_each_weight_that_would_go_is_dropped_with_the_given_probability():
    # the model is drawn from the same seed: what drops must not depend on it
    model = mlp(200, 200, 200)
    dense = pu.prune(copy.deepcopy(model), "magnitude", 0.5)
    masks = pu.prune(model, "magnitude", 0.5, drop_probability=0.3)
    dropped = sum(int((~m).sum()) for m in masks.values())
    assert abs(dropped - 12_000) < 5 * (40_000 * 0.3 * 0.7) ** 0.5
    assert not any((~masks[name] & dense[name]).any() for name in masks)
    again = pu.prune(model, "magnitude", 0.8, drop_probability=0.5, seed=1)
    assert not any((again[name] & ~masks[name]).any() for name in masks)
    rows = pu.prune(mlp(50, 400), "magnitude", 0.5, granularity="filter", drop_probability=0.5)["0.weight"]
    assert (rows.all(1) | ~rows.any(1)).all() and 70 < int((~rows.any(1)).sum()) < 130


def test_a_threshold_takes_what_is_below_it_and_not_what_equals_it():
    model = nn.Linear(4, 1)
    model.weight.data = torch.tensor([[0.25, -0.5, 0.75, -1.0]])
    assert pu.prune_threshold(model, 0.5)["weight"].tolist() == [[False, True, True, True]]
    assert pu.prune_threshold(model, 0.1).kept == 3  # what is pruned stays pruned
    assert pu.prune_threshold(model, 0.75, restorable=True)["weight"].tolist() == [[False, False, True, True]]
    assert pu.restore(model).weight.tolist() == [[0.0, -0.5, 0.75, -1.0]]
    conv = nn.Conv2d(1, 2, 2, bias=False)
    conv.weight.data = torch.tensor([1.0, 1, 1, 1, 2, 2, 2, 2]).view(2, 1, 2, 2)
    assert pu.prune_threshold(copy.deepcopy(conv), 1.5, granularity="filter").kept == 4  # means
    assert pu.prune_threshold(conv, 1.5, granularity="kernel", normalize=False).kept == 8  # sums
    before = snapshot(model)
    for options, message in (
        (dict(threshold=float("nan")), "threshold must be a number, not nan"),
        (dict(threshold=0.1, granularity="2:4"), "2:4 knows no threshold"),
        (dict(threshold=0.1, criterion=nan_scores), "NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            pu.prune_threshold(model, **options)
    assert_unchanged(model, before)
