import copy

import pytest
import torch
from torch import nn

import pruneutils as pu
from pruneutils.training.backward import backward_pruned

LAYERS = {
    "linear": (lambda bias: nn.Linear(6, 5, bias=bias), (4, 6)),
    "linear 3d": (lambda bias: nn.Linear(6, 5, bias=bias), (2, 4, 6)),
    "conv1d": (lambda bias: nn.Conv1d(4, 6, 3, padding=1, bias=bias), (2, 4, 9)),
    "conv2d": (lambda bias: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=bias), (2, 4, 9, 9)),
    "conv2d grouped": (lambda bias: nn.Conv2d(4, 6, 3, groups=2, dilation=2, bias=bias), (2, 4, 9, 9)),
    "conv2d same": (lambda bias: nn.Conv2d(4, 6, 4, padding="same", bias=bias), (2, 4, 9, 9)),
    "conv2d circular": (lambda bias: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=bias), (2, 4, 9, 9)),
    "conv2d unbatched": (lambda bias: nn.Conv2d(4, 6, 3, bias=bias), (4, 9, 9)),
    "conv3d": (lambda bias: nn.Conv3d(2, 3, 3, bias=bias), (2, 2, 5, 5, 5)),
    "transposed 2d": (lambda bias: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=bias), (2, 4, 5, 5)),
    # an input of the weight's shape: nothing may tell the two apart by that
    "square": (lambda bias: nn.Linear(5, 5, bias=bias), (5, 5)),
}


def random_masks(model):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(w.shape, generator=generator) < 0.5 for name, w in pu.prunable_weights(model).items()}


def draw(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(model, inputs, upstream):
    """Outputs, then the gradients of the inputs and of {name: parameter}."""
    inputs = inputs.clone().requires_grad_()
    outputs = model(inputs)
    first, *rest = torch.autograd.grad(outputs, [inputs, *model.parameters()], upstream)
    return outputs, first, rest


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convolutions = nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.ConvTranspose2d(4, 3, 3), nn.ReLU(inplace=True)
        return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(3 * 36, 5))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer(kind, bias, dtype):
    make, shape = LAYERS[kind]
    layer = make(bias).to(dtype)
    masks = random_masks(layer)
    inputs = draw(*shape, dtype=dtype)
    upstream = draw(*layer(inputs).shape, seed=2, dtype=dtype)
    outputs, dense, parameters = gradients(layer, inputs, upstream)
    with backward_pruned(layer, masks):
        outputs_inside, inside, parameters_inside = gradients(layer, inputs, upstream)
    pruned = copy.deepcopy(layer)
    with torch.no_grad():
        pruned.weight.mul_(masks["weight"])
    _, expected, _ = gradients(pruned, inputs, upstream)
    assert torch.equal(outputs_inside, outputs)
    assert all(torch.equal(a, b) for a, b in zip(parameters_inside, parameters, strict=True))
    assert torch.equal(inside, expected) and not torch.allclose(inside, dense)


def test_closed_form_of_a_deep_net():
    """dL/dx = W1' * relu' * W2' * dy with W' = mask * W, but dL/dW1 = (W2'... dy) x: each by hand in float64."""
    first, second = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    model = nn.Sequential(first, nn.ReLU(), second)
    masks = random_masks(model)
    x, dy = draw(5, 3, dtype=torch.float64), draw(5, 2, seed=2, dtype=torch.float64)
    with backward_pruned(model, masks), torch.enable_grad():
        _, dx, (dw1, db1, dw2, db2) = gradients(model, x, dy)
    with torch.no_grad():
        hidden = first(x)
        dh = dy @ (second.weight * masks["2.weight"]) * (hidden > 0)
        torch.testing.assert_close(dx, dh @ (first.weight * masks["0.weight"]))
        torch.testing.assert_close(dw1, dh.T @ x)
        torch.testing.assert_close(db1, dh.sum(0))
        torch.testing.assert_close(dw2, dy.T @ hidden.relu())
        torch.testing.assert_close(db2, dy.sum(0))


def everything(model):
    return [
        (name, list(module.__dict__), list(module._parameters), list(map(id, module._parameters.values())))
        + tuple(len(hooks) for key, hooks in module.__dict__.items() if "hooks" in key)
        for name, module in model.named_modules()
    ]


def test_no_trace_also_after_exceptions():
    model, x = net(), draw(2, 2, 6, 6).requires_grad_()
    before, state = everything(model), copy.deepcopy(model.state_dict())
    with backward_pruned(model, random_masks(model)) as inside:
        assert inside is model
        model(x).sum().backward()
    assert everything(model) == before
    with pytest.raises(ZeroDivisionError), backward_pruned(model, random_masks(model)):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError), backward_pruned(model, random_masks(model)):
        model(draw(2, 3, 6, 6).requires_grad_())  # a wrong number of channels
    assert everything(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(gradients(model, x.detach(), draw(2, 5))[1], gradients(net(), x.detach(), draw(2, 5))[1])


def test_tied_weights_are_masked_in_every_layer():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    model, x = nn.Sequential(first, second), draw(3, 4).requires_grad_()
    mask = torch.eye(4)
    with backward_pruned(model, {"0.weight": mask}):
        model(x).sum().backward()
    w = first.weight.detach() * mask
    torch.testing.assert_close(x.grad, torch.ones(3, 4) @ w @ w)


def test_errors_leave_the_model_alone():
    model, attention = net(), nn.MultiheadAttention(4, 2)
    before = everything(model)
    for masks, message in (
        ({"0.weigth": torch.ones(4, 2, 3, 3)}, "did you mean '0.weight'"),
        ({"0.weight": torch.ones(4, 2, 3)}, r"0.weight: the mask has shape \(4, 2, 3\), the weight \(4, 2, 3, 3\)"),
        ({"5.weight": torch.full((5, 108), 0.5)}, "5.weight: a mask holds only 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message), backward_pruned(model, masks):
            pass
    with pytest.raises(ValueError, match="out_proj.weight is not of"):
        with backward_pruned(attention, {"out_proj.weight": torch.ones(4, 4)}):
            pass
    assert everything(model) == before
