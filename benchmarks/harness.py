"""How a row of the table is measured: what is compared takes turns in one process, and ratios are taken turn by turn.

A row names its arms and what prepares them. An arm is a function that prepares one measurement, untimed, and returns
what is timed:

    @row("Prune 25.5 M weights to 90 %", at_least(70, "pu.prune", "torch.nn.utils.prune"))
    def prune():
        def ours():
            model = resnet50()
            return lambda: pu.prune(model, sparsity=0.9)
        ...
        return {"pu.prune": ours, "torch.nn.utils.prune": theirs}

Every row runs in a process of its own. Where `fresh` is asked for, each arm also runs alone in processes of its own,
once each: that is the time of a first call, and the growth of the memory's peak. An arm whose package is not installed
is left out.
"""

import ctypes
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PEERS = ROOT / "build" / "peers"  # peers that are no dependency; `make bench` installs them there if it can

Arm = Callable[[], Callable[[], object]]
ROWS: dict[str, "Row"] = {}


@dataclass(frozen=True)
class Line:
    """One comparison: how many times faster the first arm is than the second, or how many times as long it takes."""

    ours: str
    peer: str | None
    target: float | None
    # "faster": time of peer / ours, at least the target; "of": ours / peer, at most; "seconds": ours, at most;
    # "more": ours - peer, at most
    sense: str
    first: float | None = None  # the target of the first call of a process


def at_least(target: float | None, ours: str, peer: str, first: float | None = None) -> Line:
    """`ours` is to be so many times faster than `peer`, and so many times in the first call of a process."""
    return Line(ours, peer, target, "faster", first)


def at_most(target: float | None, ours: str, peer: str) -> Line:
    """`ours` may take so many times as long as `peer`, a dense step or a physical floor."""
    return Line(ours, peer, target, "of")


def within(seconds: float, ours: str) -> Line:
    """`ours` may take so long."""
    return Line(ours, None, seconds, "seconds")


def on_top(seconds: float, ours: str, peer: str) -> Line:
    """`ours` may take so many seconds more than `peer`, which is a part of it."""
    return Line(ours, peer, seconds, "more")


@dataclass(frozen=True)
class Row:
    key: str
    work: str
    lines: tuple[Line, ...]
    arms: Callable[[], dict[str, Arm]]
    rounds: int = 7
    calls: int = 1  # of what is timed, in one measurement
    threads: int | None = None  # None: OMP_NUM_THREADS, 1 by default
    clock: str = "cpu"  # CPU time of the process, which others on the machine disturb less; or "wall"
    fresh: int = 0  # processes for each arm alone
    memory: float | None = None  # MB by which the first arm's peak may grow
    gpu: bool = False
    seconds: float = 20  # no further round is begun after that long
    why: str = ""  # why a target is missed, where it is


def row(work: str, *lines: Line, **options: object) -> Callable:
    """Register a function that returns {arm name: arm}; it may add {"check": a function that returns a text}."""

    def register(arms):
        ROWS[arms.__name__] = Row(arms.__name__, work, lines, arms, **options)
        return arms

    return register


# --- In the process of a row -----------------------------------------------------------------------------------------


def measure(chosen: Row) -> dict:
    """Measure all arms of a row in turn: {"times": {arm: [seconds a call]}, "missing": [...], "check": text}."""
    arms, synchronize = chosen.arms(), _synchronizer(chosen)
    check = arms.pop("check", None)
    missing = [name for name, arm in arms.items() if arm is None]
    arms = {name: arm for name, arm in arms.items() if arm is not None}
    clock = time.process_time if chosen.clock == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():  # warms up
        arm()()
    started = time.perf_counter()
    for turn in range(chosen.rounds):
        names = list(arms) if turn % 2 == 0 else list(arms)[::-1]
        for name in names:
            run = arms[name]()
            gc.collect()
            synchronize()
            start = clock()
            for _ in range(chosen.calls):
                run()
            synchronize()
            times[name].append((clock() - start) / chosen.calls)
            del run
        if time.perf_counter() - started > chosen.seconds and turn >= 1:
            break
    return {"times": times, "missing": missing, "check": check() if check else None}


def measure_alone(chosen: Row, name: str) -> dict:
    """Run one arm once: seconds, and MB by which the peak of this process's memory grew."""
    arm, synchronize = chosen.arms()[name], _synchronizer(chosen)
    if arm is None:
        return {"missing": True}
    run = arm()
    gc.collect()
    synchronize()
    before = _reset_peak()
    clock = time.process_time if chosen.clock == "cpu" else time.perf_counter
    start = clock()
    run()
    synchronize()
    seconds = clock() - start
    return {"seconds": seconds, "memory": _memory("VmHWM") - before}


def _synchronizer(chosen):
    if not chosen.gpu:
        return lambda: None
    import torch

    return torch.cuda.synchronize


def _reset_peak() -> float:
    """Forget the peak of this process's memory so far, give free memory back; return the MB resident now."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # no glibc: memory that is free but still held can hide a part of the growth
        pass
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # then the peak so far counts, where it was higher
        pass
    return _memory("VmRSS")


def _memory(field) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # no Linux
        return math.nan
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field))


# --- In the process of the table -------------------------------------------------------------------------------------


def run_row(chosen: Row) -> list[dict]:
    """Measure a row in processes of its own; return its lines of the table."""
    found = _in_process(chosen, [], 5 * chosen.seconds + 300)
    if "error" in found:
        return [{"key": chosen.key, "work": chosen.work, "ours": chosen.lines[0].ours, "error": found["error"]}]
    alone: dict[str, list[dict]] = {}
    names = [name for name in found["times"]]
    for turn in range(chosen.fresh):
        for name in names if turn % 2 == 0 else names[::-1]:
            result = _in_process(chosen, ["--alone", name], 300)
            if "seconds" in result:
                alone.setdefault(name, []).append(result)
    lines = []
    for line in chosen.lines:
        facts = {"key": chosen.key, "work": chosen.work, "ours": line.ours, "peer": line.peer, "sense": line.sense}
        facts |= {"threads": chosen.threads, "clock": chosen.clock, "why": chosen.why}
        if line.ours not in names or line.peer not in (None, *names):
            lines.append(facts | {"error": f"{line.peer or line.ours} is not installed"})
            continue
        facts["memory"] = {n: statistics.median(r["memory"] for r in alone[n]) for n in alone}
        facts["memory_target"] = chosen.memory if line is chosen.lines[0] else None
        facts["check"] = found["check"] if line is chosen.lines[0] else None
        lines.append(facts | _compare(line, found["times"].get(line.ours), found["times"].get(line.peer), line.target))
        if line.first is not None and line.ours in alone and line.peer in alone:
            ours, peer = ([r["seconds"] for r in alone[name]] for name in (line.ours, line.peer))
            first = {"work": f"{chosen.work}, first call of a process", "memory_target": None, "check": None}
            lines.append(facts | first | _compare(line, ours, peer, line.first))
    return lines


def _compare(line, ours, peer, target) -> dict:
    if peer is None:
        ratios = ours
    elif line.sense == "more":
        ratios = [a - b for a, b in zip(ours, peer)]
    elif line.sense == "faster":
        ratios = [b / a for a, b in zip(ours, peer)]
    else:
        ratios = [a / b for a, b in zip(ours, peer)]
    low, middle, high = quartiles(ratios)
    met = None if target is None else middle >= target if line.sense == "faster" else middle <= target
    return {
        "seconds": {"ours": statistics.median(ours), "peer": statistics.median(peer) if peer else None},
        "ratio": middle, "quartiles": [low, high], "rounds": len(ratios), "target": target, "met": met,
    }  # fmt: skip


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The quartiles of some numbers, of which there may be one."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def environment(threads: int | None) -> dict[str, str]:
    """The environment of a measuring process: its threads, and the peers that are no dependency."""
    paths = [str(ROOT), str(PEERS), *filter(None, [os.environ.get("PYTHONPATH")])]
    count = str(threads or os.environ.get("OMP_NUM_THREADS", 1))
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}


def _in_process(chosen, arguments, limit) -> dict:
    command = [sys.executable, "-m", "benchmarks", "--measure", chosen.key, *arguments]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(chosen.threads), capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {limit:.0f} s"}
    if done.returncode:
        return {"error": _reason(done.stderr) or f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def _reason(stderr: str) -> str | None:
    """The exception of the last traceback, which warnings may follow; the last line where there is none."""
    lines = stderr.strip().splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    told = [line for line in lines[starts[-1] + 1 :] if line[:1].strip()] if starts else lines[-1:]
    return told[0] if told else None


def gpu_name() -> str | None:
    """The name of the GPU, asked for in another process so that this one stays small."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or None
