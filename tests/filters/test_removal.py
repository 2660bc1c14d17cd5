"""Filters removed: the smaller network computes what the masked one does, ratios are met, errors change nothing."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pruneutils as pu
from pruneutils import _torchvision
from pruneutils.filters.surgery import analyse
from pruneutils.target import Target

TIMM_VIT = dict(img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=3)
VIT = dict(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=7)
PLAIN = ["vgg16_bn", "resnet20", "mobilenet_v1", "torchvision/resnet18", "torchvision/mobilenet_v2"]
NETWORKS = dict.fromkeys([*PLAIN, "timm/efficientnet_lite0", "torchvision/vit"], {})
NETWORKS |= {"lenet5": dict(in_channels=3, image_size=32), "timm/vit_tiny_patch16_224": TIMM_VIT}
SLOW = dict.fromkeys(["torchvision/densenet121", "timm/resnext50_32x4d", "torchvision/shufflenet_v2_x0_5"], {})
SLOW |= {"torchvision/googlenet": dict(init_weights=False, aux_logits=False)}
X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def create(name):
    if name == "torchvision/vit":
        return _torchvision.load().models.VisionTransformer(**VIT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pu.models.create(name, **(NETWORKS | SLOW)[name])


def randomised(name, seed=0):
    """Statistics, scales and biases that are not all the same, so that a channel at the wrong place shows."""
    model, generator = create(name), torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.min() == tensor.max():
            tensor.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


@torch.no_grad()
def zeroed(dense, removed):
    """The dense model with the filters that were removed set to zero, and what batch norm makes of them."""
    model = copy.deepcopy(dense)
    for layer, roles in removed.items():
        module = model.get_submodule(layer)
        for role, entry in roles.items():
            gone = [i for i in range(entry["of"]) if i not in set(entry["kept"])]
            for part in ("weight", "bias"):
                if role == "out" and getattr(module, part) is not None:
                    getattr(module, part)[gone] = 0
                elif role == "heads":
                    rows = getattr(module.qkv, part) if hasattr(module, "qkv") else getattr(module, f"in_proj_{part}")
                    rows.view(3, entry["of"], module.head_dim, -1)[:, gone] = 0
    return model


@torch.no_grad()
def assert_equal_outputs(model, other, tolerance=1e-5):
    wanted, found = other(X), model(X)
    assert wanted.abs().max() > 1e-3 and (wanted - found).abs().max() <= tolerance * wanted.abs().max()


def n_gone(model):
    table = pu.filters.filter_table(model)
    return int((table.before - table.after).sum())


# --- What is left computes what it should ----------------------------------------------------------------------------


CASES = [(name, "macs") for name in NETWORKS] + [pytest.param(name, "macs", marks=pytest.mark.slow) for name in SLOW]
CASES += [(name, of) for name in ("resnet20", "timm/vit_tiny_patch16_224") for of in ("filters", "parameters")]


@pytest.mark.parametrize(("name", "of"), CASES)
def test_the_removed_network_agrees_with_the_masked_one_and_meets_the_ratio(name, of):
    dense = randomised(name)
    model, groups = copy.deepcopy(dense), analyse(Target.of(dense), X)[0]
    weights = {name: len(units) for group in groups for name, units in group.filters.items()}
    assert pu.prune_filters(model, "l1", ratio=0.5, example_inputs=X[:1], of=of, min_density=0.05) is model
    assert_equal_outputs(model, zeroed(dense, model.removed))
    assert type(model) is type(dense) and list(model.state_dict()) == list(dense.state_dict())
    again = pu.filters.replay(create(name), json.loads(json.dumps(model.removed)))
    again.load_state_dict(model.state_dict())
    for twin in (again.eval(), pickle.loads(pickle.dumps(model))):
        assert_equal_outputs(twin, model, 0)
    after = {name: len(p) for name, p in model.named_parameters() if name in weights}
    assert min(after.values()) >= 1
    if of == "filters":
        unit = max(sum(map(len, group.filters.values())) // group.n_units for group in groups)
        assert abs(sum(after.values()) - sum(weights.values()) / 2) <= unit
    else:
        left = getattr(pu.cost(model, X), of) / getattr(pu.cost(dense, X), of)
        assert abs(left - 0.5) < (0.005 if name in ("vgg16_bn", "torchvision/resnet18", "mobilenet_v1") else 0.02)


def test_the_lowest_filters_go_and_the_best_of_each_layer_stays():
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
    assert pu.filters.filter_table(model).round(3).values.tolist() == [["0", 6, 4, 0.333], ["2", 5, 1, 0.8]]


class Shortcut(nn.Sequential):
    def forward(self, x):
        return torch.relu(x + super().forward(x))


def test_coupled_filters_share_their_mean_score():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4), Shortcut(nn.Linear(4, 4)), nn.Linear(4, 2))
    scores = {"0.weight": torch.full((3,), 9.0), "4.weight": torch.zeros(2)}
    scores |= {"2.weight": torch.tensor([0.0, 3, 1, 5]), "3.0.weight": torch.tensor([7.0, 1, 2, 5])}
    pu.prune_filters(model, lambda model, data: scores, 4 / 11, torch.rand(2, 2))  # the means are 3.5, 2, 1.5 and 5
    assert model.removed["2"]["out"]["kept"] == model.removed["3.0"]["out"]["kept"] == [0, 3]


@pytest.mark.parametrize("rounds", [1, 20])
def test_ties_go_by_position_and_min_density_counts_the_filters_before_the_first_round(rounds):
    model = nn.Sequential(nn.Linear(2, 40), nn.Linear(40, 40), nn.Linear(40, 2))
    first_layer_first = lambda model, data: {f"{i}.weight": torch.full((len(model[i].weight),), i) for i in range(3)}  # noqa: E731
    pu.prune_filters(model, first_layer_first, 0.4, torch.rand(1, 2), rounds, min_density=0.25)
    assert model.removed["0"]["out"]["kept"] == list(range(30, 40))
    assert model.removed["1"]["out"]["kept"] == list(range(2, 40))


# --- What stays ------------------------------------------------------------------------------------------------------


def test_excluded_layers_stay():
    exclude = ["layer3.0.conv1", "layer3.1.*", "layer3.2.conv1.weight"]
    model = pu.prune_filters(create("resnet20"), "l1", 0.5, X[:1], exclude=exclude)
    assert all(block.conv1.out_channels == 64 for block in model.layer3)
    assert n_gone(model) == 72  # of 144


def test_masks_are_cut_with_their_weights_and_still_hold():
    model = randomised("torchvision/resnet18")
    pu.prune(model, "magnitude", 0.7)
    masks, dense = pu.get_masks(model), copy.deepcopy(model)
    pu.prune_filters(model, "l1", 0.4, X[:1])
    for name, mask in pu.get_masks(model).items():
        for role, entry in model.removed.get(name.removesuffix(".weight"), {}).items():
            masks[name] = masks[name].index_select(0 if role == "out" else 1, torch.tensor(entry["kept"]))
        assert torch.equal(mask, masks[name])
    assert_equal_outputs(model, zeroed(dense, model.removed))
    model(X).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-3).step()
    assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in masks.items())


# --- When it goes wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(criterion="mag_base"), ValueError, "'mag_base'.*'mag_based'"),
        (dict(criterion="tfo"), ValueError, "'tfo' needs data"),
        (dict(criterion="l1", T=3), TypeError, "'l1' has no option T"),
        (dict(criterion=lambda model, data: {}), ValueError, "conv1"),
        (dict(criterion=lambda m, d: {"conv1.weight": torch.ones(3)}), ValueError, "conv1.weight has 20 filters"),
        (dict(criterion=lambda m, d: {"conv1.weight": torch.full((20,), torch.nan)}), ValueError, "conv1.weight.*NaN"),
        (dict(ratio=1.0), ValueError, r"at most 0\.9\d* of the filters can go"),
        (dict(ratio=0.99, of="macs", exclude="conv1"), ValueError, r"of the macs can go.*conv1 is excluded"),
        (dict(ratio=[0.5, 0.3]), ValueError, "ascending"),
        (dict(exclude="*"), ValueError, "no filter can be removed"),
        (dict(example_inputs=torch.rand(0, 1, 28, 28)), TypeError, r"needs example_inputs.*\(0, 1, 28, 28\)"),
    ],
)
def test_wrong_arguments_are_named_before_anything_changes(arguments, error, message):
    model = pu.models.create("lenet5")
    with pytest.raises(error, match=message):
        pu.prune_filters(model, **dict(criterion="l1", ratio=0.5, example_inputs=torch.rand(1, 1, 28, 28)) | arguments)
    assert model.conv1.out_channels == 20 and not hasattr(model, "removed")


def test_wrappers_keep_their_plain_names_and_a_record_of_another_kind_is_not_overwritten():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.rand(2, 3)
    for wrapper in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert pu.prune_filters(wrapper, "l1", 1 / len(model[0].weight), x) is wrapper
        assert model.removed.keys() == {"0", "1"}
    assert len(model[0].weight) == 2
    model.removed = 3
    other = {"has an attribute `removed`": model, "before .* scripted": torch.jit.script(nn.Linear(3, 4))}
    for message, model in (other | {"not `meta`": nn.Linear(3, 4, device="meta")}).items():
        with pytest.raises(ValueError, match=message):
            pu.prune_filters(model, "l1", 0.5, x)


# --- Rounds ----------------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.floats(0.01, 0.99), st.integers(1, 40))
def test_the_front_loaded_schedule_is_the_published_one(p, n):
    left = 1.0
    for k in range(1, n + 1):
        left *= 1 - p / (k * p + n * (1 - p))
        assert 1 - pu.pruning.sparsity_at(k / n, p, schedule="front_loaded") == pytest.approx(left, abs=1e-9)
    assert left == pytest.approx(1 - p, abs=1e-9)


@pytest.mark.parametrize(("ratio", "rounds"), [(0.75, 6), ([0.1, 0.5, 0.8], 1)])
def test_every_round_removes_what_is_asked_for_and_scores_anew(ratio, rounds):
    gone, sizes = [], []

    def watching(model, weights):
        sizes.append(sum(p.numel() for p in model.parameters()))
        return {name: w.detach().flatten(1).norm(dim=1) for name, w in weights.items()}

    model = create("vgg16_bn")
    pu.prune_filters(model, watching, ratio, X[:1], rounds, on_round=lambda model, number: gone.append(n_gone(model)))
    if rounds > 1:
        progress = [k / rounds for k in range(1, rounds + 1)]
        ratio = [pu.pruning.sparsity_at(each, ratio, schedule="front_loaded") for each in progress]
    assert gone == [round(4224 * each) for each in ratio]
    assert sorted(set(sizes), reverse=True) == sizes and len(sizes) == len(gone)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ({"conv3": {"out": {"of": 4, "kept": [0]}}}, "conv3"),
        ({"conv1": {"out": {"of": 21, "kept": [0]}}}, "conv1 has 20 channels"),
        ({"conv1": {"out": {"of": 20, "kept": []}}}, "ascending"),
        ({"conv1": {"heads": {"of": 20, "kept": [1]}}}, "heads"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(removed, message):
    with pytest.raises(ValueError, match=message):
        pu.filters.replay(pu.models.create("lenet5"), removed)
