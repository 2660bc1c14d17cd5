import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pruneutils as pu
from pruneutils.training import dynamic
from pruneutils.training.dynamic import dynamic_sparsity, regrow


def small_net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(96, 5),
        )


def batch(seed=0, n=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(5, (n,), generator=generator)


def pruned_net(sparsity=0.8, seed=0):
    model = small_net(seed)
    pu.prune(model, "random", sparsity, scope="erk", seed=seed)
    return model


def counts(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


def one_layer(weights, mask):
    model = nn.Linear(len(weights), 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weights]))
    pu.set_masks(model, {"weight": torch.tensor([mask], dtype=torch.bool)})
    return model


def test_rigl_drops_the_smallest_and_grows_the_largest_gradient():
    model = one_layer([3.0, -0.1, 0.2, 5.0, 6.0, 7.0], [1, 1, 1, 0, 0, 0])
    model.weight.grad = torch.tensor([[9.0, 0.5, 0.3, 0.1, -2.0, 1.0]])
    masks = regrow(model, 0.6)  # 1.8 of 3: two of them
    assert masks["weight"].tolist() == [[True, False, False, False, True, True]]
    assert model.weight.tolist() == [[3.0, 0.0, 0.0, 0.0, 0.0, 0.0]]


@settings(max_examples=60, deadline=None)
@given(
    sparsity=st.floats(0, 1),
    fraction=st.floats(0, 1),
    grow=st.sampled_from(dynamic.GROWTH),
    seed=st.integers(0, 2**31),
    tied=st.booleans(),
)
@pytest.mark.filterwarnings("ignore::pruneutils.pruning.LayerCollapseWarning")
def test_counts_per_layer_are_constant(sparsity, fraction, grow, seed, tied):
    model = small_net()
    before = pu.prune(model, "random", sparsity, scope="erk", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in pu.prunable_weights(model).items():
        weight.grad = torch.zeros_like(weight) if tied else torch.randn(weight.shape, generator=generator)
        if tied:
            with torch.no_grad():
                weight.copy_(before[name])
    after = regrow(model, fraction, grow, seed=seed)
    assert counts(after) == counts(before)
    for name, weight in pu.prunable_weights(model).items():
        kept = int(before[name].sum())
        grown = after[name] & ~before[name]
        assert int(grown.sum()) <= round(fraction * kept)
        assert not weight[grown | ~after[name]].any()
        if grow == "gradient" and not tied:
            # all that is pruned now has no larger gradient than the smallest grown one
            pruned, magnitude = ~after[name], weight.grad.abs()
            if grown.any() and pruned.any():
                assert magnitude[pruned].max() <= magnitude[grown].min()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
        lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
        lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9),
    ],
    ids=["sgd", "adam", "adamw", "rmsprop"],
)
@pytest.mark.parametrize("grow", dynamic.GROWTH)
def test_grown_weights_start_at_zero_without_optimizer_state_and_then_train(make, grow):
    model = pruned_net()
    optimizer, (inputs, targets) = make(model.parameters()), batch()
    start = counts(pu.get_masks(model))
    for step in range(6):
        optimizer.zero_grad()
        with pu.model_utils.dense_gradients(model):
            F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        before = pu.get_masks(model)
        after = regrow(model, 0.3, grow, seed=step)
        assert counts(after) == start == counts(pu.get_masks(model))
        for name, weight in pu.prunable_weights(model).items():
            idle = ~after[name] | ~before[name]  # pruned, or grown right now
            state = [s for s in optimizer.state[weight].values() if torch.is_tensor(s) and s.shape == weight.shape]
            assert state
            assert not any(s[idle].any() for s in [weight.detach(), *state])
    grown = {name: after[name] & ~before[name] for name in after}
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    assert sum(int(w[grown[n]].count_nonzero()) for n, w in pu.prunable_weights(model).items()) > 0


def test_random_growth_depends_on_the_seed_alone():
    def grown(seed):
        return regrow(pruned_net(), 0.5, "random", seed=seed)

    generator_state = torch.random.get_rng_state()
    first, again, other = grown(1), grown(1), grown(2)
    assert torch.equal(torch.random.get_rng_state(), generator_state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_errors_change_nothing():
    model, free = pruned_net(), small_net()
    with pytest.raises(ValueError, match="has no masks to move"):
        regrow(free, 0.3, "random")
    with pytest.raises(ValueError, match="did you mean 'gradient'"):
        regrow(model, 0.3, "gradients")
    with pytest.raises(ValueError, match=r"fraction must be a fraction in \[0, 1\], not 30"):
        regrow(model, 30, "random")
    with pytest.raises(ValueError, match="no gradient on 0.weight, 3.weight, 6.weight"):
        regrow(model, 0.3)
    before = pu.get_masks(model)
    for weight in pu.prunable_weights(model).values():
        weight.grad = torch.ones_like(weight)
    model[6].weight.grad[0, 0] = float("nan")
    with pytest.raises(ValueError, match="6.weight: some scores are NaN"):
        regrow(model, 0.3)
    assert all(torch.equal(mask, before[name]) for name, mask in pu.get_masks(model).items())
    for wrong in (dict(every=0), dict(every=1.5), dict(until=2), dict(initial=-1), dict(grow="rigl")):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            dynamic_sparsity(**wrong)


def test_the_hook_moves_at_its_steps_only_with_the_fraction_of_its_time(monkeypatch):
    calls = []
    monkeypatch.setattr(dynamic, "regrow", lambda model, fraction, grow, seed: calls.append((fraction, seed)))
    hook = dynamic_sparsity("random", every=10, until=0.5, initial=0.4, seed=3)
    moved = []
    for step in range(1, 101):
        before = len(calls)
        hook(None, step, 100)
        moved += [step] * (len(calls) - before)
    assert moved == [10, 20, 30, 40]
    cosines = [0.2 * (1 + math.cos(math.pi * t)) for t in (0.2, 0.4, 0.6, 0.8)]
    assert [fraction for fraction, _ in calls] == pytest.approx(cosines)
    assert len({seed for _, seed in calls}) == 4


@pytest.mark.parametrize("seed", [0, 7])
def test_random_growth_does_not_undo_the_drop_where_the_masks_come_from_the_same_seed(seed):
    model = nn.Linear(100, 50)
    before = pu.prune(model, "random", 0.9, seed=seed)["weight"]
    after = regrow(model, 0.4, "random", seed=seed)["weight"]
    stayed = int((before & after).sum()) - 300  # of the 200 dropped; 4.3 % of them by chance
    assert stayed < 40
