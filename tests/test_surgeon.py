"""SparseGPT against the optimal brain surgeon with numpy's inverses, column by column, and against masks alone."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import pruneutils as pu


def correlated(n, size, dtype=torch.float64):
    drawn = torch.Generator().manual_seed(0)
    mix = torch.randn(size, size, generator=drawn, dtype=dtype) / torch.arange(1, size + 1)[:, None]
    return torch.randn(n, size, generator=drawn, dtype=dtype) @ mix


def by_hand(w, x, n_pruned, block, n_of_m, damping=0.01):
    """Each input in turn: what is pruned of it moves the later ones by the inverse Hessian of these alone."""
    h, size, keep = x.T @ x, x.shape[1], np.ones(w.shape, bool)
    h += damping * np.diag(h).mean() * np.eye(size)
    inverses = [np.linalg.inv(h[i:, i:]) for i in range(size)]
    cost = np.array([inverse[0, 0] for inverse in inverses])
    for i in range(size):
        if i % block == 0:
            scores = w[:, i : i + block] ** 2 / cost[i : i + block]
            rows = (scores if n_of_m else scores.reshape(1, -1)).argsort(1).argsort(1)
            keep[:, i : i + block] = rows.reshape(scores.shape) >= n_pruned[i // block]
        w[:, i:] -= np.outer(np.where(keep[:, i], 0, w[:, i]) / cost[i], inverses[i][0])
    return w * keep, keep


@pytest.mark.parametrize(("options", "arguments"), [
    (dict(sparsity=0.6, block=5), ([21, 21, 8], 5, False)),
    (dict(sparsity=0.3), ([25], 12, False)),
    (dict(granularity="1:4", block=6), ([3, 3, 3], 4, True)),
])  # fmt: skip
def test_a_layer_is_that_of_the_optimal_brain_surgeon(options, arguments):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 7)).double(), correlated(40, 12)
    weights, keep = by_hand(model[0].weight.detach().numpy().copy(), x.numpy(), *arguments)
    assert np.array_equal(pu.sparsegpt(model, x, **options)["0.weight"], keep)
    np.testing.assert_allclose(model[0].weight.detach(), weights, rtol=1e-8, atol=1e-10)


def test_outputs_stay_nearer_than_with_masks_alone():
    torch.manual_seed(0)
    dense, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)), correlated(500, 64, torch.float32)
    models = {way: copy.deepcopy(dense) for way in ("magnitude", "wanda", "sparsegpt")}
    pu.prune(models["magnitude"], "magnitude", 0.5, scope="layer")
    pu.prune(models["wanda"], "wanda", 0.5, scope="layer", data=(x, torch.zeros(500)))
    pu.sparsegpt(models["sparsegpt"], x)
    errors = {way: (model(x) - dense(x)).square().sum().item() for way, model in models.items()}
    assert errors["sparsegpt"] < 0.5 * errors["wanda"] < 0.5 * errors["magnitude"], errors


@pytest.mark.parametrize("granularity", ["weight", "2:4"])
def test_counts_are_exact_and_what_was_pruned_stays_so(granularity):
    layers = [nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2, padding=1), nn.Flatten(), nn.Linear(288, 10)]
    model, x = nn.Sequential(*layers), torch.randn(50, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    before = dict(pu.prune(model, "magnitude", 0.3, scope="layer"))
    masks = pu.sparsegpt(model, x, None if granularity == "2:4" else {"*": 0.5}, granularity, block=50)
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask) and not mask[~before[name]].any()
        if granularity == "weight":
            assert int((~mask).sum()) == round(0.5 * mask.numel())
        else:
            assert mask.unflatten(1, (-1, 4)).sum(2).max() == 2
    assert len(masks) == 3 and all(torch.equal(masks[name], mask) for name, mask in pu.get_masks(model).items())
    with pytest.raises(ValueError, match="0: .*pruned already"):
        pu.sparsegpt(model, x, 0.2)


def test_what_does_not_fit_is_named_and_changes_nothing():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(5, 4, 2), nn.Flatten(), nn.Linear(12, 2)), torch.randn(6, 5, 4)
    state, twice = copy.deepcopy(model.state_dict()), nn.Sequential(*[nn.Linear(4, 4)] * 2)
    for arguments, options, message in [
        ((model, x), {}, "^1 is a Conv1d"),
        ((model, x), dict(exclude="1", granularity="filter"), "single weights or N:M"),
        ((model, x), dict(exclude="1", sparsity=1.5), "sparsity"),
        ((model, x), dict(exclude="1", damping=0), "^3: .*depend on each other"),
        ((model, x / 0), dict(exclude="1"), "^0: .*NaN or infinite"),
        ((twice, torch.rand(3, 4)), {}, "^0 is a Linear that .* 2 times"),
    ]:
        with pytest.raises(ValueError, match=message):
            pu.sparsegpt(*arguments, **options)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not pu.get_masks(model)


class Reader(nn.Sequential):
    """Takes tokens with padding by keyword, as language models do."""

    def forward(self, input_ids, attention_mask):
        return self[1](input=self[0](input_ids))


@pytest.mark.filterwarnings("ignore:.*not prunable")
@pytest.mark.parametrize("way", ["sparsegpt", "reconstruct"])
def test_padded_positions_do_not_count(way):
    dense, mask = Reader(nn.Embedding(200, 4), nn.Linear(4, 8)), torch.ones(30, 6, dtype=torch.long)
    mask[::2, 4:] = 0
    tokens, found = torch.randint(100, (30, 6)), []
    for padding in (3, 199):
        batch = {"input_ids": tokens.masked_fill(mask == 0, padding), "attention_mask": mask}
        model = copy.deepcopy(dense)
        if way == "sparsegpt":
            pu.sparsegpt(model, [batch])
        else:
            pu.prune(model, sparsity=0.5)
            pu.reconstruct(model, dense, batch)
        found.append(model[1].weight)
    assert torch.equal(*found) and not torch.equal(found[0] != 0, dense[1].weight != 0)
