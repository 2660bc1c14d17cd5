"""Every public function is annotated and has a short Google-style docstring whose example runs."""

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest
import torch
from matplotlib import pyplot as plt

import pruneutils as pu

LONGEST = 40  # lines
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = [m.name for m in pkgutil.walk_packages(pu.__path__, "pruneutils.") if not m.name.endswith("__main__")]


def public() -> dict[str, object]:
    """The names that a reader meets: those of `pu` and of its rooms, and what has an example elsewhere."""
    assert len(set(pu.__all__)) == len(pu.__all__)
    named = {f"pu.{name}": getattr(pu, name) for name in pu.__all__}
    for module in map(importlib.import_module, MODULES):
        listed = getattr(module, "__all__", []) if module in (*named.values(), pu.notebook) else []
        for inner, value in vars(module).items():
            mine = getattr(value, "__module__", "") == module.__name__ and "Example:" in (value.__doc__ or "")
            if inner in listed or (mine and inspect.isroutine(value)):
                named.setdefault(f"pu{module.__name__.removeprefix('pruneutils')}.{inner}", value)
    once = {id(value): (name, value) for name, value in reversed(named.items())}
    return {name: value for name, value in reversed(once.values()) if callable(value)}


PUBLIC = public()
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_short_docstrings(name):
    text = inspect.getdoc(PUBLIC[name]) or ""
    assert text.strip(), f"{name} has no docstring"
    assert len(text.splitlines()) <= LONGEST, f"{name}: {len(text.splitlines())} lines, at most {LONGEST}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_annotated_and_say_what_goes_in_and_what_comes_out(name):
    text, signature = inspect.getdoc(FUNCTIONS[name]), inspect.signature(FUNCTIONS[name])
    assert text.partition("\n")[0].endswith((".", "?")), f"{name}: the first line is one sentence"
    arguments = text.partition("Args:")[2]
    for parameter in signature.parameters.values():
        assert re.search(rf"\b{parameter.name}\b", arguments), f"{name}: Args lacks {parameter.name}"
        assert parameter.annotation is not parameter.empty, f"{name}: {parameter.name} has no annotation"
    assert signature.return_annotation is not signature.empty, f"{name}: no annotation of what it returns"
    if signature.return_annotation not in (None, "None"):
        assert "Returns:" in text or "Yields:" in text, f"{name}: no Returns"
    assert "Example:" in text and ">>>" in text, f"{name}: no Example"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PUBLIC)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    registries = [pu.pruning.criteria.CRITERIA, pu.pruning.scopes.SCOPES, pu.pruning.schedules.SCHEDULES]
    registries += [pu.pruning.granularities.GRANULARITIES, pu.target.RULES]
    before = [dict(registry) for registry in registries]
    runner, output = doctest.DocTestRunner(optionflags=FLAGS), []
    try:
        for test in doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, globs={"pu": pu, "torch": torch}):
            runner.run(test, out=output.append)
    finally:
        for registry, content in zip(registries, before):
            registry.clear()
            registry.update(content)
        plt.close("all")
    assert runner.failures == 0, "".join(output)


@pytest.mark.parametrize("module", MODULES)
def test_modules_say_what_they_hold(module):
    assert (importlib.import_module(module).__doc__ or "").strip()
