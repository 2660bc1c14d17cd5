"""The sparsity explorer: move a slider and see which weights of one's own network stay, and what that costs.

A panel holds plain widgets and draws into an image, so all of it works without a browser: set `panel.slider.value`.
"""

import asyncio
import copy
import html
import inspect
import io
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import ipywidgets
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import nn

from . import _checks, plots
from ._torch import batches
from .costs import cost, cost_table
from .model_utils import (
    Masks,
    accuracy,
    attach_masks,
    get_masks,
    layer_name,
    layer_table,
    make_permanent,
    masked,
    prunable_weights,
    set_masks,
)
from .plots.panel import draw_panel
from .plots.weights import BinnedWeights
from .pruning import criteria, granularities, plan
from .pruning.granularities import Granularity
from .pruning.scopes import SCOPES, Scope

_BATCH = 500  # images evaluated at a time: between two of them the panel listens
_PAUSE = 0.3  # seconds a choice has to stand before all of the data is evaluated
_DPI = 120
_TRUE = torch.ones((), dtype=torch.bool)
_ALARM, _TIE = "#BC4C00", "#A8548A"  # those of the pictures in light


def sparsity_explorer(
    model: nn.Module,
    data: object,
    scoring_data: object = None,
    *,
    criterion: str | Callable = "magnitude",
    sparsity: float = 0.5,
    scope: str | Scope = "global",
    granularity: str | Granularity = "weight",
    choices: Iterable[str | Callable] | None = None,
    exclude: str | Iterable[str] = (),
    subset: int = 256,
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    seed: int = 0,
    style: str = "light",
) -> "SparsityExplorer":
    """Make a panel of sliders and pictures for pruning a model, which stays as it is until the choice is applied.

    Args:
        model: Any classifier with convolution or linear layers.
        data: What accuracy is measured on, as `accuracy` takes it: `subset` images at once, and all of them when the
            choice stands.
        scoring_data: The batch, or batches, for criteria that need data. By default it is that subset.
        criterion: As for `prune`, like the next three: the choice that the panel starts with.
        sparsity: The fraction pruned.
        scope: Who competes with whom.
        granularity: What goes together.
        choices: The criteria offered, names or functions; by default all that need no option.
        exclude: Names or globs of layers to leave alone.
        subset: How many images are evaluated at every move.
        loss_fn: As for `prune`.
        seed: As for `prune`.
        style: "light" or "dark".

    Returns:
        The panel: its `.slider`, `.criterion`, `.scope` and `.granularity` can be set from code, `.masks`, `.text` and
        `.image` hold what is shown, and `.apply()` prunes the model. The masks are those of `prune`, to the bit.

    Raises:
        ValueError: For a choice that `prune` refuses; later the panel tells it.
        TypeError: As `prune` does.

    Example:
        >>> train, test = pu.data.load("digits")
        >>> model = pu.models.create("lenet300")
        >>> panel = pu.widgets.sparsity_explorer(model, test, sparsity=0.9)
        >>> panel.slider.value = 0.95  # moving the slider redraws
        >>> panel.masks
        Masks(3 weights, 13,310 of 266,200 kept, sparsity 0.9500)
    """
    return SparsityExplorer(
        model,
        data,
        scoring_data,
        choice=Choice(criterion, sparsity, scope, granularity),
        choices=choices,
        exclude=exclude,
        subset=subset,
        loss_fn=loss_fn,
        seed=seed,
        style=style,
    )


class Choice(NamedTuple):
    """What the controls say."""

    criterion: str | Callable
    sparsity: float | None  # None where the granularity fixes it
    scope: str | Scope
    granularity: str | Granularity


class SparsityExplorer(ipywidgets.VBox):
    """The panel of `sparsity_explorer`.

    Attributes:
        slider: The sparsity, a fraction.
        criterion: A dropdown, like `scope` and `granularity`.
        button: Applies the choice to the model.
        image: The picture, PNG.
        text: The numbers, HTML.
        masks: The masks of the present choice, None if it is not possible.
        ties: {parameter name: number of weights that tie at its cut}.
    """

    def __init__(
        self, model, data, scoring_data=None, *, choice, choices=None, exclude=(), subset=256, loss_fn=None, seed=0,
        style="light",
    ):  # fmt: skip
        _checks.fraction("sparsity", choice.sparsity)
        _checks.choose("scope", choice.scope, SCOPES)
        granularities.find(choice.granularity)
        self.model, self.masks, self.ties = model, None, {}
        self._exclude, self._loss_fn, self._seed, self._style = exclude, loss_fn, seed, style
        self._data = list(data) if iter(data) is data else data
        self._subset = _few(self._data, subset)
        self.scoring_data = self._subset if scoring_data is None else scoring_data
        self._seen = self._task = self._binned = None
        self._canvas = Figure()

        wide, wrap = ipywidgets.Layout(width="min(100%, 640px)"), ipywidgets.Layout(flex_flow="row wrap")
        named = {"style": {"description_width": "76px"}}
        fits_2_of_4 = all(weight.shape[1] % 4 == 0 for weight in prunable_weights(model, exclude).values())
        kinds = [*granularities.GRANULARITIES, *(["2:4"] if fits_2_of_4 else [])]
        offered = {
            "criterion": _without_options() if choices is None else choices,
            "scope": SCOPES,
            "granularity": kinds,
        }
        self.criterion, self.scope, self.granularity = (
            ipywidgets.Dropdown(options=_options(known, chosen), value=chosen, description=title, **named)
            for (title, known), chosen in zip(offered.items(), (choice.criterion, choice.scope, choice.granularity))
        )
        self.slider = ipywidgets.FloatSlider(
            choice.sparsity,
            min=0,
            max=1,
            step=0.005,
            readout_format=".1%",
            description="sparsity",
            layout=wide,
            **named,
        )
        self.button = ipywidgets.Button(description="Apply to the model", tooltip="Prune the model as shown")
        self.image = ipywidgets.Image(format="png", layout=ipywidgets.Layout(width="100%", max_width="1100px"))
        self.text = ipywidgets.HTML()
        controls = [self.criterion, self.scope, self.granularity]
        rows = [ipywidgets.HBox(row, layout=wrap) for row in (controls, [self.slider, self.button])]
        super().__init__([*rows, self.text, self.image])

        self._show()  # what is wrong with the arguments raises here; from now on the panel tells it
        for control in (self.slider, *controls):
            control.observe(self._redraw, "value")
        self.button.on_click(lambda _: self.apply())

    def __repr__(self):
        choice = f"{self.criterion.label}, {self.slider.value:g}, {self.scope.value}, {self.granularity.value}"
        return f"sparsity_explorer({choice})"

    def apply(self) -> Masks:
        """Prune the model as shown and return its masks. Raises ValueError if the present choice is not possible."""
        masks = self._select()
        ghost = self._ghost and {name: weight.clone() for name, weight in self._ghost.items()}
        set_masks(self.model, masks)
        self._refresh()
        self._ghost = ghost
        self._show()
        return get_masks(self.model)

    def accuracy(self) -> float:
        """The accuracy of the present choice on all of the data, a fraction in [0, 1]; raises as `apply` does."""
        self._show()
        self._stop()
        for _ in self._evaluate():
            pass
        self._tell()
        return self._full[self._key][0]

    def picture(self, save=None) -> Figure:
        """The panel's picture as a pyplot figure; `save` is a path without suffix, as for the functions of `plots`."""
        figure = self._draw(plt.figure(), self._style)
        if save is not None:
            for style, path in (("light", save), ("dark", f"{save}_dark.png")):
                plots.save(self._draw(Figure(), style), path)
        return figure

    # --- Masks -------------------------------------------------------------------------------------------------------

    @property
    def _key(self) -> Choice:
        """The present choice, by which results are cached."""
        fixed = granularities.find(self.granularity.value).fixed_sparsity() is not None
        sparsity = None if fixed else self.slider.value
        return Choice(self.criterion.value, sparsity, self.scope.value, self.granularity.value)

    def _select(self) -> Masks:
        """Find the masks of the present choice, as `prune` would, and put them on the twin."""
        self.masks, self.ties = None, {}
        self._refresh()
        choice = self._key
        contest = plan(self.model, choice.sparsity, choice.scope, choice.granularity, self._exclude)
        keep, ties = {}, {}
        for ranking, (_, target) in zip(self._rankings(choice.criterion, contest), contest.groups):
            n_units = ranking.cut(target)
            keep |= ranking.masks(n_units)
            ties |= ranking.ties(n_units)
        masks = dict(self._present)
        for name, mask in keep.items():
            masks[name] = mask.to(contest.weights[name].device) & masks.get(name, _TRUE)
        self.ties, self.masks = ties, Masks({name: masks[name] for name in self._positions})
        with torch.no_grad():
            sources, weights = prunable_weights(self.model), prunable_weights(self._twin)
            for name in self.masks:
                weights[name].copy_(sources[name])
        attach_masks(self._twin, self.masks)
        return self.masks

    def _rankings(self, criterion, contest) -> list:
        """One ranking for each of the competing groups: sorted when first asked for."""
        key = criterion, contest.unit, str([names for names, _ in contest.groups])
        if key not in self._ranked:
            if criterion not in self._scores:
                options = {"loss_fn": self._loss_fn, "seed": self._seed, "exclude": self._exclude}
                self._scores[criterion] = criteria.scores(self.model, criterion, self.scoring_data, **options)
                self._seen = self._state()  # scoring writes buffers back
            self._ranked[key] = []
            for names, _ in contest.groups:
                present = {name: contest.present[name] for name in names if name in contest.present}
                mine = {name: self._scores[criterion][name] for name in names}
                self._ranked[key].append(contest.unit.rank(mine, present))
        return self._ranked[key]

    def _state(self):
        """What changes when anything writes to the model: a training step, an apply, a move to another device."""
        tensors = self.model.state_dict(keep_vars=True).values()
        return [(tensor.data_ptr(), tensor._version) for tensor in tensors], list(masked(self.model).values())

    def _refresh(self):
        """Start anew if the model is no longer what the panel has seen: other weights have other scores."""
        if self._seen is not None and self._seen == self._state():
            return
        weights = prunable_weights(self.model, self._exclude)
        self._present = get_masks(self.model)
        # a model that comes pruned has lost the weights from before, one that is pruned here has not: see `apply`
        self._ghost = None if self._present else self._named(prunable_weights(self.model))
        self._scores, self._ranked, self._full, self._quick = {}, {}, {}, {}
        self._twin = make_permanent(copy.deepcopy(self.model))
        names = [name for name in prunable_weights(self.model) if name in weights or name in self._present]
        attach_masks(self._twin, {n: torch.zeros_like(w, dtype=torch.bool) for n, w in self._named(names).items()})
        # All costs are linear in the weights kept, so they are counted once, with none kept.
        self._empty = cost(self._twin, self._subset[0])
        table = cost_table(self._twin, self._subset[0]).set_index("layer")
        products = (table["macs"] - table["sparse_macs"]) // layer_table(self._twin).set_index("layer")["total"]
        self._positions = {name: int(products[layer_name(name)]) for name in names}
        self._before = accuracy(self.model, self._subset)
        self._seen = self._state()
        total = sum(weight.numel() for weight in weights.values())
        pruned = sum(int((~mask).count_nonzero()) for name, mask in self._present.items() if name in weights)
        self.slider.min = pruned / total

    def _named(self, names) -> dict[str, torch.Tensor]:
        weights = prunable_weights(self.model)
        return {name: weights[name].detach() for name in names}

    # --- What is shown -----------------------------------------------------------------------------------------------

    def _redraw(self, _change=None):
        try:
            self._show()
        except Exception as error:  # raised in a callback it would go to a log that nobody reads
            self.masks = None
            self.text.value = _line(f"{type(error).__name__}: {error}", _ALARM)
        self.button.disabled = self.masks is None

    def _show(self):
        self._stop()
        self.slider.disabled = granularities.find(self.granularity.value).fixed_sparsity() is not None
        self._select()
        if self._key not in self._quick:
            self._quick[self._key] = accuracy(self._twin, self._subset)
        figure, png = self._draw(self._canvas, self._style), io.BytesIO()
        figure.savefig(png, dpi=_DPI, facecolor=figure.get_facecolor(), pil_kwargs={"compress_level": 1})
        self._tell()
        self.image.value = png.getvalue()
        try:
            self._task = asyncio.get_running_loop().create_task(self._finish())
        except RuntimeError:
            pass  # no kernel, nobody to wait for: `accuracy` evaluates when asked

    def _draw(self, figure, style) -> Figure:
        weights = self._ghost or self._twin
        if self._binned is None or self._binned[0] is not weights:  # sorted into bins once, then counted at every move
            self._binned = weights, BinnedWeights(self._ghost or self._named(prunable_weights(self.model)))
        layers = self._binned[1].histograms(self.masks, before=weights is self._ghost)
        note = f"dotted: {sum(self.ties.values()):,} scores tie at the cut"
        return draw_panel(figure, layers, layer_table(self._twin), map(layer_name, self.ties), note, style)

    def _tell(self):
        kept, total = self.masks.kept, self.masks.total
        key, empty = self._key, self._empty
        if key in self._full:
            (reached, n), (before, _) = self._full[key], self._full[None]
            where = f"all {n:,} images"
        else:
            reached, before, where = self._quick[key], self._before, f"{len(self._subset[1]):,} images"
        counts = {name: int(mask.count_nonzero()) for name, mask in self.masks.items()}
        macs = empty.sparse_macs + sum(n * self._positions[name] for name, n in counts.items())
        sizes = {name: weight.element_size() for name, weight in self._named(counts).items()}
        size = empty.sparse_bytes + sum(n * sizes[name] for name, n in counts.items())
        lines = [
            f"<b>{1 - kept / total:.2%} pruned</b>: {kept:,} of {total:,} weights kept",
            f"<b>accuracy {reached:.1%}</b> on {where} (before: {before:.1%})",
            f"<b>multiply-accumulates {_si(macs)}</b> of {_si(empty.macs)} ({macs / empty.macs:.1%}) &nbsp; "
            f"<b>on disk {_si(size)}B</b> of {_si(empty.bytes)}B",
        ]
        collapsed = [layer_name(name) for name, n in counts.items() if not n]
        if collapsed:
            lines.append(_line(f"collapsed, no weight is left: {', '.join(collapsed)}", _ALARM))
        if self.ties:
            layers = ", ".join(f"{layer_name(name)}: {n:,}" for name, n in self.ties.items())
            text = f"{sum(self.ties.values()):,} weights tie at the cut, where position decides ({layers})"
            lines.append(_line(text, _TIE))
        self.text.value = "<br>".join(lines)

    # --- Accuracy on all of the data ---------------------------------------------------------------------------------

    def _evaluate(self) -> Iterator[None]:
        """Measure the model before and as chosen, a piece of the data at a time."""
        for key, model in ((None, self.model), (self._key, self._twin)):
            hits = n = 0
            for inputs, targets in _pieces(self._data) if key not in self._full else ():
                hits += round(accuracy(model, (inputs, targets)) * len(targets))
                n += len(targets)
                yield
            if n:
                self._full[key] = hits / n, n

    async def _finish(self):
        """Once the choice stands, evaluate it in full between the messages that the kernel handles."""
        await asyncio.sleep(_PAUSE)
        try:
            for _ in self._evaluate():
                await asyncio.sleep(0)
                if self._seen != self._state():
                    return
            self._tell()
        except Exception as error:  # a task that nobody awaits would keep it to itself
            self.text.value += "<br>" + _line(f"{type(error).__name__}: {error}", _ALARM)

    def _stop(self):
        if self._task is not None:
            self._task.cancel()
            self._task = None


def _options(known, chosen) -> list[tuple[str, object]]:
    """(label, value) of each choice offered, the one chosen at first included."""
    values = dict.fromkeys([*known, chosen])
    return [(value if isinstance(value, str) else getattr(value, "__name__", str(value)), value) for value in values]


def _without_options() -> list[str]:
    """The criteria that need nothing but a model and data."""
    names = []
    for name, function in criteria._CRITERIA.items():
        parameters = list(inspect.signature(function).parameters.values())[1:]
        needed = {p.name for p in parameters if p.default is p.empty}
        if needed <= {"data", "loss_fn", "seed"}:
            names.append(name)
    return names


def _few(data, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """At most `n` samples of `data` as one pair: drawn from an image set, evenly spaced in a pair, else the first."""
    if n < 1:
        raise ValueError(f"subset must be at least 1, not {n!r}")
    if hasattr(data, "batch"):
        return data.batch(min(n, len(data)))
    if _checks.is_pair(data):
        inputs, targets = data
        places = torch.arange(min(n, len(targets))) * len(targets) // min(n, len(targets))
        return inputs[places.to(inputs.device)], targets[places.to(targets.device)]
    parts, seen = [], 0
    for part in batches(data):
        parts.append(part)
        seen += len(part[1])
        if seen >= n:
            break
    if not seen:
        raise ValueError("data holds no sample")
    inputs, targets = (torch.cat(tensors) for tensors in zip(*parts))
    return inputs[:n], targets[:n]


def _pieces(data):
    for inputs, targets in batches(data):
        yield from zip(inputs.split(_BATCH), targets.split(_BATCH))


def _line(text: str, color: str) -> str:
    return f'<b style="color: {color}">▲ {html.escape(text)}</b>'


def _si(number: float) -> str:
    """A number with three digits and a prefix: 1.07 M."""
    prefixes = ["", "k", "M", "G"]
    while number >= 999.5 and len(prefixes) > 1:
        number /= 1000
        prefixes.pop(0)
    return f"{number:.3g} {prefixes[0]}"
