"""What the notebooks share: their size, where their runs and pictures go, and which images a run gets right."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ._checks import unknown
from ._files import repository

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SIZES", "hits", "image", "recorded", "right", "size", "store"]

SIZES = ("quick", "medium", "full")


def size() -> str:
    """Return the size to run in, as the environment variable PRUNEUTILS_SIZE says; ValueError if there is none such.

    Returns:
        "quick" (embedded digits, CPU; the default), "medium" (real images, CPU) or "full" (GPU).

    Example:
        >>> pu.notebook.size()
        'quick'
    """
    value = os.environ.get("PRUNEUTILS_SIZE", "quick")
    if value not in SIZES:
        raise unknown("PRUNEUTILS_SIZE", value, SIZES)
    return value


def image(name: str) -> Path:
    """Return where a picture of a notebook goes: into build/ of the repository, or where PRUNEUTILS_IMAGES says.

    Args:
        name: The picture's name, without a suffix.

    Returns:
        The path, for `save` of the functions of `plots`.

    Example:
        >>> pu.notebook.image("curve").name
        'curve'
    """
    return Path(os.environ.get("PRUNEUTILS_IMAGES") or repository() / "build") / name


def store(name: str) -> Path | None:
    """Return where the runs of a sweep are kept: <name>_<size> in results/, or in the folder PRUNEUTILS_RESULTS.

    Args:
        name: The store's name, usually the notebook's.

    Returns:
        The folder, for the argument `store` of `experiments.sweep`; None in size quick, which is always computed.

    Example:
        >>> pu.notebook.store("my_question")  # size quick: None
    """
    return None if size() == "quick" else _results() / f"{name}_{size()}"


def recorded(name: str, size: str, notebook: str | None = None) -> "pd.DataFrame":
    """Read the finished runs of a notebook's larger size from results/.

    Args:
        name, size: The name of the store, as given to `store`; and "medium" or "full".
        notebook: The notebook whose sweep writes the store; defaults to the store's name.

    Returns:
        The table of the finished runs, in the order of their start.

    Raises:
        FileNotFoundError: If nothing is recorded; the message has the command that records it.

    Example:
        >>> pu.notebook.recorded("my_question", "medium")
        Traceback (most recent call last):
        FileNotFoundError: no run of my_question_medium is recorded; to record: make study NAME=my_question SIZE=medium
    """
    from .experiments import load

    if size not in SIZES[1:]:
        raise unknown("size", size, SIZES[1:])
    folder = _results() / f"{name}_{size}"
    if not any(folder.glob("*.json")):
        command = f"make study NAME={notebook or name} SIZE={size}"
        raise FileNotFoundError(f"no run of {folder.name} is recorded; to record: {command}")
    frame = load(folder)
    return frame[frame.status == "done"]


@torch.no_grad()
def hits(model: nn.Module, images: Iterable) -> str:
    """Say which images a classifier gets right, for the record of a run.

    Args:
        model, images: It is put into eval mode; and its batches (inputs, targets), in a fixed order, on its device.

    Returns:
        A bit for each image, packed, in hexadecimal; `right` reads it.

    Example:
        >>> pu.notebook.hits(torch.nn.Identity(), [(torch.eye(8), torch.arange(8))])
        'ff'
    """
    bits = torch.cat([model.eval()(inputs).argmax(1) == targets for inputs, targets in images])
    return np.packbits(bits.cpu()).tobytes().hex()


def right(hits: Iterable[str]) -> np.ndarray:
    """Read the hits of several runs, each on the same multiple of eight images.

    Args:
        hits: What `hits` has returned for each run.

    Returns:
        An array (runs, images) of 1 and 0.

    Example:
        >>> pu.notebook.right(["0f", "ff"]).sum(axis=1).tolist()
        [4, 8]
    """
    return np.unpackbits(np.array([list(bytes.fromhex(text)) for text in hits], np.uint8), axis=1)


def _results() -> Path:
    return Path(os.environ.get("PRUNEUTILS_RESULTS") or repository() / "results")
