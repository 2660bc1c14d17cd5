"""SynFlow on activations that saturate: as if they were ReLUs, and its conservation law holds."""

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


SATURATING = [nn.ReLU6(), nn.ReLU6(inplace=True), nn.Hardtanh(-1, 1, inplace=True), nn.Softsign(), F.relu6, torch.tanh]
SATURATING += [lambda x: x.clamp(0, 6), lambda x: torch.clamp(input=x, max=1), lambda x: x.tanh_()]


@pytest.mark.parametrize("activation", SATURATING)
def test_saturating_activations_score_as_a_relu_does(activation):
    expected = flow(nn.ReLU())
    assert all(torch.equal(score, expected[name]) for name, score in flow(activation).items())
    assert all((score > 0).all() for score in expected.values())


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Hardsigmoid(), torch.sigmoid, lambda x: x.sigmoid_()])
def test_flow_through_sigmoids_is_conserved(activation):
    """What enters a layer leaves it (Tanaka et al. 2020): the scores of each layer add up to R."""
    first, second = (score.sum().item() for score in flow(activation).values())
    model = Net(activation).double()
    gate = F.hardsigmoid if isinstance(activation, nn.Hardsigmoid) else torch.sigmoid
    hidden = gate(model.one.weight.abs().sum(1))
    assert first == pytest.approx((model.two.weight.abs() @ hidden).sum().item(), rel=1e-12)
    assert second == pytest.approx(first, rel=1e-12)


def test_where_no_flow_passes_is_reported():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Softmax(1))
    with pytest.warns(UserWarning, match="calls layer_norm, softmax, which give the same for any multiple"):
        pu.scores(model, "synflow", torch.zeros(1, 4))
    tokens = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    with pytest.raises(ValueError, match="synflow sends ones in float64.*indices.*begin behind the embedding"):
        pu.scores(tokens, "synflow", torch.zeros(1, 3, dtype=torch.long))


def test_tied_weights_are_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.decoder = nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)
            self.decoder.weight = self.embedding.weight

        def forward(self, x):
            return self.decoder(x @ self.embedding.weight)

    model = Tied()
    a, ones = model.embedding.weight.detach().abs().double(), torch.ones(4, dtype=torch.float64)
    expected = a * (torch.outer(ones, ones @ a) + torch.outer(ones, a.T @ ones))  # of 1 A A^T 1
    torch.testing.assert_close(pu.scores(model, "synflow", torch.zeros(1, 4))["decoder.weight"], expected)
