"""Experiments: a grid times seeds becomes one tidy table, resumable, on one core or a cluster.

A store is a folder with one small JSON file for each finished run, named by the hash of its config. Whoever does a run
holds a lock on `.claims/<hash>` meanwhile, which the kernel releases however that process ends: sweeps that share a
store share the work, and no claim goes stale. On a network file system this needs locks that hold across machines
(NFSv4 has them). Workers that do not see the folder hand their records back to the sweep, which writes them.
"""

import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import platform
import subprocess
import tempfile
import time
import traceback
import warnings
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import filelock
import numpy as np
import pandas as pd
import torch
from joblib import cpu_count
from joblib.externals.loky import get_reusable_executor
from tqdm.auto import tqdm

_FACTS = ("error", "seconds", "time", "device", "threads", "code", "commit", "python", "torch", "numpy", "pruneutils")
BOOKKEEPING = tuple(f"run_{fact}" for fact in _FACTS)
_POLL_SECONDS = 0.02


def sweep(
    run, grid, store=None, executor=None, *, budget_seconds=None, retry_failed=False, threads=1, progress=True
) -> pd.DataFrame:
    """Run every config of a grid that the store does not hold yet, and return one tidy table in grid order.

    run: `run(**config)` returns {metric: value}, or several rows (a list of such dicts, a DataFrame) for a curve.
    grid: {name: value or list of values}, crossed; or a list of configs, so grids add with +. Equal configs run once.
    store: a folder, made if missing; None keeps the records in memory.
    executor: None runs here, one after the other; `processes()`, Dask's `client.get_executor()`, submitit's, or any
        other concurrent.futures executor. On a cluster give a store that all machines see.
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
    records = {key: record for key in configs if store and (record := _read(store, key))}
    again = ("failed",) if retry_failed else ()
    # What is to do, with the failed record that it replaces, if any.
    todo = {key: records.get(key) for key in configs if key not in records or records[key]["status"] in again}
    if todo and store:
        _check_store(store, len(todo))
    deadline = math.inf if budget_seconds is None else time.time() + budget_seconds
    job = _Job(run, store, deadline, threads, _code_version(run), _git_commit())

    switch = {} if progress else {"disable": True}  # absent, so that TQDM_DISABLE decides
    done, title = len(configs) - len(todo), store.name if store else "sweep"
    with tqdm(total=len(configs), initial=done, desc=title, **switch) as bar:
        while todo:
            ready = [key for key in todo if not _claimed(store, key)]
            if not ready and time.time() < deadline:
                time.sleep(_POLL_SECONDS)  # all that is left is under way in other sweeps
                continue
            with closing(_results(job, executor, [(key, configs[key], todo[key]) for key in ready or todo])) as results:
                for key, record in results:
                    if record["status"] == "claimed":
                        continue
                    old = todo.pop(key)
                    if record["status"] == "missing":
                        records[key] = old or record
                        continue
                    if not record.pop("written", True):
                        _write(store, key, record)
                    records[key] = record
                    bar.update()
    _warn(configs, records, job)
    return _table(configs, records)


def load(store) -> pd.DataFrame:
    """Every run recorded in a store, as `sweep` returns it, in the order of their start; ValueError without any."""
    records = {path.stem: _read(path.parent, path.stem) for path in sorted(Path(store).glob("*.json"))}
    if not records:
        raise ValueError(f"no recorded runs in {store}")
    records = dict(sorted(records.items(), key=lambda item: item[1]["time"]))
    return _table({key: record["config"] for key, record in records.items()}, records)


def processes(n=None):
    """An executor of n processes on this machine, one thread each: by default one a core or, with CUDA, one a card.

    Functions defined in a notebook work. What `run` refers to outside itself travels with every run: load data inside.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    cards = chosen.split(",") if torch.cuda.is_available() else []
    n = n or len(cards) or cpu_count()
    return get_reusable_executor(
        max_workers=n,
        timeout=60,
        # Set before torch is imported: its thread pools are sized once.
        env={name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")},
        initializer=_take_card if cards else None,
        initargs=(cards, n, os.getpid()) if cards else (),
    )


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
    configs = [{name: _plain(value, f"grid key {name!r}") for name, value in config.items()} for config in grid]
    signature = inspect.signature(run)
    for config in configs:
        try:
            signature.bind(**config)
        except TypeError as error:
            raise TypeError(f"run{signature} does not take the config {config}: {error}") from None
    return {_key(config): config for config in configs}


def _axis(name, values):
    if isinstance(values, (str, dict)) or not hasattr(values, "__iter__") or getattr(values, "ndim", 1) == 0:
        return [values]
    values = list(values)
    if not values:
        raise ValueError(f"grid key {name!r} has no values")
    return values


def _plain(value, where, finite=True):
    """The value in JSON's types; numpy scalars and 0-d tensors become Python numbers, tuples lists."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and finite and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: only finite numbers name a run")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, finite) for item in value]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: _plain(item, f"{where}[{name!r}]", finite) for name, item in value.items()}
    raise TypeError(
        f"{where} is {value!r} of type {type(value).__name__}: possible are numbers, strings, booleans, None, "
        "and lists or dicts (with string keys) of these"
    )


def _key(config):
    """The name of a config: the same for configs that Python calls equal (1 and 1.0), whatever the order of keys."""

    def number(text):
        return int(float(text)) if float(text).is_integer() else float(text)

    canonical = json.dumps(json.loads(json.dumps(config), parse_float=number), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:20]


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
    claim = filelock.FileLock(job.store / ".claims" / key)
    try:
        claim.acquire(blocking=False)
    except filelock.Timeout:
        return {"status": "claimed"}
    try:
        current = _read(job.store, key)
        if current != old:
            return current
        record = _record(job, config)
        try:
            _write(job.store, key, record)
        except OSError:
            return record | {"written": False}
        # Safe to remove: whoever opened the file before this sees the record once it gets the lock.
        with suppress(OSError):
            os.unlink(claim.lock_file)
        return record
    finally:
        claim.release()


def _record(job, config):
    """Call run and describe what came of it; through JSON, so that a fresh record equals a stored one."""
    started, clock, before = datetime.now(UTC), time.perf_counter(), torch.get_num_threads()
    threads = job.threads or before
    outcome = {"metrics": [], "error": None, "traceback": None}
    try:
        if threads != before:
            torch.set_num_threads(threads)
        outcome |= {"status": "done", "metrics": _rows(job.run(**config))}
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
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pruneutils": _package_version(),
    }
    return json.loads(json.dumps({"config": config, **outcome, **facts}))


def _rows(metrics):
    if isinstance(metrics, pd.DataFrame):
        metrics = metrics.to_dict("records")
    rows = [metrics] if isinstance(metrics, dict) else metrics
    if not isinstance(rows, (list, tuple)) or not all(isinstance(row, dict) for row in rows):
        raise TypeError(f"run must return a dict of metrics, a list of them, or a DataFrame; got {metrics!r}")
    return [{str(name): _plain(value, f"metric {name!r}", finite=False) for name, value in row.items()} for row in rows]


# ---------------------------------------------------------------- provenance


_package_version = functools.cache(lambda: version("pruneutils"))


def _git_commit():
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _code_version(run):
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


# ---------------------------------------------------------------- the store


def _check_store(store, runs):
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


def _claimed(store, key):
    path = store / ".claims" / key if store else None
    if path is None or not path.exists():
        return False
    try:
        with filelock.FileLock(path).acquire(blocking=False):
            return False
    except filelock.Timeout:
        return True


def _read(store, key):
    path = store / f"{key}.json"
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not a record ({error}); remove it to run its config again") from None


def _write(store, key, record):
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
