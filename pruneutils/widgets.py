"""The sparsity explorer: move a slider and see which weights of one's own network stay, and what that costs.

A panel holds plain widgets and draws into an image, so all of it works without a browser: set `panel.slider.value`.
"""

import asyncio
import copy
import html
import inspect
import io
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import ipywidgets
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import nn

from . import criteria, plots, pruning
from .costs import cost, cost_table
from .model_utils import (
    Masks,
    accuracy,
    attach_masks,
    get_masks,
    layer_name,
    layer_table,
    make_permanent,
    nearest,
    prunable_weights,
    set_masks,
)
from .selection import n_of_m, select_n_of_m, unit_scores, unit_shape

_BATCH = 500  # images evaluated at a time: between two of them the panel listens
_PAUSE = 0.3  # seconds a choice has to stand before all of the data is evaluated
_SIZE = (11.0, 5.0)  # inches
_ALARM, _TIE = "#D55E00", "#CC79A7"  # Okabe & Ito


@dataclass(frozen=True)
class Ranking:
    """The order in which the weights (kernels, filters) of one competition go, so that a mask is one comparison."""

    shapes: dict[str, tuple[int, ...]]  # by name: of the units, 1 where a unit spans a dimension
    ranks: torch.Tensor  # (units,) int32: place in the stable sort of all scores, what is pruned already first
    values: torch.Tensor  # (units,) scores in that order
    sizes: torch.Tensor  # (units,) int32: weights that are alive in each unit
    taken: torch.Tensor | None  # (units,) weights gone when a unit and all before it are; None: one a unit
    dead: int  # weights that were pruned already

    def cut(self, k: int) -> int:
        """How many units go when `k` weights are to be pruned in all, as `selection` decides it."""
        if self.taken is None:
            return k
        k -= self.dead
        going = int(torch.searchsorted(self.taken, k, right=True))
        if going < len(self.taken):
            less = int(self.taken[going - 1]) if going else 0
            going += int(self.taken[going]) - k < k - less
        return going

    def masks(self, going: int) -> dict[str, torch.Tensor]:
        """The unit masks, True = kept, by name and in the units' shape."""
        parts = (self.ranks >= going).split([torch.Size(shape).numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts)}

    def ties(self, going: int) -> dict[str, int]:
        """By name, how many weights score as much as the one at the cut, if the cut parts such ties."""
        if not 0 < going < len(self.values) or self.values[going - 1] != self.values[going]:
            return {}
        score = self.values[going]
        low, high = (int(torch.searchsorted(self.values, score, right=right)) for right in (False, True))
        tied = self.sizes * ((self.ranks >= low) & (self.ranks < high))
        parts = tied.split([torch.Size(shape).numel() for shape in self.shapes.values()])
        return {name: n for name, part in zip(self.shapes, parts) if (n := int(part.sum()))}


def rank(scores: Mapping[str, torch.Tensor], granularity: str, alive: Mapping[str, torch.Tensor]) -> Ranking:
    """Sort the units of `scores` {name: tensor} once; entries where `alive` (bool, missing ones all True) is False go first.

    `granularity` is "weight", "kernel" or "filter". `Ranking.masks` then gives what a selection of any k gives.
    """
    first = next(iter(scores.values()))
    if granularity == "weight":
        dtype = torch.float64 if any(s.dtype == torch.float64 for s in scores.values()) else torch.float32
        units = {name: s.to(dtype) for name, s in scores.items()}
    else:
        units = {name: unit_scores(s, granularity, alive.get(name), normalize=True) for name, s in scores.items()}
    sizes = []
    for name, s in scores.items():
        mask = alive.get(name, torch.ones((), dtype=torch.bool, device=s.device)).expand(s.shape)
        spanned = [dim for dim, size in enumerate(units[name].shape) if size != s.shape[dim]]
        sizes.append((mask.sum(spanned) if spanned else mask).flatten().to(first.device, torch.int32))
    sizes = torch.cat(sizes)
    values = torch.cat([unit.flatten().to(first.device) for unit in units.values()])
    values[sizes == 0] = -torch.inf
    values, order = values.sort(stable=True)
    ranks = torch.empty_like(sizes)
    ranks[order] = torch.arange(len(order), dtype=torch.int32, device=first.device)
    dead = sum(s.numel() for s in scores.values()) - int(sizes.sum())
    taken = None if granularity == "weight" else sizes[order].cumsum(0)
    return Ranking({name: tuple(u.shape) for name, u in units.items()}, ranks, values, sizes, taken, dead)


def sparsity_explorer(
    model: nn.Module,
    data,
    scoring_data=None,
    *,
    criterion="magnitude",
    sparsity: float = 0.5,
    scope: str = "global",
    granularity: str = "weight",
    choices: Iterable | None = None,
    exclude: Iterable[str] = (),
    subset: int = 256,
    loss_fn=None,
    seed: int = 0,
    style: str = "light",
) -> "SparsityExplorer":
    """A panel of sliders and pictures for pruning `model`, which stays as it is until the choice is applied.

    `data`, as `accuracy` takes it, is what accuracy is measured on: `subset` images at once, all of them when the
    choice stands. `scoring_data` (default: that subset) is the batch, or batches, for criteria that need data. `choices`
    are the criteria offered, names or callables; by default all that need no option. The other arguments are those of
    `prune`, whose masks the panel shows to the bit. Raises ValueError or TypeError as `prune` does.
    """
    return SparsityExplorer(
        model, data, scoring_data, criterion, sparsity, scope, granularity, choices, exclude, subset, loss_fn, seed, style
    )


class SparsityExplorer(ipywidgets.VBox):
    """The panel of `sparsity_explorer`.

    `.slider`, `.criterion`, `.scope`, `.granularity` and `.button` are the controls, `.image` (PNG) and `.text` (HTML)
    what they change; `.masks` is the present choice and `.ties` {parameter name: weights that tie at its cut}.
    """

    def __init__(
        self, model, data, scoring_data, criterion, sparsity, scope, granularity, choices, exclude, subset, loss_fn, seed,
        style,
    ):  # fmt: skip
        self.model, self.masks, self.ties = model, None, {}
        self._exclude, self._loss_fn, self._seed, self._style = exclude, loss_fn, seed, style
        self._data = list(data) if iter(data) is data else data
        self._subset = _first(self._data, subset)
        self.scoring_data = self._subset if scoring_data is None else scoring_data
        self._seen, self._task, self._canvas = None, None, None

        names = dict.fromkeys([*(_without_options() if choices is None else choices), criterion])
        options = [(name if isinstance(name, str) else getattr(name, "__name__", "custom"), name) for name in names]
        _check("scope", scope, pruning.SCOPES)
        weights = prunable_weights(model, exclude)
        granularities = ["weight", "kernel", "filter"]
        granularities += ["2:4"] if all(w.shape[1] % 4 == 0 for w in weights.values()) else []
        granularities += [granularity] if ":" in granularity and granularity not in granularities else []
        _check("granularity", granularity, granularities)

        wide, style_ = ipywidgets.Layout(width="min(100%, 720px)"), {"description_width": "76px"}
        self.slider = ipywidgets.FloatSlider(
            value=sparsity, min=0, max=1, step=0.005, readout_format=".1%", description="sparsity", layout=wide,
            style=style_,
        )  # fmt: skip
        self.criterion = ipywidgets.Dropdown(options=options, value=criterion, description="criterion", style=style_)
        self.scope = ipywidgets.Dropdown(options=pruning.SCOPES, value=scope, description="scope", style=style_)
        self.granularity = ipywidgets.Dropdown(
            options=granularities, value=granularity, description="granularity", style=style_
        )
        self.button = ipywidgets.Button(description="Apply to the model", tooltip="Prune the model as shown")
        self.image = ipywidgets.Image(format="png", layout=ipywidgets.Layout(width="100%", max_width="1100px"))
        self.text = ipywidgets.HTML()
        controls = (self.criterion, self.scope, self.granularity)
        boxes = [ipywidgets.HBox(controls, layout=ipywidgets.Layout(flex_flow="row wrap"))]
        boxes += [ipywidgets.HBox([self.slider, self.button], layout=ipywidgets.Layout(flex_flow="row wrap"))]
        super().__init__([*boxes, self.text, self.image])

        self._select()  # what is wrong with the arguments raises here; later it is told in the panel
        self._redraw()
        for control in (self.slider, *controls):
            control.observe(self._redraw, "value")
        self.button.on_click(lambda _: self.apply())

    def __repr__(self):
        name = self.criterion.label
        return f"sparsity_explorer({name}, {self.slider.value:g}, {self.scope.value}, {self.granularity.value})"

    # --- What is chosen ----------------------------------------------------------------------------------------------

    def apply(self) -> Masks:
        """Prune the model as shown and return its masks. Raises ValueError if the present choice is not possible."""
        self._refresh()
        set_masks(self.model, self._select())
        self._redraw()
        return get_masks(self.model)

    def accuracy(self) -> float:
        """The accuracy of the present choice on all of the data, a fraction; kept once it is known."""
        self._stop()
        for _ in self._evaluate():
            pass
        self._tell()
        return self._accuracies[self._key][0]

    @property
    def _key(self):
        sparsity = None if ":" in self.granularity.value else self.slider.value
        return self.criterion.value, self.scope.value, self.granularity.value, sparsity

    def _select(self) -> Masks:
        """Find the masks of the present choice, as `prune` would, and put them on the twin."""
        self.masks, self.ties = None, {}
        self._refresh()
        criterion, scope, granularity, sparsity = self._key
        weights = prunable_weights(self.model, self._exclude)
        groups = pruning._groups(weights, sparsity, scope, granularity)
        for names, target in groups:
            pruning._check_not_less(names, target, weights, self._present)
        rankings, ties = self._ranked(criterion, scope, granularity, [names for names, _ in groups]), {}
        masks = dict(self._present)
        for ranking, (_, target) in zip(rankings, groups):
            going = ranking.cut(target)
            ties |= ranking.ties(going)
            for name, mask in ranking.masks(going).items():
                masks[name] = mask.to(weights[name].device).expand(weights[name].shape)
                if granularity != "weight" and name in self._present:
                    masks[name] = masks[name] & self._present[name]
        self.ties = ties
        self.masks = Masks({name: masks[name].contiguous() for name in prunable_weights(self.model) if name in masks})
        return self.masks

    def _ranked(self, criterion, scope, granularity, groups):
        """The rankings of the competing groups: sorted once, found in the cache from then on."""
        key = criterion, granularity, scope == "global" and ":" not in granularity
        if key not in self._rankings:
            if criterion not in self._scores:
                options = {"loss_fn": self._loss_fn, "seed": self._seed, "exclude": self._exclude}
                self._scores[criterion] = criteria.scores(self.model, criterion, self.scoring_data, **options)
            scores = self._scores[criterion]
            if ":" in granularity:
                chosen = select_n_of_m(scores, *n_of_m(granularity), self._present)
                self._rankings[key] = [_Fixed(chosen)]
            else:
                parts = [{name: scores[name] for name in names} for names in groups]
                self._rankings[key] = [rank(part, granularity, self._present) for part in parts]
        return self._rankings[key]
