"""Rows about training: what masks cost a step, the path of the data, and an epoch with its evaluation."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader, TensorDataset

import pruneutils as pu

from .harness import at_least, at_most, row

OPTIMIZERS = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), 1e-3),
}


def _pruned(model):
    pu.prune(model, sparsity=0.9, scope="layer")


def _pruned_with_dense_gradients(model):
    _pruned(model)
    model.dense = pu.model_utils.dense_gradients(model)
    model.dense.__enter__()  # for good: these models die with the process


def _pruned_by_torch(model):
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            torch_prune.l1_unstructured(module, "weight", 0.9)


def steps_of(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple, steps: int) -> None:
    """A plain training loop on one batch."""
    inputs, targets = batch
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def _step_arms(network, optimizer, steps, shape):
    base = pu.models.create(network)
    batch = torch.randn(128, *shape), torch.randint(10, (128,))

    def arm(mask):
        model = copy.deepcopy(base)
        mask(model)
        own = OPTIMIZERS[optimizer](model)
        return lambda: lambda: steps_of(model, own, batch, steps)

    variants = {
        "pu.prune": _pruned,
        "pu.prune, dense gradients": _pruned_with_dense_gradients,
        "dense step": lambda model: None,
        "torch.nn.utils.prune": _pruned_by_torch,
    }
    return {name: arm(mask) for name, mask in variants.items()}


def _step_row(network, title, optimizer, steps, shape, target, without_hooks, **options):
    def arms():
        return _step_arms(network, optimizer, steps, shape)

    arms.__name__ = f"step_{network}_{optimizer.lower()}"
    row(
        f"Masked training step, {title}, {optimizer}",
        at_most(target, "pu.prune", "dense step"),
        at_most(without_hooks, "pu.prune, dense gradients", "dense step"),
        at_most(None, "torch.nn.utils.prune", "dense step"),
        why="some 60 to 100 microseconds of Python and products with the masks, beside a step of 2 ms",
        **options,
    )(arms)


for _optimizer, _without_hooks in (("SGD", 1.04), ("Adam", 1.06)):
    _step_row("lenet300", "LeNet-300-100", _optimizer, 60, (1, 28, 28), 1.10, _without_hooks, rounds=31, seconds=25)
_step_row("lenet5", "LeNet-5", "SGD", 5, (1, 28, 28), 1.01, 1.01, rounds=15, seconds=25)
_step_row("resnet20", "ResNet-20", "SGD", 1, (3, 32, 32), 1.01, 1.01, rounds=11, seconds=40)


def pictures(n: int, seed: int = 0, device: str = "cpu") -> pu.data.Images:
    """Random images in the size of CIFAR-10, with its augmentation."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    targets, names = torch.randint(10, (n,), generator=generator), tuple("0123456789")
    images = pu.data.Images(pixels, targets, names, (0.5,) * 3, (0.25,) * 3, augment=True, flip=True)
    return images.to(device)


@row("Batches of CIFAR's size, cropped and flipped", at_most(0.05, "Images.batches", "training step, bfloat16"))
def data_path():
    train, generator = pictures(512), torch.Generator().manual_seed(0)
    model = pu.models.create("resnet20").to(memory_format=torch.channels_last)
    optimizer = OPTIMIZERS["SGD"](model)
    batch = next(train.batches(128, generator=generator))

    def batches():
        return lambda: [None for _ in train.batches(128, generator=generator)]

    def four_steps():
        with torch.autocast("cpu", torch.bfloat16):
            steps_of(model, optimizer, batch, 4)

    return {"Images.batches": batches, "training step, bfloat16": lambda: four_steps}


def usual_epoch(model: nn.Module, train: tuple, test: tuple) -> None:
    """One epoch and its evaluation as tutorials write them: float32, a DataLoader, no augmentation."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)
    model.train()
    for inputs, targets in DataLoader(TensorDataset(*train), 128, shuffle=True):
        steps_of(model, optimizer, (inputs, targets), 1)
    model.eval()
    with torch.no_grad():
        sum(int((model(x).argmax(1) == y).sum()) for x, y in DataLoader(TensorDataset(*test), 500))


def _epoch_arms(precision, n=384, n_test=500):
    train, test = pictures(n), pictures(n_test, 1)
    model = pu.models.create("resnet20")
    pu.prune(model, sparsity=0.9)
    again = copy.deepcopy(model)
    tensors = [tuple(torch.cat(parts) for parts in zip(*images)) for images in (train, test)]

    def check():
        return f"{pu.fit(model, train, epochs=1, precision=precision).precision.iloc[0]}"

    return {
        "pu.fit": lambda: lambda: pu.fit(model, train, test, epochs=1, precision=precision),
        "DataLoader, float32": lambda: lambda: usual_epoch(again, *tensors),
        "check": check,
    }


@row(
    "Epoch of ResNet-20, evaluation included (384 + 500 images), precision auto",
    at_least(1.3, "pu.fit", "DataLoader, float32"),
    rounds=7,
    why="without instructions for bfloat16 it stays at float32",
)
def epoch():
    return _epoch_arms("auto")


@row("The same in float32", at_least(None, "pu.fit", "DataLoader, float32"), rounds=5)
def epoch_float32():
    return _epoch_arms("float32")


@row(
    "GPU: epoch of ResNet-20, evaluation included (10,000 + 2,000 images), bfloat16",
    at_least(None, "pu.fit", "DataLoader, float32"),
    rounds=5,
    gpu=True,
    clock="wall",
)
def epoch_on_gpu():
    import time

    train, test = pictures(10_000, device="cuda"), pictures(2_000, 1, device="cuda")
    model = pu.models.create("resnet20").cuda()
    pu.prune(model, sparsity=0.9)
    again = copy.deepcopy(model)
    tensors = [tuple(torch.cat(parts) for parts in zip(*images)) for images in (train, test)]

    def fit():
        return pu.fit(model, train, test, epochs=1, precision="bfloat16")

    def check():
        torch.cuda.synchronize()
        start = time.perf_counter()
        fit()
        torch.cuda.synchronize()
        return f"{10_000 / (time.perf_counter() - start):,.0f} images/s"

    return {
        "pu.fit": lambda: fit,
        "DataLoader, float32": lambda: lambda: usual_epoch(again, *tensors),
        "check": check,
    }
