"""Accuracy of outputs of every form: right, or refused by name; and fit agrees with it."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pruneutils as pu
from pruneutils import _torch


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(n_classes, *shape, seed=1):
    return torch.randint(n_classes, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 5), 1), ((6, 4, 5), 2), ((6, 5, 4), 1), ((6, 5, 3, 4), 1), ((6, 5, 2, 3, 4), 1)]
)
@pytest.mark.parametrize("topk", [1, 2, 5])
def test_every_form_counts_as_numpy_does(shape, axis, topk):
    outputs = random(*shape)
    targets = classes(5, *shape[:axis], *shape[axis + 1 :])
    best = np.argsort(-outputs.numpy(), axis=axis, kind="stable")
    best = np.take(best, range(topk), axis=axis)
    wanted = (best == np.expand_dims(targets.numpy(), axis)).any(axis).mean()
    pieces = [(outputs[:4], targets[:4]), (outputs[4:], targets[4:])]
    for data in ((outputs, targets), [outputs, targets], pieces, iter(pieces)):
        assert pu.accuracy(nn.Identity(), data, topk=topk) == pytest.approx(wanted)


def test_as_many_tokens_as_classes_are_tokens_and_a_warning_says_so():
    outputs, targets = random(6, 5, 5), classes(5, 6, 5)
    with pytest.warns(UserWarning, match="tokens"):
        assert pu.accuracy(nn.Identity(), (outputs, targets)) == (outputs.argmax(2) == targets).float().mean()


@pytest.mark.filterwarnings("ignore:outputs of shape")
@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=0, max_size=4), st.lists(st.integers(1, 4), min_size=0, max_size=4))
def test_accuracy_of_any_two_shapes_is_a_fraction_or_an_error_that_names_both(outputs, targets):
    data = torch.zeros(outputs), torch.zeros(targets, dtype=torch.long)
    try:
        assert 0 <= pu.accuracy(nn.Identity(), data) <= 1
        assert len(targets) + 1 == len(outputs)
    except ValueError as error:
        assert "metric=" in str(error)
        assert str(tuple(outputs)) in str(error) and str(tuple(targets)) in str(error)


def test_padding_does_not_count_and_classes_without_an_output_are_refused():
    outputs, targets = random(3, 4, 5), classes(5, 3, 4)
    targets[:, 2:] = -100
    wanted = (outputs.argmax(2) == targets)[:, :2].float().mean().item()
    assert pu.accuracy(nn.Identity(), (outputs, targets)) == pytest.approx(wanted)
    for wrong in (5, 255, -1):
        targets[0, 0] = wrong
        with pytest.raises(ValueError, match=f"{wrong} .* 5 outputs"):
            pu.accuracy(nn.Identity(), (outputs, targets))
    for nothing in ([], (outputs[:0], targets[:0]), (outputs, torch.full((3, 4), -100))):
        with pytest.raises(ValueError, match="empty"):
            pu.accuracy(nn.Identity(), nothing)


class Returning(nn.Module):
    """Returns the same outputs, whatever comes in."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, x):
        return self.outputs


@pytest.mark.parametrize(
    ("outputs", "targets", "named"),
    [
        (random(6, 1), classes(2, 6), "one output"),
        (random(6, 5), classes(5, 6, 1), r"\(6, 1\)"),
        (random(6, 5), torch.eye(6)[:, :5], "float32"),
        (random(6, 3, 4, 5), classes(5, 6, 3, 4), "height, width"),
    ],
)
def test_what_fits_no_form_is_refused_by_name_in_accuracy_and_fit(outputs, targets, named):
    with pytest.raises(ValueError, match=named):
        pu.accuracy(nn.Identity(), (outputs, targets))
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Flatten(0), Returning(outputs))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=named):
        pu.fit(model, [(random(6, 1), targets)], epochs=1, loss_fn=lambda out, y: out.sum())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_accuracy_runs_in_eval_mode_and_puts_every_mode_back():
    model, modes = nn.Sequential(nn.BatchNorm1d(3), nn.Identity()).train(), []
    model[1].register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_grad_enabled())))
    model[0].eval()
    before, data = copy.deepcopy(model.state_dict()), (random(4, 3), classes(3, 4))
    pu.accuracy(model, data)
    with pytest.raises(ValueError, match="topk=4 .*3 outputs"):
        pu.accuracy(model, data, topk=4)
    assert modes == [(False, False)] * 2 and model.training and not model[0].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Rounding(nn.Module):
    """The second output is larger by less than bfloat16 can tell: the first of equal outputs wins there."""

    def forward(self, x):
        return x @ torch.tensor([[1.0, 1.0 + 2**-10], [0.0, 0.0]])


@pytest.mark.parametrize("pays", [False, True])
def test_accuracy_computes_in_the_precision_asked_for(monkeypatch, pays):
    monkeypatch.setattr(_torch, "bfloat16_pays", lambda device_type: pays)
    data, dense = (torch.eye(2)[:1], torch.tensor([1])), Rounding()
    assert pu.accuracy(dense, data) == pu.accuracy(dense, data, precision="auto") == 1
    assert pu.accuracy(dense, data, precision="bfloat16") == 0
    convolutional = Rounding()
    convolutional.unused = nn.Conv2d(1, 1, 1)
    assert pu.accuracy(convolutional, data) == 1
    assert pu.accuracy(convolutional, data, precision="auto") == (0 if pays else 1)


class Wrapped(nn.Module):
    """A linear model that returns its outputs inside of something."""

    def __init__(self, wrap):
        super().__init__()
        torch.manual_seed(5)
        self.linear, self.wrap = nn.Linear(4, 3), wrap

    def forward(self, x):
        return self.wrap(self.linear(x))


def test_models_that_return_more_than_a_tensor_need_output():
    output = lambda out: out["logits"]  # noqa: E731
    model, plain = Wrapped(lambda out: {"aux": None, "logits": out}), Wrapped(lambda out: out)
    data = random(20, 4), classes(3, 20)
    for call in (pu.accuracy, lambda model, data: pu.fit(model, data, epochs=1)):
        with pytest.raises(TypeError, match="returns a dict.*output="):
            call(model, data)
    assert pu.accuracy(model, data, output=output) == pu.accuracy(plain, data)
    options = dict(epochs=2, batch_size=8, lr=0.01)
    tables = [pu.fit(model, data, data, output=output, **options), pu.fit(plain, data, data, **options)]
    assert tables[0].drop(columns="seconds").equals(tables[1].drop(columns="seconds"))
    assert torch.equal(model.linear.weight, plain.linear.weight)
    table = pu.gradual(model, data, data, [0.5], criterion="snip", data=data, output=output, epochs_each=1)
    assert table.sparsity.tolist() == [0.5] and pu.count(model).pruned == 6


@pytest.mark.parametrize(
    ("layer", "inputs", "targets"),
    [
        (nn.Linear(4, 3), random(8, 7, 4), classes(3, 8, 7)),
        (nn.Conv2d(4, 3, 1), random(8, 4, 5, 6), classes(3, 8, 5, 6)),
    ],
)
def test_fit_trains_and_judges_tokens_and_pixels_by_the_rule_of_accuracy(layer, inputs, targets):
    before = pu.accuracy(layer, (inputs, targets))
    table = pu.fit(layer, (inputs, targets), (inputs, targets), epochs=1, batch_size=8, lr=0.0)
    assert table.train_accuracy.tolist() == table.test_accuracy.tolist() == pytest.approx([before])
    flat = inputs.flatten(0, 1) if inputs.ndim == 3 else inputs.movedim(1, -1).flatten(0, 2)
    outputs = nn.functional.linear(flat, layer.weight.flatten(1), layer.bias)
    assert table.train_loss.tolist() == pytest.approx([nn.functional.cross_entropy(outputs, targets.flatten()).item()])


def test_a_metric_replaces_the_accuracy():
    data = random(10, 1), random(10, 1, seed=3)
    wanted = (data[0] - data[1]).square().mean().item()
    pieces = [(data[0][:7], data[1][:7]), (data[0][7:], data[1][7:])]
    for metric in (lambda out, y: (out - y).square(), lambda out, y: (out - y).square().mean().item()):
        assert pu.accuracy(nn.Identity(), pieces, metric=metric) == pytest.approx(wanted)
    options = dict(epochs=2, lr=0.0, loss_fn=nn.functional.mse_loss, metric=lambda out, y: (out - y).square())
    table = pu.fit(nn.Linear(1, 1), data, data, **options)
    assert table.train_accuracy.tolist() == pytest.approx(table.train_loss.tolist())
    assert table.test_accuracy.tolist() == pytest.approx(table.train_loss.tolist())
