"""Neural network pruning for research: masks, criteria, schedules, experiments. `import pruneutils as pu`."""

from typing import TYPE_CHECKING

import lazy_loader

from . import _checks
from .checkpoints import load, save
from .controls import inverted, overlap, overlap_matrix, redraw, shuffle_masks
from .costs import cost, cost_table
from .doctor import check
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
_ROOMS = ("data", "experiments", "models", "notebook", "plots", "widgets")
_load, _, _ = lazy_loader.attach(
    __name__, submodules={*_ROOMS, "studies"}, submod_attrs={"experiments": ["statistics"]}
)


def __getattr__(name: str) -> object:
    try:
        return _load(name)
    except AttributeError:
        if name.startswith("_"):  # such as those that a notebook asks every object for
            raise
        raise AttributeError(f"pruneutils has no {name!r}; {_suggestion(name)}", name=name) from None


def _suggestion(name: str) -> str:
    """Name what is nearest, in the rooms too."""
    known = {each: f"pu.{each}" for each in __all__}
    for room in (*_ROOMS, "statistics"):
        try:
            inside = vars(_load(room))
        except ImportError:  # such as widgets without ipywidgets: no reason to fail here
            continue
        public = inside.get("__all__") or [each for each, value in inside.items() if _is_own(value, each, room)]
        known |= {each: f"pu.{room}.{each}" for each in public}
    for each, place in known.items():
        if each.replace("_", "").lower() == name.replace("_", "").lower():
            return f"did you mean {place}?"
    return _checks.nearest(f"pu.{name}", known.values())


def _is_own(value: object, name: str, room: str) -> bool:
    return not name.startswith("_") and getattr(value, "__module__", "") == f"{__name__}.{room}"


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
    "check",
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
