"""Experiments: a grid times seeds becomes one tidy table, resumable, on one core or a cluster.

What is kept of a run, and how sweeps that share a store share the work, is in `store`.
"""

import inspect
import itertools
import json
import math
import os
import platform
import tempfile
import time
import traceback
import warnings
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import filelock
import pandas as pd
import torch
from joblib import cpu_count
from loky import get_reusable_executor
from tqdm.auto import tqdm

from .store import check_store, claim, claimed, code_version, git_commit, key_of, plain, read, rows_of, versions, write

_FACTS = ("error", "seconds", "time", "device", "threads", "code", "commit", "python", "torch", "numpy", "pruneutils")
BOOKKEEPING = tuple(f"run_{fact}" for fact in _FACTS)
_POLL_SECONDS = 0.02
_WORTH_PROCESSES = 20  # seconds of work that make up for starting them


def sweep(
    run, grid, store=None, executor=None, *, budget_seconds=None, retry_failed=False, threads=1, progress=True
) -> pd.DataFrame:
    """Run every config of a grid that the store does not hold yet, and return one tidy table in grid order.

    run: `run(**config)` returns {metric: value}, or several rows (a list of such dicts, a DataFrame) for a curve.
    grid: {name: value or list of values}, crossed; or a list of configs, so grids add with +. Equal configs run once.
    store: a folder, made if missing; None keeps the records in memory.
    executor: None runs here, one after the other; `processes()`, Dask's `client.get_executor()`, submitit's, or any
        other concurrent.futures executor. On a cluster give a store that all machines see. "auto" does the first run
        here, and takes `processes()` for the others if these are several and, by its time, there are more than 20
        seconds of work left.
    budget_seconds: no run starts later than this; those under way finish.
    retry_failed: run again what failed before.
    threads: torch threads of every run, everywhere, so that neither speed nor rounding depends on the executor;
        None leaves them alone.

    Columns: the config, the metrics (`x_measured` where config has an x too), status ("done", "failed", "missing"),
    then BOOKKEEPING. A run that raised is recorded with its traceback, stays in the table without metrics, and warns.
    `run_code` hashes the source of `run`, of the functions of its module that it reaches, and the constants they read:
    stored runs of another code are kept, and warned about. Raises ValueError or TypeError for a grid that does not fit,
    OSError for a store that cannot be written, both before the first run.
    """
    configs = _configs(run, grid)
    store = None if store is None else Path(store).resolve()
    records = {key: record for key in configs if store and (record := read(store, key))}
    again = ("failed",) if retry_failed else ()
    # What is to do, with the failed record that it replaces, if any.
    todo = {key: records.get(key) for key in configs if key not in records or records[key]["status"] in again}
    if todo and store:
        check_store(store, len(todo))
    deadline = math.inf if budget_seconds is None else time.time() + budget_seconds
    job = _Job(run, store, deadline, threads, code_version(run), git_commit())

    hidden = not progress or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")  # notebooks' bars do not ask for it
    done, title = len(configs) - len(todo), store.name if store else "sweep"
    with tqdm(total=len(configs), initial=done, desc=title, disable=hidden) as bar:
        while todo:
            ready = [key for key in todo if not claimed(store, key)]
            if not ready and time.time() < deadline:
                time.sleep(_POLL_SECONDS)  # all that is left is under way in other sweeps
                continue
            tasks = [(key, configs[key], todo[key]) for key in ready or todo]
            with closing(_results(job, None if executor == "auto" else executor, tasks)) as results:
                for key, record in results:
                    if record["status"] == "claimed":
                        continue
                    old = todo.pop(key)
                    if record["status"] == "missing":
                        records[key] = old or record
                        continue
                    if not record.pop("written", True):
                        write(store, key, record)
                    records[key] = record
                    bar.update()
                    if executor == "auto":
                        pays = (len(_cards()) or cpu_count()) > 1 and record["seconds"] * len(todo) > _WORTH_PROCESSES
                        executor = processes() if pays else None
                        break
    _warn(configs, records, job)
    return _table(configs, records)


def load(store) -> pd.DataFrame:
    """Every run recorded in a store, as `sweep` returns it, in the order of their start; ValueError without any."""
    records = {path.stem: read(path.parent, path.stem) for path in sorted(Path(store).glob("*.json"))}
    if not records:
        raise ValueError(f"no recorded runs in {store}")
    records = dict(sorted(records.items(), key=lambda item: item[1]["time"]))
    return _table({key: record["config"] for key, record in records.items()}, records)


def processes(n=None):
    """An executor of n processes on this machine, one thread each: by default one a core or, with CUDA, one a card.

    Functions defined in a notebook work. What `run` refers to outside itself travels with every run: load data inside.
    """
    cards = _cards()
    n = n or len(cards) or cpu_count()
    return get_reusable_executor(
        max_workers=n,
        timeout=60,
        # Set before torch is imported: its thread pools are sized once.
        env={name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")},
        initializer=_take_card if cards else None,
        initargs=(cards, n, os.getpid()) if cards else (),
    )


def _cards():
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if not torch.cuda.is_available():
        return []
    return (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))).split(",")


def _take_card(cards, n, owner):
    """In a new worker: take the first free of n slots, for as long as this process lives, and see only its card."""
    for slot in range(n):
        lock = filelock.FileLock(Path(tempfile.gettempdir()) / f"pruneutils-{owner}-{slot}.lock")
        with suppress(filelock.Timeout):
            lock.acquire(blocking=False)
            _take_card.lock = lock
            os.environ["CUDA_VISIBLE_DEVICES"] = cards[slot % len(cards)]
            return
    raise RuntimeError(f"all {n} worker slots of process {owner} are taken")


# ---------------------------------------------------------------- configs


def _configs(run, grid):
    """{key: config} in grid order, each checked to be nameable and to fit the signature of run."""
    if isinstance(grid, dict):
        axes = {name: _axis(name, values) for name, values in grid.items()}
        grid = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if not isinstance(grid, (list, tuple)) or not grid or not all(isinstance(config, dict) for config in grid):
        raise ValueError(f"grid must be a dict of lists or a list of configs (dicts), not empty; got {grid!r}")
    reserved = ("status", *BOOKKEEPING)
    for name in dict.fromkeys(itertools.chain(*grid)):
        if not isinstance(name, str) or name in reserved:
            raise ValueError(f"grid key {name!r} must be a string other than {', '.join(reserved)}")
    configs = [{name: plain(value, f"grid key {name!r}") for name, value in config.items()} for config in grid]
    signature = inspect.signature(run)
    for config in configs:
        try:
            signature.bind(**config)
        except TypeError as error:
            raise TypeError(f"run{signature} does not take the config {config}: {error}") from None
    return {key_of(config): config for config in configs}


def _axis(name, values):
    if isinstance(values, (str, dict)) or not hasattr(values, "__iter__") or getattr(values, "ndim", 1) == 0:
        return [values]
    values = list(values)
    if not values:
        raise ValueError(f"grid key {name!r} has no values")
    return values


# ---------------------------------------------------------------- one run


@dataclass(frozen=True)
class _Job:
    """What the runs of a sweep have in common."""

    run: object
    store: Path | None
    deadline: float
    threads: int | None
    code: str
    commit: str | None


def _results(job, executor, tasks):
    """Yield (key, record) as runs end."""
    if executor is None:
        for key, config, old in tasks:
            yield key, _attempt(job, key, config, old)
        return
    # The last argument makes each call unique: Dask answers equal calls from memory.
    futures = {executor.submit(_attempt, job, *task, time.time_ns()): task[0] for task in tasks}
    try:
        while futures:
            # Polled, because submitit's jobs cannot be waited for with concurrent.futures.
            ended = [future for future in futures if future.done()]
            for future in ended:
                key = futures.pop(future)
                try:
                    record = future.result()
                except Exception as error:  # not the run's own, that is in its record: its worker died
                    record = {"status": "missing", "error": f"{type(error).__name__}: {error}"}
                yield key, record
            if not ended:
                time.sleep(_POLL_SECONDS)
    finally:
        for future in futures:
            future.cancel()


def _attempt(job, key, config, old, _nonce=None):
    """Do one run where this is called and record it, unless it is claimed, too late, or was done meanwhile."""
    if time.time() > job.deadline:
        return {"status": "missing"}
    if job.store is None or not job.store.is_dir():
        return _record(job, config) | {"written": job.store is None}
    with claim(job.store, key) as lock:
        if lock is None:
            return {"status": "claimed"}
        current = read(job.store, key)
        if current != old:
            return current
        record = _record(job, config)
        try:
            write(job.store, key, record)
        except OSError:
            return record | {"written": False}
        # Safe to remove: whoever opened the file before this sees the record once it gets the lock.
        with suppress(OSError):
            os.unlink(lock.lock_file)
        return record


def _record(job, config):
    """Call run and describe what came of it; through JSON, so that a fresh record equals a stored one."""
    started, clock, before = datetime.now(UTC), time.perf_counter(), torch.get_num_threads()
    threads = job.threads or before
    outcome = {"metrics": [], "error": None, "traceback": None}
    try:
        if threads != before:
            torch.set_num_threads(threads)
        outcome |= {"status": "done", "metrics": rows_of(job.run(**config))}
    except Exception as error:
        outcome |= {
            "status": "failed",
            "error": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc(),
        }
    finally:
        if threads != before:
            torch.set_num_threads(before)
    facts = {
        "seconds": time.perf_counter() - clock,
        "time": started.isoformat(timespec="milliseconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_initialized() else f"cpu {platform.machine()}",
        "threads": threads,
        "code": job.code,
        "commit": job.commit,
        **versions(),
    }
    return json.loads(json.dumps({"config": config, **outcome, **facts}))


# ---------------------------------------------------------------- the table


def _table(configs, records):
    rows = []
    for key, config in configs.items():
        record = records[key]
        facts = {"status": record["status"], **{f"run_{fact}": record.get(fact) for fact in _FACTS}}
        rows += [(config, metrics, facts) for metrics in record.get("metrics") or [{}]]
    names = dict.fromkeys(name for config in configs.values() for name in config)
    taken = {*names, "status", *BOOKKEEPING}
    titles = {name: f"{name}_measured" if name in taken else name for _, metrics, _ in rows for name in metrics}
    table = [
        {**config, **{titles[name]: metrics[name] for name in metrics}, **facts} for config, metrics, facts in rows
    ]
    table = [{name: _cell(value) for name, value in row.items()} for row in table]
    return pd.DataFrame(table, columns=[*names, *titles.values(), "status", *BOOKKEEPING])


def _cell(value):
    """Lists and dicts as text, so that they can be grouped by."""
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def _warn(configs, records, job):
    """One warning for each thing that a reader of the table must know."""
    advice = {
        "failed": f"failed; tracebacks are in the records{f' in {job.store}' if job.store else ''}, "
        "retry_failed=True runs them again",
        "missing": "are missing, as the budget ended or their worker died; call again to go on",
        "other": f"were done by other code than the present {job.code}, see column run_code; "
        "remove their files to run them again",
    }
    for what, text in advice.items():
        found = [key for key, record in records.items() if what == record["status"]]
        if what == "other":
            found = [key for key, record in records.items() if record.get("code", job.code) != job.code]
        if found:
            reason = f": {error}" if (error := records[found[0]].get("error")) else ""
            told = f"{len(found)} of {len(configs)} runs {text}; one of them is {configs[found[0]]}{reason}"
            warnings.warn(told, stacklevel=3)
