"""Costs: golden MAC counts, closed forms, bytes, and nothing left on the model."""

import warnings

import pytest
import torch
from torch import nn

import pruneutils as pu
from pruneutils.costs import cost, cost_table

BF16 = torch.zeros(1, 4, 9, 9, dtype=torch.bfloat16)


def conv_net():
    layers = [nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)]
    layers += [nn.Conv2d(8, 6, 3, stride=2, groups=2, bias=False), nn.ReLU()]
    layers += [nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), nn.Flatten(), nn.Linear(4 * 8 * 8, 5)]
    return nn.Sequential(*layers)


def test_vgg16_for_cifar():
    found = cost(pu.models.create("vgg16"), torch.zeros(2, 3, 32, 32))
    assert (found.macs, found.sparse_macs, found.bias_macs) == (313_478_154, 313_478_154, 276_490)
    assert found.parameters == 14_719_818 and found.bytes == found.sparse_bytes == 4 * 14_719_818


@pytest.mark.parametrize(
    "name, products, biases",
    [
        ("torchvision/resnet18", 1_814_073_344, 1000),
        ("torchvision/mobilenet_v2", 300_774_272, 1000),  # depthwise convolutions
        # attention: patches with a bias per output, 12 x (3 x 768 into and 768 out of it, 3072 + 768), 1000 classes
        ("torchvision/vit_b_16", 17_563_828_224, 768 * 196 + 12 * (3 * 768 + 768 + 3072 + 768) + 1000),
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
    assert found.mac_density == table["sparse_macs"].sum() / found.macs
    assert list(table["density"]) == pytest.approx([0.25] * 4, abs=0.002)


def test_a_layer_used_twice_costs_twice():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert list(cost_table(model, torch.zeros(1, 6))["macs"]) == [2 * (36 + 6)]
    tied = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    tied[1].weight = tied[0].weight
    assert cost(tied, torch.zeros(1, 6)).macs == 72


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_multiply_in_every_step(kind, gates):
    model = nn.Sequential(nn.Linear(10, 10, bias=False), kind(10, 20, batch_first=True))
    found = cost(model, torch.zeros(2, 7, 10))
    assert torch.backends.mkldnn.enabled == torch.backends.mkldnn.is_available() and torch.backends.cudnn.enabled
    assert found.macs - found.bias_macs == 7 * (10 * 10 + gates * (10 + 20) * 20)
    assert found.bias_macs == (1 + 7) * gates * 20  # of the inputs at once, and of each step


def test_an_embedding_tied_to_its_decoder_costs_one_product_a_token():
    model, tokens = nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 6), nn.Linear(6, 20, bias=False)), torch.arange(7)
    model[2].weight = model[0].weight
    found, tokens = cost(model, tokens[None]), tokens[None]
    assert list(cost_table(model, tokens)["macs"]) == [7 * 36 + 6, 7 * 120]
    assert found.macs == 7 * 36 + 6 + 7 * 120
    assert found.parameters == 120 + 42 and found.bytes == 4 * (120 + 42)  # the tied tensor once
    pu.prune(model, sparsity={"2": 0.5})
    assert cost(model, tokens).sparse_macs == 7 * 36 + 6 + 7 * 60


def test_weights_that_are_zero_need_no_product_whatever_the_masks_say():
    model, x = nn.Sequential(nn.Linear(8, 4, bias=False)), torch.zeros(1, 8)
    pu.prune(model, "magnitude", 0.5)
    with torch.no_grad():
        model[0].weight[:, :2] = 0
        expected = int(model[0].weight.count_nonzero())
    assert cost(model, x).sparse_macs == expected < 16
    with torch.no_grad():
        model[0].weight.fill_(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that pruned weights have come back
        assert cost(model, x).sparse_macs == 32


@pytest.mark.parametrize("noncontiguous", [False, True])
def test_a_linear_layer_adds_its_bias_once_a_feature_however_torch_computes_it(noncontiguous):
    model, x = nn.Sequential(nn.Linear(8, 5)), torch.randn(1, 3, 8)
    if noncontiguous:
        x = torch.randn(1, 8, 3).transpose(1, 2)
    found = cost(model, x)
    assert (found.macs, found.bias_macs) == (3 * 40 + 5, 5)
    assert list(cost_table(model, x)["macs"]) == [3 * 40 + 5]


def test_nonzero_and_bytes():
    model = nn.Sequential(nn.Linear(10, 30), nn.BatchNorm1d(30), nn.Linear(30, 3))
    pu.prune(model, "random", sparsity=0.9)
    found = cost(model, torch.randn(4, 10))
    assert found.parameters == 390 + 33 + 60
    assert found.nonzero == 39 + 33 + 30  # biases of batch norm are zero
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


def test_nothing_is_left_behind():
    model, x = conv_net(), torch.randn(4, 4, 9, 9)
    pu.prune(model, sparsity=0.5)
    model[1].eval()
    model(x).sum().backward()

    def seen():
        modules = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters()), torch.get_rng_state()]
        return [tensor.clone() for tensor in tensors], modules, torch.backends.mha.get_fastpath_enabled()

    before = seen()
    cost(model, x, latency=True, seconds=0.01)
    cost_table(model, x)
    torch.testing.assert_close(seen(), before, rtol=0, atol=0)


def test_latency_is_for_the_whole_batch_in_eval_mode_on_one_thread():
    seen = []

    class Watched(nn.Linear):
        def forward(self, x):
            seen.append((len(x), self.training, torch.is_grad_enabled(), torch.get_num_threads()))
            return super().forward(x)

    threads = torch.get_num_threads()
    found = cost(Watched(4, 2), (torch.zeros(7, 4), torch.zeros(7)), latency=True, seconds=0.001)
    assert seen[0] == (1, False, False, threads)  # one input to count, all of them to measure
    assert set(seen[1:]) == {(7, False, False, 1)} and len(seen) >= 1 + 3 + 5
    assert found.latency > 0 and torch.get_num_threads() == threads
    assert cost(Watched(4, 2), torch.zeros(7, 4)).latency is None


def test_errors():
    for model, inputs, options, message in [
        (nn.Linear(4, 2), torch.zeros(0, 4), {}, "no sample"),
        (nn.Linear(4, 2), torch.zeros(()), {}, "no sample"),
        (nn.Linear(4, 2), torch.zeros(2, 4), {"seconds": "1"}, "seconds"),
        (nn.ReLU(), torch.zeros(2, 4), {}, "nothing to prune"),
    ]:
        with pytest.raises(ValueError, match=message):
            cost(model, inputs, **options)
