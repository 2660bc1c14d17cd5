"""Checks of arguments that several rooms share; an error names the argument, the value given and those possible."""

import difflib
import sys
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def nearest(name: object, known: Iterable[object]) -> str:
    """End an error message about an unknown name: with the nearest known names, or with all of them."""
    known = {str(each).lower(): str(each) for each in known}
    close = difflib.get_close_matches(str(name).lower(), known, n=3)
    if close:
        return f"did you mean {' or '.join(repr(known[each]) for each in close)}?"
    return f"known: {', '.join(known.values())}"


def unknown(argument: str, value: object, known: Iterable[object]) -> ValueError:
    """Return the error for a name that nobody knows."""
    return ValueError(f"unknown {argument} {value!r}; {nearest(value, known)}")


def choose(argument: str, value: Any, known: Mapping[str, T]) -> T:
    """Return the choice with this name, or the value itself if it is callable."""
    if callable(value):
        return value
    if not isinstance(value, str) or value not in known:
        raise unknown(argument, value, known)
    return known[value]


def one_of(argument: str, value: T, known: Iterable[T]) -> T:
    """Return the value if it is one of the known ones."""
    known = tuple(known)
    if value not in known:
        raise unknown(argument, value, known)
    return value


def fraction(argument: str, value: Any) -> float:
    """Return the value if it is a number in [0, 1]."""
    if torch.is_tensor(value) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
        raise ValueError(f"{argument} must be a fraction in [0, 1], not {value!r}")
    return value


def whole(argument: str, value: Any, least: int = 1) -> int:
    """Return the value as an int if it is a whole number, of numpy too, of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{argument} must be a whole number of at least {least}, not {value!r}")
    return int(value)


def is_pair(data: object) -> bool:
    """Tell whether `data` is one (inputs, targets) pair of tensors."""
    return isinstance(data, (tuple, list)) and len(data) == 2 and all(torch.is_tensor(part) for part in data)


def callers_level() -> int:
    """Return the stacklevel, for a warning of whoever asks, of the first caller outside of this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(f"{__package__}."):
        frame, level = frame.f_back, level + 1
    return level
