"""Pictures in one style, drawn by seaborn and matplotlib: for a paper, and for a README in light and dark.

Fractions go in, percent is shown. Legends stand to the right of the Axes: figures made elsewhere need
`layout="constrained"` to leave room for them. `look.method_styles` gives a method the colour that it has everywhere.
"""

from . import look
from .comparisons import differences, dots
from .curves import accuracy_vs_sparsity, curves
from .histograms import layer_histograms
from .layers import layer_bars
from .look import save, style
from .weights import weight_histograms

__all__ = [
    "accuracy_vs_sparsity",
    "curves",
    "differences",
    "dots",
    "layer_bars",
    "layer_histograms",
    "look",
    "save",
    "style",
    "weight_histograms",
]
