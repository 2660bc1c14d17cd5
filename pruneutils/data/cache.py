"""What was read from image files is kept as one file of tensors, for as long as those files stay as they were."""

import contextlib
import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .._checks import callers_level

_FORMAT = "4"  # of the cache files; part of their names, so that two versions do not overwrite each other's


def cached(
    name: str,
    picture: object,
    folders: Sequence[Path],  # which hold the files that `read` reads
    read: Callable[[], tuple[dict[str, torch.Tensor], dict[str, Any]]],  # the facts are JSON values
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return (tensors, facts) of the cache file, or of `read()` where that is absent, broken or out of date."""
    stamp = _stamp(folders)
    place = hashlib.sha256(f"{_FORMAT}\0{picture}\0{list(map(str, folders))}".encode()).hexdigest()[:12]
    path = cache_folder() / f"{name}-{place}.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            texts = file.metadata()
            if texts["stamp"] == stamp:
                return {name: file.get_tensor(name) for name in file.keys()}, json.loads(texts["facts"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        pass  # no cache is as good as a broken one: read the files
    tensors, facts = read()
    part = path.with_suffix(f".{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, part, {"stamp": stamp, "facts": json.dumps(facts)})
        part.replace(path)
    except (OSError, SafetensorError) as error:
        message = f"no cache is kept in {path.parent} ({error}); the files of {name} are read each time"
        warnings.warn(message, stacklevel=callers_level())
        with contextlib.suppress(OSError):
            part.unlink()
    return tensors, facts


def cache_folder() -> Path:
    """Return the user's folder for cache files, $XDG_CACHE_HOME/pruneutils or ~/.cache/pruneutils."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "pruneutils")


def _stamp(folders):
    """What changes with a file's path, size, time of modification, or time of change, which nothing can hide."""
    found = []
    for top in folders:
        for folder, _, names in os.walk(top, followlinks=True):
            for path in (os.path.join(folder, name) for name in names):
                facts = os.stat(path)
                found.append((path, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns))
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()
