"""Experiments: a grid times seeds becomes one tidy table, resumable, in one process or in many."""

from . import statistics
from .running import processes
from .sweeping import BOOKKEEPING, load, sweep

__all__ = ["BOOKKEEPING", "load", "processes", "statistics", "sweep"]
