import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pruneutils as pu
from pruneutils.controls import inverted, overlap, redraw, shuffle_masks


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1, 8, 8, generator=generator), torch.randint(5, (8,), generator=generator)


shapes = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple), min_size=1, max_size=4)


def masks_of(shapes, density, seed):
    generator = torch.Generator().manual_seed(seed)
    return {f"{i}.weight": torch.rand(shape, generator=generator) < density for i, shape in enumerate(shapes)}


# --- Shuffled masks --------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(shapes=shapes, density=st.floats(0, 1), seed=st.integers(0, 2**40))
def test_shuffling_keeps_each_layers_count(shapes, density, seed):
    masks = masks_of(shapes, density, 0)
    shuffled = shuffle_masks(masks, seed)
    assert list(shuffled) == list(masks)
    for name, mask in shuffled.items():
        assert mask.shape == masks[name].shape and mask.dtype == torch.bool
        assert mask.sum() == masks[name].sum()


def test_shuffling_really_shuffles():
    masks = {"a.weight": torch.arange(10_000).view(100, 100) < 5_000}
    shuffled = shuffle_masks(masks, seed=1)["a.weight"]
    assert abs(int(shuffled[:50].sum()) - 2_500) < 200  # was 5,000; the standard deviation is 25
    assert torch.equal(shuffled, shuffle_masks(masks, seed=1)["a.weight"])
    assert not torch.equal(shuffled, shuffle_masks(masks, seed=2)["a.weight"])


# --- Weights drawn anew ----------------------------------------------------------------------------------------------


def test_redraw_keeps_the_masks_and_changes_every_kept_weight():
    model = net()
    model(batch()[0])  # moves the running statistics
    masks = pu.prune(model, "magnitude", 0.6)
    old, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    assert redraw(model, seed=5) is model
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, weight in pu.prunable_weights(model).items():
        assert torch.equal(pu.get_masks(model)[name], masks[name])
        assert torch.equal(weight != 0, masks[name])
        assert not (weight == old[name])[masks[name]].any()
    assert not model[1].running_mean.any() and model[1].num_batches_tracked == 0


def test_redraw_is_what_the_layers_themselves_draw():
    model = redraw(net(seed=3), seed=7)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), net(seed=7).state_dict().values()))
    assert not torch.equal(redraw(net(seed=3), seed=8)[0].weight, model[0].weight)


def test_redraw_by_an_init_of_ones_own():
    def init(model):
        for weight in pu.prunable_weights(model).values():
            nn.init.normal_(weight)

    model = net()
    masks = pu.prune(model, "random", 0.5)
    bias = model[4].bias.detach().clone()
    redraw(model, 1, init)
    first = model[4].weight.detach().clone()
    assert torch.equal(first != 0, masks["4.weight"]) and torch.equal(model[4].bias, bias)
    assert torch.equal(redraw(model, 1, init)[4].weight, first)
    redraw(model, init=lambda m: m.load_state_dict(net(seed=9).state_dict()))
    assert torch.equal(model[4].weight, net(seed=9)[4].weight * masks["4.weight"])


# --- Inverted scores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["random", "magnitude", "snip", "grasp", "synflow"])
def test_inverted_scores_are_the_negated_ones(criterion):
    model = net()
    with torch.no_grad():
        model[0].weight[0] = 0
    plain, turned = (pu.scores(model, c, data=batch(), seed=3) for c in (criterion, inverted(criterion)))
    assert all(torch.equal(turned[name], -score) and turned[name].isfinite().all() for name, score in plain.items())


def test_inverted_hands_on_the_options_and_the_mode_and_leaves_no_trace():
    model, other = net(), net()
    state = copy.deepcopy(model.state_dict())
    for train_mode in (True, False):
        plain = pu.scores(model, "grasp", batch(), train_mode=train_mode, temperature=3.0, absolute=True)
        turned = pu.scores(model, inverted("grasp", temperature=3.0, absolute=True), batch(), train_mode=train_mode)
        assert all(torch.equal(turned[name], -score) for name, score in plain.items())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    twice = inverted(inverted("snip"))
    pu.prune(model, twice, 0.5, data=batch(), iterations=3)
    pu.prune(other, "snip", 0.5, data=batch(), iterations=3)
    assert all(torch.equal(a, b) for a, b in zip(pu.get_masks(model).values(), pu.get_masks(other).values()))
    assert twice.__name__ == "inverted inverted snip"


# --- Overlap ---------------------------------------------------------------------------------------------------------


def test_overlap_by_hand():
    a = {"x.weight": torch.tensor([1, 1, 0, 0]).bool(), "y.weight": torch.tensor([[1, 0]]).bool()}
    b = {"y.weight": torch.tensor([[1, 1]]).bool(), "x.weight": torch.tensor([0, 1, 1, 0]).bool()}
    found = overlap(a, b)
    assert found.iou == pytest.approx(2 / 5)  # together {x1, y0} of {x0, x1, x2, y0, y1}
    assert found.expected == pytest.approx((2 * 2 / 4 + 1 * 2 / 2) / (4 + 3 - 2))


@settings(max_examples=60, deadline=None)
@given(shapes=shapes, density=st.floats(0, 1), other=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_overlap_is_symmetric_and_bounded(shapes, density, other, seed):
    a, b = masks_of(shapes, density, seed), masks_of(shapes, other, seed + 1)
    one, two, same = overlap(a, b), overlap(b, a), overlap(a, a)
    assert one.iou == pytest.approx(two.iou, nan_ok=True) and one.expected == pytest.approx(two.expected, nan_ok=True)
    kept = sum(int(mask.sum()) for mask in a.values())
    assert math.isnan(same.iou) if kept == 0 else same.iou == 1
    if not math.isnan(one.iou):
        assert 0 <= one.iou <= 1 and 0 <= one.expected <= 1
    assert overlap(a, {name: ~mask for name, mask in a.items()}).iou == 0


def test_independent_masks_overlap_as_expected():
    masks = {"a.weight": torch.arange(20_000) < 6_000, "b.weight": torch.arange(5_000) < 4_500}
    found = overlap(shuffle_masks(masks, 1), shuffle_masks(masks, 2))
    assert found.iou == pytest.approx(found.expected, abs=0.01)


def test_masks_that_cannot_be_compared():
    a = {"x.weight": torch.ones(2, 3).bool(), "y.weight": torch.ones(2).bool()}
    with pytest.raises(ValueError, match="y.weight, z.weight"):
        overlap(a, {"x.weight": a["x.weight"], "z.weight": a["y.weight"]})
    with pytest.raises(ValueError, match=r"x.weight: the masks have shapes \(2, 3\) and \(3, 2\)"):
        overlap(a, {**a, "x.weight": torch.ones(3, 2).bool()})
