"""The package stays thin: lines of files as `wc -l` counts them, public names, and that notebooks use them."""

import io
import json
import re
import tokenize
from pathlib import Path
from types import ModuleType

import pytest

import pruneutils as pu

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "pruneutils").rglob("*.py"))
CORE = [ROOT / "pruneutils" / f"{name}.py" for name in ("__init__", "model_utils", "masks", "target")]
CORE += sorted((ROOT / "pruneutils" / "pruning").rglob("*.py"))


def lines(*paths):
    return sum(path.read_bytes().count(b"\n") for path in paths)


def code_lines(path):
    """The lines that hold code: neither empty nor comment nor docstring."""
    found, statement = set(), []
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.NEWLINE:
            if not all(each.type == tokenize.STRING for each in statement):  # a string alone is a docstring
                found.update(line for each in statement for line in range(each.start[0], each.end[0] + 1))
            statement = []
        elif token.type not in skipped:
            statement.append(token)
    return len(found)


@pytest.mark.parametrize(
    ("what", "count", "budget"),
    [
        ("lines of the package", lambda: lines(*PACKAGE), 10_500),
        ("lines of its core", lambda: lines(*CORE), 3_000),
        ("lines of code in its core", lambda: sum(map(code_lines, CORE)), 1_700),
        ("lines of its longest file", lambda: max(map(lines, PACKAGE)), 420),
        ("lines of tests", lambda: lines(*(ROOT / "tests").rglob("*.py")), 9_500),
        ("public names", lambda: len(pu.__all__), 45),
    ],
)
def test_budget(what, count, budget):
    assert count() <= budget, what


def test_there_is_no_package_of_studies():
    assert not (ROOT / "pruneutils" / "studies").exists()


def notebook_code():
    cells = [cell for path in (ROOT / "notebooks").glob("*.ipynb") for cell in json.loads(path.read_text())["cells"]]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_every_public_name_occurs_in_a_notebook():
    code = notebook_code()
    names = [name for name in pu.__all__ if not isinstance(getattr(pu, name), ModuleType)]
    unused = [name for name in names if not re.search(rf"\bpu\.{name}\b", code)]
    assert not unused, "move these into their room"
