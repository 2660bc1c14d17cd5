"""Repair: batch-norm statistics against closed forms and torch's own, least squares against torch.linalg.lstsq."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pruneutils as pu
from pruneutils.pruning._leastsquares import columns_of, steps


def normed(seed=0, dtype=torch.float32):
    """Three batch norms, one of them behind another, dropout, and statistics that fit nothing."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6),
        nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5), nn.BatchNorm1d(5), nn.Linear(5, 4),
    ).to(dtype)  # fmt: skip
    for module in model:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.train()


def images(n=24, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    # a mean far from zero, and batches that differ: a moving average and a mean of variances would both be wrong
    drift = torch.linspace(-2, 5, n, dtype=dtype).view(-1, 1, 1, 1)
    return torch.randn(n, 3, 8, 8, generator=generator, dtype=dtype) + drift


def parts(x, sizes):
    """Batches without targets; two of them in a list would be one batch with its targets."""
    return ((part, None) if len(sizes) == 2 else part for part in x.split(sizes))


def statistics(model):
    return {name: b.clone() for name, b in model.named_buffers() if "running" in name}


# --- recalibrate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[24], [8, 8, 8], [3, 16, 5]])
def test_the_first_batch_norm_has_mean_and_unbiased_variance_of_all_samples(sizes):
    model, x = normed(), images()
    conv = model[0](x).detach().double()
    pu.recalibrate(model, parts(x, sizes))
    torch.testing.assert_close(model[1].running_mean.double(), conv.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var.double(), conv.var((0, 2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [[24], [9, 15], [1, 20, 3]])
def test_the_statistics_are_those_of_the_recalibrated_network_itself(sizes):
    model, x = normed(dtype=torch.float64), images(dtype=torch.float64)
    done = pu.recalibrate(model, parts(x, sizes))
    assert done == pu.Recalibration(layers=3, samples=24, before=None, after=None)
    reads = {}
    for module in model:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(lambda module, args: reads.update({module: args[0].detach()}))
    model.eval()(x)
    assert len(reads) == 3
    for module, values in reads.items():
        dims = [d for d in range(values.ndim) if d != 1]
        torch.testing.assert_close(module.running_mean, values.mean(dims), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(module.running_var, values.var(dims), rtol=1e-10, atol=1e-12)


def test_they_are_those_that_torch_finds_on_a_single_batch():
    model, x = normed(), images(2000)
    twin = copy.deepcopy(model).eval()
    for module in twin:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a plain average, here over one batch
            module.train()
    twin(x)
    pu.recalibrate(model, x.split(300))
    for name, wanted in statistics(twin).items():  # which are normalised by the biased variance: 1999 / 2000
        torch.testing.assert_close(statistics(model)[name], wanted, rtol=2e-3, atol=1e-4)


def test_only_statistics_change():
    model, x = normed(), images()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.random.get_rng_state()
    pu.recalibrate(model, x.split(8))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != ("running" in name or "num_batches" in name), name
    assert model[1].num_batches_tracked == 3


def test_a_half_precision_model_is_measured_in_more():
    model, x = normed().bfloat16(), images().bfloat16()
    conv = model[0](x).detach().double()
    pu.recalibrate(model, x)
    torch.testing.assert_close(model[1].running_var.double(), conv.var((0, 2, 3)), rtol=5e-3, atol=0)


def test_the_accuracies_are_those_before_and_after():
    model = nn.Sequential(nn.BatchNorm1d(1, affine=False), nn.Linear(1, 2))  # class 1 where the input is above the mean
    model[1].weight.data, model[1].bias.data = torch.tensor([[-1.0], [1.0]]), torch.zeros(2)
    targets = torch.tensor([0, 1] * 20)
    x = 5.0 + (2.0 * targets[:, None] - 1)
    assert pu.recalibrate(model, (x, targets)) == pu.Recalibration(1, 40, before=0.5, after=1.0)
    model[0].reset_running_stats()
    test = (x[:3], targets[:3])  # 0, 1, 0: all of them are above 0
    assert pu.recalibrate(model, [x], test) == pu.Recalibration(1, 40, before=1 / 3, after=1.0)
    assert pu.recalibrate(model, x).before is None


def test_a_removed_network_can_be_recalibrated():
    x = torch.rand(16, 3, 32, 32)
    model = pu.prune_filters(pu.models.create("resnet20"), ratio=0.5, example_inputs=x[:1])
    pu.recalibrate(model, x)
    assert model.bn1.running_mean.abs().sum() > 0


def test_what_goes_wrong_leaves_the_statistics_alone():
    model, x = normed(), images()
    before = statistics(model)
    x[-1] = float("nan")
    with pytest.raises(ValueError, match="1: its inputs are NaN"):
        pu.recalibrate(model, x.split(8))
    assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="Sequential has no batch norm"):
        pu.recalibrate(nn.Sequential(nn.Linear(2, 2)), torch.rand(3, 2))
    with pytest.raises(ValueError, match="no sample"):
        pu.recalibrate(normed(), [])
    with pytest.raises(ValueError, match="9: a single value has no variance"):
        pu.recalibrate(normed(), images(1))
    with pytest.raises(TypeError, match="inputs"):
        pu.recalibrate(normed(), 3)


# --- reconstruct: the problem ----------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "stride": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "dilation": lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2),
    "uneven": lambda: nn.Conv2d(4, 6, (3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
    "same": lambda: nn.Conv2d(4, 6, 4, padding="same"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4, stride=2),
    "pointwise": lambda: nn.Conv2d(4, 6, 1, bias=False),
    "one dimension": lambda: nn.Conv1d(4, 6, 3, padding=1),
    "three dimensions": lambda: nn.Conv3d(4, 6, 2, stride=2),
    "linear": lambda: nn.Linear(4, 6),
    "tokens": lambda: nn.Linear(4, 6),
}
SHAPES = {"one dimension": (4, 9), "three dimensions": (4, 5, 5, 5), "linear": (4,), "tokens": (7, 4)}


class Same(nn.Conv2d):
    """A convolution that pads by itself, as timm's do."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


def layer_and_inputs(kind, n=30):
    torch.manual_seed(0)
    layer = CONVOLUTIONS[kind]() if kind in CONVOLUTIONS else Same(4, 6, 3, stride=2)
    return layer.double(), torch.randn(n, *SHAPES.get(kind, (4, 9, 8)), dtype=torch.float64)


@pytest.mark.parametrize("kind", [*CONVOLUTIONS, "own padding"])
def test_a_layer_is_its_weights_times_its_columns(kind, monkeypatch):
    monkeypatch.setattr("pruneutils.pruning._leastsquares._CHUNK", 3000)  # several chunks
    layer, x = layer_and_inputs(kind)
    groups, found = getattr(layer, "groups", 1), []
    for _, columns in columns_of(layer, x):
        products = layer.weight.reshape(groups, -1, columns.shape[1]) @ columns
        found.append(products.flatten(0, 1).T)
    out = layer(x) - (0 if layer.bias is None else layer(torch.zeros_like(x)))
    wanted = out.reshape(-1, 6) if isinstance(layer, nn.Linear) else out.movedim(1, -1).reshape(-1, out.shape[1])
    torch.testing.assert_close(torch.cat(found), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fit_bias", [False, True])
@pytest.mark.parametrize("kind", [*CONVOLUTIONS, "own padding"])
def test_without_damping_the_kept_weights_are_those_of_lstsq(kind, fit_bias):
    layer, x = layer_and_inputs(kind)
    dense, model = nn.Sequential(layer), nn.Sequential(copy.deepcopy(layer))
    pu.prune(model, "random", sparsity=0.4)
    keep, start = pu.get_masks(model)["0.weight"], model[0].weight.detach().clone()
    with torch.no_grad():
        dense[0].weight.normal_()  # otherwise what is kept is the solution already, up to what is gone
    table = pu.reconstruct(model, dense, x.split(7), damping=0, fit_bias=fit_bias)
    columns = torch.cat([c for _, c in columns_of(layer, x)], 2)
    wanted = dense(x).detach()
    wanted = wanted.reshape(-1, 6) if isinstance(layer, nn.Linear) else wanted.movedim(1, -1).flatten(0, -2)
    bias = layer.bias.detach() if layer.bias is not None else torch.zeros(wanted.shape[1], dtype=torch.float64)
    per_group = wanted.shape[1] // len(columns)
    errors = torch.zeros(2, dtype=torch.float64)
    for row in range(wanted.shape[1]):
        kept = keep[row].flatten()
        a, b = columns[row // per_group][kept].T, wanted[:, row] - bias[row]
        if fit_bias and layer.bias is not None:
            a, b = torch.cat([a, a.new_ones(len(a), 1)], 1), wanted[:, row]
        solution = torch.linalg.lstsq(a, b[:, None]).solution.flatten()
        weights = solution[: int(kept.sum())]
        torch.testing.assert_close(model[0].weight[row].flatten()[kept], weights, rtol=1e-7, atol=1e-9)
        if fit_bias and layer.bias is not None:
            torch.testing.assert_close(model[0].bias[row], solution[-1], rtol=1e-7, atol=1e-9)
        old = columns[row // per_group].T @ start[row].flatten() + bias[row] - wanted[:, row]
        errors += torch.stack([old.square().sum(), (a @ solution - b).square().sum()])
    errors /= wanted.square().sum()
    assert table["layer"].tolist() == ["0"]
    torch.testing.assert_close(torch.tensor(table[["before", "after"]].to_numpy()[0]), errors, rtol=1e-6, atol=1e-12)
    assert torch.equal(pu.get_masks(model)["0.weight"], keep)
    assert not model[0].weight[~keep].any()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 7), st.floats(0, 1), st.sampled_from([0.0, 0.01, 3.0]), st.integers(0, 999))
def test_masked_steps_solve_their_own_equations(size, rows, density, damping, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 40, generator=generator, dtype=torch.float64)
    keep = torch.rand(rows, size, generator=generator) < density
    slopes = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    found = steps(x @ x.T, slopes, keep, damping)
    assert not found[~keep].any()
    left = slopes - found @ (x @ x.T + damping * torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(left[keep], torch.zeros_like(left[keep]), rtol=0, atol=1e-8)


def test_inputs_that_depend_on_each_other_have_a_solution_without_damping():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 4)).double()
    model = copy.deepcopy(dense)
    x = torch.randn(50, 6, dtype=torch.float64)
    x[:, 3], x[:, 5] = x[:, 1], 0
    pu.set_masks(model, {"0.weight": torch.tensor([True, True, False, True, True, True]).expand(4, 6)})
    pu.reconstruct(model, dense, x, damping=0)
    kept = x[:, [0, 1, 3, 4, 5]]
    gap = (kept @ model[0].weight[:, [0, 1, 3, 4, 5]].T - x @ dense[0].weight.T).detach()
    assert (kept.T @ gap).abs().max() < 1e-9  # what is left is orthogonal to all that is kept
    assert torch.isfinite(model[0].weight).all()


# --- reconstruct: the network ----------------------------------------------------------------------------------------


def pruned_pair(name="resnet20", sparsity=0.8, **options):
    dense = pu.models.create(name, **options)
    model = copy.deepcopy(dense)
    pu.prune(model, "magnitude", sparsity)
    return model, dense


def test_layers_follow_each_other_and_no_error_grows():
    model, dense = pruned_pair()
    x = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    gap_before = (model.eval()(x) - dense.eval()(x)).square().mean()
    masks, state = pu.get_masks(model), copy.deepcopy(dense.state_dict())
    table = pu.reconstruct(model, dense, parts(x, [9, 7]))
    assert table["layer"].tolist()[:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"] and len(table) == 20
    assert (table["after"] <= table["before"] + 1e-12).all()
    assert (model(x) - dense(x)).square().mean() < 0.3 * gap_before
    assert all(torch.equal(mask, masks[name]) for name, mask in pu.get_masks(model).items())
    assert pu.count(model).sparsity == pytest.approx(0.8, abs=1e-5)
    assert all(torch.equal(value, state[name]) for name, value in dense.state_dict().items())


def test_the_second_layer_reads_what_the_first_gives_after_its_fit():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    model = copy.deepcopy(dense)
    pu.prune(model, "magnitude", 0.5)
    x = torch.randn(60, 5, dtype=torch.float64)
    pu.reconstruct(model, dense, x, damping=0)
    hidden, keep = torch.tanh(model[0](x)).detach(), pu.get_masks(model)["2.weight"]
    for row in range(3):
        target = (dense(x) - dense[2].bias).detach()[:, row : row + 1]
        wanted = torch.linalg.lstsq(hidden[:, keep[row]], target).solution.flatten()
        torch.testing.assert_close(model[2].weight[row][keep[row]].detach(), wanted, rtol=1e-7, atol=1e-9)


def test_strong_damping_leaves_the_weights_and_an_excluded_layer_stays():
    model, dense = pruned_pair("lenet5")
    x = torch.rand(20, 1, 28, 28)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    table = pu.reconstruct(model, dense, x, damping=1e9, exclude="conv1")
    assert table["layer"].tolist() == ["conv2", "fc1", "fc2"]
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(model.conv1.weight, before["conv1.weight"])


def test_what_is_not_pruned_and_reads_the_same_stays():
    dense = pu.models.create("lenet5")
    model = copy.deepcopy(dense)
    table = pu.reconstruct(model, dense, torch.rand(20, 1, 28, 28))
    assert (table["after"] < 1e-10).all()
    for p, q in zip(model.parameters(), dense.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


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


def test_a_vision_transformer_is_fitted_where_its_layers_are_called():
    options = dict(img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=3)
    dense = pu.models.create("timm/vit_tiny_patch16_224", **options)
    model = copy.deepcopy(dense)
    x = torch.rand(8, 3, 32, 32)
    pu.prune_filters(model, "l1", ratio=0.3, example_inputs=x[:1])
    table = pu.reconstruct(model, dense, x)
    assert {"blocks.0.attn.qkv", "blocks.1.mlp.fc2", "patch_embed.proj"} <= set(table["layer"])
    assert (table["after"] <= table["before"] + 1e-12).all()


def test_a_layer_that_is_called_twice_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.last(self.layer(torch.relu(self.layer(x))))

    dense = Twice()
    model = copy.deepcopy(dense)
    pu.prune(model, sparsity=0.5)
    before = model.layer.weight.detach().clone()
    assert pu.reconstruct(model, dense, torch.rand(20, 6))["layer"].tolist() == ["last"]
    assert torch.equal(model.layer.weight, before)


@pytest.mark.parametrize("waiting", [0, 40_000])
def test_batches_that_cannot_wait_for_each_other_are_run_anew(waiting, monkeypatch):
    """The same to the bit, whether all, some or no layers are visited side by side; one batch norm is called twice."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.last = nn.Linear(8, 3)

        def forward(self, x):
            x = self.norm(self.b(torch.relu(self.norm(self.a(x)))))
            return self.last(torch.nn.functional.avg_pool2d(x, 6).flatten(1))

    torch.manual_seed(0)
    dense, x = Twice(), images(30)
    model = copy.deepcopy(dense)
    pu.prune(model, sparsity=0.5)
    other = copy.deepcopy(model)
    wanted = pu.recalibrate(model, x.split(8)), pu.reconstruct(model, dense, x.split(8))
    monkeypatch.setattr("pruneutils.pruning._passes._WAITING", waiting)
    found = pu.recalibrate(other, x.split(8)), pu.reconstruct(other, dense, x.split(8))
    assert found[0] == wanted[0] and found[1].equals(wanted[1])
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_no_thread_is_left_behind():
    model, dense = pruned_pair("lenet5")
    before = threading.active_count()
    pu.reconstruct(model, dense, torch.rand(20, 1, 28, 28).split(3))
    with pytest.raises(ValueError, match="NaN"):
        pu.reconstruct(model, dense, torch.full((20, 1, 28, 28), float("nan")).split(3))
    with pytest.raises(RuntimeError):  # images that do not fit
        pu.reconstruct(model, dense, torch.rand(20, 1, 9, 9))
    assert threading.active_count() == before


def test_what_goes_wrong_leaves_the_weights_alone():
    model, dense = pruned_pair("lenet5")
    before = copy.deepcopy(model.state_dict())
    x = torch.rand(20, 1, 28, 28)
    dense.conv2.weight.data[0, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="conv2: what it reads, or gives in dense, is NaN or infinite"):
        pu.reconstruct(model, dense, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(damping=-1), "damping must be a number of at least 0, not -1"),
        (dict(damping=float("nan")), "damping"),
        (dict(data=[]), "no sample"),
        (dict(dense="itself"), "dense is the model itself"),
        (dict(dense="lenet300"), "conv1"),
        (dict(dense="wider"), "conv1 has the shape"),
        (dict(exclude="conv9"), "conv9"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    model, dense = pruned_pair("lenet5")
    other = {"itself": model, "lenet300": pu.models.create("lenet300"), "wider": copy.deepcopy(dense)}
    other["wider"].conv1 = nn.Conv2d(1, 8, 5)
    call = dict(data=torch.rand(4, 1, 28, 28)) | arguments
    if isinstance(call.get("dense"), str):
        call["dense"] = other[call["dense"]]
    with pytest.raises(ValueError, match=message):
        pu.reconstruct(model, **dict(dense=dense) | call)


def test_transposed_convolutions_are_refused():
    dense = nn.Sequential(nn.ConvTranspose2d(2, 3, 3))
    with pytest.raises(ValueError, match="0 is a transposed convolution"):
        pu.reconstruct(copy.deepcopy(dense), dense, torch.rand(2, 2, 5, 5))
