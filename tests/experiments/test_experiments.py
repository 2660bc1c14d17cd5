"""Sweeps: the table, what is kept, and what happens to them in processes that are killed, interrupted or shared."""

import errno
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import loky
import numpy as np
import pandas as pd
import psutil
import pytest
import torch

import pruneutils as pu
from pruneutils.experiments import BOOKKEEPING, load, processes, sweep, workers
from pruneutils.experiments.provenance import code_version

ROOT = Path(__file__).parent.parent.parent

GRID = {"method": ["a", "b"], "sparsity": [0.5, 0.9], "seed": range(3)}
SCALE = 3


def run(method, sparsity, seed):
    return {"accuracy": SCALE * sparsity + seed / 7 + (method == "b"), "nan": float("nan")}


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


def square(index):
    return {"square": index * index / 3}


def ran(store):
    return sorted(int(line) for line in Path(f"{store}.ran").read_text().split())


def test_table_in_grid_order(tmp_path):
    frame = sweep(run, GRID, tmp_path / "s")
    assert list(frame.columns) == ["method", "sparsity", "seed", "accuracy", "nan", "status", *BOOKKEEPING]
    assert frame["method"].tolist() == ["a"] * 6 + ["b"] * 6 and frame["seed"].tolist() == [0, 1, 2] * 4
    assert frame["accuracy"].tolist() == [
        3 * s + n / 7 + (m == "b") for m in "ab" for s in (0.5, 0.9) for n in range(3)
    ]
    assert (frame["status"] == "done").all() and frame["run_torch"].iloc[0] == torch.__version__
    assert (frame["run_seconds"] >= 0).all() and frame["run_error"].isna().all()
    pd.testing.assert_frame_equal(facts(sweep(run, GRID)), facts(frame))
    pd.testing.assert_frame_equal(facts(sweep(run, GRID, executor=processes(2))), facts(frame))
    pd.testing.assert_frame_equal(
        load(tmp_path / "s").sort_values(["method", "sparsity", "seed"], ignore_index=True), frame
    )


def test_second_call_runs_only_what_is_missing(tmp_path):
    calls = deque()

    def counted(seed, rate=1.0):
        calls.append(seed)
        return {"accuracy": seed / 3}

    store = tmp_path / "deep" / "store"
    first = sweep(counted, {"seed": [0, 1]}, store)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = sweep(counted, {"seed": [2, 0, 1]}, store)
    assert list(calls) == [0, 1, 2] and both["seed"].tolist() == [2, 0, 1]
    pd.testing.assert_frame_equal(both.iloc[1:].reset_index(drop=True), first)
    assert len(list(store.glob("*.json"))) == 3 and not list((store / ".claims").iterdir())
    record = json.loads(next(store.glob("*.json")).read_text())
    assert {
        "config",
        "metrics",
        "status",
        "seconds",
        "time",
        "device",
        "precision",
        "code",
        "commit",
        "torch",
        "numpy",
        "python",
    } <= {*record}


def test_grids_add_and_equal_configs_run_once():
    calls = deque()

    def counted(**config):
        calls.append(config)
        return {"accuracy": 1}

    grid = [{"seed": 0, "rate": 1}, {"rate": 1.0, "seed": np.int64(0)}] + [{"seed": 0, "widths": (300, 100)}]
    frame = sweep(counted, grid)
    assert list(calls) == [{"seed": 0, "rate": 1}, {"seed": 0, "widths": [300, 100]}]
    assert frame["widths"].tolist()[1] == "[300, 100]" and np.isnan(frame["rate"][1])
    assert len(sweep(counted, {"seed": np.arange(3), "rate": np.float32(0.5), "name": "one", "flag": True})) == 3


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"model": [torch.nn.ReLU()]}, "grid key 'model' is ReLU"),
        ({"rate": [0.1, float("nan")]}, "grid key 'rate' is nan"),
        ({"seed": []}, "grid key 'seed' has no values"),
        ({"nest": [{"a": {1, 2}}]}, r"grid key 'nest'\['a'\] is"),
        ({"status": [1]}, "'status' must be a string other than"),
        ([], "not empty"),
        ([3], "list of configs"),
        ({"sed": [1]}, "does not take the config {'sed': 1}"),
    ],
)
def test_grids_that_do_not_fit_fail_before_any_run(grid, message, tmp_path):
    def touch(seed=0, rate=0, model=None, nest=None, status=None):
        raise AssertionError("ran")

    with pytest.raises((TypeError, ValueError), match=message):
        sweep(touch, grid, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_several_rows_a_run_and_measured_columns(tmp_path):
    def curve(sparsity, seed):
        return pd.DataFrame({"epoch": [0, 1], "sparsity": np.float32([0.25, 0.5]), "loss": torch.tensor([2.0, 1.0])})

    for store in (tmp_path, tmp_path):  # computed, then read
        frame = sweep(curve, {"sparsity": 0.5, "seed": [0, 1]}, store)
        assert frame["epoch"].tolist() == [0, 1, 0, 1] and frame["seed"].tolist() == [0, 0, 1, 1]
        assert frame["sparsity"].tolist() == [0.5] * 4 and frame["sparsity_measured"].tolist() == [0.25, 0.5] * 2


def test_a_failed_run_is_recorded_shown_and_retried_on_request(tmp_path):
    broken = tmp_path / "broken"
    broken.touch()
    calls = deque()

    def fragile(seed):
        calls.append(seed)
        if seed == 1 and broken.exists():
            raise ZeroDivisionError("no luck")
        return {"accuracy": 0.5}

    store = tmp_path / "store"
    with pytest.warns(UserWarning, match="1 of 3 runs failed.* one of them is {'seed': 1}: ZeroDivisionError: no luck"):
        frame = sweep(fragile, {"seed": range(3)}, store)
    assert frame["status"].tolist() == ["done", "failed", "done"] and np.isnan(frame["accuracy"][1])
    assert frame["run_error"][1] == "ZeroDivisionError: no luck"
    record = next(r for p in store.glob("*.json") if (r := json.loads(p.read_text()))["status"] == "failed")
    assert record["error"] == frame["run_error"][1]
    assert 'raise ZeroDivisionError("no luck")' in record["traceback"]
    with pytest.warns(UserWarning, match="1 of 3 runs failed"):
        sweep(fragile, {"seed": range(3)}, store)
    assert list(calls) == [0, 1, 2]
    broken.unlink()
    frame = sweep(fragile, {"seed": range(3)}, store, retry_failed=True)
    assert list(calls) == [0, 1, 2, 1] and frame["accuracy"].tolist() == [0.5] * 3


@pytest.mark.parametrize("metrics", [3.5, {"model": object()}, [1, 2]])
def test_metrics_that_cannot_be_recorded_are_a_failed_run(metrics):
    with pytest.warns(UserWarning, match="TypeError"):
        assert sweep(lambda: metrics, [{}])["status"].tolist() == ["failed"]


def test_a_change_of_code_is_seen_and_nothing_runs_again(tmp_path, monkeypatch):
    before = sweep(run, GRID, tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 4)
    with pytest.warns(UserWarning, match="12 of 18 runs were done by other code"):
        after = sweep(run, {**GRID, "sparsity": [0.5, 0.9, 0.1]}, tmp_path)
    old = after["sparsity"] != 0.1
    assert set(after["run_code"][old]) == {before["run_code"][0]} and after["run_code"].nunique() == 2
    assert after["accuracy"][old].tolist() == before["accuracy"].tolist()
    assert after["accuracy"][~old].tolist()[0] == 0.4


def test_code_version_sees_helpers_constants_and_partials():
    def helper(x, rate=1):
        return {"y": x}

    def outer(x):
        return helper(x)

    version = code_version
    first = version(outer)
    assert first == version(outer) != version(helper)

    def helper(x, rate=1):  # noqa: F811
        return {"y": -x}

    assert version(outer) != first
    assert version(functools.partial(helper, rate=1)) != version(functools.partial(helper, rate=2)) != version(helper)


def test_budget_stops_between_runs(tmp_path, monkeypatch):
    clock = deque([1000.0])  # no list, which would count as a constant of the code
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def slow(seed):
        clock[0] += 1
        monkeypatch.setattr(time, "time", lambda: 1e12)  # somebody sets the calendar
        return {"accuracy": seed}

    for done in (3, 6):  # they start after 0, 1 and 2 seconds
        with pytest.warns(UserWarning, match=f"{50 - done} of 50 runs are missing, as the budget ended.*call again"):
            frame = sweep(slow, {"seed": range(50)}, tmp_path, budget_seconds=2.5)
        assert frame["status"].tolist() == ["done"] * done + ["missing"] * (50 - done)
        assert len(load(tmp_path)) == done


def test_a_budget_reaches_other_processes(tmp_path):
    def slow(seed):
        time.sleep(1.5)
        return {"accuracy": seed}

    executor = processes(1)
    executor.submit(str).result()  # the worker is there
    with pytest.warns(UserWarning, match="as the budget ended"):
        frame = sweep(slow, {"seed": range(8)}, tmp_path, executor, budget_seconds=2)
    assert 1 <= (frame["status"] == "done").sum() <= 2


def test_a_budget_is_a_number_of_seconds():
    with pytest.raises(ValueError, match="budget_seconds must be a number of at least 0, not -1"):
        sweep(run, GRID, budget_seconds=-1)


def end_of(family):
    """Wait until these processes have ended; those that have not."""
    return psutil.wait_procs(family, timeout=20)[1]


@pytest.mark.parametrize("executor", ["None", "processes(2)"])
def test_kill_9_in_mid_sweep_then_resume(tmp_path, executor):
    store = tmp_path / "store"
    process = script(f"sweep(run, dict(index=range(20)), store, {executor})", store)
    while len(list(store.glob("*.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not end_of(workers)
    kept = {path: path.read_bytes() for path in store.glob("*.json")}
    assert 3 <= len(kept) < 20

    def again(index):
        with open(f"{store}.ran", "a") as file:
            file.write(f"{index}\n")
        return {"square": index * index / 3}

    with pytest.warns(UserWarning, match="other code"):  # the script's run is not this one
        frame = sweep(again, {"index": range(20)}, store)
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert len(ran(store)) <= 20 + 2 and set(ran(store)) == set(range(20))
    pd.testing.assert_frame_equal(facts(frame), facts(sweep(square, {"index": range(20)})))


def test_workers_of_a_killed_or_interrupted_sweep_end_in_the_middle_of_their_runs(tmp_path):
    for number in (signal.SIGKILL, signal.SIGINT):
        store = tmp_path / number.name
        body = "signal.signal(signal.SIGINT, signal.default_int_handler); "  # a shell's background job ignores it
        process = script(body + "sweep(run, dict(index=range(4), seconds=600), store, processes(2))", store)
        while not (Path(f"{store}.ran").exists() and len(ran(store)) == 2):
            assert process.poll() is None
            time.sleep(0.05)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2
        process.send_signal(number)
        assert process.wait(timeout=20) != 0
        assert not end_of(family), number
        assert not list(store.glob("*.json"))


def test_an_interrupted_sweep_leaves_an_executor_for_the_next(tmp_path):
    def interrupted(index):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(interrupted, {"index": [0]}, tmp_path, processes(1))
    assert sweep(square, {"index": [0]}, tmp_path, processes(1))["status"].tolist() == ["done"]


def test_two_processes_share_a_store(tmp_path):
    store = tmp_path / "store"
    table = "sweep(run, dict(index=range(24), seconds=0.05), store).iloc[:, :3].to_csv(sys.argv[1])"
    both = [script(table, store, str(tmp_path / name)) for name in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    assert ran(store) == list(range(24))
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()
    assert pd.read_csv(tmp_path / "a")["square"].tolist() == [index * index / 3 for index in range(24)]


def test_a_claim_of_a_living_process_is_waited_for_and_a_dead_one_taken_over(tmp_path):
    store = tmp_path / "store"
    process = script("sweep(run, dict(index=[1], seconds=60), store)", store)
    while not Path(f"{store}.ran").exists():
        time.sleep(0.01)
    calls = deque()

    def takes_over(index, seconds):
        calls.append(process.poll())
        return {"square": 1}

    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(sweep, takes_over, {"index": [1], "seconds": 60}, store)
        time.sleep(0.5)
        assert not waiting.done() and not calls
        process.kill()
        assert waiting.result(timeout=20)["status"].tolist() == ["done"]
    assert len(calls) == 1


def test_a_store_that_cannot_be_written_fails_before_any_run(tmp_path, monkeypatch):
    calls = deque()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write 3 records into the store .*file/store.*; nothing was run"):
        sweep(lambda seed: calls.append(seed), {"seed": range(3)}, tmp_path / "file" / "store")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device.; nothing was run") as error:
        sweep(lambda seed: calls.append(seed), {"seed": range(3)}, tmp_path / "store")
    assert error.value.errno == errno.ENOSPC and not calls
    assert not [path for path in (tmp_path / "store").iterdir() if path.name != ".claims"]


def test_a_disk_that_fills_up_stops_the_sweep_and_shows_the_metrics(tmp_path, monkeypatch):
    def fill(seed):
        if seed == 1:
            monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        return {"accuracy": seed / 4}

    with pytest.raises(OSError, match="any more .full.*not recorded: {'seed': 1} gave .{'accuracy': 0.25}"):
        sweep(fill, {"seed": range(4)}, tmp_path)
    monkeypatch.undo()
    assert load(tmp_path)["seed"].tolist() == [0] and not list(tmp_path.glob(".*.tmp"))


def without(name):
    return lambda record: json.dumps({key: value for key, value in record.items() if key != name})


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda record: "<<<<<<< HEAD", "Expecting value"),
        (lambda record: "", "Expecting value"),
        (lambda record: "[]", "no JSON object"),
        (lambda record: "{}", "its config should be a dict and is None"),
        (without("metrics"), "its metrics should be a list and is None"),
        (without("time"), "its time should be a str"),
        (lambda record: json.dumps(record | {"metrics": "0.9"}), "its metrics should be a list and is '0.9'"),
        (lambda record: json.dumps(record | {"metrics": ["0.9"]}), "should be dicts"),
        (lambda record: json.dumps(record | {"status": "missing"}), "status 'missing' should be"),
        (lambda record: json.dumps(record | {"config": {"seed": 7}}), "it holds the run {'seed': 7}, which belongs"),
    ],
)
def test_what_is_no_record_is_named(tmp_path, damage, told):
    sweep(run, GRID, tmp_path)
    damaged = next(tmp_path.glob("*.json"))
    damaged.write_text(damage(json.loads(damaged.read_text())))
    for read in (lambda: sweep(run, GRID, tmp_path), lambda: load(tmp_path)):
        with pytest.raises(ValueError, match=f"{damaged.name} is not a record .*{told}.*; remove it"):
            read()


def test_another_runs_file_copied_over_a_record_is_named(tmp_path):
    sweep(run, GRID, tmp_path)
    one, other = sorted(tmp_path.glob("*.json"))[:2]
    shutil.copy(one, other)
    with pytest.raises(ValueError, match=f"{other.name} is not a record .it holds the run .* belongs into {one.stem}"):
        sweep(run, GRID, tmp_path)


def test_records_are_strict_json_and_keep_what_is_not_finite(tmp_path):
    values = {"nan": math.nan, "inf": math.inf, "curve": [1.0, -math.inf], "hits": torch.tensor([True, False])}
    fresh = sweep(lambda seed: values, {"seed": 1}, tmp_path)
    path = next(tmp_path.glob("*.json"))

    def refuse(token):
        raise AssertionError(token)

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record["metrics"] == [{"nan": "NaN", "inf": "Infinity", "curve": [1.0, "-Infinity"], "hits": [True, False]}]
    pd.testing.assert_frame_equal(load(tmp_path), fresh)
    assert np.isnan(fresh["nan"][0]) and fresh["inf"][0] == math.inf and fresh["hits"][0] == "[true, false]"
    path.write_text(path.read_text().replace('"NaN"', "NaN").replace('"Infinity"', "Infinity"))  # as in older records
    assert "NaN," in path.read_text()
    pd.testing.assert_frame_equal(load(tmp_path), fresh)


def test_records_in_the_repository_are_readable():
    folders = {path.parent for path in (ROOT / "results").glob("*/*.json")}
    assert folders
    for folder in folders:
        assert (load(folder)["status"] == "done").all(), folder


def test_a_record_tells_the_precision_that_ran():
    batch = torch.randn(8, 4), torch.tensor([0, 1] * 4)

    def training(precision):
        model = torch.nn.Linear(4, 2)
        if precision != "none":
            pu.fit(model, batch, epochs=1, precision=precision)
            if precision == "bfloat16":
                pu.accuracy(model, batch)
        return {"weights": 8}

    frame = sweep(training, {"precision": ["auto", "bfloat16", "none"]})
    assert frame["run_precision"].tolist()[:2] == ["float32", "bfloat16, float32"]
    assert frame["run_precision"].isna().tolist() == [False, False, True]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a checkout")
def test_the_commit_is_that_of_the_code_wherever_one_starts(monkeypatch):
    monkeypatch.chdir("/")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    assert head.startswith(sweep(run, GRID)["run_commit"][0].removesuffix("-dirty"))


def test_processes_have_one_thread_and_take_functions_of_a_notebook(tmp_path):
    def described(seed):
        return {"threads": torch.get_num_threads(), "variable": os.environ["OMP_NUM_THREADS"], "process": os.getpid()}

    frame = sweep(described, {"seed": range(6)}, tmp_path, processes(2), threads=None)
    assert (frame["threads"] == 1).all() and (frame["variable"] == "1").all() and os.getpid() not in {*frame["process"]}


def test_threads_are_the_same_everywhere_and_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        frame = sweep(lambda: {"threads": torch.get_num_threads()}, [{}])
        assert frame["threads"].tolist() == [1] == frame["run_threads"].tolist() and torch.get_num_threads() == 2
        assert sweep(lambda: {"threads": torch.get_num_threads()}, [{}], threads=None)["threads"].tolist() == [2]
    finally:
        torch.set_num_threads(before)


def test_a_worker_that_dies_leaves_its_run_missing_not_dropped(tmp_path):
    def deadly(seed):
        if seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"accuracy": seed}

    with pytest.warns(UserWarning, match="missing, .*Terminated"):
        frame = sweep(deadly, {"seed": [0, 1]}, tmp_path, processes(1))
    assert frame["status"].tolist()[1] == "missing" and "Terminated" in frame["run_error"][1]
    assert sweep(lambda seed: {"accuracy": 9}, {"seed": [1]}, tmp_path)["accuracy"].tolist() == [9]


def test_workers_spread_over_cards(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")

    def described(seed):
        (tmp_path / f"{os.getpid()}.here").touch()
        while len(list(tmp_path.glob("*.here"))) < 3:  # no worker does all runs
            time.sleep(0.05)
        return {"card": os.environ["CUDA_VISIBLE_DEVICES"], "process": os.getpid()}

    frame = sweep(described, {"seed": range(12)}, executor=processes(3))
    cards = frame.groupby("process").card.unique()
    assert all(len(card) == 1 for card in cards), "a worker keeps its card"
    assert sorted(card[0] for card in cards) == ["4", "4", "7"]


class Broken:
    """An executor whose workers do not see the store; its jobs know done() and result() only, as submitit's."""

    def __init__(self, store):
        self.store = store

    def submit(self, function, *arguments):
        shutil.rmtree(self.store, ignore_errors=True)
        future = Future()
        try:
            future.set_result(function(*arguments))
        except OSError as error:
            future.set_exception(error)
        return future


def test_workers_that_do_not_see_the_store_are_told_before_they_run(tmp_path):
    calls = deque()
    with pytest.raises(OSError, match="does not see the store .*/store, which every machine of a sweep has to see"):
        sweep(lambda seed: calls.append(seed), {"seed": range(3)}, tmp_path / "store", Broken(tmp_path / "store"))
    assert not calls and not (tmp_path / "store").exists()


def test_executors_of_threads_are_refused_by_name_before_the_first_run():
    calls = deque()
    with ThreadPoolExecutor(2) as executor:
        with pytest.raises(ValueError, match="a ThreadPoolExecutor, but runs side by side .* random state"):
            sweep(lambda seed: calls.append(seed), {"seed": range(3)}, executor=executor)
    with pytest.raises(TypeError, match="executor must be None, 'auto' or an executor .* not 'dask'"):
        sweep(lambda seed: calls.append(seed), {"seed": range(3)}, executor="dask")
    distributed = pytest.importorskip("distributed")
    options = {"processes": False, "threads_per_worker": 2, "dashboard_address": None}
    with distributed.LocalCluster(1, **options) as cluster, distributed.Client(cluster) as client:
        with pytest.raises(ValueError, match="Dask's worker .* has 2 threads, .*threads_per_worker=1"):
            sweep(lambda seed: calls.append(seed), {"seed": range(3)}, executor=client.get_executor())
    assert not calls


class Threads:
    """Threads that `sweep` cannot know."""

    def __init__(self, executor):
        self.submit = executor.submit


def test_runs_in_one_process_take_turns(tmp_path):
    def draws(seed):
        torch.manual_seed(seed)
        time.sleep(0.01)
        return {"drawn": torch.rand(()).item()}

    with ThreadPoolExecutor(4) as executor:
        frame = sweep(draws, {"seed": range(12)}, tmp_path, Threads(executor))
    pd.testing.assert_frame_equal(facts(frame), facts(sweep(draws, {"seed": range(12)})))


def test_dask_with_a_killed_worker_gives_the_sequential_table(tmp_path):
    distributed = pytest.importorskip("distributed")
    marker = tmp_path / "killed"

    def training(seed, sparsity):
        if seed == 3 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(64, 64, generator=generator)
        for _ in range(20):
            x = torch.tanh(x @ x.T / 64) * (torch.rand(64, 64, generator=generator) > sparsity)
        time.sleep(0.02)
        return {"norm": x.norm(), "process": os.getpid()}

    grid = {"seed": range(8), "sparsity": [0.1, 0.5]}
    with (
        distributed.LocalCluster(2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        parallel = sweep(training, grid, tmp_path / "store", client.get_executor())
    assert marker.exists() and parallel["process"].nunique() >= 2 and os.getpid() not in {*parallel["process"]}
    sequential = sweep(training, grid)
    pd.testing.assert_frame_equal(*(facts(frame).drop(columns="process") for frame in (parallel, sequential)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_submitit(tmp_path):
    submitit = pytest.importorskip("submitit")
    executor = submitit.AutoExecutor(folder=tmp_path / "log", cluster="local")
    executor.update_parameters(timeout_min=9)  # a job that is given up is no result
    grid = {"index": range(2)}
    frame = sweep(lambda index: {"square": index / 3}, grid, tmp_path / "store", executor)
    pd.testing.assert_frame_equal(facts(frame), facts(sweep(lambda index: {"square": index / 3}, grid)))


def test_auto_takes_processes_only_if_several_and_worth_it_by_the_first_run(monkeypatch):
    def run(x):
        return {"pid": os.getpid()}

    def pids():
        frame = sweep(run, {"x": [1, 2, 3]}, executor="auto")
        assert (frame.status == "done").all()
        return frame.pid.tolist()

    assert pids() == [os.getpid()] * 3
    clock = iter(range(0, 10**9, 1000))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))  # every run seems to take 1,000 seconds
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert pids() == [os.getpid()] * 3
    monkeypatch.delenv("LOKY_MAX_CPU_COUNT")
    if loky.cpu_count() > 1:
        first, *others = pids()
        assert first == os.getpid() and os.getpid() not in others


def test_the_environment_names_how_many_processes_share_the_machine(monkeypatch):
    monkeypatch.setattr(workers, "visible_cards", lambda: ["0"])
    assert workers.usual() == 1
    monkeypatch.setenv("PRUNEUTILS_PROCESSES", "8")
    assert workers.usual() == 8
    told = "PRUNEUTILS_PROCESSES must be a whole number of at least 1"
    for wrong in ("0", "many", "2.5"):
        monkeypatch.setenv("PRUNEUTILS_PROCESSES", wrong)
        with pytest.raises(ValueError, match=f"{told}, not '?{wrong}"):
            processes()
