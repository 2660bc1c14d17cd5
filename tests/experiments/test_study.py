"""A notebook's sweep from a shell: stopped by a budget, killed, called again, and read by the quick notebook."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
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
    return {"accuracy": seed / 10}
"""
SWEEP = """
grid = {"seed": list(seeds), "seconds": seconds}
frame = pu.experiments.sweep(run, grid, pu.notebook.store("toy"), budget_seconds=budget_seconds)
print(frame.status.value_counts().to_string())
"""
ANSWER = """
print({name: sorted(rows.accuracy) for name, rows in pu.notebook.recorded("toy").items()}, len(frame))
"""


@pytest.fixture
def toy(tmp_path):
    cells = [new_markdown_cell("# Does it go on?"), new_code_cell(PARAMETERS), new_code_cell(RUN)]
    cells += [new_code_cell(SWEEP), new_code_cell(ANSWER)]
    for cell, tag in zip(cells[1:], ("parameters", "run", "sweep", "answer")):
        cell.metadata["tags"] = [tag]
    path = tmp_path / "notebooks" / "toy.ipynb"
    path.parent.mkdir()
    (tmp_path / "pyproject.toml").touch()
    kernel = {"language_info": {"name": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
    return path


def start(path, *options, cwd="/"):
    command = [sys.executable, "-m", "pruneutils.notebook", *options, path]
    environment = {name: value for name, value in os.environ.items() if name != "PRUNEUTILS_SIZE"}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def call(path, *options, cwd="/"):
    process = start(path, *options, cwd=cwd)
    told, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "unknown parameter" not in errors
    return told


def records(path):
    return sorted((path.parent.parent / "results" / "toy_medium").glob("*.json"))


def runs(path):
    return (path.parent.parent / "runs.log").read_text().split()


def test_a_study_in_pieces_does_every_run_once_and_quick_size_reads_it(toy):
    before = toy.read_bytes()
    root = toy.parent.parent
    told = call(toy, "--study", "--size", "medium", "--budget", "0.5", cwd="/")
    assert "missing" in told and 1 <= len(records(toy)) <= 3
    told = call(toy.relative_to(root), "--study", "--size", "medium", cwd=root)
    assert "missing" not in told and "done    6" in told
    assert sorted(runs(toy)) == list("012345")
    assert toy.read_bytes() == before, "a study leaves the notebook alone"
    studied = json.loads((toy.parent.parent / "build" / "toy.ipynb").read_text())
    assert "sweep" in studied["cells"][-1]["metadata"]["tags"], "nothing after the sweep is executed"

    told = call(toy, "--show")
    assert "{'medium': [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]} 2" in told
    assert len(records(toy)) == 6, "quick runs are not kept"


def test_a_killed_study_goes_on_where_it_was(toy):
    process = start(toy, "--study", "--size", "medium")
    while len(records(toy)) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    for one in family:
        one.kill()
    process.communicate()
    assert len(kept := records(toy)) < 6
    contents = [path.read_bytes() for path in kept]
    assert "done    6" in call(toy, "--study", "--size", "medium")
    assert [path.read_bytes() for path in kept] == contents
    assert sorted(set(runs(toy))) == list("012345") and len(runs(toy)) <= 7, "one run was under way, at most"


@pytest.fixture
def no_variables(monkeypatch):
    for variable in ("PRUNEUTILS_SIZE", "PRUNEUTILS_IMAGES", "PRUNEUTILS_RESULTS"):
        monkeypatch.delenv(variable, raising=False)


def test_sizes_are_part_of_the_names(monkeypatch, no_variables):
    for size, name in (("quick", "curve"), ("medium", "curve_medium"), ("full", "curve_full")):
        monkeypatch.setenv("PRUNEUTILS_SIZE", size)
        assert notebook.image("curve").name == name
        assert notebook.image("curve", "full").name == "curve_full"
        assert notebook.store("curve") is None if size == "quick" else notebook.store("curve").name == name
    monkeypatch.setenv("PRUNEUTILS_SIZE", "ful")
    with pytest.raises(ValueError, match="'ful'; did you mean 'full'"):
        notebook.size()


@pytest.mark.parametrize(
    ("start", "root"),
    [(ROOT, ROOT), (ROOT / "notebooks", ROOT), (ROOT / "pruneutils" / "plots", ROOT), (Path("/"), Path("/"))],
)
def test_the_folder_where_one_starts_decides_nothing(start, root, monkeypatch, no_variables, tmp_path):
    monkeypatch.setenv("PRUNEUTILS_SIZE", "medium")
    monkeypatch.chdir(start)
    assert notebook.image("curve") == root / "build" / "curve_medium"
    assert notebook.store("toy") == root / "results" / "toy_medium"
    monkeypatch.setenv("PRUNEUTILS_IMAGES", str(tmp_path / "pictures"))
    monkeypatch.setenv("PRUNEUTILS_RESULTS", str(tmp_path / "records"))
    assert notebook.image("curve") == tmp_path / "pictures" / "curve_medium"
    assert notebook.store("toy") == tmp_path / "records" / "toy_medium"


def test_says_how_to_record_what_is_not(tmp_path, monkeypatch, capsys, no_variables):
    monkeypatch.chdir(tmp_path)
    assert notebook.recorded("toy") == {}
    assert "make study NAME=toy SIZE=medium" in capsys.readouterr().out


def test_what_is_recorded_is_found_from_everywhere_in_the_repository(monkeypatch, no_variables):
    name = sorted(folder.name for folder in (ROOT / "results").glob("*_medium"))[0].removesuffix("_medium")
    for start in (ROOT, ROOT / "notebooks"):
        monkeypatch.chdir(start)
        frame = notebook.recorded(name)["medium"]
        assert len(frame) and (frame.status == "done").all()


def test_what_is_shown_in_a_terminal_is_text():
    data = [{"text/markdown": "**Five** seeds", "text/plain": "<Markdown object>"}, {"text/plain": "12"}]
    data.append({"image/png": "", "text/plain": "<Figure size 840x420 with 1 Axes>"})
    outputs = [nbformat.v4.new_output("display_data", each) for each in data]
    cell = new_code_cell("answer()", outputs=outputs, metadata={"tags": ["answer"]})
    assert notebook._texts(new_notebook(cells=[cell]), "answer") == ["**Five** seeds", "12"]
