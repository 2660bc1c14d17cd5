"""Panels for notebooks: move a slider and see which weights of one's own network stay, and what that costs."""

from .explorer import SparsityExplorer, sparsity_explorer

__all__ = ["SparsityExplorer", "sparsity_explorer"]
