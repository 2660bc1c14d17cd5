"""The README's code runs, and what it lists is all there is."""

import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

import pruneutils as pu
from pruneutils.pruning import criteria

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
INDEX = (ROOT / "notebooks/README.md").read_text()
sys.path.append(str(ROOT / "docs"))

import findings  # noqa: E402
import recordings  # noqa: E402


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


def test_every_notebook_is_in_the_index_with_its_question():
    questions = dict(re.findall(r"^\| \[(\w+)\]\(notebooks/\1\.ipynb\) \| (.*) \|$", README, flags=re.M))
    indexed = re.findall(r"^## (.*)\n\n\[(\w+)\]\(\2\.ipynb\)$", INDEX, flags=re.M)
    assert [(name, question) for question, name in indexed] == list(questions.items())


@pytest.mark.parametrize(("text", "folder"), [(README, ROOT), (INDEX, ROOT / "notebooks")], ids=["README", "index"])
def test_every_link_leads_somewhere_and_every_picture_says_what_is_seen(text, folder):
    targets = re.findall(r'(?:\]\(|src="|srcset=")((?!https?:|#)[^")#]+)', text)
    assert len(targets) > 10
    for target in targets:
        assert (folder / target).exists(), target
    alts = re.findall(r"<img [^>]*>", text)
    assert alts and all(len(re.search(r'alt="([^"]*)"', image)[1]) > 60 for image in alts)


def test_opens_with_what_a_person_gets():
    assert README.startswith("# pruneutils\n\n- **See which weights of your network go.**")
    opening = README.index("## Two commands")
    assert README.index("images/sparsity_explorer.gif") < opening < README.index("## What we found")
    assert "![" not in README and "shields.io" not in README  # no badge that does not work


@pytest.mark.parametrize("style", ["", "_dark"])
def test_the_film_moves_and_is_small(style):
    path = ROOT / f"images/sparsity_explorer{style}.gif"
    with Image.open(path) as film:
        assert film.n_frames > 40 and film.width == 840
        first = film.convert("RGB").tobytes()
        film.seek(film.n_frames - 1)
        assert film.convert("RGB").tobytes() != first
    assert path.stat().st_size < 3_000_000


def test_what_we_found_is_what_the_records_say():
    assert findings.written(README) == README, "run `make findings`: the records in results/ say something else"
    listed = README.split(findings.BEGIN)[1].split(findings.END)[0]
    sentences = re.findall(r"^\d\. \*\*.*\[(\w+)\]\(notebooks/\1\.ipynb\)$", listed, flags=re.M)
    assert len(sentences) == 5 and len(re.findall(r"\[[-+]?[\d.]+, [-+]?[\d.]+\]", listed)) >= 4


def test_the_page_of_recorded_studies_is_what_the_records_say():
    assert recordings.PAGE.read_text() == recordings.page(), (
        "run `make findings`: the records in results/ say something else"
    )


@pytest.mark.parametrize("folder", recordings.folders(), ids=lambda folder: folder.name)
def test_a_sweep_cell_records_each_study(folder):
    """The command of the table leads to the notebook whose sweep writes this store."""
    notebook = re.search(r"NAME=(\w+) SIZE=(?:medium|full)", recordings.command(folder))[1]
    cells = json.loads((ROOT / f"notebooks/{notebook}.ipynb").read_text())["cells"]
    sweeps = ["".join(cell["source"]) for cell in cells if "sweep" in cell["metadata"].get("tags", [])]
    assert len(sweeps) == 1 and "experiments.sweep(" in sweeps[0]
    assert re.search(rf"\b{folder.name.rsplit('_', 1)[0]}\b", sweeps[0])


def test_findings_need_enough_seeds(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEUTILS_RESULTS", str(tmp_path))
    assert findings.found().strip().startswith("Brackets hold 95 % intervals")
    folder = tmp_path / "grasp_agreement_medium"
    folder.mkdir()
    records = sorted((ROOT / "results/grasp_agreement_medium").glob("*.json"))
    for record in records[:4]:
        (folder / record.name).write_text(record.read_text())
    assert findings.batches_disagree() is None
    (folder / records[4].name).write_text(records[4].read_text())
    overlaps = [json.loads(record.read_text())["metrics"][0]["overlap"] for record in records[:5]]
    assert f"has {100 * sum(overlaps) / 5:.0f} %" in findings.batches_disagree()


def test_the_commands_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"^make (\w+)|`make (\w+)", README, flags=re.M):
        command = "".join(command)
        assert re.search(rf"^{command}:", makefile, flags=re.M), command
