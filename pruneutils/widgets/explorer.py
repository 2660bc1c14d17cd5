"""The sparsity explorer: plain widgets around a `Trial`. They hold the panel weakly; a deleted one closes them."""

import asyncio
import contextlib
import html
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import ipywidgets
import pandas as pd
import torch
from torch import nn

from .. import _checks
from ..model_utils import Masks, get_masks, set_masks
from ..pruning import criteria, list_criteria
from ..pruning.granularities import Granularity, find
from ..pruning.scopes import SCOPES, Scope
from .picture import Pictures
from .trial import Choice, Trial, in_code

_PLACES = (0.5, 0.9, 0.8, 0.95, 0.7, 0.98, 0.6, 0.99, 0.3, 0.85, 0.97, 0.93, 0.2, 0.75, 0.965, 0.4, 0.87, 0.985, 0.0)


def sparsity_explorer(
    model: nn.Module,
    data: object = None,
    scoring_data: object = None,
    *,
    criterion: str | Callable = "magnitude",
    sparsity: float = 0.5,
    scope: str | Scope = "global",
    granularity: str | Granularity = "weight",
    exclude: str | Iterable[str] = (),
    subset: int = 256,
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    seed: int = 0,
    style: str = "light",
) -> "SparsityExplorer":
    """Make a panel of sliders and pictures for pruning a model, which stays as it is until the choice is applied.

    Args:
        model, data: A classifier, and what accuracy is measured on, as `accuracy` takes it; or a language model and
            blocks of tokens (N, T) for its perplexity; without data any model.
        scoring_data: The batch for criteria that need data and for recalibrated batch norm; by default the subset.
        criterion, sparsity, scope, granularity: The choice at the start, as for `prune`.
        exclude, loss_fn, seed: As for `prune`.
        subset: How many samples of `data` are evaluated at every move, and for the curve.
        style: "light" or "dark".

    Returns:
        The panel: controls that code can set, such as `.slider`; `.masks`, `.text` and `.image` hold what is shown,
        `.curve()` measures over sparsity, `.apply()` prunes. It raises, and later shows, what `prune` raises.

    Example:
        >>> panel = pu.widgets.sparsity_explorer(pu.models.create("lenet300"))
        >>> panel.slider.value = 0.95  # moving the slider redraws
        >>> panel.masks
        Masks(3 weights, 13,310 of 266,200 kept, sparsity 0.9500)
    """
    _checks.fraction("sparsity", sparsity)
    trial = Trial(model, data, scoring_data, exclude, subset, loss_fn, seed)
    return SparsityExplorer(trial, Choice(criterion, sparsity, scope, granularity), style)


class SparsityExplorer:
    """The panel: `masks` are those of the present choice, None if it is not possible; `close()` takes it off the page.

    Controls: `slider`, `criterion`, `scope`, `granularity`, `recalibrated`, `button`. Shown: `image`, `course`, `text`.
    """

    def __init__(self, trial: Trial, choice: Choice, style: str):
        self.model, self.scoring_data = trial.model, trial.scoring_data
        self._trial, self._pictures = trial, Pictures(style, trial.measure)
        # JupyterLab brings moves on another thread than the one that measures: one at a time.
        self._turn, self._moves, self._task = threading.RLock(), 0, None
        trial.prune(choice)  # what is wrong with the arguments raises here
        self._make_widgets(choice)
        self._show()
        for control in (self.criterion, self.scope, self.granularity, self.slider, self.recalibrated):
            control.observe(_weakly(self._show), "value")
        self.button.on_click(_weakly(self.apply))
        self.box.observe(_weakly(self._viewed), "_view_count")
        self.close = weakref.finalize(self, _close, self.box)
        self.close.atexit = False

    def _make_widgets(self, choice):
        layout, named = ipywidgets.Layout, {"style": {"description_width": "76px"}}
        wide, wrap = layout(width="min(100%, 560px)"), layout(flex_flow="row wrap")
        known = [name for name in list_criteria() if _binds(name, self.scoring_data)]
        offered = {"criterion": known, "scope": SCOPES, "granularity": ("weight", "kernel", "filter", "2:4")}
        choosing = []
        for title, values in offered.items():
            chosen = getattr(choice, title)
            options = [(in_code(value).strip('"'), value) for value in dict.fromkeys([*values, chosen])]
            choosing.append(ipywidgets.Dropdown(options=options, value=chosen, description=title, **named))
        self.criterion, self.scope, self.granularity = choosing
        percent = {"min": 0, "max": 1, "step": 0.005, "readout_format": ".1%"}
        self.slider = ipywidgets.FloatSlider(choice.sparsity, description="sparsity", layout=wide, **percent, **named)
        norms = any(getattr(module, "running_mean", None) is not None for module in self.model.modules())
        disabled, words = not norms or self.scoring_data is None, "recalibrate batch norm"
        self.recalibrated = ipywidgets.Checkbox(False, description=words, indent=False, disabled=disabled)
        self.button = ipywidgets.Button(description="Apply to the model", tooltip="Prune the model as shown")
        self.course = ipywidgets.Image(format="png", layout=wide)
        self.image = ipywidgets.Image(format="png", layout=layout(width="100%", max_width="1100px"))
        self.text, self._code = ipywidgets.HTML(), ipywidgets.HTML()
        numbers = [self.text] if self._trial.subset is None else [self.course, self.text]
        rows = [choosing, [self.slider, self.recalibrated, self.button], numbers]
        self.box = ipywidgets.VBox([*(ipywidgets.HBox(row, layout=wrap) for row in rows), self._code, self.image])
        self.box._view_count = 0  # the browser then reports how often the panel is on the page

    def _repr_mimebundle_(self, **options) -> dict:
        self.box._explorer = self  # from now on the page holds it too
        return self.box._repr_mimebundle_(**options)

    @property
    def choice(self) -> Choice:
        """What the controls say."""
        sparsity = self.slider.value if find(self.granularity.value).fixed_sparsity() is None else None
        recalibrated = self.recalibrated.value and not self.recalibrated.disabled
        return Choice(self.criterion.value, sparsity, self.scope.value, self.granularity.value, recalibrated)

    @property
    def code(self) -> str:
        """The calls that do what is shown to a `model`; `batch` is the scoring data."""
        trial, choice = self._trial, self.choice
        arguments = ["model", in_code(choice.criterion)]
        if choice.sparsity is not None:
            arguments += [f"sparsity={choice.sparsity!r}", f"scope={in_code(choice.scope)}"]
        arguments.append(f"granularity={in_code(choice.granularity)}")
        arguments += ["data=batch"] if callable(choice.criterion) or not _binds(choice.criterion, None) else []
        arguments += ["loss_fn=loss_fn"] if trial.loss_fn is not None else []
        arguments += [f"exclude={trial.exclude!r}"] if trial.exclude else []
        arguments += [f"seed={trial.seed}"] if trial.seed else []
        return f"masks = pu.prune({', '.join(arguments)})" + "\npu.recalibrate(model, batch)" * choice.recalibrated

    def apply(self) -> Masks:
        """Prune the model as shown and return its masks. Raises ValueError if the present choice is not possible."""
        with self._turn:
            set_masks(self.model, self._trial.prune(self.choice))
            self._show()
            return get_masks(self.model)

    def curve(self, sparsities: Iterable[float] = _PLACES) -> pd.DataFrame:
        """Measure the present choice on the subset at these sparsities; a row for each, with what was measured."""
        with self._turn:
            self._show(later=False)
            chosen, reached = self.choice, self._trial.reached
            list(self._fill(sparsities))
            self._trial.prune(chosen)
        found = [(place, reached.get(replace(chosen, sparsity=place))) for place in sorted(sparsities)]
        rows = [(chosen.label, place, known.level) for place, known in found if known]
        return pd.DataFrame(rows, columns=["method", "sparsity", self._trial.measure])

    def _show(self, later: bool = True):
        """Bring everything to the present choice; `later` is what may follow while the panel rests."""
        self._moves += 1  # what is measured for an earlier one ends when it sees this
        self.masks, trial = None, self._trial
        self.slider.disabled = self.choice.sparsity is None
        trial.refresh()
        self.slider.min = trial.least
        self.masks = trial.prune(self.choice)
        later = later and asyncio._get_running_loop()  # None without a kernel: all is evaluated at once, or when asked
        if trial.subset is not None and (trial.quick or not later):
            list(itertools.chain(trial.evaluate(None), trial.evaluate(self.choice)))
        self._write()
        self._code.value = _copy_button(self.code)
        self.image.value = self._pictures.layers(trial.histograms())
        if trial.subset is not None:
            self._draw_curve()
            if later:
                self._task = later.create_task(self._go_on(self._moves))

    def _draw_curve(self):
        trial, choice = self._trial, self.choice
        place = trial.masks.sparsity if choice.sparsity is None else choice.sparsity
        self.course.value = self._pictures.curve(trial.reached, choice, place, len(trial.subset[1]))

    def _write(self, error: Exception | None = None):
        """Write the numbers, and what is wrong; screen readers read them out when they change."""
        trial, lines, alarms = self._trial, [], []
        here, before = (trial.reached.get(key) for key in (self.choice, None))
        if self.masks is not None:
            kept, total = self.masks.kept, self.masks.total
            lines.append(f"<b>{1 - kept / total:.2%} pruned</b>: {kept:,} of {total:,} weights kept")
            alarms += trial.messages
        if self.masks is not None and here:
            n, macs = len(trial.subset[1]), before.macs
            what, of = trial.measure, "blocks" if trial.perplexity else "images"
            lines.append(f"<b>{what} {trial.in_words(here)}</b> on {n:,} {of} (before: {trial.in_words(before)})")
            lines.append(f"<b>multiply-accumulates {here.macs:,}</b> of {macs:,} ({here.macs / macs:.1%})")
        alarms += [f"{type(error).__name__}: {error}"] if error else []
        for alarm in alarms:  # of long lists of layers the beginning
            alarm = html.escape(alarm if len(alarm) < 240 else f"{alarm[:220]} …")
            lines.append(f'<b style="color: #BC4C00; background: #fff">▲ {alarm}</b>')
        self.text.value = f'<div role="status" aria-live="polite" style="line-height: 1.5">{"<br>".join(lines)}</div>'

    def _fill(self, sparsities) -> Iterator[None]:
        """Measure the curve of the present choice at these places; of `_PLACES` those come first that say most."""
        chosen = self.choice
        for place in sparsities if chosen.sparsity is not None else ():
            tried = replace(chosen, sparsity=place)
            if tried not in self._trial.reached:
                with contextlib.suppress(ValueError):  # less than what is pruned already
                    yield from self._trial.evaluate(tried)
                    self._draw_curve()

    def _rest(self) -> Iterator[None]:
        """Everything that may follow a move, piece by piece."""
        yield from self._trial.evaluate(None)
        yield from self._trial.evaluate(self.choice)
        self._write()
        self._draw_curve()
        yield from self._fill(_PLACES)

    async def _go_on(self, move: int):
        """Measure between the messages that the kernel handles, until the next move."""
        pieces, going = self._rest(), True
        while going:
            await asyncio.sleep(0)
            with self._turn:
                if move != self._moves:
                    return
                try:
                    going = next(pieces, "end") is None
                except Exception as error:  # a task that nobody awaits would keep it to itself
                    return self._write(error)

    def _viewed(self):
        """The panel has come onto the page or gone from it: one that nobody sees or holds goes altogether."""
        self.box._explorer = self if self.box._view_count else None
        if not self.box._view_count:
            self._moves += 1
            self._trial.release()


def _weakly(method: Callable) -> Callable:
    """A callback that does not keep the panel alive, as a widget would."""
    reference = weakref.WeakMethod(method)

    def call(_):
        if bound := reference():
            panel = bound.__self__
            with panel._turn:
                try:
                    bound()
                except Exception as error:  # raised in a callback it would go to a log that nobody reads
                    panel._write(error)
                panel.button.disabled = panel.masks is None

    return call


def _close(widget) -> None:
    """Close a widget with all that belong to it."""
    widget._explorer = None
    for part in (*getattr(widget, "children", ()), getattr(widget, "layout", None), getattr(widget, "style", None)):
        if isinstance(part, ipywidgets.Widget):
            _close(part)
    widget.close()


def _binds(criterion: str, data) -> bool:
    """Return whether a criterion needs nothing but a model and these data."""
    with contextlib.suppress(ValueError):
        return criteria.bind(criterion, data, None, 0, {}) is not None
    return False


def _copy_button(text: str) -> str:
    """Return a button that copies `text`, beside the text itself; it works in the browser, without the kernel."""
    shown = html.escape(text, quote=True)
    copy = "navigator.clipboard.writeText(this.dataset.code).then(() => { this.textContent = 'copied' })"
    button = f'<button class="jupyter-button widget-button" style="width: 110px" data-code="{shown}" onclick="{copy}">'
    return f'{button}copy as code</button><code style="white-space: pre-wrap">{shown}</code>'
