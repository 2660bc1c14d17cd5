"""The sparsity explorer: the panel around a `Trial`, which knows the model.

The panel holds plain widgets and draws into images, so all of it works without a browser: set `panel.slider.value`.
It is no widget itself. Widgets live until they are closed, and with them all that they hold; a panel that nobody holds
any more closes its widgets, and lets go of its copy of the model.
"""

import asyncio
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator

import ipywidgets
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from .. import _checks, plots
from ..model_utils import Masks, get_masks, layer_name, prunable_weights, set_masks
from ..plots.course import draw_course
from ..plots.panel import draw_panel, png
from ..pruning import criteria, granularities
from ..pruning.granularities import Granularity
from ..pruning.scopes import SCOPES, Scope
from . import film, words
from .trial import UNPRUNED, Choice, Trial

_PAUSE = 0.3  # seconds a choice has to stand before all of the data is evaluated
# The places at which the curve fills in, those first that say most.
_PLACES = (0.5, 0.9, 0.8, 0.95, 0.7, 0.98, 0.6, 0.99, 0.3, 0.85, 0.97, 0.995, 0.1, 0.4, 0.75, 0.925, 0.2, 0.65, 1.0)


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
        scoring_data: The batch, or batches, for criteria that need data, and for recalibrated batch norm. By default
            it is that subset.
        criterion: As for `prune`, like the next three: the choice that the panel starts with.
        sparsity: The fraction pruned.
        scope: Who competes with whom.
        granularity: What goes together.
        choices: The criteria offered, names or functions; by default all that need no option.
        exclude: Names or globs of layers to leave alone.
        subset: How many images are evaluated at every move, and for the curve.
        loss_fn: As for `prune`.
        seed: As for `prune`.
        style: "light" or "dark".

    Returns:
        The panel: its `.slider`, `.criterion`, `.scope`, `.granularity` and `.recalibrated` can be set from code,
        `.masks`, `.text`, `.code` and `.image` hold what is shown, `.curve()` measures accuracy over sparsity, and
        `.apply()` prunes the model. The masks are those of `prune`, to the bit.

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
        >>> print(panel.code)
        masks = pu.prune(model, "magnitude", sparsity=0.95, scope="global", granularity="weight")
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


def _in_turn(method: Callable) -> Callable:
    """Let one thread at a time into a panel: JupyterLab brings moves on another one than the one that measures."""

    @functools.wraps(method)
    def call(self, *arguments, **options):
        with self._turn:
            return method(self, *arguments, **options)

    return call


class SparsityExplorer:
    """The panel of `sparsity_explorer`.

    Attributes:
        slider: The sparsity, a fraction.
        criterion: A dropdown, like `scope` and `granularity`.
        recalibrated: Whether batch norm is measured anew before accuracy is; disabled for a model without.
        button: Applies the choice to the model.
        course: The curve of accuracy over sparsity, PNG.
        image: The picture of the weights, PNG.
        text: The numbers, HTML.
        box: The widget that holds all of these.
        masks: The masks of the present choice, None if it is not possible.
        ties: {parameter name: number of weights that tie at its cut}; an attention's projections have names of their
            own, such as "in_proj_weight[q]".
    """

    def __init__(
        self, model, data, scoring_data=None, *, choice, choices=None, exclude=(), subset=256, loss_fn=None, seed=0,
        style="light",
    ):  # fmt: skip
        _checks.fraction("sparsity", choice.sparsity)
        _checks.choose("scope", choice.scope, SCOPES)
        granularities.find(choice.granularity)
        self.masks, self.ties, self._style = None, {}, plots.look.find_style(style).name
        self._trial = Trial(
            model, data, scoring_data, exclude=exclude, subset=subset, loss_fn=loss_fn, seed=seed
        )  # fmt: skip
        self._turn, self._number = threading.RLock(), 0
        self._task, self._pending, self._wrong = None, iter(()), None
        self._places = set(_PLACES)  # of the curve; that of the dot is left to the dot, so that the rest can stay
        self._canvas, self._course_canvas = Figure(), Figure()
        self._make_widgets(model, exclude, choice, choices)
        # Widgets live until they are closed, wherever they are held.
        self._closing = weakref.finalize(self, _close, [*self._controls, *self._shown, self.box, *self.box.children])
        self._closing.atexit = False

        self._show()  # what is wrong with the arguments raises here; from now on the panel tells it
        redraw, apply, viewed = (_weakly(method) for method in (self._redraw, self._apply, self._viewed))
        for control in self._controls:
            if control is not self.button:
                control.observe(redraw, "value")
        self.button.on_click(apply)
        self.box.observe(viewed, "_view_count")

    def _make_widgets(self, model, exclude, choice, choices):
        wide, wrap = ipywidgets.Layout(width="min(100%, 560px)"), ipywidgets.Layout(flex_flow="row wrap")
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
        self.recalibrated = ipywidgets.Checkbox(
            value=False,
            indent=False,
            description="recalibrate batch norm",
            disabled=not self._trial.norms,
            tooltip="Measure the statistics of batch norm anew in the pruned model",
            layout=ipywidgets.Layout(width="auto"),
        )
        self.button = ipywidgets.Button(description="Apply to the model", tooltip="Prune the model as shown")
        self.course = ipywidgets.Image(format="png", layout=wide)
        self.image = ipywidgets.Image(format="png", layout=ipywidgets.Layout(width="100%", max_width="1100px"))
        self.text, self._code = ipywidgets.HTML(), ipywidgets.HTML()
        choosing = [self.criterion, self.scope, self.granularity]
        self._controls = [*choosing, self.slider, self.recalibrated, self.button]
        self._shown = [self.course, self.text, self._code, self.image]
        rows = [choosing, [self.slider, self.recalibrated, self.button], [self.course, self.text]]
        rows = [ipywidgets.HBox(row, layout=wrap) for row in rows]
        self.box = ipywidgets.VBox([*rows, self._code, self.image])
        self.box._view_count = 0  # the browser then tells how often the panel is on the page

    def __repr__(self) -> str:
        choice = f"{self.criterion.label}, {self.slider.value:g}, {self.scope.value}, {self.granularity.value}"
        return f"sparsity_explorer({choice})"

    def _repr_mimebundle_(self, **options) -> dict:
        """Show the panel; from now on the page holds it too."""
        self.box._explorer = self
        return self.box._repr_mimebundle_(**options)

    @property
    def model(self) -> nn.Module:
        """The model that is explored."""
        return self._trial.model

    @property
    def scoring_data(self) -> object:
        """The data that criteria see."""
        return self._trial.scoring_data

    @property
    def choice(self) -> Choice:
        """What the controls say."""
        fixed = granularities.find(self.granularity.value).fixed_sparsity() is not None
        sparsity = None if fixed else self.slider.value
        recalibrated = self.recalibrated.value and self._trial.norms
        return Choice(self.criterion.value, sparsity, self.scope.value, self.granularity.value, recalibrated)

    @property
    def code(self) -> str:
        """The calls that do what is shown to a `model`; `batch` is the scoring data."""
        trial, criterion = self._trial, self.choice.criterion
        needs_data = not isinstance(criterion, str) or "data" in _parameters(criterion)
        options = {"exclude": trial.exclude, "loss_fn": trial.loss_fn, "seed": trial.seed}
        return words.code(self.choice, total=trial.total, needs_data=needs_data, **options)

    @_in_turn
    def apply(self) -> Masks:
        """Prune the model as shown and return its masks. Raises ValueError if the present choice is not possible."""
        trial = self._trial
        masks, _ = trial.masks(self.choice)
        ghost = trial.ghost and {name: weight.clone() for name, weight in trial.ghost.items()}
        set_masks(self.model, masks)
        trial.refresh()
        trial.ghost = ghost
        self._show()
        return get_masks(self.model)

    @_in_turn
    def accuracy(self) -> float:
        """The accuracy of the present choice on all of the data, a fraction in [0, 1]; raises as `apply` does."""
        self._show(later=False)
        for _ in self._in_full():
            pass
        self._tell()
        return self._trial.reached[self.choice, True][0]

    @_in_turn
    def curve(self, sparsities: Iterable[float] = _PLACES) -> pd.DataFrame:
        """Measure accuracy over sparsity for the present criterion, scope and granularity, on the subset.

        Args:
            sparsities: Where to measure, fractions; those below what is pruned already are left out.

        Returns:
            A row for each place measured so far, in order: method, sparsity, accuracy.
        """
        self._show(later=False)
        for _ in self._fill(sparsities):
            pass
        self._draw_course()
        name = self._name(self.choice)
        return pd.DataFrame(
            [(name, *point) for point in self._lines()[name]], columns=["method", "sparsity", "accuracy"]
        )

    def picture(self, save=None) -> Figure:
        """The panel's picture as a pyplot figure; `save` is a path without suffix, as for the functions of `plots`."""
        figure = self._draw(plt.figure(), self._style)
        if save is not None:
            for style, path in (("light", save), ("dark", f"{save}_dark.png")):
                plots.save(self._draw(Figure(), style), path)
        return figure

    def frame(self, style: str | None = None, slider: bool = True) -> Image.Image:
        """The whole panel as one image, in "light" or "dark", with or without its slider: for films and pages."""
        return film.frame(self, style or self._style, slider)

    @_in_turn
    def close(self) -> None:
        """Take the panel off the page and let go of everything that it holds but the model."""
        self._stop()
        self._closing()
        self._trial.release()
        self.masks, self.ties = None, {}
        self._canvas, self._course_canvas = Figure(), Figure()

    # --- What is shown -----------------------------------------------------------------------------------------------

    @_in_turn
    def _redraw(self, _change=None):
        try:
            self._show()
        except Exception as error:  # raised in a callback it would go to a log that nobody reads
            self._stop()
            self.masks = None
            self.text.value = words.told([words.line(f"{type(error).__name__}: {error}", words.ALARM)])
        self.button.disabled = self.masks is None

    @_in_turn
    def _apply(self, _button=None):
        try:
            self.apply()
        except Exception as error:
            self._report(error)

    def _show(self, later: bool = True):
        """Bring everything to the present choice; `later` is what may follow while the panel rests."""
        self._stop()
        self._wrong, trial = None, self._trial
        self.slider.disabled = granularities.find(self.granularity.value).fixed_sparsity() is not None
        self._select()
        if trial.is_quick() or not later or not _in_a_loop():
            for _ in self._quickly():
                pass
        self._tell()
        self._code.value = words.copy_button(self.code)
        self.image.value = png(self._draw(self._canvas, self._style))
        self._draw_course()
        if later and _in_a_loop():
            self._pending = self._rest()
            self._task = asyncio.get_running_loop().create_task(_go_on(weakref.ref(self), self._number))

    def _select(self) -> Masks:
        """Find the masks of the present choice, as `prune` would."""
        self.masks, self.ties = None, {}
        self._trial.refresh()
        self.slider.min = self._trial.least
        self.masks, self.ties = self._trial.masks(self.choice)
        return self.masks

    def _draw(self, figure, style) -> Figure:
        note = f"dotted: {sum(self.ties.values()):,} scores tie at the cut"
        layers, table = self._trial.histograms(self.masks), self._trial.table(self.masks)
        tied = [layer_name(part.partition("[")[0]) for part in self.ties]  # a picture has a row for a weight
        return draw_panel(figure, layers, table, tied, note, style)

    def _draw_course(self):
        self.course.value = png(self._draw_course_on(self._course_canvas, self._style))

    def _draw_course_on(self, figure, style) -> Figure:
        trial, choice = self._trial, self.choice
        place = self.masks.sparsity if choice.sparsity is None else choice.sparsity
        here, before = trial.reached.get((choice, False)), trial.reached.get((UNPRUNED, False))
        collapse = trial._collapses.get(choice._replace(sparsity=None, recalibrated=False))
        known = (place, here and here[0]), collapse, before and before[0], len(trial.subset[1])
        return draw_course(figure, self._lines(), self._name(choice), *known, style)

    def _lines(self) -> dict[str, list[tuple[float, float]]]:
        """What has been measured on the subset: {name: points in the order of sparsity}."""
        lines = {self._name(self.choice): []}
        for (choice, in_full), (accuracy, _) in self._trial.reached.items():
            if not in_full and choice.sparsity in self._places:
                lines.setdefault(self._name(choice), []).append((choice.sparsity, accuracy))
        return {name: sorted(points) for name, points in lines.items()}

    def _name(self, choice) -> str:
        """A curve's name: its criterion, and what differs from the usual."""
        parts = [words.named(choice.criterion).strip('"')]
        usual = {"scope": "global", "granularity": "weight"}
        parts += [words.named(v).strip('"') for k in usual if (v := getattr(choice, k)) != usual[k]]
        return ", ".join(parts) + (", recal." if choice.recalibrated else "")

    def _tell(self):
        trial, choice, masks = self._trial, self.choice, self.masks
        in_full = (choice, True) in trial.reached and (UNPRUNED, True) in trial.reached
        reached, before = (trial.reached.get((key, in_full)) for key in (choice, UNPRUNED))
        macs, size = trial.price(masks)
        said = words.accuracy_line(reached, before, in_full)
        sizes = (macs, trial.empty.macs), (size, trial.empty.bytes)
        lines = words.numbers(masks.total - masks.kept, masks.total, said, *sizes)
        lines += words.warnings(trial.emptied(masks), self.ties)
        if self._wrong:
            lines.append(words.line(self._wrong, words.ALARM))
        self.text.value = words.told(lines)

    def _report(self, error):
        """Tell on the panel what has gone wrong beside it."""
        self._wrong = f"{type(error).__name__}: {error}"
        if self.masks is None:
            self.text.value = words.told([words.line(self._wrong, words.ALARM)])
        else:
            self._tell()

    # --- What is measured while the panel rests ----------------------------------------------------------------------

    def _quickly(self) -> Iterator[None]:
        """Measure the model before and as chosen on the subset."""
        yield from self._trial.evaluate(UNPRUNED, None)
        yield from self._trial.evaluate(self.choice, self.masks)

    def _in_full(self) -> Iterator[None]:
        """Measure the same on all of the data."""
        yield from self._trial.evaluate(UNPRUNED, None, in_full=True)
        yield from self._trial.evaluate(self.choice, self.masks, in_full=True)

    def _fill(self, sparsities) -> Iterator[None]:
        """Measure the curve of the present choice, and where a layer collapses."""
        trial, choice = self._trial, self.choice
        trial.collapse(choice)
        yield
        sparsities = [float(place) for place in sparsities] if choice.sparsity is not None else []
        self._places.update(sparsities)
        for place in sparsities:
            here = choice._replace(sparsity=place)
            if place < trial.least or (here, False) in trial.reached:
                continue
            try:
                masks, _ = trial.masks(here)
            except ValueError:  # less than some layer has already
                continue
            yield from trial.evaluate(here, masks)
            yield

    def _rest(self) -> Iterator[float]:
        """Everything that may follow a move, piece by piece: how many seconds to wait before the next one."""
        for _ in self._quickly():
            yield 0
        self._tell()
        self._draw_course()
        yield _PAUSE
        for _ in self._in_full():
            yield 0
        self._tell()
        for number, _ in enumerate(self._fill(_PLACES)):
            if number % 8 == 0:
                self._draw_course()
            yield 0
        self._draw_course()

    @_in_turn
    def _go_on(self, number: int) -> float | None:
        """Do the next piece of what is pending; the seconds to wait after it, None at the end, or after a new move."""
        try:
            if number != self._number or self._trial.changed():  # trained or pruned from elsewhere: a move starts anew
                return None
            return next(self._pending, None)
        except Exception as error:  # a task that nobody awaits would keep it to itself
            self._report(error)
            return None

    def _stop(self):
        self._number += 1  # a task of another thread's loop cannot be cancelled from here; it ends when it sees this
        self._task, self._pending = None, iter(())

    @_in_turn
    def _viewed(self, change):
        """The panel has come onto the page or gone from it: one that nobody sees or holds goes altogether."""
        if change["new"]:
            self.box._explorer = self
        else:
            self.box._explorer = None
            self._stop()
            self._trial.release()


async def _go_on(panel: weakref.ref, number: int) -> None:
    """Let a panel go on between the messages that the kernel handles, for as long as somebody holds it."""
    while (held := panel()) is not None:
        wait = held._go_on(number)
        del held
        if wait is None:
            return
        await asyncio.sleep(wait)


def _weakly(method: Callable) -> Callable:
    """A callback that does not keep the panel alive: a widget would."""
    reference = weakref.WeakMethod(method)

    def call(*arguments):
        bound = reference()
        return None if bound is None else bound(*arguments)

    return call


def _close(parts) -> None:
    """Close widgets, with the layouts and styles that belong to them."""
    for widget in parts:
        widget._explorer = None
        for owned in (getattr(widget, "layout", None), getattr(widget, "style", None)):
            if isinstance(owned, ipywidgets.Widget):
                owned.close()
        widget.unobserve_all()
        widget.close()


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
        return True
    except RuntimeError:  # no kernel, nobody to wait for: accuracy is evaluated at once, the curve when asked
        return False


def _options(known, chosen) -> list[tuple[str, object]]:
    """(label, value) of each choice offered, the one chosen at first included."""
    values = dict.fromkeys([*known, chosen])
    return [(value if isinstance(value, str) else getattr(value, "__name__", str(value)), value) for value in values]


def _parameters(criterion: str) -> dict[str, inspect.Parameter]:
    """What a registered criterion takes beside the model."""
    return dict(list(inspect.signature(criteria._CRITERIA[criterion]).parameters.items())[1:])


def _without_options() -> list[str]:
    """The criteria that need nothing but a model and data."""
    needed = {
        name: {key for key, parameter in _parameters(name).items() if parameter.default is parameter.empty}
        for name in criteria._CRITERIA
    }
    return [name for name, options in needed.items() if options <= {"data", "loss_fn", "seed"}]
