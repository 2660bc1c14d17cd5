"""Who does the runs of a sweep: processes on this machine, or an executor of the user's."""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import filelock
import torch
from loky import ProcessPoolExecutor, cpu_count, get_reusable_executor

from .._checks import whole
from .running import Job, Outcome, attempt
from .store import StoreError

_POLL_SECONDS = 0.02


def processes(n: int | None = None) -> Executor:
    """Return an executor of n processes on this machine, each with one thread, for `sweep`.

    Functions defined in a notebook work. What a run refers to outside of itself travels with every run, so load data
    inside. The processes end a minute after their last run, with this process however it ends, and when a sweep of
    theirs is interrupted.

    Args:
        n: The number of processes. By default one for each core or, with CUDA, one for each card; the environment
            variable PRUNEUTILS_PROCESSES names another number. A process sees only its own card. Small networks leave
            most of a card idle, so several processes may share one.

    Returns:
        An executor as those of concurrent.futures (loky's).

    Raises:
        ValueError: If `n` is no whole number of at least 1.

    Example:
        >>> executor = pu.experiments.processes(2)
        >>> callable(executor.submit)  # pu.experiments.sweep(run, grid, store, executor) takes it
        True
    """
    cards = visible_cards()
    n = whole("n", n) if n is not None else usual()
    return get_reusable_executor(
        max_workers=n,
        timeout=60,
        # Set before torch is imported: its thread pools are sized once.
        env={name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")},
        initializer=_begin_worker,
        initargs=(os.getpid(), n, cards),
    )


def usual() -> int:
    """Return how many processes `processes()` makes when it is not told."""
    asked = os.environ.get("PRUNEUTILS_PROCESSES", "").strip()
    if not asked:
        return len(visible_cards()) or cpu_count()
    return whole("PRUNEUTILS_PROCESSES", int(asked) if asked.isdecimal() else asked)


def visible_cards() -> list[str]:
    """Return the CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if not torch.cuda.is_available():
        return []
    return (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))).split(",")


def _begin_worker(owner: int, n: int, cards: list[str]) -> None:
    """Begin a worker of the process `owner`: take a card if there are any, and end when the owner does."""
    slot = _take_card(owner, n, cards) if cards else None
    threading.Thread(target=_end_with, args=(owner, slot), daemon=True).start()


def _take_card(owner: int, n: int, cards: list[str]) -> filelock.FileLock:
    """Take the first free of n slots, see only its card, and return the slot's lock."""
    for slot in range(n):
        lock = filelock.FileLock(Path(tempfile.gettempdir()) / f"pruneutils-{owner}-{slot}.lock")
        with suppress(filelock.Timeout):
            lock.acquire(blocking=False)
            os.environ["CUDA_VISIBLE_DEVICES"] = cards[slot % len(cards)]
            return lock
    raise RuntimeError(f"all {n} worker slots of process {owner} are taken")


def _end_with(owner: int, _slot: filelock.FileLock | None) -> None:
    """Wait until the owner is gone, killed or not, and end with it; the slot's lock is held meanwhile."""
    while os.getppid() == owner:
        time.sleep(0.5)
    os._exit(1)


def check(executor: object) -> None:
    """Check that an executor can do runs, and does them in processes of their own: TypeError or ValueError."""
    if executor is None or executor == "auto":
        return
    if not callable(getattr(executor, "submit", None)):
        raise TypeError(
            "executor must be None, 'auto' or an executor as those of concurrent.futures, such as "
            f"experiments.processes(), not {executor!r}"
        )
    shared = "runs side by side in one process would share its random state and spoil each other's numbers"
    if isinstance(executor, ThreadPoolExecutor):
        raise ValueError(f"executor is a {type(executor).__name__}, but {shared}; take experiments.processes()")
    if type(executor).__module__.startswith("distributed."):
        for address, threads in executor._client.nthreads().items():
            if threads > 1:
                raise ValueError(
                    f"Dask's worker {address} has {threads} threads, but {shared}; start the workers with one thread "
                    "each (threads_per_worker=1, or --nthreads 1)"
                )


def results(job: Job, executor: Executor | None, tasks: list[tuple]) -> Iterator[tuple[str, Outcome]]:
    """Yield (key, outcome) as runs end; a task is (key, config, time of the record that it replaces)."""
    if executor is None:
        for task in tasks:
            yield task[0], attempt(job, *task)
        return
    # The last argument makes each call unique: Dask answers equal calls from memory.
    futures = {executor.submit(attempt, job, *task, time.time_ns()): task[0] for task in tasks}
    try:
        while futures:
            # Polled, because submitit's jobs cannot be waited for with concurrent.futures.
            ended = [future for future in futures if future.done()]
            for future in ended:
                key = futures.pop(future)
                try:
                    outcome = future.result()
                except StoreError:
                    raise
                except Exception as error:  # not the run's own, that is in its record: its worker died
                    outcome = Outcome(error=f"{type(error).__name__}: {error}")
                yield key, outcome
            time.sleep(_POLL_SECONDS)  # also after some have ended: to look through all of them takes time from theirs
    finally:
        for future in futures:
            future.cancel()


def end(executor: object) -> None:
    """End the workers of `processes()`, runs under way included."""
    if isinstance(executor, ProcessPoolExecutor):
        executor.shutdown(kill_workers=True)
