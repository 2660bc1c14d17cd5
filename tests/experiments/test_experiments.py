import errno
import functools
import json
import os
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

import numpy as np
import pandas as pd
import pytest
import torch

from pruneutils.experiments import BOOKKEEPING, load, processes, sweep
from pruneutils.experiments import sweeping as experiments
from pruneutils.experiments.store import code_version

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
        import os, sys, time
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
    with ThreadPoolExecutor(3) as executor:
        pd.testing.assert_frame_equal(facts(sweep(run, GRID, executor=executor)), facts(frame))
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


def test_budget_stops_between_runs(tmp_path):
    def slow(seed):
        time.sleep(0.2)
        return {"accuracy": seed}

    with pytest.warns(UserWarning, match="runs are missing, as the budget ended"):
        frame = sweep(slow, {"seed": range(50)}, tmp_path, budget_seconds=0.3)
    done = (frame["status"] == "done").sum()
    assert 1 <= done <= 2 and (frame["status"][done:] == "missing").all() and len(frame) == 50
    with pytest.warns(UserWarning, match="call again"):
        assert (
            len(load(tmp_path))
            < (sweep(slow, {"seed": range(50)}, tmp_path, budget_seconds=0.3).status == "done").sum()
        )


@pytest.mark.parametrize("executor", ["None", "processes(2)"])
def test_kill_9_in_mid_sweep_then_resume(tmp_path, executor):
    store = tmp_path / "store"
    process = script(f"sweep(run, dict(index=range(20)), store, {executor})", store)
    while len(list(store.glob("*.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.3)  # workers may end the runs under way
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


def test_a_damaged_record_is_named(tmp_path):
    sweep(run, GRID, tmp_path)
    damaged = next(tmp_path.glob("*.json"))
    damaged.write_text("<<<<<<< HEAD")
    with pytest.raises(ValueError, match=f"{damaged.name} is not a record"):
        sweep(run, GRID, tmp_path)


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
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    taken, slots = [], []
    for _ in range(3):
        experiments._take_card(["4", "7"], 3, "owner")
        taken.append(os.environ["CUDA_VISIBLE_DEVICES"])
        slots.append(experiments._take_card.lock)  # held as long as its worker lives
    assert taken == ["4", "7", "4"]
    with pytest.raises(RuntimeError, match="all 3 worker slots"):
        experiments._take_card(["4", "7"], 3, "owner")
    slots[1].release()
    experiments._take_card(["4", "7"], 3, "owner")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"


class _Elsewhere:
    """An executor whose workers do not see the store, and whose jobs know done() and result() only, as submitit's."""

    def submit(self, function, job, *arguments):
        future = Future()
        future.set_result(function(job.__class__(**{**vars(job), "store": Path("/nowhere")}), *arguments))
        return future


def test_records_of_workers_that_do_not_see_the_store_are_kept(tmp_path):
    frame = sweep(run, GRID, tmp_path, _Elsewhere())
    pd.testing.assert_frame_equal(sweep(run, GRID, tmp_path), frame)
    assert len(list(tmp_path.glob("*.json"))) == 12


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
    executor.update_parameters(timeout_min=1)
    grid = {"index": range(2)}
    frame = sweep(lambda index: {"square": index / 3}, grid, tmp_path / "store", executor)
    pd.testing.assert_frame_equal(facts(frame), facts(sweep(lambda index: {"square": index / 3}, grid)))


def test_auto_takes_processes_only_if_several_and_worth_it_by_the_first_run(monkeypatch):
    def run(x):
        return {"pid": os.getpid()}

    frame = experiments.sweep(run, {"x": [1, 2, 3]}, executor="auto", progress=False)
    assert set(frame.pid) == {os.getpid()}
    monkeypatch.setattr(experiments, "_WORTH_PROCESSES", 0)
    monkeypatch.setattr(experiments, "_cards", lambda: ["0"])  # one worker a card: one would gain nothing
    frame = experiments.sweep(run, {"x": [1, 2, 3]}, executor="auto", progress=False)
    assert set(frame.pid) == {os.getpid()}
    monkeypatch.setattr(experiments, "_cards", list)
    monkeypatch.setattr(experiments, "cpu_count", lambda: 2)
    frame = experiments.sweep(run, {"x": [1, 2, 3]}, executor="auto", progress=False)
    assert frame.pid[0] == os.getpid() and os.getpid() not in set(frame.pid[1:])
    assert (frame.status == "done").all()
