"""One run of a sweep, wherever it happens, and who does it: this process, others, or an executor of the user's."""

import copy
import functools
import hashlib
import inspect
import json
import multiprocessing
import os
import platform
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, as_completed
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import loky
import numpy as np
import torch

from .._checks import whole
from .._torch import precisions_noted
from .store import NullStore, Record, Store, encoded, rows_of

_package_version = functools.cache(lambda: version("pruneutils"))
_TURN = threading.RLock()  # the random state is the process's, so its runs take turns


def attempt(
    run: Callable, store: Store | NullStore, deadline: float, threads: int | None, facts: dict, key: str, config: dict
) -> Record | None:
    """Return the record of a run, done now or meanwhile by others; None if it is too late or others are doing it."""
    with _TURN:
        if time.time() > deadline:  # the calendar, because other processes and machines share it
            return None
        with store.claim(key) as claimed:
            if not claimed:
                return None
            record = store.read(key)
            if record is None:
                record = _record(run, threads, facts, config)
                store.write(key, record)
            return record


def _record(run, threads, facts, config) -> Record:
    """Call run and describe what came of it; through JSON, so that a fresh record equals a stored one."""
    started, clock, before = datetime.now(UTC), time.perf_counter(), torch.get_num_threads()
    outcome = {"metrics": [], "error": None, "traceback": None}
    torch.set_num_threads(threads or before)
    with precisions_noted() as precisions:
        try:
            # A copy, because a run may change lists of its config, and the record has to fit its name.
            outcome |= {"status": "done", "metrics": rows_of(run(**copy.deepcopy(config)))}
        except Exception as error:
            outcome |= {"status": "failed", "error": _described(error), "traceback": traceback.format_exc()}
        finally:
            torch.set_num_threads(before)
    facts = {
        "seconds": time.perf_counter() - clock,
        "time": started.isoformat(timespec="milliseconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_initialized() else f"cpu {platform.machine()}",
        "threads": threads or before,
        "precision": ", ".join(sorted(precisions)) or None,
        **facts,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pruneutils": _package_version(),
    }
    return json.loads(encoded({"config": config, **outcome, **facts}))


def _described(error) -> str:
    return "".join(traceback.format_exception_only(error)).strip()  # also if its own text raises


def code_facts(run: Callable) -> dict[str, str | None]:
    """Return a hash of the source of `run`, and the commit of the working directory or else of this package."""
    facts = {"code": None, "commit": None}
    with suppress(OSError, TypeError):  # no source is known, or it is no function
        facts["code"] = hashlib.sha256(inspect.getsource(inspect.unwrap(run)).encode()).hexdigest()[:12]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    for folder in (Path(__file__).parent, Path.cwd()):
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=10)
            facts["commit"] = done.stdout.strip()
    return facts


def results(
    attempt: Callable, executor: Executor | None, configs: dict[str, dict]
) -> Iterator[tuple[str, Record | None, str | None]]:
    """Yield (key, record, error) as runs end; an error, where a worker died, is not the run's own."""
    if executor is None:
        for key, config in configs.items():
            yield key, attempt(key, config), None
        return
    futures = {executor.submit(attempt, key, config): key for key, config in configs.items()}
    try:
        for future in as_completed(futures):
            try:
                yield futures[future], future.result(), None
            except OSError:  # the store's
                raise
            except Exception as error:
                yield futures[future], None, _described(error)
    finally:
        for future in futures:
            future.cancel()


def processes(n: int | None = None) -> Executor:
    """Return an executor of n processes on this machine, each with one thread, for `sweep`.

    What a run refers to outside of itself travels with every run, so load data inside. The processes end a minute after
    their last run, and with this process however it ends.

    Args:
        n: Their number; by default PRUNEUTILS_PROCESSES, else one for each core or, with CUDA, for each card. Each sees
            one card, which several may share.

    Returns:
        An executor as those of concurrent.futures (loky's); ValueError if `n` is no whole number of at least 1.

    Example:
        >>> callable(pu.experiments.processes(2).submit)  # pu.experiments.sweep(run, grid, store, executor) takes it
        True
    """
    if n is None:
        n = int(os.environ.get("PRUNEUTILS_PROCESSES") or len(_visible_cards()) or loky.cpu_count())
    return loky.get_reusable_executor(
        max_workers=whole("n", n),
        timeout=60,
        # Set before torch is imported: its thread pools are sized once.
        env={name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")},
        initializer=_begin_worker,
        initargs=(os.getpid(), _visible_cards()),
    )


def _visible_cards() -> list[str]:
    """Return the CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if not torch.cuda.is_available():
        return []
    return (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))).split(",")


def _begin_worker(owner: int, cards: list[str]) -> None:
    """Begin a worker of the process `owner`: see one card, if there are any, and end when the owner does."""
    if cards:
        number = int(multiprocessing.current_process().name.rpartition("-")[2])  # counts the owner's processes
        os.environ["CUDA_VISIBLE_DEVICES"] = cards[number % len(cards)]
    threading.Thread(target=_end_with, args=(owner,), daemon=True).start()


def _end_with(owner: int) -> None:
    while os.getppid() == owner:
        time.sleep(0.5)
    os._exit(1)
