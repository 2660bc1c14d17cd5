"""Checks of arguments that several rooms share; an error names the argument, the value given and those possible."""

import contextlib
import difflib
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")


def nearest(name: object, known: Iterable[object]) -> str:
    """End an error message about an unknown name: with the nearest known names, or with all of them."""
    known = {str(each).lower(): str(each) for each in known}
    if close := difflib.get_close_matches(str(name).lower(), known, n=3):
        return f"did you mean {' or '.join(repr(known[each]) for each in close)}?"
    return f"known: {', '.join(known.values())}"


def unknown(argument: str, value: object, known: Iterable[object]) -> ValueError:
    """Return the error for a name that nobody knows."""
    return ValueError(f"unknown {argument} {value!r}; {nearest(value, known)}")


def one_of(argument: str, value: T, known: Iterable[T]) -> T:
    """Return the value if it is one of the known ones."""
    known = tuple(known)
    if value not in known:
        raise unknown(argument, value, known)
    return value


def choose(argument: str, value: Any, known: Mapping[str, T]) -> T:
    """Return the choice with this name, or the value itself if it is callable."""
    return value if callable(value) else known[one_of(argument, value, known)]


def number(argument: str, value: Any, least: float = -math.inf, finite: bool = True) -> float:
    """Return the value if it is a (finite) number, of numpy or torch too, of at least `least`."""
    plain = _plain_number(value)
    if plain is None or plain < least or (finite and math.isinf(plain)):
        bound = f" of at least {least:g}" if math.isfinite(least) else ""
        raise ValueError(f"{argument} must be a {'finite ' if finite else ''}number{bound}, not {value!r:.80}")
    return plain


def fraction(argument: str, value: Any) -> float:
    """Return the value if it is a number in [0, 1]."""
    plain = _plain_number(value)
    if plain is None or not 0 <= plain <= 1:
        raise ValueError(f"{argument} must be a fraction in [0, 1], not {value!r:.80}")
    return plain


def _plain_number(value) -> float | None:
    """The value without its tensor; None if it is no number."""
    value = value.item() if torch.is_tensor(value) and value.ndim == 0 else value
    return value if isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value) else None


def whole(argument: str, value: Any, least: int = 1) -> int:
    """Return the value as an int if it is a whole number, of numpy too, of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{argument} must be a whole number of at least {least}, not {value!r}")
    return int(value)


def a_function(argument: str, value: T) -> None:
    """Check that the value can be called, or is None."""
    if value is not None and not callable(value):
        raise TypeError(f"{argument} must be a function, not {value!r:.80}")


def a_model(model: Any) -> nn.Module:
    """Return the model if it is one."""
    if isinstance(model, nn.Module):
        return model
    raise TypeError(f"model must be an nn.Module, not {_kind(model)}")


def a_path(path: Any) -> str | os.PathLike:
    """Return the path if it is one."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be the path of a file, not {_kind(path)}")
    return path


def masks_by_name(masks: Any) -> Mapping[str, Any]:
    """Return the masks if they are a mapping."""
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks must be {{parameter name: mask}} such as pu.get_masks(model) gives, not {_kind(masks)}")
    return masks


def _kind(value) -> str:
    """Say shortly what a value is: a model or a data set would fill the screen."""
    name = type(value).__name__
    return repr(value)[:60] if isinstance(value, (str, bytes, Real, type, type(None))) else f"an object of {name}"


def some_data(argument: str, data: Any) -> Any:
    """Return the data if they can be iterated and are no single tensor, mapping or model."""
    if isinstance(data, (str, torch.Tensor, nn.Module, Mapping)) or not isinstance(data, Iterable):
        pairs = "one (inputs, targets) pair of tensors or an iterable of them, such as pu.data.load gives"
        raise TypeError(f"{argument} must be {pairs} (a tokenizer by return_tensors='pt'), not {_kind(data)}")
    return data


def is_batch(data: object) -> bool:
    """Say whether `data` is one batch: inputs alone, or an (inputs, targets) pair with inputs of any form."""
    if not isinstance(data, (tuple, list)):
        return _are_inputs(data)
    if len(data) == 1:  # of a DataLoader without targets
        return _are_inputs(data[0])
    if len(data) != 2 or not (data[1] is None or torch.is_tensor(data[1])):
        return False
    return all(map(torch.is_tensor, data[0])) if isinstance(data[0], (tuple, list)) else _are_inputs(data[0])


def _are_inputs(value) -> bool:
    """Whether this is a tensor, or a mapping with tensors such as a tokenizer gives."""
    return torch.is_tensor(value) or (isinstance(value, Mapping) and any(map(torch.is_tensor, value.values())))


def a_batch(argument: str, batch: Any) -> tuple[Any, torch.Tensor | None]:
    """Return the inputs and the targets of a batch, None for targets that it lacks."""
    if not is_batch(batch):
        forms = "an (inputs, targets) pair of tensors, inputs alone, or a mapping of tensors such as a tokenizer gives"
        raise TypeError(f"{argument} must be {forms} with return_tensors='pt', not {_kind(batch)}")
    inputs, targets, *_ = (*batch, None) if isinstance(batch, (tuple, list)) else (batch, None)
    return inputs, targets


def is_pair(data: object) -> bool:
    """Say whether `data` is one (inputs, targets) pair of tensors."""
    return isinstance(data, (tuple, list)) and len(data) == 2 and all(torch.is_tensor(part) for part in data)


@contextlib.contextmanager
def add_shapes_to_errors(inputs: object, targets: torch.Tensor) -> Iterator[None]:
    """Add to an error inside of a model what it was given."""
    try:
        yield
    except Exception as error:
        error.add_note(f"The inputs were {shapes(inputs)}, the targets {shapes(targets)}: a pair is (inputs, targets).")
        raise


def shapes(value: object) -> str:
    """Describe tensors of any form by their shapes and types: messages never print the tensors themselves."""
    if torch.is_tensor(value):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {shapes(each)}" for name, each in value.items())
    return ", ".join(map(shapes, value)) if isinstance(value, (tuple, list)) else type(value).__name__


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Name the extra of this package that brings what cannot be imported inside."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", __package__):
            raise
        way = f"pip install 'pruneutils[{extra}]'"
        raise ModuleNotFoundError(f"{missing} is not installed; to get it: {way}", name=missing) from error


def callers_level() -> int:
    """Return the stacklevel, for a warning of whoever asks, of the first caller outside of this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(f"{__package__}."):
        frame, level = frame.f_back, level + 1
    return level
