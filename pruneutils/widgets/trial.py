"""A model pruned on trial: the masks of any choice at once, what they cost and what they reach; the model stays."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import pandas as pd
import torch
from torch import nn

from .._prunable import join_parts, split_parts
from ..costs import Cost, cost, cost_table
from ..model_utils import (
    Masks,
    accuracy,
    attach_masks,
    get_masks,
    layer_name,
    layer_table,
    make_permanent,
    masked,
    prunable_weights,
)
from ..plots.weights import BinnedWeights, LayerHistogram
from ..pruning import Plan, criteria, plan
from ..pruning.granularities import Granularity
from ..pruning.ranking import Ranking
from ..pruning.repair import recalibrate
from ..pruning.scopes import Scope
from .samples import few, images_at_a_time, pieces

_TRUE = torch.ones((), dtype=torch.bool)


class Choice(NamedTuple):
    """What the controls say."""

    criterion: str | Callable
    sparsity: float | None  # None where the granularity fixes it
    scope: str | Scope
    granularity: str | Granularity
    recalibrated: bool = False


UNPRUNED = Choice("", None, "", "")  # stands for the model as it is


class Trial:
    """What an explorer knows of a model. All of it is computed when it is first asked for, and anew after a change.

    Attributes:
        reached: {(choice, in full): (accuracy, number of images)}; UNPRUNED is the model as it is.
        ghost: {parameter name: weights before pruning}, None if the model came pruned.
    """

    def __init__(
        self, model: nn.Module, data: object, scoring_data: object = None, *, exclude: str | Iterable[str] = (),
        subset: int = 256, loss_fn: Callable | None = None, seed: int = 0,
    ):  # fmt: skip
        self.model, self.exclude, self.loss_fn, self.seed = model, exclude, loss_fn, seed
        self.data = list(data) if iter(data) is data else data
        self.subset = few(self.data, subset)
        self.scoring_data = self.subset if scoring_data is None else scoring_data
        self.norms = any(getattr(m, "running_mean", None) is not None for m in model.modules())
        self.release()

    def release(self) -> None:
        """Forget everything that can be computed anew: the copy, the scores, the histograms."""
        self._seen = self._binned = self._twin = self._on_twin = self.ghost = None
        self._scores, self._ranked, self.reached, self._collapses = {}, {}, {}, {}

    # --- Masks -------------------------------------------------------------------------------------------------------

    def masks(self, choice: Choice) -> tuple[Masks, dict[str, int]]:
        """Find the masks of a choice, as `prune` would, and {parameter name: number of weights that tie at its cut}.

        Weights that hold several layers, such as the projections of attention, tie in parts: "in_proj_weight[q]".
        """
        self.refresh()
        contest = self._contest(choice)
        alive, ties = dict(contest.present), {}
        for ranking, (_, target) in zip(self._rankings(choice.criterion, contest), contest.groups):
            n_units = ranking.cut(target)
            for part, mask in ranking.masks(n_units).items():
                mask = mask.to(contest.weights[part].device)
                alive[part] = mask & alive[part] if part in alive else mask
            ties |= ranking.ties(n_units)
        found = self._present | join_parts(contest.whole, {part: alive[part] for part in contest.weights})
        return Masks({name: found[name] for name in self._products}), ties

    def _contest(self, choice: Choice) -> Plan:
        """Return who competes with whom, as in `prune`."""
        return plan(self.model, choice.sparsity, choice.scope, choice.granularity, self.exclude, split=True)

    def emptied(self, masks: Masks) -> list[str]:
        """Return the names of the layers that have no weight left, those that share a weight one by one."""
        return [name for name, mask in split_parts(self.model, masks).items() if not mask.any()]

    def collapse(self, choice: Choice) -> float | None:
        """Return the sparsity from which on a layer is empty, to a thousandth; None if none below 1 is."""
        self.refresh()
        key = choice._replace(sparsity=None, recalibrated=False)
        if key not in self._collapses:
            low, high = self.least, 1 - 1e-4
            if choice.sparsity is None or not self._empties(choice, high):
                self._collapses[key] = None
            else:
                while high - low > 5e-4:
                    middle = (low + high) / 2
                    low, high = (low, middle) if self._empties(choice, middle) else (middle, high)
                self._collapses[key] = high
        return self._collapses[key]

    def _empties(self, choice, sparsity) -> bool:
        try:
            contest = self._contest(choice._replace(sparsity=sparsity))
        except ValueError:  # less than a layer has already
            return False
        rankings = self._rankings(choice.criterion, contest)
        return any(
            isinstance(ranking, Ranking) and ranking.cut(target) > min(ranking.last)
            for ranking, (_, target) in zip(rankings, contest.groups)
        )

    def _rankings(self, criterion, contest) -> list:
        """One ranking for each of the competing groups: sorted when first asked for."""
        key = criterion, contest.unit, str([names for names, _ in contest.groups])
        if key not in self._ranked:
            if criterion not in self._scores:
                options = {"loss_fn": self.loss_fn, "seed": self.seed, "exclude": self.exclude}
                found = criteria.scores(self.model, criterion, self.scoring_data, **options)
                self._scores[criterion] = split_parts(self.model, found)
                self._seen = self._state()  # scoring writes buffers back
            self._ranked[key] = []
            for names, _ in contest.groups:
                present = {name: contest.present[name] for name in names if name in contest.present}
                mine = {name: self._scores[criterion][name] for name in names}
                self._ranked[key].append(contest.unit.rank(mine, present))
        return self._ranked[key]

    # --- The model, and the copy of it that is pruned ----------------------------------------------------------------

    def _state(self):
        """What changes when anything writes to the model: a training step, an apply, a move to another device."""
        tensors = self.model.state_dict(keep_vars=True).values()
        return [(tensor.data_ptr(), tensor._version) for tensor in tensors], list(masked(self.model).values())

    def changed(self) -> bool:
        """Tell whether the model is no longer what was seen of it."""
        return self._seen is None or self._seen != self._state()

    def refresh(self) -> None:
        """Start anew if the model has changed: other weights have other scores."""
        if not self.changed():
            return
        self.release()
        weights = prunable_weights(self.model, self.exclude)
        self._present = get_masks(self.model)
        # a model that comes pruned has lost the weights from before, one that is pruned here has not: see `apply`
        self.ghost = None if self._present else named_weights(self.model)
        twin = make_permanent(copy.deepcopy(self.model))
        names = [name for name in prunable_weights(self.model) if name in weights or name in self._present]
        copies = prunable_weights(twin)
        attach_masks(twin, {name: torch.zeros_like(copies[name], dtype=torch.bool) for name in names})
        # All costs are linear in the weights kept, so they are counted once, with none kept.
        self.empty: Cost = cost(twin, self.subset[0])
        table = cost_table(twin, self.subset[0]).set_index("layer")
        saved = (table["macs"] - table["sparse_macs"]) // layer_table(twin).set_index("layer")["total"]
        self._products = {name: int(saved[layer_name(name)]) for name in names}
        self._sizes = {name: weights.element_size() for name, weights in copies.items()}
        self._twin = make_permanent(twin)  # so that it has neither masks nor hooks: only zeros
        self._statistics = [buffer.clone() for buffer in twin.buffers()]
        self._at_a_time = images_at_a_time(self.empty.macs)
        self._seen = self._state()
        self.total = total = sum(weight.numel() for weight in weights.values())
        pruned = sum(int((~mask).count_nonzero()) for name, mask in self._present.items() if name in weights)
        self.least = pruned / total

    @torch.no_grad()
    def network(self, masks: Masks, recalibrated: bool = False) -> nn.Module:
        """Return the copy of the model with these masks, and with batch norm measured anew if asked."""
        if self._on_twin != (id(masks), recalibrated) or self._masks_on_twin is not masks:
            self._on_twin = None
            sources, weights = prunable_weights(self.model), prunable_weights(self._twin)
            for name, mask in masks.items():
                source = sources[name].detach()
                torch.where(mask, source, source.new_zeros(()), out=weights[name].detach())
            for buffer, value in zip(self._twin.buffers(), self._statistics):
                buffer.copy_(value)
            if recalibrated and self.norms:
                recalibrate(self._twin, _inputs(self.scoring_data))
            self._on_twin, self._masks_on_twin = (id(masks), recalibrated), masks
        return self._twin

    # --- What it costs and reaches -----------------------------------------------------------------------------------

    def price(self, masks: Masks) -> tuple[int, int]:
        """Return the multiply-accumulates of one image and the bytes on disk, as `cost` counts them."""
        kept = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
        macs = self.empty.sparse_macs + sum(n * self._products[name] for name, n in kept.items())
        return macs, self.empty.sparse_bytes + sum(n * self._sizes[name] for name, n in kept.items())

    def table(self, masks: Masks) -> pd.DataFrame:
        """Return the `layer_table` that the model would have."""
        rows = []
        for name, weight in prunable_weights(self.model).items():
            kept = int((masks[name] if name in masks else weight.detach()).count_nonzero())
            rows.append((layer_name(name), weight.numel(), kept))
        return pd.DataFrame(rows, columns=["layer", "total", "kept"])

    def histograms(self, masks: Masks) -> list[LayerHistogram]:
        """Count the weights kept of each layer; they are sorted into bins once."""
        weights = self.ghost or named_weights(self.model)
        if self._binned is None:
            self._binned = BinnedWeights(weights)
        return self._binned.histograms(masks, before=self.ghost is not None)

    def is_quick(self) -> bool:
        """Tell whether the subset takes no longer than the user can wait for between two moves."""
        return len(self.subset[1]) <= self._at_a_time

    def evaluate(self, choice: Choice, masks: Masks | None, in_full: bool = False) -> Iterator[None]:
        """Measure accuracy, a piece of the data at a time, into `reached`; None for masks is the model as it is."""
        key = choice, in_full
        if key in self.reached:
            return
        hits = n = 0
        for inputs, targets in pieces(self.data if in_full else self.subset, self._at_a_time):
            network = self.model if masks is None else self.network(masks, choice.recalibrated)
            hits += round(accuracy(network, (inputs, targets)) * len(targets))
            n += len(targets)
            yield
        self.reached[key] = hits / n, n


def named_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return {parameter name: weight} of the prunable layers, detached."""
    return {name: weight.detach() for name, weight in prunable_weights(model).items()}


def _inputs(data):
    """The inputs alone: batch norm needs no targets, and nothing has to be evaluated."""
    if torch.is_tensor(data):
        return data
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(map(torch.is_tensor, data)):
        return data[0]
    return [batch if torch.is_tensor(batch) else batch[0] for batch in data]
