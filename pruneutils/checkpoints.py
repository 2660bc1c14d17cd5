"""Pruned models as safetensors: plain data that loads into the plain class and cannot run code; see `_stored`."""

import contextlib
import copy
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import _safetensors, _stored
from ._checks import a_model, a_path, nearest
from .model_utils import check_masks, get_masks, layer_name, make_permanent, prunable_weights, set_masks
from .models.recipes import follow
from .pruning import replay


def save(model: nn.Module, path: str | os.PathLike, *, dense: bool = False, **facts: Any) -> Path:
    """Save weights, buffers and masks of a model, and any facts, to one file that cannot run code.

    A weight with a mask takes one bit per entry and the values kept: about 1/32 + density of its size. If the model
    comes from `models.create`, so does its recipe, and `load` needs no model. The file appears whole or not at all.

    Args:
        model: Any `nn.Module`.
        path: The file, usually named *.safetensors; its folder is made if there is none.
        dense: Write an ordinary state_dict instead, as every other program expects it: zeros as zeros, no masks, tied
            weights under each of their names.
        **facts: What to remember with the model: names and JSON values.

    Returns:
        The path.

    Raises:
        TypeError: If a fact is not JSON.
        ValueError: If pruned weights are not zero, or something in the state_dict is not a tensor. Nothing is written
            then.

    Example:
        >>> import os, tempfile
        >>> model = pu.models.create("lenet300")
        >>> masks = pu.prune(model, "magnitude", 0.9)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pu.save(model, os.path.join(folder, "lenet300.safetensors"), accuracy=0.97)
        ...     again, size = pu.load(path), path.stat().st_size
        >>> pu.count(again), again.facts
        (Count(26,620 of 266,200 kept, 239,580 pruned, sparsity 0.9000), {'accuracy': 0.97})
        >>> size < 0.15 * 4 * pu.cost(model, torch.zeros(1, 1, 28, 28)).parameters
        True
    """
    a_model(model)
    path, told = Path(a_path(path)), _json_of_facts(facts)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it, such as {path / 'model.safetensors'}")
    state, masks = model.state_dict(), {} if dense else get_masks(model)
    for name, tensor in state.items():
        if not torch.is_tensor(tensor):
            raise ValueError(f"{name} in the state_dict is a {type(tensor).__name__}, and only tensors can be saved")
    if lost := sorted(set(masks) - set(state)):
        raise ValueError(f"{lost[0]} has a mask, and the state_dict of the model does not name it")
    _refuse_revived(model, masks)
    if dense:
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        _safetensors.write(path, tensors, {"format": "pt", "facts": told})
        return path
    _stored.write(path, state, masks, told, _json_of_recipe(model), getattr(model, "removed", {}))
    return path


def load(path: str | os.PathLike, model: nn.Module | None = None) -> nn.Module:
    """Load a file made by `save`, masks included; the whole file is checked before the model changes.

    Args:
        path: A file that `save` has written; for an ordinary state_dict see `models.load_weights`.
        model: Any module with tensors of the same names and shapes; its masks are replaced. None: a new one is made by
            the recipe in the file.

    Returns:
        The model. `model.facts` holds the facts.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, not one of ours, or does not fit the model; or if it has no recipe while no
            model is given. Nothing is changed then.

    Example:
        >>> import os, tempfile
        >>> model = pu.models.create("lenet300")
        >>> masks = pu.prune(model, "random", 0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pu.save(model, os.path.join(folder, "m.safetensors"))
        ...     again = pu.load(path, pu.models.create("lenet300", seed=1))
        >>> torch.equal(again.fc1.weight, model.fc1.weight)
        True
    """
    a_path(path)
    if model is not None:
        a_model(model)
    with _explained(path):
        stored = _stored.read(path)
        made = _make(stored) if model is None else model
        # filters are removed from a copy first, so that a model that turns out not to fit keeps its own
        tried = _cut(copy.deepcopy(made), stored.removed) if stored.removed else made
        _check_fit(stored, tried)
        tensors, masks = _converted(stored.tensors(), tried), stored.masks()
        if masks:
            check_masks(tried, masks)
        model = _cut(made, stored.removed)
        make_permanent(model)
        model.load_state_dict(tensors)
        set_masks(model, masks)
        model.facts = stored.facts
    return model


@contextlib.contextmanager
def _explained(path) -> Iterator[None]:
    """Name the file in every error that its content causes."""
    try:
        yield
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error


# --- What is saved ---------------------------------------------------------------------------------------------------


def _refuse_revived(model, masks) -> None:
    """A mask and the live weights that disagree would be saved as another model than the one that runs."""
    weights = prunable_weights(model) if masks else {}
    for name, mask in masks.items():
        revived = int(weights[name].detach().masked_fill(mask, 0).count_nonzero())
        if revived:
            raise ValueError(
                f"{layer_name(name)}: {revived:,} pruned weights are not zero, since something other than an "
                "optimizer has written to them. pu.hold(model) zeroes them again, pu.make_permanent(model) keeps them"
            )


def _json_of_facts(facts) -> str:
    for name, value in facts.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(
                f"the fact {name!r} is {type(value).__name__} and no JSON value ({error}); save a number, a text, or "
                "lists and dicts of these"
            ) from error
    return json.dumps(facts)


def _json_of_recipe(model) -> str:
    try:
        return json.dumps(getattr(model, "recipe", None))
    except (TypeError, ValueError):  # made with a class or a function as an argument
        return json.dumps(None)


# --- Where it goes ---------------------------------------------------------------------------------------------------


def _make(stored: _stored.Stored) -> nn.Module:
    """Return a new model by the recipe, cut as the removed filters say, of the types that are stored."""
    if stored.recipe is None:
        raise ValueError(
            "there is no recipe, since the model was not made by models.create with arguments that are JSON; give load "
            "a model"
        )
    n_entries = sum(math.prod(shape) for shape in stored.shapes.values())
    if stored.removed:  # the network was larger before, and how much the file does not say
        n_entries = max(100 * n_entries, 50_000_000)
    model = _cut(follow(stored.recipe, n_entries, len(stored.shapes)), stored.removed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        dtype = stored.dtypes.get(name, tensor.dtype)
        if tensor.is_floating_point() and dtype.is_floating_point:
            tensor.data = tensor.data.to(dtype)
    return model


def _cut(model: nn.Module, removed: dict) -> nn.Module:
    """Remove the filters that the saved model has lost, in place, unless this one has lost them too."""
    if removed and getattr(model, "removed", None) != removed:
        try:
            replay(model, removed)
        except (TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            raise ValueError(f"the filters that were removed cannot be told from {removed!r:.80} ({error})") from error
    return model


def _check_fit(stored: _stored.Stored, model: nn.Module) -> None:
    """Compare names, shapes and kinds of numbers."""
    own = model.state_dict()
    for name in sorted(set(own) ^ set(stored.shapes)):
        where = "the file lacks" if name in own else "the model lacks"
        raise ValueError(f"{where} {name!r}; {nearest(name, stored.shapes if name in own else own)}")
    for name, shape in stored.shapes.items():
        if shape != own[name].shape:
            raise ValueError(f"{name} has shape {tuple(shape)}, in the model {tuple(own[name].shape)}")
        if _kind(stored.dtypes[name]) != _kind(own[name].dtype):
            raise ValueError(f"{name} is of type {stored.dtypes[name]}, in the model of {own[name].dtype}")


def _kind(dtype: torch.dtype) -> str:
    """Real, complex or whole numbers: between these, values would be lost."""
    return "real" if dtype.is_floating_point else "complex" if dtype.is_complex else str(dtype)


def _converted(tensors: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors in the types of the model, where each has room: one with two names holds only one value."""
    own = model.state_dict()
    for name, other in _stored.tied_names(own, {}).items():
        if tensors[name] is not tensors[other] and not torch.equal(tensors[name], tensors[other]):
            raise ValueError(f"{name} and {other} are one tensor in the model, and two in the file")
    try:
        return {name: tensor.to(own[name].dtype) for name, tensor in tensors.items()}
    except RuntimeError as error:  # some types are too young to be converted
        raise ValueError(f"its tensors cannot be converted to the types of the model ({error})") from error
