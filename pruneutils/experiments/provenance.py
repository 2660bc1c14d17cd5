"""Where a run's numbers come from: the code, the commit and the versions that made them."""

import functools
import hashlib
import inspect
import json
import platform
import subprocess
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch


def versions() -> dict[str, str]:
    """Return the versions that decide a run's numbers."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pruneutils": _package_version(),
    }


_package_version = functools.cache(lambda: version("pruneutils"))


def git_commit(run: Callable) -> str | None:
    """Return the commit of the working tree that holds `run`, with -dirty if it differs; None outside of any.

    A notebook's functions lie in no file, so the working directory comes next, and this package last.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    for folder in (_folder_of(run), Path.cwd(), Path(__file__).parent):
        if folder and folder.is_dir():
            with suppress(OSError, subprocess.SubprocessError):
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=10)
                return done.stdout.strip()
    return None


def _folder_of(run) -> Path | None:
    try:
        return Path(inspect.getsourcefile(_function(run))).parent
    except TypeError:
        return None


def _function(thing):
    """Return what `thing` calls: without partials and wrappers; of an object with `__call__`, its class."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    thing = inspect.unwrap(thing)
    return thing if inspect.isroutine(thing) or inspect.isclass(thing) else type(thing)


def code_version(run: Callable) -> str:
    """Hash what `run` does, as far as its own module or notebook says: sources and constants; "unknown" without."""
    parts, seen, queue = [], set(), [run]
    while queue:
        thing = queue.pop()
        if isinstance(thing, functools.partial):
            parts.append(json.dumps([thing.args, thing.keywords], sort_keys=True, default=lambda x: type(x).__name__))
        thing = _function(thing)
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
