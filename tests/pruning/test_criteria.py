"""Criteria: closed forms in float64, golden counts of SynFlow, no trace left by scoring, errors, no revival."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import pruneutils as pu
from pruneutils._torch import generator
from pruneutils.costs import cost
from pruneutils.pruning import gradients

DATA_FREE = {"random", "magnitude", "lamp"}
pytestmark = pytest.mark.filterwarnings("ignore")  # test_pruning looks at ties and collapse


def two_layers(seed=0, smooth=True):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh() if smooth else nn.ReLU(), nn.Linear(5, 3)).double()


def batch(n=7, seed=1, shape=(4,), classes=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, *shape, generator=generator, dtype=dtype)
    return inputs, torch.randint(classes, (n,), generator=generator)


def conv_net(seed=0, dtype=torch.float64):
    """Batch norm with statistics that training would move, dropout, a grouped convolution."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 6, 3, groups=2)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 3)).to(dtype)


def by_hand(model, inputs, targets):
    """Gradients of the mean cross-entropy of `two_layers` by the chain rule on paper, (weights of 0, weights of 2)."""
    first, last = model[0], model[2]
    hidden = torch.tanh(inputs @ first.weight.T + first.bias)
    p = torch.softmax(hidden @ last.weight.T + last.bias, 1)
    back = (p - F.one_hot(targets, 3)) / len(targets)
    back_hidden = back @ last.weight * (1 - hidden**2)
    return (back_hidden.T @ inputs).detach(), (back.T @ hidden).detach()


def assert_scores(found, expected):
    assert list(found) == ["0.weight", "2.weight"]
    for score, wanted in zip(found.values(), expected):
        torch.testing.assert_close(score, wanted, rtol=1e-10, atol=1e-15)
        assert not score.requires_grad


def weights_of(model):
    return [weight.detach() for weight in pu.prunable_weights(model).values()]


def flat(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def arguments_of(name, data, reference):
    """What a criterion needs beside the model."""
    return {"reference": reference} if name == "movement" else {"data": data}


def test_weights_alone():
    model, reference = two_layers(), two_layers(5)
    assert_scores(pu.scores(model, "magnitude"), [w.abs() for w in weights_of(model)])
    expected = [w * (w - w0) for w, w0 in zip(weights_of(model), weights_of(reference))]
    assert_scores(pu.scores(model, "movement", reference=reference), expected)
    assert_scores(pu.scores(model, "movement", reference=reference.state_dict()), expected)
    with pytest.raises(ValueError, match="no '0.weight' of shape"):
        pu.scores(model, "movement", reference=nn.Sequential(nn.Linear(4, 6)))


def test_lamp_is_the_square_over_the_squares_that_are_no_smaller():
    model = two_layers()
    expected = []
    for weight in weights_of(model):
        squares = weight.square()
        expected.append(squares / torch.stack([squares[squares >= s].sum() for s in squares.flatten()]).view_as(weight))
    assert_scores(pu.scores(model, "lamp"), expected)
    model[2].weight.data *= 1e-6  # the layers need no scope
    assert all(mask.any() for mask in pu.prune(model, "lamp", sparsity=0.9).values())
    squares = (large := nn.Linear(600, 500)).weight.detach().flatten().double().square().sort().values
    found = pu.scores(large, "lamp")["weight"].flatten()[large.weight.abs().flatten().argsort()].double()
    assert (found.diff() >= 0).all()  # in bins, as such a layer takes long to sort
    wanted = squares / squares.flip(0).cumsum(0).flip(0)
    assert ((found / wanted - 1).abs()[:-3000] < 0.01).all()


def test_random_is_uniform_and_belongs_to_its_seed():
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 50))
    found = pu.scores(model, "random", seed=3)
    values = flat(found.values())
    assert 0 <= values.min() and values.max() < 1 and len(values.unique()) == 15_000
    other = flat(pu.scores(model.double(), "random", seed=4).values())
    assert abs(torch.corrcoef(torch.stack([values, other]))[0, 1]) < 0.04
    drawn = torch.rand(100, 100, generator=generator(3, "random"), dtype=torch.float64)
    assert torch.equal(found["0.weight"], drawn)


def test_first_order_criteria():
    model, (inputs, targets) = two_layers(), batch()
    gradients = by_hand(model, inputs, targets)
    singles = [by_hand(model, x[None], y[None]) for x, y in zip(inputs, targets)]
    squares = [sum(g**2 for g in layer) / len(singles) for layer in zip(*singles)]
    for name, form in {
        "gradient": lambda w, g, f: g.abs(),
        "snip": lambda w, g, f: (w * g).abs(),
        "taylor": lambda w, g, f: (w * g) ** 2,
        "fisher": lambda w, g, f: w**2 * f,  # the mean over samples of squared gradients, not the square of their mean
    }.items():
        expected = [form(w, g, f) for w, g, f in zip(weights_of(model), gradients, squares)]
        assert_scores(pu.scores(model, name, (inputs, targets)), expected)
    found = pu.scores(model, "snip", (inputs, targets), loss_fn=lambda out, y: 2 * F.cross_entropy(out, y))
    assert_scores(found, [2 * (w * g).abs() for w, g in zip(weights_of(model), gradients)])


@pytest.mark.parametrize("name", ["gradient", "snip", "taylor", "fisher", "grasp", "wanda"])
def test_several_batches_count_as_one(name):
    model, (inputs, targets) = two_layers(), batch(9)
    parts = [(inputs[:2], targets[:2]), (inputs[2:8], targets[2:8]), (inputs[8:], targets[8:])]
    whole = pu.scores(model, name, (inputs, targets))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=4)
    for data in (parts, iter(parts), loader):
        assert_scores(pu.scores(model, name, data), whole.values())


# --- GraSP -----------------------------------------------------------------------------------------------------------


def tempered_loss(model, inputs, targets, temperature):
    """The loss as a function of all prunable weights in one vector."""
    shapes = {name: w.shape for name, w in pu.prunable_weights(model).items()}

    def loss(vector):
        parts = vector.split([shape.numel() for shape in shapes.values()])
        tensors = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts)}
        return F.cross_entropy(torch.func.functional_call(model, tensors, (inputs,)) / temperature, targets)

    return loss, flat(weights_of(model)).clone()


@pytest.mark.parametrize("temperature", [200.0, 0.5])
@pytest.mark.parametrize("smooth", [True, False])
def test_grasp_against_the_dense_hessian(temperature, smooth):
    model, (inputs, targets) = two_layers(smooth=smooth), batch()
    loss, at = tempered_loss(model, inputs, targets, temperature)
    g = torch.autograd.functional.jacobian(loss, at)
    expected = at * (torch.autograd.functional.hessian(loss, at) @ g)
    found = flat(pu.scores(model, "grasp", (inputs, targets), temperature=temperature).values())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    absolute = pu.scores(model, "grasp", (inputs, targets), temperature=temperature, absolute=True)
    torch.testing.assert_close(flat(absolute.values()), expected.abs(), rtol=1e-9, atol=0)


OPTIONS = [{}, {"stride": 2}, {"padding": 1, "bias": False}, {"padding": "same"}, {"dilation": 2}, {"groups": 2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_grasp_is_that_of_torch_through_convolutions_and_batch_norm(options, affine):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, **options), nn.BatchNorm2d(4, affine=affine), nn.ReLU(), nn.Conv2d(4, 4, 3, **options)]
    layers += [nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 8)]
    layers += [nn.BatchNorm1d(8, track_running_stats=False), nn.Softplus(), nn.Linear(8, 3)]
    model = nn.Sequential(*layers).double()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    inputs, targets = batch(9, shape=(2, 9, 9))
    model.eval()

    def by_torch(parameters, temperature):
        g = torch.autograd.grad(F.cross_entropy(model(inputs) / temperature, targets), parameters, create_graph=True)
        return torch.autograd.grad(g, parameters, grad_outputs=[each.detach() for each in g])

    weights = list(pu.prunable_weights(model).values())
    found = pu.scores(model, "grasp", (inputs, targets)).values()
    for score, weight, product in zip(found, weights, by_torch(weights, 200), strict=True):
        torch.testing.assert_close(score, (weight * product).detach(), rtol=1e-9, atol=1e-15)
    parameters = list(model.parameters())  # those of batch norm get their share where they are asked for
    found = gradients.hessian_gradient(model, parameters, [(inputs, targets, 1.0)], F.cross_entropy)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found, by_torch(parameters, 1)))


def test_grasp_through_fused_attention():
    """torch's fused attention has no second derivative, so that asking for one is an error."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(40, 3)

        def forward(self, x):
            parts = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)  # 3 of (N, 2 heads, 5 tokens, 4)
            return self.out(F.scaled_dot_product_attention(*parts).flatten(1))

    torch.manual_seed(0)
    model, data = Attention().double(), batch(4, shape=(5, 8))
    found = pu.scores(model, "grasp", data, temperature=1.0)
    loss, at = tempered_loss(model, *data, 1.0)
    with sdpa_kernel(SDPBackend.MATH):
        g = torch.autograd.functional.jacobian(loss, at)
        expected = at * torch.autograd.functional.hvp(loss, at, g)[1]
    torch.testing.assert_close(flat(found.values()), expected, rtol=1e-7, atol=1e-14)


# --- SynFlow ---------------------------------------------------------------------------------------------------------


def golden(build):
    """Build a network in the random state that the published runs had when they built theirs."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        torch.randperm(50_000)
        return build()


def vgg16():
    layers, channels = [], 3
    for width in [64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512]:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
        channels = width or channels
    model = nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(512, 10))
    for module in model:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def fc():
    widths = [784, 100, 100, 100, 100, 100, 10]
    layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


GOLDEN = {  # share of the MACs that is left, and kept per layer, one-shot at density 10 ** -a
    0.05: (0.9488, "1728 36800 73467 146453 290828 573670 573764 1113797 2096552 2096308 2042337 2043335 2021122 5118"),
    0.1: (0.9026, "1727 36738 73219 145528 287303 558780 558895 1053087 1859957 1859022 1761270 1761426 1726934 5118"),
    0.5: (0.6423, "1724 36267 71488 138679 260086 452250 452069 644784 548409 548995 498901 499129 495588 5108"),
    1: (0.4571, "1723 35566 68463 126774 214301 286024 285914 191178 18779 18776 69800 70005 79162 5094"),
}


@pytest.mark.slow
def test_synflow_golden_counts_of_vgg16():
    dense, x = golden(vgg16), torch.zeros(1, 3, 32, 32)
    sums = torch.stack([s.sum() for s in pu.scores(dense, "synflow", x).values()])
    torch.testing.assert_close(sums, sums[:1].expand(14), rtol=1e-6, atol=0)  # the flow is conserved
    for a, (macs, published) in GOLDEN.items():
        model = copy.deepcopy(dense)
        pu.prune(model, "synflow", sparsity=1 - 10**-a, data=x)
        table = pu.layer_table(model)
        published = [int(kept) for kept in published.split()]
        assert ((table["kept"] - published).abs() / table["total"]).max() <= 0.0005
        assert table["kept"].sum() == 14_715_584 - round((1 - 10**-a) * 14_715_584)
        assert round(cost(model, x).mac_density, 4) == macs


def test_synflow_at_once_empties_the_input_layer_of_fc_and_in_100_iterations_does_not():
    kept = []
    for iterations in (1, 100):
        pu.prune(model := golden(fc), "synflow", sparsity=0.9, data=torch.zeros(1, 1, 28, 28), iterations=iterations)
        kept.append(pu.layer_table(model)["kept"])
    assert kept[0][0] == 0 and kept[0].sum() == kept[1].sum() == 11_940
    assert kept[1].idxmax() == 0 and kept[1].min() > 0


def synflow_by_definition(model, inputs):
    """|w dR/dw| in float64, as the paper writes it."""
    exact = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for tensor in (*exact.parameters(), *exact.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.abs())
    weights = pu.prunable_weights(exact)
    flow = exact(torch.ones_like(inputs[:1], dtype=torch.float64)).sum()
    gradients = torch.autograd.grad(flow, weights.values())
    return {name: (w * g).detach() for (name, w), g in zip(weights.items(), gradients)}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from((torch.float32, torch.float64, torch.bfloat16)))
def test_synflow_and_its_iterations_are_those_of_the_definition(seed, normalized, dtype):
    torch.manual_seed(seed)
    norm = [nn.BatchNorm2d(3)] * normalized
    layers = [nn.Conv2d(2, 3, 3, padding=1), *norm, nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1), nn.PReLU(), nn.Flatten()]
    model, x = nn.Sequential(*layers, nn.Linear(64, 3)).to(dtype), torch.zeros(1, 2, 4, 4)
    found = pu.scores(model, "synflow", x)
    for name, score in synflow_by_definition(model, x).items():
        assert torch.allclose(found[name], score, rtol=1e-12, atol=0)
    twin, total = copy.deepcopy(model), pu.count(model).total
    for step in (1, 2, 3):
        density = (1 - round(0.7 * total) / total) ** (step / 3)
        after = pu.prune(twin, "synflow", sparsity=round(total * (1 - density)) / total, data=x)
    masks = pu.prune(model, "synflow", sparsity=0.7, data=x, iterations=3)
    assert masks.kept == total - round(0.7 * total)
    assert all(torch.equal(masks[name], after[name]) for name in masks)


def test_wanda_by_hand():
    model, (inputs, targets) = two_layers(), batch()
    first, last = weights_of(model)
    hidden = torch.tanh(inputs @ first.T + model[0].bias.detach())
    expected = [first.abs() * inputs.norm(dim=0), last.abs() * hidden.norm(dim=0)]
    assert_scores(pu.scores(model, "wanda", (inputs, targets)), expected)
    assert_scores(pu.scores(model, "wanda", (inputs[:, None], targets)), expected)  # positions count as samples


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_wanda_reads_the_channel_that_the_weight_multiplies(groups, transposed):
    """Only one input channel is non-zero: exactly the weights that change the output score above zero."""
    layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(4, 6, 2, groups=groups, bias=False).double()
    for channel in range(4):
        inputs = torch.zeros(3, 4, 5, 5, dtype=torch.float64)
        inputs[:, channel] = torch.randn(3, 5, 5, dtype=torch.float64)
        found = pu.scores(nn.Sequential(layer), "wanda", (inputs, torch.zeros(3)))["0.weight"]
        output = layer(inputs)
        (matters,) = torch.autograd.grad((output * torch.randn_like(output)).sum(), layer.weight)
        torch.testing.assert_close(found, layer.weight.detach().abs() * inputs.norm() * (matters != 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", pu.list_criteria())
def test_half_precision_gives_the_masks_of_float32(name, dtype):
    """Squares of these inputs are no half, those of the gradients neither, and both are summed over many batches."""
    model, (inputs, targets) = conv_net(dtype=dtype), batch(40, shape=(2, 6, 6), dtype=dtype)
    model[7].weight.data *= 1e-3
    data = [(400 * x, y) for x, y in zip(inputs.split(1), targets.split(1))]
    arguments = arguments_of(name, data, conv_net(8).to(dtype))
    exact, before = copy.deepcopy(model).float(), state_of(model)
    pu.scores(model, name, **arguments)
    assert_same_state(before, state_of(model))
    masks = pu.prune(model, name, 0.5, **arguments)
    arguments = arguments_of(name, [(x.float(), y) for x, y in data], conv_net(8).to(dtype))
    wanted = pu.prune(exact, name, 0.5, **arguments)
    assert all(torch.equal(masks[key], wanted[key]) for key in wanted)


def test_sums_over_many_batches_do_not_saturate():
    model, ones = nn.Sequential(nn.Linear(2, 2)).bfloat16(), torch.ones(1, 2, dtype=torch.bfloat16)
    found = pu.scores(model, "wanda", [ones] * 1024)["0.weight"]
    assert torch.equal(found, 32 * model[0].weight.detach().float().abs())


# --- No trace --------------------------------------------------------------------------------------------------------


def state_of(model):
    """Everything that scoring must leave alone: tensors, gradients, modes, hooks, random state."""
    tensors = {name: (value.clone(), value.data_ptr()) for name, value in model.state_dict().items()}
    gradients = [(p.grad, None if p.grad is None else p.grad.clone(), p.requires_grad) for p in model.parameters()]
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    modules = [(m.training, sorted(vars(m)), *(list(vars(m)[kind]) for kind in kinds)) for m in model.modules()]
    return tensors, gradients, modules, torch.get_rng_state(), torch.is_grad_enabled()


def assert_same_state(before, after):
    for key, (value, place) in before[0].items():
        assert torch.equal(value, after[0][key][0]) and place == after[0][key][1], key
    for (gradient, value, requires), (gradient2, value2, requires2) in zip(before[1], after[1]):
        assert gradient is gradient2 and requires == requires2 and (value is None or torch.equal(value, value2))
    assert before[2] == after[2] and before[4] == after[4] and torch.equal(before[3], after[3])


def failing(model, data):
    model(data[0])
    torch.rand(3)
    raise RuntimeError("on purpose")


@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("name", [*pu.list_criteria(), failing])
def test_scoring_leaves_no_trace(name, train_mode):
    model, data = conv_net(), batch(8, shape=(2, 6, 6))
    model(data[0])  # statistics that are not those of the beginning
    pu.prune(model, "random", sparsity=0.3)
    model[4].eval()
    model[7].bias.requires_grad_(False)
    model[4].weight.requires_grad_(False)
    model[0].weight.grad = torch.randn_like(model[0].weight)
    arguments = arguments_of(name, data, conv_net(8))
    before = state_of(model)
    if name is failing:
        with pytest.raises(RuntimeError, match="on purpose"):
            pu.scores(model, name, train_mode=train_mode, **arguments)
        assert_same_state(before, state_of(model))
        return
    found = pu.scores(model, name, train_mode=train_mode, seed=4, **arguments)
    assert_same_state(before, state_of(model))
    with torch.no_grad():  # frozen weights and switched-off gradients change nothing
        again = pu.scores(model.requires_grad_(False), name, train_mode=train_mode, seed=4, **arguments)
    assert all(torch.equal(found[key], again[key]) for key in found)
    other = pu.scores(model, name, train_mode=not train_mode, seed=4, **arguments)["0.weight"]
    assert torch.equal(found["0.weight"], other) == (name in DATA_FREE | {"synflow", "movement", "wanda"})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", sorted(set(pu.list_criteria()) - {"movement"}))
def test_scores_on_a_gpu(name):
    model, data = conv_net(), batch(8, shape=(2, 6, 6))
    here = pu.scores(model, name, data)
    there = pu.scores(model.cuda(), name, data)
    for key, score in here.items():
        assert there[key].is_cuda
        torch.testing.assert_close(there[key].cpu(), score, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("name", [name for name in pu.list_criteria() if name not in DATA_FREE])
def test_what_is_missing_or_not_finite_is_an_error(name):
    model, (inputs, targets) = two_layers(), batch()
    with pytest.raises(TypeError, match=f"'{name}' has no option temprature"):
        pu.scores(model, name, (inputs, targets), temprature=3)
    with pytest.raises(ValueError, match=f"'{name}' needs {'reference' if name == 'movement' else 'data'}"):
        pu.scores(model, name)
    if name == "movement":
        return
    with pytest.raises(ValueError, match="no sample"):
        pu.scores(model, name, [])
    if name == "synflow":
        return
    for bad in (torch.nan, torch.inf):
        inputs[0, 0] = bad
        before = [w.clone() for w in weights_of(model)]
        with pytest.raises(ValueError, match=r"0.weight has \d+ of 20 scores that are NaN or infinite"):
            pu.prune(model, name, sparsity=0.5, data=(inputs, targets), iterations=2)
        assert all(torch.equal(a, b) for a, b in zip(before, weights_of(model))) and not pu.get_masks(model)
