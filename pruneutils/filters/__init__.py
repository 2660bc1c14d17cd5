"""Filters physically removed: coupling, slicing, measures, and how the removal is spread over training."""

from .gradual import gradual_filters
from .measures import MEASURES, Measure, filter_scores, track_importance
from .rebinding import rebind_optimizer
from .removal import filter_table, prune_filters
from .slicing import replay

__all__ = [
    "MEASURES",
    "Measure",
    "filter_scores",
    "filter_table",
    "gradual_filters",
    "prune_filters",
    "rebind_optimizer",
    "replay",
    "track_importance",
]
