"""One run of a sweep, wherever it happens: here, in another process or on another machine."""

import functools
import platform
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from .._torch import precisions_noted
from .provenance import versions
from .store import Nowhere, Record, Store, decoded, encoded, rows_of


@dataclass(frozen=True)
class Outcome:
    """What came of a config: its record, or the reason why there is none."""

    record: Record | None = None
    claimed: bool = False  # somebody else is doing the run
    error: str | None = None  # its worker died

    @property
    def status(self) -> str:
        """What the sweep's table says: "done", "failed" or "missing"."""
        return self.record["status"] if self.record else "missing"


@dataclass(frozen=True)
class Deadline:
    """A point in time that other processes understand.

    The monotonic clock of a machine is the same for all its processes, and nobody sets it. Another machine has another
    one, so there the calendar counts.
    """

    monotonic: float
    calendar: float
    machine: str

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        """Return the deadline that is so many seconds from now."""
        return cls(time.monotonic() + seconds, time.time() + seconds, _machine())

    def passed(self) -> bool:
        """Tell whether it is too late."""
        if self.machine == _machine():
            return time.monotonic() > self.monotonic
        return time.time() > self.calendar


@functools.cache
def _machine() -> str:
    """Return a name of this machine since it was started."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text() if boot.exists() else platform.node()


@dataclass(frozen=True)
class Job:
    """What the runs of a sweep have in common."""

    run: Callable
    store: Store | Nowhere
    deadline: Deadline
    threads: int | None
    code: str
    commit: str | None


_TURN = threading.RLock()  # the random state is the process's, so its runs take turns


def attempt(job: Job, key: str, config: dict, replaces: str | None, _nonce: int | None = None) -> Outcome:
    """Do one run and record it, unless it is claimed, too late, or was done meanwhile.

    `replaces` is the time of the record that this run replaces, None if there was none.
    """
    with _TURN:
        if job.deadline.passed():
            return Outcome()
        with job.store.claim(key) as write:
            if write is None:
                return Outcome(claimed=True)
            current = job.store.read(key)
            if current is not None and current["time"] != replaces:
                return Outcome(current)
            record = _record(job, config)
            write(record)
            return Outcome(record)


def _record(job, config) -> Record:
    """Call run and describe what came of it; through JSON, so that a fresh record equals a stored one."""
    started, clock, before = datetime.now(UTC), time.perf_counter(), torch.get_num_threads()
    threads = job.threads or before
    outcome = {"metrics": [], "error": None, "traceback": None}
    with precisions_noted() as precisions:
        try:
            if threads != before:
                torch.set_num_threads(threads)
            outcome |= {"status": "done", "metrics": rows_of(job.run(**config))}
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            outcome |= {"status": "failed", "error": told, "traceback": traceback.format_exc()}
        finally:
            if threads != before:
                torch.set_num_threads(before)
    facts = {
        "seconds": time.perf_counter() - clock,
        "time": started.isoformat(timespec="milliseconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_initialized() else f"cpu {platform.machine()}",
        "threads": threads,
        "precision": ", ".join(sorted(precisions)) or None,
        "code": job.code,
        "commit": job.commit,
        **versions(),
    }
    return decoded(encoded({"config": config, **outcome, **facts}))
