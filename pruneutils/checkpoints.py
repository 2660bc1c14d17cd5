"""Pruned models as safetensors: plain data that loads into the plain class and cannot run code."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from . import models
from ._checks import nearest
from ._files import written_whole
from .model_utils import get_masks, make_permanent, prunable_weights, set_masks

_BITS, _KEPT = "#mask", "#kept"  # what stands for a pruned weight in a file: packed bits, and the values kept


def save(model: nn.Module, path, **facts) -> Path:
    """Save weights, buffers and masks of `model`, and any `facts` (JSON values), to a .safetensors file; its path.

    A pruned weight is stored as one bit per entry and the values of those kept: about 1/32 + density of its size. If
    the model comes from `models.create`, so does its recipe, and `load` needs no model. Raises TypeError for facts that
    are not JSON. The file appears whole or not at all.
    """
    path = Path(path)
    facts = json.dumps(facts)
    masks, tensors = get_masks(model), {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        if name in masks:
            mask = masks[name].cpu()
            tensors[name + _BITS] = torch.from_numpy(np.packbits(mask.numpy().reshape(-1)))
            tensors[name + _KEPT] = tensor[mask]
        else:
            tensors[name] = tensor.clone()  # tied weights share memory, which safetensors refuses
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    recipe = getattr(model, "recipe", None)
    metadata = {"format": "pruneutils", "shapes": json.dumps(shapes), "facts": facts, "recipe": json.dumps(recipe)}
    with written_whole(path) as part:
        save_file(tensors, part, metadata)
    return path


def load(path, model: nn.Module | None = None) -> nn.Module:
    """Load a file made by `save` into `model`, masks included, or into a new model made by its recipe; the model.

    The facts are in `model.facts`. Raises ValueError if the file is not one of ours, names other tensors than the model
    has, or has no recipe while no model is given; nothing is changed then.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    if metadata.get("format") != "pruneutils":
        raise ValueError(f"{path} was not written by pruneutils.save; load it with safetensors.torch.load_file")
    masks = {}
    for name, shape in json.loads(metadata["shapes"]).items():
        bits = np.unpackbits(tensors.pop(name + _BITS).numpy(), count=int(np.prod(shape)))
        masks[name] = torch.from_numpy(bits).bool().view(shape)
        kept = tensors.pop(name + _KEPT)
        tensors[name] = torch.zeros(shape, dtype=kept.dtype)
        tensors[name][masks[name]] = kept
    if model is None:
        recipe = json.loads(metadata["recipe"])
        if recipe is None:
            raise ValueError(f"{path} has no recipe, since its model is not from models.create; give load a model")
        if fetching := sorted(set(recipe) & set(models.FETCHING)):
            raise ValueError(
                f"{path}: its recipe asks for {', '.join(fetching)}, which could load other files; refused"
            )
        model = models.create(**recipe)
    own = model.state_dict()
    for name in sorted(set(own) ^ set(tensors)):
        where = "the file lacks" if name in own else "the model lacks"
        raise ValueError(f"{path}: {where} {name!r}; {nearest(name, tensors if name in own else own)}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)}, in the model {tuple(own[name].shape)}")
    if lost := sorted(set(masks) - set(prunable_weights(model) if masks else ())):
        raise ValueError(f"{path} has a mask for {lost[0]!r}, which is no prunable weight of the model")
    make_permanent(model)
    model.load_state_dict(tensors)
    set_masks(model, masks)
    model.facts = json.loads(metadata["facts"])
    return model
