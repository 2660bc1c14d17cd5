"""Pictures in one style, drawn by seaborn and matplotlib: for a paper, and for a README in light and dark.

Fractions go in, percent is shown. Legends stand to the right of the Axes: figures made elsewhere need
`layout="constrained"` to leave room for them. `look.method_styles` gives a method the colour that it has everywhere.
"""

from . import look
from .layers import layer_bars, layer_histograms
from .look import style
from .runs import accuracy_vs_sparsity, curves, differences, dots
from .weights import weight_histograms

__all__ = ["accuracy_vs_sparsity", "curves", "differences", "dots", "layer_bars", "layer_histograms"]
__all__ += ["look", "style", "weight_histograms"]
