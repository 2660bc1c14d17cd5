"""Files that appear whole or not at all, and where the repository keeps its folders."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


def repository(start: str | os.PathLike = ".") -> Path:
    """Return the nearest folder, from `start` upwards, that holds notebooks/ and results/ or pyproject.toml.

    Where there is none, `start` takes its place: what is written then lies where the user looks for it.
    """
    start = Path(start).resolve()
    for folder in (start, *start.parents):
        if (folder / "notebooks").is_dir() and any((folder / name).exists() for name in ("results", "pyproject.toml")):
            return folder
    return start


@contextlib.contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Write to the path given inside; it takes the place of `path` when the block ends without an error.

    A reader meets the old file or the new one, never half of one, also if the process is killed or the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(_part_of(path))
    try:
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # some writers make files that only their owner can read
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_whole(path: str | os.PathLike, content: bytes) -> None:
    """Write a small file into a folder that is there, as `written_whole` does, and open it only once."""
    part = _part_of(path)
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


def _part_of(path):
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
