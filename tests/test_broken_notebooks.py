"""The notebooks' tests can fail: a copy of each with a wrong count stored and a reversed criterion is found out."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell

from pruneutils.notebook import source_of

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))

REVERSED = """
import torch
from pruneutils.pruning import criteria, granularities

right_score, right_select = criteria.score, granularities.Weight.select

def wrong_score(*args):
    return {name: -score for name, score in right_score(*args).items()}

def wrong_select(self, scores, k, alive, normalize=True, transform=None):
    if transform is not None:
        scores = {name: -transform(score) for name, score in scores.items()}
    return right_select(self, scores, k, alive, normalize)

criteria.score, granularities.Weight.select = wrong_score, wrong_select
"""


def break_stored_number(cells) -> int:
    """Change a digit in the first stored text that is compared; the index of its cell."""
    for i, cell in enumerate(cells):
        if cell["cell_type"] == "code" and "nbval-ignore-output" not in cell["metadata"].get("tags", []):
            for output in cell["outputs"]:
                text = "".join(output.get("text", []))
                if re.search(r"\d", text):
                    output["text"] = re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), text, count=1)
                    return i
    raise AssertionError("no number is compared")


def check_that_a_broken_copy_fails(path, tmp_path):
    notebook = json.loads(path.read_text())
    wrong = notebook["cells"][break_stored_number(notebook["cells"])]
    first_import = next(i for i, cell in enumerate(notebook["cells"]) if "import pruneutils" in source_of(cell))
    notebook["cells"].insert(first_import + 1, json.loads(json.dumps(new_code_cell(REVERSED))) | {"id": "reversed"})
    copy = tmp_path / path.name
    copy.write_text(json.dumps(notebook))
    root = path.parent.parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rf",
        "--tb=no",
        "-p",
        "no:cacheprovider",
        "-c",
        root / "pyproject.toml",
    ]
    command += ["--rootdir", root, f"--nbval-sanitize-with={root}/tests/sanitize.cfg", "--nbval", copy]
    done = subprocess.run([str(word) for word in command], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 1, done.stdout + done.stderr
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    failed = {int(number) for number in re.findall(r"^FAILED .*::Cell (\d+)", done.stdout, flags=re.M)}
    assert code.index(wrong) in failed, "the wrong number went unnoticed\n" + done.stdout
    assert failed - {code.index(wrong)}, "the reversed criterion went unnoticed\n" + done.stdout
    assert not any(source_of(code[i]) == REVERSED for i in failed), done.stdout


# two classes, so that two workers share them


class TestOneHalf:
    @pytest.mark.parametrize("path", NOTEBOOKS[::2], ids=lambda path: path.stem)
    def test_a_broken_copy_fails(self, path, tmp_path):
        check_that_a_broken_copy_fails(path, tmp_path)


class TestOtherHalf:
    @pytest.mark.parametrize("path", NOTEBOOKS[1::2], ids=lambda path: path.stem)
    def test_a_broken_copy_fails(self, path, tmp_path):
        check_that_a_broken_copy_fails(path, tmp_path)
