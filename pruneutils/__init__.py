"""Neural network pruning for research: masks, criteria, schedules, experiments. `import pruneutils as pu`."""

from typing import TYPE_CHECKING

import lazy_loader

from .checkpoints import load, save
from .controls import inverted, overlap, overlap_matrix, redraw, shuffle_masks
from .costs import cost, cost_table
from .model_utils import (
    Count,
    Masks,
    RevivedWeightsWarning,
    accuracy,
    count,
    dense_gradients,
    get_masks,
    hold,
    layer_table,
    make_permanent,
    prunable,
    prunable_weights,
    restore,
    set_masks,
)
from .pruning import (
    Block,
    LayerCollapseWarning,
    LeftOutWarning,
    NofM,
    Recalibration,
    TiedScoresWarning,
    Tiles,
    criterion,
    dead_weights,
    erk_sparsities,
    filter_scores,
    filter_table,
    granularity,
    importance,
    list_criteria,
    list_importances,
    prune,
    prune_filters,
    prune_threshold,
    rebind_optimizer,
    recalibrate,
    reconstruct,
    schedule,
    scope,
    scores,
    sparsity_at,
    track_importance,
)
from .ranks import broadcast_masks, disagreeing_masks
from .takeover import take_over
from .training import (
    DivergenceError,
    backward_pruned,
    drop_fraction_at,
    dynamic_sparsity,
    fit,
    gradual,
    gradual_filters,
    gradual_sparsity,
    lottery_ticket,
    regrow,
    trained,
)

if TYPE_CHECKING:
    from . import data, experiments, models, notebook, plots, widgets
    from .experiments import statistics

__version__ = "0.1.0"

# These import pandas, scipy, matplotlib or ipywidgets, so each is imported when it is first used.
__getattr__, _, _ = lazy_loader.attach(
    __name__,
    submodules={"data", "experiments", "models", "notebook", "plots", "widgets"},
    submod_attrs={"experiments": ["statistics"]},
)

__all__ = [
    "Block",
    "Count",
    "DivergenceError",
    "LayerCollapseWarning",
    "LeftOutWarning",
    "Masks",
    "NofM",
    "Recalibration",
    "RevivedWeightsWarning",
    "TiedScoresWarning",
    "Tiles",
    "accuracy",
    "backward_pruned",
    "broadcast_masks",
    "cost",
    "cost_table",
    "count",
    "criterion",
    "data",
    "dead_weights",
    "dense_gradients",
    "disagreeing_masks",
    "drop_fraction_at",
    "dynamic_sparsity",
    "erk_sparsities",
    "experiments",
    "filter_scores",
    "filter_table",
    "fit",
    "get_masks",
    "gradual",
    "gradual_filters",
    "gradual_sparsity",
    "granularity",
    "hold",
    "importance",
    "inverted",
    "layer_table",
    "list_criteria",
    "list_importances",
    "load",
    "lottery_ticket",
    "make_permanent",
    "models",
    "notebook",
    "overlap",
    "overlap_matrix",
    "plots",
    "prunable",
    "prunable_weights",
    "prune",
    "prune_filters",
    "prune_threshold",
    "rebind_optimizer",
    "recalibrate",
    "reconstruct",
    "redraw",
    "regrow",
    "restore",
    "save",
    "schedule",
    "scope",
    "scores",
    "set_masks",
    "shuffle_masks",
    "sparsity_at",
    "statistics",
    "take_over",
    "track_importance",
    "trained",
    "widgets",
]


def __dir__() -> list[str]:
    return __all__
