"""What PyTorch asks of its own pruning (test/nn/test_pruning.py), asked of this package: both agree where both can."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import pruneutils as pu

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


@pytest.mark.parametrize("share", [0.0, 0.2, 1 / 3, 0.75, 1.0])
@pytest.mark.filterwarnings("ignore::pruneutils.pruning.LayerCollapseWarning")
def test_a_pruned_layer_is_the_old_one_times_the_mask(layer, share):
    """torch renames the weight to weight_orig and adds weight_mask; here names, objects and order stay."""
    module, x = layer
    weight, names, zeroed = module.weight, list(module.state_dict()), copy.deepcopy(module)
    mask = pu.prune(module, "random", share)["weight"]
    assert int((~mask).sum()) == round(share * mask.numel())
    zeroed.weight.data.mul_(mask)
    assert torch.equal(module.weight, zeroed.weight) and torch.equal(module(x), zeroed(x))
    assert module.weight is weight and list(module.state_dict()) == names
    assert not module._forward_pre_hooks and not torch_prune.is_pruned(module)


@pytest.mark.parametrize("norm", [1, 2])
def test_structured_pruning_agrees_where_both_can_do_it(norm):
    """torch prunes channels along any dimension; here these are filters, along the first."""
    torch.manual_seed(0)
    ours = nn.Conv2d(3, 8, 3)
    theirs = copy.deepcopy(ours)
    masks = pu.prune(ours, lambda model, data: {"weight": model.weight.abs() ** norm}, 0.5, granularity="filter")
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


@pytest.mark.parametrize(
    "method",
    [
        lambda m: torch_prune.random_unstructured(m, "weight", 0.3),
        lambda m: torch_prune.ln_structured(m, "weight", 1, n=float("inf"), dim=0),
        lambda m: torch_prune.identity(m, "weight"),
        lambda m: torch_prune.l1_unstructured(torch_prune.ln_structured(m, "weight", 1, 2, 0), "weight", 3),
    ],
)
def test_everything_that_torch_can_do_is_taken_over(layer, method):
    module, x = layer
    names, weight = set(module.state_dict()), module.weight
    method(module)
    mask, outputs = module.weight_mask.bool().clone(), module(x)
    assert torch.equal(pu.takeover.take_over(module)["weight"], mask) and torch.equal(module(x), outputs)
    assert module.weight is weight and set(module.state_dict()) == names
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pu.TiedScoresWarning)
        more = pu.prune(module, "magnitude", min(1.0, (~mask).float().mean().item() + 0.1))["weight"]
    assert (more <= mask).all()


def test_what_cannot_be_taken_over_changes_nothing(monkeypatch):
    monkeypatch.setattr(pu.target, "RULES", dict(pu.target.RULES))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="torch.nn.utils.prune has pruned nothing in Sequential"):
        pu.takeover.take_over(model)
    torch_prune.random_unstructured(model[0], "weight", 0.5)
    torch_prune.random_unstructured(model[0], "bias", 0.5)
    with pytest.raises(ValueError, match="0.bias of Linear"):
        pu.takeover.take_over(model)
    assert torch_prune.is_pruned(model[0]) and "weight_orig" in model[0]._parameters
    pu.target.prunable(nn.Linear, "weight", "bias")
    assert set(pu.takeover.take_over(model)) == {"0.weight", "0.bias"} and not torch_prune.is_pruned(model)
    odd = nn.Sequential(nn.Linear(4, 4))
    torch_prune.custom_from_mask(odd[0], "weight", torch.full((4, 4), 0.5))
    with pytest.raises(ValueError, match="0.weight: its mask holds numbers other than 0 and 1"):
        pu.takeover.take_over(odd)
