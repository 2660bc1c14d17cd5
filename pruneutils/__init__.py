"""Neural network pruning for research: masks, criteria, schedules, experiments. `import pruneutils as pu`."""

import importlib
from typing import TYPE_CHECKING

from . import controls, takeover
from ._checks import nearest, needs
from ._evaluation import perplexity
from .costs import cost
from .doctor import check, dead_weights
from .files import load, save
from .filters import filter_scores, prune_filters
from .model_utils import accuracy, count, get_masks, hold, layer_table, make_permanent, restore, set_masks
from .models.trained import trained
from .pruning import Block, NofM, TiedScoresWarning, prune, prune_threshold, schedule, scope
from .pruning.criteria import criterion, list_criteria, scores
from .repair import recalibrate, reconstruct
from .surgeon import sparsegpt
from .target import prunable, prunable_weights
from .training import backward_pruned, dynamic_sparsity, fit, gradual, gradual_sparsity, lottery_ticket

if TYPE_CHECKING:
    from . import data, experiments, models, notebook, plots, widgets
    from .experiments import statistics

__version__ = "0.2.0"

__all__ = ["controls", "data", "experiments", "models", "plots", "statistics", "widgets"]  # rooms
__all__ += ["prune", "prune_threshold", "prunable", "prunable_weights", "scores", "filter_scores", "prune_filters"]
__all__ += ["criterion", "list_criteria", "scope", "Block", "NofM", "schedule", "TiedScoresWarning"]  # the four choices
__all__ += ["accuracy", "check", "cost", "count", "dead_weights", "layer_table", "perplexity"]  # what a model holds
__all__ += ["get_masks", "hold", "load", "make_permanent", "restore", "save", "set_masks"]  # masks on a model
__all__ += ["recalibrate", "reconstruct", "sparsegpt"]  # layer by layer
__all__ += ["backward_pruned", "dynamic_sparsity", "fit", "gradual", "gradual_sparsity", "lottery_ticket", "trained"]

# These import scipy, matplotlib or ipywidgets, so each is imported when it is first used.
_ROOMS = ("data", "experiments", "models", "notebook", "plots", "widgets")


def __getattr__(name: str) -> object:
    if name in (*_ROOMS, "statistics"):
        module = "experiments.statistics" if name == "statistics" else name
        with needs({"widgets": "notebooks", "statistics": "experiments"}.get(name, name)):
            return importlib.import_module(f"{__name__}.{module}")
    if name.startswith("_"):  # such as those that a notebook asks every object for
        raise AttributeError(name)
    rooms = ("model_utils", "pruning", "filters", "training", "controls", "costs", "repair", "takeover")
    found = [f"it is pu.{room}.{name}" for room in rooms if hasattr(globals()[room], name)]
    way = found[0] if found else nearest(name, __all__)
    raise AttributeError(f"pruneutils has no {name!r}; {way}", name=name)


def __dir__() -> list[str]:
    return __all__
