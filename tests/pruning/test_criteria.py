"""Criteria: closed forms in float64, golden counts of SynFlow, no trace left by scoring, errors, no revival."""

import copy
import warnings

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
from pruneutils.pruning import criteria

DATA_FREE = {"random", "magnitude", "lamp"}


@pytest.fixture(autouse=True)
def quiet():
    """Collapse and ties are expected here wherever they occur; test_pruning looks at the warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pu.LayerCollapseWarning)
        warnings.simplefilter("ignore", pu.TiedScoresWarning)
        yield


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
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 6, 3, groups=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 3),
    ).to(dtype)  # fmt: skip


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


# --- Closed forms ----------------------------------------------------------------------------------------------------


def test_every_criterion_is_tested_here():
    assert set(pu.list_criteria()) == {
        "random", "magnitude", "lamp", "gradient", "snip", "taylor", "fisher", "grasp", "synflow", "wanda",
        "movement",
    }  # fmt: skip


def test_lamp_is_the_square_over_the_squares_that_are_no_smaller():
    model = two_layers()
    expected = []
    for weight in weights_of(model):
        squares = weight.square()
        expected.append(squares / torch.stack([squares[squares >= s].sum() for s in squares.flatten()]).view_as(weight))
    assert_scores(pu.scores(model, "lamp"), expected)
    assert all(float(score.max()) == 1 for score in expected)


def test_lamp_needs_no_scope_to_leave_some_weights_in_each_layer():
    model = two_layers()
    with torch.no_grad():
        model[2].weight *= 1e-6
    assert pu.layer_table(pu.prune(model, "lamp", sparsity=0.9) and model).kept.min() > 0


def test_random_is_uniform_and_belongs_to_its_seed():
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 50))
    found = pu.scores(model, "random", seed=3)
    values = flat(found.values())
    assert 0 <= values.min() and values.max() < 1 and len(values.unique()) == 15_000
    # Kolmogorov-Smirnov distance from the uniform distribution; 1.95 / sqrt(n) is passed once in a thousand seeds
    steps = torch.arange(1, 15_001, dtype=torch.float64) / 15_000
    assert (values.sort().values - steps).abs().max() < 1.95 / 15_000**0.5
    again, other = pu.scores(model, "random", seed=3), pu.scores(model, "random", seed=4)
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert abs(torch.corrcoef(torch.stack([values, flat(other.values())]))[0, 1]) < 0.04
    # neither the global state nor the weights' type have a say, and the draws come from the CPU's generator
    torch.manual_seed(99)
    torch.rand(5)
    assert torch.equal(pu.scores(model.double(), "random", seed=3)["0.weight"], found["0.weight"])
    drawn = torch.rand(100, 100, generator=generator(3, "random"), dtype=torch.float64)
    assert torch.equal(found["0.weight"], drawn)


def test_magnitude():
    model = two_layers()
    assert_scores(pu.scores(model, "magnitude"), [w.abs() for w in weights_of(model)])


@pytest.mark.parametrize(
    "name, form",
    [
        ("gradient", lambda w, g: g.abs()),
        ("snip", lambda w, g: (w * g).abs()),
        ("taylor", lambda w, g: (w * g) ** 2),
    ],
)
def test_first_order_criteria(name, form):
    model, (inputs, targets) = two_layers(), batch()
    expected = [form(w, g) for w, g in zip(weights_of(model), by_hand(model, inputs, targets))]
    assert_scores(pu.scores(model, name, (inputs, targets)), expected)


def test_snip_is_the_gradient_of_the_mask():
    model, (inputs, targets) = two_layers(), batch()
    masks = [torch.ones_like(w, requires_grad=True) for w in weights_of(model)]
    masked = {name: w * m for (name, w), m in zip(pu.prunable_weights(model).items(), masks)}
    loss = F.cross_entropy(torch.func.functional_call(model, masked, (inputs,)), targets)
    assert_scores(pu.scores(model, "snip", (inputs, targets)), [g.abs() for g in torch.autograd.grad(loss, masks)])


def test_fisher_is_a_mean_over_single_samples():
    model, (inputs, targets) = two_layers(), batch()
    singles = [by_hand(model, x[None], y[None]) for x, y in zip(inputs, targets)]
    mean = [sum(g**2 for g in layer) / len(singles) for layer in zip(*singles)]
    expected = [w**2 * f for w, f in zip(weights_of(model), mean)]
    assert_scores(pu.scores(model, "fisher", (inputs, targets)), expected)
    squared_mean = [w**2 * g**2 for w, g in zip(weights_of(model), by_hand(model, inputs, targets))]
    assert not torch.allclose(expected[0], squared_mean[0], rtol=0.01)  # the difference would be seen


@pytest.mark.parametrize("loss_fn", [F.multi_margin_loss, lambda out, y: (out[range(len(y)), y] ** 2).mean()])
def test_a_loss_of_ones_own(loss_fn):
    model, (inputs, targets) = two_layers(), batch()
    g = torch.autograd.grad(loss_fn(model(inputs), targets), list(pu.prunable_weights(model).values()))
    found = pu.scores(model, "snip", (inputs, targets), loss_fn=loss_fn)
    assert_scores(found, [(w * d).abs() for w, d in zip(weights_of(model), g)])


@pytest.mark.parametrize("name", ["gradient", "snip", "taylor", "fisher", "grasp", "wanda"])
def test_several_batches_count_as_one(name):
    model, (inputs, targets) = two_layers(), batch(9)
    parts = [(inputs[:2], targets[:2]), (inputs[2:8], targets[2:8]), (inputs[8:], targets[8:])]
    whole = pu.scores(model, name, (inputs, targets))
    assert_scores(pu.scores(model, name, parts), whole.values())
    assert_scores(pu.scores(model, name, iter(parts)), whole.values())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=4)
    assert_scores(pu.scores(model, name, loader), whole.values())


# --- GraSP -----------------------------------------------------------------------------------------------------------


def tempered_loss(model, inputs, targets, temperature):
    """The loss as a function of all prunable weights in one vector."""
    shapes = {name: w.shape for name, w in pu.prunable_weights(model).items()}

    def loss(vector):
        parts = vector.split([shape.numel() for shape in shapes.values()])
        tensors = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts)}
        return F.cross_entropy(torch.func.functional_call(model, tensors, (inputs,)) / temperature, targets)

    return loss, flat(weights_of(model)).clone()


@pytest.mark.parametrize("temperature", [200.0, 1.0, 0.5])
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


def test_grasp_against_finite_differences():
    model, (inputs, targets) = two_layers(), batch()
    loss, at = tempered_loss(model, inputs, targets, 200.0)

    def gradient(vector):
        return torch.autograd.functional.jacobian(loss, vector)

    g = gradient(at)
    step = 1e-5 / g.norm()
    expected = at * (gradient(at + step * g) - gradient(at - step * g)) / (2 * step)
    found = flat(pu.scores(model, "grasp", (inputs, targets)).values())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("affine", [True, False])
def test_grasp_through_fixed_batch_norm_is_that_of_torch(affine):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, affine=affine), nn.Softplus(), nn.Flatten(), nn.Linear(48, 8),
        nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3),
    ).double()  # fmt: skip
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    inputs, targets = batch(9, shape=(2, 6, 6))
    model.eval()
    weights = list(pu.prunable_weights(model).values())
    loss = F.cross_entropy(model(inputs) / 200, targets)
    g = torch.autograd.grad(loss, weights, create_graph=True)
    products = torch.autograd.grad(g, weights, grad_outputs=[each.detach() for each in g])
    expected = [(w * h).detach() for w, h in zip(weights, products)]
    for score, wanted in zip(pu.scores(model, "grasp", (inputs, targets)).values(), expected, strict=True):
        torch.testing.assert_close(score, wanted, rtol=1e-9, atol=1e-15)
    # parameters of the batch norm that are asked for get their share too
    if affine:
        parameters = list(model.parameters())
        g = torch.autograd.grad(F.cross_entropy(model(inputs), targets), parameters, create_graph=True)
        wanted = torch.autograd.grad(g, parameters, grad_outputs=[each.detach() for each in g])
        found = criteria.hessian_gradient(model, parameters, [(inputs, targets, 1.0)], F.cross_entropy)
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found, wanted))


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2}, {"padding": 1, "bias": False}, {"padding": "same"}, {"dilation": 2}, {"groups": 2}],
    ids=str,
)
def test_grasp_through_convolutions_is_that_of_torch(options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, **options), nn.ReLU(), nn.Conv2d(4, 4, 3, **options),
        nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3),
    ).double()  # fmt: skip
    inputs, targets = batch(9, shape=(2, 9, 9))
    for asked in (inputs, inputs.clone().requires_grad_()):  # whoever hands in the second loses nothing by it
        weights = list(pu.prunable_weights(model).values())
        g = torch.autograd.grad(F.cross_entropy(model(inputs) / 200, targets), weights, create_graph=True)
        products = torch.autograd.grad(g, weights, grad_outputs=[each.detach() for each in g])
        found = pu.scores(model, "grasp", (asked, targets)).values()
        for score, weight, product in zip(found, weights, products, strict=True):
            torch.testing.assert_close(score, (weight * product).detach(), rtol=1e-9, atol=1e-15)


def test_grasp_default_temperature_is_200():
    model, data = two_layers(), batch()
    assert_scores(pu.scores(model, "grasp", data), pu.scores(model, "grasp", data, temperature=200.0).values())


def test_grasp_removes_first_what_raises_the_gradient_norm_most():
    """Taking a share eps of weight i away changes |g|^2 by -2 eps w_i (Hg)_i, the more the lower its score."""
    model, (inputs, targets) = two_layers(), batch()
    loss, at = tempered_loss(model, inputs, targets, 200.0)
    score = flat(pu.scores(model, "grasp", (inputs, targets)).values())

    def squared_norm(vector):
        return torch.autograd.functional.jacobian(loss, vector).square().sum()

    eps, before = 1e-4, squared_norm(at)
    changes = torch.stack([squared_norm(at - eps * at * row) - before for row in torch.eye(len(at), dtype=at.dtype)])
    torch.testing.assert_close(changes, -2 * eps * score, rtol=1e-2, atol=2e-3 * changes.abs().max().item())
    assert changes[score.argmin()] > 0 > changes[score.argmax()]
    assert torch.equal(changes.argsort(descending=True)[:5], score.argsort()[:5])
    # and in earnest, not only to first order
    order = score.argsort()
    lowest, highest = at.clone(), at.clone()
    lowest[order[:3]], highest[order[-3:]] = 0, 0
    assert squared_norm(lowest) > squared_norm(highest)


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


def test_layers_the_loss_ignores_score_zero():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    for name in ("gradient", "snip", "taylor", "fisher", "grasp", "synflow"):
        found = pu.scores(Forked(), name, batch(dtype=torch.float32))
        assert found["used.weight"].any() and not found["unused.weight"].any(), name


# --- SynFlow ---------------------------------------------------------------------------------------------------------


def test_synflow_of_two_layers_by_hand():
    model = two_layers(smooth=False)
    first, last = weights_of(model)
    one, two = first.abs(), last.abs()
    hidden = one.sum(1) + model[0].bias.abs()  # of ones; positive, so that ReLU lets all pass
    expected = [one * two.sum(0)[:, None], two * hidden]
    assert_scores(pu.scores(model, "synflow", batch()), expected)
    assert_scores(pu.scores(model, "synflow", batch()[0]), expected)  # only the shape of the inputs is used
    assert_scores(pu.scores(model, "synflow", [batch(3)]), expected)


def test_synflow_uses_running_statistics_and_float64():
    model = conv_net(dtype=torch.float32)
    model(torch.randn(8, 2, 6, 6))  # moves the statistics
    found = pu.scores(model, "synflow", torch.zeros(5, 2, 6, 6))
    double = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for tensor in (*double.parameters(), *double.buffers()):
            tensor.abs_()
    double(torch.ones(1, 2, 6, 6, dtype=torch.float64)).sum().backward()
    for name, weight in pu.prunable_weights(double).items():
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], weight.detach() * weight.grad, rtol=1e-12, atol=0)


def seed_of_the_golden_counts(build):
    """The random state that the published runs had when they built their model."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        torch.randperm(50_000)
        return build()


def vgg16():
    def build():
        layers, channels = [], 3
        for width in [64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512]:
            if width:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        model = nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(512, 10))
        for module in model:
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)
        return model

    return seed_of_the_golden_counts(build)


GOLDEN = {  # kept per layer and share of the MACs that is left, one-shot at density 10 ** -a
    0.05: (0.9488, [1728, 36800, 73467, 146453, 290828, 573670, 573764, 1113797, 2096552, 2096308, 2042337, 2043335,
                    2021122, 5118]),
    0.1: (0.9026, [1727, 36738, 73219, 145528, 287303, 558780, 558895, 1053087, 1859957, 1859022, 1761270, 1761426,
                   1726934, 5118]),
    0.5: (0.6423, [1724, 36267, 71488, 138679, 260086, 452250, 452069, 644784, 548409, 548995, 498901, 499129, 495588,
                   5108]),
    1: (0.4571, [1723, 35566, 68463, 126774, 214301, 286024, 285914, 191178, 18779, 18776, 69800, 70005, 79162, 5094]),
}  # fmt: skip


@pytest.mark.slow
def test_synflow_golden_counts_of_vgg16():
    dense, x = vgg16(), torch.zeros(1, 3, 32, 32)
    for a, (macs, golden) in GOLDEN.items():
        model = copy.deepcopy(dense)
        pu.prune(model, "synflow", sparsity=1 - 10**-a, data=x)
        table = pu.layer_table(model)
        deviation = [abs(kept - wanted) / total for kept, wanted, total in zip(table["kept"], golden, table["total"])]
        assert max(deviation) <= 0.0005
        assert table["kept"].sum() == 14_715_584 - round((1 - 10**-a) * 14_715_584)
        assert round(cost(model, x).mac_density, 4) == macs


@pytest.mark.slow
def test_synflow_conserves_the_flow_of_vgg16():
    sums = torch.stack([s.sum() for s in pu.scores(vgg16(), "synflow", torch.zeros(1, 3, 32, 32)).values()])
    assert len(sums) == 14
    torch.testing.assert_close(sums, sums[:1].expand(14), rtol=1e-6, atol=0)


@pytest.mark.slow
def test_synflow_in_100_iterations_empties_no_layer_of_vgg16():
    model = vgg16()
    pu.prune(model, "synflow", sparsity=0.99, data=torch.zeros(1, 3, 32, 32), iterations=100)
    kept = pu.layer_table(model)["kept"]
    assert kept.sum() == 14_715_584 - round(0.99 * 14_715_584)
    assert kept[1:].min() > 3500 and kept[0] > 0


def fc():
    def build():
        widths = [784, 100, 100, 100, 100, 100, 10]
        layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), *layers[:-1])

    return seed_of_the_golden_counts(build)


def test_synflow_at_once_empties_the_input_layer_of_fc_and_in_100_iterations_does_not():
    x = torch.zeros(1, 1, 28, 28)
    model = fc()
    pu.prune(model, "synflow", sparsity=0.9, data=x)
    table = pu.layer_table(model)
    assert table["kept"][0] == 0 and table["kept"].sum() == 11_940
    model = fc()
    pu.prune(model, "synflow", sparsity=0.9, data=x, iterations=100)
    table = pu.layer_table(model)
    assert table["kept"].idxmax() == 0 and table["kept"].min() > 0 and table["kept"].sum() == 11_940


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


class Scaled(nn.Module):
    """A factor without dimensions, as some networks have."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(-0.5))

    def forward(self, x):
        return self.factor * x


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6), st.lists(st.integers(1, 5), min_size=2, max_size=4), st.booleans(), st.integers(1, 4),
    st.sampled_from((torch.float32, torch.float64, torch.bfloat16)),
)  # fmt: skip
def test_synflow_and_its_iterations_are_those_of_the_definition(seed, widths, normalized, iterations, dtype):
    torch.manual_seed(seed)
    layers = []
    for inputs, outputs in zip([2, *widths], widths):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1)] + [nn.BatchNorm2d(outputs)] * normalized + [nn.ReLU()]
    model = nn.Sequential(*layers, Scaled(), nn.Flatten(), nn.Linear(widths[-1] * 16, 3)).to(dtype)
    x = torch.zeros(1, 2, 4, 4)
    weights = {name: w.detach().clone() for name, w in pu.prunable_weights(model).items()}
    found = pu.scores(model, "synflow", x)
    for name, score in synflow_by_definition(model, x).items():
        assert torch.allclose(found[name], score, rtol=1e-12, atol=0)
    assert all(torch.equal(w, weights[name]) for name, w in pu.prunable_weights(model).items())
    # one iteration after the other, each removes what scores lowest, up to rounding
    twin, total = copy.deepcopy(model), sum(w.numel() for w in weights.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(1, iterations + 1):
            before, scores = pu.get_masks(twin), synflow_by_definition(twin, x)
            density = (1 - round(0.7 * total) / total) ** (step / iterations)
            after = pu.prune(twin, "synflow", sparsity=round(total * (1 - density)) / total, data=x)
            gone = [s[before[n] & ~after[n]] if before else s[~after[n]] for n, s in scores.items()]
            kept = flat(score[after[name]] for name, score in scores.items())
            assert flat(gone).max() <= kept.min() * (1 + 1e-12)
        masks = pu.prune(model, "synflow", sparsity=0.7, data=x, iterations=iterations)
    assert masks.kept == total - round(0.7 * total)
    assert all(torch.equal(masks[name], after[name]) for name in masks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 3, 3)])
def test_magnitudes_are_copies_that_begin_as_torchs_memory_does(shape, dtype):
    tensor = -torch.rand(shape).to(dtype)
    tensors = [tensor, tensor.to(memory_format=torch.channels_last)] if len(shape) == 4 else [tensor]
    for each in tensors:
        magnitude = criteria._magnitude_in_float64(each)
        assert torch.equal(magnitude, each.double().abs()) and magnitude.data_ptr() % 64 == 0
        magnitude.zero_()
        assert (each < 0).any()


def test_synflow_is_finite_where_float32_is_not():
    model = pu.models.create("resnet110").eval()
    found = pu.scores(model, "synflow", torch.zeros(1, 3, 32, 32))
    assert flat(found.values()).max() > torch.finfo(torch.float32).max
    with torch.no_grad():
        single = copy.deepcopy(model)
        for tensor in single.parameters():
            tensor.abs_()
        assert not torch.isfinite(single(torch.ones(1, 3, 32, 32))).all()


# --- Wanda and movement ----------------------------------------------------------------------------------------------


def test_wanda_by_hand():
    model, (inputs, targets) = two_layers(), batch()
    first, last = weights_of(model)
    hidden = torch.tanh(inputs @ first.T + model[0].bias.detach())
    expected = [first.abs() * inputs.norm(dim=0), last.abs() * hidden.norm(dim=0)]
    assert_scores(pu.scores(model, "wanda", (inputs, targets)), expected)
    tokens = torch.randn(3, 6, 4, dtype=torch.float64)  # positions in between count as samples
    found = pu.scores(model, "wanda", (tokens, torch.zeros(3)))["0.weight"]
    torch.testing.assert_close(found, first.abs() * tokens.reshape(-1, 4).norm(dim=0))


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


def test_movement():
    model, reference = two_layers(0), two_layers(5)
    expected = [w * (w - w0) for w, w0 in zip(weights_of(model), weights_of(reference))]
    assert_scores(pu.scores(model, "movement", reference=reference), expected)
    assert_scores(pu.scores(model, "movement", reference=reference.state_dict()), expected)


def test_movement_of_one_step_is_the_papers_sum():
    model, (inputs, targets) = two_layers(), batch()
    before, lr = copy.deepcopy(model), 1e-9
    g = by_hand(model, inputs, targets)
    F.cross_entropy(model(inputs), targets).backward()
    torch.optim.SGD(model.parameters(), lr).step()
    expected = [-lr * d * w for d, w in zip(g, weights_of(before))]
    for score, wanted in zip(pu.scores(model, "movement", reference=before).values(), expected):
        torch.testing.assert_close(score, wanted, rtol=1e-4, atol=1e-14)


# --- No trace --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("name", pu.list_criteria())
def test_scoring_leaves_no_trace(name, train_mode):
    model, data = conv_net(), batch(8, shape=(2, 6, 6))
    model(data[0])  # statistics that are not those of the beginning
    pu.prune(model, "random", sparsity=0.3)
    model[4].eval()
    model[7].bias.requires_grad_(False)
    model[4].weight.requires_grad_(False)
    model[0].weight.grad = torch.randn_like(model[0].weight)
    extra = {"reference": conv_net(8)} if name == "movement" else {}

    def state():
        return (
            {name: (value.clone(), value.data_ptr()) for name, value in model.state_dict().items()},
            [(p, id(p.grad), None if p.grad is None else p.grad.clone(), p.requires_grad) for p in model.parameters()],
            [m.training for m in model.modules()],
            [
                [list(vars(m)[key]) for key in sorted(vars(m)) if key.endswith("_hooks")] + [sorted(vars(m))]
                for m in model.modules()
            ],
            torch.get_rng_state(),
            torch.is_grad_enabled(),
        )

    before = state()
    found = pu.scores(model, name, data, train_mode=train_mode, seed=4, **extra)
    after = state()
    for (key, (value, place)), (value2, place2) in zip(before[0].items(), after[0].values()):
        assert torch.equal(value, value2) and place == place2, key
    for (p, gid, grad, requires), (p2, gid2, grad2, requires2) in zip(before[1], after[1]):
        assert p is p2 and gid == gid2 and requires == requires2
        assert grad is None or torch.equal(grad, grad2)
    assert before[2:4] == after[2:4] and before[5] == after[5]
    assert torch.equal(before[4], after[4])
    again = pu.scores(model, name, data, train_mode=train_mode, seed=4, **extra)
    assert all(torch.equal(found[key], again[key]) for key in found)


def test_scoring_that_fails_leaves_no_trace_either():
    model = conv_net().train()
    rng, statistics = torch.get_rng_state(), model[1].running_mean.clone()

    def failing(model, data):
        model(data[0])
        torch.rand(3)
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        pu.scores(model, failing, batch(8, shape=(2, 6, 6)), train_mode=True)
    assert torch.equal(rng, torch.get_rng_state()) and torch.equal(statistics, model[1].running_mean)
    assert all(module.training for module in model.modules())


def test_train_mode_uses_batch_statistics():
    model, data = conv_net(), batch(8, shape=(2, 6, 6))
    evaluated, trained = (pu.scores(model, "snip", data, train_mode=mode)["0.weight"] for mode in (False, True))
    assert not torch.allclose(evaluated, trained)


def test_scoring_without_gradients_switched_on():
    model, data = two_layers(), batch()
    expected = pu.scores(model, "grasp", data)
    with torch.no_grad():
        assert_scores(pu.scores(model, "grasp", data), expected.values())


def test_frozen_weights_are_scored_like_others():
    model, data = two_layers(), batch()
    expected = pu.scores(model, "snip", data)
    model.requires_grad_(False)
    assert_scores(pu.scores(model, "snip", data), expected.values())


def test_exclude():
    assert list(pu.scores(two_layers(), "snip", batch(), exclude=["2"])) == ["0.weight"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", sorted(set(pu.list_criteria()) - {"movement"}))
def test_scores_on_a_gpu(name):
    model, data = conv_net(), batch(8, shape=(2, 6, 6))
    here = pu.scores(model, name, data)
    there = pu.scores(model.cuda(), name, data)
    for key, score in here.items():
        assert there[key].is_cuda
        torch.testing.assert_close(there[key].cpu(), score, rtol=1e-8, atol=1e-14)


# --- Criteria of one's own, and errors -------------------------------------------------------------------------------


def test_any_callable_is_a_criterion():
    model, data = two_layers(), batch()
    seen = []

    def signed(model, data):
        seen.append(data)
        return {name: weight for name, weight in pu.prunable_weights(model).items()}

    assert_scores(pu.scores(model, signed, data), weights_of(model))
    assert_scores(pu.scores(model, signed), weights_of(model))
    assert seen[0] is data and seen[1] is None
    masks = pu.prune(model, signed, sparsity=0.5)
    lowest = flat(weights_of(two_layers())).sort().values[:18]  # round(17.5) of 35
    assert masks.total - masks.kept == 18
    assert torch.equal(flat(weights_of(two_layers()))[~flat(masks.values())].sort().values, lowest)


def test_a_registered_criterion_of_ten_lines(monkeypatch):
    monkeypatch.setattr(criteria, "_CRITERIA", dict(criteria._CRITERIA))

    @pu.criterion
    def distance(model, seed, centre, power=1):
        """How far the weight is from `centre`."""
        return {name: (weight - centre).abs() ** power for name, weight in pu.prunable_weights(model).items()}

    model = two_layers()
    assert pu.list_criteria()[-1] == "distance"
    assert_scores(pu.scores(model, "distance", centre=1, power=2), [(w - 1) ** 2 for w in weights_of(model)])
    with pytest.raises(ValueError, match="'distance' needs centre"):
        pu.scores(model, "distance")
    with pytest.raises(TypeError, match="no option middle; its own: .*centre"):
        pu.scores(model, "distance", middle=1)
    by_distance = pu.prune(model, "distance", sparsity=0.5, centre=0.0)
    by_magnitude = pu.prune(two_layers(), "magnitude", sparsity=0.5)
    assert all(torch.equal(by_distance[name], by_magnitude[name]) for name in by_magnitude)


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown criterion 'magnitud'; did you mean 'magnitude'"):
        pu.scores(two_layers(), "magnitud")
    with pytest.raises(ValueError, match="unknown criterion 'zzz'; known: random, magnitude"):
        pu.scores(two_layers(), "zzz")
    with pytest.raises(TypeError, match="a name or a callable"):
        pu.scores(two_layers(), 3)


@pytest.mark.parametrize("name", sorted(set(pu.list_criteria()) - DATA_FREE - {"movement"}))
def test_missing_and_empty_data(name):
    with pytest.raises(ValueError, match=f"'{name}' needs data"):
        pu.scores(two_layers(), name)
    if name != "synflow":
        with pytest.raises(ValueError, match="no sample"):
            pu.scores(two_layers(), name, [])


def test_missing_and_unfit_reference():
    with pytest.raises(ValueError, match="'movement' needs reference"):
        pu.scores(two_layers(), "movement")
    with pytest.raises(ValueError, match="no '0.weight' of shape"):
        pu.scores(two_layers(), "movement", reference=nn.Sequential(nn.Linear(4, 6)))


@pytest.mark.parametrize("name", sorted(set(pu.list_criteria()) - {"random", "synflow", "movement"}))
def test_nan_names_the_layer(name):
    model, (inputs, targets) = two_layers(), batch()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"scores of (0|2)\.weight are NaN or infinite"):
        pu.scores(model, name, (inputs, targets))


@pytest.mark.parametrize("name", sorted(set(pu.list_criteria()) - DATA_FREE - {"synflow", "movement"}))
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_in_the_data_names_the_layer_and_prunes_nothing(name, bad):
    model, (inputs, targets) = two_layers(), batch()
    inputs[0, 0] = bad
    before = [w.clone() for w in weights_of(model)]
    with pytest.raises(ValueError, match=r"scores of 0\.weight are NaN or infinite"):
        pu.prune(model, name, sparsity=0.5, data=(inputs, targets), iterations=2)
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(model))) and not pu.get_masks(model)


@pytest.mark.parametrize("name", pu.list_criteria())
def test_unknown_options(name):
    with pytest.raises(TypeError, match=f"'{name}' has no option temprature"):
        pu.scores(two_layers(), name, batch(), temprature=3)


@pytest.mark.parametrize(
    "result, message",
    [
        ({}, "gives no scores for 0.weight"),
        ({"0.weight": torch.zeros(5, 4), "2.weight": torch.zeros(5, 3)}, "2.weight has shape"),
    ],
)
def test_unusable_scores(result, message):
    with pytest.raises(ValueError, match=message):
        pu.scores(two_layers(), lambda model, data: result)


# --- Iterating -------------------------------------------------------------------------------------------------------


def needs(name, reference, data):
    return {"reference": reference} if name == "movement" else {"data": data}


@pytest.mark.parametrize("name", pu.list_criteria())
@given(
    first=st.floats(0, 0.9), share=st.floats(0, 1), scope=st.sampled_from(["global", "layer"]), seed=st.integers(0, 9)
)
@settings(max_examples=8, deadline=None)
def test_pruning_again_never_revives(name, first, share, scope, seed):
    model, data = two_layers(seed), batch()
    second = first + share * (1 - first)
    groups = [35] if scope == "global" else [20, 15]
    arguments = needs(name, two_layers(seed + 1), data)
    before = pu.prune(model, name, sparsity=first, scope=scope, **arguments)
    after = pu.prune(model, name, sparsity=second, scope=scope, seed=seed, iterations=2, **arguments)
    for masks, sparsity in ((before, first), (after, second)):
        assert masks.total - masks.kept == sum(round(sparsity * n) for n in groups)
    assert all((mask <= before[key]).all() for key, mask in after.items())


@pytest.mark.parametrize("schedule", ["exponential", "linear", "cubic"])
@pytest.mark.parametrize("name", pu.list_criteria())
def test_iterations_never_revive(name, schedule):
    """Each round is scored on the model with the last round's zeros, and these only become more."""
    arguments = needs(name, conv_net(9), batch(8, shape=(2, 6, 6)))
    rounds = []

    def watched(model, _):
        rounds.append({key: weight.detach() != 0 for key, weight in pu.prunable_weights(model).items()})
        return pu.scores(model, name, **arguments)

    masks = pu.prune(conv_net(), watched, sparsity=0.9, iterations=5, schedule=schedule)
    rounds.append(masks)
    kept = [sum(int(mask.sum()) for mask in masks.values()) for masks in rounds]
    total = kept[0]
    assert len(kept) == 6 and kept == sorted(kept, reverse=True) and kept[-1] == total - round(0.9 * total)
    for earlier, later in zip(rounds, rounds[1:]):
        assert all((later[key] <= earlier[key]).all() for key in later)
    by_name = pu.prune(conv_net(), name, sparsity=0.9, iterations=5, schedule=schedule, **arguments)
    assert all(torch.equal(by_name[key], masks[key]) for key in masks)


def test_dead_weights_of_resnet10t_are_found_by_structure():
    images = torch.zeros(1, 3, 32, 32)
    dead = pu.dead_weights(pu.models.create("timm/resnet10t"), images)
    assert sum(int(mask.sum()) for mask in dead.values()) == 4_718_592  # layers before a zero batch-norm scale
    assert all(mask.all() or not mask.any() for mask in dead.values())
    model = pu.models.create("timm/resnet10t", zero_init_last=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dead = {name: mask for name, mask in pu.dead_weights(model, images).items() if mask.any()}
    # 3x3 kernels on 1x1 maps: one tap of nine, of a stride-2 kernel on 2x2 maps four of nine meet data
    assert {name: int(mask.sum()) for name, mask in dead.items()} == {
        "layer4.0.conv1.weight": 1_179_648 * 5 // 9,
        "layer4.0.conv2.weight": 2_359_296 * 8 // 9,
    }
    assert not dead["layer4.0.conv2.weight"][:, :, 1, 1].any()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # what is dead has no effect, and on larger images nothing is
    outputs = model.eval()(torch.ones(2, 3, 32, 32))
    with torch.no_grad():
        for name, mask in dead.items():
            model.get_parameter(name)[mask] = 7.0
    assert torch.equal(model(torch.ones(2, 3, 32, 32)), outputs)
    assert not any(mask.any() for mask in pu.dead_weights(model, torch.zeros(1, 3, 64, 64)).values())


def test_what_pruning_cuts_off_is_dead():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    pu.set_masks(model, {"2.weight": torch.tensor([[True, False]])})
    dead = pu.dead_weights(model, torch.zeros(1, 3))
    assert dead["0.weight"].tolist() == [[False] * 3, [True] * 3] and not dead["2.weight"].any()
