"""Neural network pruning for research: masks, criteria, schedules, experiments."""

from .criteria import criterion, list_criteria, scores
from .model_utils import (
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
from .pruning import LayerCollapseWarning, TiedScoresWarning, prune, prune_threshold
