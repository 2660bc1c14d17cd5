"""Training of pruned (or dense) models, and the recipes that prune while training."""

from .backward import backward_pruned
from .dynamic import drop_fraction_at, dynamic_sparsity, regrow
from .loop import DivergenceError, fit, gradual, lottery_ticket, trained

__all__ = [
    "DivergenceError",
    "backward_pruned",
    "drop_fraction_at",
    "dynamic_sparsity",
    "fit",
    "gradual",
    "lottery_ticket",
    "regrow",
    "trained",
]
