"""Optimizers after filters were removed: every parameter alive, state cut by index, and no step that trains nothing."""

import copy
import gc

import pytest
import torch
from torch import nn

import pruneutils as pu
from pruneutils.filters.rebinding import SUCCESSORS

X = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
}


def step(model, optimizer):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(X), torch.arange(8)).backward()
    optimizer.step()


def trained(kind="sgd"):
    model = pu.models.create("lenet5")
    optimizer = OPTIMIZERS[kind](model.parameters())
    for _ in range(3):
        step(model, optimizer)
    return model, optimizer


def cut_by_record(model, name, tensor):
    layer, _, part = name.rpartition(".")
    for role, entry in model.removed.get(layer, {}).items():
        if part == "weight" or role == "out":
            tensor = tensor.index_select(0 if role == "out" else 1, torch.tensor(entry["kept"]))
    return tensor


@pytest.mark.parametrize("kind", ["sgd", "adamw", "fused"])
def test_state_is_cut_by_the_same_indices(kind):
    model, optimizer = trained(kind)
    old = {name: copy.deepcopy(optimizer.state[p]) for name, p in model.named_parameters()}
    for _ in range(2):  # two removals, one rebinding
        pu.prune_filters(model, "l1", 0.3, X[:1])
    assert pu.filters.rebind_optimizer(optimizer, model) is optimizer
    for name, p in model.named_parameters():
        assert set(optimizer.state[p]) == set(old[name])
        for key, value in optimizer.state[p].items():
            before = old[name][key]
            is_weights = torch.is_tensor(before) and before.ndim
            assert torch.equal(value, cut_by_record(model, name, before)) if is_weights else value == before
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert held == [id(p) for p in model.parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer)
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before))


@pytest.mark.parametrize(("kind", "keep"), [("adamw", False), ("adafactor", True)])
def test_state_that_is_dropped_or_of_another_shape_starts_anew(kind, keep):
    model, optimizer = trained(kind)
    pu.prune_filters(model, "l1", 0.3, X[:1], optimizer=optimizer, preserve_momentum=keep)
    assert model.conv2.weight not in optimizer.state
    step(model, optimizer)


def test_a_forgotten_optimizer_is_noticed_and_others_are_left_alone():
    model, optimizer = trained()
    other, others_optimizer = trained("adamw")
    pu.prune_filters(model, "l1", 0.3, X[:1])
    with pytest.raises(RuntimeError, match=r"parameters of this SGD are from before prune_filters.*rebind_optimizer"):
        step(model, optimizer)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    step(other, others_optimizer)
    with pytest.raises(ValueError, match="this AdamW holds no parameter of this Sequential"):
        pu.filters.rebind_optimizer(others_optimizer, model)
    assert len(others_optimizer.state) == 8


def test_nothing_is_remembered_of_parameters_that_nobody_holds():
    gc.collect()
    before = len(SUCCESSORS)
    model = pu.models.create("lenet5")
    pu.prune_filters(model, "l1", 0.3, X[:1])
    gc.collect()
    assert len(SUCCESSORS) == before
