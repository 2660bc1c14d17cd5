"""Build a network by its name, with weights that its seed decides whatever other threads draw meanwhile."""

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import _torchvision
from .._checks import a_seed, nearest, whole
from .._dispatch import Watch
from .networks import NETWORKS

# arguments of timm and torchvision that load weights from elsewhere: no recipe from a file may hold one
FETCHING = frozenset(
    ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "weights")
)


def create(name: str, num_classes: int = 10, seed: int = 0, **kwargs: Any) -> nn.Module:
    """Build a freshly initialised model on the CPU; the same seed gives the same weights, bit for bit.

    Nothing is downloaded unless an argument asks for pretrained weights, and the global random state is not touched.

    Args:
        name: One of `list_models()`, or "timm/<name>" or "torchvision/<name>" for any classifier of those libraries.
        num_classes: The number of outputs.
        seed: Decides the weights.
        **kwargs: What the model takes besides. This package's take `in_channels` (default 1 for "fc", "lenet300" and
            "lenet5", 3 for the others), and those three `image_size` (default 28). timm's and torchvision's take what
            these libraries document, such as `in_chans`.

    Returns:
        The model. Its attribute `recipe` holds these arguments, so that create(**model.recipe) builds the same
        architecture, without anything pretrained.

    Raises:
        ValueError: If nobody knows the name (the error suggests the nearest known ones), or `num_classes` is no whole
            number above 0.

    Example:
        >>> model = pu.models.create("lenet300", seed=1)
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
        >>> sum(p.numel() for p in pu.models.create("resnet56").parameters())
        853018
        >>> model.recipe
        {'name': 'lenet300', 'num_classes': 10, 'seed': 1}
    """
    whole("num_classes", num_classes)
    build = _builder(name)
    if name in NETWORKS:
        _check_options(name, build, kwargs)
    with _DrawnFrom(torch.Generator().manual_seed(a_seed(seed))), torch.device("cpu"):
        model = build(num_classes=num_classes, **kwargs)
    plain = {key: value for key, value in kwargs.items() if key not in FETCHING}
    model.recipe = {"name": name, "num_classes": num_classes, "seed": seed, **plain}
    return model


def list_models() -> list[str]:
    """Name the models of this package; `create` knows "timm/<name>" and "torchvision/<name>" besides.

    Returns:
        The names.

    Example:
        >>> pu.models.list_models()[:4]
        ['fc', 'lenet300', 'lenet5', 'vgg11']
    """
    return list(NETWORKS)


class _DrawnFrom(Watch):
    """Random numbers drawn in this thread come from one generator, the same as from torch's own with that seed.

    Seeding the global generator for the time of the building would change what other threads draw, and they would
    change the weights. What this watches belongs to its thread.
    """

    _overloads = {"default": "generator", "low": "low_generator"}

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.generator = generator

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if not _takes_generator(func):  # torch.rand(3) is another operator than torch.rand(3, generator=...)
            func = getattr(func.overloadpacket, self._overloads.get(func._overloadname, ""), func)
        if _takes_generator(func):
            if kwargs.get("generator") is None:
                kwargs["generator"] = self.generator
            return func(*args, **kwargs)
        with torch.random.fork_rng(devices=[]):  # a few, such as dropout, know the global one alone
            torch.default_generator.set_state(self.generator.get_state())
            result = func(*args, **kwargs)
            self.generator.set_state(torch.default_generator.get_state())
        return result


def _takes_generator(func) -> bool:
    return any(argument.name == "generator" for argument in func._schema.arguments)


def _builder(name: str) -> Callable[..., nn.Module]:
    library, _, inner = name.rpartition("/") if isinstance(name, str) else ("", "", name)
    if library == "timm":
        timm = _timm()
        # the part after a dot names pretrained weights, not another model
        if not timm.is_model(inner.split(".")[0]):
            raise _unknown(name, [f"timm/{known}" for known in timm.list_models()])
        return partial(timm.create_model, inner)
    if library == "torchvision":
        models = _torchvision.load().models
        known = models.list_models(module=models)  # the classifiers; the others fetch a pretrained backbone unasked
        if inner not in known:
            raise _unknown(name, [f"torchvision/{model}" for model in known])
        return partial(models.get_model, inner)
    if not isinstance(name, str) or name not in NETWORKS:
        elsewhere = [f"timm/{name}"] if isinstance(name, str) and _timm().is_model(name) else []
        raise _unknown(name, elsewhere or list_models())
    return NETWORKS[name]


def _check_options(name, build, options) -> None:
    """This package's networks say which options they have; timm's and torchvision's pass them on."""
    known = [own for own in inspect.signature(build).parameters if own != "num_classes"]
    for option in options:
        if option not in known:
            raise TypeError(f"{name} has no option {option!r}; its own: {', '.join(known)}")


def _timm():
    _torchvision.load()  # timm imports it
    import timm

    return timm


def _unknown(name: object, known: Iterable[str]) -> ValueError:
    """Return the error for a name that nobody knows, without the thousand names of timm."""
    hint = nearest(name, known)
    if hint.startswith("known") and "timm/" in hint:
        hint = "timm.list_models() names all that timm has"
    shown = repr(name) if isinstance(name, str) else f"a {type(name).__name__}"
    return ValueError(f'unknown model {shown}; {hint} (also "timm/<name>" and "torchvision/<name>")')
