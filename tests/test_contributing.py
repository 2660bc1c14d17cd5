"""The steps in CONTRIBUTING.md lead where they say."""

import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import torch

import pruneutils as pu

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def blocks(language):
    return [textwrap.dedent(block) for block in re.findall(rf" *```{language}\n(.*?)```", TEXT, flags=re.S)]


def test_a_criterion_is_one_function(monkeypatch):
    monkeypatch.setattr(pu.criteria, "_CRITERIA", dict(pu.criteria._CRITERIA))
    (block,) = [block for block in blocks("python") if "@criterion" in block]
    assert len(block.splitlines()) <= 10
    exec(block, vars(pu.criteria).copy())
    model, start = pu.models.create("fc"), pu.models.create("fc", seed=1).state_dict()
    distance = {name: (w - start[name]).abs() for name, w in pu.prunable_weights(model).items()}
    masks = pu.prune(model, "distance", sparsity=0.5, reference=start)
    assert pu.count(model).pruned == 119_400 // 2
    kept = torch.cat([distance[name][mask] for name, mask in masks.items()])
    gone = torch.cat([distance[name][~mask] for name, mask in masks.items()])
    assert kept.min() >= gone.max()


def test_a_notebook_is_made_executed_and_checked(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (block,) = [block for block in blocks("python") if "new_notebook" in block]
    subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True)
    for command in blocks("sh"):
        words = shlex.split(command)
        assert words[0] == "python"
        if "pytest" in words:
            words += ["--nbval-current-env", "-q"]
        done = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout

    import test_notebooks

    notebook = test_notebooks.json.loads((tmp_path / "notebooks/my_question.ipynb").read_text())
    checks = [check for name, check in vars(test_notebooks).items() if name.startswith("test_")]
    for check in checks:
        if check.__code__.co_argcount:
            check(notebook)
