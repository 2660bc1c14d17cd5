"""Count the stops of a model on its way through a call: `python tests/count_stops.py`.

A stop is a call of a function of pruneutils that gets the model itself as an argument. Functions of a `module`, which
are called for each module and so for the outermost one too, are none.
"""

import sys
import warnings
from collections.abc import Callable

import torch

import pruneutils as pu


def stops(call: Callable, model: torch.nn.Module) -> list[str]:
    """Return the functions of pruneutils that get this model while `call(model)` runs, in order."""
    found, frames = [], []

    def profile(frame, event, _):
        code = frame.f_code
        if event != "call" or not frame.f_globals.get("__name__", "").startswith("pruneutils") or frame in frames:
            return  # a generator that goes on was counted when it began
        n_arguments = code.co_argcount + code.co_kwonlyargcount
        arguments = set(code.co_varnames[:n_arguments]) - {"module"}
        if code.co_filename != "<string>" and any(frame.f_locals.get(name) is model for name in arguments):
            frames.append(frame)
            found.append(f"{frame.f_globals['__name__'].removeprefix('pruneutils.')}.{code.co_qualname}")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call(model)
    finally:
        sys.setprofile(before)
    return found


def ways() -> dict[str, list[str]]:
    """Return the stops of `prune`, by a criterion that needs no data and by those that do, and of `prune_filters`."""
    data = torch.randn(8, 1, 28, 28), torch.arange(8)
    calls = {
        f"prune(model, {name!r})": lambda model, name=name: pu.prune(model, name, sparsity=0.5, data=data)
        for name in ("magnitude", "snip", "grasp", "synflow")
    }
    calls["prune_filters(model)"] = lambda model: pu.prune_filters(model, ratio=0.5, example_inputs=data[0][:1])
    return {name: stops(call, pu.models.create("lenet5")) for name, call in calls.items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name, found in ways().items():
        print(f"{name}: {len(found)} stops", *found, sep="\n    ")
