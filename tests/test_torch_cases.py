"""What PyTorch asks of its own pruning (test/nn/test_pruning.py), asked of this package; what it refuses is named."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import pruneutils as pu
from pruneutils import _prunable

LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 6, 2), (2, 3, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 6, 2), (2, 3, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (2, 2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 6, 2), (2, 3, 5, 5)),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    return make(), torch.randn(shape)


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setattr(_prunable, "RULES", dict(_prunable.RULES))


# --- Amounts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [-0.1, 1.1, float("nan"), float("inf"), "0.5", None, True, 2, 20])
def test_amounts_that_are_no_fraction_are_refused(layer, amount):
    """torch takes a whole number as a number of weights; here the error says which fraction to write instead."""
    before = copy.deepcopy(layer[0].state_dict())
    with pytest.raises(ValueError, match="^sparsity must be a fraction in "):
        pu.prune(layer[0], "random", amount)
    assert all(torch.equal(value, before[name]) for name, value in layer[0].state_dict().items())
    assert not pu.get_masks(layer[0])


@pytest.mark.parametrize("share", [0.0, 0.2, 1 / 3, 0.5, 0.75])
def test_a_share_is_rounded_to_whole_weights(layer, share):
    module, _ = layer
    assert pu.prune(module, "random", share).sparsity == pytest.approx(
        round(share * module.weight.numel()) / module.weight.numel()
    )


# --- One call --------------------------------------------------------------------------------------------------------


def test_the_layer_keeps_its_parameters_and_hooks_nothing_into_forward(layer):
    """torch renames the weight to weight_orig and adds weight_mask; here names, objects and order stay."""
    module, _ = layer
    weight, names = module.weight, list(module.state_dict())
    pu.prune(module, "random", 0.5)
    assert module.weight is weight and list(module.state_dict()) == names
    assert not module._forward_pre_hooks and not torch_prune.is_pruned(module)


def test_the_weight_is_the_old_one_times_the_mask(layer):
    module, x = layer
    before, zeroed = module.weight.detach().clone(), copy.deepcopy(module)
    mask = pu.prune(module, "random", 0.4)["weight"]
    assert torch.equal(module.weight, before * mask)
    zeroed.weight.data.mul_(mask)
    assert torch.equal(module(x), zeroed(x))


def test_an_amount_of_zero_changes_nothing_and_one_leaves_nothing(layer):
    module, x = layer
    before = module(x)
    assert pu.prune(module, "magnitude", 0.0).kept == module.weight.numel() and torch.equal(module(x), before)
    with pytest.warns(pu.LayerCollapseWarning):
        assert pu.prune(module, "magnitude", 1.0).kept == 0
    assert not module.weight.any()


def test_random_masks_differ_by_seed_and_only_by_it(layer):
    masks = [pu.prune(copy.deepcopy(layer[0]), "random", 0.5, seed=seed)["weight"] for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_the_smallest_go_first():
    module = nn.Linear(4, 2, bias=False)
    module.weight.data = torch.tensor([[4.0, -1.0, 2.0, -3.0], [0.5, 5.0, -6.0, 7.0]])
    assert pu.prune(module, "magnitude", 0.375)["weight"].tolist() == [[1, 0, 0, 1], [0, 1, 1, 1]]
    ours, theirs = pu.prune(module, "magnitude", 0.5)["weight"], nn.Linear(4, 2, bias=False)
    theirs.weight.data = torch.tensor([[4.0, -1.0, 2.0, -3.0], [0.5, 5.0, -6.0, 7.0]])
    torch_prune.l1_unstructured(theirs, "weight", 0.5)
    assert torch.equal(ours, theirs.weight_mask.bool())


@pytest.mark.parametrize("norm", [1, 2])
def test_structured_pruning_agrees_where_both_can_do_it(norm):
    """torch prunes channels along any dimension; here these are filters, along the first."""
    torch.manual_seed(0)
    ours, data = nn.Conv2d(3, 8, 3), None
    theirs = copy.deepcopy(ours)

    def power(model, data):
        return {"weight": model.weight.abs() ** norm}

    masks = pu.prune(ours, power, 0.5, granularity="filter", data=data)
    torch_prune.ln_structured(theirs, "weight", 0.5, n=norm, dim=0)
    assert torch.equal(masks["weight"], theirs.weight_mask.bool())


def test_global_pruning_agrees():
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    theirs = copy.deepcopy(ours)
    masks = pu.prune(ours, "magnitude", 0.7)
    torch_prune.global_unstructured(
        [(theirs[0], "weight"), (theirs[3], "weight")], torch_prune.L1Unstructured, amount=0.7
    )
    assert all(torch.equal(masks[f"{i}.weight"], theirs[i].weight_mask.bool()) for i in (0, 3))


def test_importance_scores_may_come_from_elsewhere(layer):
    module, _ = layer
    scores = torch.rand(module.weight.shape)
    theirs = copy.deepcopy(module)
    masks = pu.prune(module, lambda model, data: {"weight": scores}, 0.5)
    torch_prune.l1_unstructured(theirs, "weight", 0.5, importance_scores=scores)
    assert torch.equal(masks["weight"], theirs.weight_mask.bool())
    with pytest.raises(ValueError, match="weight has shape"):
        pu.prune(module, lambda model, data: {"weight": scores.flatten()}, 0.6)


def test_masks_of_ones_own(layer):
    module, _ = layer
    mask = torch.rand(module.weight.shape) < 0.5
    pu.set_masks(module, {"weight": mask.float()})
    assert torch.equal(pu.get_masks(module)["weight"], mask) and not module.weight[~mask].any()
    for wrong, message in ((mask[:1], "the mask has shape"), (mask * 0.5, "holds only 0 and 1")):
        with pytest.raises(ValueError, match=message):
            pu.set_masks(module, {"weight": wrong})
    with pytest.raises(ValueError, match="no prunable weight is called 'wieght'; did you mean 'weight'"):
        pu.set_masks(module, {"wieght": mask})
    other = ~mask
    pu.set_masks(module, {"weight": other})  # torch multiplies the two; here the new one takes its place
    assert torch.equal(pu.get_masks(module)["weight"], other)


# --- Several calls ---------------------------------------------------------------------------------------------------


def test_calls_add_up(layer):
    """torch prunes a share of what is left; here a share of all, what is pruned already included."""
    module, _ = layer
    first = pu.prune(module, "random", 0.3)["weight"]
    second = pu.prune(module, "magnitude", 0.6)["weight"]
    assert (second <= first).all() and int((~second).sum()) == round(0.6 * second.numel())
    assert torch.equal(pu.prune(module, "random", 0.6)["weight"], second)
    with pytest.raises(ValueError, match="pruned already"):
        pu.prune(module, "random", 0.3)


def test_filters_after_weights():
    torch.manual_seed(0)
    module = nn.Conv2d(3, 4, 3)
    first = pu.prune(module, "magnitude", 0.25)["weight"]
    second = pu.prune(module, "magnitude", 0.5, granularity="filter")["weight"]
    assert (second <= first).all() and any(not row.any() for row in second)


# --- Training --------------------------------------------------------------------------------------------------------


def test_gradients_of_pruned_weights_are_zero(layer):
    module, x = layer
    mask = pu.prune(module, "random", 0.5)["weight"]
    module(x).square().sum().backward()
    assert not module.weight.grad[~mask].any() and module.weight.grad[mask].all()


def test_a_loop_of_ones_own_keeps_the_zeros(layer):
    module, x = layer
    mask = pu.prune(module, "random", 0.5)["weight"]
    before = module.weight.detach().clone()
    for _ in range(3):
        module.zero_grad()
        module(x).square().sum().backward()
        for parameter in module.parameters():
            parameter.data -= 0.01 * parameter.grad
    assert not module.weight[~mask].any() and not torch.equal(module.weight, before)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_optimizers_keep_the_zeros(layer, make):
    module, x = layer
    optimizer = make(module.parameters(), lr=0.01, weight_decay=0.1)
    module(x).square().sum().backward()
    optimizer.step()
    mask = pu.prune(module, "random", 0.5)["weight"]
    for _ in range(3):
        module(x).square().sum().backward()
        optimizer.step()
    assert not module.weight[~mask].any()


# --- Removing, copying, storing --------------------------------------------------------------------------------------


def test_made_permanent_it_is_an_ordinary_layer(layer):
    module, x = layer
    pu.prune(module, "random", 0.5)
    outputs = module(x)
    assert pu.make_permanent(module) is module and torch.equal(module(x), outputs) and not pu.get_masks(module)
    module(x).square().sum().backward()
    assert module.weight.grad.all()
    assert pu.make_permanent(nn.Linear(2, 2)) is not None  # torch raises where nothing is pruned; here nothing happens


def test_copies_and_pickles_are_pruned_too(layer):
    module, x = layer
    mask = pu.prune(module, "random", 0.5)["weight"]
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(pu.get_masks(copied)["weight"], mask) and torch.equal(copied(x), module(x))
        pu.make_permanent(copied)
    assert pu.get_masks(module)


def test_state_dicts_load_into_unpruned_layers_and_back(layer):
    module, x = layer
    plain, before = copy.deepcopy(module), module(x)
    pu.prune(module, "random", 0.5)
    assert not torch.equal(before, module(x))
    dense = copy.deepcopy(plain.state_dict())
    plain.load_state_dict(module.state_dict())
    assert torch.equal(plain(x), module(x)) and not pu.get_masks(plain)
    module.load_state_dict(dense)  # masks hold
    assert torch.equal(plain.weight != 0, module.weight != 0)


# --- Other types -----------------------------------------------------------------------------------------------------


def test_biases_on_request():
    module = nn.Linear(6, 6)
    with pytest.raises(ValueError, match="no prunable weight is called 'bias'; known: weight"):
        pu.set_masks(module, {"bias": torch.zeros(6)})
    pu.prunable(nn.Linear, "weight", "bias")
    assert pu.prune(module, "random", {"bias": 0.5})["bias"].sum() == 3 and (module.bias == 0).sum() == 3


def test_recurrent_weights_on_request():
    module = nn.Sequential(nn.LSTM(4, 3, num_layers=2))
    with pytest.raises(ValueError, match="nothing to prune; pu.prunable makes other types prunable"):
        pu.prune(module, "magnitude", 0.5)
    pu.prunable(nn.LSTM, "weight_*")
    masks = pu.prune(module, "magnitude", 0.5, exclude="0.weight_hh_l1")
    assert list(masks) == ["0.weight_ih_l0", "0.weight_hh_l0", "0.weight_ih_l1"]
    x = torch.randn(5, 2, 4)
    module(x)[0].square().sum().backward()
    assert all(not module.get_parameter(name).grad[~mask].any() for name, mask in masks.items())


# --- Models that torch has pruned ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        lambda m: torch_prune.random_unstructured(m, "weight", 0.3),
        lambda m: torch_prune.l1_unstructured(m, "weight", 4),
        lambda m: torch_prune.random_structured(m, "weight", 1, dim=1),
        lambda m: torch_prune.ln_structured(m, "weight", 1, n=float("inf"), dim=0),
        lambda m: torch_prune.identity(m, "weight"),
        lambda m: torch_prune.l1_unstructured(torch_prune.ln_structured(m, "weight", 1, 2, 0), "weight", 3),
    ],
)
def test_everything_that_torch_can_do_is_taken_over(layer, method):
    module, x = layer
    method(module)
    mask, outputs = module.weight_mask.bool().clone(), module(x)
    assert torch.equal(pu.take_over(module)["weight"], mask) and torch.equal(module(x), outputs)
    total = mask.numel()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pu.TiedScoresWarning)
        more = pu.prune(module, "magnitude", min(1.0, int((~mask).sum()) / total + 0.1))["weight"]
    assert (more <= mask).all()
