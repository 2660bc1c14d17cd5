"""trained() trains a network once, whoever asks, and returns it bit for bit."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import pruneutils as pu
from pruneutils.models import trained as room

OPTIONS = dict(epochs=1, optimizer="adam", train_size=200)


@pytest.fixture
def trainings(monkeypatch):
    """The calls of fit so far."""
    calls, fit = [], room.fit

    def counting(model, train, **options):
        calls.append(options)
        return fit(model, train, **options)

    counting.__signature__ = room.inspect.signature(fit)
    monkeypatch.setattr(room, "fit", counting)
    return calls


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def test_a_network_is_trained_once_and_comes_back_bit_for_bit(trainings, tmp_path):
    first, train, test = pu.trained("lenet5", "digits", 3, store=tmp_path, **OPTIONS)
    again, _, _ = pu.trained("lenet5", "digits", seed=3, store=tmp_path, **OPTIONS)
    assert len(trainings) == 1 and len(train) == 200 and len(test) == 1000
    twin = pu.models.create("lenet5", seed=3)
    pu.fit(twin, train, seed=3, epochs=1, optimizer="adam")
    assert same(first, twin) and same(again, twin)
    for model in (first, again):  # as good a start as a network that was never in a file
        assert all(p.grad is None and p.requires_grad and p.is_contiguous() for p in model.parameters())
        assert model.training and model.facts["network"] == "lenet5" and model.facts["epochs"] == 1


def test_every_argument_makes_another_network_and_defaults_do_not(trainings, tmp_path):
    def ask(network="lenet300", dataset="digits", seed=0, **options):
        pu.trained(network, dataset, seed, store=tmp_path, **OPTIONS | options)
        return len(trainings)

    train, test = pu.data.load("digits")
    assert ask() == 1
    others = [dict(network="fc"), dict(seed=1), dict(train_size=201), dict(epochs=2), dict(lr=0.01)]
    others += [dict(dataset=(replace(train, std=(0.5,)), test)), dict(dataset=(train.subset(1000), test))]
    assert [ask(**options) for options in others] == list(range(2, len(others) + 2))
    same_ones = [dict(), dict(seed=np.int64(0)), dict(batch_size=128), dict(dataset=(train, test))]
    assert {ask(**options) for options in [*others, *same_ones]} == {len(others) + 1}


ASK = """
import sys, time
import pruneutils as pu
from pruneutils.models import trained as room
fit = room.fit
def slow(*args, **kwargs):
    with open({log!r}, "a") as file:
        file.write("trained\\n")
    time.sleep(1)
    return fit(*args, **kwargs)
slow.__signature__ = room.inspect.signature(fit)
room.fit = slow
model, _, _ = pu.trained("lenet300", "digits", store={store!r}, epochs=1, optimizer="adam", train_size=200)
print(float(model.fc1.weight.sum()))
"""


def test_of_two_processes_that_ask_at_once_one_trains(tmp_path):
    code = ASK.format(log=str(tmp_path / "log"), store=str(tmp_path))
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = {process.communicate(timeout=120)[0] for process in both}
    assert len(outputs) == 1 and all(process.returncode == 0 for process in both)
    assert (tmp_path / "log").read_text() == "trained\n"


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(optimizer=torch.optim.SGD), TypeError, "so optimizer must be a name or a number"),
        (dict(loss_fn=torch.nn.CrossEntropyLoss()), TypeError, "so loss_fn must be"),
        (dict(epoch=3), TypeError, "'epoch'"),
        (dict(epochs=0), ValueError, "epochs must be a whole number of at least 1, not 0"),
        (dict(network="lenet30"), ValueError, "lenet300"),
        (dict(dataset="digit"), ValueError, "digits"),
    ],
)
def test_errors_leave_no_file(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        pu.trained(**dict(network="lenet300", dataset="digits", store=tmp_path) | OPTIONS | options)
    assert not list(tmp_path.rglob("*.safetensors"))
