"""The harness of the benchmarks: what it times, counts and writes. No test asserts how fast anything is."""

import dataclasses
import json

import pytest

from benchmarks import __main__, harness, inference, methods, side_by_side, table, tools, training  # noqa: F401
from benchmarks.harness import Row, at_least, at_most, on_top, within


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves by the work of arms only."""
    now = [0.0]
    monkeypatch.setattr(harness.time, "process_time", lambda: now[0])
    return now


def lasting(clock, seconds, name="", order=None):
    """An arm whose work takes so long, after a preparation that does not count."""

    def prepare():
        clock[0] += 100.0
        if order is not None:
            order.append(name)

        def run():
            clock[0] += seconds

        return run

    return prepare


def test_only_the_work_is_timed_and_arms_take_turns(clock):
    order = []
    arms = {"a": lasting(clock, 2.0, "a", order), "b": lasting(clock, 3.0, "b", order)}
    found = harness.measure(Row("key", "work", (), lambda: arms, rounds=3, calls=4))
    assert found["times"] == {"a": [2.0] * 3, "b": [3.0] * 3}
    assert order == ["a", "b", *"abbaab"]  # both warm up, then neither is always the first


def test_a_peer_that_is_not_installed_is_left_out(clock, monkeypatch):
    arms = {"ours": lasting(clock, 1.0), "theirs": lasting(clock, 4.0), "absent": None, "check": lambda: "all equal"}
    row = Row("key", "work", (at_least(3, "ours", "theirs"), at_least(3, "ours", "absent")), lambda: dict(arms))
    monkeypatch.setattr(harness, "_in_process", lambda row, arguments, limit: harness.measure(row))
    faster, absent = harness.run_row(row)
    assert (faster["ratio"], faster["met"], faster["check"]) == (4.0, True, "all equal")
    assert absent["error"] == "absent is not installed"
    assert "not measured" in table.show(absent) and "4.0 (4.0 to 4.0) times faster" in table.show(faster)


@pytest.mark.parametrize(
    "line, ours, peer, ratio, met",
    [
        (at_least(2, "a", "b"), [1, 2, 4], [3, 4, 4], 2, True),
        (at_most(1.1, "a", "b"), [1.2, 2.4, 3], [1, 2, 3], 1.2, False),
        (within(0.5, "a"), [0.1, 0.6, 0.7], None, 0.6, False),
        (at_most(None, "a", "b"), [1], [4], 0.25, None),
        (on_top(1, "a", "b"), [2.5, 3, 4], [2, 2.25, 2], 0.75, True),
    ],
)
def test_ratios_are_taken_round_by_round(line, ours, peer, ratio, met):
    found = harness._compare(line, ours, peer, line.target)
    assert found["ratio"] == pytest.approx(ratio) and found["met"] is met
    assert found["quartiles"][0] <= found["ratio"] <= found["quartiles"][1]


def test_a_row_runs_in_a_process_of_its_own_and_is_written(tmp_path):
    row = dataclasses.replace(harness.ROWS["digits_again"], fresh=1, memory=500)
    (line,) = harness.run_row(row)
    assert line["seconds"]["ours"] > 0 and 0 <= line["memory"]["pu.data.load"] < 500
    table.write([line], {"cores": 2}, tmp_path)
    assert json.loads((tmp_path / "table.json").read_text())["lines"][0]["key"] == "digits_again"
    assert "pu.data.load" in (tmp_path / "table.md").read_text()


def test_an_error_ends_nothing_and_is_not_hidden_by_a_warning_after_it():
    (line,) = harness.run_row(Row("no_such_row", "work", (at_least(1, "a", "b"),), dict))
    assert "no_such_row" in line["error"]
    stderr = "Traceback (most recent call last):\n  File\nRuntimeError: CUDA error\nmore\n/b.py:3: UserWarning: x\n"
    assert harness._reason(stderr) == "RuntimeError: CUDA error" and harness._reason("") is None
