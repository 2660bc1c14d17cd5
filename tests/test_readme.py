"""The README's code runs, and every link, picture and command in it exists."""

import re
import sys
from pathlib import Path

import pytest

import pruneutils as pu
from pruneutils.pruning import criteria

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
INDEX = (ROOT / "notebooks/README.md").read_text()
sys.path.append(str(ROOT / "docs"))

import results  # noqa: E402


def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(criteria, "CRITERIA", dict(criteria.CRITERIA))
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.S):
        exec(block, names)
    assert pu.count(names["model"]).pruned > 0


@pytest.mark.parametrize(("text", "folder"), [(README, ROOT), (INDEX, ROOT / "notebooks")], ids=["README", "index"])
def test_every_link_leads_somewhere_and_every_picture_has_a_description(text, folder):
    targets = re.findall(r'(?:\]\(|src="|srcset=")((?!https?:|#)[^")#]+)', text)
    assert len(targets) > 10
    assert not [target for target in targets if not (folder / target).exists()]
    assert all(len(re.search(r'alt="([^"]*)"', image)[1]) > 60 for image in re.findall(r"<img [^>]*>", text))


def test_the_commands_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"(?:^|`)make (\w+)", README, flags=re.M):
        assert re.search(rf"^{command}:", makefile, flags=re.M), command


def test_the_page_of_recorded_studies_is_what_the_records_say():
    assert results.PAGE.read_text() == results.page(), "run `make findings`: the records in results/ say something else"
