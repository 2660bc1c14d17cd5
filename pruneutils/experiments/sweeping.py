"""Experiments: a grid times seeds becomes one tidy table, resumable, on one core or a cluster.

What is kept of a run, and how sweeps that share a store share the work, is in `store`; who does the runs in `workers`;
what a run is in `running`.
"""

import inspect
import itertools
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from . import workers
from .provenance import code_version, git_commit
from .running import Deadline, Job, Outcome
from .store import Nowhere, Store, key_of, plain

_FACTS = (
    *("error", "seconds", "time", "device", "threads", "precision", "code", "commit"),
    *("python", "torch", "numpy", "pruneutils"),
)
BOOKKEEPING = tuple(f"run_{fact}" for fact in _FACTS)
_WORTH_PROCESSES = 20  # seconds of work that make up for starting them


def sweep(
    run: Callable[..., Any],
    grid: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    store: str | os.PathLike | None = None,
    executor: Executor | str | None = None,
    *,
    budget_seconds: float | None = None,
    retry_failed: bool = False,
    threads: int | None = 1,
    progress: bool = True,
) -> pd.DataFrame:
    """Run every config of a grid that the store does not hold yet, and return one tidy table in grid order.

    A run that raises is recorded with its traceback, stays in the table without metrics, and warns. Stored runs of
    other code are kept, and warned about. Sweeps that share a store share the work. An interrupted or killed sweep
    keeps its finished runs; call it again to go on.

    Args:
        run: `run(**config)` returns {metric: value}, or several rows (a list of such dicts, a DataFrame) for a curve.
            Values are numbers, strings, booleans or None, or lists, arrays and dicts of these.
        grid: {name: value or list of values}, crossed; or a list of configs, so grids add with +. Equal configs run
            once.
        store: The folder that keeps a record of each run, made if it is missing; None keeps the runs in memory. On a
            cluster, all machines have to see it.
        executor: None runs here, one after the other; `processes()`, Dask's `client.get_executor()`, submitit's, or any
            other concurrent.futures executor that does not run several threads in one process. "auto" does the first
            run here, and takes `processes()` for the others if these are several and, by its time, there are more than
            20 seconds of work left.
        budget_seconds: No run starts later than this; those under way finish.
        retry_failed: Whether to run again what failed before.
        threads: The torch threads of every run, everywhere, so that neither speed nor rounding depends on the executor;
            None leaves them alone.
        progress: Whether to show a progress bar.

    Returns:
        A row for each run (or for each of its rows): the config, the metrics (`x_measured` where the config has an x
        too), status ("done", "failed" or "missing"), then the columns BOOKKEEPING. `run_precision` tells in which
        precisions `fit` and `accuracy` computed, `run_code` is a hash of the source of `run`, of the functions of its
        module that it reaches, and of the constants that they read.

    Raises:
        ValueError: If the grid does not fit `run`, the executor would run threads, or the store holds a damaged record;
            before the first run.
        TypeError: If a config holds what cannot be named, or the executor is none; before the first run.
        OSError: If the store cannot be written; before the first run, or when a disk fills up.

    Example:
        >>> def run(method, seed):
        ...     return {"accuracy": 0.5 + seed / 10}
        >>> table = pu.experiments.sweep(run, {"method": ["snip", "grasp"], "seed": [0, 1]}, progress=False)
        >>> table[["method", "seed", "accuracy", "status"]]
          method  seed  accuracy status
        0   snip     0       0.5   done
        1   snip     1       0.6   done
        2  grasp     0       0.5   done
        3  grasp     1       0.6   done
    """
    configs = _configs(run, grid)
    workers.check(executor)
    if budget_seconds is not None and not budget_seconds >= 0:
        raise ValueError(f"budget_seconds must be a number of at least 0, not {budget_seconds!r}")
    kept = Nowhere() if store is None else Store(store)
    found = {key: record for key in configs if (record := kept.read(key))}
    outcomes = {key: Outcome(record) for key, record in found.items()}
    again = {"failed"} if retry_failed else set()
    todo = {key: None for key in configs if key not in found or found[key]["status"] in again}
    if todo:
        kept.prepare(len(todo))
    code, commit = code_version(run), git_commit(run) if todo else None
    deadline = Deadline.after(math.inf if budget_seconds is None else budget_seconds)
    job = Job(run, kept, deadline, threads, code, commit)

    hidden = not progress or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")  # notebooks' bars do not ask for it
    with tqdm(total=len(configs), initial=len(configs) - len(todo), desc=kept.name, disable=hidden) as bar:
        try:
            while todo and not deadline.passed():
                ready = [key for key in todo if not kept.claimed(key)]
                if not ready:
                    time.sleep(0.1)  # all that is left is under way in other sweeps
                    continue
                tasks = [(key, configs[key], found[key]["time"] if key in found else None) for key in ready]
                with closing(workers.results(job, None if executor == "auto" else executor, tasks)) as results:
                    for key, outcome in results:
                        if outcome.claimed:
                            continue
                        del todo[key]
                        if outcome.record or key not in found:
                            outcomes[key] = outcome
                        bar.update(bool(outcome.record))
                        if executor == "auto" and outcome.record:
                            pays = workers.usual() > 1 and outcome.record["seconds"] * len(todo) > _WORTH_PROCESSES
                            executor = workers.processes() if pays else None
                            break
        except (KeyboardInterrupt, SystemExit):
            workers.end(executor)
            raise
    outcomes |= {key: Outcome() for key in todo if key not in outcomes}
    _warn(configs, outcomes, code, kept.folder)
    return _table(configs, outcomes)


def load(store: str | os.PathLike) -> pd.DataFrame:
    """Read every run that a store holds.

    Args:
        store: The folder that was given to `sweep`.

    Returns:
        The table as `sweep` returns it, in the order in which the runs started.

    Raises:
        ValueError: If there are no runs, or a file is not a record.

    Example:
        >>> _ = pu.experiments.sweep(lambda seed: {"accuracy": seed / 10}, {"seed": [3, 4]}, "runs", progress=False)
        >>> pu.experiments.load("runs")[["seed", "accuracy"]]
           seed  accuracy
        0     3       0.3
        1     4       0.4
    """
    kept = Store(store)
    records = {key: kept.read(key) for key in kept.keys()}
    if not records:
        raise ValueError(f"no recorded runs in {store}")
    records = dict(sorted(records.items(), key=lambda item: item[1]["time"]))
    configs = {key: record["config"] for key, record in records.items()}
    return _table(configs, {key: Outcome(record) for key, record in records.items()})


# ---------------------------------------------------------------- configs


def _configs(run, grid):
    """Return {key: config} in grid order, each checked to be nameable and to fit the signature of run."""
    if isinstance(grid, Mapping):
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
    """Return the values of one grid key as a list."""
    if isinstance(values, (str, dict)) or not hasattr(values, "__iter__") or getattr(values, "ndim", 1) == 0:
        return [values]
    values = list(values)
    if not values:
        raise ValueError(f"grid key {name!r} has no values")
    return values


# ---------------------------------------------------------------- the table


def _table(configs, outcomes):
    """Return one row for each row of metrics."""
    rows = []
    for key, config in configs.items():
        outcome = outcomes[key]
        record = outcome.record or {"error": outcome.error}
        facts = {"status": outcome.status, **{f"run_{fact}": record.get(fact) for fact in _FACTS}}
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
    """Return lists and dicts as text, so that they can be grouped by."""
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def _warn(configs, outcomes, code, folder):
    """Warn once of each thing that a reader of the table must know."""
    failed = [key for key, outcome in outcomes.items() if outcome.status == "failed"]
    missing = [key for key, outcome in outcomes.items() if outcome.status == "missing"]
    other = [key for key, outcome in outcomes.items() if outcome.record and outcome.record.get("code", code) != code]
    where = f" in {folder}" if folder else ""
    for keys, told in (
        (failed, f"failed; tracebacks are in the records{where}, retry_failed=True runs them again"),
        (missing, "are missing, as the budget ended or their worker died; call again to go on"),
        (other, f"were done by other code than the present {code}, see column run_code; remove their files to run "
         "them again"),
    ):  # fmt: skip
        if keys:
            outcome = outcomes[keys[0]]
            error = outcome.record.get("error") if outcome.record else outcome.error
            reason = f": {error}" if error else ""
            told = f"{len(keys)} of {len(configs)} runs {told}; one of them is {configs[keys[0]]}{reason}"
            warnings.warn(told, stacklevel=3)
