"""SynFlow on activations that saturate: as if they were ReLUs, and its conservation law holds."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pruneutils as pu


class Net(nn.Module):
    def __init__(self, activation):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.activation, self.two = nn.Linear(784, 30, bias=False), activation, nn.Linear(30, 4, bias=False)

    def forward(self, x):
        return self.two(self.activation(self.one(x)))


def flow(activation):
    return pu.scores(Net(activation), "synflow", torch.zeros(2, 784))


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU6(), nn.ReLU6(inplace=True), nn.Hardtanh(), nn.Hardtanh(-1, 1, inplace=True), nn.Tanh(), nn.Softsign(),
        F.relu6, torch.tanh, lambda x: x.tanh(), lambda x: x.clamp(0, 6), lambda x: torch.clamp(input=x, max=1),
        lambda x: x.tanh_(), lambda x: F.hardtanh_(x),
    ],
)  # fmt: skip
def test_saturating_activations_score_as_a_relu_does(activation):
    expected = flow(nn.ReLU())
    assert all(torch.equal(score, expected[name]) for name, score in flow(activation).items())
    assert all((score > 0).all() for score in expected.values())


@pytest.mark.parametrize(
    "activation", [nn.Sigmoid(), nn.Hardsigmoid(), nn.Hardsigmoid(True), torch.sigmoid, lambda x: x.sigmoid_()]
)
def test_flow_through_sigmoids_is_conserved(activation):
    """What enters a layer leaves it (Tanaka et al. 2020): the scores of each layer add up to R."""
    first, second = (score.sum().item() for score in flow(activation).values())
    model = Net(activation).double()
    gate = F.hardsigmoid if isinstance(activation, nn.Hardsigmoid) else torch.sigmoid
    hidden = gate(model.one.weight.abs().sum(1))
    assert first == pytest.approx((model.two.weight.abs() @ hidden).sum().item(), rel=1e-12)
    assert second == pytest.approx(first, rel=1e-12)


@pytest.mark.parametrize("name", ["torchvision/mobilenet_v2", "timm/efficientnet_b0", "timm/mobilenetv3_small_100"])
def test_every_weight_of_public_networks_has_a_score(name):
    """Squeeze and excitation included: without care for its gates, the flow overflows or ends there."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = pu.scores(pu.models.create(name), "synflow", torch.zeros(1, 3, 96, 96))
    assert sum(int((score == 0).sum()) for score in scores.values()) <= 0.02 * sum(s.numel() for s in scores.values())


def test_where_no_flow_passes_is_told():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Softmax(1))
    with pytest.warns(UserWarning, match="calls layer_norm, softmax, which give the same for any multiple"):
        pu.scores(model, "synflow", torch.zeros(1, 4))


def test_tokens_are_refused_and_tied_weights_are_one():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False))
    with pytest.raises(ValueError, match=r"torch.int64 inputs are looked up in an embedding: give it a module that"):
        pu.scores(model, "synflow", torch.zeros(1, 3, dtype=torch.long))

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.decoder = nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)
            self.decoder.weight = self.embedding.weight

        def forward(self, x):
            return self.decoder(x @ self.embedding.weight)

    model = Tied()
    a = model.embedding.weight.detach().abs().double()
    ones = torch.ones(4, dtype=torch.float64)
    expected = a * (torch.outer(ones, ones @ a) + torch.outer(ones, a.T @ ones))  # of 1 A A^T 1
    torch.testing.assert_close(pu.scores(model, "synflow", torch.zeros(1, 4))["decoder.weight"], expected)
