"""pyproject.toml, environment.yml and constraints.txt tell the same story."""

import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pyproject():
    requirements = map(Requirement, PROJECT["dependencies"])
    return {requirement.name: str(requirement.specifier) for requirement in requirements}


def conda():
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (from_pip,) = [entry["pip"] for entry in entries if isinstance(entry, dict)]  # what conda-forge does not have
    assert from_pip.pop() == "-e ."
    plain = [entry for entry in entries if isinstance(entry, str) and entry != "pip"]
    requirements = [Requirement(entry) for entry in plain + from_pip]
    return {
        CONDA_NAMES.get(requirement.name, requirement.name): str(requirement.specifier) for requirement in requirements
    }


def test_conda_and_pip_ask_for_the_same():
    environment = conda()
    assert environment.pop("python") == PROJECT["requires-python"]
    assert environment == pyproject()


def constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {r.name.lower(): r for r in map(Requirement, (line for line in lines if line and not line.startswith("#")))}


def test_constraints_pin_every_dependency_within_its_bounds():
    pins = constraints()
    extras = PROJECT["optional-dependencies"]
    wanted = PROJECT["dependencies"] + extras["test"] + extras["docs"]
    for requirement in map(Requirement, wanted):
        pinned = next(iter(pins[requirement.name.lower()].specifier))
        assert pinned.operator == "=="
        assert pinned.version in requirement.specifier, requirement


def test_constraints_have_no_hashes_and_no_local_versions():
    text = (ROOT / "constraints.txt").read_text()
    assert "--hash" not in text and "+" not in text
    assert "torch==2.13.0" in text and "torchvision==0.28.0" in text


@pytest.mark.parametrize("name", pyproject())
def test_what_is_installed_satisfies_the_bounds(name):
    installed = version(name).partition("+")[0]
    assert installed in Requirement(name + pyproject()[name]).specifier


def test_import_does_not_bring_what_only_tables_and_pictures_need():
    code = "import pruneutils, sys; print(*{'pandas', 'matplotlib', 'torchvision', 'ipywidgets'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.split(), "half of the time of an import"
