"""The loss of batches of every form, and its first and second derivatives."""

import functools

import torch
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._checks import add_shapes_to_errors
from .._torch import LEFT_OUT, Inputs, batches, forward, to_device
from ._twice import TwiceDifferentiable

Scores = dict[str, torch.Tensor]


def gradients(model, weights, data, loss_fn) -> Scores:
    """Compute {name: gradient of the mean loss over all samples of `data`} of these weights."""
    total = None
    for inputs, targets, share in shares(data, weights):
        part = grad(share * loss_of(model, inputs, targets, loss_fn), weights.values(), materialize_grads=True)
        total = part if total is None else [a + b for a, b in zip(total, part)]
    return dict(zip(weights, total))


def loss_of(model, inputs, targets, loss_fn) -> torch.Tensor:
    """Compute the loss of a batch; one that is marked `of_returned` takes all that the model returns."""
    with add_shapes_to_errors(inputs, targets):
        return loss_fn(forward(model, inputs, whole=getattr(loss_fn, "of_returned", False)), targets)


def shares(data, weights) -> list[tuple[Inputs, torch.Tensor, float]]:
    """Return the batches of `data`, each with its share of all targets that count, on the device of the weights."""
    device = next(iter(weights.values())).device
    parts = [(to_device(inputs, device), targets.to(device)) for inputs, targets in batches(data)]
    counts = [n_counted(targets) for _, targets in parts]
    total = sum(counts)
    if total == 0:
        raise ValueError(f"data holds no sample, or every target is {LEFT_OUT} (left out)")
    return [(*part, n / total) for part, n in zip(parts, counts) if n]


def n_counted(targets: torch.Tensor) -> int:
    """Count the targets that are not left out."""
    return targets.numel() if targets.is_floating_point() else int((targets != LEFT_OUT).count_nonzero())


def hessian_gradient(model, weights, parts, loss_fn) -> list[torch.Tensor]:
    """Compute H g for each weight; g is the gradient of the loss over all `parts` (inputs, targets, share)."""
    weights, parts = list(weights), list(parts)

    def gradients(inputs, targets, share, create_graph):
        loss = share * loss_of(model, inputs, targets, loss_fn)
        return grad(loss, weights, create_graph=create_graph, materialize_grads=True)

    # the fused attention kernels have no second derivative
    with sdpa_kernel(SDPBackend.MATH), TwiceDifferentiable(weights):
        first = [gradients(*part, create_graph=len(parts) == 1) for part in parts]
        g = [functools.reduce(torch.add, layers).detach() for layers in zip(*first)]
        hg = [torch.zeros_like(each) for each in g]
        for part in parts:
            again = first[0] if len(parts) == 1 else gradients(*part, create_graph=True)
            graph = [(a, b) for a, b in zip(again, g) if a.requires_grad]  # a layer the loss ignores has none
            if graph:
                outputs, directions = zip(*graph)
                products = grad(outputs, weights, grad_outputs=directions, materialize_grads=True)
                hg = [total + product for total, product in zip(hg, products)]
    return hg
