"""gradual and gradual_sparsity prune when they say, and as much."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_same, net, samples
from torch import nn

import pruneutils as pu
from pruneutils._torch import derive_seed


def test_gradual_reaches_each_sparsity_exactly_and_counts_epochs_through():
    model = net()
    table = pu.gradual(model, samples(), samples(), sparsities=(0.5, 0.75, 0.9), epochs_each=2)
    total = pu.count(model).total
    assert table.epoch.tolist() == [1, 2, 3, 4, 5, 6] and table.stage.tolist() == [1, 1, 2, 2, 3, 3]
    assert table.sparsity.tolist() == [round(s * total) / total for s in (0.5, 0.5, 0.75, 0.75, 0.9, 0.9)]
    assert not table.test_accuracy.isna().any()


def test_gradual_is_prune_and_fit_in_turn():
    model, data = net(), samples()
    twin = copy.deepcopy(model)
    pu.gradual(model, data, sparsities=(0.3, 0.6), criterion="snip", data=data, scope="layer", seed=5, batch_size=8)
    for seed, sparsity in ((5, 0.3), (derive_seed(5, 1), 0.6)):
        pu.prune(twin, "snip", sparsity, "layer", data=data, seed=5)
        pu.fit(twin, data, epochs=1, seed=seed, batch_size=8)
    assert_same(model, twin.state_dict())


def test_warnings_of_gradual_point_at_its_caller():
    model = torch.nn.Linear(4, 4)
    torch.nn.init.ones_(model.weight)
    with pytest.warns(pu.TiedScoresWarning) as caught:
        pu.gradual(model, (torch.randn(8, 4), torch.zeros(8, dtype=torch.long)), sparsities=[0.5])
    assert caught[0].filename == __file__


# --- one training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("epochs, recovery", [(4, 2), (3, 1.4), (2, 0)])
def test_the_last_pruning_leaves_the_same_recovery_for_every_number_of_prunings(n, epochs, recovery):
    model, sparsities = net(), [pu.pruning.sparsity_at(i / n, 0.9) for i in range(1, n + 1)]
    seen, options = [], dict(epochs=epochs, recovery=recovery, batch_size=8)
    note = lambda m, step, steps: seen.append((step, steps, pu.count(m).pruned))  # noqa: E731
    table = pu.gradual(model, samples(), samples(), sparsities, on_step=note, **options)
    total, before = pu.count(model).total, 5 * epochs - round(5 * recovery)
    assert [(step, steps) for step, steps, _ in seen] == [(i, 5 * epochs) for i in range(1, 5 * epochs + 1)]
    times = [round(before * i / n) for i in range(1, n + 1)]
    expected = []
    for step in range(1, 5 * epochs + 1):
        expected.append(max([round(s * total) for s, time in zip(sparsities, times) if time <= step], default=0))
    assert [pruned for _, _, pruned in seen] == expected
    assert table.sparsity.tolist() == [expected[5 * epoch - 1] / total for epoch in range(1, epochs + 1)]
    assert table.stage.iloc[-1] == n and table.epoch.tolist() == list(range(1, epochs + 1))


def test_the_dense_arm_is_the_training_continued():
    model, twin = net(dropout=0.5), net(dropout=0.5)
    options = dict(batch_size=8, lr_schedule="one-cycle", seed=3)
    table = pu.gradual(model, samples(), samples(), sparsities=[0.0], epochs=3, recovery=1, **options)
    dense = pu.fit(twin, samples(), samples(), epochs=3, **options)
    assert_same(model, twin.state_dict())
    assert table.drop(columns=["seconds", "stage"]).equals(dense.drop(columns="seconds"))


def test_there_is_one_optimizer_and_one_learning_rate_schedule():
    rates, optimizers = [], []

    def sgd(parameters):
        optimizers.append(torch.optim.SGD(parameters, lr=1.0))
        return optimizers[-1]

    note = lambda *_: rates.append(optimizers[-1].param_groups[0]["lr"])  # noqa: E731
    options = dict(epochs=2, recovery=1, batch_size=8, optimizer=sgd, lr_schedule=lambda t: 1e-3 * (1 - t))
    pu.gradual(net(), samples(), sparsities=[0.3, 0.6], on_step=note, **options)
    assert rates == pytest.approx([1e-3 * (1 - i / 10) for i in range(10)])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(sparsities=0.9), "sparsities must be a list of ascending fractions such as .0.5, 0.9., not 0.9"),
        (dict(epochs_each=0), "epochs_each must be a whole number of at least 1, not 0"),
        (dict(epochs=4), "both epochs and recovery"),
        (dict(recovery=4), "both epochs and recovery"),
        (dict(epochs=4, recovery=2, epochs_each=1), "give either"),
        (dict(epochs=1.5, recovery=1), "epochs must be a whole number"),
        (dict(epochs=4, recovery=5), "recovery must be a number of epochs between 0 and epochs=4, not 5"),
        (dict(epochs=4, recovery=-1), "recovery must be a "),
        (dict(sparsities=[0.1, 0.2, 0.3], epochs=1, recovery=0), "3 prunings do not fit into the 1 steps before"),
        (dict(sparsities=[0.1, 0.2], epochs=2, recovery=2), "2 prunings do not fit into the 0 steps before"),
        (dict(criterion="magnitud"), "did you mean 'magnitude'"),
        (dict(criterion="snip"), "needs data"),
        (dict(scope="globl"), "did you mean 'global'"),
        (dict(granularity="filtr"), "did you mean 'filter'"),
    ],
)
def test_gradual_refuses_what_is_wrong_before_anything_changes(options, message):
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        pu.gradual(model, samples(), **options)
    assert_same(model, before)
    assert not pu.get_masks(model)


# --- gradual_sparsity ------------------------------------------------------------------------------------------------


@given(
    shares=st.tuples(*[st.floats(0, 1)] * 4),
    every=st.integers(1, 30),
    steps=st.integers(1, 60),
    schedule=st.sampled_from(["cubic", "linear", "exponential"]),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore:the ramp of")
def test_the_ramp_prunes_when_and_as_much_as_zhu_and_gupta_say(shares, every, steps, schedule):
    begin, length, *ends = shares
    (start, target), end = sorted(ends), min(1.0, begin + length)
    if end == 0:
        return
    model = nn.Linear(40, 5)
    ramp = pu.gradual_sparsity(target, begin, end, every, start=start, schedule=schedule)
    first, last, present = round(begin * steps), max(1, round(end * steps)), 0
    for step in range(1, steps + 1):
        ramp(model, step, steps)
        if step == last:
            present = round(200 * target)
        elif first < step < last and (step - first) % every == 0:
            present = round(200 * pu.pruning.sparsity_at((step - first) / (last - first), target, start, schedule))
        assert pu.count(model).pruned == present
    assert present == round(200 * target)


def test_a_ramp_below_what_is_pruned_already_is_an_error_at_its_first_pruning():
    model = nn.Linear(10, 10)
    pu.prune(model, "magnitude", 0.5)
    with pytest.raises(ValueError, match="what is pruned stays pruned"):
        pu.gradual_sparsity(0.9, every=1)(model, 1, 100)
    pu.gradual_sparsity(0.9, every=1, start=0.5)(model, 1, 100)
    assert pu.count(model).pruned > 50


def test_a_ramp_that_is_a_single_jump_warns_once(recwarn):
    for every in (9, 10):  # 20 steps, and the ramp ends after 10
        pu.fit(net(), samples(), epochs=4, batch_size=8, on_step=pu.gradual_sparsity(0.9, every=every))
    assert ["10 steps" in str(warning.message) for warning in recwarn] == [True]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(target=1.1), "not 1.1"),
        (dict(start=0.95), "start and target must be ascending"),
        (dict(begin=0.6, end=0.5), "must end after its begin=0.6"),
        (dict(end=0), "after step 0, not at end=0"),
        (dict(begin=-1), "begin must be a fraction"),
        (dict(every=0), "every must be a whole number of at least 1, not 0"),
        (dict(schedule="cubik"), "did you mean 'cubic'"),
        (dict(criterion="snip"), "needs data"),
    ],
)
def test_gradual_sparsity_refuses_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        pu.gradual_sparsity(**dict(target=0.9) | options)
