"""What is called dead has no effect, whatever the activations and operations; and what is cut off is found."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pruneutils as pu

ACTIVATIONS = [
    nn.ELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardtanh, nn.Hardswish, nn.LeakyReLU, nn.LogSigmoid, nn.PReLU, nn.ReLU,
    nn.ReLU6, nn.RReLU, nn.SELU, nn.CELU, nn.GELU, nn.Sigmoid, nn.SiLU, nn.Mish, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanh, nn.Tanhshrink, lambda: nn.Threshold(0.1, 20), lambda: nn.GLU(1), lambda: nn.Softmax(1),
    lambda: nn.Softmin(1), lambda: nn.LogSoftmax(1), lambda: nn.GELU("tanh"), lambda: nn.Hardtanh(1, 2),
]  # fmt: skip
NORMS = [
    nn.Identity, lambda: nn.BatchNorm2d(4), lambda: nn.GroupNorm(2, 4), lambda: nn.InstanceNorm2d(4, affine=True),
    lambda: nn.LocalResponseNorm(2), lambda: nn.BatchNorm2d(4, track_running_stats=False),
]  # fmt: skip
POOLS = [
    lambda: nn.MaxPool2d(2), lambda: nn.AvgPool2d(2), lambda: nn.AdaptiveAvgPool2d(2), lambda: nn.AdaptiveMaxPool2d(2),
    lambda: nn.MaxPool2d(2, dilation=2), lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), lambda: nn.LPPool2d(2, 2),
    lambda: nn.Upsample(scale_factor=2), lambda: nn.PixelUnshuffle(2), lambda: nn.Fold((4, 4), 1), nn.Identity,
]  # fmt: skip


def thin(model, share, generator):
    """Zero a share of all weights, whole rows among them, and some biases and scales."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            parameter[torch.rand(parameter.shape, generator=generator) < share] = 0
            parameter[torch.rand(len(parameter), generator=generator) < share / 2] = 0
    return model


def same(one, other):
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def assert_dead_is_dead(model, x, generator, n_tried=12):
    """Zero all that is called dead at once, and set single ones to other values: no output changes."""
    dead = pu.dead_weights(model, x)
    model.eval()
    inputs = torch.cat([x, torch.randn(7, *x.shape[1:], generator=generator) * 5]) if x.is_floating_point() else x
    with torch.no_grad():
        expected = model(inputs)
        without = copy.deepcopy(model)
        for name, mask in dead.items():
            without.get_parameter(name)[mask] = 0
        assert same(without(inputs), expected)
        places = [(name, i) for name, mask in dead.items() for i in mask.flatten().nonzero().flatten().tolist()]
        for index in torch.randperm(len(places), generator=generator)[:n_tried].tolist():
            name, i = places[index]
            changed = copy.deepcopy(model)
            changed.get_parameter(name).view(-1)[i] = 9.0
            assert same(changed(inputs), expected), (name, i)
    return dead


@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(share=st.floats(0, 0.9), bias=st.booleans(), seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_no_weight_with_an_effect_is_dead_in_linear_networks(activation, share, bias, seed):
    generator = torch.Generator().manual_seed(seed)
    act = activation()
    width = 3 if isinstance(act, nn.GLU) else 6
    layers = [nn.Linear(5, 6, bias), act, nn.Linear(width, 6, bias), copy.deepcopy(act), nn.Linear(width, 2, bias)]
    model = thin(nn.Sequential(*layers), share, generator)
    assert_dead_is_dead(model, torch.randn(1, 5, generator=generator), generator)


@given(
    activation=st.sampled_from([a for a in ACTIVATIONS if not isinstance(a(), nn.GLU)]),
    norm=st.sampled_from(NORMS),
    pool=st.sampled_from(POOLS),
    share=st.floats(0, 0.9),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=200, deadline=None)
def test_no_weight_with_an_effect_is_dead_in_convolutional_networks(activation, norm, pool, share, seed):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), norm(), activation(), pool(), nn.LazyConv2d(4, 3, padding=1, groups=1),
        activation(), nn.ConvTranspose2d(4, 4, 2, groups=2), activation(), nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip
    x = torch.randn(1, 2, 4, 4, generator=generator)
    try:
        model.eval()(x)
    except (RuntimeError, ValueError):  # such as Fold of the wrong shape
        return
    assert_dead_is_dead(thin(model, share, generator), x, generator)


class Odd(nn.Module):
    """Ways to compute that leave no module behind: in place, by index, by Python numbers, by masks, by sorting."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.one, self.two = kind, nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x):
        x = self.one(x)
        if self.kind == "in place":
            y = torch.zeros(len(x), 4)
            y[:, :2] = x[:, 2:]
            y[:, 2:].add_(x[:, :2]).clamp_(-1, 1).mul_(-2)
            x = y
        elif self.kind == "view then write":
            y = torch.empty(len(x), 4)
            half = y.view(len(x), 2, 2)[:, 0]
            y.zero_()
            half.copy_(x[:, 1:3])
            x = y.t().contiguous().t()
        elif self.kind == "index":
            x = torch.cat([x[:, [3, 1]], x.index_select(1, torch.tensor([0, 0]))], 1).roll(1, 1)
        elif self.kind == "python number":
            x = torch.full_like(x, float(x.abs().sum()))
        elif self.kind == "branch":
            x = x if x.sum() > 0 else -2 * x
        elif self.kind == "step":
            x = (x > 0).float() + torch.where(x > 1, 0.0, torch.tensor(3.0))
        elif self.kind == "sort":
            x = x.sort(1).values.cumsum(1)
        elif self.kind == "gather":
            x = x.gather(1, x.argsort(1))
        elif self.kind == "negative":
            x = F.relu(-x) - F.relu(-1 - x)
        elif self.kind == "difference":
            x = x - x.mean(1, keepdim=True)
        elif self.kind == "attention":
            x = F.scaled_dot_product_attention(
                x[:, None, :, None], x[:, None, :, None], x[:, None, :, None], is_causal=True
            )
            x = x[:, 0, :, 0]
        elif self.kind == "normalised":
            x = F.rms_norm(F.normalize(x, dim=1), (4,)) / (1 + x.norm(dim=1, keepdim=True))
        elif self.kind == "complex":
            x = torch.fft.fft(x).abs()
        elif self.kind == "einsum":
            x = torch.einsum("ni,nj->nj", x, x) @ torch.eye(4).flip(0)
        elif self.kind == "max":
            x = torch.maximum(x.max(1, keepdim=True).values, x.flip(1)).square().sqrt().log1p().exp() - 1
        elif self.kind == "squares":
            x = x * x + torch.bmm(x[:, None], x[:, :, None])[:, 0] * x
        elif self.kind == "tied":
            x = self.one(F.hardtanh(self.one(x)))
        return self.two(x)


KINDS = [
    "in place", "view then write", "index", "python number", "branch", "step", "sort", "gather", "negative",
    "difference", "attention", "normalised", "complex", "einsum", "max", "squares",
    "tied",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@given(share=st.floats(0, 0.9), seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_no_weight_with_an_effect_is_dead_however_it_is_computed(kind, share, seed):
    generator = torch.Generator().manual_seed(seed)
    assert_dead_is_dead(thin(Odd(kind), share, generator), torch.randn(1, 4, generator=generator), generator)


@given(widths=st.lists(st.integers(1, 5), min_size=2, max_size=5), share=st.floats(0, 1), seed=st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_what_is_dead_is_what_no_path_leads_through(widths, share, seed):
    """Without biases, and with activations that map 0 to 0, the paths can be counted by products of 0-1 matrices."""
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Linear(a, b, bias=False) for a, b in zip(widths, widths[1:])]
    model = thin(nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU6()))), share, generator)
    ways = [(layer.weight != 0).double() for layer in layers]
    into = [torch.ones(widths[0], dtype=torch.float64)]
    for way in ways:
        into.append((way @ into[-1]).clamp(max=1))
    out = [torch.ones(widths[-1], dtype=torch.float64)]
    for way in reversed(ways):
        out.insert(0, (out[0] @ way).clamp(max=1))
    dead = pu.dead_weights(model, torch.zeros(1, widths[0]))
    for number in range(len(layers)):
        assert torch.equal(dead[f"{2 * number}.weight"], torch.outer(out[number + 1], into[number]) == 0)


def test_measured_cases_of_activations_that_saturate():
    """99.6 %, 99.4 % and 72 % of these were called dead; 32 x 32 images leave 3 x 3 taps on 1 x 1 maps in padding."""
    small = nn.Sequential(nn.Linear(784, 300), nn.ReLU6(), nn.Linear(300, 10))
    mobilenet = pu.models.create("torchvision/mobilenet_v2")
    lite = pu.models.create("timm/efficientnet_lite0")
    for model, shape in ((small, (1, 784)), (mobilenet, (1, 3, 64, 64)), (lite, (1, 3, 128, 128))):
        assert not any(mask.any() for mask in pu.dead_weights(model, torch.zeros(shape)).values())
    dead = pu.dead_weights(mobilenet, torch.zeros(1, 3, 32, 32))
    # three depthwise layers of 960 channels read 1 x 1 maps, one of 576 channels 2 x 2 maps with a stride of 2
    assert sum(int(mask.sum()) for mask in dead.values()) == 3 * 960 * 8 + 576 * 5
    assert dead.keys() == pu.prunable_weights(mobilenet).keys()


def test_depth_and_tiny_weights_kill_nothing():
    model = nn.Sequential(*[layer for _ in range(120) for layer in (nn.Linear(3, 3, bias=False), nn.Sigmoid())])
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(-1e-30)
    assert not any(mask.any() for mask in pu.dead_weights(model, torch.zeros(1, 3)).values())


def test_tokens_layer_norm_attention_and_recurrence():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.recurrent, self.decoder = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 11, bias=False)
            self.decoder.weight = self.embedding.weight

        def forward(self, tokens):
            return {"logits": self.decoder(self.recurrent(self.block(self.embedding(tokens)))[0])}

    model, tokens = Language(), torch.randint(0, 11, (1, 5))
    assert not any(mask.any() for mask in pu.dead_weights(model, tokens).values())
    with torch.no_grad():
        model.block.linear2.weight[:, 3] = 0  # nothing leaves the fourth hidden unit
    dead = pu.dead_weights(model, tokens)
    assert {name: int(mask.sum()) for name, mask in dead.items() if mask.any()} == {"block.linear1.weight": 8}
    assert dead["block.linear1.weight"][3].all()


def test_no_trace_and_no_outputs():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout()).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    pu.dead_weights(model, (torch.zeros(3, 1, 5, 5), torch.zeros(3)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())

    class Nothing(nn.Linear):
        def forward(self, x):
            return "done"

    with pytest.raises(TypeError, match="Nothing returns no tensor"):
        pu.dead_weights(Nothing(2, 2), torch.zeros(1, 2))
