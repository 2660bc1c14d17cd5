"""Prunable weights, their masks, and what can be read off a masked model.

A mask belongs to one parameter and is kept outside of `state_dict`, so the model stays an ordinary one. What is true of
masks, and how they hold, is told in `pruneutils._masks`.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from . import _masks
from ._checks import a_model, callers_level, masks_by_name, nearest
from ._evaluation import Judge, Metric, Output
from ._masks import Mask
from ._masks import attach as attach_masks
from ._prunable import layer_name, match_layers, present_weights, prunable, prunable_weights
from ._torch import lazy_clone, resolve_precision

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Count",
    "Masks",
    "RevivedWeightsWarning",
    "accuracy",
    "attach_masks",
    "check_masks",
    "count",
    "dense_gradients",
    "get_masks",
    "hold",
    "layer_name",
    "layer_table",
    "make_permanent",
    "masked",
    "match_layers",
    "prunable",
    "prunable_weights",
    "replace_mask",
    "restore",
    "revived",
    "set_masks",
]


class RevivedWeightsWarning(UserWarning):
    """Weights that a mask prunes are not zero: something other than a torch optimizer has written to them."""


class Masks(dict[str, torch.Tensor]):
    """A dict {parameter name: bool tensor of the parameter's shape}, True = kept.

    Example:
        >>> model = pu.models.create("lenet300")
        >>> masks = pu.prune(model, "magnitude", 0.9)
        >>> masks.total, masks.kept, round(masks.sparsity, 4)
        (266200, 26620, 0.9)
    """

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

    def __repr__(self) -> str:
        return f"Masks({len(self)} weights, {self.kept:,} of {self.total:,} kept, sparsity {self.sparsity:.4f})"


@dataclass(frozen=True)
class Count:
    """How many prunable weights a model has, and how many of them are kept and pruned; see `count`."""

    total: int
    kept: int
    unmasked_zeros: int = 0  # weights that are exactly zero, though no mask prunes them

    @property
    def pruned(self) -> int:
        """Number of weights pruned."""
        return self.total - self.kept

    @property
    def sparsity(self) -> float:
        """Fraction pruned, in [0, 1]."""
        return self.pruned / self.total

    def __repr__(self) -> str:
        zeros = f", {self.unmasked_zeros:,} zeros without a mask" if self.unmasked_zeros else ""
        kept = f"{self.kept:,} of {self.total:,} kept"
        return f"Count({kept}, {self.pruned:,} pruned, sparsity {self.sparsity:.4f}{zeros})"


# --- Masks on a model ------------------------------------------------------------------------------------------------


def masked(model: nn.Module) -> dict[str, Mask]:
    """Return {parameter name: mask} of the masked weights; ValueError if one was replaced by another shape."""
    _masks.settle(a_model(model))
    found = {name: _masks.mask_of(weight) for name, weight in present_weights(model).items()}
    return {name: mask for name, mask in found.items() if mask is not None}


def get_masks(model: nn.Module) -> Masks:
    """Return a copy of the masks on a model.

    Args:
        model: Any `nn.Module`.

    Returns:
        The masks in module order, {parameter name: bool tensor of the weight's shape}, True = kept; empty if the model
        has none.

    Raises:
        ValueError: If a masked parameter was replaced by one of another shape.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> pu.get_masks(model)
        Masks(0 weights, 0 of 0 kept, sparsity 0.0000)
        >>> pu.set_masks(model, {"weight": torch.tensor([[1, 0, 1]])})
        >>> pu.get_masks(model)["weight"]
        tensor([[ True, False,  True]])
    """
    return Masks({name: lazy_clone(mask.keep) for name, mask in masked(model).items()})


def set_masks(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Put masks from anywhere on a model: from another model, a file, another library.

    A mask takes the place of the one that its weight has; unnamed weights keep theirs. Pruned weights become zero, kept
    weights stay as they are. A weight that was replaced by one of another shape gets its new mask this way too.

    Args:
        model: Any `nn.Module` with convolution or linear layers.
        masks: {parameter name: bool or 0/1 tensor of the weight's shape}, True or 1 = kept. The prefixes "module." and
            "_orig_mod.", which DataParallel and torch.compile put before names, may be there or not.

    Raises:
        ValueError: For an unknown name, another shape, or entries other than 0 and 1. The model is then as it was.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> pu.set_masks(model, {"weight": torch.tensor([[1, 0, 1]])})
        >>> pu.count(model)
        Count(2 of 3 kept, 1 pruned, sparsity 0.3333)

        Zeros that another tool has left become masks:

        >>> pu.set_masks(model, {name: weight != 0 for name, weight in pu.prunable_weights(model).items()})
    """
    attach_masks(model, check_masks(model, masks))


def replace_mask(model: nn.Module, name: str, mask: torch.Tensor) -> None:
    """Give one weight a new mask after the parameter was replaced by one of any shape, such as after its filters went.

    Other weights are not looked at, so the layers of a model can be replaced one after the other. What `restore` would
    have brought back to this weight is forgotten. Raises ValueError as `set_masks` does.
    """
    attach_masks(model, check_masks(model, {name: mask}))
    _masks.mask_of(prunable_weights(model)[name]).original = None


def check_masks(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies of `masks` as bool tensors on the devices of the weights; ValueError if they do not fit `model`."""
    weights, checked = prunable_weights(model), {}
    bare = {_bare(name): name for name in weights}
    for given, mask in masks_by_name(masks).items():
        name = given if given in weights else bare.get(_bare(str(given)))
        if name is None:
            raise ValueError(f"no prunable weight is called {given!r}; {nearest(given, weights)}")
        if name in checked:
            raise ValueError(f"{name} is given two masks, one of them as {given!r}")
        weight = weights[name]
        try:
            mask = torch.as_tensor(mask).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{given}: a mask is a tensor of 0 and 1, not {mask!r:.80}") from error
        if mask.shape != weight.shape:
            raise ValueError(f"{name}: the mask has shape {tuple(mask.shape)}, the weight {tuple(weight.shape)}")
        keep = mask.to(torch.bool, copy=True)
        if mask.dtype != torch.bool and not torch.equal(keep.to(mask), mask):
            raise ValueError(f"{name}: a mask holds only 0 and 1 (or False and True)")
        checked[name] = keep if weight.is_meta else keep.to(weight.device)
    return checked


def _bare(name: str) -> str:
    """Return a parameter's name without what torch.compile and DataParallel put before it."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    return ".".join(parts[1:] if parts[0] == "module" else parts)


def hold(model: nn.Module) -> nn.Module:
    """Set all pruned weights to zero again, after something other than a torch optimizer has written to them.

    Masks hold by themselves in every step of a torch optimizer, in `load_state_dict`, and in loops of your own such as
    `p.data -= lr * p.grad`, because gradients of pruned weights are zero. Call `hold` after `reset_parameters`, and
    after updates that do not come from `.grad`.

    Args:
        model: Any `nn.Module`. Without masks, nothing happens.

    Returns:
        The model.

    Raises:
        ValueError: If a masked parameter was replaced by one of another shape.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> pu.set_masks(model, {"weight": torch.tensor([[1, 0, 1]])})
        >>> model.reset_parameters()
        >>> int(pu.hold(model).weight.count_nonzero())
        2
    """
    attach_masks(model, {name: mask.keep for name, mask in masked(model).items()})
    return model


@contextlib.contextmanager
def dense_gradients(model: nn.Module) -> Iterator[nn.Module]:
    """Let backward passes inside the `with` block compute the gradients of pruned weights too.

    Otherwise these are zero after every backward pass, so that everything downstream sees a pruned model. Methods that
    decide which weights come back need them (RigL's `regrow` from `.grad`, movement pruning). Pruned weights stay zero
    all the same, except inside the steps of optimizers that evaluate the model several times, such as LBFGS.

    Args:
        model: Any `nn.Module` with convolution or linear layers.

    Yields:
        The model.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> pu.set_masks(model, {"weight": torch.tensor([[1, 0, 1]])})
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> model.weight.grad
        tensor([[1., 0., 1.]])
        >>> model.zero_grad()
        >>> with pu.dense_gradients(model):
        ...     model(torch.ones(1, 3)).sum().backward()
        >>> model.weight.grad
        tensor([[1., 1., 1.]])
    """
    changed = _masks.set_dense_gradients(present_weights(model).values(), True)
    try:
        yield model
    finally:
        _masks.set_dense_gradients(changed, False)


def make_permanent(model: nn.Module) -> nn.Module:
    """Remove all masks and leave the zeros: an ordinary model again, whose zeros training may fill.

    Args:
        model: Any `nn.Module`.

    Returns:
        The model.

    Warns:
        UserWarning: If a weight is shared with a module outside of `model` that holds its mask too. It stays masked
            until that module is made permanent.

    Example:
        >>> model = pu.models.create("lenet300")
        >>> masks = pu.prune(model, "magnitude", 0.9)
        >>> pu.make_permanent(model) is model
        True
        >>> pu.get_masks(model), pu.count(model).kept
        (Masks(0 weights, 0 of 0 kept, sparsity 0.0000), 26620)
    """
    if shared := _masks.let_go(a_model(model)):
        warnings.warn(
            f"{', '.join(shared)}: shared with a pruned model outside of this one, and masked until that one is made "
            "permanent too",
            stacklevel=callers_level(),
        )
    return model


@torch.no_grad()
def restore(model: nn.Module) -> nn.Module:
    """Bring back the weights from before the first `prune(..., restorable=True)`, and remove their masks.

    Layers that were pruned without `restorable` keep their masks.

    Args:
        model: A model that was pruned with `restorable=True`.

    Returns:
        The model.

    Raises:
        ValueError: If no such weights are kept, or if one is shared with another pruned model. Nothing is changed then.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> before = model.weight.tolist()
        >>> masks = pu.prune(model, "magnitude", 0.67, restorable=True)
        >>> pu.restore(model).weight.tolist() == before
        True
    """
    masks, weights = masked(model), present_weights(model)
    kept = {name: mask.original for name, mask in masks.items() if mask.original is not None}
    if not kept:
        raise ValueError("there are no weights to restore; they are kept by prune(..., restorable=True)")
    if shared := [name for name in kept if _masks.claimed_elsewhere(model, masks[name])]:
        raise ValueError(
            f"{', '.join(shared)}: shared with a pruned model outside of this one; remove that one's masks first, by "
            "pu.make_permanent"
        )
    _masks.let_go(model, [weights[name] for name in kept])
    for name, original in kept.items():
        weights[name].copy_(original)
    return model


# --- What a model holds ----------------------------------------------------------------------------------------------


def revived(model: nn.Module) -> dict[str, int]:
    """Return {parameter name: pruned weights that are not zero} of the weights that have any."""
    masks, weights = masked(model), present_weights(model)
    found = {name: _n_revived(weights[name], mask.keep) for name, mask in masks.items()}
    return {name: n for name, n in found.items() if n}


def _n_revived(weight: torch.Tensor, keep: torch.Tensor) -> int:
    if weight.is_meta:
        return 0
    return int((weight.detach() != 0).logical_and_(~keep).count_nonzero())


def _kept(model: nn.Module) -> dict[str, tuple[nn.Parameter, int, int]]:
    """Return {parameter name: (weight, number kept, zeros that no mask prunes)}; warn of pruned weights that live.

    These count as kept. In a model without any mask, zeros count as pruned.
    """
    masks, layers, alive = masked(model), {}, {}
    for name, weight in prunable_weights(model).items():
        mask, kept = masks.get(name), weight.numel()
        if mask is not None:
            kept = int(mask.keep.count_nonzero())
            if n := _n_revived(weight, mask.keep):
                alive[name] = n
                kept += n
        nonzero = kept if weight.is_meta else int(weight.detach().count_nonzero())
        layers[name] = weight, kept if masks else nonzero, kept - nonzero
    if alive:
        warnings.warn(
            f"{sum(alive.values()):,} pruned weights are not zero "
            f"({', '.join(f'{layer_name(name)}: {n:,}' for name, n in alive.items())}), and are counted as "
            "kept; something other than a torch optimizer has written to them. pu.hold(model) zeroes them again",
            RevivedWeightsWarning,
            stacklevel=callers_level(),
        )
    return layers


def count(model: nn.Module) -> Count:
    """Count the prunable weights of a model, and how many of them are kept and pruned.

    A weight is pruned if a mask says so and the weight is zero. In a model without any mask, all weights that are
    exactly zero count as pruned: its zeros may come from `make_permanent` or another tool.

    Args:
        model: Any `nn.Module` with convolution or linear layers.

    Returns:
        `.total`, `.kept` and `.pruned` as Python ints, exact for any size, `.sparsity`, a fraction in [0, 1], and
        `.unmasked_zeros`, the number of weights that are exactly zero though no mask prunes them.

    Raises:
        ValueError: If the model has nothing to prune, or a masked parameter was replaced by one of another shape.

    Warns:
        RevivedWeightsWarning: If pruned weights are not zero. They count as kept; `hold` zeroes them again.

    Example:
        >>> model = pu.models.create("lenet300")
        >>> masks = pu.prune(model, "magnitude", 0.9)
        >>> pu.count(model)
        Count(26,620 of 266,200 kept, 239,580 pruned, sparsity 0.9000)
    """
    layers = _kept(model).values()
    return Count(sum(w.numel() for w, _, _ in layers), sum(kept for _, kept, _ in layers), sum(n for *_, n in layers))


def layer_table(model: nn.Module) -> "pd.DataFrame":
    """Count the weights of each prunable layer.

    Args:
        model: Any `nn.Module` with convolution or linear layers.

    Returns:
        A row per layer in module order with the columns layer (its name), shape (of the weight: (out, in, ...)), total,
        kept (as `count` counts them) and sparsity (a fraction).

    Raises:
        ValueError: As `count` does.

    Warns:
        RevivedWeightsWarning: As `count` does.

    Example:
        >>> model = pu.models.create("lenet300")
        >>> masks = pu.prune(model, "magnitude", 0.9, scope="layer")
        >>> pu.layer_table(model)
          layer       shape   total   kept  sparsity
        0   fc1  (300, 784)  235200  23520       0.9
        1   fc2  (100, 300)   30000   3000       0.9
        2   fc3   (10, 100)    1000    100       0.9
    """
    rows = [
        (layer_name(name), tuple(weight.shape), weight.numel(), kept, 1 - kept / weight.numel())
        for name, (weight, kept, _) in _kept(model).items()
    ]
    import pandas as pd

    return pd.DataFrame(rows, columns=["layer", "shape", "total", "kept", "sparsity"])


def accuracy(
    model: nn.Module,
    data: object,
    topk: int = 1,
    precision: str = "float32",
    *,
    output: Output | None = None,
    metric: Metric | None = None,
) -> float:
    """Measure the fraction of samples classified correctly, in eval mode.

    Args:
        model: Any classifier that maps inputs (N, ...) to outputs (N, classes) for targets (N,); or to outputs
            (N, tokens, classes) for targets (N, tokens); or to outputs (N, classes, height, width), or with
            any other positions, for targets (N, height, width). Each token or pixel counts.
        data: One (inputs (N, ...), targets) pair of tensors, or an iterable of such batches. Targets of -100, which
            cross-entropy ignores, are left out.
        topk: Count a sample as correct if its target is among the `topk` highest outputs.
        precision: "float32" computes in the model's own type, "bfloat16" in that type (autocast), about twice as fast
            on hardware that has it; "auto" is bfloat16 for convolutional networks on such hardware. The outputs of
            close classes may change places in bfloat16.
        output: Takes what the model returns and gives the tensor of outputs, for models that return tuples, dicts or
            objects: `output=lambda out: out["logits"]`.
        metric: `(outputs, targets) -> a number for each sample` (or their mean over the batch), measured in place of
            the accuracy; for outputs of any other form.

    Returns:
        The accuracy, a float in [0, 1], or the mean of `metric`. Every module's train or eval mode is put back.

    Raises:
        ValueError: If `data` holds no sample, `topk` exceeds the number of outputs, `precision` is unknown, or outputs
            and targets do not fit together.
        TypeError: If the model returns no tensor and there is no `output`.

    Warns:
        UserWarning: If outputs (N, tokens, classes) could as well be (N, classes, positions), since both are as many.

    Example:
        >>> logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
        >>> pu.accuracy(torch.nn.Identity(), (logits, torch.tensor([1, 2])))
        0.5
        >>> pu.accuracy(torch.nn.Identity(), (logits, torch.tensor([1, 2])), topk=2)
        1.0

        How far are the outputs of a regression from their targets?

        >>> outputs, targets = torch.tensor([[1.0], [4.0]]), torch.tensor([[1.5], [4.0]])
        >>> pu.accuracy(torch.nn.Identity(), (outputs, targets), metric=lambda out, y: (out - y).abs())
        0.25
    """
    return Judge(topk, output, metric).accuracy(model, data, resolve_precision(precision, a_model(model)))
