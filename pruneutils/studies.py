"""The runs of the larger studies, a function each: what `experiments.sweep` calls with one config of its grid.

Notebooks that ask different questions of the same runs share them here.
"""

from dataclasses import replace
from pathlib import Path

import torch

from . import data, models
from .checkpoints import save
from .data import IMAGENET_MEAN_STD, Images
from .data.images import _root
from .model_utils import accuracy
from .training import fit

CHECKPOINTS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}


def cifar10_as_published() -> tuple[Images, Images]:
    """Load CIFAR-10 with the normalisation that the public ResNet checkpoints were trained with (ImageNet's).

    Returns:
        The training and the test images; `name` tells whether they are an image folder of JPEG files.
    """
    mean, std = IMAGENET_MEAN_STD
    train, test = data.load("cifar10")
    return replace(train, mean=mean, std=std), replace(test, mean=mean, std=std)


def adapt(network: str, folder: str, epochs: int = 10, seed: int = 0, precision: str = "auto") -> list[dict]:
    """Adapt a public CIFAR-10 checkpoint to the images at hand, and save the network.

    JPEG images cost these checkpoints about ten points, so they are trained on: SGD with momentum .9 (Nesterov), a
    learning rate of .01 that falls to 0 as a cosine, weight decay 5e-4, batches of 128, crops and mirror images.

    Args:
        network: "resnet20" or "resnet56"; the checkpoint lies in `checkpoints/` of the data folder.
        folder: Where the network is saved, as `<network>_seed<seed>.safetensors`.
        epochs: How often each image is seen.
        seed: Of data order and augmentation.
        precision: Of training and evaluation.

    Returns:
        A row per epoch as from `fit`, epoch 0 being the checkpoint as it came.
    """
    train, test = cifar10_as_published()
    model = models.load_weights(models.create(network), _root(None) / "checkpoints" / CHECKPOINTS[network])
    before = {"epoch": 0, "test_accuracy": accuracy(model, test, precision=precision), "precision": precision}

    def decayed(parameters):
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)

    table = fit(
        model,
        train,
        test,
        epochs,
        optimizer=decayed,
        lr_schedule="cosine",
        seed=seed,
        precision=precision,
        test_every=2,
    )
    after = accuracy(model, test)
    facts = {"data": train.name, "epochs": epochs, "seed": seed, "accuracy": after}
    save(model, Path(folder) / f"{network}_seed{seed}.safetensors", **facts)
    rows = [before, *table.drop(columns="seconds").to_dict("records")]
    return [row | {"data": train.name, "float32_accuracy": after} for row in rows]
