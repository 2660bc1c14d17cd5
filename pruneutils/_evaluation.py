"""Which outputs are correct: one rule for `accuracy` and for the training accuracy of `fit`."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
import torch.nn.functional as F
from torch import nn

from ._checks import a_function, a_model, add_shapes_to_errors, callers_level, whole
from ._torch import autocast, batches, device_of, full_float32, in_mode, resolve_precision

Output = Callable[[object], torch.Tensor]
Metric = Callable[[torch.Tensor, torch.Tensor], object]

LEFT_OUT = -100  # the targets that torch's cross-entropy ignores by default, such as padding
_WAY = "metric=lambda outputs, targets: ... (a number for each sample) judges anything else"


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
        model: Any classifier whose outputs are (N, classes) for targets (N,), (N, tokens, classes) for (N, tokens), or
            (N, classes, height, width) for (N, height, width). (N, classes, positions) needs `metric`.
        data: One (inputs, targets) pair of tensors, or an iterable of such batches. Targets of -100 do not count.
        topk: Count a sample as correct if its target is among the `topk` highest outputs.
        precision: "float32" (the model's own type), "bfloat16" (autocast), or "auto": as for `fit`.
        output: From what the model returns to the tensor of outputs, such as `lambda out: out["logits"]`.
        metric: `(outputs, targets) -> a number for each sample` (or their mean), measured instead of the accuracy.

    Returns:
        The accuracy, a float in [0, 1], or the mean of `metric`.

    Raises:
        ValueError: If `data` holds no sample, `topk` exceeds the number of outputs, or outputs and targets do not fit.

    Example:
        >>> logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
        >>> pu.accuracy(torch.nn.Identity(), (logits, torch.tensor([1, 2])))
        0.5
    """
    return Judge(topk, output, metric).accuracy(model, data, resolve_precision(precision, a_model(model)))


@dataclass(frozen=True)
class Judge:
    """Judges batches of outputs: sums over batches are plain additions, on the model's device."""

    topk: int = 1
    output: Output | None = None  # from what the model returns to a tensor of outputs
    metric: Metric | None = None  # takes the place of the rule
    left_out: int = LEFT_OUT  # targets that do not count

    def __post_init__(self):
        a_function("output", self.output)
        a_function("metric", self.metric)
        whole("topk", self.topk)
        if self.metric is not None and self.topk != 1:
            raise ValueError(f"topk={self.topk} belongs to the accuracy, and metric takes its place: give one of them")

    def outputs(self, returned: object) -> torch.Tensor:
        """Return the outputs among what a model returns; TypeError if it does not say where they are."""
        outputs = returned if self.output is None else self.output(returned)
        if not torch.is_tensor(outputs) and (self.metric is None or self.output is not None):
            whose = "the model" if self.output is None else "output="
            kind = f"a {type(outputs).__name__}, not a tensor of outputs"
            raise TypeError(f"{whose} returns {kind}: give output=, such as output=lambda out: out['logits']")
        return outputs

    @torch.no_grad()
    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return a tensor of three: the sum over a batch, how much was judged, and how many targets fit no output."""
        if self.metric is not None:
            return _measured(self.metric(outputs, targets), targets)
        axis = class_axis(outputs, targets)
        n_classes = outputs.shape[axis]
        if self.topk > n_classes:
            raise ValueError(f"topk={self.topk} is not within 1 and the model's {n_classes} outputs")
        if self.topk == 1:
            hits = outputs.argmax(axis) == targets
        else:
            hits = (outputs.topk(self.topk, dim=axis).indices == targets.unsqueeze(axis)).any(axis)
        judged = targets != self.left_out
        outside = ((targets < 0) | (targets >= n_classes)) & judged
        if targets.device.type == "cpu" and outside.any():  # elsewhere this would wait; `mean` raises
            wrong = ", ".join(map(str, targets[outside].unique().tolist()[:5]))
            raise ValueError(f"targets {wrong} fit none of {n_classes} outputs; {self.left_out} does not count; {_WAY}")
        return torch.stack([hits.sum(), judged.sum(), outside.sum()])

    def mean(self, sums: torch.Tensor) -> float:
        """Return the mean that such sums make; ValueError if there is none."""
        total, judged, outside = sums.tolist()
        if outside:
            raise ValueError(f"{outside:,} of {judged:,} targets are none of the classes; {_WAY}")
        if not judged:
            raise ValueError(f"there is nothing to judge: data is empty, or every target is {self.left_out} (left out)")
        return total / judged

    @torch.no_grad()
    def accuracy(self, model: nn.Module, data: object, precision: str) -> float:
        """Return the mean over all batches of `data`, in eval mode."""
        device = device_of(model)
        sums = torch.zeros(3, dtype=torch.long, device=device)  # summed on the device: one transfer at the end
        with in_mode(model, training=False), full_float32():
            for inputs, targets in batches(data):
                targets = targets.to(device, non_blocking=True)
                with autocast(precision, device), add_shapes_to_errors(inputs, targets):
                    returned = model(inputs.to(device, non_blocking=True))
                sums = sums + self(self.outputs(returned), targets)
        return self.mean(sums)


def class_axis(outputs: torch.Tensor, targets: torch.Tensor) -> int:
    """Return the dimension of the classes; ValueError if outputs and targets do not fit together as documented."""
    shape, wanted = tuple(outputs.shape), tuple(targets.shape)
    both = f"outputs of shape {shape} and targets of shape {wanted}"
    if targets.is_floating_point() or targets.is_complex():
        raise ValueError(f"targets must be classes, whole numbers such as int64, not {targets.dtype} ({both}); {_WAY}")
    candidates = (2, 1) if outputs.ndim == 3 else (1,)
    axes = [axis for axis in candidates if outputs.ndim > 1 and shape[:axis] + shape[axis + 1 :] == wanted]
    if not axes:
        forms = "outputs (N, classes), (N, tokens, classes) and (N, classes, height, width) are understood"
        raise ValueError(f"{both} do not fit together: {forms}, with targets that lack the classes; {_WAY}")
    if len(axes) > 1 and shape[1] > 1:
        way = "if the classes come second, say so by metric=lambda out, targets: out.argmax(1) == targets"
        warnings.warn(f"{both} are read as (N, tokens, classes), but {way}", stacklevel=callers_level())
    if shape[axes[0]] < 2:
        raise ValueError(f"{both}: one output cannot decide between classes; {_WAY}")
    return axes[0]


def cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return torch's cross-entropy, for outputs (N, tokens, classes) too, where torch wants the classes second."""
    tokens = outputs.ndim == 3 and outputs.shape[:2] == targets.shape
    return F.cross_entropy(outputs.transpose(1, 2) if tokens else outputs, targets)


def of_returned(loss_fn: Callable | None, output: Output | None) -> Callable | None:
    """Return a loss of what the model returns, where `loss_fn` is one of what `output` takes from that."""
    if output is None:
        return loss_fn
    return lambda returned, targets: (loss_fn or cross_entropy)(output(returned), targets)


def _measured(value, targets) -> torch.Tensor:
    """A number for each sample, or the mean of a batch, as sums."""
    if not torch.is_tensor(value) and not isinstance(value, Real):
        raise TypeError(f"metric must return a tensor (a number for each sample) or a number, not {value!r:.60}")
    value = torch.as_tensor(value, device=targets.device).detach()
    judged = len(targets) if value.ndim == 0 else value.numel()  # the mean of the batch, or a number for each sample
    total = value.double() * judged if value.ndim == 0 else value.double().sum()
    return torch.stack([total, total.new_tensor(judged), total.new_zeros(())])
