"""Measures of filters: closed forms in float64, options in the field's words, no trace left by scoring."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pruneutils as pu
from pruneutils.pruning import importances

ELEVEN = [
    "mag_based", "l1", "bn", "loss_based", "biased_loss", "tfo", "fisher", "nvidia", "grasp", "grad_preserve",
    "biased_loss_tracked",
]  # fmt: skip


def smooth(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def normed(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 5, 3), nn.Tanh(), nn.BatchNorm2d(5),
        nn.Flatten(), nn.Linear(5 * 4, 3),
    ).double()  # fmt: skip
    for i in (1, 5):
        nn.init.normal_(model[i].weight)
        nn.init.normal_(model[i].bias)
        nn.init.normal_(model[i].running_mean)
    return model


def batch(n=9, shape=(4,), seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=generator, dtype=torch.float64), torch.arange(n) % 3


def by_hand(model, inputs, targets, T=1.0):
    """Gradients of the mean cross-entropy of logits / T by the chain rule on paper, (weights of 0, weights of 2)."""
    hidden = torch.tanh(model[0](inputs))
    p = torch.softmax(model[2](hidden) / T, 1)
    back = (p - F.one_hot(targets, 3)) / len(targets) / T
    back_hidden = back @ model[2].weight * (1 - hidden**2)
    return (back_hidden.T @ inputs).detach(), (back.T @ hidden).detach()


def check(found, *expected):
    for score, wanted in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(score, wanted, rtol=1e-9, atol=1e-14)
        assert not score.requires_grad and score.dtype == torch.float64


def both(model):
    return model[0].weight.detach(), model[2].weight.detach()


def test_all_eleven_are_there():
    assert pu.list_importances()[:11] == ELEVEN


# --- Closed forms ----------------------------------------------------------------------------------------------------


def test_norms():
    model = smooth()
    check(pu.filter_scores(model, "mag_based"), *(w.norm(dim=1) for w in both(model)))
    check(pu.filter_scores(model, "l1"), *(w.abs().sum(1) for w in both(model)))


@pytest.mark.parametrize("T", [1.0, 5.0])
def test_first_order_measures(T):
    model, data = smooth(), batch()
    pairs = list(zip(both(model), by_hand(model, *data, T)))
    parts = [(data[0][:4], data[1][:4]), (data[0][4:], data[1][4:])]  # count as one large batch
    for given in (data, parts):
        check(pu.filter_scores(model, "loss_based", given, T=T), *((w * g).abs().sum(1) for w, g in pairs))
        check(pu.filter_scores(model, "tfo", given, T=T), *((w * g).sum(1).abs() for w, g in pairs))
        check(pu.filter_scores(model, "biased_loss", given, T=T), *((w**2 * g).abs().sum(1) for w, g in pairs))


def test_the_defaults_are_those_of_the_framework():
    model, data = smooth(), batch()
    check(
        pu.filter_scores(model, "tfo", data),
        *((w * g).sum(1).abs() for w, g in zip(both(model), by_hand(model, *data, T=5.0))),
    )


def test_loss_based_is_snip_summed_over_the_filter():
    model, data = pu.models.create("lenet5"), (torch.rand(6, 1, 28, 28), torch.arange(6))
    snip = pu.scores(model, "snip", data)
    for name, score in pu.filter_scores(model, "loss_based", data, T=1.0).items():
        torch.testing.assert_close(score, snip[name].flatten(1).double().sum(1))
    assert list(pu.filter_scores(model, "snip", data)) == list(snip)  # a criterion's name does, too


def test_distance_from_the_initialisation():
    model, first, data = smooth(), smooth(3), batch()
    pairs = zip(both(model), both(first), by_hand(model, *data, T=5.0))
    wanted = [((w - w0).abs() * (w * g).abs()).sum(1) for w, w0, g in pairs]
    check(pu.filter_scores(model, "biased_loss", data, params_init=first), *wanted)
    check(pu.filter_scores(model, "biased_loss", data, params_init=first.state_dict(), use_l2=False), *wanted)
    assert_same = pu.filter_scores(model, "biased_loss", data, params_init=first, use_l2=True)
    check(assert_same, *pu.filter_scores(model, "biased_loss", data).values())
    with pytest.raises(ValueError, match="use_l2=False needs params_init"):
        pu.filter_scores(model, "biased_loss", data, use_l2=False)
    with pytest.raises(ValueError, match="params_init has no '2.weight'"):
        pu.filter_scores(model, "biased_loss", data, params_init={"0.weight": model[0].weight})
    with pytest.raises(ValueError, match="params_init: 0.weight has shape"):
        pu.filter_scores(model, "biased_loss", data, params_init=nn.Sequential(nn.Linear(4, 6), nn.Tanh(), model[2]))


def test_the_initialisation_loses_the_filters_that_were_removed():
    data = (torch.rand(6, 3, 32, 32), torch.arange(6))
    model, first = pu.models.create("resnet20"), pu.models.create("resnet20", seed=1)
    pu.prune_filters(model, "l1", ratio=0.4, example_inputs=data[0][:1])
    cut = pu.pruning.replay(copy.deepcopy(first), model.removed)
    wanted = pu.filter_scores(model, "biased_loss", data, params_init=cut)
    found = pu.filter_scores(model, "biased_loss", data, params_init=first)
    assert all(torch.equal(found[name], score) for name, score in wanted.items())


def test_fisher_is_the_mean_of_squared_batch_gradients_by_size():
    model, (x, y) = smooth(), batch(10)
    parts = [(x[:7], y[:7]), (x[7:], y[7:])]
    gradients = [by_hand(model, *part, T=2.0) for part in parts]
    fisher = [0.7 * a**2 + 0.3 * b**2 for a, b in zip(*gradients)]
    check(pu.filter_scores(model, "fisher", parts, T=2.0), *((w**2 * f).sum(1) for w, f in zip(both(model), fisher)))


def test_batch_norm_measures_find_the_batch_norm_that_follows():
    model, (x, y) = normed(), batch(8, (2, 6, 6))
    found = pu.filter_scores(model, "bn", example_inputs=x)
    assert list(found) == ["0.weight", "3.weight"]  # the second behind an activation, none behind the classifier
    for i, score in zip((1, 5), found.values()):
        assert torch.equal(score, model[i].weight.detach().abs())
    total = {i: torch.zeros(2, len(model[i].weight), dtype=torch.float64) for i in (1, 5)}
    parts = [(x[:6], y[:6]), (x[6:], y[6:])]
    for inputs, targets in parts:
        loss = F.cross_entropy(model.eval()(inputs) / 5, targets)
        for i in (1, 5):
            gradients = torch.autograd.grad(loss, [model[i].weight, model[i].bias], retain_graph=True)
            total[i] += len(targets) / 8 * torch.stack(gradients) ** 2
    wanted = [((torch.stack([model[i].weight, model[i].bias]) ** 2) * total[i]).sum(0).detach() for i in (1, 5)]
    check(pu.filter_scores(model, "nvidia", parts, example_inputs=x), *wanted)
    model.requires_grad_(False)
    check(pu.filter_scores(model, "nvidia", parts, example_inputs=x), *wanted)
    with pytest.raises(ValueError, match="needs example_inputs"):
        pu.filter_scores(model, "bn")
    with pytest.raises(ValueError, match="no batch norm"):
        pu.filter_scores(smooth(), "bn", example_inputs=torch.rand(1, 4, dtype=torch.float64))


@pytest.mark.parametrize("name", ["grasp", "grad_preserve"])
@pytest.mark.parametrize("T", [1.0, 200.0])
def test_gradient_flow_against_the_whole_hessian(name, T):
    model, (x, y) = smooth(), batch(9)
    shapes = [p.shape for p in model.parameters()]

    def loss(flat):
        w0, b0, w2, b2 = (part.view(s) for part, s in zip(flat.split([s.numel() for s in shapes]), shapes))
        return F.cross_entropy((torch.tanh(x @ w0.T + b0) @ w2.T + b2) / T, y)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    hessian = torch.autograd.functional.hessian(loss, flat)
    products = hessian @ torch.autograd.functional.jacobian(loss, flat)  # all parameters have a part in it
    products = [part.view(s) for part, s in zip(products.split([s.numel() for s in shapes]), shapes)]
    wanted = [(w * h).sum(1) for w, h in zip(both(model), (products[0], products[2]))]
    wanted = [score.abs() for score in wanted] if name == "grad_preserve" else wanted
    check(pu.filter_scores(model, name, (x, y), grasp_T=T), *wanted)


def test_grasp_keeps_what_the_gradient_norm_needs():
    """The first-order change of ||g||^2 / 2 when a filter goes is -sum w (H g): the highest score loses the most."""
    model, data = smooth(), batch(30)
    scores = pu.filter_scores(model, "grasp", data, grasp_T=1.0)["0.weight"]

    def norm(scale, i):
        other = copy.deepcopy(model)
        other[0].weight.data[i] *= scale
        gradients = torch.autograd.grad(F.cross_entropy(other(data[0]), data[1]), list(other.parameters()))
        return sum(g.square().sum() for g in gradients) / 2

    for i in range(5):
        slope = (norm(1 - 1e-5, i) - norm(1 + 1e-5, i)) / 2e-5
        torch.testing.assert_close(-slope, scores[i], rtol=1e-4, atol=1e-9)


def test_grasp_takes_every_class_alike():
    model, (x, _) = smooth(), batch(12)
    y = torch.tensor([0] * 7 + [1] * 3 + [2] * 2)
    few = torch.tensor([0, 1, 7, 8, 10, 11])  # the first two of each
    assert_equal = pu.filter_scores(model, "grasp", (x[few], y[few]))
    check(pu.filter_scores(model, "grasp", (x, y), n_samples=6), *assert_equal.values())
    parts = [(x[:8], y[:8]), (x[8:], y[8:])]
    check(pu.filter_scores(model, "grasp", parts, n_samples=8), *assert_equal.values())


def test_n_samples_takes_the_first():
    model, (x, y) = smooth(), batch(12)
    wanted = pu.filter_scores(model, "tfo", (x[:7], y[:7])).values()
    parts = [(x[:5], y[:5]), (x[5:10], y[5:10]), (x[10:], y[10:])]
    check(pu.filter_scores(model, "tfo", parts, n_samples=7), *wanted)
    check(pu.filter_scores(model, "tfo", (x, y), n_samples=7), *wanted)
    with pytest.raises(ValueError, match="n_samples must be a whole number"):
        pu.filter_scores(model, "tfo", (x, y), n_samples=0)


# --- Tracked while training ------------------------------------------------------------------------------------------


def biased(w, g):
    return (w**2 * g).abs().sum(1)


def test_the_average_over_batches_of_data():
    model, (x, y) = smooth(), batch(12)
    parts = [(x[i : i + 3], y[i : i + 3]) for i in range(0, 12, 3)]
    found = pu.filter_scores(model, "biased_loss_tracked", parts, alpha=0.7, track_batches=3, T=1.0)
    steps = [[biased(w, g) for w, g in zip(both(model), by_hand(model, *part))] for part in parts[1:]]
    wanted = [0.7 * c + 0.3 * (0.7 * b + 0.3 * a) for a, b, c in zip(*steps)]
    check(found, *wanted)


def test_the_average_over_the_steps_of_a_training():
    model, (x, y) = smooth(), batch(12)
    optimizer, steps = torch.optim.SGD(model.parameters(), lr=0.5), []
    with pu.track_importance(model, alpha=0.6, track_batches=2) as tracked:
        for i in range(0, 12, 3):
            optimizer.zero_grad()
            F.cross_entropy(model(x[i : i + 3]), y[i : i + 3]).backward()
            optimizer.step()
            # the weights after the step, with the gradient that made it
            steps.append([biased(m.weight.detach(), m.weight.grad) for m in (model[0], model[2])])
            other = nn.Linear(1, 1)  # somebody else's optimizer
            other(torch.ones(1)).backward()
            torch.optim.SGD(other.parameters(), lr=1).step()
    optimizer.step()  # nobody listens any more
    check(pu.filter_scores(model, tracked), *(0.6 * b + 0.4 * a for a, b in zip(*steps[-2:])))


def test_tracking_starts_anew_when_filters_go():
    model, x = pu.models.create("lenet5"), torch.rand(8, 1, 28, 28)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train(model, number=0):
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(x), torch.arange(8)).backward()
            optimizer.step()

    with pu.track_importance(model) as tracked:
        with pytest.raises(ValueError, match="nothing has been tracked yet"):
            pu.filter_scores(model, tracked)
        train(model)
        pu.prune_filters(model, tracked, 0.5, x[:1], rounds=2, optimizer=optimizer, on_round=train)
        assert pu.filter_scores(model, tracked)["conv1.weight"].shape == (model.conv1.out_channels,)
    assert sum(pu.filter_table(model)["after"]) == 285


@pytest.mark.parametrize(
    ("options", "message"),
    [(dict(alpha=2), "alpha"), (dict(track_batches=0), "track_batches"), (dict(use_l2=False), "needs params_init")],
)
def test_tracking_checks_its_options(options, message):
    with pytest.raises(ValueError, match=message):
        pu.track_importance(smooth(), **options)


# --- Any network, no trace -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ELEVEN)
def test_every_measure_scores_and_prunes_a_network(name):
    x = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = pu.models.create("resnet20").train()
    data = [(x[:10], torch.arange(10)), (x[10:], torch.arange(10))]
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    scores = pu.filter_scores(model, name, data, example_inputs=x[:1])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and all(m.training for m in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {key: len(score) for key, score in scores.items()} == {
        key: len(w) for key, w in pu.prunable_weights(model).items() if key in scores
    }
    assert len(scores) == (19 if name in ("bn", "nvidia") else 20)
    pu.prune_filters(model, name, 0.5, data=data)
    assert (
        sum(block.conv1.out_channels for layer in (model.layer1, model.layer2, model.layer3) for block in layer) == 168
    )


def test_attention_is_scored_by_its_rows():
    model = nn.Sequential(nn.Linear(6, 8), nn.MultiheadAttention(8, 2))
    found = pu.filter_scores(model, "l1")
    torch.testing.assert_close(found["1.in_proj_weight"].float(), model[1].in_proj_weight.detach().abs().sum(1))


def test_filters_of_transposed_convolutions_are_their_outputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(3, 5, 2), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1))
    x = torch.rand(2, 3, 6, 6)
    found = pu.filter_scores(model, "l1")["0.weight"]
    torch.testing.assert_close(found.float(), model[0].weight.detach().abs().sum((0, 2, 3)))
    pu.prune_filters(model.eval(), "l1", 0.4, x)
    assert model[0].weight.shape == (3, 3, 2, 2) and sorted(found.argsort().tolist()[:2]) == sorted(
        set(range(5)) - set(model.removed["0"]["out"]["kept"])
    )


def test_a_measure_of_ones_own():
    @pu.importance
    def first_weight(model, scale=1.0):
        return {name: scale * w.detach().flatten(1)[:, 0] for name, w in pu.prunable_weights(model).items()}

    try:
        model = smooth()
        check(pu.filter_scores(model, "first_weight", scale=2.0), *(2 * w[:, 0] for w in both(model)))
        with pytest.raises(TypeError, match="has no option sclae; its own: scale"):
            pu.filter_scores(model, "first_weight", sclae=2.0)
    finally:
        del importances._IMPORTANCES["first_weight"]
    whole = pu.filter_scores(model, lambda model, data: {"0.weight": model[0].weight.abs()})  # one score a weight
    check(whole, model[0].weight.detach().abs().sum(1))


def test_random_draws_one_number_a_filter_whatever_its_size():
    model = pu.models.create("lenet5")
    scores = pu.filter_scores(model, "random", seed=1)
    assert all(torch.equal(scores[name], again) for name, again in pu.filter_scores(model, "random", seed=1).items())
    means = [score.double().mean().item() for score in scores.values() if len(score) > 40]
    assert all(abs(mean - 0.5) < 0.15 for mean in means)  # summed over weights, larger filters would always stay
