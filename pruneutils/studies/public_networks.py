"""Public checkpoints: adapted to the images at hand, and measured with and without evaluation mode."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from .. import data, models
from .._files import repository
from .._torch import note_precision
from ..checkpoints import save
from ..data import IMAGENET_MEAN_STD, Images
from ..data.datasets import data_folder
from ..model_utils import accuracy
from ..training import fit

CHECKPOINTS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}


def cifar10_as_published(device: str = "cpu") -> tuple[Images, Images]:
    """Load CIFAR-10 with the normalisation that the public ResNet checkpoints were trained with (ImageNet's).

    Args:
        device: Where the images lie.

    Returns:
        The training and the test images; `name` tells whether they are an image folder of JPEG files.
    """
    mean, std = IMAGENET_MEAN_STD
    train, test = data.load("cifar10", device=device)
    return replace(train, mean=mean, std=std), replace(test, mean=mean, std=std)


def adapt(
    network: str, folder: str, epochs: int = 10, seed: int = 0, precision: str = "auto", device: str = "cpu"
) -> list[dict]:
    """Adapt a public CIFAR-10 checkpoint to the images at hand, and save the network.

    JPEG images cost these checkpoints about ten points, so they are trained on: SGD with momentum .9 (Nesterov), a
    learning rate of .01 that falls to 0 as a cosine, weight decay 5e-4, batches of 128, crops and mirror images.

    Args:
        network: "resnet20" or "resnet56"; the checkpoint lies in `checkpoints/` of the data folder.
        folder: Where the network is saved, as `<network>_seed<seed>.safetensors`; relative to the repository.
        epochs: How often each image is seen.
        seed: Of data order and augmentation.
        precision: Of training and evaluation.
        device: Where to train.

    Returns:
        A row per epoch as from `fit`, epoch 0 being the checkpoint as it came.
    """
    train, test = cifar10_as_published(device)
    model = models.load_weights(models.create(network), data_folder() / "checkpoints" / CHECKPOINTS[network]).to(device)
    before = {"epoch": 0, "test_accuracy": accuracy(model, test, precision=precision), "precision": precision}

    def decayed(parameters):
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)

    options = {"lr_schedule": "cosine", "seed": seed, "precision": precision, "test_every": 2}
    table = fit(model, train, test, epochs, decayed, **options)
    after = accuracy(model, test)
    facts = {"data": train.name, "epochs": epochs, "seed": seed, "accuracy": after}
    save(model, repository() / folder / f"{network}_seed{seed}.safetensors", **facts)
    rows = [before, *table.drop(columns="seconds").to_dict("records")]
    return [row | {"data": train.name, "float32_accuracy": after} for row in rows]


NETWORKS = "results/networks"  # where `adapt` has saved the dense networks of this repository


def adapt_grid(network: str = "resnet20", device: str = "cpu") -> list[dict]:
    """List the one run of `adapt` that makes the dense network of the larger studies.

    Args:
        network: "resnet20" or "resnet56".
        device: Where to train.

    Returns:
        One config.

    Example:
        >>> from pruneutils import studies
        >>> studies.adapt_grid()
        [{'network': 'resnet20', 'folder': 'results/networks', 'epochs': 10, 'seed': 0}]
    """
    config = {"network": network, "folder": NETWORKS, "epochs": 10, "seed": 0}
    return [config if device == "cpu" else config | {"device": device}]


def evaluation_mode(
    network: str, mode: str, normalisation: str, batch_size: int = 128, order: int | None = None
) -> dict:
    """Measure a public checkpoint with running or batch statistics, normalised as trained or by (.5, .5).

    A published pruning study never called `model.eval()` and normalised by (.5, .5); this takes the two apart.

    Args:
        network: "resnet20" or "resnet56".
        mode: "running" (evaluation mode) or "batch" (training mode, whose statistics depend on the batch).
        normalisation: "as trained" (ImageNet's mean and deviation) or "half".
        batch_size: Of the evaluation.
        order: The seed that shuffles the test images, as CIFAR-10's own files are shuffled; None leaves the images in
            the order of the data. An image folder is read class by class, so its batches hold one class, or two.

    Returns:
        The accuracy on the 10,000 test images, a fraction, and the name of the data.
    """
    mean, std = IMAGENET_MEAN_STD if normalisation == "as trained" else ((0.5,) * 3, (0.5,) * 3)
    _, test = data.load("cifar10")
    test = replace(test, mean=mean, std=std)
    if order is not None:
        test = test.subset(len(test), order)
    model = models.load_weights(models.create(network), data_folder() / "checkpoints" / CHECKPOINTS[network])
    found = accuracy(model, test) if mode == "running" else accuracy_in_training_mode(model, test, batch_size)
    return {"accuracy": found, "data": test.name}


def evaluation_grid(orders: Sequence[int]) -> list[dict]:
    """List the runs of `evaluation_mode`: both checkpoints, modes and normalisations, and the orders of the images.

    Args:
        orders: The seeds that shuffle the images; only batch statistics depend on the order.

    Returns:
        One config per run.

    Example:
        >>> from pruneutils import studies
        >>> len(studies.evaluation_grid(orders=range(5)))
        28
    """
    cells = [
        {"network": network, "normalisation": normalisation}
        for network in CHECKPOINTS
        for normalisation in ("as trained", "half")
    ]
    grid = [cell | {"mode": mode} for cell in cells for mode in ("running", "batch")]
    return grid + [cell | {"mode": "batch", "order": order} for cell in cells for order in orders]


def accuracy_in_training_mode(
    model: nn.Module, images: Images, batch_size: int = 128, order: int | None = None
) -> float:
    """Measure the accuracy of a network that was left in training mode, and leave the traces that this leaves.

    Batch norm uses the statistics of each batch, so the answer to an image depends on its neighbours, and the running
    statistics move towards those of the images.

    Args:
        model: Any classifier; it is in training mode afterwards.
        images: What the accuracy is measured on.
        batch_size: Images of a batch.
        order: The seed that shuffles the images; None leaves them in their order.

    Returns:
        The accuracy, a float in [0, 1].

    Example:
        >>> from pruneutils import studies
        >>> train, test = pu.data.load("digits")
        >>> model = pu.models.create("lenet300")  # no batch norm: the mode makes no difference
        >>> studies.accuracy_in_training_mode(model, test) == pu.accuracy(model, test)
        True
    """
    shown = images if order is None else images.subset(len(images), order)
    note_precision("float32")
    model.train()
    with torch.no_grad():
        hits = [
            int((model(x).argmax(1) == y).sum()) for x, y in shown.batches(batch_size, shuffle=False, augment=False)
        ]
    return sum(hits) / len(images)
