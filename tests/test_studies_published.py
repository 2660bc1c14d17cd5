"""What rebuilds published tables and pictures: their totals, the checks on GraSP's scores, and training mode."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import pruneutils as pu
from pruneutils import studies


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(6, 1, 28, 28, dtype=torch.float64, generator=generator), torch.arange(6)


@pytest.fixture
def network():
    return pu.models.create("lenet300").double()


def masks_of(network, sparsity):
    return pu.prune(copy.deepcopy(network), "random", sparsity)


def test_the_published_grasp_tables_have_the_layers_of_the_network_and_their_totals():
    table = studies.published_grasp_table()
    layers = pu.layer_table(pu.models.create("timm/resnet10t", num_classes=10))
    assert table.layer.tolist() == layers.layer.tolist()
    assert table.before.tolist() == layers.total.tolist()
    assert table[["after_50", "after_97", "after_98"]].sum().tolist() == [4_820_397, 4_820_336, 98_434]
    # the sparsities that the original prints, to the last digit
    removed = 1 - table[["after_50", "after_97", "after_98"]].sum() / table.before.sum()
    assert removed.tolist() == [0.020590092601472376, 0.02060248660228825, 0.9800001462898457]


def test_the_published_densities_of_vgg16_add_up_to_the_weights_that_were_asked_for():
    table = studies.published_vgg16_table().set_index("layer")
    layers = pu.layer_table(pu.models.create("vgg16")).set_index("layer")
    assert table.index.tolist() == layers.index.tolist()
    wanted = layers.total.sum() * 10**-0.5
    for criterion in ["random", "magnitude", "snip", "grasp", "synflow"]:
        kept = (table[criterion] * layers.total).sum()
        assert kept == pytest.approx(wanted, abs=len(layers)), criterion  # a table of whole numbers, rounded down


def test_differences_of_gradients_agree_with_grasp(network, batch):
    exact = pu.scores(network, "grasp", batch, train_mode=True)
    found = studies.grasp_by_differences(network, batch)
    for name in exact:
        torch.testing.assert_close(found[name], exact[name], rtol=0, atol=1e-5 * float(exact[name].abs().max()))


def test_the_change_of_a_quadratic_gradient_norm_is_the_predicted_one():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False)).double()
    batch = torch.rand(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    weight = network[1].weight
    masks = {"1.weight": torch.rand(3, 4) > 0.5}

    def norm(w):
        p = torch.softmax(batch[0] @ w.T / 200, dim=1)
        error = p - torch.eye(3, dtype=torch.float64)[batch[1]]
        return float((error.T @ batch[0] / 5 / 200).square().sum())  # the gradient in closed form

    before, after = norm(weight.detach()), norm(weight.detach() * masks["1.weight"])
    change = studies.gradient_norm_change(network, batch, masks)
    assert change["removed"] == pytest.approx(after / before - 1, rel=1e-9)
    # at this temperature the norm is all but linear in the weights
    assert change["predicted"] == pytest.approx(change["removed"], rel=0.05)
    assert change["shrunk"] == pytest.approx(change["predicted"], rel=1e-3)


def test_the_change_leaves_the_network_alone(network, batch):
    before = copy.deepcopy(network.state_dict())
    masks = masks_of(network, 0.5)
    studies.gradient_norm_change(network, batch, masks)
    assert network.training and all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_histograms_as_published_ignore_masks_shift_the_bars_and_begin_with_the_classifier():
    weights = {"conv.weight": torch.linspace(-1, 1, 101), "fc.weight": torch.linspace(0, 3, 50)}
    rows = studies.histograms_as_published(weights, bins=10)
    assert [layer for layer, _, _ in rows] == ["fc", "conv"]
    for (_, edges, heights), weight in zip(rows, reversed(list(weights.values())), strict=True):
        assert edges[0] == pytest.approx(float(weight.min()) + 0.25)
        assert edges[-1] == pytest.approx(float(weight.max()) + 0.25)
        assert heights.sum() == pytest.approx(1) and np.array_equal(
            heights * len(weight), np.round(heights * len(weight))
        )


def normalised(batch_norm_momentum=0.1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784, momentum=batch_norm_momentum), nn.Linear(784, 10))


def test_training_mode_uses_the_batch_and_moves_the_running_statistics():
    _, test = pu.data.load("digits")
    test = test.subset(100)
    network = normalised()
    before = network[1].running_mean.clone()
    found = studies.accuracy_in_training_mode(network, test, batch_size=100)
    x, y = next(iter(test))
    with torch.no_grad():
        z = (x - x.mean(0)) / (x.var(0, unbiased=False) + network[1].eps).sqrt()
        assert found == float((network[2](z.flatten(1)).argmax(1) == y).double().mean())
        torch.testing.assert_close(network[1].running_mean, 0.9 * before + 0.1 * x.mean(0).flatten())
    assert network.training


def test_in_training_mode_the_order_decides_and_in_evaluation_mode_it_does_not():
    _, test = pu.data.load("digits")
    test = test.subset(200)
    orders = [studies.accuracy_in_training_mode(normalised(), test, 2, order) for order in (None, 0, 1, 2, 3)]
    assert len(set(orders)) > 1
    assert studies.accuracy_in_training_mode(normalised(), test, 2, 1) == orders[2]
    plain = pu.models.create("lenet300")  # no batch norm
    assert {studies.accuracy_in_training_mode(plain, test, 2, order) for order in (None, 0)} == {
        pu.accuracy(plain, test)
    }


def test_the_normaliser_names_what_is_possible():
    with pytest.raises(ValueError, match="classifier.*'new'.*as created, redrawn"):
        studies.grasp_normaliser(0, classifier="new")
