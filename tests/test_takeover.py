"""Masks of torch.nn.utils.prune become masks of this package; what cannot be taken over changes nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune as torch_prune

from pruneutils import target
from pruneutils.takeover import take_over


def test_masks_of_torch_are_taken_over():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))
    plain = copy.deepcopy(model)
    x, y = torch.randn(8, 1, 6, 6), torch.randint(0, 3, (8,))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    torch_prune.global_unstructured([(model[0], "weight"), (model[3], "weight")], torch_prune.L1Unstructured, amount=50)
    torch_prune.ln_structured(model[0], "weight", 1, n=2, dim=0)
    masks = {"0.weight": model[0].weight_mask.bool().clone(), "3.weight": model[3].weight_mask.bool().clone()}
    outputs, parameters = model(x), [model[0].weight_orig, model[3].weight_orig]
    found = take_over(model)
    assert found.keys() == masks.keys() and all(torch.equal(found[name], masks[name]) for name in masks)
    assert model[0].weight is parameters[0] and model[3].weight is parameters[1]
    assert torch.equal(model(x), outputs) and model.state_dict().keys() == plain.state_dict().keys()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert not any(model.get_parameter(name)[~mask].any() for name, mask in masks.items())
    assert not torch.equal(model(x), outputs)


def test_what_cannot_be_taken_over_changes_nothing(monkeypatch):
    monkeypatch.setattr(target, "RULES", dict(target.RULES))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="torch.nn.utils.prune has pruned nothing in Sequential"):
        take_over(model)
    torch_prune.random_unstructured(model[0], "weight", 0.5)
    torch_prune.random_unstructured(model[0], "bias", 0.5)
    with pytest.raises(ValueError, match="0.bias of Linear"):
        take_over(model)
    assert torch_prune.is_pruned(model[0]) and "weight_orig" in model[0]._parameters
    target.prunable(nn.Linear, "weight", "bias")
    assert set(take_over(model)) == {"0.weight", "0.bias"} and not torch_prune.is_pruned(model)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    torch_prune.l1_unstructured(tied[0], "weight", 0.5)
    with pytest.raises(ValueError, match="0.weight is shared with another layer"):
        take_over(tied)
    odd = nn.Sequential(nn.Linear(4, 4))
    torch_prune.custom_from_mask(odd[0], "weight", torch.full((4, 4), 0.5))
    with pytest.raises(ValueError, match="0.weight: its mask holds numbers other than 0 and 1"):
        take_over(odd)
