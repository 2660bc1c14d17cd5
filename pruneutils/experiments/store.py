"""A store: a folder with one record for each finished run, which sweeps share without doing a run twice.

A record is a small JSON file, named by the hash of its run's config. Whoever does a run holds a lock on
`.claims/<hash>` meanwhile, which the kernel releases however that process ends; across machines this needs NFSv4.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import filelock
import pandas as pd

from .._files import write_whole

Record = dict[str, Any]


class Store:
    """The records of a folder, which is made by `prepare`."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder).resolve()
        self.name = self.folder.name

    def prepare(self) -> None:
        """Make the folder and check that it takes a record."""
        probe = f"{self.folder}/.probe-{os.getpid()}"
        try:
            (self.folder / ".claims").mkdir(parents=True, exist_ok=True)
            write_whole(probe, bytes(4096))
            os.unlink(probe)
        except OSError as error:
            message = f"cannot write into the store {self.folder} ({error.strerror}); nothing was run"
            raise OSError(error.errno, message) from error

    def read(self, key: str) -> Record | None:
        """Return the record of a run, None if there is none; ValueError names a file that is no record."""
        path = f"{self.folder}/{key}.json"  # a string: joining paths would take longer than short runs
        try:
            with open(path, encoding="utf-8") as file:
                return _checked(json.load(file), key)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise ValueError(f"{path} is not a record ({error}); remove it to run its config again") from None

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Keep everybody else from doing this run; gives False if it is being done."""
        lock = filelock.FileLock(self._claim(key))
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def write(self, key: str, record: Record) -> None:
        """Record a run that is claimed."""
        try:
            write_whole(f"{self.folder}/{key}.json", encoded(record).encode())
        except OSError as error:
            message = f"cannot write into the store {self.folder} any more ({error.strerror}), so the sweep stops; "
            message += f"not recorded: {record['config']} gave {record['metrics'] or record['error']}"
            raise OSError(error.errno, message) from error
        # Safe to remove: whoever opened the lock's file before this sees the record once it gets the lock.
        with suppress(OSError):
            os.unlink(self._claim(key))

    def _claim(self, key):
        return f"{self.folder}/.claims/{key}"


class NullStore:
    """Takes the place of a store for runs that are not kept, and that nobody else can do."""

    name, folder = "sweep", None

    def read(self, *_) -> None:
        """Nothing is kept."""

    prepare = write = read

    def claim(self, key: str) -> nullcontext[bool]:
        """Give True."""
        return nullcontext(True)


def _checked(record, key):
    """Return what a sweep has written for this key: ValueError says what is wrong with it."""
    parts = {"config": dict, "metrics": list, "status": str, "time": str}
    if not isinstance(record, dict) or not all(isinstance(record.get(name), kind) for name, kind in parts.items()):
        raise ValueError(f"it should hold {', '.join(parts)}")
    if key_of(record["config"]) != key:
        raise ValueError(f"it holds the run {record['config']}, which belongs into {key_of(record['config'])}")
    return record


def encoded(record: Record) -> str:
    """Return a record as JSON, a line for each of its parts; NaN and infinity stand there as Python writes them."""
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in record.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def key_of(config: dict) -> str:
    """Return the name of a config: the same where Python calls configs equal (1 and 1.0), whatever the keys' order."""

    def number(text):
        return int(float(text)) if float(text).is_integer() else float(text)

    canonical = json.dumps(json.loads(json.dumps(config), parse_float=number), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:20]


def plain(value: Any, where: str, finite: bool = True) -> Any:
    """Return the value in JSON's types: tuples, arrays and tensors become lists or numbers."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and finite and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: only finite numbers name a run")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item, where, finite) for item in value]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: plain(item, f"{where}[{name!r}]", finite) for name, item in value.items()}
    possible = "numbers, strings, booleans, None, and lists or dicts (with string keys) of these"
    raise TypeError(f"{where} is {value!r} of type {type(value).__name__}: possible are {possible}")


def rows_of(metrics: Any) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics, each checked to be plain values."""
    if isinstance(metrics, pd.DataFrame):
        metrics = metrics.to_dict("records")
    rows = [metrics] if isinstance(metrics, dict) else metrics
    if not isinstance(rows, (list, tuple)) or not all(isinstance(row, dict) for row in rows):
        raise TypeError(f"run must return a dict of metrics, a list of them, or a DataFrame; got {metrics!r}")
    return [{str(name): plain(value, f"metric {name!r}", finite=False) for name, value in row.items()} for row in rows]
