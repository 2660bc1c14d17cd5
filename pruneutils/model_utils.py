"""Prunable weights, their masks, and what can be read off a masked model.

A mask belongs to one parameter. It is kept beside the parameter in its module, outside of `state_dict`, so the model
stays an ordinary one; a hook that torch runs after every optimizer step sets masked weights back to zero.
"""

import fnmatch
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ._checks import nearest
from ._torch import autocast, batches, device_of, in_mode, resolve_precision

_PRUNABLE = (nn.modules.conv._ConvNd, nn.Linear)


class Masks(dict):
    """A dict {parameter name: bool tensor of the parameter's shape}, True = kept."""

    @property
    def total(self) -> int:
        """Number of entries over all masks."""
        return sum(mask.numel() for mask in self.values())

    @property
    def kept(self) -> int:
        """Number of True entries over all masks."""
        return sum(int(mask.count_nonzero()) for mask in self.values())

    @property
    def sparsity(self) -> float:
        """Fraction of False entries over all masks, 0.0 when there are none."""
        return 1 - self.kept / self.total if self.total else 0.0

    def __repr__(self):
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

    def __repr__(self):
        return f"Count({self.kept:,} of {self.total:,} kept, {self.pruned:,} pruned, sparsity {self.sparsity:.4f})"


def prunable_weights(model: nn.Module, exclude: Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """The weights of all convolution and linear layers, {parameter name: parameter}, in module order, tied ones once.

    `exclude` holds names or globs of layers ("fc", "layer1.*") or of their weights ("fc.weight").
    Raises ValueError if nothing is left to prune, if an entry of `exclude` fits no layer, or if a layer's weight is
    computed by a parametrization (torch.nn.utils.prune, weight_norm) instead of being a parameter.
    """
    weights, seen = {}, set()
    for layer, module in model.named_modules():
        if not isinstance(module, _PRUNABLE):
            continue
        weight = module._parameters.get("weight")
        name = f"{layer}.weight" if layer else "weight"
        if weight is None:
            raise ValueError(
                f"{name} is computed by a parametrization (torch.nn.utils.prune, weight_norm, ...) and cannot be "
                "pruned as a parameter; remove the parametrization first"
            )
        if id(weight) not in seen:
            seen.add(id(weight))
            weights[name] = weight
    if not weights:
        raise ValueError(f"{type(model).__name__} has no convolution or linear layer: nothing to prune")
    excluded = match_layers(weights, [exclude] if isinstance(exclude, str) else exclude, "exclude")
    weights = {name: weight for name, weight in weights.items() if name not in excluded}
    if not weights:
        raise ValueError(f"exclude={exclude!r} leaves nothing to prune")
    return weights


def layer_name(name: str) -> str:
    """The layer that a weight belongs to: "conv1" for "conv1.weight"."""
    return name.removesuffix("weight").removesuffix(".")


def match_layers(names: Iterable[str], patterns: Iterable[str], argument: str) -> dict[str, str]:
    """{parameter name: the first of `patterns` that fits it}; each must fit a layer's or a parameter's name."""
    names, found = list(names), {}
    for pattern in patterns:
        fits = [n for n in names if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(layer_name(n), pattern)]
        if not fits:
            layers = [layer_name(name) for name in names]
            raise ValueError(f"{argument}: no prunable layer fits {pattern!r}; {nearest(pattern, layers)}")
        for name in fits:
            found.setdefault(name, pattern)
    return found


# --- Masks on a model ------------------------------------------------------------------------------------------------

_MASKS = weakref.WeakValueDictionary()  # id(parameter) -> _Mask; an entry lives as long as the _Mask in its module
_OPTIMIZERS = weakref.WeakSet()  # all that have taken a step: only these can hold state older than a pruning


class _Mask:
    """One parameter and its mask, kept in the parameter's module: deepcopy and pickle carry the pair along."""

    def __init__(self, weight: nn.Parameter, keep: torch.Tensor, original: torch.Tensor | None = None):
        self.weight, self.keep, self.original, self._factor = weight, keep, original, None
        _MASKS[id(weight)] = self

    def __getstate__(self):
        return self.weight, self.keep, self.original

    def __setstate__(self, state):  # runs in copies too, which have to announce themselves to the optimizer hook
        self.__init__(*state)

    def factor(self) -> torch.Tensor:
        """The mask as 0s and 1s of the weight's type and device: multiplying by a bool mask costs three times more."""
        old, weight = self._factor, self.weight
        if old is None or (old.dtype, old.device, old.stride()) != (weight.dtype, weight.device, weight.stride()):
            self._factor = torch.empty_like(weight, requires_grad=False).copy_(self.keep)
        return self._factor

    def apply(self):
        """Set what is pruned to +0.0."""
        self.keep, weight = self.keep.to(self.weight.device), self.weight.detach()
        if weight.device.type == "cpu" and weight.dtype in _BITS:
            bits = weight.view(_BITS[weight.dtype]).numpy()  # bits times 0 or 1: four times faster than masked_fill_
            np.multiply(bits, self.keep.numpy(), out=bits)
        else:
            weight.masked_fill_(~self.keep, 0)


_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def _hold_masks(optimizer, *_):
    """Zero the pruned weights, and their share of the optimizer's state, in everything that `optimizer` updates."""
    _OPTIMIZERS.add(optimizer)
    if not _MASKS:
        return
    tensors, factors = [], []
    for weight in (p for group in optimizer.param_groups for p in group["params"]):
        mask = _MASKS.get(id(weight))
        if mask is None:
            continue
        state = [s for s in optimizer.state.get(weight, {}).values() if torch.is_tensor(s) and s.shape == weight.shape]
        tensors += [weight.detach(), *state]
        factors += [mask.factor()] * (1 + len(state))
    if tensors:
        torch._foreach_mul_(tensors, factors)


register_optimizer_step_post_hook(_hold_masks)


def _reapply(module, _incompatible_keys=None):
    """After load_state_dict: what is pruned stays pruned, also where `assign=True` has put new parameters in."""
    for name, mask in module._pruneutils_masks.items():
        if _MASKS.get(id(mask.weight)) is not mask:
            continue  # a tied weight, whose mask has been replaced through another module
        if module._parameters[name] is not mask.weight:
            module._pruneutils_masks[name] = mask = _Mask(module._parameters[name], mask.keep, mask.original)
        mask.apply()


def masked(model: nn.Module) -> dict[str, _Mask]:
    """{parameter name: _Mask} of all masks that are still those of a present parameter."""
    found, seen = {}, set()
    for layer, module in model.named_modules():
        weight = module._parameters.get("weight") if isinstance(module, _PRUNABLE) else None
        if id(weight) in _MASKS and id(weight) not in seen:  # by the weight: another module may hold a tied one's mask
            seen.add(id(weight))
            found[f"{layer}.weight" if layer else "weight"] = mask = _MASKS[id(weight)]
            mask.keep = mask.keep.to(weight.device)  # the model may have moved
    return found


def get_masks(model: nn.Module) -> Masks:
    """A copy of the masks on `model`, in module order; empty if it has none."""
    return Masks({name: mask.keep.clone() for name, mask in masked(model).items()})


def set_masks(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Put `masks` {parameter name: bool or 0/1 tensor of the weight's shape} on `model`, in place of present ones.

    The named weights are zeroed where the mask is False, the others keep what they have. `set_masks(model, {name: w !=
    0 for name, w in pu.prunable_weights(model).items()})` adopts zeros that another tool has left. Raises ValueError
    for an unknown name, another shape, or entries other than 0 and 1, before anything is changed.
    """
    attach_masks(model, check_masks(model, masks))


def check_masks(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of `masks` as bool tensors on the devices of the weights; ValueError where they do not fit `model`."""
    weights, checked = prunable_weights(model), {}
    for name, mask in masks.items():
        if name not in weights:
            raise ValueError(f"no prunable weight is called {name!r}; {nearest(name, weights)}")
        weight, mask = weights[name], torch.as_tensor(mask)
        if mask.shape != weight.shape:
            raise ValueError(f"{name}: the mask has shape {tuple(mask.shape)}, the weight {tuple(weight.shape)}")
        checked[name] = mask.detach().to(weight.device, torch.bool, copy=True)
        if mask.dtype != torch.bool and not torch.equal(checked[name].to(mask), mask):
            raise ValueError(f"{name}: a mask holds only 0 and 1 (or False and True)")
    return checked


def attach_masks(
    model: nn.Module, masks: Mapping[str, torch.Tensor], originals: Mapping[str, torch.Tensor] | None = None
):
    """Give the named weights these bool masks, unchecked and not copied, and what `restore` brings back."""
    for name, keep in masks.items():
        module = model.get_submodule(layer_name(name))
        if not hasattr(module, "_pruneutils_masks"):
            module._pruneutils_masks = {}
            module._pruneutils_hook = module.register_load_state_dict_post_hook(_reapply)
        weight, old = module.weight, module._pruneutils_masks.get("weight")
        original = old.original if old is not None and old.original is not None else (originals or {}).get(name)
        module._pruneutils_masks["weight"] = mask = _Mask(weight, keep, original)
        mask.apply()
    for optimizer in list(_OPTIMIZERS):
        _hold_masks(optimizer)


def make_permanent(model: nn.Module) -> nn.Module:
    """Remove all masks and leave the zeros: an ordinary model again, whose zeros training may fill. Returns it."""
    for module in model.modules():
        if hasattr(module, "_pruneutils_masks"):
            for mask in module._pruneutils_masks.values():
                _MASKS.pop(id(mask.weight), None)
            module._pruneutils_hook.remove()
            del module._pruneutils_masks, module._pruneutils_hook
    return model


@torch.no_grad()
def restore(model: nn.Module) -> nn.Module:
    """Bring back the weights from before the first `prune(..., restorable=True)` and remove all masks. Returns `model`.

    Raises ValueError if no such weights are kept.
    """
    originals = [(mask.weight, mask.original) for mask in masked(model).values() if mask.original is not None]
    if not originals:
        raise ValueError("there are no weights to restore; they are kept by prune(..., restorable=True)")
    make_permanent(model)
    for weight, original in originals:
        weight.copy_(original)
    return model


# --- What a model holds ----------------------------------------------------------------------------------------------


def _kept(model: nn.Module) -> dict[str, tuple[nn.Parameter, int]]:
    """{parameter name: (weight, number kept)}: by the mask where there is one, by exact zeros elsewhere."""
    masks = {id(mask.weight): mask.keep for mask in masked(model).values()}
    return {
        name: (weight, int(masks.get(id(weight), weight.detach()).count_nonzero()))
        for name, weight in prunable_weights(model).items()
    }


def count(model: nn.Module) -> Count:
    """Count the prunable weights of `model`: `.total`, `.kept`, `.pruned` as Python ints and `.sparsity` in [0, 1].

    A weight is pruned if its mask says so; in a layer without a mask, if it is exactly zero.
    """
    layers = _kept(model).values()
    return Count(sum(weight.numel() for weight, _ in layers), sum(kept for _, kept in layers))


def layer_table(model: nn.Module) -> pd.DataFrame:
    """A row per prunable layer in module order: layer, shape (out, in, ...), total, kept, sparsity (a fraction)."""
    rows = [
        (layer_name(name), tuple(weight.shape), weight.numel(), kept, 1 - kept / weight.numel())
        for name, (weight, kept) in _kept(model).items()
    ]
    return pd.DataFrame(rows, columns=["layer", "shape", "total", "kept", "sparsity"])


@torch.no_grad()
def accuracy(model: nn.Module, data: object, topk: int = 1, precision: str = "float32") -> float:
    """Measure the fraction of samples classified correctly, in eval mode.

    Args:
        model: Any classifier that maps inputs (N, ...) to outputs (N, classes).
        data: One (inputs (N, ...), targets (N,)) pair of tensors, or an iterable of such batches.
        topk: Count a sample as correct if its target is among the `topk` highest outputs.
        precision: "float32" computes in the model's own type, "bfloat16" in that type (autocast), about twice as fast
            on hardware that has it; "auto" is bfloat16 for convolutional networks on such hardware. The outputs of
            close classes may change places in bfloat16.

    Returns:
        The accuracy, a float in [0, 1]. Every module's train or eval mode is put back.

    Raises:
        ValueError: If `data` holds no sample, `topk` exceeds the number of outputs, or `precision` is unknown.

    Example:
        >>> logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
        >>> pu.accuracy(torch.nn.Identity(), (logits, torch.tensor([1, 2])))
        0.5
        >>> pu.accuracy(torch.nn.Identity(), (logits, torch.tensor([1, 2])), topk=2)
        1.0
    """
    device, precision = device_of(model), resolve_precision(precision, model)
    hits = torch.zeros((), dtype=torch.long, device=device)  # summed on the device: one transfer at the end
    total = 0
    with in_mode(model, training=False):
        for inputs, targets in batches(data):
            targets = targets.to(device, non_blocking=True)
            with autocast(precision, device):
                outputs = model(inputs.to(device, non_blocking=True))
            if not 1 <= topk <= outputs.shape[1]:
                raise ValueError(f"topk={topk} is not within 1 and the model's {outputs.shape[1]} outputs")
            if topk == 1:
                hits += (outputs.argmax(1) == targets).sum()
            else:
                hits += (outputs.topk(topk, dim=1).indices == targets[:, None]).any(1).sum()
            total += len(targets)
    if total == 0:
        raise ValueError("accuracy needs at least one sample; data is empty")
    return hits.item() / total
