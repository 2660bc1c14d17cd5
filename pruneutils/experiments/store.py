"""What is kept of each run: its record on disk, under the name of its config, and the code and versions that made it.

A store is a folder with one small JSON file for each finished run, named by the hash of its config. Whoever does a run
holds a lock on `.claims/<hash>` meanwhile, which the kernel releases however that process ends: sweeps that share a
store share the work, and no claim goes stale. On a network file system this needs locks that hold across machines
(NFSv4 has them). Workers that do not see the folder hand their records back to the sweep, which writes them.
"""

import functools
import hashlib
import inspect
import json
import math
import os
import platform
import subprocess
from contextlib import contextmanager, suppress
from importlib.metadata import version

import filelock
import numpy as np
import pandas as pd
import torch

# ---------------------------------------------------------------- records and claims


def check_store(store, runs):
    """Make the folder and write, then remove, as much as the records will need."""
    probe = store / f".probe-{os.getpid()}"
    try:
        (store / ".claims").mkdir(parents=True, exist_ok=True)
        try:
            with open(probe, "wb") as file:
                file.write(bytes(4096 * runs))
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write {runs} records into the store {store} ({error.strerror}); nothing was run"
        ) from error


@contextmanager
def claim(store, key):
    """Within the block nobody else does this run; gives the lock, or None if somebody else holds it."""
    lock = filelock.FileLock(store / ".claims" / key)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        yield None
        return
    try:
        yield lock
    finally:
        lock.release()


def claimed(store, key):
    """Whether another process is doing this run."""
    path = store / ".claims" / key if store else None
    if path is None or not path.exists():
        return False
    try:
        with filelock.FileLock(path).acquire(blocking=False):
            return False
    except filelock.Timeout:
        return True


def read(store, key):
    """The record of a run, None if there is none."""
    path = store / f"{key}.json"
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not a record ({error}); remove it to run its config again") from None


def write(store, key, record):
    """Write a record so that it is there whole or not at all."""
    path, temporary = store / f"{key}.json", store / f".{key}.tmp"
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in record.items())
    try:
        with open(temporary, "w") as file:
            file.write("{\n" + ",\n".join(lines) + "\n}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        told = f"cannot write into the store {store} any more ({error.strerror}), so the sweep stops; not recorded: "
        raise OSError(error.errno, f"{told}{record['config']} gave {record['metrics'] or record['error']}") from error


# ---------------------------------------------------------------- names and values


def key_of(config):
    """The name of a config: the same for configs that Python calls equal (1 and 1.0), whatever the order of keys."""

    def number(text):
        return int(float(text)) if float(text).is_integer() else float(text)

    canonical = json.dumps(json.loads(json.dumps(config), parse_float=number), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:20]


def plain(value, where, finite=True):
    """The value in JSON's types; numpy scalars and 0-d tensors become Python numbers, tuples lists."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
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


def rows_of(metrics):
    """The rows of a run's metrics, each checked to be plain values."""
    if isinstance(metrics, pd.DataFrame):
        metrics = metrics.to_dict("records")
    rows = [metrics] if isinstance(metrics, dict) else metrics
    if not isinstance(rows, (list, tuple)) or not all(isinstance(row, dict) for row in rows):
        raise TypeError(f"run must return a dict of metrics, a list of them, or a DataFrame; got {metrics!r}")
    return [{str(name): plain(value, f"metric {name!r}", finite=False) for name, value in row.items()} for row in rows]


# ---------------------------------------------------------------- provenance


def versions():
    """The versions that decide a run's numbers."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pruneutils": _package_version(),
    }


_package_version = functools.cache(lambda: version("pruneutils"))


def git_commit():
    """The commit of the working tree, with -dirty if it differs; None outside of a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def code_version(run):
    """Hash of what `run` does, as far as its own module or notebook says: sources and constants; "unknown" without."""
    parts, seen, queue = [], set(), [run]
    while queue:
        thing = queue.pop()
        if isinstance(thing, functools.partial):
            parts.append(json.dumps([thing.args, thing.keywords], sort_keys=True, default=lambda x: type(x).__name__))
            thing = thing.func
        thing = inspect.unwrap(thing)
        if not (inspect.isroutine(thing) or inspect.isclass(thing)):
            thing = type(thing)
        if thing in seen:
            continue
        seen.add(thing)
        try:
            parts.append(inspect.getsource(thing))
            reached = inspect.getclosurevars(thing) if inspect.isroutine(thing) else None
        except (OSError, TypeError, ValueError):
            return "unknown"
        for name, value in sorted({**reached.globals, **reached.nonlocals}.items()) if reached else ():
            if inspect.isfunction(value) or inspect.isclass(value):
                queue += [value] if value.__module__ == thing.__module__ else []
            else:
                with suppress(TypeError, ValueError):  # what JSON cannot say is not a constant
                    parts.append(f"{name}={json.dumps(value, sort_keys=True)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
