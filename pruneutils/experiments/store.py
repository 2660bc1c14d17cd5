"""A store: a folder with one record for each finished run, which sweeps share without doing a run twice.

A record is a small JSON file, named by the hash of its run's config. Whoever does a run holds a lock on
`.claims/<hash>` meanwhile, which the kernel releases however that process ends: sweeps that share a store share the
work, and no claim goes stale. On a network file system this needs locks that hold across machines (NFSv4 has them).

JSON has no word for numbers that are not finite, so a metric that is one is written as the string "NaN", "Infinity" or
"-Infinity", and read back as a number. Only this module knows names and layout of the files.
"""

import errno
import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
import pandas as pd

from .._files import write_whole

Record = dict[str, Any]

_strict = json.JSONEncoder(allow_nan=False).encode
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class StoreError(OSError):
    """The store cannot be written, or is not there."""


class Store:
    """The records of a folder, which is made by `prepare`."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder).resolve()
        self.name = self.folder.name
        # Strings, because a sweep of short runs would spend more time in joining paths than in its runs.
        self._records, self._claims = f"{self.folder}{os.sep}", f"{self.folder / '.claims'}{os.sep}"

    def prepare(self, runs: int) -> None:
        """Make the folder and write, then remove, as much as the records of so many runs will need."""
        probe = self.folder / f".probe-{os.getpid()}"
        try:
            (self.folder / ".claims").mkdir(parents=True, exist_ok=True)
            try:
                with open(probe, "wb") as file:
                    file.write(bytes(4096 * runs))
                    os.fsync(file.fileno())
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            told = f"cannot write {runs} records into the store {self.folder} ({error.strerror}); nothing was run"
            raise StoreError(error.errno, told) from error

    def keys(self) -> list[str]:
        """Return the names of the runs that are recorded."""
        return sorted(path.stem for path in self.folder.glob("*.json"))

    def read(self, key: str) -> Record | None:
        """Return the record of a run, None if there is none; ValueError names a file that is no record."""
        path = f"{self._records}{key}.json"
        try:
            with open(path, encoding="utf-8") as file:
                record = decoded(file.read())
            _check(record)
            if key_of(record["config"]) != key:
                raise ValueError(f"it holds the run {record['config']}, which belongs into {key_of(record['config'])}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise ValueError(f"{path} is not a record ({error}); remove it to run its config again") from None
        return record

    @contextmanager
    def claim(self, key: str) -> Iterator[Callable[[Record], None] | None]:
        """Keep everybody else from doing this run; gives the function that records it, None if it is being done."""
        if not os.path.isdir(self._records):
            told = f"{platform.node()} does not see the store {self.folder}, which every machine of a sweep has to see"
            raise StoreError(errno.ENOENT, told)
        lock = self._lock(key)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            yield None
            return

        def write(record: Record) -> None:
            self._write(key, record)
            # Safe to remove: whoever opened the lock's file before this sees the record once it gets the lock.
            with suppress(OSError):
                os.unlink(lock.lock_file)

        try:
            yield write
        finally:
            lock.release()

    def claimed(self, key: str) -> bool:
        """Tell whether another process is doing this run."""
        if not os.path.exists(f"{self._claims}{key}"):
            return False
        try:
            with self._lock(key).acquire(blocking=False):
                return False
        except filelock.Timeout:
            return True

    def _lock(self, key):
        return filelock.FileLock(f"{self._claims}{key}")

    def _write(self, key, record):
        try:
            write_whole(f"{self._records}{key}.json", encoded(record).encode())
        except OSError as error:
            told = f"cannot write into the store {self.folder} any more ({error.strerror}), so the sweep stops; "
            told += f"not recorded: {record['config']} gave {record['metrics'] or record['error']}"
            raise StoreError(error.errno, told) from error


class Nowhere:
    """What takes the place of a store for runs that are not kept."""

    name = "sweep"
    folder = None

    def prepare(self, runs: int) -> None:
        """Nothing is needed."""

    def read(self, key: str) -> None:
        """Return None, as nothing is kept."""

    @contextmanager
    def claim(self, key: str) -> Iterator[Callable[[Record], None]]:
        """Give a function that records nothing."""
        yield lambda record: None

    def claimed(self, key: str) -> bool:
        """Tell that nobody else is doing this run."""
        return False


# ---------------------------------------------------------------- records


def _check(record):
    """Check that this is what a sweep writes: ValueError says what is missing."""
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    for name, kind in {"config": dict, "metrics": list, "status": str, "time": str}.items():
        if not isinstance(record.get(name), kind):
            raise ValueError(f"its {name} should be a {kind.__name__} and is {record.get(name)!r}")
    if record["status"] not in ("done", "failed"):
        raise ValueError(f"its status {record['status']!r} should be 'done' or 'failed'")
    if not all(isinstance(row, dict) for row in record["metrics"]):
        raise ValueError(f"its metrics {record['metrics']!r} should be dicts")


def encoded(record: Record) -> str:
    """Return a record as strict JSON, a line for each of its parts."""
    record = record | {"metrics": _finite(record["metrics"])}
    lines = (f"{_strict(name)}: {_strict(value)}" for name, value in record.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def decoded(text: str) -> Any:
    """Return what `encoded` made text of; older records have bare NaN, which Python reads too."""
    record = json.loads(text)
    if isinstance(record, dict) and "metrics" in record:
        record["metrics"] = _with_numbers(record["metrics"])
    return record


def _finite(value):
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return {name: _finite(item) for name, item in value.items()} if isinstance(value, dict) else value


def _with_numbers(value):
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    return {name: _with_numbers(item) for name, item in value.items()} if isinstance(value, dict) else value


# ---------------------------------------------------------------- names and values


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
    raise TypeError(
        f"{where} is {value!r} of type {type(value).__name__}: possible are numbers, strings, booleans, None, "
        "and lists or dicts (with string keys) of these"
    )


def rows_of(metrics: Any) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics, each checked to be plain values."""
    if isinstance(metrics, pd.DataFrame):
        metrics = metrics.to_dict("records")
    rows = [metrics] if isinstance(metrics, dict) else metrics
    if not isinstance(rows, (list, tuple)) or not all(isinstance(row, dict) for row in rows):
        raise TypeError(f"run must return a dict of metrics, a list of them, or a DataFrame; got {metrics!r}")
    return [{str(name): plain(value, f"metric {name!r}", finite=False) for name, value in row.items()} for row in rows]
