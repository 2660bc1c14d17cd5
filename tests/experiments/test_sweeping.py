"""Sweeps: the table, what is kept, and what happens to them in processes that are killed, interrupted or shared."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import loky
import numpy as np
import pandas as pd
import psutil
import pytest
import torch

import pruneutils as pu
from pruneutils.experiments import BOOKKEEPING, load, processes, sweep

ROOT = Path(__file__).parent.parent.parent
GRID = {"method": ["a", "b"], "sparsity": [0.5, 0.9], "seed": range(3)}


def run(method, sparsity, seed):
    return {"accuracy": 3 * sparsity + seed / 7 + (method == "b"), "nan": float("nan")}


def square(index):
    return {"square": index * index / 3}


def facts(frame):
    """Config, metrics and status: what may not depend on how the table came about."""
    return frame.drop(columns=list(BOOKKEEPING))


def script(body, store, *arguments):
    """Start a process that knows the sweep `work`, whose runs leave a line each in store.ran."""
    source = f"""
        import os, signal, sys, time
        from pruneutils.experiments import processes, sweep
        store, ran = {str(store)!r}, {str(store) + ".ran"!r}
        def run(index, seconds=0.1):
            with open(ran, "a") as file:
                file.write(f"{{index}}\\n")
            time.sleep(seconds)
            return {{"square": index * index / 3}}
        {body}
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(source), *arguments])


def ran(store):
    path = Path(f"{store}.ran")
    return sorted(int(line) for line in path.read_text().split()) if path.exists() else []


def test_the_table_is_in_grid_order_however_it_came_about(tmp_path):
    frame = sweep(run, GRID, tmp_path / "s")
    assert list(frame.columns) == ["method", "sparsity", "seed", "accuracy", "nan", "status", *BOOKKEEPING]
    expected = [(m, s, n, 3 * s + n / 7 + (m == "b")) for m in "ab" for s in (0.5, 0.9) for n in range(3)]
    assert list(frame[["method", "sparsity", "seed", "accuracy"]].itertuples(index=False, name=None)) == expected
    assert (frame["status"] == "done").all() and frame["run_torch"].iloc[0] == torch.__version__
    assert (frame["run_seconds"] >= 0).all() and frame["run_error"].isna().all()
    for other in (sweep(run, GRID), sweep(run, GRID, executor=processes(2))):
        pd.testing.assert_frame_equal(facts(other), facts(frame))
    stored = load(tmp_path / "s").sort_values(["method", "sparsity", "seed"], ignore_index=True)
    pd.testing.assert_frame_equal(stored, frame)


def test_only_what_is_missing_runs_whatever_code_made_the_rest(tmp_path):
    calls = []

    def counted(seed, rate=1.0):
        calls.append(seed)
        return {"accuracy": seed / 3}

    store = tmp_path / "deep" / "store"
    first = sweep(counted, {"seed": [0, 1]}, store)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = sweep(lambda seed: counted(seed), {"seed": [2, 0, 1]}, store)
    assert calls == [0, 1, 2] and both["seed"].tolist() == [2, 0, 1]
    pd.testing.assert_frame_equal(both.iloc[1:].reset_index(drop=True), first)
    assert both["run_code"].nunique() == 2, "a fact, not a part of the name"
    assert len(list(store.glob("*.json"))) == 3 and not list((store / ".claims").iterdir())


def test_grids_add_and_equal_configs_run_once():
    calls = []

    def counted(**config):
        calls.append(config)
        return {"accuracy": 1}

    grid = [{"seed": 0, "rate": 1}, {"rate": 1.0, "seed": np.int64(0)}] + [{"seed": 0, "widths": (300, 100)}]
    frame = sweep(counted, grid)
    assert calls == [{"seed": 0, "rate": 1}, {"seed": 0, "widths": [300, 100]}]
    assert frame["widths"].tolist()[1] == "[300, 100]" and np.isnan(frame["rate"][1])
    assert len(sweep(counted, {"seed": np.arange(3), "rate": np.float32(0.5), "name": "one", "flag": True})) == 3


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"model": [torch.nn.ReLU()]}, "grid key 'model' is ReLU"),
        ({"rate": [0.1, float("nan")]}, "grid key 'rate' is nan"),
        ({"nest": [{"a": {1, 2}}]}, r"grid key 'nest'\['a'\] is"),
        ({"status": [1]}, "'status'"),
        ([3], "list of configs"),
        ({"sed": [1]}, "{'sed': 1}"),
    ],
)
def test_grids_that_do_not_fit_fail_before_any_run(grid, message, tmp_path):
    def touch(seed=0, rate=0, model=None, nest=None, status=None):
        raise AssertionError("ran")

    with pytest.raises((TypeError, ValueError), match=message):
        sweep(touch, grid, tmp_path / "store")
    with pytest.raises(TypeError, match="executor must be .* not 'dask'"):
        sweep(touch, {"seed": [0]}, tmp_path / "store", "dask")
    assert not (tmp_path / "store").exists()


def test_several_rows_a_run(tmp_path):
    def curve(sparsity, seed):
        return pd.DataFrame({"epoch": [0, 1], "sparsity": np.float32([0.25, 0.5]), "loss": torch.tensor([2.0, 1.0])})

    for store in (tmp_path, tmp_path):  # computed, then read
        frame = sweep(curve, {"sparsity": 0.5, "seed": [0, 1]}, store)
        assert frame["epoch"].tolist() == [0, 1, 0, 1] and frame["seed"].tolist() == [0, 0, 1, 1]
        assert frame["sparsity"].tolist() == [0.5] * 4 and frame["sparsity_measured"].tolist() == [0.25, 0.5] * 2


def test_metrics_come_back_as_they_were(tmp_path):
    values = {"nan": math.nan, "inf": math.inf, "curve": [1.0, -math.inf], "hits": torch.tensor([True, False])}
    words = {"word": "NaN", "quoted": "''-Infinity", "seed": 5, "seed_measured": 6}
    fresh = sweep(lambda seed: values | words, {"seed": 1}, tmp_path)
    pd.testing.assert_frame_equal(load(tmp_path), fresh)
    (row,) = fresh.to_dict("records")
    assert math.isnan(row["nan"]) and row["inf"] == math.inf and row["hits"] == "[true, false]"
    assert (row["word"], row["quoted"]) == ("NaN", "''-Infinity")
    assert (row["seed"], row["seed_measured"], row["seed_measured_measured"]) == (1, 5, 6)


@pytest.mark.parametrize("metrics", [3.5, {"model": object()}, [1, 2]])
def test_what_cannot_be_recorded_is_a_failed_run(metrics):
    with pytest.warns(UserWarning, match="1 of 1 runs failed"):
        assert sweep(lambda: metrics, [{}])["status"].tolist() == ["failed"]


def test_a_failed_run_is_recorded_shown_and_done_again_when_its_record_is_removed(tmp_path):
    broken, store, calls = tmp_path / "broken", tmp_path / "store", []
    broken.touch()

    def fragile(seed):
        calls.append(seed)
        if seed == 1 and broken.exists():
            raise ZeroDivisionError("no luck")
        return {"accuracy": 0.5}

    for _ in range(2):
        with pytest.warns(UserWarning, match="1 of 3 runs failed.* {'seed': 1}: ZeroDivisionError: no luck"):
            frame = sweep(fragile, {"seed": range(3)}, store)
        assert frame["status"].tolist() == ["done", "failed", "done"] and np.isnan(frame["accuracy"][1])
        assert frame["run_error"][1] == "ZeroDivisionError: no luck" and calls == [0, 1, 2]
    path = next(path for path in store.glob("*.json") if json.loads(path.read_text())["status"] == "failed")
    assert 'raise ZeroDivisionError("no luck")' in json.loads(path.read_text())["traceback"]
    broken.unlink()
    path.unlink()
    frame = sweep(fragile, {"seed": range(3)}, store)
    assert calls == [0, 1, 2, 1] and frame["accuracy"].tolist() == [0.5] * 3


def test_budget_stops_between_runs(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])

    def slow(seed):
        clock[0] += 1
        return {"accuracy": seed}

    for done in (3, 6):  # they start after 0, 1 and 2 seconds
        with pytest.warns(UserWarning, match=f"{50 - done} of 50 runs are missing, as the budget ended.*call again"):
            frame = sweep(slow, {"seed": range(50)}, tmp_path, budget_seconds=2.5)
        assert frame["status"].tolist() == ["done"] * done + ["missing"] * (50 - done)
        assert len(load(tmp_path)) == done


def test_a_record_has_the_precision_and_the_commit(monkeypatch, tmp_path):
    batch = torch.randn(8, 4), torch.tensor([0, 1] * 4)

    def training(precision):
        model = torch.nn.Linear(4, 2)
        if precision != "none":
            pu.fit(model, batch, epochs=1, precision=precision)
            if precision == "bfloat16":
                pu.accuracy(model, batch)
        return {"weights": 8}

    monkeypatch.chdir(tmp_path)
    frame = sweep(training, {"precision": ["auto", "bfloat16", "none"]})
    assert frame["run_precision"].tolist()[:2] == ["float32", "bfloat16, float32"]
    assert frame["run_precision"].isna().tolist() == [False, False, True]
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
        assert head.startswith(frame["run_commit"][0].removesuffix("-dirty"))


def test_threads_are_the_same_everywhere_and_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        frame = sweep(lambda: {"threads": torch.get_num_threads()}, [{}])
        assert frame["threads"].tolist() == [1] == frame["run_threads"].tolist() and torch.get_num_threads() == 2
        assert sweep(lambda: {"threads": torch.get_num_threads()}, [{}], threads=None)["threads"].tolist() == [2]
    finally:
        torch.set_num_threads(before)


def test_a_store_that_cannot_be_written_fails_before_any_run(tmp_path, monkeypatch):
    calls = []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write into the store .*file/store.*; nothing was run"):
        sweep(lambda seed: calls.append(seed), {"seed": range(3)}, tmp_path / "file" / "store")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device.; nothing was run"):
        sweep(lambda seed: calls.append(seed), {"seed": range(3)}, tmp_path / "store")
    assert not calls and [path.name for path in (tmp_path / "store").iterdir()] == [".claims"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda record: "<<<<<<< HEAD", "Expecting value"),
        (lambda record: json.dumps(record | {"metrics": None}), "it should hold config, metrics"),
        (lambda record: json.dumps(record | {"config": {"seed": 7}}), "it holds the run {'seed': 7}, which belongs"),
    ],
)
def test_what_is_no_record_is_named(tmp_path, damage, reason):
    sweep(run, GRID, tmp_path)
    damaged = next(tmp_path.glob("*.json"))
    damaged.write_text(damage(json.loads(damaged.read_text())))
    for read in (lambda: sweep(run, GRID, tmp_path), lambda: load(tmp_path)):
        with pytest.raises(ValueError, match=f"{damaged.name} is not a record .*{reason}.*; remove it"):
            read()


@pytest.mark.parametrize("store", sorted({path.parent.name for path in (ROOT / "results").glob("*/*.json")}))
def test_the_records_of_the_repository_are_found_by_their_configs(store):
    folder = ROOT / "results" / store
    before = load(folder)
    assert (before["status"] == "done").all()

    def never(**config):
        raise AssertionError("ran")

    configs = [json.loads(path.read_text())["config"] for path in folder.glob("*.json")]
    found = sweep(never, configs, folder)
    assert len(found) == len(before) and {*found["run_time"]} == {*before["run_time"]}


@pytest.mark.slow
def test_workers_get_functions_and_names_of_a_notebook_by_value(tmp_path):
    cells = """
        import os, sys
        import torch
        import pruneutils as pu
        WIDTH = 3

        def network(seed):
            torch.manual_seed(seed)
            return torch.nn.Linear(WIDTH, 1)

        def run(seed):
            facts = {"process": os.getpid(), "module": run.__module__, "threads": torch.get_num_threads()}
            return facts | {"weight": network(seed).weight.sum().item()}

        two = pu.experiments.processes(2)
        frame = pu.experiments.sweep(run, {"seed": [0, 1]}, sys.argv[1], two, threads=None, progress=False)
        assert (frame["module"] == "__main__").all() and os.getpid() not in {*frame["process"]}
        assert (frame["threads"] == 1).all()
        assert frame["weight"].tolist() == [run(0)["weight"], run(1)["weight"]]
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(cells), tmp_path / "s"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert load(tmp_path / "s")["status"].tolist() == ["done"] * 2


@pytest.mark.slow
def test_workers_spread_over_cards(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")

    def described(seed):
        (tmp_path / f"{os.getpid()}.here").touch()
        while len(list(tmp_path.glob("*.here"))) < 4:  # no worker does all runs
            time.sleep(0.05)
        return {"card": os.environ["CUDA_VISIBLE_DEVICES"], "process": os.getpid()}

    cards = sweep(described, {"seed": range(8)}, executor=processes(4)).groupby("process").card.unique()
    assert all(len(card) == 1 for card in cards), "a worker keeps its card"
    assert sorted(card[0] for card in cards) == ["4", "4", "7", "7"]


@pytest.mark.slow
def test_a_variable_spreads_runs_that_are_kept_over_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNEUTILS_PROCESSES", "2")
    pids = [sweep(lambda: {"pid": os.getpid()}, [{}], store).pid[0] for store in (None, tmp_path)]
    assert pids[0] == os.getpid() != pids[1]


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["None", "processes(2)"])
def test_kill_9_in_mid_sweep_then_resume(tmp_path, executor):
    store = tmp_path / "store"
    process = script(f"sweep(run, dict(index=range(20)), store, {executor})", store)
    while len(list(store.glob("*.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(workers, timeout=20)[1]
    kept = {path: path.read_bytes() for path in store.glob("*.json")}
    assert 3 <= len(kept) < 20

    def again(index):
        with open(f"{store}.ran", "a") as file:
            file.write(f"{index}\n")
        return square(index)

    frame = sweep(again, {"index": range(20)}, store)
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert len(ran(store)) <= 20 + 2 and set(ran(store)) == set(range(20))
    pd.testing.assert_frame_equal(facts(frame), facts(sweep(square, {"index": range(20)})))


def test_an_interrupted_sweep_ends_its_runs_and_leaves_an_executor_for_the_next(tmp_path):
    def interrupted(index):
        if index:
            time.sleep(600)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(interrupted, {"index": [1, 0]}, tmp_path, processes(2))
    assert sweep(square, {"index": [0]}, tmp_path, processes(1))["status"].tolist() == ["done"]


def test_a_worker_that_dies_leaves_its_run_missing(tmp_path):
    def deadly(seed):
        if seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"accuracy": seed}

    with pytest.warns(UserWarning, match="missing, .*Terminated"):
        frame = sweep(deadly, {"seed": [0, 1]}, tmp_path, processes(1))
    assert frame["status"].tolist()[1] == "missing" and "Terminated" in frame["run_error"][1]
    assert sweep(lambda seed: {"accuracy": 9}, {"seed": [1]}, tmp_path)["accuracy"].tolist() == [9]


@pytest.mark.slow
def test_two_processes_share_a_store(tmp_path):
    store = tmp_path / "store"
    table = "sweep(run, dict(index=range(24), seconds=0.05), store).iloc[:, :3].to_csv(sys.argv[1])"
    both = [script(table, store, str(tmp_path / name)) for name in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    assert ran(store) == list(range(24))
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()
    assert pd.read_csv(tmp_path / "a")["square"].tolist() == [index * index / 3 for index in range(24)]


@pytest.mark.parametrize("make", [ThreadPoolExecutor, loky.ProcessPoolExecutor])
def test_any_executor_of_concurrent_futures_gives_the_same_table(make, tmp_path):
    def draws(seed):
        torch.manual_seed(seed)
        time.sleep(0.01)
        return {"drawn": torch.rand(()).item()}

    with make(2) as executor:  # runs in threads take turns, since they share the random state
        frame = sweep(draws, {"seed": range(12)}, tmp_path, executor)
    pd.testing.assert_frame_equal(facts(frame), facts(sweep(draws, {"seed": range(12)})))


def test_a_run_that_changes_its_config_leaves_the_store_readable(tmp_path):
    def mutates(opts, seed):
        opts["rates"].append(seed)
        return {"n": len(opts["rates"])}

    for _ in range(2):
        frame = sweep(mutates, {"opts": [{"rates": [0.1]}], "seed": [0, 1]}, tmp_path)
        assert frame["n"].tolist() == [2, 2] and frame["opts"].tolist() == ['{"rates": [0.1]}'] * 2
    assert len(load(tmp_path)) == 2


@pytest.mark.parametrize("executor", [None, "processes"])
def test_a_disk_that_fills_up_stops_the_sweep_and_shows_the_metrics(tmp_path, executor):
    def fill(seed, store):
        if seed == 1:
            shutil.rmtree(store)
        return {"accuracy": seed / 4}

    grid = {"seed": range(4), "store": str(tmp_path / "s")}
    with pytest.raises(OSError, match="any more .*not recorded: {'seed': 1.*gave .{'accuracy': 0.25}"):
        sweep(fill, grid, tmp_path / "s", processes(1) if executor else None)
