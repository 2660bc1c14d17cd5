"""The table: printed, and written as Markdown and JSON with the facts of the machine."""

import datetime
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).parent
HEAD = ("work", "ours", "against", "ratio (quartiles)", "peak memory, MB", "target", "reached")


def machine() -> dict[str, object]:
    """What the figures depend on."""
    facts = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _said("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": [round(each, 1) for each in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "threads": int(os.environ.get("OMP_NUM_THREADS", 1)),
        "python": platform.python_version(),
    }
    for name in ("torch", "numpy", "torch-pruning", "fasterai"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = None
    return facts


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    units = [name for name in ("avx512f", "avx512_bf16", "amx_bf16") if name in fields.get("flags", "").split()]
    model = fields.get("model name", platform.machine())
    return f"{model}, family {fields.get('cpu family', '?')}, {' '.join(units) or 'no AVX-512'}"


def _said(*command):
    try:
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=10)
    except OSError:
        return None
    return done.stdout.strip() or None


def cells(line: dict) -> tuple[str, ...]:
    """The cells of one line of the table."""
    work = line["work"] + (f", {line['threads']} threads" if line.get("threads") else "")
    if "error" in line:
        return work, line["ours"], line.get("peer") or "", f"not measured: {line['error']}", "", "", ""
    seconds, sense, (low, high) = line["seconds"], line["sense"], line["quartiles"]
    shown = _seconds if sense in ("seconds", "more") else _times
    ratio = f"{shown(line['ratio'])} ({shown(low)} to {shown(high)}){_WORDS[sense]}"
    memory = [line["memory"][name] for name in (line["ours"], line["peer"]) if name in line["memory"]]
    target = "" if line["target"] is None else _LIMITS[sense] + shown(line["target"])
    reached = [] if line["met"] is None else ["yes" if line["met"] else _missed(line)]
    if line.get("memory_target") is not None and memory:
        target += f"; {line['memory_target']:.0f} MB"
        reached.append(f"memory {'yes' if memory[0] <= line['memory_target'] else 'no'}")
    notes = [line["check"]] if line.get("check") else []
    peer = "" if line["peer"] is None else f"{line['peer']}, {_seconds(seconds['peer'])}"
    return (
        work, f"{line['ours']}, {_seconds(seconds['ours'])}", peer, ratio, " / ".join(f"{m:,.0f}" for m in memory),
        target, "; ".join([*reached, *notes]),
    )  # fmt: skip


_WORDS = {"faster": " times faster", "of": " times as long", "seconds": "", "more": " more"}
_LIMITS = {"faster": "at least ", "of": "at most ", "seconds": "under ", "more": "under "}


def _missed(line):
    far = line["target"] / line["ratio"] if line["sense"] == "faster" else line["ratio"] / line["target"]
    return f"no, by {far - 1:.0%}" + (f": {line['why']}" if line["why"] else "")


def _times(ratio):
    return f"{ratio:.0f}" if ratio >= 20 else f"{ratio:.1f}" if ratio >= 4 else f"{ratio:.2f}"


def _seconds(seconds):
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.1f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} µs"


def show(line: dict) -> str:
    """One line as text, for those who watch."""
    return "  |  ".join(cell for cell in cells(line) if cell)


def write(lines: list[dict], facts: dict, folder: Path = HERE) -> None:
    """Write table.md and table.json."""
    rows = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
    rows += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells(line)) + " |" for line in lines]
    about = ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)
    text = (
        "# pruneutils and its peers, side by side\n\nWritten by `make bench`; how it is measured and what was tried "
        "stands in [README.md](README.md).\nA ratio is the median over rounds in which both sides took turns, with its "
        f"quartiles.\n\n{about}\n\n" + "\n".join(rows) + "\n"
    )
    (folder / "table.md").write_text(text)
    (folder / "table.json").write_text(json.dumps({"machine": facts, "lines": lines}, indent=1) + "\n")
