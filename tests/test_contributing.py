"""The steps in CONTRIBUTING.md lead where they say."""

import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import pruneutils as pu
from pruneutils.pruning import criteria, granularities, schedules, scopes

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def blocks(language):
    return [textwrap.dedent(block) for block in re.findall(rf" *```{language}\n(.*?)```", TEXT, flags=re.S)]


def define(decorator, module, monkeypatch):
    """Run the block with this decorator where CONTRIBUTING says it belongs, as if it stood in that file."""
    registry = {"criterion": "CRITERIA", "scope": "SCOPES", "granularity": "GRANULARITIES", "schedule": "SCHEDULES"}
    known = getattr(module, registry[decorator])
    monkeypatch.setattr(module, registry[decorator], dict(known))
    (block,) = [block for block in blocks("python") if block.startswith(f"@{decorator}\n")]
    assert len(block.splitlines()) <= 10
    names = vars(module).copy()
    exec(block, names)
    return names


def test_a_criterion_is_one_function(monkeypatch):
    define("criterion", criteria, monkeypatch)
    model, start = pu.models.create("fc"), pu.models.create("fc", seed=1).state_dict()
    distance = {name: (w - start[name]).abs() for name, w in pu.prunable_weights(model).items()}
    masks = pu.prune(model, "distance", sparsity=0.5, reference=start)
    assert pu.count(model).pruned == 119_400 // 2
    kept = torch.cat([distance[name][mask] for name, mask in masks.items()])
    gone = torch.cat([distance[name][~mask] for name, mask in masks.items()])
    assert kept.min() >= gone.max()


def test_a_scope_is_one_function(monkeypatch):
    kinds = define("scope", scopes, monkeypatch)["kinds"]
    for scope in ("kinds", kinds):
        table = pu.layer_table(pu.prune(model := pu.models.create("lenet5"), sparsity=0.9, scope=scope) and model)
        assert table.kept[:2].sum() == 25_500 - round(0.9 * 25_500)
        assert table.kept[2:].sum() == 405_000 - round(0.9 * 405_000)


def test_a_granularity_is_one_class(monkeypatch):
    channel = define("granularity", granularities, monkeypatch)["Channel"]()
    for granularity in ("channel", channel):
        masks = pu.prune(pu.models.create("lenet5"), sparsity=0.5, granularity=granularity)
        for mask in masks.values():
            read = mask.movedim(1, 0).flatten(1)
            assert (read.all(1) | ~read.any(1)).all()


def test_a_schedule_is_one_function(monkeypatch):
    late = define("schedule", schedules, monkeypatch)["late"]
    for schedule in ("late", late):
        assert pu.pruning.sparsity_at(0.5, 0.8, schedule=schedule) == 0.8 / 8
    assert pu.prune(pu.models.create("lenet300"), sparsity=0.9, iterations=3, schedule="late").kept == 26_620


def test_every_file_in_the_table_is_there():
    files = re.findall(r"\| `(pruneutils/[^`]+)` \|", TEXT)
    assert len(files) >= 10 and all((ROOT / file).exists() for file in files)


@pytest.mark.slow
def test_a_notebook_is_made_executed_and_checked(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (block,) = [block for block in blocks("python") if "new_notebook" in block]
    subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True)
    for command in blocks("sh"):
        words = shlex.split(command)[1:] + (["--nbval-current-env", "-q"] if "pytest" in command else [])
        words = [str(ROOT / word) if word.startswith("docs/") else word for word in words]
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
