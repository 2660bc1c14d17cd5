"""fit repeats bit for bit and leaves no trace; gradual and lottery_ticket do what they say."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pruneutils as pu
from pruneutils.training import loop as training


def net(seed=0, dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(64, 5)
        )


def samples(n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 6, 6, generator=generator), torch.randint(5, (n,), generator=generator)


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def assert_same(model, state):
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


# --- fit -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_seed_repeats_bit_for_bit(optimizer, precision):
    tables, models = [], []
    for seed in (3, 3, 4):
        torch.rand(5)  # the global random state does not matter
        models.append(net(dropout=0.5))
        options = dict(epochs=3, optimizer=optimizer, batch_size=8, precision=precision, seed=seed)
        tables.append(pu.fit(models[-1], samples(), samples(seed=1), **options))
    assert_same(models[0], models[1].state_dict())
    assert tables[0].drop(columns="seconds").equals(tables[1].drop(columns="seconds"))
    assert not torch.equal(models[0][5].weight, models[2][5].weight)
    assert all(p.is_contiguous() for p in models[0].parameters())


def test_the_global_random_state_is_left_alone(monkeypatch):
    def never(seed):
        raise AssertionError("this reseeds every GPU")

    model = net(dropout=0.5)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", never)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*samples()), 8, shuffle=True)
    for train in (samples(), loader):
        state = torch.get_rng_state()
        pu.fit(model, train, samples(), epochs=1)
        assert torch.equal(state, torch.get_rng_state())


def test_a_row_per_epoch_says_what_happened():
    model, train, test = net(), samples(), samples(24, seed=1)
    table = pu.fit(model, train, test, epochs=3, batch_size=16)
    columns = ["epoch", "train_loss", "train_accuracy", "test_accuracy", "lr", "precision", "seconds"]
    assert list(table.columns) == columns
    assert table.epoch.tolist() == [1, 2, 3] and table.lr.tolist() == [0.1] * 3
    assert table.test_accuracy.iloc[-1] == pu.accuracy(model, test) and table.train_loss.is_monotonic_decreasing


def test_one_step_is_the_gradient_step_of_the_whole_set():
    model, (inputs, targets) = net(), samples()
    twin = copy.deepcopy(model)
    table = pu.fit(model, (inputs, targets), epochs=1, optimizer=plain_sgd, batch_size=40, label_smoothing=0.1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    outputs = twin(inputs[order])
    loss = F.cross_entropy(outputs, targets[order], label_smoothing=0.1)
    loss.backward()
    assert table.train_loss[0] == pytest.approx(loss.item())
    assert table.train_accuracy[0] == (outputs.argmax(1) == targets[order]).float().mean()
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q - 0.1 * q.grad)


@pytest.mark.parametrize("fast", [False, True])
def test_the_machine_chooses_the_precision_only_if_asked_and_it_is_recorded(fast, monkeypatch):
    monkeypatch.setattr(training, "_bfloat16_pays", lambda device_type: fast)
    ran = "bfloat16" if fast else "float32"
    linear, batch = nn.Linear(4, 3), (torch.randn(6, 4), torch.randint(3, (6,)))
    assert pu.fit(net(), samples(), epochs=1).precision.tolist() == ["float32"]
    assert pu.fit(net(), samples(), epochs=2, precision="auto").precision.tolist() == [ran] * 2
    assert pu.fit(linear, batch, epochs=1, precision="auto").precision.tolist() == ["float32"]


def test_evaluation_runs_in_the_precision_of_training():
    class Dtypes(nn.Linear):
        def forward(self, x):
            outputs = super().forward(x)
            dtypes.append((self.training, outputs.dtype))
            return outputs

    model, data = Dtypes(4, 3), (torch.randn(6, 4), torch.randint(3, (6,)))
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        dtypes = []
        pu.fit(model, data, data, epochs=1, precision=precision)
        assert dtypes == [(True, dtype), (False, dtype)]


class Modes(nn.Linear):
    """Remembers the mode of each forward pass."""

    def forward(self, x):
        self.modes.append(self.training)
        return super().forward(x)


def test_evaluation_is_in_eval_mode_and_as_often_as_asked():
    model, data = Modes(4, 3), (torch.randn(6, 4), torch.randint(3, (6,)))
    model.modes = []
    table = pu.fit(model, data, data, epochs=5, test_every=2, batch_size=6)
    assert model.modes == [True, True, False, True, True, False, True, False]
    assert table.test_accuracy.isna().tolist() == [True, False, True, False, False]
    assert pu.fit(model, data, epochs=2).test_accuracy.isna().all()


def test_learning_rates_follow_the_schedule_and_come_back():
    seen = {}
    for name in ("constant", "step", "cosine", "one-cycle", lambda t: 1 - t):
        model, rates = nn.Linear(4, 3), []
        optimizer = torch.optim.SGD([dict(params=[model.weight], lr=2.0), dict(params=[model.bias], lr=4.0)])
        data = torch.randn(8, 4), torch.randint(3, (8,))
        note = lambda *_: rates.append([group["lr"] for group in optimizer.param_groups])  # noqa: B023, E731
        pu.fit(model, data, epochs=4, batch_size=4, optimizer=optimizer, lr_schedule=name, on_step=note)
        assert [group["lr"] for group in optimizer.param_groups] == [2.0, 4.0]
        assert all(b == 2 * a for a, b in rates)
        seen[name if isinstance(name, str) else "own"] = [a / 2 for a, _ in rates]
    progress = np.arange(8) / 8
    assert seen["constant"] == [1] * 8
    assert seen["step"] == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert seen["cosine"] == pytest.approx(0.5 * (1 + np.cos(np.pi * progress)))
    assert seen["one-cycle"] == pytest.approx([0, 0.5, 1, 5 / 6, 2 / 3, 0.5, 1 / 3, 1 / 6])
    assert seen["own"] == pytest.approx(1 - progress)


def test_divergence_stops_and_gives_the_learning_rate_back():
    model, data = nn.Linear(4, 3), (100 * torch.randn(40, 4), torch.arange(40) % 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e38)
    with pytest.raises(pu.DivergenceError, match=r"loss became (nan|inf) in epoch \d of 5 \(lr 1e\+38"):
        pu.fit(model, data, epochs=5, optimizer=optimizer, lr_schedule="cosine", batch_size=4)
    assert optimizer.param_groups[0]["lr"] == 1e38


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(optimizer="sdg"), ValueError, "unknown optimizer 'sdg'; did you mean 'sgd'"),
        (dict(lr_schedule="cosin"), ValueError, "unknown lr_schedule 'cosin'; did you mean 'cosine'"),
        (dict(precision="half"), ValueError, "unknown precision 'half'"),
        (dict(optimizer=plain_sgd, lr=0.1), ValueError, "lr and weight_decay go with an optimizer's name"),
        (dict(train=iter([samples()])), TypeError, "train must be re-iterable"),
        (dict(train=samples(0)), ValueError, "train holds no sample"),
    ],
)
def test_errors_come_before_training(options, error, message):
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        pu.fit(model, **dict(train=samples(), epochs=1) | options)
    assert_same(model, before)


def test_training_from_a_snapshot_equals_the_uninterrupted_run():
    model, data, states = net(), samples(), {}

    def take(model, step, steps):
        assert steps == 15
        states[step] = copy.deepcopy(model.state_dict())

    options = dict(epochs=3, batch_size=8, optimizer=plain_sgd, lr_schedule="cosine")
    whole = pu.fit(model, data, data, on_step=take, **options)
    for start in (3, 5, 7):
        model.load_state_dict(states[start])
        rest = pu.fit(model, data, data, start_step=start, **options)
        assert_same(model, states[15])
        assert rest.epoch.tolist() == list(range(start // 5 + 1, 4))
        assert rest.iloc[-1, 1:5].equals(whole.iloc[-1, 1:5])


def test_training_from_a_snapshot_draws_the_same_dropout():
    model, data, states = net(dropout=0.5), samples(), {}
    options = dict(epochs=2, batch_size=8, optimizer=plain_sgd)
    pu.fit(model, data, on_step=lambda m, step, _: states.update({step: copy.deepcopy(m.state_dict())}), **options)
    model.load_state_dict(states[6])
    pu.fit(model, data, start_step=6, **options)
    assert_same(model, states[10])


def test_three_dimensional_convolutions_train_in_bfloat16():
    model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Flatten(), nn.Linear(16, 3))
    data = torch.randn(8, 1, 4, 4, 4), torch.randint(3, (8,))
    assert len(pu.fit(model, data, epochs=1, precision="bfloat16")) == 1


def test_masks_hold_in_fit():
    model = net()
    masks = pu.prune(model, "magnitude", 0.7)
    pu.fit(model, samples(), epochs=3, batch_size=8, weight_decay=1e-2, precision="bfloat16")
    assert not any(w[~masks[name]].any() for name, w in pu.prunable_weights(model).items())
    assert all(torch.equal(masks[name], mask) for name, mask in pu.get_masks(model).items())


# --- gradual ---------------------------------------------------------------------------------------------------------


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
    for stage, sparsity in enumerate((0.3, 0.6)):
        pu.prune(twin, "snip", sparsity, "layer", data=data, seed=5)
        pu.fit(twin, data, epochs=1, seed=5 + stage, batch_size=8)
    assert_same(model, twin.state_dict())


@pytest.mark.parametrize(
    "sparsities, message", [((0.3, 1.1), "not 1.1"), ((0.5, 0.3), "ascending"), ((), "sparsities")]
)
def test_gradual_refuses_before_it_trains(sparsities, message):
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        pu.gradual(model, samples(), sparsities=sparsities)
    assert_same(model, before)


# --- lottery_ticket --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rewind_step", [0, 4])
def test_a_lottery_ticket_is_rewound_and_trained_on_from_there(rewind_step):
    model, data, starts, snapshots = net(), samples(), [], {}
    first = {0: copy.deepcopy(model.state_dict())}
    options = dict(epochs=2, batch_size=8, optimizer=plain_sgd, lr_schedule="cosine")

    def note(model, step, steps):
        if step <= rewind_step and step not in first:
            first[step] = copy.deepcopy(model.state_dict())
        if step == rewind_step + 1:
            snapshots[len(snapshots)] = copy.deepcopy(model.state_dict())

    real_fit = training.fit

    def fit(model, *args, **kwargs):
        starts.append((copy.deepcopy(model.state_dict()), pu.get_masks(model), kwargs["start_step"]))
        return real_fit(model, *args, **kwargs)

    training.fit = fit
    try:
        table = pu.lottery_ticket(model, data, data, 0.8, 3, rewind_step=rewind_step, on_step=note, **options)
    finally:
        training.fit = real_fit
    total = pu.count(model).total
    assert table.groupby("round").sparsity.first().tolist() == [
        round(pu.sparsity_at(i / 3, 0.8) * total) / total for i in range(4)
    ]
    assert len(starts) == 4 and [start for _, _, start in starts] == [0] + [rewind_step] * 3
    for state, masks, _ in starts[1:]:
        for name, value in first[rewind_step].items():
            assert torch.equal(state[name], value * masks[name] if name in masks else value), name
    # the ticket, put on a fresh copy of the snapshot, trains to the same end
    twin = net()
    twin.load_state_dict(first[rewind_step])
    pu.set_masks(twin, pu.get_masks(model))
    pu.fit(twin, data, start_step=rewind_step, **options)
    assert_same(twin, model.state_dict())


def test_a_dense_round_from_the_snapshot_ends_where_the_first_did():
    model, data, ends = net(), samples(), []
    options = dict(epochs=2, batch_size=8, optimizer=plain_sgd)

    def note(model, step, steps):
        if step == steps:
            ends.append(copy.deepcopy(model.state_dict()))

    pu.lottery_ticket(model, data, sparsity=0.0, rounds=2, rewind_step=3, on_step=note, **options)
    assert len(ends) == 3
    assert_same(model, ends[0])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(criterion="magnitud"), "did you mean 'magnitude'"),
        (dict(criterion="snip"), "needs data"),
        (dict(sparsity=1.1), "not 1.1"),
        (dict(scope="globl"), "did you mean 'global'"),
        (dict(rewind_step=99), "rewind_step=99 is beyond the end of training"),
    ],
)
def test_lottery_ticket_refuses_before_it_trains(options, message):
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        pu.lottery_ticket(model, samples(), epochs=1, **options)
    assert_same(model, before)


def test_warnings_of_gradual_point_at_its_caller():
    model = torch.nn.Linear(4, 4)
    torch.nn.init.ones_(model.weight)
    with pytest.warns(pu.TiedScoresWarning) as caught:
        pu.gradual(model, (torch.randn(8, 4), torch.zeros(8, dtype=torch.long)), sparsities=[0.5])
    assert caught[0].filename == __file__


# oneDNN issue 6035: the weight gradient of a strided 1x1 convolution of few channels corrupts memory with channels last


@pytest.mark.parametrize("channels, stride, last", [(4, 1, True), (4, 2, False), (15, 2, False), (16, 2, True)])
def test_channels_last_where_it_is_safe(channels, stride, last):
    model = nn.Sequential(nn.Conv2d(2, channels, 3), nn.Conv2d(channels, 5, 1, stride), nn.Flatten(2))
    data, seen = (torch.randn(8, 2, 6, 6), torch.randint(5, (8, (4 // stride) ** 2))), set()

    def look(model, step, steps):
        seen.add(model[0].weight.is_contiguous(memory_format=torch.channels_last))

    pu.fit(model, data, epochs=1, lr=0.01, on_step=look)
    assert seen == {last} and model[0].weight.is_contiguous()


def test_strided_1x1_convolutions_of_few_channels_train_as_in_plain_torch():
    code = """
import torch, pruneutils as pu
from torch import nn
x, y = torch.randn(96, 3, 32, 32), torch.randint(16, (96,))
for channels in (2, 3, 4, 6):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, 16, 1, 2)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    weight = model[2].weight.detach().clone()
    loss = nn.functional.cross_entropy(model(x), y)
    gradient, = torch.autograd.grad(loss, model[2].weight)
    for _ in range(3):
        model[2].weight.data.copy_(weight)
        pu.fit(model, (x, y), batch_size=96, epochs=1, optimizer=lambda p: torch.optim.SGD([list(p)[2]], lr=1))
        torch.testing.assert_close(weight - model[2].weight, gradient, rtol=1e-3, atol=1e-5)
print("alive")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.stdout == "alive\n", f"exit code {ended.returncode}: {ended.stderr}"
