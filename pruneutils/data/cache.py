"""What was read from image files is kept as one file of tensors, which later calls map into memory.

A cache file is used only if its checksum holds and if the files it was read from are as they were: the same paths,
sizes, times of modification and times of change. The last is set by the file system whenever a file or its times are
changed, so that a file of the same size whose time of modification was put back is noticed too (on Windows, where no
such time exists, it is not). The contents of the files are not read again.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import platformdirs
import torch

from .. import _safetensors
from .._checks import callers_level

_FORMAT = "2"  # of the cache files; part of their names, so that two versions do not overwrite each other's


def cached(
    key: str,
    folder: str | os.PathLike,
    files: Iterable[str | os.PathLike],
    read: Callable[[], tuple[dict[str, torch.Tensor], dict[str, Any]]],
    build: Callable[[dict[str, torch.Tensor], dict[str, Any]], Any],
) -> Any:
    """Return build(tensors, facts) of the cache file, or of `read()` where that is absent, broken or out of date.

    `files` are those that `read` reads, and the facts are JSON values. What `build` refuses is not kept.
    """
    stamp = _stamp(files)
    place = hashlib.sha256(f"{_FORMAT}\0{folder}".encode(errors="surrogateescape")).hexdigest()[:12]
    path = cache_folder() / f"{key}-{place}.safetensors"
    try:
        tensors, texts = _safetensors.read(path)
        if texts["stamp"] == stamp:
            return build(tensors, json.loads(texts["facts"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no cache is as good as a broken one: read the files
    tensors, facts = read()
    built = build(tensors, facts)
    try:
        _safetensors.write(path, tensors, {"stamp": stamp, "facts": json.dumps(facts)})
    except OSError as error:
        message = f"no cache is kept in {path.parent} ({error}); the files of {key} are read each time"
        warnings.warn(message, stacklevel=callers_level())
    return built


def cache_folder() -> Path:
    """Return the user's folder for cache files, $XDG_CACHE_HOME/pruneutils or ~/.cache/pruneutils on Linux."""
    return platformdirs.user_cache_path("pruneutils", appauthor=False)


def _stamp(files):
    """What changes whenever one of the files does."""
    stamp = hashlib.sha256()
    for file in files:
        facts = os.stat(file)
        changed = facts.st_ctime_ns if os.name == "posix" else 0
        stamp.update(f"\0{file}\0{facts.st_size}\0{facts.st_mtime_ns}\0{changed}".encode(errors="surrogateescape"))
    return stamp.hexdigest()
