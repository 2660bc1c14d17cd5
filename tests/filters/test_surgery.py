"""Which filters go together: labels follow every operation; what is not understood stays, and says why."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pruneutils as pu
from pruneutils.filters.surgery import analyse
from pruneutils.target import Target

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """An operation between two convolutions, which are called by keyword."""

    def __init__(self, operation, n_inputs=12):
        super().__init__()
        torch.manual_seed(0)
        self.operation = operation
        self.first, self.second, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(n_inputs, 5, 3), nn.Linear(5, 4)

    def forward(self, x):
        return self.last(self.second(input=self.operation(self.first(input=x))).mean((2, 3)))


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.repeat_interleave(2, 1),
        lambda x: x.repeat(1, 2, 1, 1),
        lambda x: torch.cat([x, x.flip(1)], 1),
        lambda x: x.permute(0, 2, 3, 1)[:, :, ::2].repeat_interleave(2, -1).relu_().movedim(3, 1),
        lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 2).unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2),
    ],
)
def test_channels_that_are_moved_go_with_their_filters(operation):
    model = pu.prune_filters(Between(operation), "l1", 0.5, X, exclude="second")
    kept = model.removed["first"]["out"]["kept"]
    came_from = operation(torch.arange(6.0)[None, :, None, None].expand(1, 6, 6, 6))[0, :, 2, 2].long()
    wanted = [place for place, filter_ in enumerate(came_from.tolist()) if filter_ in kept]
    assert 0 < len(kept) < 6 and model.removed["second"]["in"]["kept"] == wanted


def test_halves_that_meet_again_go_in_pairs():
    model = Between(lambda x: torch.mul(*x.chunk(2, 1)), 3)
    (group, _), _ = analyse(Target.of(model), X)
    assert group.n_units == 3 and group.channels["first", "out"].tolist() == [0, 1, 2, 0, 1, 2]
    pu.prune_filters(model, "l1", 2 / 3, X, exclude="second")
    low, high = model.removed["first"]["out"]["kept"]
    assert high == low + 3 and model.removed["second"]["in"]["kept"] == [low]


@pytest.mark.parametrize(
    ("operation", "n_inputs", "why"),
    [
        (lambda x: x[:, :3], 3, "pass slice"),
        (lambda x: torch.stack([x, x], 2).flatten(1, 2), 12, "pass stack"),
        (lambda x: x * x.mean(1, keepdim=True), 6, "pass mean"),
        (lambda x: x * torch.ones(6, 1, 1), 6, r"meets values of shape \(6, 1, 1\), which no layer"),
        (nn.Conv2d(6, 6, 3, groups=2), 6, "operation is a grouped convolution"),
    ],
)
def test_filters_stay_whose_channels_are_lost_or_mixed(operation, n_inputs, why):
    model = Between(operation, n_inputs)
    with pytest.raises(ValueError, match=f"no filter can be removed.*first .*{why}"):
        pu.prune_filters(model, "l1", 0.5, X, exclude="second")


@pytest.mark.parametrize(
    ("operation", "problem"),
    [(lambda x: x / x.shape[1], "would change by up to"), (lambda x: x.reshape(2, 6, 6, 6), "RuntimeError")],
)
def test_what_cannot_be_removed_is_named_and_nothing_has_changed(operation, problem):
    model = Between(operation, 6)
    pu.prune(model, "magnitude", 0.3)
    parameters, state, masks = list(model.parameters()), copy.deepcopy(model.state_dict()), pu.get_masks(model)
    with pytest.raises(ValueError, match=rf"the filters of first cannot be removed: .*{problem}.*exclude=\['first'\]"):
        pu.prune_filters(model, "l1", 0.5, X, min_density=0.3)
    assert all(p is q for p, q in zip(model.parameters(), parameters))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(mask, masks[name]) for name, mask in pu.get_masks(model).items())
    assert model.first.out_channels == 6 and not hasattr(model, "removed")


class Block(nn.Module):
    """A block of a language model: two queries share the keys and values of a head."""

    def __init__(self):
        super().__init__()
        widths = dict(q=(16, 16), k=(16, 8), v=(16, 8), o=(16, 16), gate=(16, 24), up=(16, 24), down=(24, 16))
        self.layers = nn.ModuleDict({name: nn.Linear(*width) for name, width in widths.items()})
        self.norms = nn.ModuleList(nn.RMSNorm(16) for _ in range(2))

    def forward(self, x):
        y, layers = self.norms[0](x), self.layers
        q, k, v = (layers[name](y).view(*y.shape[:2], -1, 4).transpose(1, 2) for name in "qkv")
        k, v = k[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2), v.repeat_interleave(2, 1)
        x = x + layers.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        y = self.norms[1](x)
        return x + layers.down(F.silu(layers.gate(y)) * layers.up(y))


@pytest.mark.parametrize("exclude", [(), "[12].layers.[qkvo]"])
def test_grouped_queries_stay_and_what_is_between_them_goes(exclude):
    model = nn.Sequential(nn.Embedding(11, 16), Block(), Block(), nn.RMSNorm(16), nn.Linear(16, 11))
    tokens = torch.randint(11, (2, 5))
    groups, protected = analyse(Target.of(model), tokens, exclude)
    assert [group.layers for group in groups] == [[f"{i}.layers.gate", f"{i}.layers.up"] for i in (1, 2)]
    assert all("pass view" in protected[f"{i}.layers.{name}"] for i in (1, 2) for name in "qkv")
    pu.prune_filters(model, "l1", 0.5, {"input": tokens}, exclude=exclude)
    assert sum(24 - model[i].layers.down.in_features for i in (1, 2)) == 24


class Frozen(nn.Module):
    """A batch norm that holds buffers only, as in detection networks."""

    def __init__(self, n):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(n) + 0.5)

    def forward(self, x):
        scale = (self.weight / self.running_var.sqrt())[:, None, None]
        return x * scale + self.bias[:, None, None] - self.running_mean[:, None, None] * scale


def chain(norm):
    layers = nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 6, 3), norm(6)
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4))


def test_a_frozen_batch_norm_is_cut_and_others_are_named_all_at_once():
    dense = chain(Frozen)
    model = pu.prune_filters(copy.deepcopy(dense), "l1", 0.5, X, min_density=0.3)
    for conv, norm in (("0", "1"), ("3", "4")):
        assert model.removed[conv]["out"] == model.removed[norm]["out"]
        kept = model.removed[conv]["out"]["kept"]
        for name, buffer in dense.get_submodule(norm).named_buffers():
            assert torch.equal(getattr(model.get_submodule(norm), name), buffer[kept])
    with pytest.raises(ValueError, match=r"0 \(its channels pass .* in 1 \(GroupNorm\).* 3 \(.* in 4 \(GroupNorm\)"):
        pu.prune_filters(chain(lambda n: nn.GroupNorm(2, n)), "l1", 0.5, X)


def test_a_depthwise_convolution_of_one_channel_is_still_none_of_its_own():
    layers = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.ConvTranspose2d(4, 4, 3, groups=4)
    dense = nn.Sequential(*layers, nn.Conv2d(4, 9, 3), nn.Flatten(), nn.Linear(9 * 16, 2))
    first = lambda model, weights: {n: torch.arange(len(w)) + 9.0 * (n != "0.weight") for n, w in weights.items()}  # noqa: E731
    model = pu.prune_filters(copy.deepcopy(dense), first, 3 / 13, X)
    assert [tuple(model[i].weight.shape) for i in range(3)] == [(1, 3, 3, 3), (1, 1, 3, 3), (1, 1, 3, 3)]
    assert [group.layers for group in analyse(Target.of(model), X)[0]] == [["0"], ["3"]]
    assert all(len(s) == len(model.get_parameter(n)) for n, s in pu.filter_scores(model, "l1").items())
    again = pu.filters.replay(copy.deepcopy(dense), model.removed)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(X), model(X))


def test_macs_of_attention_within_windows_are_predicted():
    windows = nn.Unflatten(1, (16, 4)), nn.Flatten(0, 1)
    model, x = nn.Sequential(*windows, nn.TransformerEncoderLayer(32, 8, 8, batch_first=True)), torch.rand(1, 64, 32)
    before = pu.cost(model, x).macs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pu.prune_filters(model, "l1", 0.4, x, of="macs", exclude="2.linear1")
    assert model[2].self_attn.num_heads < 8 and abs(pu.cost(model, x).macs / before - 0.6) < 0.06
