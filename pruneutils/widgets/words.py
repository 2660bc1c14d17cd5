"""What the explorer writes: the numbers, what is wrong, and the call that does the same."""

import html
from collections.abc import Callable, Iterable, Mapping

from ..model_utils import layer_name
from .trial import Choice

ALARM, TIE = "#BC4C00", "#A8548A"  # those of the pictures in light
_NAMED = 5  # layers named in a line


def numbers(pruned: int, total: int, reached: str, macs: tuple[int, int], size: tuple[int, int]) -> list[str]:
    """Return the lines that say what a choice leaves: weights, accuracy, multiply-accumulates and bytes."""
    return [
        f"<b>{pruned / total:.2%} pruned</b>: {total - pruned:,} of {total:,} weights kept",
        reached,
        f"<b>multiply-accumulates {si(macs[0])}</b> of {si(macs[1])} ({macs[0] / macs[1]:.1%})",
        f"<b>on disk {si(size[0])}B</b> of {si(size[1])}B",
    ]


def accuracy_line(reached: tuple[float, int] | None, before: tuple[float, int] | None, in_full: bool) -> str:
    """Return the line on accuracy; what is not known yet is dots."""
    if reached is None:
        return "<b>accuracy …</b>"
    where = f"all {reached[1]:,} images" if in_full else f"{reached[1]:,} images"
    told = "…" if before is None else f"{before[0]:.1%}"
    return f"<b>accuracy {reached[0]:.1%}</b> on {where} (before: {told})"


def warnings(collapsed: list[str], ties: Mapping[str, int]) -> list[str]:
    """Return the lines on layers without a weight and on ties at the cut."""
    lines = []
    if collapsed:
        lines.append(line(f"collapsed, no weight is left: {_listed(map(layer_name, collapsed))}", ALARM))
    if ties:
        layers = _listed(f"{layer_name(name)}: {n:,}" for name, n in ties.items())
        lines.append(line(f"{sum(ties.values()):,} weights tie at the cut, where position decides ({layers})", TIE))
    return lines


def _listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def line(text: str, color: str) -> str:
    """Return a line that stands out."""
    return f'<b style="color: {color}; background: #fff">▲ {html.escape(text)}</b>'


def told(lines: list[str]) -> str:
    """Return the text as HTML; screen readers read it out when it changes."""
    return f'<div role="status" aria-live="polite" style="line-height: 1.5">{"<br>".join(lines)}</div>'


def code(
    choice: Choice,
    *,
    total: int,
    needs_data: bool,
    exclude: object = (),
    loss_fn: Callable | None = None,
    seed: int = 0,
) -> str:
    """Return the calls that prune a model of `total` weights as chosen; they speak of `model` and `batch`."""
    arguments = ["model", named(choice.criterion)]
    if choice.sparsity is not None:
        # Other scopes and granularities round each layer, or whole units, by themselves.
        in_all = choice.scope == "global" and choice.granularity == "weight"
        arguments.append(f"sparsity={_shortest(choice.sparsity, total) if in_all else choice.sparsity!r}")
        arguments.append(f"scope={named(choice.scope)}")
    arguments.append(f"granularity={named(choice.granularity)}")
    arguments += ["data=batch"] if needs_data else []
    arguments += ["loss_fn=loss_fn"] if loss_fn is not None else []
    if exclude:
        arguments.append(f"exclude={exclude if isinstance(exclude, str) else list(exclude)!r}")
    arguments += [f"seed={seed}"] if seed else []
    call = f"masks = pu.prune({', '.join(arguments)})"
    return call + ("\npu.recalibrate(model, batch)" if choice.recalibrated else "")


def _shortest(sparsity: float, total: int) -> float:
    """Return the shortest decimal that asks for as many weights as this sparsity does."""
    decimals = (round(sparsity, digits) for digits in range(1, 18))
    return next(s for s in decimals if round(s * total) == round(sparsity * total))


def named(value: object) -> str:
    """Return how code names a choice: a string in quotes, a function by its name, other objects as they are written."""
    if isinstance(value, str):
        return f'"{value}"'
    own = getattr(value, "__name__", None)
    return own or (f"pu.{value!r}" if type(value).__module__.startswith("pruneutils.") else repr(value))


def copy_button(text: str) -> str:
    """Return a button that copies `text`, beside the text itself; it works in the browser, without the kernel."""
    shown = html.escape(text, quote=True)
    copying = (
        "const b = this, t = b.dataset.code, done = () => { b.textContent = 'copied'; "
        "setTimeout(() => b.textContent = 'copy as code', 1500) }; "
        "const byHand = () => { const a = document.createElement('textarea'); a.value = t; "
        "document.body.appendChild(a); a.select(); document.execCommand('copy'); a.remove(); b.focus(); done() }; "
        "navigator.clipboard ? navigator.clipboard.writeText(t).then(done, byHand) : byHand()"
    )
    button = (
        f'<button type="button" class="jupyter-button widget-button" data-code="{shown}" onclick="{copying}" '
        'style="min-width: 110px; width: auto">copy as code</button>'
    )
    code = f'<code style="white-space: pre-wrap; line-height: 1.4">{shown}</code>'
    return f'<div style="display: flex; gap: 8px; align-items: flex-start">{button}{code}</div>'


def si(number: float) -> str:
    """Return a number with three digits and a prefix: 1.07 M."""
    prefixes = ["", "k", "M", "G"]
    while number >= 999.5 and len(prefixes) > 1:
        number /= 1000
        prefixes.pop(0)
    return f"{number:.3g} {prefixes[0]}"
