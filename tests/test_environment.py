"""pyproject.toml, environment.yml and constraints.txt name the same packages, and the core imports few."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import pruneutils as pu

ROOT = Path(__file__).parent.parent
CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def required(*extras):
    """{package: bounds} of the core and these extras, which may name others of this package."""
    found = {}
    for requirement in map(Requirement, PROJECT["dependencies"] + sum((EXTRAS[extra] for extra in extras), [])):
        if requirement.name == PROJECT["name"]:
            found |= required(*sorted(requirement.extras))
        else:
            found[requirement.name] = requirement.specifier
    return found


EVERYTHING = required("notebooks", "docs", "test")


def test_conda_and_pip_ask_for_the_same():
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (from_pip,) = [entry["pip"] for entry in entries if isinstance(entry, dict)]  # what conda-forge does not have
    assert from_pip.pop() == "-e ."
    conda = map(Requirement, [entry for entry in entries if isinstance(entry, str) and entry != "pip"] + from_pip)
    environment = {CONDA_NAMES.get(each.name, each.name): each.specifier for each in conda}
    assert str(environment.pop("python")) == PROJECT["requires-python"]
    assert environment == required("notebooks")


def test_constraints_pin_every_dependency_within_its_bounds():
    text = (ROOT / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    pins = {requirement.name.lower(): requirement.specifier for requirement in map(Requirement, lines)}
    for name, bounds in EVERYTHING.items():
        (pin,) = pins[name.lower()]
        assert pin.operator == "==" and pin.version in bounds, name
    assert "--hash" not in text and "+" not in text, "the same torch for all, with a GPU or without"


@pytest.mark.parametrize("name", EVERYTHING)
def test_what_is_installed_satisfies_the_bounds(name):
    assert version(name).partition("+")[0] in EVERYTHING[name]


def test_make_installs_what_its_targets_need_and_versions_agree():
    assert "-e '.[notebooks,docs,test]'" in (ROOT / "Makefile").read_text()
    assert pu.__version__ == PROJECT["version"]
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


CORE = """
import sys
absent = "torchvision PIL tqdm mlxtend timm scipy loky matplotlib seaborn IPython ipywidgets platformdirs"
sys.modules |= dict.fromkeys(absent.split())  # as if these were not installed
import torch
import pruneutils as pu
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
pu.prune(model, "magnitude", 0.5)
pu.fit(model, (torch.randn(8, 8), torch.tensor([0, 1] * 4)), epochs=1)
assert len(pu.layer_table(model)) == 2
print(pu.count(model).pruned)
pu.save(model, "model.safetensors")
pu.load("model.safetensors", model=model)
for room in ("plots", "experiments", "widgets"):
    try:
        getattr(pu, room)
    except ModuleNotFoundError as error:
        print(error)
"""


def test_the_core_runs_without_the_extras_and_rooms_name_theirs(tmp_path):
    done = subprocess.run([sys.executable, "-c", CORE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pruned, *errors = done.stdout.splitlines()
    assert pruned == "40"
    assert [re.search(r"pruneutils\[(\w+)\]", error)[1] for error in errors] == ["plots", "experiments", "notebooks"]


def test_import_does_not_bring_what_only_tables_and_pictures_need():
    code = "import pruneutils, sys; print(*{'pandas', 'matplotlib', 'torchvision', 'ipywidgets'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.split(), "half of the time of an import"
