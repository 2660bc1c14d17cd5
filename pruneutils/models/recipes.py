"""Build a model by the recipe in a file of a stranger, with no more memory than the size of the file justifies."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .._dispatch import Watch
from .building import FETCHING, create

# What building may take for each entry and each tensor that the file holds. None of 170 models of timm and torchvision
# takes more than 2.2 entries and 30 operations.
_ENTRIES, _OPERATIONS = 10, 200
_FREE_ENTRIES, _FREE_OPERATIONS = 1_000_000, 10_000


def follow(recipe: dict[str, Any], n_entries: int, n_tensors: int) -> nn.Module:
    """Return models.create(**recipe); ValueError if it is much larger than tensors of so many entries in all."""
    if fetching := sorted(set(recipe) & FETCHING):
        raise ValueError(f"its recipe asks for {', '.join(fetching)}, which could load other files; refused")
    for number in _numbers({name: value for name, value in recipe.items() if name != "seed"}):
        if number > max(n_entries, _FREE_ENTRIES):
            raise ValueError(f"its recipe asks for {number:,} of something, and the file holds {n_entries:,} entries")
    try:
        with _Budget(_ENTRIES * n_entries + _FREE_ENTRIES, _OPERATIONS * n_tensors + _FREE_OPERATIONS):
            return create(**recipe)
    except Exception as error:  # timm and torchvision raise whatever they raise for wrong arguments
        raise ValueError(f"its recipe {recipe!r} cannot be followed: {error}") from error


def _numbers(value: Any) -> Iterator[int]:
    """All whole numbers in a JSON value."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _numbers(each)
    elif isinstance(value, int):
        yield value


class _Budget(Watch):
    """Stops a model that is being built before it takes more memory, or many more operations, than it may."""

    def __init__(self, n_entries: int, n_operations: int):
        super().__init__()
        self.n_entries, self.n_operations = n_entries, n_operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n_operations -= 1
        tensors = [arg for arg in args if torch.is_tensor(arg)]
        if not tensors:  # a size is among the arguments of what makes a new tensor
            wanted = max((_size(arg) for arg in args), default=0)
            self.n_entries -= wanted
        elif torch.Tag.pointwise in func.tags:
            wanted = math.prod(torch.broadcast_shapes(*(tensor.shape for tensor in tensors)))
        else:
            wanted = 0
        if min(self.n_entries, self.n_entries - wanted, self.n_operations) < 0:
            raise ValueError("it would be much larger than what is stored")
        return func(*args, **(kwargs or {}))


def _size(argument: Any) -> int:
    """How many entries an argument may ask for, as a shape or as a number."""
    sizes = argument if isinstance(argument, list | tuple) else [argument]
    return math.prod(sizes) if sizes and all(isinstance(size, int) for size in sizes) else 0
