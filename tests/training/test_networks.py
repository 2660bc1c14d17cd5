"""trained() trains a network once, whoever asks, and returns it bit for bit."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import assert_same

import pruneutils as pu
from pruneutils.training import networks

OPTIONS = dict(epochs=1, optimizer="adam", train_size=200)


@pytest.fixture
def trainings(monkeypatch):
    """The calls of fit so far."""
    calls, fit = [], networks.fit
    monkeypatch.setattr(networks, "fit", lambda *args, **kwargs: [calls.append(kwargs), fit(*args, **kwargs)][1])
    return calls


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(networks, "cache_folder", lambda: tmp_path)
    return tmp_path


def test_a_network_is_trained_once_and_comes_back_bit_for_bit(trainings, cache):
    first, train, test = pu.trained("lenet5", "digits", 3, **OPTIONS)
    again, _, _ = pu.trained("lenet5", "digits", 3, **OPTIONS)
    assert len(trainings) == 1 and len(train) == 200 and len(test) == 1000
    assert_same(again, first.state_dict())
    twin = pu.models.create("lenet5", seed=3)
    pu.fit(twin, train, seed=3, epochs=1, optimizer="adam")
    assert_same(twin, first.state_dict())
    for model in (first, again):  # as good a start as a network that was never in a file
        assert all(p.grad is None and p.requires_grad and p.is_contiguous() for p in model.parameters())
        assert model.training and model.facts["network"] == "lenet5" and model.facts["epochs"] == 1
        pu.gradual(model, train, sparsities=[0.5], seed=1)
    pu.gradual(twin, train, sparsities=[0.5], seed=1)
    assert_same(first, twin.state_dict())
    assert_same(again, twin.state_dict())


def test_every_argument_makes_another_network_and_defaults_do_not(trainings, tmp_path):
    def ask(network="lenet300", dataset="digits", seed=0, **options):
        pu.trained(network, dataset, seed, store=tmp_path, **OPTIONS | options)
        return len(trainings)

    train, test = pu.data.load("digits")
    assert ask() == 1
    others = [
        dict(network="fc"),
        dict(seed=1),
        dict(train_size=201),
        dict(epochs=2),
        dict(lr=0.01),
        dict(batch_size=64),
    ]
    others += [dict(dataset=(replace(train, std=(0.5,)), test)), dict(dataset=(train.subset(1000), test))]
    assert [ask(**options) for options in others] == list(range(2, len(others) + 2))
    same = [
        dict(),
        dict(seed=np.int64(0)),
        dict(batch_size=128),
        dict(dataset=(train, test)),
        dict(precision="float32"),
    ]
    assert {ask(**options) for options in [*others, *same]} == {len(others) + 1}


def test_what_auto_precision_runs_names_the_network(trainings, tmp_path, auto_runs):
    for precision in ("auto", auto_runs):
        model, _, _ = pu.trained("lenet5", "digits", store=tmp_path, precision=precision, **OPTIONS)
        assert model.facts["precision"] == auto_runs
    assert len(trainings) == 1


def test_a_broken_file_is_trained_again_and_a_full_disk_only_warns(trainings, tmp_path, monkeypatch):
    model, _, _ = pu.trained("lenet300", "digits", store=tmp_path, **OPTIONS)
    (file,) = (tmp_path / ".networks").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    again, _, _ = pu.trained("lenet300", "digits", store=tmp_path, **OPTIONS)
    assert len(trainings) == 2
    assert_same(again, model.state_dict())

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(networks.checkpoints, "save", full)
    with pytest.warns(UserWarning, match="cannot be kept in .*No space left"):
        third, _, _ = pu.trained("lenet300", "digits", store=tmp_path / "full", **OPTIONS)
    assert_same(third, model.state_dict())


def test_where_no_file_can_be_kept_it_trains_and_warns_its_caller(trainings, tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot be kept in") as caught:
        pu.trained("lenet300", "digits", store=tmp_path / "file", **OPTIONS)
    assert len(trainings) == 1 and caught[0].filename == __file__


def test_a_change_of_the_code_that_trains_is_another_network(trainings, tmp_path, monkeypatch):
    for code in ("a", "b", "a"):
        monkeypatch.setattr(networks, "_code_that_trains", lambda code=code: code)
        pu.trained("lenet300", "digits", store=tmp_path, **OPTIONS)
    assert len(trainings) == 2


def test_comments_and_docstrings_are_no_code(tmp_path, monkeypatch):
    def hash_of(text):
        (tmp_path / "loop.py").write_text(text)
        networks._code_that_trains.cache_clear()
        return networks._code_that_trains()

    monkeypatch.setattr(networks.loop, "__file__", str(tmp_path / "loop.py"))
    try:
        plain = hash_of("def f():\n    return 1\n")
        assert plain == hash_of('"""Words."""\n\ndef f():  # more\n    """Words."""\n    return 1\n')
        assert plain != hash_of("def f():\n    return 2\n")
    finally:
        networks._code_that_trains.cache_clear()


ASK = """
import sys, time
import pruneutils as pu
from pruneutils.training import networks
fit = networks.fit
def slow(*args, **kwargs):
    with open({log!r}, "a") as file:
        file.write("trained\\n")
    time.sleep(1)
    return fit(*args, **kwargs)
networks.fit = slow
model, _, _ = pu.trained("lenet300", "digits", store={store!r}, epochs=1, optimizer="adam", train_size=200)
print(float(model.fc1.weight.sum()))
"""


def test_of_two_processes_that_ask_at_once_one_trains(tmp_path):
    code = ASK.format(log=str(tmp_path / "log"), store=str(tmp_path))
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = {process.communicate(timeout=120)[0] for process in both}
    assert len(outputs) == 1 and all(process.returncode == 0 for process in both)
    assert (tmp_path / "log").read_text() == "trained\n"


def test_from_a_checkpoint(trainings, tmp_path):
    model = pu.models.create("lenet300", seed=5)
    pu.prune(model, "magnitude", 0.5)
    ours, plain = pu.save(model, tmp_path / "pruned.safetensors"), tmp_path / "plain.pt"
    torch.save(model.state_dict(), plain)
    for path in (ours, str(plain)):
        start, _, _ = pu.trained("lenet300", "digits", checkpoint=path, epochs=0)
        assert_same(start, model.state_dict())
    assert pu.get_masks(pu.trained("lenet300", "digits", checkpoint=ours, epochs=0)[0]) and not trainings
    for _ in range(2):
        tuned, train, _ = pu.trained("lenet300", "digits", checkpoint=ours, store=tmp_path, **OPTIONS)
    pu.fit(model, train, epochs=1, optimizer="adam")
    assert len(trainings) == 1 and pu.count(tuned).sparsity == 0.5
    assert_same(tuned, model.state_dict())
    pu.trained("lenet300", "digits", checkpoint=plain, store=tmp_path, **OPTIONS)
    assert len(trainings) == 2


def test_the_files_stay_out_of_git(tmp_path):
    pu.trained("lenet300", "digits", store=tmp_path, **OPTIONS)
    assert (tmp_path / ".networks" / ".gitignore").read_text() == "*\n"


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(optimizer=torch.optim.SGD), TypeError, "so optimizer must be a name or a number"),
        (dict(on_step=print), TypeError, "so on_step must be"),
        (dict(loss_fn=torch.nn.CrossEntropyLoss()), TypeError, "so loss_fn must be"),
        (dict(epoch=3), TypeError, "'epoch'"),
        (dict(epochs=0), ValueError, "epochs must be a whole number of at least 1, not 0"),
        (dict(network="lenet30"), ValueError, "lenet300"),
        (dict(dataset="digit"), ValueError, "digits"),
        (dict(lr_schedule="cosin"), ValueError, "did you mean 'cosine'"),
    ],
)
def test_errors_leave_no_file(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        pu.trained(**dict(network="lenet300", dataset="digits", store=tmp_path) | OPTIONS | options)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_another_kind_of_cpu_has_a_folder_of_its_own(monkeypatch):
    cpu, folder = torch.device("cpu"), networks._cache_folder
    own = folder(cpu)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ANOTHER")
    other = folder(cpu)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert len({own, other, folder(cpu)}) == 3 and own.parent == other.parent
    assert os.path.basename(own.parent) == "networks"
