"""Training of pruned (or dense) models, and the recipes that prune while training."""

from .backward import backward_pruned
from .dynamic import dynamic_sparsity, regrow
from .gradual import gradual, gradual_sparsity
from .loop import DivergenceError, fit
from .lottery import lottery_ticket

__all__ = ["DivergenceError", "fit", "gradual", "gradual_sparsity", "lottery_ticket"]
__all__ += ["backward_pruned", "dynamic_sparsity", "regrow"]
