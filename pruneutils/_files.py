"""Files that appear whole or not at all, which tensors are one, and where the repository keeps its folders."""

import contextlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch


def repository(start: str | os.PathLike = ".") -> Path:
    """Return the nearest folder, from `start` upwards, with notebooks/ and results/ or pyproject.toml; else `start`."""
    start = Path(start).resolve()
    for folder in (start, *start.parents):
        if (folder / "notebooks").is_dir() and any((folder / name).exists() for name in ("results", "pyproject.toml")):
            return folder
    return start


def write_whole(path: str | os.PathLike, content: bytes) -> None:
    """Write a file: a reader meets the old one or the new one, never half of one, even if the process is killed."""
    path = os.path.realpath(path)  # what a link points to, so that the link stays
    folder, name = os.path.split(path)
    part = os.path.join(folder, f".{name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def tied_names(state: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return {name: the name under which the same tensor is stored}: the first; all names with masks are stored."""
    first, tied = {}, {}
    for name in sorted(state, key=lambda name: name not in masks):
        tensor = state[name]
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        if first.setdefault(place, name) != name and name not in masks:
            tied[name] = first[place]
    return tied
