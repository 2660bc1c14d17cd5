"""Rows about what sparsity saves at inference: filters that are gone, and zeros in four forms."""

import copy
import warnings

import torch
from torch import nn

import pruneutils as pu

from .harness import at_least, row


def _resnet18():
    return pu.models.create("torchvision/resnet18", num_classes=1000).eval()


def _latency(run, inputs):
    def work():
        with torch.inference_mode():
            return run(inputs)

    return lambda: work


GLOBAL, EACH = "half of all filters gone", "half of each layer gone"
PEER = "half of each layer gone, torch-pruning"
_FILTERS = {GLOBAL: {}, EACH: {"min_density": 0.5}}  # the options of pu.prune_filters


def _halved(dense, inputs, arm):
    model = copy.deepcopy(dense)
    return pu.prune_filters(model, ratio=0.5, example_inputs=inputs, **_FILTERS[arm])


def _halved_by_torch_pruning(dense, inputs):
    import torch_pruning

    model = copy.deepcopy(dense)
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        inputs,
        torch_pruning.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=[model.fc],  # as pu.prune_filters keeps the outputs
    )
    pruner.step()
    return model.eval()


@row(
    "ResNet-18, one image of 224 x 224: latency",
    at_least(1.7, GLOBAL, "dense"),
    at_least(None, EACH, "dense"),
    at_least(None, EACH, PEER),
    at_least(None, GLOBAL, PEER),
    at_least(None, "2:4 zeros", "dense"),
    at_least(None, "90 % zeros, unstructured", "dense"),
    rounds=21,
    calls=2,
    why="the MACs that are left decide, and how narrow the layers have become",
)
def latency():
    inputs, dense = torch.randn(1, 3, 224, 224), _resnet18()
    two_of_four, zeros = (copy.deepcopy(dense) for _ in range(2))
    pu.prune(two_of_four, granularity="2:4", exclude="conv1")
    pu.prune(zeros, sparsity=0.9)
    smaller = {arm: _halved(dense, inputs, arm) for arm in _FILTERS}
    smaller[PEER] = _halved_by_torch_pruning(dense, inputs)

    def check():
        whole = pu.cost(dense, inputs).macs
        left = (f"{pu.cost(model, inputs).macs / whole:.0%} ({arm})" for arm, model in smaller.items())
        return "MACs left: " + ", ".join(left)

    models = smaller | {"dense": dense, "2:4 zeros": two_of_four, "90 % zeros, unstructured": zeros}
    return {name: _latency(model, inputs) for name, model in models.items()} | {"check": check}


@row(
    "Remove half the filters of ResNet-18",
    at_least(None, EACH, PEER),
    at_least(None, GLOBAL, PEER),
    rounds=3,
    why="it checks the smaller network against the masked one",
)
def remove_filters():
    inputs, dense = torch.randn(1, 3, 224, 224), _resnet18()
    arms = {arm: lambda arm=arm: lambda: _halved(dense, inputs, arm) for arm in _FILTERS}
    return arms | {PEER: lambda: lambda: _halved_by_torch_pruning(dense, inputs)}


def _linear_arms(batch):
    torch.manual_seed(0)
    layer = nn.Linear(4096, 4096, bias=False)
    dense = layer.weight.detach().clone()
    pu.prune(nn.Sequential(layer), sparsity=0.99)
    inputs, zeros = torch.randn(batch, 4096), layer.weight.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR support a beta
        csr = zeros.to_sparse_csr()
    return {
        "CSR, W @ x.T": _latency(lambda x: csr @ x.T.contiguous(), inputs),
        "99 % zeros": _latency(lambda x: nn.functional.linear(x, zeros), inputs),
        "dense": _latency(lambda x: nn.functional.linear(x, dense), inputs),
    }


_LINEAR = at_least(None, "CSR, W @ x.T", "dense"), at_least(None, "99 % zeros", "dense")


@row("Linear 4096 x 4096, 99 % pruned, one sample", *_LINEAR, rounds=21, calls=5)
def linear_one():
    return _linear_arms(1)


@row("Linear 4096 x 4096, 99 % pruned, 64 samples", *_LINEAR, rounds=15, calls=2)
def linear_64():
    return _linear_arms(64)
