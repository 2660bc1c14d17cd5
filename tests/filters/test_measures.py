"""Measures of filters: closed forms in float64, options in the field's words, no trace left by scoring."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pruneutils as pu


def smooth(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def normed():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 5, 3), nn.Tanh(), nn.BatchNorm2d(5)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(5 * 4, 3)).double()
    for i in (1, 5):
        for tensor in (model[i].weight, model[i].bias, model[i].running_mean):
            nn.init.normal_(tensor)
    return model


def batch(n=9, shape=(4,), seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=generator, dtype=torch.float64), torch.arange(n) % 3


def by_hand(model, inputs, targets, temperature=1.0):
    """Gradients of the mean cross-entropy of softened logits by the chain rule on paper, (weights of 0, of 2)."""
    hidden = torch.tanh(model[0](inputs))
    p = torch.softmax(model[2](hidden) / temperature, 1)
    back = (p - F.one_hot(targets, 3)) / len(targets) / temperature
    back_hidden = back @ model[2].weight * (1 - hidden**2)
    return (back_hidden.T @ inputs).detach(), (back.T @ hidden).detach()


def check(found, *expected):
    for score, wanted in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(score, wanted, rtol=1e-9, atol=1e-14)
        assert not score.requires_grad and score.dtype == torch.float64


def both(model):
    return model[0].weight.detach(), model[2].weight.detach()


# --- Closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(temperature=1.0), {}])
def test_norms_and_first_order_measures(options):
    model, (x, y) = smooth(), batch()
    pairs = list(zip(both(model), by_hand(model, x, y, options.get("temperature", 5.0))))
    check(pu.filter_scores(model, "mag_based"), *(w.norm(dim=1) for w, _ in pairs))
    check(pu.filter_scores(model, "l1"), *(w.abs().sum(1) for w, _ in pairs))
    for data in ((x, y), [(x[:4], y[:4]), (x[4:], y[4:])]):  # count as one large batch
        check(pu.filter_scores(model, "loss_based", data, **options), *((w * g).abs().sum(1) for w, g in pairs))
        check(pu.filter_scores(model, "tfo", data, **options), *((w * g).sum(1).abs() for w, g in pairs))
        check(pu.filter_scores(model, "biased_loss", data, **options), *((w**2 * g).abs().sum(1) for w, g in pairs))


def test_distance_from_the_initialisation():
    model, first, data = smooth(), smooth(3), batch()
    pairs = zip(both(model), both(first), by_hand(model, *data, 5.0))
    wanted = [((w - w0).abs() * (w * g).abs()).sum(1) for w, w0, g in pairs]
    check(pu.filter_scores(model, "biased_loss", data, reference=first), *wanted)
    check(pu.filter_scores(model, "biased_loss", data, reference=first.state_dict()), *wanted)
    with pytest.raises(ValueError, match=r"reference has no '2.weight' of the model's shape \(3, 5\)"):
        pu.filter_scores(model, "biased_loss", data, reference={"0.weight": model[0].weight})


def test_the_reference_loses_the_filters_that_were_removed():
    data = (torch.rand(6, 3, 32, 32), torch.arange(6))
    model, first = pu.models.create("resnet20"), pu.models.create("resnet20", seed=1)
    pu.prune_filters(model, "l1", ratio=0.4, example_inputs=data[0][:1])
    cut = pu.filters.replay(copy.deepcopy(first), model.removed)
    wanted = pu.filter_scores(model, "biased_loss", data, reference=cut)
    found = pu.filter_scores(model, "biased_loss", data, reference=first)
    assert all(torch.equal(found[name], score) for name, score in wanted.items())


def test_fisher_is_the_mean_of_squared_batch_gradients_by_size():
    model, (x, y) = smooth(), batch(10)
    parts = [(x[:7], y[:7]), (x[7:], y[7:])]
    fisher = [0.7 * a**2 + 0.3 * b**2 for a, b in zip(*[by_hand(model, *part, 2.0) for part in parts])]
    wanted = [(w**2 * f).sum(1) for w, f in zip(both(model), fisher)]
    check(pu.filter_scores(model, "fisher", parts, temperature=2.0), *wanted)


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
    model.requires_grad_(False)
    check(pu.filter_scores(model, "nvidia", parts, example_inputs=x), *wanted)
    with pytest.raises(ValueError, match="needs example_inputs"):
        pu.filter_scores(model, "bn")


@pytest.mark.parametrize("name", ["grasp", "grad_preserve"])
@pytest.mark.parametrize("options", [{}, dict(temperature=3.0)])
def test_gradient_flow_against_the_whole_hessian(name, options):
    model, (x, y) = smooth(), batch(9)
    temperature = options.get("temperature", 200.0 if name == "grasp" else 1.0)

    def loss(w0, b0, w2, b2):
        return F.cross_entropy((torch.tanh(x @ w0.T + b0) @ w2.T + b2) / temperature, y)

    parameters = tuple(p.detach() for p in model.parameters())
    gradient = torch.autograd.functional.jacobian(loss, parameters)
    h0, _, h2, _ = torch.autograd.functional.hvp(loss, parameters, gradient)[1]  # all parameters have a part in it
    wanted = [(w * h).sum(1) for w, h in zip(both(model), (h0, h2))]
    wanted = [score.abs() for score in wanted] if name == "grad_preserve" else wanted
    check(pu.filter_scores(model, name, (x, y), **options), *wanted)


def test_grasp_takes_every_class_alike():
    model, (x, _) = smooth(), batch(12)
    y = torch.tensor([0] * 7 + [1] * 3 + [2] * 2)
    few = torch.tensor([0, 1, 7, 8, 10, 11])  # the first two of each
    wanted = pu.filter_scores(model, "grasp", (x[few], y[few])).values()
    check(pu.filter_scores(model, "grasp", (x, y), n_samples=6), *wanted)
    check(pu.filter_scores(model, "grasp", [(x[:8], y[:8]), (x[8:], y[8:])], n_samples=8), *wanted)


# --- Tracked while training ------------------------------------------------------------------------------------------


def biased(w, g):
    return (w**2 * g).abs().sum(1)


def test_the_average_over_batches_of_data():
    model, (x, y) = smooth(), batch(12)
    parts = [(x[i : i + 3], y[i : i + 3]) for i in range(0, 12, 3)]
    found = pu.filter_scores(model, "biased_loss_tracked", parts, alpha=0.7, track_batches=3, temperature=1.0)
    steps = [[biased(w, g) for w, g in zip(both(model), by_hand(model, *part))] for part in parts[1:]]
    check(found, *(0.7 * c + 0.3 * (0.7 * b + 0.3 * a) for a, b, c in zip(*steps)))


def test_the_average_over_the_steps_of_a_training():
    model, (x, y) = smooth(), batch(12)
    optimizer, steps = torch.optim.SGD(model.parameters(), lr=0.5), []
    with pu.filters.track_importance(model, alpha=0.6, track_batches=2) as tracked:
        for i in range(0, 12, 3):
            optimizer.zero_grad()
            F.cross_entropy(model(x[i : i + 3]), y[i : i + 3]).backward()
            optimizer.step()
            # the weights after the step, with the gradient that made it
            steps.append([biased(m.weight.detach(), m.weight.grad) for m in (model[0], model[2])])
    optimizer.step()  # nobody listens any more
    check(pu.filter_scores(model, tracked), *(0.6 * b + 0.4 * a for a, b in zip(*steps[-2:])))


# --- Any network, no trace -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*pu.filters.MEASURES, "snip", "magnitude"])
def test_every_measure_scores_and_prunes_a_network(name):
    x = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = pu.models.create("resnet20").train()
    data = [(x[:10], torch.arange(10)), (x[10:], torch.arange(10))]
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    scores = pu.filter_scores(model, name, data, example_inputs=x[:1])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    weights = pu.prunable_weights(model)
    assert {key: len(score) for key, score in scores.items()} == {key: len(weights[key]) for key in scores}
    assert len(scores) == (19 if name in ("bn", "nvidia") else 20)
    pu.prune_filters(model, name, 0.5, data=data)
    assert all(p.grad is None for p in model.parameters()) and torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert sum(pu.filters.filter_table(model)[["before", "after"]].diff(axis=1).after) == -168  # of 336


def test_attention_and_transposed_convolutions_are_scored_by_their_outputs():
    model = nn.Sequential(nn.Linear(6, 8), nn.MultiheadAttention(8, 2), nn.ConvTranspose2d(3, 5, 2))
    found = pu.filter_scores(model, "l1")
    torch.testing.assert_close(found["1.in_proj_weight"].float(), model[1].in_proj_weight.detach().abs().sum(1))
    torch.testing.assert_close(found["2.weight"].float(), model[2].weight.detach().abs().sum((0, 2, 3)))
