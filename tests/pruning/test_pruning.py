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
from pruneutils import pruning
from pruneutils.pruning import criteria, granularities, schedules, scopes

quiet = pytest.mark.filterwarnings(
    "ignore::pruneutils.pruning.TiedScoresWarning", "ignore::pruneutils.pruning.LayerCollapseWarning"
)


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
        kind, groups = (
            draw.choice([nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d]),
            draw.choice([1, 2]),
        )
        inputs, outputs = 2 * draw.randint(1, 6), 2 * draw.randint(1, 6)
        layers += [
            kind(inputs, outputs)
            if kind is nn.Linear
            else kind(inputs, outputs, draw.choice([1, 2, 3]), groups=groups, bias=draw.random() < 0.5)
        ]
    generator = torch.Generator().manual_seed(draw.randint(0, 10**6))
    with torch.no_grad():
        for layer in layers:
            w = torch.randn(layer.weight.shape, generator=generator)
            how = draw.choice(["normal", "ties", "zeros", "constant"])
            w = {"normal": w, "ties": (w * 2).round() / 2, "zeros": w * (w > 0.8), "constant": w * 0 + 0.5}[how]
            layer.weight.copy_(w)
    return nn.Sequential(*layers)


def zeros(model):
    return sum(int((~mask).sum()) for mask in pu.get_masks(model).values())


def snapshot(model):
    return copy.deepcopy(model.state_dict()), pu.get_masks(model)


def assert_unchanged(model, before):
    state, masks = before
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    now = pu.get_masks(model)
    assert list(now) == list(masks) and all(torch.equal(masks[name], now[name]) for name in masks)


# --- Exact -----------------------------------------------------------------------------------------------------------


@quiet
@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_counts_are_exact_for_random_models_in_every_scope(seed):
    draw = random.Random(seed)
    model = random_model(draw)
    weights = pu.prunable_weights(model)
    sizes = {name: w.numel() for name, w in weights.items()}
    total, fraction = sum(sizes.values()), draw.choice([0, 1, 0.5, 0.9, 0.999, draw.random()])
    for scope in ("global", "layer", "erk"):
        each = copy.deepcopy(model)
        criterion, iterations = draw.choice(["magnitude", "random"]), draw.choice([1, 1, 3])
        masks = pu.prune(each, criterion, fraction, scope, iterations=iterations)
        table = pu.layer_table(each)
        if scope == "layer":
            assert (table.total - table.kept).tolist() == [round(fraction * n) for n in sizes.values()]
        else:
            assert zeros(each) == round(fraction * total)
        assert pu.get_masks(each).keys() == masks.keys() == sizes.keys()
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
        assert abs(zeros(each) - round(fraction * total)) <= largest / 2
        for name, mask in masks.items():
            for corner in itertools.product(*(range(0, n, t) for n, t in zip(mask.shape, tiles[name]))):
                tile = mask[tuple(slice(start, start + span) for start, span in zip(corner, tiles[name]))]
                assert tile.all() or not tile.any()


@pytest.mark.parametrize("granularity", ["filter", "1:2"])
def test_transposed_convolutions_are_refused_where_inputs_and_outputs_would_be_mixed_up(granularity):
    model = nn.Sequential(nn.ConvTranspose2d(2, 6, 3))
    with pytest.raises(ValueError, match="transposed.*0.weight"):
        pu.prune(model, "magnitude", None if granularity == "1:2" else 0.5, granularity=granularity)
    assert pu.get_masks(model) == {}


def test_n_of_m_prunes_exactly_and_names_layers_that_do_not_fit():
    model = nn.Sequential(nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(12, 5))
    masks = pu.prune(model, "magnitude", granularity="2:4")
    assert pu.count(model).sparsity == 0.5
    assert (masks["0.weight"].view(4, 2, 4, 3, 3).sum(2) == 2).all() and (
        masks["2.weight"].view(5, 3, 4).sum(2) == 2
    ).all()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match=r"2:4 needs inputs in multiples of 4; exclude 0.weight \(3 inputs\)"):
        pu.prune(model, "magnitude", granularity="2:4")
    with pytest.raises(ValueError, match="2:4 makes the sparsity 0.5, not 0.7"):
        pu.prune(model, "magnitude", 0.7, granularity="2:4", exclude=["0"])
    assert pu.prune(model, "magnitude", granularity="1:4", exclude=["0"]).kept == 36


def test_per_layer_fractions_by_name_and_glob_the_first_that_fits():
    model = mlp(10, 10, 10, 10)
    with pytest.warns(pu.LayerCollapseWarning):
        masks = pu.prune(model, "magnitude", {"0": 0.25, "1.weight": 1, "*": 0.5}, exclude=["2"])
    assert list(masks) == ["0.weight", "1.weight"]
    assert pu.layer_table(model).kept.tolist() == [75, 0, 100]
    pu.prune(model, "random", {"[02]": 0.5})
    assert pu.layer_table(model).kept.tolist() == [50, 0, 50]


def test_excluded_layers_count_for_nothing():
    model = mlp(10, 20, 10)
    pu.prune(model, "magnitude", 0.5, exclude="1")
    assert pu.layer_table(model).kept.tolist() == [100, 200] and list(pu.get_masks(model)) == ["0.weight"]


def test_erk_is_exact_in_all_and_in_proportion_per_layer():
    draw = random.Random(0)
    for _ in range(3000):
        weights = {str(i): torch.empty(draw.randint(1, 30), draw.randint(1, 30)) for i in range(draw.randint(1, 5))}
        sparsity, total = (
            draw.choice([draw.random(), draw.randint(0, 20) / 20]),
            sum(w.numel() for w in weights.values()),
        )
        groups = pruning.competitions(weights, sparsity, "erk")
        assert sum(k for _, k in groups) == round(sparsity * total)
        assert all(0 <= k <= weights[name].numel() for (name,), k in groups), (weights, sparsity, groups)
    trailing = {"a": torch.empty(11, 10), "b": torch.empty(20, 29), "c": torch.empty(1, 16)}
    assert [k for _, k in pruning.competitions(trailing, 0.25, "erk")] == [0, 176, 0]  # c is dense, and last
    shapes = {"a": (64, 3, 3, 3), "b": (64, 64, 3, 3), "c": (128, 64, 1, 1), "d": (10, 128)}
    density = {name: 1 - s for name, s in pu.erk_sparsities(shapes, 0.85).items()}
    assert density["d"] == 1 > density["a"]
    ratio = (64 + 64 + 3 + 3) / (64 * 64 * 9) / ((128 + 64 + 1 + 1) / (128 * 64))
    assert density["b"] / density["c"] == pytest.approx(ratio)
    sizes = {"a": 1728, "b": 36864, "c": 8192, "d": 1280}
    assert sum(density[name] * n for name, n in sizes.items()) == pytest.approx(0.15 * sum(sizes.values()))


def test_all_and_nothing():
    model = mlp(4, 4)
    assert pu.prune(model, "magnitude", 0).kept == 16
    with pytest.warns(pu.LayerCollapseWarning):
        assert pu.prune(model, "magnitude", 1).kept == 0


# --- Cumulative ------------------------------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("granularity", ["weight", "kernel", "filter", "2:4"])
@pytest.mark.parametrize("scope", sorted(scopes.SCOPES))
def test_pruning_to_the_same_sparsity_twice_changes_nothing(scope, granularity):
    draw = random.Random(2)
    for _ in range(10):
        fraction = 0.5 if granularity == "2:4" else draw.random()
        model = nn.Sequential(nn.Conv2d(4, 5, 3), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(8, 3))
        first = pu.prune(model, "magnitude", fraction, scope, granularity)
        second = pu.prune(model, "random" if granularity == "weight" else "magnitude", fraction, scope, granularity)
        assert all(torch.equal(first[name], second[name]) for name in first)


@quiet
def test_what_is_pruned_stays_pruned():
    model, before = mlp(20, 20, 20), None
    for i, criterion in enumerate(["random", "magnitude", "random", lambda m, _: {n: -w.abs() for n, w in weights(m)}]):
        masks = pu.prune(model, criterion, 0.2 + i * 0.2, seed=i)
        assert masks.kept == round(800 * (0.8 - i * 0.2))
        assert before is None or not any((masks[name] & ~before[name]).any() for name in masks)
        before = masks


def weights(model):
    return pu.prunable_weights(model).items()


@quiet
@pytest.mark.parametrize("schedule", sorted(schedules.SCHEDULES))
@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_iterations_never_revive_a_weight_and_follow_the_schedule(schedule, granularity):
    model, seen = mlp(20, 20, 20), []

    def reversing(model, data):
        """Turns its opinion round at every call."""
        seen.append({name: w.detach() != 0 for name, w in weights(model)})
        return {name: w.abs() * (-1) ** len(seen) for name, w in weights(model)}

    masks = pu.prune(model, reversing, 0.9, iterations=6, schedule=schedule, granularity=granularity)
    assert masks.kept == 80 and len(seen) == 6
    seen.append(masks)
    for before, after in zip(seen, seen[1:]):
        assert not any((after[name] & ~before[name]).any() for name in masks)
    reached = [sum(int((~m).sum()) for m in step.values()) for step in seen]
    wanted = [round(800 * pu.sparsity_at(i / 6, 0.9, 0.0, schedule)) for i in range(7)]
    assert all(abs(a - b) <= (0 if granularity == "weight" else 10) for a, b in zip(reached, wanted))


def test_schedules_in_closed_form():
    assert pu.sparsity_at(0.5, 0.99) == pytest.approx(0.9)
    assert pu.sparsity_at(0.5, 0.96, 0.36) == pytest.approx(1 - (0.64 * 0.04) ** 0.5)
    assert pu.sparsity_at(0.25, 0.8, 0.4, "linear") == pytest.approx(0.5)
    assert pu.sparsity_at(0.5, 0.8, 0.0, "cubic") == pytest.approx(0.7)
    assert pu.sparsity_at(0.5, 0.8, 0.2, lambda t, start, target: start + t * (target - start)) == pytest.approx(0.5)
    for schedule in sorted(schedules.SCHEDULES):
        assert pu.sparsity_at(0, 0.8, 0.2, schedule) == pytest.approx(0.2)
        assert pu.sparsity_at(1, 0.8, 0.2, schedule) == pytest.approx(0.8)
    with pytest.raises(ValueError, match="did you mean 'linear'"):
        pu.sparsity_at(0.5, 0.8, schedule="liner")


def test_less_than_is_pruned_already_is_an_error_with_layer_and_numbers():
    model = mlp(10, 10, 10)
    pu.prune(model, "magnitude", {"1": 0.5})
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"the 2 layers together: 50 of 200 .*0.2500.* than the 20 asked for \(0.1000"):
        pu.prune(model, "magnitude", 0.1)
    with pytest.raises(ValueError, match="^1: 50 of 100 weights are pruned already"):
        pu.prune(model, "magnitude", 0.4, "layer")
    assert_unchanged(model, before)
    assert pu.prune(model, "magnitude", 0.25).kept == 150


# --- Choices of one's own --------------------------------------------------------------------------------------------


def test_a_magnitude_registered_anew_is_used_for_single_weights_too(monkeypatch):
    monkeypatch.setattr(criteria, "_CRITERIA", dict(criteria._CRITERIA))

    @pu.criterion
    def magnitude(model):
        return {name: -w.abs() for name, w in pu.prunable_weights(model).items()}

    model = mlp(10, 10)
    largest = model[0].weight.abs() > model[0].weight.abs().median()
    assert torch.equal(pu.prune(model, "magnitude", 0.5)["0.weight"], ~largest)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda weights, sparsity: [(["nope"], 1)], "names 'nope'"),
        (lambda weights, sparsity: [(["0.weight"], 1), (["0.weight"], 1)], "twice"),
        (lambda weights, sparsity: [(["0.weight"], 101)], "asks for 101 of the 100 weights of 0.weight"),
        (lambda weights, sparsity: [(["0.weight"], 2.5)], "asks for 2.5"),
    ],
)
def test_a_scope_that_asks_for_the_impossible_is_named(wrong, message):
    model = mlp(10, 10)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"scope '<lambda>'.*{message}"):
        pu.prune(model, "magnitude", 0.5, scope=wrong)
    assert_unchanged(model, before)


def test_a_scope_leaves_alone_what_it_does_not_name():
    model = mlp(10, 10, 10)
    pu.prune(model, "magnitude", 0.5, scope=lambda weights, sparsity: [(["1.weight"], 50)])
    assert pu.layer_table(model).kept.tolist() == [100, 50]


def test_blocks_are_ranked_by_their_mean_also_at_the_edge():
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1, 4], [1, 1, 4], [2.5, 2.5, 9]]))
    masks = pu.prune(copy.deepcopy(model), sparsity=6 / 9, granularity=pu.Block(2, 2))
    assert masks["0.weight"].tolist() == [[False, False, True], [False, False, True], [False, False, True]]
    masks = pu.prune(model, sparsity=3 / 9, granularity=pu.Block(2, 2), normalize=False)  # sums: 4, 8, 5 and 9
    assert masks["0.weight"].sum() == 5  # four or two weights can go, and 4 is as near to 3: fewer are taken first


@pytest.mark.parametrize("sizes", [(0, 4), (4, 2.5), (-1, 1), ("4", 4)])
def test_a_block_spans_whole_numbers(sizes):
    with pytest.raises(ValueError, match="whole numbers of at least 1"):
        pu.Block(*sizes)


def test_what_is_no_granularity_is_told():
    with pytest.raises(TypeError, match=r"a name or an object such as pu.Block\(4, 4\), not 4"):
        pu.prune(mlp(10, 10), sparsity=0.5, granularity=4)


# --- Errors before anything is changed -------------------------------------------------------------------------------

BATCH = torch.ones(2, 10), torch.zeros(2, dtype=torch.long)


def nan_scores(model, data):
    return {name: w / 0 for name, w in weights(model)}


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(sparsity=True), ValueError, r"sparsity must be a fraction in \[0, 1\], not True"),
        (dict(sparsity=float("nan")), ValueError, "not nan"),
        (dict(sparsity=1.1), ValueError, "not 1.1"),
        (dict(sparsity=-0.1), ValueError, "not -0.1"),
        (dict(sparsity="0.5"), ValueError, "not '0.5'"),
        (dict(sparsity=None), ValueError, "not None"),
        (dict(sparsity={}), ValueError, "empty mapping"),
        (dict(sparsity={"0": 50}), ValueError, "sparsity of '0' must be a fraction.*not 50"),
        (dict(sparsity={"7": 0.5}), ValueError, "sparsity: no prunable layer fits '7'; known: 0, 1"),
        (dict(criterion="magnitud"), ValueError, "unknown criterion 'magnitud'; did you mean 'magnitude'"),
        (dict(criterion=3), TypeError, "not 3"),
        (dict(scope="globl"), ValueError, "unknown scope 'globl'; did you mean 'global'"),
        (dict(granularity="filtr"), ValueError, "unknown granularity 'filtr'; did you mean 'filter'"),
        (dict(granularity="5:4"), ValueError, "5:4.* N:M"),
        (dict(schedule="cubik"), ValueError, "unknown schedule 'cubik'; did you mean 'cubic'"),
        (dict(iterations=0), ValueError, "iterations must be a whole number of at least 1, not 0"),
        (dict(iterations=2, granularity="2:5", sparsity=None), ValueError, "iterations=2 goes neither"),
        (dict(drop_probability=2), ValueError, "drop_probability must be a fraction"),
        (dict(exclude=["nope"]), ValueError, "exclude: no prunable layer fits 'nope'; known: 0, 1"),
        (dict(criterion="snip"), ValueError, "'snip' needs data"),
        (dict(criterion="snip", data=[]), ValueError, "data holds no sample"),
        (dict(temperature=3), TypeError, "'magnitude' has no option temperature"),
        (dict(criterion=nan_scores), ValueError, "'nan_scores': 100 of 100 scores of 0.weight are NaN or infinite"),
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


def test_nan_weights_are_told_by_layer():
    model = mlp(10, 10, 10)
    model[1].weight.data[3, 4] = torch.nan
    for criterion in ("magnitude", "snip"):
        with pytest.raises(ValueError, match="[01].weight"):
            pu.prune(model, criterion, 0.5, data=BATCH)
    assert pu.get_masks(model) == {}
    with pytest.raises(ValueError, match="1.weight: 1 of 100 scores are NaN or infinite"):
        pu.prune(model, "magnitude", 0.5, "layer")


def test_an_error_in_the_third_of_five_iterations_changes_nothing():
    model, calls = mlp(10, 10, 10), []
    pu.prune(model, "magnitude", 0.2)
    before = snapshot(model)

    def failing(model, data):
        calls.append(pu.count(model))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {name: w.abs() for name, w in weights(model)}

    with pytest.raises(KeyboardInterrupt):
        pu.prune(model, failing, 0.9, iterations=5)
    assert len(calls) == 3
    assert_unchanged(model, before)


def test_a_warning_made_an_error_changes_nothing():
    model = mlp(10, 10)
    nn.init.ones_(model[0].weight)
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(pu.TiedScoresWarning):
            pu.prune(model, "magnitude", 0.5, iterations=2)
    assert_unchanged(model, before)


# --- Warnings --------------------------------------------------------------------------------------------------------


def test_ties_at_the_cut_are_told_with_counts_and_layers_at_the_callers_line():
    model = mlp(10, 10, 10)
    model[0].weight.data[:5] = 0
    model[1].weight.data[:3] = 0
    with pytest.warns(pu.TiedScoresWarning, match="80 weights tie .*'magnitude' .*0: 50, 1: 30") as caught:
        pu.prune(model, "magnitude", 0.3)
    assert caught[0].filename == __file__ and pu.layer_table(model).kept.tolist() == [50, 90]
    with pytest.warns(pu.TiedScoresWarning, match="0: 7") as caught:
        model = mlp(10, 10)
        model[0].weight.data.view(-1)[20:27] = 0
        pu.prune(model, "magnitude", 0.05)
    assert pu.get_masks(model)["0.weight"].view(-1)[20:27].tolist() == [False] * 5 + [True] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model[0].weight.data[:] = mlp(10, 10, seed=1)[0].weight
        pu.prune(model, "magnitude", 0.05)  # nothing left to do, so nothing ties


def test_layer_collapse_is_told_at_the_callers_line():
    model = mlp(10, 10, 10)
    model[1].weight.data *= 1e-3
    with pytest.warns(pu.LayerCollapseWarning, match="1 of 2 layers have no weight left: 1") as caught:
        pu.prune(model, "magnitude", 0.6)
    assert caught[0].filename == __file__
    with pytest.warns(pu.LayerCollapseWarning, match="2 of 2 layers") as caught:
        pu.prune_threshold(model, 100.0)
    assert caught[0].filename == __file__


# --- Chance ----------------------------------------------------------------------------------------------------------


def loader():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*BATCH), 1)


def test_the_global_random_state_is_left_alone(monkeypatch):
    def never(seed):
        raise AssertionError("this reseeds every GPU")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", never)
    model = mlp(10, 10)
    state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for options in (
        dict(criterion="random"),
        dict(drop_probability=0.5),
        dict(criterion="snip", data=BATCH, train_mode=True),
        dict(criterion="snip", data=loader()),
    ):
        pu.prune(copy.deepcopy(model), **dict(sparsity=0.5) | options)
        assert torch.equal(state, torch.get_rng_state()), options
    assert (numpy_state == np.random.get_state()[1]).all() and python_state == random.getstate()


def test_the_same_seed_gives_the_same_masks():
    for options in (dict(criterion="random"), dict(drop_probability=0.5)):
        masks = [pu.prune(mlp(30, 30), **dict(sparsity=0.5, seed=seed) | options)["0.weight"] for seed in (1, 1, 2)]
        assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_each_weight_that_would_go_is_dropped_with_the_given_probability():
    # the model is drawn from the same seed: what drops must not depend on it
    model = mlp(200, 200, 200)
    dense = pu.prune(copy.deepcopy(model), "magnitude", 0.5)
    masks = pu.prune(model, "magnitude", 0.5, drop_probability=0.3)
    dropped = sum(int((~m).sum()) for m in masks.values())
    assert abs(dropped - 12_000) < 5 * (40_000 * 0.3 * 0.7) ** 0.5
    assert not any((~masks[name] & dense[name]).any() for name in masks)
    assert pu.prune(mlp(9, 9), "magnitude", 0.5, drop_probability=0).kept == 81
    again = pu.prune(model, "magnitude", 0.8, drop_probability=0.5, seed=1)
    assert not any((again[name] & ~masks[name]).any() for name in masks)
    rows = pu.prune(mlp(50, 400), "magnitude", 0.5, granularity="filter", drop_probability=0.5)["0.weight"]
    assert (rows.all(1) | ~rows.any(1)).all() and 70 < int((~rows.any(1)).sum()) < 130


# --- Thresholds, data ------------------------------------------------------------------------------------------------


def test_a_threshold_takes_what_is_below_it_and_not_what_equals_it():
    model = nn.Linear(4, 1)
    model.weight.data = torch.tensor([[0.25, -0.5, 0.75, -1.0]])
    assert pu.prune_threshold(model, 0.5)["weight"].tolist() == [[False, True, True, True]]
    assert pu.prune_threshold(model, 0.1).kept == 3  # what is pruned stays pruned
    assert pu.prune_threshold(model, 0.75, restorable=True)["weight"].tolist() == [[False, False, True, True]]
    pu.restore(model)
    assert model.weight.tolist() == [[0.0, -0.5, 0.75, -1.0]]


def test_a_threshold_on_units_is_their_mean_or_sum():
    model = nn.Conv2d(1, 2, 2, bias=False)
    model.weight.data = torch.tensor([1.0, 1, 1, 1, 2, 2, 2, 2]).view(2, 1, 2, 2)
    twin = copy.deepcopy(model)
    assert pu.prune_threshold(model, 1.5, granularity="filter").kept == 4
    assert pu.prune_threshold(twin, 1.5, granularity="kernel", normalize=False).kept == 8


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(threshold=float("nan")), "threshold must be a number, not nan"),
        (dict(threshold="0.1"), "threshold must be a number, not '0.1'"),
        (dict(threshold=0.1, granularity="2:4"), "2:4 knows no threshold"),
        (dict(threshold=0.1, criterion="sni"), "did you mean 'snip'"),
        (dict(threshold=0.1, criterion=nan_scores), "NaN or infinite"),
    ],
)
def test_threshold_errors_change_nothing(arguments, message):
    model = mlp(10, 10)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        pu.prune_threshold(model, **arguments)
    assert_unchanged(model, before)


@quiet
def test_an_iterator_of_batches_serves_every_iteration():
    models = [mlp(10, 10), mlp(10, 10)]
    masks = [
        pu.prune(model, "snip", 0.5, data=data, iterations=3)["0.weight"]
        for model, data in zip(models, (iter([BATCH, BATCH]), [BATCH, BATCH]))
    ]
    assert torch.equal(*masks)


def test_a_criterion_of_ones_own_gets_any_data_as_it_is():
    given = object()

    def mine(model, data):
        assert data is given
        return {name: w.abs() for name, w in weights(model)}

    assert pu.prune(mlp(10, 10), mine, 0.5, data=given).kept == 50


def test_returned_masks_are_those_on_the_model():
    model = mlp(10, 10)
    masks = pu.prune(model, "magnitude", 0.5)
    assert isinstance(masks, pu.Masks) and masks.sparsity == 0.5 == pu.get_masks(model).sparsity
    assert all(torch.equal(masks[name], mask) for name, mask in pu.get_masks(model).items())


def test_code_without_a_module_name_can_prune():
    model = nn.Linear(3, 2)
    with pytest.warns(pu.LayerCollapseWarning):
        exec("pu.prune(model, 'magnitude', 1.0)", {"pu": pu, "model": model})
    assert pu.count(model).kept == 0
