"""Neural network pruning for research: masks, criteria, schedules, experiments. `import pruneutils as pu`."""

import importlib

from .backward import backward_pruned
from .checkpoints import load, save
from .controls import inverted, overlap, overlap_matrix, redraw, shuffle_masks
from .costs import cost, cost_table
from .criteria import criterion, dead_weights, list_criteria, scores
from .dynamic import drop_fraction_at, dynamic_sparsity, regrow
from .model_utils import (
    Count,
    Masks,
    accuracy,
    count,
    get_masks,
    layer_table,
    make_permanent,
    prunable_weights,
    restore,
    set_masks,
)
from .pruning import (
    LayerCollapseWarning,
    TiedScoresWarning,
    erk_sparsities,
    prune,
    prune_threshold,
    sparsity_at,
)
from .training import DivergenceError, fit, gradual, lottery_ticket, trained

__version__ = "0.1.0"

# heavier ones, imported when first used
_MODULES = (
    "data",
    "experiments",
    "models",
    "notebook",
    "plots",
    "statistics",
    "widgets",
)

__all__ = [name for name in dir() if not name.startswith("_") and name != "importlib"] + list(_MODULES)


def __getattr__(name):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
