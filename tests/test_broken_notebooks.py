"""The notebooks' tests can fail: a copy with a wrong number stored and every criterion reversed is found out.

This executes each broken notebook once more, so by default there are two. All of them, in about five minutes:

    PRUNEUTILS_BROKEN=all python -m pytest tests/test_broken_notebooks.py
"""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell

from pruneutils.notebook import source_of

ROOT = Path(__file__).parent.parent
BY_DEFAULT = ["sparsity_explorer", "start_here"]  # the quickest ones
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
BROKEN = NAMES if os.environ.get("PRUNEUTILS_BROKEN") == "all" else BY_DEFAULT

REVERSED = """
import functools
import pruneutils as pu
from pruneutils.pruning import criteria

def reverse(scored):
    @functools.wraps(scored)
    def reversed_scores(*args, **options):
        return {name: -scores for name, scores in scored(*args, **options).items()}
    pu.criterion(reversed_scores)

for name in pu.list_criteria():
    reverse(getattr(criteria, name))
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


def failures(notebook, folder) -> dict[int, str]:
    """Run nbval: {number of the code cell: why it failed}."""
    copy, report = folder / "copy.ipynb", folder / "report.xml"
    copy.write_text(json.dumps(notebook))
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    options += [f"--nbval-sanitize-with={ROOT}/tests/sanitize.cfg", f"--junitxml={report}", "--nbval", copy]
    command = [sys.executable, "-m", "pytest", *map(str, options)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)
    assert done.returncode == 1, done.stdout + done.stderr
    cases = xml.etree.ElementTree.parse(report).iter("testcase")
    failed = {case.get("name"): case.find("failure") for case in cases if case.find("failure") is not None}
    return {int(name.removeprefix("Cell ")): failure.text for name, failure in failed.items()}


def noticed(why) -> bool:
    """Whether a cell failed because a number is wrong, and not by any other error."""
    return "Cell outputs differ" in why or re.search(r"AssertionError", why) is not None


def check_that_a_broken_copy_fails(name, folder):
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    wrong = notebook["cells"][break_stored_number(notebook["cells"])]
    first_import = next(i for i, cell in enumerate(notebook["cells"]) if "import pruneutils" in source_of(cell))
    notebook["cells"].insert(first_import + 1, json.loads(json.dumps(new_code_cell(REVERSED))) | {"id": "reversed"})
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    failed = failures(notebook, folder)
    number = failed.pop(code.index(wrong), "nothing")
    told = "Cell outputs differ" in number
    assert told, f"the wrong number went unnoticed; its cell told of {number}"
    assert failed, "the reversed criteria went unnoticed"
    told = noticed(failed[min(failed)])
    assert told, f"cell {min(failed)} failed by another error:\n{failed[min(failed)]}"


def test_the_notebooks_broken_by_default_exist():
    assert {*BY_DEFAULT} <= {*NAMES}


# two classes, so that two workers share them


class TestOneHalf:
    @pytest.mark.parametrize("name", BROKEN[::2])
    def test_a_broken_copy_fails(self, name, tmp_path):
        check_that_a_broken_copy_fails(name, tmp_path)


class TestOtherHalf:
    @pytest.mark.parametrize("name", BROKEN[1::2])
    def test_a_broken_copy_fails(self, name, tmp_path):
        check_that_a_broken_copy_fails(name, tmp_path)
