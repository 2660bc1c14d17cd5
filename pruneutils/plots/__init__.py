"""Pictures in one style: for a paper, for a README in light and dark, and fast enough for a slider.

Every function draws one picture and returns its Axes. All of them take
    ax     the Axes to draw into; without it a pyplot figure is made, which notebooks show and `plt.close()` frees
    style  "light" or "dark"; without it that of the enclosing `with style(...)`, else "light"
    save   a path without suffix: writes path.png and path.svg in light and path_dark.png in dark
Fractions go in, percent is shown. A picture is whole however it is saved: names, notes and legends count for the tight
bounding box that notebooks use.
"""

from .comparisons import differences
from .curves import accuracy_vs_flops, accuracy_vs_sparsity, curves, pareto_front
from .layers import layer_bars, mask_overlap, sparsity_heatmap
from .look import Style, method_styles, save, style
from .scores import score_distribution
from .stories import pruning_courses, ranked_kernels, stuck_threshold
from .ticks import percent
from .weights import LayerHistogram, layer_histograms, weight_histograms

__all__ = [
    "LayerHistogram",
    "Style",
    "accuracy_vs_flops",
    "accuracy_vs_sparsity",
    "curves",
    "differences",
    "layer_bars",
    "layer_histograms",
    "mask_overlap",
    "method_styles",
    "pareto_front",
    "percent",
    "pruning_courses",
    "ranked_kernels",
    "save",
    "score_distribution",
    "sparsity_heatmap",
    "stuck_threshold",
    "style",
    "weight_histograms",
]
