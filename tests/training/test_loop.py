"""fit repeats bit for bit and leaves no trace."""

import contextlib
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import assert_same, net, plain_sgd, samples
from torch import nn
from torch.utils.data import DataLoader

import pruneutils as pu


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "auto"])
def test_the_same_seed_repeats_bit_for_bit(optimizer, precision, auto_runs):
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
    columns = "epoch train_loss train_accuracy test_accuracy sparsity lr precision seconds".split()
    assert list(table.columns) == columns
    assert table.epoch.tolist() == [1, 2, 3] and table.lr.tolist() == [0.1] * 3 and table.sparsity.tolist() == [0] * 3
    assert table.test_accuracy.iloc[-1] == pu.accuracy(model, test) and table.train_loss.is_monotonic_decreasing


def test_one_step_is_the_gradient_step_of_the_whole_set():
    model, (inputs, targets) = net(), samples()
    twin = copy.deepcopy(model)
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)
    table = pu.fit(model, (inputs, targets), epochs=1, optimizer=plain_sgd, batch_size=40, loss_fn=smoothed)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    outputs = twin(inputs[order])
    loss = F.cross_entropy(outputs, targets[order], label_smoothing=0.1)
    loss.backward()
    assert table.train_loss[0] == pytest.approx(loss.item())
    assert table.train_accuracy[0] == (outputs.argmax(1) == targets[order]).float().mean()
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q - 0.1 * q.grad)


def test_the_machine_chooses_the_precision_only_if_asked_and_it_is_recorded(auto_runs):
    linear, batch = nn.Linear(4, 3), (torch.randn(6, 4), torch.randint(3, (6,)))
    assert pu.fit(net(), samples(), epochs=1).precision.tolist() == ["float32"]
    assert pu.fit(net(), samples(), epochs=2, precision="auto").precision.tolist() == [auto_runs] * 2
    assert pu.fit(linear, batch, epochs=1, precision="auto").precision.tolist() == ["float32"]


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
    with pytest.raises(pu.training.DivergenceError, match=r"loss became (nan|inf) in epoch \d of 5 \(lr 1e\+38"):
        pu.fit(model, data, epochs=5, optimizer=optimizer, lr_schedule="cosine", batch_size=4)
    assert optimizer.param_groups[0]["lr"] == 1e38


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_modes_layout_and_rates_are_as_before_also_after_an_interruption(training, error):
    model = net().train(training)
    model[1].train(not training)
    before = [module.training for module in model.modules()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def interrupt(model, step, steps):
        if error is not None and step == 7:  # in the second epoch, after an evaluation
            raise error

    with pytest.raises(error) if error else contextlib.nullcontext():
        options = dict(epochs=3, batch_size=8, lr_schedule="cosine", on_step=interrupt)
        pu.fit(model, samples(), samples(), optimizer=optimizer, **options)
    assert [module.training for module in model.modules()] == before
    assert all(p.is_contiguous() for p in model.parameters()) and optimizer.param_groups[0]["lr"] == 0.1


def test_a_model_with_nothing_to_prune_trains():
    model, data = nn.Sequential(nn.Flatten(), nn.LayerNorm(5)), (torch.randn(8, 5), torch.randint(5, (8,)))
    assert pu.fit(model, data, epochs=1).sparsity.isna().all()


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from zip(*samples())


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(epochs=0), ValueError, "epochs must be a whole number of at least 1, not 0"),
        (dict(batch_size=0), ValueError, "batch_size must be a whole number of at least 1, not 0"),
        (dict(test_every=0), ValueError, "test_every must be a whole number of at least 1, not 0"),
        (dict(start_step=-1), ValueError, "start_step must be a whole number of at least 0, not -1"),
        (dict(train=DataLoader(Endless())), TypeError, "train must be re-iterable and have a length.*not DataLoader"),
        (dict(train=[samples()[0]]), TypeError, "a batch must be an .inputs, targets. pair"),
        (dict(lr_schedule="cosin"), ValueError, "unknown lr_schedule 'cosin'; did you mean 'cosine'"),
        (dict(optimizer=plain_sgd, lr=0.1), ValueError, "lr and weight_decay go with an optimizer's name"),
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
        assert rest.iloc[-1, 1:7].equals(whole.iloc[-1, 1:7])


def test_masks_hold_in_fit():
    model = net()
    masks = pu.prune(model, "magnitude", 0.7)
    pu.fit(model, samples(), epochs=3, batch_size=8, weight_decay=1e-2, precision="bfloat16")
    assert not any(w[~masks[name]].any() for name, w in pu.prunable_weights(model).items())
    assert all(torch.equal(masks[name], mask) for name, mask in pu.get_masks(model).items())


def test_short_epochs_see_other_samples_each_time():
    model, (inputs, targets) = net(), samples(40)
    inputs[:, 0, 0, 0] = torch.arange(40.0)
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, 0, 0, 0].tolist()))
    table = pu.fit(model, (inputs, targets), epochs=3, batch_size=8, steps_per_epoch=2, lr_schedule="cosine", lr=1e-6)
    assert [len(batch) for batch in seen] == [8] * 6
    epochs = [set(seen[i] + seen[i + 1]) for i in (0, 2, 4)]
    assert all(len(epoch) == 16 for epoch in epochs) and len(set.union(*epochs)) > 16
    assert table.lr.is_monotonic_decreasing and table.lr.iloc[-1] < 1e-7  # the schedule runs over the 6 steps
    assert len(pu.fit(model, (inputs, targets), epochs=1, batch_size=8, steps_per_epoch=99)) == 1  # all there are
    with pytest.raises(ValueError, match="steps_per_epoch"):
        pu.fit(model, (inputs, targets), epochs=1, steps_per_epoch=0)
