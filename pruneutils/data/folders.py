"""Folders of images: a folder for each class, pictures of any size and kind, read as uint8 tensors (N, 3, H, W)."""

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from .._checks import callers_level, one_of, whole

_SUFFIXES = tuple(".jpg .jpeg .png .bmp .gif .tif .tiff .webp .ppm .pgm .pbm .pnm .jp2 .avif".split())
_BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0)}
_INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class Picture:
    """How an image file becomes pixels; its text names the cache file."""

    size: tuple[int, int] | None = None  # (height, width) of the result; None: as the file is
    crop: float | None = None  # the fraction of the scaled image that is kept, around its centre; None: all, distorted
    interpolation: str = "bilinear"
    background: str = "white"  # what shows through transparent pixels

    def __str__(self):
        size = "x".join(map(str, self.size)) if self.size else "as-is"
        crop = f"-crop{self.crop}" if self.crop else ""
        return f"{size}{crop}-{self.interpolation}-{self.background}"


def picture(size: int | tuple[int, int] | None, crop: float | None, interpolation: str, background: str) -> Picture:
    """Return the options as one checked value; ValueError names the first that is wrong."""
    if size is not None:
        pair = size if isinstance(size, tuple | list) else (size, size)
        if len(pair) != 2:
            raise ValueError(f"size must be the pixels a side or (height, width), not {size!r}")
        size = tuple(whole("size", pixels) for pixels in pair)
    if crop is not None:
        if isinstance(crop, bool) or not isinstance(crop, int | float) or not 0 < crop <= 1:
            raise ValueError(f"crop must be a fraction in (0, 1], not {crop!r}")
        if size is None:
            raise ValueError("crop keeps the centre of a scaled image, so it needs a size")
    one_of("interpolation", interpolation, _INTERPOLATIONS)
    one_of("background", background, _BACKGROUNDS)
    return Picture(size, crop, interpolation, background)


def split(classes: int | None = None) -> Callable:
    """Return a reader of train/<class>/* and test/<class>/*, of `classes` class folders if a number is given."""

    def reader(folder: Path, how: Picture = Picture()):
        listed = {part: _list_classes(folder.parent / part) for part in ("train", "test")}
        names = sorted(listed["train"])
        if differing := set(listed["train"]) ^ set(listed["test"]):
            raise ValueError(f"train and test have different class folders: {', '.join(sorted(differing))} in one only")
        if classes not in (None, len(names)):
            raise ValueError(f"{len(names)} class folders instead of {classes}")

        def read():
            size = how.size or _first_size(listed["train"], names, how)
            return *(_read_images(listed[part], names, size, how) for part in ("train", "test")), tuple(names)

        return [path for part in listed.values() for name in names for path in part[name]], read

    return reader


def single(folder: Path, how: Picture) -> tuple[list[str], Callable]:
    """Return the files of <class>/* and the function that reads them into (images, labels) and the class names."""
    listed = _list_classes(folder)
    names = sorted(listed)

    def read():
        return _read_images(listed, names, how.size or _first_size(listed, names, how), how), tuple(names)

    return [path for name in names for path in listed[name]], read


def _list_classes(folder):
    """{class: its image files, sorted}; hidden files do not count, others that are no images are told."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder.name}/")
    classes, junk = {}, []
    for entry in os.scandir(folder):
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        classes[entry.name] = files = []
        for file in os.scandir(entry.path):
            if not file.name.startswith("."):
                is_image = file.name.lower().endswith(_SUFFIXES) and file.is_file()
                (files if is_image else junk).append(file.path)
        files.sort()
    if empty := sorted(name for name, files in classes.items() if not files):
        split = "; train/ and test/ are loaded by load('imagefolder')" if {"train", "test"} <= set(classes) else ""
        raise ValueError(f"no images in {folder.name}/{empty[0]}{split}")
    if not classes:
        raise FileNotFoundError(f"no class folders in {folder.name}/")
    if junk:
        more = f" and {len(junk) - 3} more" if len(junk) > 3 else ""
        message = f"skipped {len(junk)} without the name of an image file: {', '.join(sorted(junk)[:3])}{more}"
        warnings.warn(message, stacklevel=callers_level())
    return classes


def _first_size(files, classes, how):
    return _read_image(files[classes[0]][0], how).shape[1:]


def _read_images(files, classes, size, how):
    labelled = [(path, label) for label, name in enumerate(classes) for path in files[name]]
    images = np.empty((len(labelled), 3, *size), np.uint8)
    for index, (path, _) in enumerate(tqdm(labelled, desc="reading images", leave=False, delay=3)):
        image = _read_image(path, how)
        if image.shape[1:] != tuple(size):
            raise ValueError(f"{path} has {image.shape[1:]} pixels, others {tuple(size)}; size= makes them one size")
        images[index] = image
    return torch.from_numpy(images), torch.tensor([label for _, label in labelled])


def _read_image(path, how):
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)  # as every viewer shows it
            image = _to_rgb(image, how.background)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be decoded as an image ({error})") from error
    if how.size is not None:
        image = _to_size(image, how)
    return np.asarray(image).transpose(2, 0, 1)


def _to_rgb(image, background):
    """Gray of 16 bits is scaled to 8, where Pillow would cut it off at 255; transparent pixels get a background."""
    from PIL import Image

    if image.mode.startswith("I") and (image.mode != "I" or image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("gray values of 32 bits, whose black and white nobody knows; save them with 8 or 16 bits")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*_BACKGROUNDS[background], 255)), image).convert(
            "RGB"
        )
    return image.convert("RGB")


def _to_size(image, how):
    """Scale the image to the size, or so that it covers size / crop, and then keep the centre of the size."""
    from PIL import Image

    resample, (height, width) = Image.Resampling[how.interpolation.upper()], how.size
    if how.crop is None:
        return image.resize((width, height), resample)
    covered = math.floor(height / how.crop), math.floor(width / how.crop)
    factor = max(covered[0] / image.height, covered[1] / image.width)
    scaled = max(covered[0], int(image.height * factor)), max(covered[1], int(image.width * factor))
    top, left = round((scaled[0] - height) / 2), round((scaled[1] - width) / 2)
    return image.resize(scaled[::-1], resample).crop((left, top, left + width, top + height))
