"""Training of pruned (or dense) models, and the recipes that prune while training."""

from .backward import backward_pruned
from .dynamic import drop_fraction_at, dynamic_sparsity, regrow
from .gradual_filters import gradual_filters
from .gradual_pruning import gradual, gradual_sparsity
from .loop import DivergenceError, fit
from .lottery import lottery_ticket
from .networks import trained

__all__ = [
    "DivergenceError",
    "backward_pruned",
    "drop_fraction_at",
    "dynamic_sparsity",
    "fit",
    "gradual",
    "gradual_filters",
    "gradual_sparsity",
    "lottery_ticket",
    "regrow",
    "trained",
]
