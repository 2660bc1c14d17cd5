"""The doctor finds what is wrong with sick models, by name, and nothing on healthy ones."""

import copy
from functools import partial

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pruneutils as pu
from pruneutils import doctor
from pruneutils.masks import mask_of


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 32), nn.ReLU()
        return nn.Sequential(*layers, nn.Linear(32, 5))


def samples(n=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 6, 6, generator=generator), torch.randint(5, (n,), generator=generator)


def trained():
    """A pruned model with its optimizer, after a few steps."""
    model = net()
    pu.prune(model, "magnitude", 0.5, scope="layer")
    optimizer = torch.optim.Adam(model.parameters())
    pu.fit(model, samples(), epochs=8, batch_size=16, optimizer=optimizer)
    return model, optimizer


def names(findings):
    return {finding.check for finding in findings}


# --- Sick models: what is done to a healthy one, the check that finds it, how bad, where, and what to call -----


def replace(layer, weight):
    """Replace a weight; the optimizer knows of it."""

    def harm(model, optimizer):
        model[layer].weight = nn.Parameter(weight)
        optimizer.param_groups[0]["params"] = list(model.parameters())

    return harm


def prune_more(name, *positions):
    def harm(model, optimizer):
        keep = pu.get_masks(model)
        keep[name][positions] = False
        pu.set_masks(model, keep)

    return harm


def write_to_pruned_weights(model, optimizer=None):
    model[4].weight.data += 0.1


def exchange_a_layer(model, optimizer):
    model[6] = nn.Linear(32, 5)


def shift_the_statistics(model, optimizer):
    model[1].running_mean += 2 * model[1].running_var.sqrt()


def break_a_weight(model, optimizer):
    model[4].bias.data[2] = float("nan")


SICK = [
    (write_to_pruned_weights, "revived_weights", "error", "4", "pu.hold"),
    (lambda model, _: pu.make_permanent(model), "zeros_without_mask", "warning", "0, 4, 6", "pu.set_masks"),
    (replace(4, torch.ones(32, 128)), "lost_masks", "warning", "4.weight", "pu.hold"),
    (replace(6, torch.ones(7, 32)), "lost_masks", "error", "6.weight", "pu.set_masks"),
    (exchange_a_layer, "foreign_optimizer", "error", "Adam", "make the optimizer anew"),
    (shift_the_statistics, "stale_statistics", "warning", "1", "pu.recalibrate"),
    (prune_more("4.weight"), "empty_layers", "error", "4", "scope='layer'"),
    # nothing reads half of the hidden units
    (prune_more("6.weight", slice(None), slice(16)), "disconnected_paths", "warning", "4", "pu.dead_weights"),
    (prune_more("6.weight", 3), "pruned_classifier", "error", "6", "exclude='6'"),
    (break_a_weight, "non_finite", "error", "4.bias", "smaller lr"),
]


@pytest.mark.parametrize(("harm", "name", "severity", "where", "call"), SICK)
def test_every_sickness_is_found_by_name(harm, name, severity, where, call):
    model, optimizer = trained()
    assert not pu.check(model, optimizer, samples())
    harm(model, optimizer)
    state, grads = copy.deepcopy(model.state_dict()), [p.grad for p in model.parameters()]
    held = [getattr(mask_of(p), "keep", None) for p in model.parameters()]
    findings = pu.check(model, optimizer, samples())
    found = [finding for finding in findings if finding.check == name]
    assert found and all(call in each.call for each in found), findings
    assert (found[0].severity, found[0].where) == (severity, where)
    order = [doctor.SEVERITIES.index(each.severity) for each in findings]
    assert order == sorted(order)
    # nothing was changed, not even a mask that will move
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0, equal_nan=True)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads))
    assert all(getattr(mask_of(p), "keep", None) is keep for p, keep in zip(model.parameters(), held))


@pytest.mark.parametrize("name", ["lenet300", "lenet5", "vgg16_bn", "resnet20", "mobilenet_v1"])
def test_fresh_and_pruned_models_are_healthy(name):
    model = pu.models.create(name)
    shape = (4, 1, 28, 28) if name.startswith("lenet") else (4, 3, 32, 32)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for sparsity in (0.0, 0.5):
        if sparsity:
            pu.prune(model, "magnitude", sparsity, scope="layer")
        findings = pu.check(model, torch.optim.SGD(model.parameters(), lr=0.1), inputs)
        assert findings == [] and not findings


def test_a_trained_model_is_healthy_and_one_that_was_only_pruned_has_stale_statistics():
    train, test = pu.data.load("digits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 50), nn.BatchNorm1d(50), nn.ReLU(), nn.Linear(50, 10))
    pu.fit(model, train.subset(1280), epochs=3, lr=0.02)
    assert not pu.check(model, data=train)
    pu.prune(model, "magnitude", 0.97, exclude="4")
    assert names(pu.check(model, data=train)) == {"stale_statistics"}
    pu.recalibrate(model, train.subset(500))
    assert not pu.check(model, data=train)


def test_taps_that_only_ever_meet_padding_are_no_cut_paths():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten())
    pu.prune(model, "random", 0.5, scope="layer")
    assert not pu.check(model, data=torch.ones(1, 2, 1, 1))
    keep = pu.get_masks(model)
    keep["2.weight"][:, 1:] = False
    pu.set_masks(model, keep)
    (found,) = pu.check(model, data=torch.ones(1, 2, 1, 1))
    useful = [keep[name][:, :, 1, 1] for name in keep]
    lost = int(useful[0][1:].sum())
    assert (found.check, found.where) == ("disconnected_paths", "0")
    assert found.what.startswith(f"{lost} kept weights")


def test_findings_are_a_table_in_jupyter_and_text_elsewhere():
    model, _ = trained()
    healthy = pu.check(model)
    assert repr(healthy) == healthy._repr_html_() == "no findings"
    write_to_pruned_weights(model)
    findings = pu.check(model)
    assert list(pd.DataFrame(findings)) == ["severity", "what", "where", "call", "check"]
    assert "<table" in findings._repr_html_() and "pu.hold(model)" in findings._repr_html_()
    assert repr(findings).startswith("error: 2,") and "pu.hold(model)" in repr(findings)


# --- Weights without an effect ---------------------------------------------------------------------------------------

ACTIVATIONS = "ELU Hardshrink Hardsigmoid Hardtanh Hardswish LeakyReLU LogSigmoid PReLU ReLU ReLU6 RReLU SELU CELU GELU"
ACTIVATIONS += " Sigmoid SiLU Mish Softplus Softshrink Softsign Tanh Tanhshrink"
ACTIVATIONS = [getattr(nn, name) for name in ACTIVATIONS.split()]
ACTIVATIONS += [lambda: nn.Threshold(0.1, 20), lambda: nn.Hardtanh(1, 2)]
NORMS = [nn.Identity, lambda: nn.BatchNorm2d(4), lambda: nn.GroupNorm(2, 4), lambda: nn.LocalResponseNorm(2)]
POOLS = [nn.Identity, lambda: nn.Upsample(scale_factor=2), lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True)]
POOLS += [partial(kind, 2) for kind in (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)]


def thin(model, share, generator):
    """Zero a share of all weights, whole rows among them, and some biases and scales."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            parameter[torch.rand(parameter.shape, generator=generator) < share] = 0
            parameter[torch.rand(len(parameter), generator=generator) < share / 2] = 0
    return model


@given(st.sampled_from(ACTIVATIONS), st.sampled_from(NORMS), st.sampled_from(POOLS), st.floats(0, 0.9), st.integers(0))
@settings(max_examples=150, deadline=None)
def test_no_weight_with_an_effect_is_dead(activation, norm, pool, share, seed):
    generator = torch.Generator().manual_seed(seed % 2**31)
    layers = [nn.Conv2d(2, 4, 3, padding=1), norm(), activation(), pool(), nn.Conv2d(4, 4, 3, padding=1), activation()]
    layers += [nn.ConvTranspose2d(4, 4, 2, groups=2), activation(), nn.Flatten(), nn.LazyLinear(3)]
    model = nn.Sequential(*layers)
    x = torch.randn(8, 2, 4, 4, generator=generator) * 5
    model.eval()(x)
    thin(model, share, generator)
    dead, changed = pu.dead_weights(model, x), copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in dead.items():
            changed.get_parameter(name)[mask] = 9.0
        assert torch.allclose(changed(x), model(x), rtol=0, atol=0, equal_nan=True)


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), st.floats(0, 1), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_what_is_dead_is_what_no_path_leads_through(widths, share, seed):
    """Without biases, and with activations that map 0 to 0, the paths can be counted by products of 0-1 matrices."""
    layers = [nn.Linear(a, b, bias=False) for a, b in zip(widths, widths[1:])]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU6())))
    thin(model, share, torch.Generator().manual_seed(seed))
    ways = [(layer.weight != 0).double() for layer in layers]
    into, out = [torch.ones(widths[0]).double()], [torch.ones(widths[-1]).double()]
    for way, back in zip(ways, reversed(ways)):
        into.append((way @ into[-1]).clamp(max=1))
        out.insert(0, (out[0] @ back).clamp(max=1))
    dead = pu.dead_weights(model, torch.zeros(1, widths[0]))
    for number, way in enumerate(ways):
        assert torch.equal(dead[f"{2 * number}.weight"], (torch.outer(out[number + 1], into[number]) == 0) & (way != 0))


def test_dead_taps_are_found_and_healthy_networks_have_none():
    small = nn.Sequential(nn.Linear(784, 300), nn.ReLU6(), nn.Linear(300, 10))
    mobilenet, lite = pu.models.create("torchvision/mobilenet_v2"), pu.models.create("timm/efficientnet_lite0")
    deep = nn.Sequential(*[layer for _ in range(120) for layer in (nn.Linear(3, 3, bias=False), nn.Sigmoid())])
    with torch.no_grad():
        for weight in deep.parameters():
            weight.fill_(-1e-30)
    for model, shape in ((small, (784,)), (mobilenet, (3, 64, 64)), (lite, (3, 128, 128)), (deep, (3,))):
        assert not any(mask.any() for mask in pu.dead_weights(model, torch.zeros(1, *shape)).values())
    dead = pu.dead_weights(mobilenet, torch.zeros(1, 3, 32, 32))
    # three depthwise layers of 960 channels read 1 x 1 maps, one of 576 channels 2 x 2 maps with a stride of 2
    assert sum(int(mask.sum()) for mask in dead.values()) == 3 * 960 * 8 + 576 * 5
    assert dead.keys() == pu.prunable_weights(mobilenet).keys()


def test_tokens_attention_and_recurrence_are_followed():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.recurrent, self.decoder = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 11, bias=False)
            self.decoder.weight = self.embedding.weight

        def forward(self, tokens):
            return {"logits": self.decoder(self.recurrent(self.block(self.embedding(tokens)))[0])}

    model, tokens = Language().train(), torch.randint(0, 11, (1, 5))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert not any(mask.any() for mask in pu.dead_weights(model, tokens).values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with torch.no_grad():
        model.block.linear2.weight[:, 3] = 0  # nothing leaves the fourth hidden unit
    dead = pu.dead_weights(model, tokens)
    assert {name: int(mask.sum()) for name, mask in dead.items() if mask.any()} == {"block.linear1.weight": 8}
    assert dead["block.linear1.weight"][3].all()
