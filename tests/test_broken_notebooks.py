"""The notebooks' tests can fail: a copy with a wrong number stored and every criterion reversed is found out.

PRUNEUTILS_BROKEN=all breaks all notebooks, in about five minutes; by default it is one.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))

from execute import source_of  # noqa: E402

NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
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


def failed_cells(notebook, folder) -> dict[int, str]:
    """Run nbval: {number of the code cell: why it failed}."""
    copy = folder / "copy.ipynb"
    copy.write_text(json.dumps(notebook))
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    options += [f"--nbval-sanitize-with={ROOT}/tests/sanitize.cfg", "--nbval", copy]
    command = [sys.executable, "-m", "pytest", *map(str, options)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)
    _, *failures = re.split(r"^_+ \S*::Cell (\d+) _+$", done.stdout, flags=re.M)
    return dict(zip(map(int, failures[::2]), failures[1::2]))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES if os.environ.get("PRUNEUTILS_BROKEN") == "all" else ["start_here"])
def test_a_broken_copy_fails(name, tmp_path):
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    wrong = notebook["cells"][break_stored_number(notebook["cells"])]
    first_import = next(i for i, cell in enumerate(notebook["cells"]) if "import pruneutils" in source_of(cell))
    notebook["cells"].insert(first_import + 1, json.loads(json.dumps(new_code_cell(REVERSED))) | {"id": "reversed"})
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    failed = failed_cells(notebook, tmp_path)
    assert "Cell outputs differ" in failed.pop(code.index(wrong), ""), "the wrong number went unnoticed"
    first = failed[min(failed)]
    assert "Cell outputs differ" in first or "AssertionError" in first, "the reversed criteria went unnoticed"
