"""A notebook's sweeps from a shell: stopped by a budget, called again, and read by the quick notebook."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from pruneutils import notebook

ROOT = Path(__file__).parent.parent.parent
PARAMETERS = """
from pathlib import Path
import time
import pruneutils as pu
size = pu.notebook.size()
seeds = range(2)
seconds = 0.0
budget_seconds = None
if size == "medium":
    seeds = range(6)
    seconds = 0.4
"""
RUN = """
def run(seed, seconds):
    with open("../runs.log", "a") as log:
        log.write(f"{seed}\\n")
    time.sleep(seconds)
    return {"accuracy": shrunk(seed)}
"""
HELPERS = """
def shrunk(seed):  # run uses it, and a cell further down defines it
    return seed / 10
"""
SWEEP = """
grid = {"seed": list(seeds), "seconds": seconds}
first = pu.experiments.sweep(run, [{"seed": 0, "seconds": seconds}], pu.notebook.store("toy"))
"""
SECOND = """
frame = pu.experiments.sweep(run, grid, pu.notebook.store("toy"), budget_seconds=budget_seconds)
print(frame.status.value_counts().to_string())
"""
EARLY = """
runs = pu.notebook.recorded("toy", "medium")
print(len(runs), "recorded")
"""
SHOWN = """
best = runs.accuracy.max()
"""
ANSWER = """
print(sorted(pu.notebook.recorded("toy", "medium").accuracy), len(frame))
"""


@pytest.fixture
def toy(tmp_path):
    codes = {
        PARAMETERS: "parameters",
        EARLY: "answer",
        SHOWN: "shown",
        RUN: "run",
        HELPERS: "helpers",
        SWEEP: "sweep",
        SECOND: "sweep",
        ANSWER: "answer",
    }
    cells = [new_code_cell(code, metadata={"tags": [tag]}) for code, tag in codes.items()]
    cells.insert(0, new_markdown_cell("# Does it go on?"))
    path = tmp_path / "notebooks" / "toy.ipynb"
    path.parent.mkdir()
    (tmp_path / "pyproject.toml").touch()
    kernel = {"language_info": {"name": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
    return path


def call(path, *options, cwd="/"):
    command = [sys.executable, ROOT / "docs" / "execute.py", *options, path]
    environment = {name: value for name, value in os.environ.items() if name != "PRUNEUTILS_SIZE"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "unknown parameter" not in done.stderr, done.stderr
    return done.stdout


def records(path):
    return sorted((path.parent.parent / "results" / "toy_medium").glob("*.json"))


def runs(path):
    return (path.parent.parent / "runs.log").read_text().split()


@pytest.mark.slow
def test_a_study_in_pieces_does_every_run_once_and_quick_size_reads_it(toy):
    before = toy.read_bytes()
    root = toy.parent.parent
    printed = call(toy, "--study", "--size", "medium", "--budget", "0.5", cwd="/")
    assert "UserWarning: " in printed and "runs are missing" in printed and 1 <= len(records(toy)) <= 3
    printed = call(toy.relative_to(root), "--study", "--size", "medium", cwd=root)
    assert "missing" not in printed and "done    6" in printed
    assert sorted(runs(toy)) == list("012345")
    assert toy.read_bytes() == before, "a study leaves the notebook alone"
    studied = json.loads((toy.parent.parent / "build" / "toy.ipynb").read_text())
    assert "sweep" in studied["cells"][-1]["metadata"]["tags"], "nothing after the sweep is executed"

    printed = call(toy, "--show")
    assert "[0.0, 0.1, 0.2, 0.3, 0.4, 0.5] 2" in printed
    assert len(records(toy)) == 6, "quick runs are not kept"


@pytest.fixture
def no_variables(monkeypatch):
    for variable in ("PRUNEUTILS_SIZE", "PRUNEUTILS_IMAGES", "PRUNEUTILS_RESULTS"):
        monkeypatch.delenv(variable, raising=False)


def test_sizes_are_part_of_the_names(monkeypatch, no_variables):
    for size, name in (("quick", "curve"), ("medium", "curve_medium"), ("full", "curve_full")):
        monkeypatch.setenv("PRUNEUTILS_SIZE", size)
        assert notebook.image("curve").name == "curve"  # a picture shows the largest runs, whatever the size
        assert notebook.store("curve") is None if size == "quick" else notebook.store("curve").name == name
    monkeypatch.setenv("PRUNEUTILS_SIZE", "ful")
    with pytest.raises(ValueError, match="'ful'; did you mean 'full'"):
        notebook.size()


@pytest.mark.parametrize(("start", "root"), [(ROOT, ROOT), (ROOT / "notebooks", ROOT), (Path("/"), Path("/"))])
def test_the_folder_where_one_starts_decides_nothing(start, root, monkeypatch, no_variables, tmp_path):
    monkeypatch.setenv("PRUNEUTILS_SIZE", "medium")
    monkeypatch.chdir(start)
    assert notebook.image("curve") == root / "build" / "curve"
    assert notebook.store("toy") == root / "results" / "toy_medium"
    monkeypatch.setenv("PRUNEUTILS_IMAGES", str(tmp_path / "pictures"))
    monkeypatch.setenv("PRUNEUTILS_RESULTS", str(tmp_path / "records"))
    assert notebook.image("curve") == tmp_path / "pictures" / "curve"
    assert notebook.store("toy") == tmp_path / "records" / "toy_medium"


def test_says_how_to_record_what_is_not(tmp_path, monkeypatch, no_variables):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="make study NAME=toy SIZE=full"):
        notebook.recorded("toy", "full")
    with pytest.raises(ValueError, match="unknown size 'quick'"):
        notebook.recorded("toy", "quick")
