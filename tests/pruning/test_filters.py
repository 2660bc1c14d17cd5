"""Filters removed: the smaller network computes what the masked one does, ratios are met, errors change nothing."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pruneutils as pu
from pruneutils.pruning._surgery import analyse
from pruneutils.pruning.attention import NarrowAttention


def randomised(model, seed=0):
    """Statistics, scales and biases that are not 0 and 1, so that a channel at the wrong place shows."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator)
            nn.init.normal_(module.bias, 0, 0.1, generator)
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
        for p in module.parameters(recurse=False):
            if not p.any():
                p.data.normal_(0, 0.1, generator=generator)
    return model.eval()


def tiny_vit():
    from pruneutils import _torchvision

    vit = _torchvision.load().models.VisionTransformer
    return vit(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=7)


TIMM_VIT = dict(img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=3)
NETWORKS = {
    "vgg16_bn": lambda: pu.models.create("vgg16_bn"),
    "resnet20": lambda: pu.models.create("resnet20"),
    "resnet56": lambda: pu.models.create("resnet56"),
    "mobilenet_v1": lambda: pu.models.create("mobilenet_v1"),
    "lenet5": lambda: pu.models.create("lenet5", in_channels=3, image_size=32),
    "torchvision/resnet18": lambda: pu.models.create("torchvision/resnet18"),
    "torchvision/mobilenet_v2": lambda: pu.models.create("torchvision/mobilenet_v2"),
    "torchvision/vit": tiny_vit,
    "timm/resnet10t": lambda: pu.models.create("timm/resnet10t"),
    "timm/efficientnet_lite0": lambda: pu.models.create("timm/efficientnet_lite0"),
    "timm/vit": lambda: pu.models.create("timm/vit_tiny_patch16_224", **TIMM_VIT),
}
SLOW = {
    "torchvision/densenet121": lambda: pu.models.create("torchvision/densenet121"),
    "torchvision/googlenet": lambda: pu.models.create("torchvision/googlenet", init_weights=False, aux_logits=False),
    "torchvision/vgg16_bn": lambda: pu.models.create("torchvision/vgg16_bn"),
    "timm/resnext50_32x4d": lambda: pu.models.create("timm/resnext50_32x4d"),
}
X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def zeroed(dense, removed):
    """The dense model with the filters that were removed set to zero, and what batch norm makes of them."""
    model = copy.deepcopy(dense)
    for layer, roles in removed.items():
        module = model.get_submodule(layer)
        for role, entry in roles.items():
            gone = [i for i in range(entry["of"]) if i not in set(entry["kept"])]
            if role == "out":
                module.weight.data[gone] = 0
                if module.bias is not None:
                    module.bias.data[gone] = 0
            elif role == "heads":
                timm = hasattr(module, "qkv")
                for part in ("weight", "bias"):
                    tensor = getattr(module.qkv, part) if timm else getattr(module, f"in_proj_{part}")
                    tensor.data.view(3, entry["of"], module.head_dim, -1)[:, gone] = 0
    return model


def n_filters(model):
    """Filters that may go: those of the layers that prune_filters may touch."""
    return {name: len(rows) for group in analyse(model, X).groups for name, rows, _ in group.filters}


def n_convolutions(model):
    """The filters of all convolutions."""
    return sum(module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d))


# --- What is left computes what it should ----------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["filters", "macs"])
@pytest.mark.parametrize("name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_removed_network_agrees_with_the_masked_one_and_meets_the_ratio(name, of):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense = randomised((NETWORKS | SLOW)[name]())
    model = copy.deepcopy(dense)
    before, cost = n_filters(dense), pu.cost(dense, X)
    assert pu.prune_filters(model, "l1", ratio=0.5, example_inputs=X[:1], of=of, min_density=0.05) is model
    with torch.no_grad():
        wanted, found = zeroed(dense, model.removed)(X), model(X)
    scale = wanted.abs().max()
    assert scale > 1e-3
    assert (wanted - found).abs().max() <= 1e-5 * scale
    assert type(model) is type(dense) and list(model.state_dict()) == list(dense.state_dict())
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())
    after = {name: dict(model.named_parameters())[name].shape[0] for name in before}
    if of == "filters":
        step = max(group.filters[0][1].size // group.n_units * len(group.filters) for group in analyse(dense, X).groups)
        assert abs(sum(after.values()) - sum(before.values()) / 2) <= step
    else:
        assert abs(pu.cost(model, X).macs / cost.macs - 0.5) < 0.02  # less than the largest unit of these networks
    assert min(after.values()) >= 1


@pytest.mark.parametrize("name", ["vgg16_bn", "torchvision/resnet18", "mobilenet_v1"])
@pytest.mark.parametrize("of", ["parameters", "macs"])
@pytest.mark.parametrize("ratio", [0.25, 0.6])
def test_parameters_and_macs_are_predicted_to_the_unit(name, of, ratio):
    """What is left is as near to the target as whole units allow: one unit less or more is farther."""
    dense = NETWORKS[name]()
    model = pu.prune_filters(copy.deepcopy(dense), "l1", ratio, X[:1], of=of)
    size = {"parameters": lambda m: pu.cost(m, X).parameters, "macs": lambda m: pu.cost(m, X).macs}[of]
    total = size(dense)
    assert abs(size(model) / total - (1 - ratio)) < 0.005


@pytest.mark.parametrize("ratio", [0.1, 0.33, 0.5, 0.75])
def test_single_filters_are_met_exactly(ratio):
    model = pu.models.create("vgg16_bn")
    pu.prune_filters(model, "l1", ratio, X[:1])
    assert pu.filter_table(model)["before"].sum() - pu.filter_table(model)["after"].sum() == round(ratio * 4224)


def test_the_lowest_filters_go_and_the_best_of_each_layer_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    scores = {
        "0.weight": torch.tensor([6.0, 1, 5, 2, 4, 3]),
        "2.weight": torch.tensor([0.1, 0.5, 0.2, 0.4, 0.3]),
        "4.weight": torch.zeros(3),
    }
    pu.prune_filters(model, lambda model, data: scores, 6 / 11, torch.rand(2, 4))
    assert model.removed == {
        "0": {"out": {"of": 6, "kept": [0, 2, 4, 5]}},
        "2": {"in": {"of": 6, "kept": [0, 2, 4, 5]}, "out": {"of": 5, "kept": [1]}},
        "4": {"in": {"of": 5, "kept": [1]}},
    }
    assert json.loads(json.dumps(model.removed)) == model.removed
    assert [p.shape[0] for p in model.parameters()] == [4, 4, 1, 1, 3, 3]
    table = pu.filter_table(model)
    assert table.to_dict("list") == {
        "layer": ["0", "2"], "before": [6, 5], "after": [4, 1], "ratio": [pytest.approx(1 / 3), pytest.approx(0.8)],
    }  # fmt: skip


def test_ties_go_by_position_and_min_density_keeps_the_best():
    model = nn.Sequential(nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 2))
    equal = {"0.weight": torch.ones(10), "2.weight": torch.ones(2)}
    pu.prune_filters(model, lambda model, data: equal, 0.4, torch.rand(1, 2))
    assert model.removed["0"]["out"]["kept"] == [4, 5, 6, 7, 8, 9]
    model = nn.Sequential(nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 2))
    low = {"0.weight": torch.arange(10.0), "2.weight": 100 + torch.arange(10.0), "4.weight": torch.ones(2)}
    pu.prune_filters(model, lambda model, data: low, 0.5, torch.rand(1, 2), min_density=0.3)
    assert [model[0].out_features, model[2].out_features] == [3, 7]


@pytest.mark.parametrize("rounds", [1, 2, 5, 20])
def test_min_density_counts_the_filters_before_the_first_round(rounds):
    """Counted anew in every round, a tenth of a tenth would be kept."""
    model = nn.Sequential(nn.Linear(2, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 2))

    def low_first(model, data):
        return {f"{i}.weight": 100.0 * i + torch.arange(float(model[i].out_features)) for i in (0, 2, 4)}

    pu.prune_filters(model, low_first, 0.4, torch.rand(1, 2), rounds, min_density=0.25)
    assert [model[0].out_features, model[2].out_features] == [10, 38]
    assert model.removed["0"]["out"]["kept"] == list(range(30, 40))


def test_coupled_filters_share_their_mean_score():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 4)
            self.last = nn.Linear(4, 2)

        def forward(self, x):
            x = self.a(torch.relu(self.first(x)))
            return self.last(torch.relu(x + self.b(x)))

    model = Residual()
    scores = {
        "first.weight": torch.full((3,), 9.0),
        "a.weight": torch.tensor([0.0, 3, 1, 5]),
        "b.weight": torch.tensor([7.0, 1, 2, 5]),  # means 3.5, 2, 1.5, 5
        "last.weight": torch.zeros(2),
    }
    pu.prune_filters(model, lambda model, data: scores, 0.5, torch.rand(2, 2))
    assert model.removed["a"]["out"]["kept"] == model.removed["b"]["out"]["kept"] == [0, 3]
    assert model.first.out_features == 3  # reads the input of a network with shortcuts


# --- What stays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer", "why"),
    [
        ("vgg16_bn", "linear", "outputs"),
        ("resnet20", "conv1", "slice"),
        ("torchvision/resnet18", "conv1", "reads the input"),
        ("torchvision/mobilenet_v2", "features.0.0", "reads the input"),
        ("timm/vit", "blocks.0.mlp.fc2", "several channels"),
        ("torchvision/vit", "conv_proj", "."),
        ("timm/resnext50_32x4d", "layer1.0.conv2", "grouped"),
    ],
)
def test_protected_layers_keep_their_filters(name, layer, why):
    model = (NETWORKS | SLOW)[name]()
    structure = analyse(model, X)
    assert why in structure.protected[layer] or why == "."
    before = model.get_submodule(layer).weight.shape[0]
    pu.prune_filters(model, "l1", 0.6, X[:1])
    assert model.get_submodule(layer).weight.shape[0] == before


def test_a_stem_without_shortcuts_behind_it_takes_part():
    model = pu.prune_filters(NETWORKS["vgg16_bn"](), "l1", 0.9, X[:1])
    assert model.features[0].out_channels < 64


@pytest.mark.parametrize("exclude", ["layer3.*", ["layer3.0.conv1", "layer3.1.*", "layer3.2.conv1.weight"]])
def test_excluded_layers_stay(exclude):
    model = pu.prune_filters(NETWORKS["resnet20"](), "l1", 0.5, X[:1], exclude=exclude)
    assert all(block.conv1.out_channels == 64 for block in model.layer3)
    assert sum(block.conv1.out_channels for block in (*model.layer1, *model.layer2)) == 72  # of 144


def test_tied_weights_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3), nn.Linear(3, 2))
    model[2].weight = model[0].weight
    structure = analyse(model, torch.rand(1, 4))
    assert "shares its weight" in structure.protected["0"] and "shares its weight" in structure.protected["2"]
    assert [group.layers for group in structure.groups] == [["4"]]


def test_analysing_leaves_no_trace():
    model = NETWORKS["torchvision/resnet18"]().train()
    model.fc.weight.requires_grad_(False)
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    hooks = [len(m._forward_hooks) for m in model.modules()]
    analyse(model, X)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert [p.requires_grad for p in model.fc.parameters()] == [False, True]


def test_a_frozen_network_is_seen_too():
    model = NETWORKS["vgg16_bn"]().requires_grad_(False)
    pu.prune_filters(model, "l1", 0.5, X[:1])
    assert not any(p.requires_grad for p in model.parameters())


def test_two_networks_do_not_share_anything():
    """torch-pruning's default arguments are shared by all that ever used them."""
    pu.prune_filters(SLOW["timm/resnext50_32x4d"](), "l1", 0.3, X[:1])
    model, other = NETWORKS["resnet20"](), NETWORKS["resnet20"]()
    pu.prune_filters(model, "l1", 0.5, X[:1])
    pu.prune_filters(other, "l1", 0.5, X[:1])
    assert model.removed == other.removed


# --- Masks -----------------------------------------------------------------------------------------------------------


def test_masks_are_cut_with_their_weights_and_still_hold():
    model = randomised(NETWORKS["torchvision/resnet18"]())
    pu.prune(model, "magnitude", 0.7)
    masks, dense = pu.get_masks(model), copy.deepcopy(model)
    pu.prune_filters(model, "l1", 0.4, X[:1])
    for name, mask in pu.get_masks(model).items():
        kept, roles = masks[name], model.removed.get(name.removesuffix(".weight"), {})
        for role, dim in (("out", 0), ("in", 1)):
            if role in roles:
                kept = kept.index_select(dim, torch.tensor(roles[role]["kept"]))
        assert torch.equal(mask, kept)
    with torch.no_grad():
        torch.testing.assert_close(model(X), zeroed(dense, model.removed)(X), rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    for name, mask in pu.get_masks(model).items():
        assert not dict(model.named_parameters())[name][~mask].any()
        assert dict(model.named_parameters())[name][mask].all()


# --- When it goes wrong ----------------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """The mean over the channels of `first`, in which a channel that is gone does not count as zero."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 3), nn.Linear(12, 5)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.second(x * x.mean(1, keepdim=True).sigmoid()).mean((2, 3)))


class Reshaping(Mixing):
    """A width written into the code."""

    def forward(self, x):
        return self.last(self.second(self.first(x).reshape(len(x), 16, 30, 30)).mean((2, 3)))


@pytest.mark.parametrize(("kind", "what"), [(Mixing, "would change by"), (Reshaping, "RuntimeError")])
def test_what_cannot_be_removed_is_named_and_nothing_has_changed(kind, what):
    torch.manual_seed(0)
    model = kind()
    pu.prune(model, "magnitude", 0.3)
    parameters, state, masks = list(model.parameters()), copy.deepcopy(model.state_dict()), pu.get_masks(model)
    with pytest.raises(ValueError, match=rf"the filters of first cannot be removed: .*{what}.*exclude=\['first'\]"):
        pu.prune_filters(model, "l1", 0.5, X)
    assert all(p is q for p, q in zip(model.parameters(), parameters))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.first.out_channels == 16 and not hasattr(model, "removed")
    assert all(torch.equal(mask, masks[name]) for name, mask in pu.get_masks(model).items())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(X).sum().backward()
    optimizer.step()
    assert all(not dict(model.named_parameters())[name][~mask].any() for name, mask in masks.items())
    pu.prune_filters(model, "l1", 0.5, X, exclude="first")
    assert model.second.out_channels == 6


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(importance="mag_base"), ValueError, "unknown importance 'mag_base'; did you mean 'mag_based'"),
        (dict(importance="tfo"), ValueError, "importance 'tfo' needs data"),
        (dict(importance="l1", T=3), TypeError, "importance 'l1' has no option T; its own: none"),
        (dict(importance=3), TypeError, "an importance is a name or a callable"),
        (dict(importance=lambda model, data: {}), ValueError, "gives no scores for conv1; exclude"),
        (dict(importance=lambda m, d: {"conv1.weight": torch.ones(3)}), ValueError, "conv1.weight has 20 filters"),
        (
            dict(importance=lambda m, d: {"conv1.weight": torch.full((20,), float("nan"))}),
            ValueError, "20 of 20 scores of conv1.weight are NaN",
        ),
        (dict(ratio=1.5), ValueError, "ratio must be a fraction"),
        (dict(ratio=1.0), ValueError, r"at most 0\.9\d* of the filters can go"),
        (dict(ratio=0.99, of="macs", exclude="conv1"), ValueError, r"of the macs can go.*conv1 \(conv1 is excluded\)"),
        (dict(ratio=[0.5, 0.3]), ValueError, "ascending"),
        (dict(ratio=[0.3, 0.5], rounds=3), ValueError, "2 rounds"),
        (dict(rounds=0), ValueError, "rounds"),
        (dict(of="flops"), ValueError, "unknown of 'flops'"),
        (dict(schedule="front_load"), ValueError, "did you mean 'front_loaded'"),
        (dict(exclude="conv9"), ValueError, "exclude: no layer with filters fits 'conv9'; did you mean 'conv"),
        (dict(exclude="*"), ValueError, "no filter can be removed"),
        (dict(example_inputs=None), ValueError, "needs example_inputs"),
        (dict(example_inputs="x"), TypeError, "example_inputs must be a tensor"),
        (dict(min_density=2), ValueError, "min_density"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named_before_anything_changes(arguments, error, message):
    model = pu.models.create("lenet5")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        pu.prune_filters(model, **dict(importance="l1", ratio=0.5, example_inputs=torch.rand(1, 1, 28, 28)) | arguments)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "removed")


# --- Rounds ----------------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.floats(0.01, 0.99), st.integers(1, 40))
def test_the_front_loaded_schedule_is_the_published_one(p, n):
    left = 1.0
    for k in range(1, n + 1):
        left *= 1 - p / (k * p + n * (1 - p))
        assert 1 - pu.sparsity_at(k / n, p, schedule="front_loaded") == pytest.approx(left, abs=1e-9)
    assert left == pytest.approx(1 - p, abs=1e-9)


def test_75_percent_in_25_rounds_are_75_percent():
    removed = []
    model = pu.models.create("vgg16_bn")
    pu.prune_filters(
        model, "l1", 0.75, X[:1], rounds=25, on_round=lambda m, k: removed.append(4224 - n_convolutions(m))
    )
    wanted = [4224 * pu.sparsity_at(k / 25, 0.75, schedule="front_loaded") for k in range(1, 26)]
    assert np.abs(np.array(removed) - wanted).max() <= 0.5 and removed[-1] == 3168
    assert removed[0] == round(4224 * 0.75 / (0.75 + 25 * 0.25))  # 10.7 % in the first round


def test_thresholds_by_hand():
    left = []
    model = pu.models.create("vgg16_bn")
    pu.prune_filters(model, "l1", [0.1, 0.5, 0.8], X[:1], on_round=lambda m, k: left.append(n_convolutions(m)))
    assert [4224 - n for n in left] == [422, 2112, 3379]


def test_rounds_score_the_network_as_it_is_then():
    seen = []

    def watching(model, data):
        seen.append(sum(p.numel() for p in model.parameters()))
        return {name: w.detach().flatten(1).norm(dim=1) for name, w in pu.prunable_weights(model).items()}

    model = pu.prune_filters(pu.models.create("resnet20"), watching, 0.5, X[:1], rounds=3, schedule="linear")
    assert len(seen) == 3 and sorted(seen, reverse=True) == seen and len(set(seen)) == 3
    once = pu.prune_filters(pu.models.create("resnet20"), "mag_based", 0.5, X[:1])
    assert sum(pu.filter_table(model)["after"]) == sum(pu.filter_table(once)["after"])


def test_the_record_goes_back_to_the_first_model():
    dense = randomised(NETWORKS["mobilenet_v1"]())
    model = copy.deepcopy(dense)
    for _ in range(3):
        pu.prune_filters(model, "l1", 0.3, X[:1])
    with torch.no_grad():
        torch.testing.assert_close(model(X), zeroed(dense, model.removed)(X), rtol=1e-4, atol=1e-5)
    assert "removed" not in vars(dense) and "removed" in vars(copy.deepcopy(model))


# --- An ordinary model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/vit", "timm/vit", "mobilenet_v1"])
def test_the_record_rebuilds_the_network_bit_for_bit(name):
    model = randomised(NETWORKS[name]())
    pu.prune_filters(model, "l1", 0.5, X[:1], rounds=2)
    again = pu.pruning.replay(NETWORKS[name](), json.loads(json.dumps(model.removed)))
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(X), model(X))
    assert again.removed == model.removed


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ({"conv3": {"out": {"of": 4, "kept": [0]}}}, "no layer 'conv3'"),
        ({"conv1": {"side": {"of": 20, "kept": [0]}}}, "no layer 'conv1' with 'side'"),
        ({"conv1": {"out": {"of": 21, "kept": [0]}}}, r"conv1 has 20 channels \(out\), not 21"),
        ({"conv1": {"out": {"of": 20, "kept": [0, 20]}}}, "ascending"),
        ({"conv1": {"out": {"of": 20, "kept": [1, 0]}}}, "ascending"),
        ({"conv1": {"out": {"of": 20, "kept": []}}}, "ascending"),
        ({"conv1": {"heads": {"of": 20, "kept": [1]}}}, "no attention"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(removed, message):
    with pytest.raises(ValueError, match=message):
        pu.pruning.replay(pu.models.create("lenet5"), removed)


def test_training_goes_on_with_every_parameter_alive():
    model = randomised(NETWORKS["torchvision/resnet18"]())
    y = torch.tensor([1, 2, 3])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []

    def train(model, number):
        for _ in range(4):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model.train()(X), y)
            loss.backward()
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.step()
            losses.append(loss.item())
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters()}
        assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before))

    train(model, 0)
    pu.prune_filters(model, "l1", 0.6, X[:1], rounds=3, optimizer=optimizer, on_round=train)
    assert losses[-1] < losses[4]


def test_deepcopy_pickle_and_channels_last_survive():
    import pickle

    model = pu.prune_filters(randomised(NETWORKS["torchvision/vit"]()), "l1", 0.5, X[:1])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(twin(X), model(X))
    nhwc = NETWORKS["vgg16_bn"]().to(memory_format=torch.channels_last)
    pu.prune_filters(nhwc, "l1", 0.5, X[:1])
    assert nhwc.features[3].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision/resnet18", "mobilenet_v1", "timm/vit", "torchvision/vit"])
def test_onnxruntime_computes_the_same(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = pu.prune_filters(randomised(NETWORKS[name]()), "l1", 0.5, X[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (X,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, model(X).numpy(), rtol=1e-3, atol=1e-4)


# --- Attention with fewer heads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", [None, "causal", "padding", "both", "float"])
def test_narrow_attention_is_attention_with_zero_heads(batch_first, need_weights, mask):
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(12, 3, batch_first=batch_first).double()
    nn.init.normal_(dense.in_proj_bias)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    x = x if batch_first else x.transpose(0, 1)
    options = dict(need_weights=need_weights, average_attn_weights=False)
    if mask in ("causal", "both"):
        options["attn_mask"] = torch.ones(5, 5, dtype=torch.bool).triu(1)
    if mask == "float":
        options["attn_mask"] = torch.randn(5, 5, dtype=torch.float64)
    if mask in ("padding", "both"):
        options["key_padding_mask"] = torch.tensor([[False] * 5, [False, False, False, True, True]])
    kept = [0, 2]
    narrow = pu.pruning.replay(nn.Sequential(copy.deepcopy(dense)), {"0": {"heads": {"of": 3, "kept": kept}}})[0]
    assert type(narrow) is NarrowAttention and narrow.in_proj_weight.shape == (24, 12)
    for tensor in (dense.in_proj_weight, dense.in_proj_bias):
        tensor.data.view(3, 3, 4, -1)[:, 1] = 0
    wanted, attention = dense(x, x, x, **options)
    found, narrow_attention = narrow(x, x, x, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    if need_weights:
        torch.testing.assert_close(narrow_attention, attention[:, kept], rtol=1e-9, atol=1e-12)
    else:
        assert narrow_attention is None


def test_a_transformer_layer_without_a_head_takes_no_fast_path():
    torch.manual_seed(0)
    dense = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True).double().eval()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    narrow = pu.pruning.replay(copy.deepcopy(dense), {"self_attn": {"heads": {"of": 3, "kept": [1, 2]}}})
    with torch.no_grad():
        dense.self_attn.in_proj_weight.view(3, 3, 4, -1)[:, 0] = 0
        dense.self_attn.in_proj_bias.view(3, 3, 4)[:, 0] = 0
        torch.testing.assert_close(narrow(x), dense(x), rtol=1e-9, atol=1e-12)


def test_unbatched_queries():
    torch.manual_seed(0)
    narrow = pu.pruning.replay(
        nn.Sequential(nn.MultiheadAttention(8, 4, batch_first=True)), {"0": {"heads": {"of": 4, "kept": [3]}}}
    )[0]
    x = torch.randn(5, 8)
    torch.testing.assert_close(narrow(x, x, x)[0], narrow(x[None], x[None], x[None])[0][0])
    assert narrow(x, x, x)[1].shape == (5, 5)
