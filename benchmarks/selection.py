"""Rows about selection: `pu.prune` by magnitude and `select` alone, on a CPU and on a GPU."""

import copy

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import pruneutils as pu
from pruneutils.pruning.selection import select

from .harness import at_least, at_most, row


def resnet50(device: str = "cpu") -> nn.Sequential:
    """The convolutions and the linear layer of ResNet-50, 25.5 million weights, without what lies between them."""
    layers, channels = [(3, 64, 7)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers += [(channels, width, 1), (width, width, 3), (width, 4 * width, 1)]
            if block == 0:
                layers.append((channels, 4 * width, 1))
            channels = 4 * width
    modules = [nn.Conv2d(i, o, kernel, bias=False, device=device) for i, o, kernel in layers]
    return nn.Sequential(*modules, nn.Linear(channels, 1000, bias=False, device=device))


def linear_layers(n_weights: int, width: int = 1024) -> nn.Sequential:
    """Linear layers of width x width (at most) with about so many weights, uniform in [-1, 1)."""
    width = min(width, int(n_weights**0.5))
    model = nn.Sequential(
        *(nn.Linear(width, width, bias=False, device="meta") for _ in range(round(n_weights / width**2)))
    ).to_empty(device="cpu")
    for weight in model.parameters():
        nn.init.uniform_(weight, -1, 1)
    return model


def pruned_by_torch(model: nn.Module, sparsity: float = 0.9) -> None:
    """Global magnitude pruning as torch documents it."""
    parameters = [(module, "weight") for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    torch_prune.global_unstructured(parameters, torch_prune.L1Unstructured, amount=sparsity)


def pruned_by_fasterai(model: nn.Module, sparsity: float = 0.9) -> None:
    """Global magnitude pruning as fasterai documents it; it prunes one kind of layer, here the convolutions."""
    from fasterai.core.criteria import large_final
    from fasterai.sparse.sparsifier import Sparsifier

    Sparsifier(model, "weight", "global", large_final, layer_type=nn.Conv2d).sparsify_model(sparsity)


def has_fasterai() -> bool:
    try:
        from fasterai.sparse.sparsifier import Sparsifier  # noqa: F401
    except Exception:  # what fasterai itself needs may be missing, or of another version
        return False
    return True


def masks_of_cat_and_kthvalue(scores: list[torch.Tensor], sparsity: float) -> list[torch.Tensor]:
    """The rule of Synaptic-Flow (Tanaka et al. 2020): a copy of all scores, the k-th lowest, a comparison."""
    every = torch.cat([torch.flatten(score) for score in scores])
    k = int(sparsity * every.numel())
    threshold, _ = torch.kthvalue(every, k)
    zero, one = torch.tensor([0.0]), torch.tensor([1.0])
    return [torch.where(score <= threshold, zero, one) for score in scores]


def _pruning(prune):
    base = resnet50()

    def prepare():
        model = copy.deepcopy(base)
        return lambda: prune(model)

    return prepare


def _prune_arms():
    return {
        "pu.prune": _pruning(lambda model: pu.prune(model, sparsity=0.9)),
        "torch.nn.utils.prune": _pruning(pruned_by_torch),
        "fasterai": _pruning(pruned_by_fasterai) if has_fasterai() else None,
    }


@row(
    "Prune 25.5 M weights to 90 %",
    at_least(70, "pu.prune", "torch.nn.utils.prune", first=60),
    at_least(None, "pu.prune", "fasterai"),
    rounds=5,
    fresh=3,
    memory=40,
    why="most of the time is one read and one write of the weights and the masks, which grow no faster",
)
def prune():
    return _prune_arms()


@row(
    "Prune 25.5 M weights to 90 %",
    at_least(80, "pu.prune", "torch.nn.utils.prune"),
    rounds=5,
    threads=2,
    clock="wall",
    why="two cores share one memory, and other processes share the cores",
)
def prune_2_threads():
    return {name: arm for name, arm in _prune_arms().items() if name != "fasterai"}


@row(
    "Select among 25.5 M scores, 90 %",
    at_least(None, "select", "torch.nn.utils.prune"),
    at_least(None, "select", "cat + kthvalue (Synaptic-Flow)"),
    at_most(None, "select", "one read of the scores"),
    rounds=5,
    fresh=1,
)
def selection():
    scores = {name: weight.detach().abs() for name, weight in resnet50().named_parameters()}
    k = round(0.9 * sum(score.numel() for score in scores.values()))
    return {
        "select": lambda: lambda: select(scores, k),
        "cat + kthvalue (Synaptic-Flow)": lambda: lambda: masks_of_cat_and_kthvalue(list(scores.values()), 0.9),
        "one read of the scores": lambda: lambda: [score.sum() for score in scores.values()],
        "torch.nn.utils.prune": _pruning(pruned_by_torch),
    }


@row(
    "Prune 302 M weights to 90 % (1,208 MB)",
    at_most(None, "pu.prune", "one read of the weights"),
    rounds=3,
    fresh=1,
    memory=0.3 * 1208,
)
def prune_302m():
    base = linear_layers(302_000_000)

    def ours():
        pu.make_permanent(base)  # what is zero stays zero; the weights that are left are pruned anew
        for weight in base.parameters():
            nn.init.uniform_(weight, -1, 1)
        return lambda: pu.prune(base, sparsity=0.9)

    return {"pu.prune": ours, "one read of the weights": lambda: lambda: [w.sum() for w in base.parameters()]}


@row(
    "GPU: select among 25.5 M scores, 90 %",
    at_least(None, "select", "torch.nn.utils.prune"),
    at_most(None, "select", "one read of the scores"),
    gpu=True,
    clock="wall",
)
def selection_on_gpu():
    model = resnet50("cuda")
    scores = {name: weight.detach().abs() for name, weight in model.named_parameters()}
    k = round(0.9 * sum(score.numel() for score in scores.values()))

    def theirs():
        again = copy.deepcopy(model)
        return lambda: pruned_by_torch(again)

    def check():
        on_gpu = select(scores, k).keep
        on_cpu = select({name: score.cpu() for name, score in scores.items()}, k).keep
        same = all(torch.equal(on_gpu[name].cpu(), on_cpu[name]) for name in scores)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        select(scores, k)
        end.record()
        torch.cuda.synchronize()
        # what has to move: each score is read and each mask is written once
        moved = sum(score.numel() * (score.element_size() + 1) for score in scores.values())
        rate = moved / (start.elapsed_time(end) / 1e3)
        return f"masks of GPU and CPU {'equal' if same else 'DIFFER'}; {rate / _peak_rate():.0%} of memory bandwidth"

    return {
        "select": lambda: lambda: select(scores, k),
        "one read of the scores": lambda: lambda: [score.sum() for score in scores.values()],
        "torch.nn.utils.prune": theirs,
        "check": check,
    }


def _peak_rate() -> float:
    """Bytes a second that the GPU copies, read and written, measured on 1 GiB."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * source.numel() * source.element_size() / min(times)
