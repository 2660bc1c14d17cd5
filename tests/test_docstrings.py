"""Every public function is annotated and has a Google-style docstring whose example runs."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch
from matplotlib import pyplot as plt

import pruneutils as pu

ROOMS = ["data", "experiments", "models", "notebook", "plots", "statistics", "widgets"]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def public() -> dict[str, object]:
    """The names that a reader meets: pu.prune, pu.plots.curves, pu.data.load, ..."""
    named = {name: getattr(pu, name) for name in pu.__all__ if name not in ROOMS}
    for room in ROOMS:
        module = getattr(pu, room)
        names = getattr(module, "__all__", None) or [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
        ]
        named |= {f"{room}.{name}": getattr(module, name) for name in names}
    return {f"pu.{name}": value for name, value in named.items() if callable(value)}


PUBLIC = public()
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}


def test_all_names_exist_and_are_listed_once():
    assert len(set(pu.__all__)) == len(pu.__all__) and all(hasattr(pu, name) for name in pu.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_docstrings(name):
    assert (PUBLIC[name].__doc__ or "").strip(), name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_of_functions_say_what_goes_in_and_what_comes_out(name):
    function = FUNCTIONS[name]
    text, signature = inspect.getdoc(function), inspect.signature(function)
    first = text.partition("\n")[0]
    assert first.endswith((".", "?")) and len(first) < 121, f"{name}: the first line is one sentence: {first!r}"
    parameters = [p for p in signature.parameters.values() if p.name not in ("self",)]
    if parameters:
        assert "Args:" in text, f"{name} has arguments, and its docstring no Args"
        arguments = text.partition("Args:")[2]
        missing = [p.name for p in parameters if f"{p.name}:" not in arguments]
        assert not missing, f"{name}: Args does not tell of {missing}"
    if signature.return_annotation not in (None, "None"):
        assert any(word in text for word in ("Returns:", "Yields:")), f"{name}: no Returns"
    assert "Example:" in text and ">>>" in text, f"{name}: no Example"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_are_annotated(name):
    signature = inspect.signature(FUNCTIONS[name])
    bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"]
    assert not bare, f"{name}: {bare} have no annotation"
    assert signature.return_annotation is not signature.empty, f"{name}: no annotation of what it returns"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PUBLIC)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    registries = [pu.pruning.criteria._CRITERIA, pu.pruning.scopes.SCOPES, pu.pruning.schedules.SCHEDULES]
    registries += [pu.pruning.granularities.GRANULARITIES, pu._prunable.RULES]
    before = [dict(registry) for registry in registries]
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    finder = doctest.DocTestFinder(recurse=False)
    told = []
    try:
        for test in finder.find(PUBLIC[name], name, globs={"pu": pu, "torch": torch}):
            runner.run(test, out=told.append)
    finally:
        for registry, content in zip(registries, before):
            registry.clear()
            registry.update(content)
        plt.close("all")
    assert runner.failures == 0, "".join(told)


@pytest.mark.parametrize(
    "module", [m.name for m in pkgutil.walk_packages(pu.__path__, "pruneutils.") if not m.name.endswith("__main__")]
)
def test_modules_say_what_they_hold(module):
    assert (importlib.import_module(module).__doc__ or "").strip()
