"""Accuracy of outputs of every form: right, or refused by name; and fit agrees with it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pruneutils as pu


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(n_classes, *shape, seed=1):
    return torch.randint(n_classes, shape, generator=torch.Generator().manual_seed(seed))


# --- Outputs of the three forms -------------------------------------------------------------------------------------


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
    assert pu.accuracy(nn.Identity(), (outputs, targets), topk=topk) == pytest.approx(wanted)
    pieces = [(outputs[:4], targets[:4]), (outputs[4:], targets[4:])]
    assert pu.accuracy(nn.Identity(), pieces, topk=topk) == pytest.approx(wanted)


def test_as_many_tokens_as_classes_are_tokens_and_a_warning_says_so():
    outputs, targets = random(6, 5, 5), classes(5, 6, 5)
    with pytest.warns(UserWarning, match="read as .N, tokens, classes., not as .N, classes, positions."):
        assert pu.accuracy(nn.Identity(), (outputs, targets)) == (outputs.argmax(2) == targets).float().mean()


@pytest.mark.filterwarnings("ignore:outputs of shape")
@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=0, max_size=4), st.lists(st.integers(1, 4), min_size=0, max_size=4))
def test_accuracy_of_any_two_shapes_is_a_fraction_or_an_error_that_names_both(outputs, targets):
    data = torch.zeros(outputs), torch.zeros(targets, dtype=torch.long)
    try:
        assert 0 <= pu.accuracy(nn.Identity(), data) <= 1
        assert len(targets) + 1 == len(outputs)
    except ValueError as error:
        assert "metric=" in str(error)
        assert str(tuple(outputs)) in str(error) and str(tuple(targets)) in str(error)


def test_padding_is_left_out_and_classes_without_an_output_are_refused():
    outputs, targets = random(3, 4, 5), classes(5, 3, 4)
    shown = outputs.argmax(2)
    targets[:, 2:] = -100
    wanted = (shown == targets)[:, :2].float().mean().item()
    assert pu.accuracy(nn.Identity(), (outputs, targets)) == pytest.approx(wanted)
    for wrong in (5, 255, -1):
        targets[0, 0] = wrong
        with pytest.raises(ValueError, match=f"targets of {wrong} are no classes of these 5 outputs"):
            pu.accuracy(nn.Identity(), (outputs, targets))
    with pytest.raises(ValueError, match="every target is -100"):
        pu.accuracy(nn.Identity(), (outputs, torch.full((3, 4), -100)))


@pytest.mark.parametrize(
    ("outputs", "targets", "told"),
    [
        (random(6, 1), classes(2, 6), "one output cannot tell classes apart"),
        (random(6), classes(2, 6), r"outputs of shape \(6,\)"),
        (random(6, 5), classes(5, 6, 1), r"targets.squeeze\(1\)"),
        (random(6, 5), classes(5, 5), r"targets of shape \(5,\)"),
        (random(6, 5), random(6), "whole numbers such as int64, not float32"),
        (random(6, 5), torch.eye(6)[:, :5], "whole numbers such as int64, not float32"),
        (random(6, 5, 4), classes(5, 4, 6), "outputs .N, classes., .N, tokens, classes."),
        (random(6, 3, 4, 5), classes(5, 6, 3, 4), "outputs .N, classes., .N, tokens, classes."),
        (random(6, 5, 3, 4), classes(5, 6, 1, 3, 4), r"targets.squeeze\(1\)"),
    ],
)
def test_what_fits_no_form_is_refused_by_name_in_accuracy_and_fit(outputs, targets, told):
    with pytest.raises(ValueError, match=told):
        pu.accuracy(nn.Identity(), (outputs, targets))
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Flatten(0), Returning(outputs))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=told):
        pu.fit(model, [(random(6, 1), targets)], epochs=1, loss_fn=lambda out, y: out.sum())
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value), name


class Returning(nn.Module):
    """Returns the same outputs, whatever comes in."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, x):
        return self.outputs


# --- output= and metric= --------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A linear model that returns its outputs inside of something."""

    def __init__(self, wrap):
        super().__init__()
        self.linear, self.wrap = nn.Linear(4, 3), wrap
        with torch.no_grad():
            self.linear.weight.copy_(random(3, 4, seed=5))
            self.linear.bias.zero_()

    def forward(self, x):
        return self.wrap(self.linear(x))


FORMS = {
    "tuple": (lambda out: (out, "more"), lambda out: out[0], r"a tuple of 2.*out\[0\]"),
    "dict": (lambda out: {"aux": None, "logits": out}, lambda out: out["logits"], r"'aux', 'logits'.*out\['logits'\]"),
    "object": (lambda out: SimpleNamespace(logits=out), lambda out: out.logits, "SimpleNamespace.*out.logits"),
}


@pytest.mark.parametrize("form", FORMS)
def test_models_that_return_more_than_a_tensor_need_output(form):
    wrap, output, told = FORMS[form]
    model, plain = Wrapped(wrap), Wrapped(lambda out: out)
    data = random(20, 4), classes(3, 20)
    with pytest.raises(TypeError, match=told):
        pu.accuracy(model, data)
    with pytest.raises(TypeError, match=told):
        pu.fit(model, data, epochs=1)
    assert pu.accuracy(model, data, output=output) == pu.accuracy(plain, data)
    options = dict(epochs=2, batch_size=8, lr=0.01)
    tables = [pu.fit(model, data, data, output=output, **options), pu.fit(plain, data, data, **options)]
    assert tables[0].drop(columns="seconds").equals(tables[1].drop(columns="seconds"))
    assert torch.equal(model.linear.weight, plain.linear.weight)
    table = pu.gradual(model, data, data, [0.5], criterion="snip", data=data, output=output, epochs_each=1)
    assert table.sparsity.tolist() == [0.5] and pu.count(model).pruned == 6


@pytest.mark.parametrize("form", ["tokens", "pixels"])
def test_fit_trains_and_judges_tokens_and_pixels_by_the_rule_of_accuracy(form):
    layer = nn.Linear(4, 3) if form == "tokens" else nn.Conv2d(4, 3, 1)
    inputs, targets = (
        (random(8, 7, 4), classes(3, 8, 7)) if form == "tokens" else (random(8, 4, 5, 6), classes(3, 8, 5, 6))
    )
    before = pu.accuracy(layer, (inputs, targets))
    table = pu.fit(layer, (inputs, targets), (inputs, targets), epochs=1, batch_size=8, lr=0.0)
    assert table.train_accuracy.tolist() == table.test_accuracy.tolist() == pytest.approx([before])
    flat = (inputs.flatten(0, 1) if form == "tokens" else inputs.movedim(1, -1).flatten(0, 2)), targets.flatten()
    loss = nn.functional.cross_entropy(
        nn.functional.linear(flat[0], layer.weight.flatten(1), layer.bias), flat[1]
    ).item()
    assert table.train_loss.tolist() == pytest.approx([loss])


def test_a_metric_takes_the_place_of_the_accuracy():
    model, data = nn.Identity(), (random(10, 1), random(10, 1, seed=3))
    wanted = (data[0] - data[1]).square().mean().item()
    pieces = [(data[0][:7], data[1][:7]), (data[0][7:], data[1][7:])]
    for metric in (lambda out, y: (out - y).square(), lambda out, y: (out - y).square().mean().item()):
        assert pu.accuracy(model, pieces, metric=metric) == pytest.approx(wanted)
    assert pu.accuracy(model, (random(4, 1), classes(2, 4)), metric=lambda out, y: (out[:, 0] > 0) == y) <= 1
    linear = nn.Linear(1, 1)
    table = pu.fit(
        linear, data, data, epochs=2, lr=0.0, loss_fn=nn.functional.mse_loss, metric=lambda out, y: (out - y).square()
    )
    assert table.train_accuracy.tolist() == pytest.approx(table.train_loss.tolist())
    assert table.test_accuracy.tolist() == pytest.approx(table.train_loss.tolist())


def test_what_cannot_be_a_metric_or_an_output_is_refused():
    data = random(4, 3), classes(3, 4)
    with pytest.raises(TypeError, match="metric must return a tensor .* not 'much'"):
        pu.accuracy(nn.Identity(), data, metric=lambda out, y: "much")
    with pytest.raises(TypeError, match="output must be a function, not 'logits'"):
        pu.accuracy(nn.Identity(), data, output="logits")
    with pytest.raises(TypeError, match="metric must be a function, not 3"):
        pu.fit(nn.Linear(3, 3), data, epochs=1, metric=3)
    with pytest.raises(ValueError, match="topk=2 belongs to the accuracy"):
        pu.accuracy(nn.Identity(), data, topk=2, metric=lambda out, y: 0)
    with pytest.raises(TypeError, match="output= returns a str"):
        pu.accuracy(nn.Identity(), data, output=lambda out: "logits")
