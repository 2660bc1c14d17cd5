"""Experiments: a grid times seeds becomes one tidy table, resumable, on one core or a cluster."""

from . import statistics
from .sweeping import BOOKKEEPING, load, sweep
from .workers import processes

__all__ = ["BOOKKEEPING", "load", "processes", "statistics", "sweep"]
