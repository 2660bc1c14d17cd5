"""Repair: batch-norm statistics against closed forms and torch's own, least squares against torch.linalg.lstsq."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pruneutils as pu


def normed(dtype=torch.float32):
    """Three batch norms, one of them behind another, dropout, and statistics that fit nothing."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)]
    layers += [nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)]
    for norm in norms_of(model := nn.Sequential(*layers).to(dtype)):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return model.train()


def norms_of(model):
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def images(n=24, dtype=torch.float32):
    """A mean far from zero, and batches that differ: a moving average and a mean of variances would both be wrong."""
    drift = torch.linspace(-2, 5, n, dtype=dtype).view(-1, 1, 1, 1)
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype) + drift


def parts(x, sizes):
    """Batches without targets; two tensors in a list would be one batch with its targets."""
    return ((part, None) for part in x.split(sizes))


# --- recalibrate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[24], [9, 15], [1, 20, 3]])
def test_the_statistics_are_those_of_the_recalibrated_network_itself(sizes):
    model, x = normed(torch.float64), images(dtype=torch.float64)
    assert pu.recalibrate(model, parts(x, sizes)) is model
    reads = {}
    for norm in norms_of(model):
        norm.register_forward_pre_hook(lambda module, args: reads.update({module: args[0].detach()}))
    model.eval()(x)
    assert len(reads) == 3
    for norm, values in reads.items():
        dims = [d for d in range(values.ndim) if d != 1]
        torch.testing.assert_close(norm.running_mean, values.mean(dims), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(norm.running_var, values.var(dims), rtol=1e-10, atol=1e-12)


def test_only_statistics_change():
    model, x = normed(), images()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.random.get_rng_state()
    pu.recalibrate(model, (x, torch.zeros(24, 9, 9)))  # targets need not fit
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != ("running" in name or "num_batches" in name), name


def test_what_cannot_be_measured_is_named_and_changes_nothing():
    model, x = normed(), images()
    before = copy.deepcopy(model.state_dict())
    x[-1] = float("nan")
    with pytest.raises(ValueError, match="^1: .*NaN"):
        pu.recalibrate(model, x.split(8))
    with pytest.raises(ValueError, match="^9: .*single value"):
        pu.recalibrate(model, images(1))
    with pytest.raises(ValueError, match="no batch norm"):
        pu.recalibrate(nn.Sequential(nn.Linear(2, 2)), torch.rand(3, 2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- reconstruct: a layer --------------------------------------------------------------------------------------------


class Same(nn.Conv2d):
    """A convolution that pads by itself, as timm's do."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


LAYERS = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "uneven": lambda: nn.Conv2d(4, 6, (3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
    "same": lambda: nn.Conv2d(4, 6, 4, padding="same"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4, stride=2),
    "own padding": lambda: Same(4, 6, 3, stride=2),
    "three dimensions": lambda: nn.Conv3d(4, 6, 2, stride=2),
    "linear": lambda: nn.Linear(4, 6),
    "tokens": lambda: nn.Linear(4, 6),
}
SHAPES = {"three dimensions": (4, 5, 5, 5), "linear": (4,), "tokens": (7, 4)}


@pytest.mark.parametrize("kind", LAYERS)
def test_without_damping_the_error_is_the_least_that_kept_weights_reach(kind, monkeypatch):
    monkeypatch.setattr("pruneutils.repair._CHUNK", 3000)  # several chunks
    torch.manual_seed(0)
    dense = nn.Sequential(LAYERS[kind]().double())
    model, x = copy.deepcopy(dense), torch.randn(30, *SHAPES.get(kind, (4, 9, 8)), dtype=torch.float64)
    keep = pu.prune(model, "random", sparsity=0.4)["0.weight"]
    nn.init.normal_(dense[0].weight)  # otherwise what is kept is the solution already, up to what is gone
    wanted = dense(x).detach()
    errors = [((model(x) - wanted).square().sum() / wanted.square().sum()).item()]
    table = pu.reconstruct(model, dense, parts(x, 7), damping=0)
    after = (model(x) - wanted).square().sum() / wanted.square().sum()
    after.backward()
    assert model[0].weight.grad.abs().max() < 1e-9  # of kept weights; the squared error is convex
    assert table[["before", "after"]].to_numpy()[0] == pytest.approx([*errors, after.item()], rel=1e-6, abs=1e-12)
    assert torch.equal(pu.get_masks(model)["0.weight"], keep) and not model[0].weight[~keep].any()


def test_where_inputs_depend_on_each_other_the_step_is_the_shortest():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 2)).double()
    model, x = copy.deepcopy(dense), torch.randn(40, 3, dtype=torch.float64).repeat(1, 2)
    pu.set_masks(model, {"0.weight": torch.tensor([[1, 1, 1, 1, 1, 0]] * 2)})
    start, missing = model[0].weight.detach().clone(), (dense(x) - model(x)).detach()
    pu.reconstruct(model, dense, x, damping=0)
    step = torch.linalg.pinv(x[:, :5]) @ missing
    torch.testing.assert_close((model[0].weight - start)[:, :5].detach(), step.T, rtol=1e-9, atol=1e-12)


def pruned_pair(name="resnet20", sparsity=0.8):
    dense = pu.models.create(name)
    model = copy.deepcopy(dense)
    pu.prune(model, "magnitude", sparsity)
    return model, dense


def test_layers_follow_each_other_and_no_error_grows():
    model, dense = pruned_pair()
    x = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    gap_before = (model.eval()(x) - dense.eval()(x)).square().mean()
    masks, state = pu.get_masks(model), copy.deepcopy(dense.state_dict())
    table, n_threads = pu.reconstruct(model, dense, parts(x, [9, 7])), threading.active_count()
    assert table["layer"].tolist()[:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"] and len(table) == 20
    assert (table["after"] <= table["before"] + 1e-12).all()
    assert (model(x) - dense(x)).square().mean() < 0.3 * gap_before
    assert all(torch.equal(mask, masks[name]) for name, mask in pu.get_masks(model).items())
    assert all(torch.equal(value, state[name]) for name, value in dense.state_dict().items())
    again = pu.reconstruct(model, model_as_dense := copy.deepcopy(model), x)
    assert (again["after"] < 1e-10).all() and threading.active_count() == n_threads  # what fits already stays
    for p, q in zip(model.parameters(), model_as_dense.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_the_second_layer_is_fitted_to_what_the_first_gives_after_its_fit():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    model, x = copy.deepcopy(dense), torch.randn(60, 5, dtype=torch.float64)
    pu.prune(model, "magnitude", 0.5)
    pu.reconstruct(model, dense, x, damping=0)
    (model(x) - dense(x)).square().sum().backward()
    assert model[2].weight.grad.abs().max() < 1e-9 < model[0].weight.grad.abs().max()


def test_strong_damping_leaves_the_weights_and_an_excluded_layer_stays():
    model, dense = pruned_pair("lenet5")
    before = copy.deepcopy(model.state_dict())
    table = pu.reconstruct(model, dense, torch.rand(20, 1, 28, 28), damping=1e9, exclude="conv1")
    assert table["layer"].tolist() == ["conv2", "fc1", "fc2"]
    torch.testing.assert_close(model.state_dict(), before, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.conv1.weight, before["conv1.weight"])


def test_a_network_without_filters_is_fitted_to_those_that_are_left():
    x = torch.rand(24, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    dense = pu.models.create("lenet5")
    model = pu.prune_filters(copy.deepcopy(dense), "l1", ratio=0.5, example_inputs=x[:1], of="parameters")
    gap = (model(x) - dense(x)).square().mean()
    table = pu.reconstruct(model, dense, x)
    assert (table["after"] <= table["before"] + 1e-12).all()
    assert (model(x) - dense(x)).square().mean() < 0.5 * gap
    again = pu.prune_filters(copy.deepcopy(model), "l1", ratio=0.3, example_inputs=x[:1], of="parameters")
    pu.reconstruct(again, model, x)  # both have lost some
    assert again.conv2.weight.shape[0] < model.conv2.weight.shape[0]


def test_what_goes_wrong_leaves_weights_and_threads_alone():
    model, dense = pruned_pair("lenet5")
    before, n_threads = copy.deepcopy(model.state_dict()), threading.active_count()
    x = torch.rand(20, 1, 28, 28)
    dense.conv2.weight.data[0, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="^conv2: .*NaN or infinite"):
        pu.reconstruct(model, dense, x)
    with pytest.raises(RuntimeError):  # images that do not fit
        pu.reconstruct(model, dense, x[..., :9])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert threading.active_count() == n_threads


def test_wrong_arguments_are_named():
    model, dense = pruned_pair("lenet5")
    wider, x = copy.deepcopy(dense), torch.rand(4, 1, 28, 28)
    wider.conv1 = nn.Conv2d(1, 8, 5)
    for arguments, options, message in [
        ((model, dense, x), dict(damping=-1), "damping"),
        ((model, dense, []), {}, "no sample"),
        ((model, model, x), {}, "dense is the model itself"),
        ((model, pu.models.create("lenet300"), x), {}, "conv1"),
        ((model, wider, x), {}, "conv1 has the shape"),
        ((model, dense, x), dict(exclude="conv9"), "conv9"),
    ]:
        with pytest.raises(ValueError, match=message):
            pu.reconstruct(*arguments, **options)
