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
    known, wanted = {str(each).lower(): str(each) for each in known}, str(name).lower()
    longer = [each for each in known if wanted and each.startswith(wanted)]
    close = longer if 0 < len(longer) <= 3 else difflib.get_close_matches(wanted, known, n=3)
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


def number(argument: str, value: Any, least: float = -math.inf, finite: bool = True) -> float:
    """Return the value if it is a (finite) number, of numpy or torch too, of at least `least`."""
    if torch.is_tensor(value) and value.ndim == 0:
        value = value.item()
    is_number = isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
    if not is_number or value < least or (finite and math.isinf(value)):
        bound = f" of at least {least:g}" if math.isfinite(least) else ""
        raise ValueError(f"{argument} must be a {'finite ' if finite else ''}number{bound}, not {value!r:.80}")
    return value


def whole(argument: str, value: Any, least: int = 1) -> int:
    """Return the value as an int if it is a whole number, of numpy too, of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{argument} must be a whole number of at least {least}, not {value!r}")
    return int(value)


def a_seed(value: Any) -> int:
    """Return the seed if it is a whole number."""
    return whole("seed", value, least=0)


def a_function(argument: str, value: T) -> T:
    """Return the value if it can be called, or is None."""
    if value is not None and not callable(value):
        raise TypeError(f"{argument} must be a function, not {value!r:.80}")
    return value


def a_model(model: Any) -> nn.Module:
    """Return the model if it is one; TypeError says what else it is, and what to do with that."""
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, str):
        makes = "pu.load makes a model of a file" if os.sep in model else "pu.models.create makes a model of a name"
        way = f"the text {model!r:.60}; {makes}"
    elif isinstance(model, type):
        way = f"the class {model.__name__}; make a model of it, {model.__name__}(...)"
    elif isinstance(model, Mapping) and model and all(map(torch.is_tensor, model.values())):
        way = f"a dict of tensors ({type(model).__name__}); model.load_state_dict puts a state_dict into a model"
    else:
        way = f"{_kind(model)}; is it in the place of another argument?"
    raise TypeError(f"model must be an nn.Module, not {way}")


def a_path(path: Any) -> str | os.PathLike:
    """Return the path if it is one; TypeError if something else stands in its place."""
    if isinstance(path, (str, os.PathLike)):
        return path
    way = ""
    if isinstance(path, nn.Module):
        way = "; the model and the path have changed places"
    elif isinstance(path, Mapping):
        way = "; model.load_state_dict takes a state_dict"
    raise TypeError(f"path must be the path of a file, not {_kind(path)}{way}")


def masks_by_name(masks: Any, argument: str = "masks") -> Mapping[str, Any]:
    """Return the masks if they are a mapping; TypeError says where masks come from."""
    if isinstance(masks, Mapping):
        return masks
    way = "; pu.get_masks(model) gives the masks of a model" if isinstance(masks, nn.Module) else ""
    raise TypeError(f"{argument} must be {{parameter name: mask}}, not {_kind(masks)}{way}")


def _kind(value) -> str:
    """Say what a value is, shortly: a model or a data set would fill the screen."""
    if value is None:
        return "None"
    short = isinstance(value, (str, bytes, Real))
    name = type(value).__name__
    return repr(value)[:60] if short else f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def some_data(argument: str, data: Any) -> Any:
    """Return the data if they are one (inputs, targets) pair or can be iterated; TypeError says what they are."""
    if isinstance(data, str):
        raise TypeError(f"{argument} is the text {data!r:.60}; pu.data.load({data!r:.60}) gives (train, test)")
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(hasattr(part, "targets") for part in data):
        raise TypeError(f"{argument} holds two data sets, (train, test): give one of them, or each as its own argument")
    if torch.is_tensor(data) or isinstance(data, (nn.Module, Mapping)) or not isinstance(data, Iterable):
        raise TypeError(
            f"{argument} must be one (inputs, targets) pair of tensors or an iterable of them, not {_kind(data)}"
        )
    return data


def a_pair(argument: str, pair: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch if it is an (inputs, targets) pair of tensors."""
    if not is_pair(pair):
        inside = f" of {' and '.join(map(_kind, pair))}" if isinstance(pair, (tuple, list)) and len(pair) < 4 else ""
        raise TypeError(f"{argument} must be an (inputs, targets) pair of tensors, not {_kind(pair)}{inside}")
    return tuple(pair)


@contextlib.contextmanager
def inputs_told(inputs: torch.Tensor, targets: torch.Tensor) -> Iterator[None]:
    """Add to an error inside of a model what it was given; ValueError where inputs and targets have changed places."""
    try:
        yield
    except Exception as error:
        told = [f"{tuple(each.shape)} {str(each.dtype).removeprefix('torch.')}" for each in (inputs, targets)]
        if inputs.ndim == 1 and not inputs.is_floating_point() and targets.is_floating_point() and targets.ndim > 1:
            raise ValueError(
                f"inputs are {told[0]} and targets {told[1]}: they seem to have changed places, a pair is "
                "(inputs, targets)"
            ) from error
        error.add_note(f"The inputs were {told[0]}, the targets {told[1]}.")
        raise


def is_pair(data: object) -> bool:
    """Tell whether `data` is one (inputs, targets) pair of tensors."""
    return isinstance(data, (tuple, list)) and len(data) == 2 and all(torch.is_tensor(part) for part in data)


def callers_level() -> int:
    """Return the stacklevel, for a warning of whoever asks, of the first caller outside of this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(f"{__package__}."):
        frame, level = frame.f_back, level + 1
    return level
