"""A model pruned on trial: what any choice leaves and what it reaches, found on a copy; the model stays as it is."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .._checks import whole
from .._torch import LEFT_OUT, batches
from ..costs import cost, cost_table
from ..model_utils import Masks, accuracy, get_masks, layer_table, make_permanent, prunable_weights, set_masks
from ..plots.weights import LayerHistogram, weight_histograms
from ..pruning import LayerCollapseWarning, TiedScoresWarning, prune, scores
from ..pruning.granularities import Granularity
from ..pruning.scopes import Scope
from ..repair import recalibrate
from ..target import layer_name

_BINS = 61
_MOST = 100_000  # weights of a layer that its histogram looks at, evenly spaced
_WORK = 2_000_000_000  # multiply-accumulates between two looks at what the user wants: about a tenth of a second


@dataclass(frozen=True)
class Choice:
    """What the controls say."""

    criterion: str | Callable
    sparsity: float | None  # None where the granularity fixes it
    scope: str | Scope
    granularity: str | Granularity
    recalibrated: bool = False

    @property
    def label(self) -> str:
        """The name of its curve: the criterion, and what differs from the usual."""
        parts = [in_code(self.scope), in_code(self.granularity)]
        parts = [in_code(self.criterion), *(part for part in parts if part not in ('"global"', '"weight"'))]
        return ", ".join(parts).replace('"', "") + (", recal." if self.recalibrated else "")


class Reached(NamedTuple):
    """What was measured of one choice."""

    level: float  # the accuracy, or the perplexity
    macs: int  # multiply-accumulates of one sample without those by zeros
    collapsed: bool  # a layer has no weight left


class Trial:
    """What an explorer knows of a model, found anew when that has changed: what each choice `reached` (None: as is).

    `network` is the copy, pruned as was asked last, with its `masks` and the `messages` that `pu.prune` warned of.
    """

    def __init__(self, model: nn.Module, data, scoring_data, exclude=(), subset=256, loss_fn=None, seed=0):
        self.model, self.exclude, self.loss_fn, self.seed = model, exclude, loss_fn, seed
        self.subset = None if data is None else _few(data, subset)
        self.perplexity = torch.is_tensor(data)  # blocks of tokens
        self.measure = "perplexity" if self.perplexity else "accuracy"
        given = self.subset if scoring_data is None else scoring_data
        self.scoring_data = list(given) if isinstance(given, Iterator) else given
        self.release()

    def release(self) -> None:
        """Forget everything that can be found anew: the copy, the scores, the histograms."""
        self._seen = self._last = self.network = self.masks = None
        self._scores, self._bins, self.reached, self.messages = {}, {}, {}, []

    def _state(self):
        tensors = self.model.state_dict(keep_vars=True).values()
        return [(tensor.data_ptr(), tensor._version) for tensor in tensors], list(get_masks(self.model))

    def refresh(self) -> None:
        """Start anew if the model has changed: other weights have other scores."""
        if self._seen == self._state():
            return
        self.release()
        self.network = copy.deepcopy(self.model)
        self._present = get_masks(self.model)
        rows = weight_histograms(self.model, None if self._present else self.model, _BINS)
        for row, (name, weight) in zip(rows, prunable_weights(self.model).items()):
            values = weight.detach().float().cpu().numpy().ravel()
            places = np.clip((values / row.limit + 1) * (_BINS / 2), 0, _BINS - 1).astype(np.uint8)
            step = math.ceil(len(places) / _MOST)
            self._bins[name] = places[::step].copy(), step, row
        explored = prunable_weights(self.model, self.exclude)
        gone = sum(int((~mask).sum()) for name, mask in self._present.items() if name in explored)
        self.least = gone / sum(weight.numel() for weight in explored.values())  # what is pruned stays pruned
        if self.subset is not None:  # what a weight costs, once, by pruning all: counting is linear in the weights
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                prune(self.network, sparsity=1.0)
            table = cost_table(self.network, self.subset[0][:1])
            each = (table["macs"] - table["sparse_macs"]) // layer_table(self.network)["total"]
            self._macs_each = dict(zip(table["layer"], each.tolist()))
            self._macs = cost(self.model, self.subset[0][:1]).macs
            self.at_once = min(max(_WORK // max(self._macs, 1), 1), 500)  # samples
            self.quick = len(self.subset[1]) <= self.at_once
        self._seen = self._state()

    def prune(self, choice: Choice) -> Masks:
        """Prune the copy as chosen and return its masks; raises what `pu.prune` does."""
        self.refresh()
        if self._last == choice:
            return self.masks
        self._last = None  # should it not succeed
        kind, options = choice.criterion, {"exclude": self.exclude, "seed": self.seed}
        if kind not in self._scores:
            self._scores[kind] = scores(self.model, kind, self.scoring_data, loss_fn=self.loss_fn, **options)
            self._seen = self._state()  # scoring writes buffers back
        twin = make_permanent(self.network)
        twin.load_state_dict(self.model.state_dict())
        if self._present:
            set_masks(twin, self._present)

        def scored(model, data):
            return self._scores[kind]

        scored.__name__ = in_code(choice.criterion).strip('"')
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.masks = prune(twin, scored, choice.sparsity, choice.scope, choice.granularity, **options)
        if choice.recalibrated:
            recalibrate(twin, self.scoring_data)
        self.messages = [str(w.message) for w in caught if w.category in (TiedScoresWarning, LayerCollapseWarning)]
        self._last = choice
        return self.masks

    def histograms(self) -> list[LayerHistogram]:
        """Count what the masks keep of each layer, in the bins that the weights were sorted into once."""
        rows = {name: row for name, (*_, row) in self._bins.items()}
        for name in rows.keys() & self.masks.keys():
            (places, step, row), mask = self._bins[name], self.masks[name]
            counts = np.bincount(places[mask.cpu().numpy().ravel()[::step]], minlength=_BINS)
            scale = 1 if step == 1 else int(mask.sum()) / max(counts.sum(), 1)
            rows[name] = replace(row, counts=counts * scale)
        return list(rows.values())

    def evaluate(self, choice: Choice | None) -> Iterator[None]:
        """Measure a choice on the subset, a piece of it at a time, into `reached`."""
        if self.subset is None:
            raise TypeError("there is no data to measure on: sparsity_explorer(model, data)")
        if choice in self.reached:
            return
        total, (inputs, targets) = 0, self.subset
        for piece in zip(inputs.split(self.at_once), targets.split(self.at_once)):
            if choice is not None:
                self.prune(choice)
            network = self.model if choice is None else self.network
            if self.perplexity:
                total += accuracy(network, piece, metric=_loss_of_tokens) * len(piece[1])
            else:
                total += round(accuracy(network, piece) * len(piece[1]))
            yield
        masks = {} if choice is None else self.masks
        spared = sum(self._macs_each[layer_name(name)] * int((~mask).sum()) for name, mask in masks.items())
        collapsed = not all(mask.any() for mask in masks.values())
        level = total / len(targets)
        self.reached[choice] = Reached(np.exp(level) if self.perplexity else level, self._macs - spared, collapsed)

    def in_words(self, reached: Reached) -> str:
        """Return what was measured as people write it."""
        return f"{reached.level:,.1f}" if self.perplexity else f"{reached.level:.1%}"


def in_code(value: object) -> str:
    """Return how code names a choice: a string in quotes, a function by its name, other objects as they are written."""
    if isinstance(value, str):
        return f'"{value}"'
    ours = "pu." if type(value).__module__.startswith("pruneutils.") else ""
    return getattr(value, "__name__", f"{ours}{value!r}")


def _few(data, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return at most `n` samples as one pair: drawn from an image set, else evenly spaced in the first batches."""
    whole("subset", n)
    if torch.is_tensor(data):
        if data.ndim != 2 or data.is_floating_point() or data.shape[1] < 2:
            what = f"data: a tensor of shape {tuple(data.shape)} and {data.dtype}"
            raise ValueError(f"{what} is no blocks of tokens (N, T); give images with their targets, as a pair")
        data = [(data, F.pad(data[:, 1:], (0, 1), value=LEFT_OUT))]
    if hasattr(data, "batch"):
        return data.batch(min(n, len(data)))
    parts = []
    for part in batches(data):
        parts.append(part)
        if sum(len(targets) for _, targets in parts) >= n:
            break
    if not parts:
        raise ValueError("data holds no sample")
    inputs, targets = (torch.cat(tensors) for tensors in zip(*parts))
    step = max(1, len(targets) // n)
    return inputs[::step][:n], targets[::step][:n]


def _loss_of_tokens(logits, following):
    """Return each block's mean negative log-likelihood."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), following.flatten(), reduction="none")
    return losses.view_as(following)[:, :-1].mean(1)
