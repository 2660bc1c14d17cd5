"""Build a network by its name, with weights that its seed decides, or by the recipe in an untrusted file."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import _torchvision
from .._checks import nearest, needs, whole
from .._torch import own_random_state
from .networks import NETWORKS

# arguments of timm and torchvision that load weights from elsewhere: they are left out of recipes
FETCHING = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "weights")
# The options that a recipe from a file may set: none of them loads another file or makes a model deeper.
_OPTIONS = frozenset(
    "name num_classes seed in_channels image_size in_chans img_size patch_size stem_width channels embed_dim "
    "num_heads width_mult drop_rate drop_path_rate global_pool".split()
)


def create(name: str, num_classes: int = 10, seed: int = 0, **kwargs: Any) -> nn.Module:
    """Build a freshly initialised model on the CPU; the same seed gives the same weights, bit for bit.

    Nothing is downloaded unless an argument asks for pretrained weights. The global random state is restored.

    Args:
        name: One of `NETWORKS`, or "timm/<name>" or "torchvision/<name>" for any classifier of those libraries.
        num_classes: The number of outputs.
        seed: Decides the weights.
        **kwargs: What the model takes besides: `in_channels` (1 for "fc", "lenet300" and "lenet5", 3 for others), and
            those three `image_size` (28); others what their library documents.

    Returns:
        The model. create(**model.recipe) builds the same architecture again, without anything pretrained.

    Example:
        >>> model = pu.models.create("lenet300", seed=1)
        >>> model.recipe
        {'name': 'lenet300', 'num_classes': 10, 'seed': 1}
    """
    model = build("cpu", name, num_classes, seed, **kwargs)
    plain = {key: value for key, value in kwargs.items() if key not in FETCHING}
    model.recipe = {"name": name, "num_classes": num_classes, "seed": seed, **plain}
    return model


def build(device: str, name: str, num_classes: int = 10, seed: int = 0, **kwargs: Any) -> nn.Module:
    """Build a model on a device: the CPU, or "meta" for its shapes alone."""
    whole("num_classes", num_classes)
    builder = _builder(name)
    with own_random_state(torch.device("cpu"), whole("seed", seed, least=0)), torch.device(device):
        return builder(num_classes=num_classes, **kwargs)


def follow(recipe: dict[str, Any], n_entries: int) -> nn.Module:
    """Return models.create(**recipe); ValueError if it is much larger than tensors of so many entries in all."""
    if unknown := sorted(set(recipe) - _OPTIONS):
        raise ValueError(f"its recipe sets {', '.join(unknown)}, which files may not; give load a model that you made")
    try:
        on_meta = build("meta", **recipe)  # takes no memory
        wanted = sum(value.numel() for value in on_meta.state_dict().values())
        if wanted > 10 * n_entries + 1_000_000:  # filters may be gone, and buffers that are not in the file
            raise ValueError(f"it would have {wanted:,} entries, and the file holds {n_entries:,}")
        return create(**recipe)
    except Exception as error:  # timm and torchvision raise whatever they raise for wrong arguments
        raise ValueError(f"its recipe {recipe!r} cannot be followed: {error}") from error


def _builder(name: str) -> Callable[..., nn.Module]:
    library, _, inner = str(name).rpartition("/")
    if library == "timm":
        _torchvision.load()  # timm imports it
        with needs("models"):
            import timm
        if timm.is_model(inner.split(".")[0]):  # the part after a dot names pretrained weights, not another model
            return partial(timm.create_model, inner)
        raise ValueError(f"unknown model {name!r}; timm.list_models() lists those of timm")
    if library == "torchvision":
        models = _torchvision.load().models
        known = models.list_models(module=models)  # the classifiers; the others fetch a pretrained backbone unasked
        if inner in known:
            return partial(models.get_model, inner)
        raise ValueError(f"unknown model {name!r}; {nearest(inner, known)}")
    if name not in NETWORKS:
        raise ValueError(f"unknown model {name!r}; {nearest(name, NETWORKS)} (or timm/<name>, torchvision/<name>)")
    return NETWORKS[name]
