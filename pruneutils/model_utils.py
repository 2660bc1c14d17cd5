"""Prunable weights, their masks, and what can be read off a masked model."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ._checks import a_model, callers_level, masks_by_name, nearest
from ._evaluation import accuracy as accuracy
from ._torch import unmaskable
from .masks import DENSE, attach, let_go, mask_of
from .target import Target, layer_name, prunable_weights

if TYPE_CHECKING:
    import pandas as pd


class RevivedWeightsWarning(UserWarning):
    """Weights that a mask prunes are not zero: something other than a torch optimizer has written to them."""


class Masks(MutableMapping, dict[str, torch.Tensor]):
    """A dict {parameter name: bool tensor of the parameter's shape}, True = kept.

    Example:
        >>> masks = pu.prune(pu.models.create("lenet300"), "magnitude", 0.9)
        >>> masks.total, masks.kept, round(masks.sparsity, 4)
        (266200, 26620, 0.9)
    """

    # Masks in force are copied only when somebody takes one out, so pruning needs no second copy.
    # MutableMapping makes every method of a dict use the five that are defined here.

    def __init__(self, masks: Mapping[str, torch.Tensor] = {}, in_force: bool = False):
        super().__init__(masks)
        self._in_force = set(masks) if in_force else set()

    def __reduce__(self):
        return Masks, (dict(self),)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._in_force:
            self[name] = dict.__getitem__(self, name).clone()
        return dict.__getitem__(self, name)

    def __setitem__(self, name: str, mask: torch.Tensor) -> None:
        self._in_force.discard(name)
        dict.__setitem__(self, name, mask)

    def __iter__(self) -> Iterator[str]:  # with that of dict itself, dict(masks) would not ask __getitem__
        return dict.__iter__(self)

    __delitem__, __len__, __contains__ = dict.__delitem__, dict.__len__, dict.__contains__

    @property
    def total(self) -> int:
        """Number of entries over all masks."""
        return sum(mask.numel() for mask in dict.values(self))

    @property
    def kept(self) -> int:
        """Number of True entries over all masks."""
        return sum(int(mask.count_nonzero()) for mask in dict.values(self))

    @property
    def sparsity(self) -> float:
        """Fraction of False entries over all masks, 0.0 when there are none."""
        return 1 - self.kept / self.total if self.total else 0.0

    def __repr__(self) -> str:
        return f"Masks({len(self)} weights, {self.kept:,} of {self.total:,} kept, sparsity {self.sparsity:.4f})"


@dataclass(frozen=True)
class Count:
    """How many prunable weights a model has, and how many of them are kept and pruned."""

    total: int
    kept: int

    @property
    def pruned(self) -> int:
        """Number of weights pruned."""
        return self.total - self.kept

    @property
    def sparsity(self) -> float:
        """Fraction pruned, in [0, 1]."""
        return self.pruned / self.total

    def __repr__(self) -> str:
        return f"Count({self.kept:,} of {self.total:,} kept, {self.pruned:,} pruned, sparsity {self.sparsity:.4f})"


# --- Masks on a model ------------------------------------------------------------------------------------------------


def get_masks(model: nn.Module) -> Masks:
    """Return a copy of the masks on a model.

    Args:
        model: Any `nn.Module`.

    Returns:
        The masks in module order, {parameter name: bool tensor of the weight's shape}, True = kept.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> pu.set_masks(model, {"weight": torch.tensor([[1, 0, 1]])})
        >>> pu.get_masks(model)["weight"]
        tensor([[ True, False,  True]])
    """
    return Masks(Target.of(model, strict=False).masks, in_force=True)


def set_masks(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Put masks from anywhere on a model: from another model, a file, another library.

    Weights that are not named keep their masks. A copy that was made before pruning knows of no mask; for an average
    of weights, call `pu.set_masks(ema, pu.get_masks(model))`.

    Args:
        model: Any `nn.Module` with convolution or linear layers.
        masks: {parameter name: bool or 0/1 tensor of the weight's shape}, True or 1 = kept.

    Raises:
        ValueError: For an unknown name, another shape, or entries other than 0 and 1. The model is then as it was.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> pu.set_masks(model, {"weight": torch.tensor([[1, 0, 1]])})
        >>> pu.count(model)
        Count(2 of 3 kept, 1 pruned, sparsity 0.3333)
    """
    attach(dict(a_model(model).named_modules()), check_masks(model, masks))


def check_masks(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies of `masks` as bool tensors on the devices of the weights; ValueError if they do not fit `model`."""
    weights, checked = prunable_weights(model) if masks else {}, {}
    bare = {bare_name(name): name for name in weights}
    for given, mask in masks_by_name(masks).items():
        name = given if given in weights else bare.get(bare_name(str(given)))
        if name is None:
            raise ValueError(f"no prunable weight is called {given!r}; {nearest(given, weights)}")
        weight = weights[name]
        if why := unmaskable(weight):
            raise ValueError(f"{name} {why}")
        if isinstance(mask, str) or mask is None:
            raise TypeError(f"{given}: a mask is a tensor of 0 and 1, not {mask!r:.80}")
        mask = torch.as_tensor(mask).detach()
        if mask.shape != weight.shape:
            raise ValueError(f"{name}: the mask has shape {tuple(mask.shape)}, the weight {tuple(weight.shape)}")
        keep = mask.to(torch.bool, copy=True)
        if mask.dtype != torch.bool and not torch.equal(keep.to(mask), mask):
            raise ValueError(f"{name}: a mask holds only 0 and 1 (or False and True)")
        checked[name] = keep.to(weight.device)
    return checked


def bare_name(name: str) -> str:
    """Return a parameter's name without what torch.compile and DataParallel put before it."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    return ".".join(parts[1:] if parts[0] == "module" else parts)


def hold(model: nn.Module) -> nn.Module:
    """Set all pruned weights to zero again, after something other than a torch optimizer has written to them.

    Masks hold by themselves in every step of a torch optimizer, in `load_state_dict`, and in loops such as
    `p.data -= lr * p.grad`. Call `hold` after `reset_parameters`, and after updates that do not come from `.grad`.

    Args:
        model: Any `nn.Module`. Without masks, nothing happens.

    Returns:
        The model.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> pu.set_masks(model, {"weight": torch.tensor([[1, 0, 1]])})
        >>> model.reset_parameters()
        >>> int(pu.hold(model).weight.count_nonzero())
        2
    """
    target = Target.of(model, strict=False)
    attach(target.modules, target.masks)
    return model


@contextlib.contextmanager
def dense_gradients(model: nn.Module) -> Iterator[nn.Module]:
    """Let backward passes inside the `with` block compute the gradients of pruned weights too, for methods like RigL.

    Pruned weights stay zero, except inside the steps of optimizers that evaluate the model several times (LBFGS).
    """
    masked = [weight for weight in Target.of(model, strict=False).prunable.values() if weight not in DENSE]
    DENSE.update(dict.fromkeys(masked, True))
    try:
        yield model
    finally:
        for weight in masked:
            del DENSE[weight]


def make_permanent(model: nn.Module) -> nn.Module:
    """Remove all masks and leave the zeros: an ordinary model again, whose zeros training may fill.

    Args:
        model: Any `nn.Module`.

    Returns:
        The model.

    Warns:
        UserWarning: If a weight stays masked, because a module outside of `model` holds its mask too.

    Example:
        >>> model = pu.models.create("lenet300")
        >>> masks = pu.prune(model, "magnitude", 0.9)
        >>> len(pu.get_masks(pu.make_permanent(model))), pu.count(model).kept
        (0, 26620)
    """
    let_go(dict(a_model(model).named_modules()))
    return model


@torch.no_grad()
def restore(model: nn.Module) -> nn.Module:
    """Bring back the weights from before the first `prune(..., restorable=True)`, and remove their masks.

    Args:
        model: A model so pruned. Layers that were pruned otherwise keep their masks, and so do weights that a pruned
            model outside of this one shares, with a warning.

    Returns:
        The model.

    Raises:
        ValueError: If no such weights are kept.

    Example:
        >>> model = pu.models.create("lenet300")
        >>> masks = pu.prune(model, "magnitude", 0.9, restorable=True)
        >>> pu.count(pu.restore(model)).pruned
        0
    """
    target = Target.of(model, strict=False)
    kept = {name: old for name in target.masks if (old := mask_of(target.prunable[name]).original) is not None}
    if not kept:
        raise ValueError("there are no weights to restore; they are kept by prune(..., restorable=True)")
    shared = let_go(target.modules, [target.prunable[name] for name in kept])
    for name in kept.keys() - set(shared):
        target.prunable[name].copy_(kept[name])
    return model


# --- What a model holds ----------------------------------------------------------------------------------------------


def revived(model: nn.Module, target: Target | None = None) -> dict[str, int]:
    """Return {parameter name: pruned weights that are not zero} of the weights that have any."""
    target, found = target or Target.of(model, strict=False), {}
    for name, keep in target.masks.items():
        weight = target.prunable[name].detach()
        if n := int((weight != 0).logical_and_(~keep).count_nonzero()):
            found[name] = n
    return found


def _kept(model: nn.Module) -> dict[str, tuple[nn.Parameter, int]]:
    """Return {parameter name: (weight, number kept)}; warn of pruned weights that live, which count as kept."""
    target, layers = Target.of(model, strict=False), {}
    alive = revived(model, target)
    for name, weight in (target.prunable or prunable_weights(model)).items():  # which raises where there are none
        values = weight.detach() if weight.layout == torch.strided else weight.detach().to_dense()
        if why := unmaskable(values):
            raise ValueError(f"{name} {why}")
        if name in target.masks:
            kept = int(target.masks[name].count_nonzero()) + alive.get(name, 0)
        else:  # in a model without any mask, zeros count as pruned
            kept = weight.numel() if target.masks else int(values.count_nonzero())
        layers[name] = weight, kept
    if alive:
        each = ", ".join(f"{layer_name(name)}: {n:,}" for name, n in alive.items())
        way = "something other than a torch optimizer has written to them. pu.hold(model) zeroes them again"
        message = f"{sum(alive.values()):,} pruned weights are not zero ({each}), and are counted as kept; {way}"
        warnings.warn(message, RevivedWeightsWarning, stacklevel=callers_level())
    return layers


def count(model: nn.Module) -> Count:
    """Count the prunable weights of a model, and how many of them are kept and pruned.

    A weight is pruned if a mask says so and it is zero. In a model without any mask, all zeros count as pruned.

    Args:
        model: Any `nn.Module` with convolution or linear layers.

    Returns:
        `.total`, `.kept` and `.pruned` as Python ints, and `.sparsity`, a fraction in [0, 1].

    Raises:
        ValueError: If the model has nothing to prune, or a parameter without values, or without the shape of its mask.

    Warns:
        RevivedWeightsWarning: If pruned weights are not zero. They count as kept; `hold` zeroes them again.

    Example:
        >>> model = pu.models.create("lenet300")
        >>> masks = pu.prune(model, "magnitude", 0.9)
        >>> pu.count(model)
        Count(26,620 of 266,200 kept, 239,580 pruned, sparsity 0.9000)
    """
    layers = _kept(model).values()
    return Count(sum(weight.numel() for weight, _ in layers), sum(kept for _, kept in layers))


def layer_table(model: nn.Module) -> "pd.DataFrame":
    """Count the weights of each prunable layer.

    Args:
        model: Any `nn.Module` with convolution or linear layers.

    Returns:
        A row per layer in module order: layer (its name), shape (of the weight), total, kept and sparsity.

    Example:
        >>> model = pu.models.create("lenet300")
        >>> masks = pu.prune(model, "magnitude", 0.9, scope="layer")
        >>> pu.layer_table(model)
          layer       shape   total   kept  sparsity
        0   fc1  (300, 784)  235200  23520       0.9
        1   fc2  (100, 300)   30000   3000       0.9
        2   fc3   (10, 100)    1000    100       0.9
    """
    import pandas as pd

    rows = [
        (layer_name(name), tuple(weight.shape), weight.numel(), kept, 1 - kept / weight.numel())
        for name, (weight, kept) in _kept(model).items()
    ]
    return pd.DataFrame(rows, columns=["layer", "shape", "total", "kept", "sparsity"])
