"""The Makefile's commands leave no trace: in a copy of the repository, its status is clean afterwards."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).parent.parent
NOTEBOOK = """
import matplotlib.pyplot as plt
import pruneutils as pu
pu.plots.layer_histograms(pu.models.create("fc"), save=pu.notebook.image("gradual_pruning"))
plt.show()
print("an answer")
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("make") and (ROOT / ".git").exists()), reason="needs make and a checkout"),
]


def call(folder, *command):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PRUNEUTILS_")}
    environment |= {"PYTHONPATH": str(folder), "GIT_CONFIG_GLOBAL": os.devnull}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def copy(tmp_path):
    """The repository as it is now, committed, with one small notebook of the name that `make run` executes."""
    for name in call(ROOT, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        if (ROOT / name).is_file() and not name.startswith(("notebooks/", "results/", "tests/")):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "notebooks").mkdir()
    cell = new_code_cell(NOTEBOOK, metadata={"tags": ["parameters", "answer"]})
    kernel = {"language_info": {"name": "python"}}
    nbformat.write(new_notebook(cells=[cell], metadata=kernel), tmp_path / "notebooks" / "gradual_pruning.ipynb")
    who = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    for command in (["init", "--quiet"], ["add", "--all"], [*who, "commit", "--quiet", "--message", "Copy"]):
        call(tmp_path, "git", *command)
    return tmp_path


def test_make_run_leaves_no_trace_and_only_make_notebooks_changes_images(copy):
    make = ["make", "-o", ".venv/installed", f"BIN={Path(sys.executable).parent}"]  # this environment for .venv
    printed = call(copy, *make, "run")
    assert "an answer" in printed and "picture: build/gradual_pruning.png" in printed
    ends = (".png", "_dark.png")
    built = {path.name for path in (copy / "build").iterdir()}
    assert built == {"gradual_pruning.ipynb", *(f"gradual_pruning{end}" for end in ends)}
    assert call(copy, "git", "status", "--porcelain") == ""
    shutil.rmtree(copy / "build")
    call(copy, *make, "notebooks")
    changed = {line[3:] for line in call(copy, "git", "status", "--porcelain").splitlines()}
    assert changed == {"notebooks/gradual_pruning.ipynb", *(f"images/gradual_pruning{end}" for end in ends)}
    assert not (copy / "build").exists()
