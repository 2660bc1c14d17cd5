"""Costs: golden MAC counts, closed forms, bytes, and nothing left on the model."""

import pytest
import torch
from torch import nn

import pruneutils as pu
from pruneutils.costs import cost, cost_table

BF16 = torch.zeros(1, 4, 9, 9, dtype=torch.bfloat16)


def conv_net():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(8, 6, 3, stride=2, groups=2, bias=False), nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), nn.Flatten(), nn.Linear(4 * 8 * 8, 5),
    )  # fmt: skip


def test_vgg16_for_cifar():
    found = cost(pu.models.create("vgg16"), torch.zeros(2, 3, 32, 32))
    assert found.macs == found.sparse_macs == 313_478_154
    assert found.bias_macs == 276_490
    assert (found.parameters, found.prunable, found.kept) == (14_719_818, 14_715_584, 14_715_584)
    assert found.bytes == found.sparse_bytes == 4 * 14_719_818


@pytest.mark.parametrize(
    "name, products, biases",
    [
        ("torchvision/resnet18", 1_814_073_344, 1000),
        ("torchvision/mobilenet_v2", 300_774_272, 1000),  # depthwise convolutions
        # attention: patches with a bias per output, 12 x (3072 + 768 + 768 behind the attention), 1000 classes
        ("torchvision/vit_b_16", 17_563_828_224, 768 * 196 + 12 * (3072 + 768 + 768) + 1000),
    ],
)
def test_known_networks_at_224_pixels(name, products, biases):
    found = cost(pu.models.create(name, num_classes=1000), torch.zeros(1, 3, 224, 224))
    assert found.macs - found.bias_macs == products
    assert found.bias_macs == biases


def test_timm_attention_counts_the_products_that_no_layer_owns():
    model, x = pu.models.create("timm/vit_tiny_patch16_224", num_classes=1000), torch.zeros(1, 3, 224, 224)
    found, table = cost(model, x), cost_table(model, x)
    assert found.macs - found.bias_macs == 1_253_683_200
    assert found.macs - table["macs"].sum() == 12 * 2 * 197 * 197 * 192  # queries times keys, and times values


def test_layers_by_hand():
    table = cost_table(conv_net(), torch.zeros(3, 4, 9, 9))
    assert list(table.columns) == ["layer", "shape", "density", "macs", "sparse_macs"]
    assert list(table["layer"]) == ["0", "4", "6", "8"]
    assert list(table["shape"]) == [(8, 4, 3, 3), (6, 4, 3, 3), (6, 2, 2, 2), (5, 256)]
    by_hand = [
        8 * 4 * 9 * 81 + 8 * 81,
        6 * 4 * 9 * 16,  # 4x4 outputs, each out of half of the 8 inputs
        6 * 2 * 4 * 16 + 4 * 64,  # transposed: every input goes to 2 outputs at 2x2 places
        256 * 5 + 5,
    ]
    assert list(table["macs"]) == list(table["sparse_macs"]) == by_hand
    assert list(table["density"]) == [1.0] * 4
    assert cost(conv_net(), torch.zeros(1, 4, 9, 9)).macs == sum(by_hand)


def test_pruned_weights_save_their_products_but_not_the_biases():
    model, x = conv_net(), torch.zeros(1, 4, 9, 9)
    dense = cost_table(model, x)
    pu.prune(model, "random", sparsity=0.75, scope="layer")
    table, found = cost_table(model, x), cost(model, x)
    positions = torch.tensor([81, 16, 16, 1])
    kept = torch.tensor([int(mask.sum()) for mask in pu.get_masks(model).values()])
    biases = torch.tensor([8 * 81, 0, 4 * 64, 5])
    assert list(table["sparse_macs"]) == (kept * positions + biases).tolist()
    assert list(table["macs"]) == list(dense["macs"])
    assert found.sparse_macs == table["sparse_macs"].sum()
    assert found.mac_density == found.sparse_macs / found.macs
    assert list(table["density"]) == pytest.approx([0.25] * 4, abs=0.002)


def test_projection_behind_attention_saves_too():
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    x = torch.randn(2, 5, 8)
    dense = cost(model, x)
    pu.prune(model, sparsity={"1.self_attn.out_proj": 0.5})
    assert dense.macs - cost(model, x).sparse_macs == 32 * 5


def test_a_layer_used_twice_costs_twice():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert list(cost_table(model, torch.zeros(1, 6))["macs"]) == [2 * (36 + 6)]
    tied = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    tied[1].weight = tied[0].weight
    assert cost(tied, torch.zeros(1, 6)).macs == 72


def test_nonzero_and_bytes():
    model = nn.Sequential(nn.Linear(10, 30), nn.BatchNorm1d(30), nn.Linear(30, 3))
    nn.init.ones_(model[0].bias)
    nn.init.ones_(model[2].bias)
    nn.init.zeros_(model[1].bias)
    pu.prune(model, "random", sparsity=0.9)
    found = cost(model, torch.randn(4, 10))
    assert found.parameters == 390 + 33 + 60
    assert (found.prunable, found.kept) == (390, 39)
    assert found.nonzero == 39 + 33 + 30
    dense = 4 * (390 + 33 + 60 + 60) + 8  # two buffers of batch norm, and its counter of batches
    assert found.bytes == dense
    assert found.sparse_bytes == dense - 4 * (390 - 39) + 38 + 12  # bit masks: 300 and 90 bits in whole bytes


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_bytes_are_those_of_the_file(tmp_path, sparsity):
    model = conv_net().to(torch.bfloat16)
    model[1].register_buffer("passing", torch.zeros(100), persistent=False)
    pu.prune(model, "random", sparsity=sparsity)
    file = pu.save(model, tmp_path / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(file[:8], "little")
    assert cost(model, BF16).sparse_bytes == len(file) - header


def test_zeros_without_a_mask_are_not_stored_sparsely_but_need_no_product():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[0].weight[0] = 0
    found = cost(model, torch.zeros(1, 4))
    assert (found.kept, found.nonzero, found.sparse_macs) == (12, 12, 12)
    assert found.sparse_bytes == found.bytes == 64


def test_nothing_is_left_behind():
    model, x = conv_net(), torch.randn(4, 4, 9, 9)
    pu.prune(model, sparsity=0.5)
    model.train()
    model[1].eval()
    model(x).sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    fast, rng = torch.backends.mha.get_fastpath_enabled(), torch.get_rng_state()
    cost(model, x, latency=True, repeats=2)
    cost_table(model, x)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients))
    assert modes == [m.training for m in model.modules()]
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert fast == torch.backends.mha.get_fastpath_enabled() and torch.equal(rng, torch.get_rng_state())


def test_a_failing_model_is_left_alone_too():
    model = conv_net().train()
    with pytest.raises(RuntimeError):
        cost(model, torch.zeros(1, 3, 9, 9))
    assert all(m.training and not m._forward_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_latency_is_for_the_whole_batch_in_eval_mode():
    seen = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            seen.append((len(x), self.training, torch.is_grad_enabled()))
            return self.fc(x)

    found = cost(Watched(), torch.zeros(7, 4), latency=True, repeats=4)
    assert seen == [(1, False, False)] + [(7, False, False)] * 7  # one to count, three to warm up
    assert found.latency > 0 and found.latency_spread >= 0
    assert cost(Watched(), torch.zeros(7, 4)).latency is None


def test_latency_is_the_median_behind_a_warm_up(monkeypatch):
    durations = [100.0, 90.0, 80.0, 5.0, 1.0, 2.0, 4.0, 3.0]
    ticks = iter([tick for i, seconds in enumerate(durations) for tick in (1000.0 * i, 1000.0 * i + seconds)])
    monkeypatch.setattr("pruneutils.costs.time.perf_counter", lambda: next(ticks))
    found = cost(nn.Linear(4, 2), torch.zeros(1, 4), latency=True, repeats=5)
    assert (found.latency, found.latency_spread) == (3.0, 2.0)


@pytest.mark.parametrize(
    "inputs, repeats, error, message",
    [
        ((torch.zeros(2, 4), torch.zeros(2)), 3, TypeError, "must be a tensor"),
        (torch.zeros(0, 4), 3, ValueError, "empty"),
        (torch.zeros(2, 4), 0, ValueError, "repeats"),
    ],
)
def test_errors(inputs, repeats, error, message):
    with pytest.raises(error, match=message):
        cost(nn.Linear(4, 2), inputs, repeats=repeats)


def test_nothing_to_prune():
    with pytest.raises(ValueError, match="nothing to prune"):
        cost(nn.ReLU(), torch.zeros(1, 4))
