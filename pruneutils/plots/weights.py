"""The weights of every layer, counted into the bins of histograms."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from .._checks import nearest
from ..model_utils import get_masks, layer_name, prunable_weights


@dataclass(frozen=True)
class LayerHistogram:
    """Counts of a layer's weights in bins equally wide from -limit to limit; the outermost reach to the last weight."""

    layer: str
    edges: np.ndarray  # of the bins, one more than there are bins
    counts: np.ndarray  # of the weights kept, from edges[i] to edges[i + 1]
    before: np.ndarray | None  # counts before pruning
    limit: float  # where the axis ends: the 99.95 % quantile of the magnitudes
    total: int  # weights, kept or not

    @property
    def kept(self) -> int:
        """The number of weights kept."""
        return int(self.counts.sum())

    def heights(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Return densities, kept and before, both relative to the layer's largest one."""
        widths = np.diff(self.edges)  # the outermost bins are wider: their counts would stand there as spikes
        kept, before = self.counts / widths, None if self.before is None else self.before / widths
        peak = max(kept.max(), 0 if before is None else before.max()) or 1
        return kept / peak, None if before is None else before / peak


def weight_histograms(
    model: nn.Module, before: nn.Module | Mapping | None = None, bins: int | None = None
) -> list[LayerHistogram]:
    """Count the weights that are kept in each prunable layer: by its mask, without a mask those that are not zero.

    Args:
        model, before: The network; and its weights before pruning: a model, a state_dict or {parameter name: tensor}.
        bins: Their number in every layer; by default it is odd, 19 to 81, and grows with the layer.

    Returns:
        One histogram a layer, in the order of the model; ValueError if `before` lacks one, or a weight is not finite.

    Example:
        >>> [(h.kept, h.total) for h in pu.plots.weight_histograms(torch.nn.Linear(2, 2), bins=3)]
        [(4, 4)]
    """
    weights, masks = prunable_weights(model), get_masks(model)
    if before is not None and not isinstance(before, Mapping):
        before = prunable_weights(before)
    layers, limits = {}, {}
    for name, weight in weights.items():
        if before is not None and name not in before:
            raise ValueError(f"before has no {name!r}; {nearest(name, before)}")
        now, old = _flat(weight, name), None if before is None else _flat(before[name], f"before: {name}")
        kept = now[masks[name].reshape(-1).cpu() if name in masks else now != 0]
        layers[name] = kept, old, now.numel()
        # With `before` the range follows all weights, so that it stands still while a slider moves the sparsity.
        limits[name] = _reach(kept) if old is None else max(_reach(old), _reach(now))
    widest, rows = max(limits.values(), default=0) or 1.0, []
    for name, (kept, old, total) in layers.items():
        limit = limits[name] or widest  # an empty layer has no range of its own
        n = bins or int(np.clip(2.2 * math.sqrt(total), 19, 81)) // 2 * 2 + 1
        counts, edges = _count(kept, n, limit)
        ghost = None if old is None else _count(old, n, limit)[0]
        for values in (kept,) if old is None else (kept, old):
            if len(values):
                edges[0], edges[-1] = min(edges[0], values.min()), max(edges[-1], values.max())
        rows.append(LayerHistogram(layer_name(name), edges, counts, ghost, limit, total))
    return rows


def _reach(values) -> float:
    """The magnitude that 99.95 % of the values do not exceed, exactly: one outlier must not set the axis."""
    beyond = len(values) - math.ceil(0.9995 * (len(values) - 1))
    return values.abs().topk(beyond).values[-1].item() if len(values) else 0.0


def _count(values, n, limit) -> tuple[np.ndarray, np.ndarray]:
    """How many of the values lie in each bin, those beyond the limit in the outermost; and the ends of the bins."""
    return np.histogram(values.clamp(-limit, limit).numpy(), n, (-limit, limit))


def _flat(tensor, name: str) -> torch.Tensor:
    """Return the values of a tensor in one dimension, on the CPU, in single or double precision; all must be finite."""
    values = torch.as_tensor(tensor).detach().cpu().reshape(-1)
    values = values if values.dtype == torch.float64 else values.float()
    if not values.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite")
    return values
