"""Optimizers after filters were removed: every parameter alive, state cut by index, and no step that trains nothing."""

import copy
import gc

import pytest
import torch
from torch import nn

import pruneutils as pu

X = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
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


@pytest.mark.parametrize("kind", ["sgd", "adamw", "fused", "rmsprop", "rprop"])
def test_state_is_cut_by_the_same_indices(kind):
    model, optimizer = trained(kind)
    old = {name: copy.deepcopy(optimizer.state[p]) for name, p in model.named_parameters()}
    pu.prune_filters(model, "l1", 0.3, X[:1])
    pu.prune_filters(model, "l1", 0.3, X[:1])  # two removals, one rebinding
    assert pu.rebind_optimizer(optimizer, model) is optimizer
    assert len(optimizer.state) == len(old)
    for name, p in model.named_parameters():
        assert set(optimizer.state[p]) == set(old[name])
        for key, value in optimizer.state[p].items():
            before = old[name][key]
            if torch.is_tensor(before) and before.ndim:
                assert torch.equal(value, cut_by_record(model, name, before)), (name, key)
            else:
                assert value == before
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert held == [id(p) for p in model.parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer)
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before)]
    assert any(moved) if kind == "rprop" else all(moved)  # which waits where a gradient has changed its sign


def test_the_next_step_is_that_of_the_masked_network():
    """Removing filters and their momentum is the same as a network that never had them."""
    model, optimizer = trained("sgd")
    masked = copy.deepcopy(model)
    pu.prune_filters(model, "l1", 0.4, X[:1], optimizer=optimizer)
    twin = torch.optim.SGD(masked.parameters(), lr=0.01, momentum=0.9)
    state = {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()}
    for name, p in masked.named_parameters():  # everything that is cut is zero, and reads nothing
        kept = cut_by_record(model, name, torch.arange(p.numel()).view(p.shape)).flatten()
        values, momentum = torch.zeros(p.numel()), torch.zeros(p.numel())
        values[kept] = dict(model.named_parameters())[name].detach().flatten()
        momentum[kept] = state[name].flatten()
        p.data.copy_(values.view(p.shape))
        twin.state[p]["momentum_buffer"] = momentum.view(p.shape)
    step(model, optimizer)
    step(masked, twin)
    for name, p in masked.named_parameters():
        torch.testing.assert_close(
            cut_by_record(model, name, p.detach()), dict(model.named_parameters())[name].detach()
        )


def test_momentum_can_be_dropped():
    model, optimizer = trained("adamw")
    pu.prune_filters(model, "l1", 0.3, X[:1], optimizer=optimizer, preserve_momentum=False)
    assert not optimizer.state
    step(model, optimizer)


def test_state_of_another_shape_starts_anew():
    model, optimizer = trained("adafactor")  # rows and columns
    pu.prune_filters(model, "l1", 0.3, X[:1], optimizer=optimizer)
    assert model.conv2.weight not in optimizer.state
    step(model, optimizer)


def test_lbfgs_starts_anew():
    model = pu.models.create("lenet300")
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), torch.arange(8))
        loss.backward()
        return loss

    first = optimizer.step(closure)
    pu.prune_filters(model, "l1", 0.3, X[:1], optimizer=optimizer)
    optimizer.step(closure)
    assert closure() < first


def test_groups_schedulers_and_closures_live_on():
    model = pu.models.create("lenet5")
    groups = [{"params": [model.fc2.weight], "lr": 0.5}, {"params": [*model.conv2.parameters()], "weight_decay": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    pu.prune_filters(model, "l1", 0.3, X[:1], optimizer=optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2]
    assert optimizer.param_groups[0]["params"][0] is model.fc2.weight and optimizer.param_groups[0]["lr"] == 0.5
    step(model, optimizer)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_a_forgotten_optimizer_is_noticed():
    model, optimizer = trained()
    pu.prune_filters(model, "l1", 0.3, X[:1])
    with pytest.raises(RuntimeError, match=r"parameters of this SGD are from before prune_filters.*rebind_optimizer"):
        step(model, optimizer)
    new = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, new)


def test_other_optimizers_are_left_alone():
    model, optimizer = trained()
    other, others_optimizer = trained("adamw")
    pu.prune_filters(model, "l1", 0.3, X[:1])
    step(other, others_optimizer)
    with pytest.raises(ValueError, match="this AdamW holds no parameter of this Sequential"):
        pu.rebind_optimizer(others_optimizer, model)
    assert len(others_optimizer.state) == 8


def test_nothing_is_remembered_of_parameters_that_nobody_holds():
    from pruneutils.pruning._slicing import SUCCESSORS

    gc.collect()
    before = len(SUCCESSORS)
    model = pu.models.create("lenet5")
    pu.prune_filters(model, "l1", 0.3, X[:1])
    gc.collect()
    assert len(SUCCESSORS) == before
