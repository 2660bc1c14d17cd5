"""Rows about scores before training and repair after it, against published formulations and the passes they need."""

import copy
import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import grad

import pruneutils as pu

from .harness import at_least, at_most, row
from .selection import masks_of_cat_and_kthvalue

TEMPERATURE = 200.0


def _batch(n):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 32, 32, generator=generator), torch.randint(10, (n,), generator=generator)


def _forward_and_backward(model, inputs, targets):
    weights = list(pu.prunable_weights(model).values())
    return grad(F.cross_entropy(model(inputs), targets), weights)


def grasp_in_two_passes(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    """GraSP as its authors publish it: gradients without a graph, once more with one, then the product's gradient."""
    weights = list(pu.prunable_weights(model).values())
    first = grad(F.cross_entropy(model(inputs) / TEMPERATURE, targets), weights)
    again = grad(F.cross_entropy(model(inputs) / TEMPERATURE, targets), weights, create_graph=True)
    product = sum((a.detach() * b).sum() for a, b in zip(first, again))
    return [w.detach() * h for w, h in zip(weights, grad(product, weights))]


def _grasp_arms(network, n):
    model, (inputs, targets) = pu.models.create(network).eval(), _batch(n)

    def check():
        scores = pu.scores(model, "grasp", data=(inputs, targets))
        exact = pu.scores(pu.models.create(network).double(), "grasp", data=(inputs.double(), targets))
        difference = sum((scores[name] - exact[name]).square().sum() for name in exact)
        size = sum(score.square().sum() for score in exact.values())
        return f"{float((difference / size).sqrt()):.0e} from float64"

    return {
        "pu.scores": lambda: lambda: pu.scores(model, "grasp", data=(inputs, targets)),
        "forward and backward": lambda: lambda: _forward_and_backward(model, inputs, targets),
        "two passes (authors)": lambda: lambda: grasp_in_two_passes(model, inputs, targets),
        "check": check,
    }


_GRASP = (at_most(3.2, "pu.scores", "forward and backward"), at_least(None, "pu.scores", "two passes (authors)"))


@row("GraSP scores, ResNet-20, 100 images", *_GRASP, rounds=7)
def grasp_resnet20():
    return _grasp_arms("resnet20", 100)


@row("GraSP scores, VGG-16, 50 images", *_GRASP, rounds=5)
def grasp_vgg16():
    return _grasp_arms("vgg16", 50)


def synflow_as_published(model: nn.Module, density: float, iterations: int) -> None:
    """Synaptic-Flow's prune_loop (Tanaka et al. 2020) in float64, without its printing."""
    weights = list(pu.prunable_weights(model).values())
    masks = [torch.ones_like(w) for w in weights]
    dense = [w.detach().clone() for w in weights]
    for step in range(1, iterations + 1):
        with torch.no_grad():
            for w, whole, mask in zip(weights, dense, masks):
                w.copy_(whole * mask)
            signs = {name: t.sign() for name, t in model.state_dict().items() if t.is_floating_point()}
            for t in model.state_dict().values():
                t.abs_()
        flow = model(torch.ones(1, 3, 32, 32, dtype=torch.float64)).sum()
        scores = [(w.detach() * g).abs() for w, g in zip(weights, grad(flow, weights))]
        with torch.no_grad():
            for name, t in model.state_dict().items():
                if name in signs:
                    t.mul_(signs[name])
        masks = masks_of_cat_and_kthvalue(scores, 1 - density ** (step / iterations))
    with torch.no_grad():
        for w, whole, mask in zip(weights, dense, masks):
            w.copy_(whole * mask)


ITERATIONS = 25


def _synflow_arms(network):
    image = torch.zeros(1, 3, 32, 32)
    floor = pu.models.create(network).eval()
    weights, ones = list(pu.prunable_weights(floor).values()), torch.ones(1, 3, 32, 32)

    def ours():
        model = pu.models.create(network)
        return lambda: pu.prune(model, "synflow", sparsity=0.9, data=image, iterations=ITERATIONS)

    def theirs():
        model = pu.models.create(network).double().eval()
        return lambda: synflow_as_published(model, 0.1, ITERATIONS)

    def passes():
        return lambda: [grad(floor(ones).sum(), weights) for _ in range(ITERATIONS)]

    def check():
        masks = [pu.prune(_create(network, exact), "synflow", sparsity=0.9, data=image, iterations=ITERATIONS)
                 for exact in (False, True)]  # fmt: skip
        apart = sum(int((masks[0][name] != masks[1][name]).sum()) for name in masks[0])
        return f"{apart / masks[0].total:.3%} of the masks differ from float64, {masks[0].kept - masks[1].kept:+} kept"

    return {
        "pu.prune": ours,
        "single-image passes": passes,
        "prune_loop (authors)": theirs,
        "check": check,
    }


def _create(network, exact):
    model = pu.models.create(network)
    return model.double() if exact else model


_WHY = "it computes in float64, which moves twice the memory of the float32 passes beside it"
_SYNFLOW = (at_most(4, "pu.prune", "single-image passes"), at_least(None, "pu.prune", "prune_loop (authors)"))


@row(f"SynFlow, {ITERATIONS} iterations, VGG-16, 90 %", *_SYNFLOW, rounds=3, seconds=60, why=_WHY)
def synflow_vgg16():
    return _synflow_arms("vgg16")


@row(f"SynFlow, {ITERATIONS} iterations, ResNet-20, 90 %", *_SYNFLOW, rounds=5, why=_WHY)
def synflow_resnet20():
    return _synflow_arms("resnet20")


@functools.cache
def _language():
    """Return the first blocks of SmolLM2 and 4,096 tokens, or None where its package is not installed."""
    try:
        model, _ = pu.models.language("smollm2")
    except (FileNotFoundError, ModuleNotFoundError):
        return None
    model.model.layers = model.model.layers[:4]
    tokens = torch.randint(49152, (16, 256), generator=torch.Generator().manual_seed(0))
    return model.model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _language_arms(prepare, run):
    """`run` on a copy that `prepare` has seen, and one forward pass."""
    if _language() is None:
        return {"pu": None, "forward": None}
    dense, batch = _language()

    def ours():
        model = copy.deepcopy(dense)
        prepare(model)
        return lambda: run(model, dense, batch)

    def forward():
        with torch.no_grad():
            dense(**batch)

    return {"pu": ours, "forward": lambda: forward}


_BLOCKS, _TURNS = "4 blocks of SmolLM2, 4,096 tokens", dict(rounds=3, seconds=120)


@row(f"Wanda, {_BLOCKS}", at_most(1.5, "pu", "forward"), **_TURNS)
def wanda():
    return _language_arms(lambda model: None, lambda model, dense, batch: pu.prune(model, "wanda", 0.5, data=batch))


@row(f"SparseGPT, {_BLOCKS}", at_most(5, "pu", "forward"), **_TURNS)
def sparsegpt():
    return _language_arms(lambda model: None, lambda model, dense, batch: pu.sparsegpt(model, batch))


@row(f"reconstruct, {_BLOCKS}, 50 %", at_most(11, "pu", "forward"), **_TURNS)
def reconstruct():
    def half(model):
        pu.prune(model, sparsity=0.5, scope="layer")

    return _language_arms(half, pu.reconstruct)
