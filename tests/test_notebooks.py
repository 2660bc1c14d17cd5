"""Every notebook is fit for `pytest --nbval`: its stored outputs belong to its code, and something is compared."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))

from execute import code_hash, source_of  # noqa: E402

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return json.loads(request.param.read_text())


def code(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def tags(cell):
    return cell["metadata"].get("tags", [])


def test_outputs_belong_to_the_code(notebook):
    stored = notebook["metadata"]["pruneutils"]
    assert stored["code"] == code_hash(notebook), "run `make notebooks`: the code is newer than the outputs"
    assert stored["size"] == "quick"
    for cell in code(notebook):
        assert cell["execution_count"], source_of(cell)
        assert not any(output["output_type"] == "error" for output in cell["outputs"])


def test_something_is_compared(notebook):
    def has_text(cell):
        return any("text" in output or "text/plain" in output.get("data", {}) for output in cell["outputs"])

    assert any(has_text(cell) and "nbval-ignore-output" not in tags(cell) for cell in code(notebook))


def test_the_answer_comes_first(notebook):
    lines = words = 0
    for cell in notebook["cells"]:
        text, outputs = source_of(cell), [output.get("data", {}) for output in cell.get("outputs", [])]
        if cell["cell_type"] == "code":
            lines += sum(bool(line.strip()) for line in text.splitlines())
            text = "".join(piece for output in outputs for piece in output.get("text/markdown", ""))
        words += len(text.split())
        if any("image/png" in output for output in outputs):
            break
    assert lines <= 15, "lines of code as far as the first picture"
    assert words <= 120, "words before the first picture"


def test_what_a_cell_draws_is_stored(notebook):
    for cell in code(notebook):
        if re.search(r"^(ax = pu\.plots\.\w+\(.*|plt\.show\(\))$", source_of(cell), flags=re.M):
            assert "image/png" in json.dumps(cell["outputs"]), source_of(cell)


def test_can_be_read(notebook):
    assert sum(bool(line.strip()) for cell in code(notebook) for line in source_of(cell).splitlines()) <= 150
    assert len(re.findall(r"\]\(https?://", "".join(map(source_of, notebook["cells"])))) >= 3, "links"
    assert sum("parameters" in tags(cell) for cell in code(notebook)) == 1
    for cell in code(notebook):
        if "parameters" not in tags(cell):  # one a line, whatever the number of sizes
            assert len(source_of(cell).splitlines()) <= 25, source_of(cell)
    first, last = notebook["cells"][0], notebook["cells"][-1]
    assert first["cell_type"] == last["cell_type"] == "markdown"
    assert source_of(first).startswith("# ") and "?" in source_of(first) and "References" in source_of(last)
    assert len(json.dumps(notebook)) < 1_000_000, "small enough to be read online"
