"""The README's code runs, and what it lists is all there is."""

import json
import re
from pathlib import Path

import pruneutils as pu
from pruneutils.pruning import criteria

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(criteria, "_CRITERIA", dict(criteria._CRITERIA))
    example, criterion = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(example.split("\n\n")[1].splitlines()) <= 10
    start_here = json.loads((ROOT / "notebooks/start_here.ipynb").read_text())
    assert any(example in "".join(cell["source"]) for cell in start_here["cells"]), "README and start_here differ"
    names = {}
    exec(example, names)
    count = pu.count(names["model"])
    assert count.total == 308_582 and count.pruned == round(0.9 * 308_582)
    assert pu.accuracy(names["model"], names["test"]) > 0.9
    exec(criterion, names)
    assert "distance" in pu.list_criteria()


def test_every_criterion_is_listed():
    listed = re.findall(r"^\| `(\w+)` \|", README, flags=re.M)
    assert listed == pu.list_criteria()


def test_every_notebook_is_listed():
    listed = re.findall(r"^\| \[(\w+)\]\(notebooks/\1\.ipynb\) \|", README, flags=re.M)
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def test_every_link_leads_somewhere():
    for target in re.findall(r'(?:\]\(|src="|srcset=")((?:images|notebooks)/[^")]+)', README):
        assert (ROOT / target).exists(), target


def test_the_commands_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"^make (\w+)|`make (\w+)", README, flags=re.M):
        command = "".join(command)
        assert re.search(rf"^{command}:", makefile, flags=re.M), command
