"""Sweeps: a grid times seeds becomes one tidy table, resumable, in one process or in many."""

import functools
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
from loky import ProcessPoolExecutor
from tqdm.auto import tqdm

from .running import attempt, code_facts, processes, results
from .store import NullStore, Store, key_of, plain

_FACTS = "error seconds time device threads precision code commit python torch numpy pruneutils".split()
BOOKKEEPING = tuple(f"run_{fact}" for fact in _FACTS)


def sweep(
    run: Callable[..., Any],
    grid: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    store: str | os.PathLike | None = None,
    executor: Executor | None = None,
    *,
    budget_seconds: float | None = None,
    threads: int | None = 1,
    progress: bool = True,
) -> pd.DataFrame:
    """Run every config of a grid that the store does not hold yet, and return one tidy table in grid order.

    A run that raises is recorded with its traceback, and warns. A record belongs to its config, whatever code made it.
    Sweeps that share a store share the work. After an interruption, call again to go on.

    Args:
        run: `run(**config)` returns {metric: value}, or a list of such rows, or a DataFrame; values as JSON's.
        grid: {name: value or list of values}, crossed; or a list of configs, so grids add with +.
        store: The folder that keeps a record of each run, made if it is missing; None keeps the runs in memory.
        executor: None runs here, or in `processes()` if PRUNEUTILS_PROCESSES says how many and the runs are kept;
            otherwise an executor as those of concurrent.futures.
        budget_seconds: No run starts later than this; those under way finish.
        threads: The torch threads of every run, whatever the executor; None leaves them alone.
        progress: Whether to show a progress bar.

    Returns:
        A row for each run, or each row of it: the config, the metrics (`x_measured` where the config has an x, too),
        status ("done", "failed" or "missing"), then the columns BOOKKEEPING.

    Raises:
        ValueError, TypeError: If grid and `run` do not fit, or a record is damaged; before the first run.
        OSError: If the store cannot be written; before the first run, or when a disk fills up.

    Example:
        >>> def run(method, seed):
        ...     return {"accuracy": 0.5 + seed / 10}
        >>> pu.experiments.sweep(run, {"method": "snip", "seed": [0, 1]}, progress=False).iloc[:, :4]
          method  seed  accuracy status
        0   snip     0       0.5   done
        1   snip     1       0.6   done
    """
    configs = _configs(run, grid)
    if executor is None and store is not None and os.environ.get("PRUNEUTILS_PROCESSES"):
        executor = processes()
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise TypeError(f"executor must be None or one such as experiments.processes(), not {executor!r}")
    kept = NullStore() if store is None else Store(store)
    records = {key: record for key in configs if (record := kept.read(key))}
    deaths = {}  # why a worker died, where it left no record
    todo = {key: config for key, config in configs.items() if key not in records}
    if todo:
        kept.prepare()
    deadline = math.inf if budget_seconds is None else time.time() + budget_seconds
    do = functools.partial(attempt, run, kept, deadline, threads, code_facts(run) if todo else {})

    hidden = not progress or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")  # notebooks' bars do not ask for it
    with tqdm(total=len(configs), initial=len(configs) - len(todo), desc=kept.name, disable=hidden) as bar:
        try:
            while todo and time.time() <= deadline:
                with closing(results(do, executor, dict(todo))) as ended:
                    for key, record, death in ended:
                        if not record and not death:
                            time.sleep(0.1 / len(todo))  # it is under way in another sweep
                            continue
                        del todo[key]
                        bar.update(bool(record))
                        if death:
                            deaths[key] = death
                        else:
                            records[key] = record
        except (KeyboardInterrupt, SystemExit):
            if isinstance(executor, ProcessPoolExecutor):  # ends the runs under way, too
                executor.shutdown(kill_workers=True)
            raise
    _warn(configs, records, deaths, kept.folder)
    return _table(configs, records, deaths)


def load(store: str | os.PathLike) -> pd.DataFrame:
    """Read every run that a store holds.

    Args:
        store: The folder that was given to `sweep`; ValueError if it has no runs, or a file is not a record.

    Returns:
        The table that `sweep` returns, in the order in which the runs started.

    Example:
        >>> _ = pu.experiments.sweep(lambda seed: {"accuracy": seed / 10}, {"seed": [3, 4]}, "runs", progress=False)
        >>> pu.experiments.load("runs")["accuracy"].tolist()
        [0.3, 0.4]
    """
    kept = Store(store)
    records = {path.stem: kept.read(path.stem) for path in sorted(kept.folder.glob("*.json"))}
    if not records:
        raise ValueError(f"no recorded runs in {store}")
    records = dict(sorted(records.items(), key=lambda item: item[1]["time"]))
    return _table({key: record["config"] for key, record in records.items()}, records, {})


def _configs(run, grid):
    """Return {key: config} in grid order, each checked to be nameable and to fit the signature of run."""
    if isinstance(grid, Mapping):
        axes = {name: _axis(values) for name, values in grid.items()}
        grid = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if not isinstance(grid, (list, tuple)) or not grid or not all(isinstance(config, dict) for config in grid):
        raise ValueError(f"grid must be a dict of lists or a list of configs (dicts), not empty; got {grid!r}")
    for name in itertools.chain(*grid):
        if not isinstance(name, str) or name in ("status", *BOOKKEEPING):
            raise ValueError(f"grid key {name!r} must be a string other than status, {', '.join(BOOKKEEPING)}")
    configs = [{name: plain(value, f"grid key {name!r}") for name, value in config.items()} for config in grid]
    signature = inspect.signature(run)
    for config in configs:
        try:
            signature.bind(**config)
        except TypeError as error:
            raise TypeError(f"run{signature} does not take the config {config}: {error}") from None
    return {key_of(config): config for config in configs}


def _axis(values):
    """Return the values of one grid key as a list."""
    if isinstance(values, (str, dict)) or not hasattr(values, "__iter__") or getattr(values, "ndim", 1) == 0:
        return [values]
    return list(values)


def _table(configs, records, deaths):
    """Return one row for each row of metrics."""
    rows = []
    for key, config in configs.items():
        record = records.get(key, {"status": "missing", "error": deaths.get(key)})
        facts = {"status": record["status"], **{f"run_{fact}": record.get(fact) for fact in _FACTS}}
        rows += [(config, metrics, facts) for metrics in record.get("metrics") or [{}]]
    names = dict.fromkeys(name for config in configs.values() for name in config)
    taken, titles = {*names, "status", *BOOKKEEPING}, {}
    for name in dict.fromkeys(name for _, metrics, _ in rows for name in metrics):
        titles[name] = name
        while titles[name] in taken:
            titles[name] += "_measured"
        taken.add(titles[name])
    table = []
    for config, metrics, facts in rows:
        row = config | {titles[name]: value for name, value in metrics.items()} | facts
        # Lists and dicts become text, so that they can be grouped by.
        table.append({name: json.dumps(v) if isinstance(v, (list, dict)) else v for name, v in row.items()})
    return pd.DataFrame(table, columns=[*names, *titles.values(), "status", *BOOKKEEPING])


def _warn(configs, records, deaths, folder):
    """Warn once of runs that failed, and once of runs that are missing."""
    failed = {key: record["error"] for key, record in records.items() if record["status"] == "failed"}
    missing = {key: deaths.get(key) for key in configs if key not in records}
    texts = (
        f"failed; tracebacks are in the records of {folder}, remove these to run them again",
        "are missing, as the budget ended or their worker died; call again to go on",
    )
    for runs, what in zip((failed, missing), texts):
        for key in list(runs)[:1]:
            message = f"{len(runs)} of {len(configs)} runs {what}; one of them is {configs[key]}"
            warnings.warn(f"{message}: {runs[key]}" if runs[key] else message, stacklevel=3)
