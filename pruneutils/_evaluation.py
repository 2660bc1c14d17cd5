"""Which outputs are correct: one rule for `accuracy` and for the training accuracy of `fit`."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real

import torch
import torch.nn.functional as F
from torch import nn

from ._checks import a_function, callers_level, inputs_told, whole
from ._torch import autocast, batches, device_of, full_float32, in_mode

Output = Callable[[object], torch.Tensor]
Metric = Callable[[torch.Tensor, torch.Tensor], object]

LEFT_OUT = -100  # the targets that torch's cross-entropy ignores by default, such as padding
_FORMS = "outputs (N, classes), (N, tokens, classes) and (N, classes, height, width) or any positions are understood"


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
            raise TypeError(_not_a_tensor(outputs, "the model" if self.output is None else "output="))
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
        if targets.device.type == "cpu" and outside.any():  # elsewhere this would wait; `mean` tells it
            wrong = ", ".join(map(str, targets[outside].unique().tolist()[:5]))
            raise ValueError(self._told_outside(f"targets of {wrong}", f"these {n_classes} outputs"))
        return torch.stack([hits.sum(), judged.sum(), outside.sum()])

    def mean(self, sums: torch.Tensor) -> float:
        """Return the mean that such sums make; ValueError if there is none."""
        total, judged, outside = sums.tolist()
        if outside:
            raise ValueError(self._told_outside(f"{outside:,} of {judged:,} targets", "these outputs"))
        if not judged:
            raise ValueError(f"there is nothing to judge: data is empty, or every target is {self.left_out} (left out)")
        return total / judged

    def _told_outside(self, which, outputs) -> str:
        left_out = f"targets of {self.left_out} are left out, and metric= may judge in any other way"
        return f"{which} are no classes of {outputs}; {left_out}"

    @torch.no_grad()
    def accuracy(self, model: nn.Module, data: object, precision: str) -> float:
        """Return the mean over all batches of `data`, in eval mode."""
        device = device_of(model)
        sums = torch.zeros(3, dtype=torch.long, device=device)  # summed on the device: one transfer at the end
        with in_mode(model, training=False), full_float32():
            for inputs, targets in batches(data):
                targets = targets.to(device, non_blocking=True)
                with autocast(precision, device), inputs_told(inputs, targets):
                    returned = model(inputs.to(device, non_blocking=True))
                sums = sums + self(self.outputs(returned), targets)
        return self.mean(sums)


def class_axis(outputs: torch.Tensor, targets: torch.Tensor) -> int:
    """Return the dimension of the classes; ValueError if outputs and targets do not fit together as documented."""
    shape, wanted = tuple(outputs.shape), tuple(targets.shape)
    told = f"outputs of shape {shape} and targets of shape {wanted}"
    if targets.is_floating_point() or targets.is_complex():
        kind = str(targets.dtype).removeprefix("torch.")
        raise ValueError(f"targets must be classes, whole numbers such as int64, not {kind} ({told}); {_ways(wanted)}")
    if outputs.ndim < 2 or outputs.ndim != targets.ndim + 1:
        raise ValueError(f"{told} do not fit together: {_FORMS}, with targets that lack the classes; {_ways(wanted)}")
    axes = [axis for axis in ((2, 1) if outputs.ndim == 3 else (1,)) if shape[:axis] + shape[axis + 1 :] == wanted]
    if not axes:
        raise ValueError(f"{told} do not fit together: {_FORMS}; {_ways(wanted)}")
    axis = axes[0]
    if len(axes) > 1 and shape[1] > 1:
        warnings.warn(
            f"{told} are read as (N, tokens, classes), not as (N, classes, positions): both fit. If the classes come "
            "second, say so by metric=lambda out, targets: out.argmax(1) == targets, and in training by a loss_fn",
            stacklevel=callers_level(),
        )
    if shape[axis] < 2:
        raise ValueError(f"{told}: one output cannot tell classes apart; {_ways(wanted)}")
    return axis


def cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return torch's cross-entropy, for outputs (N, tokens, classes) too, where torch wants the classes second."""
    tokens = outputs.ndim == 3 and outputs.shape[:2] == targets.shape
    return F.cross_entropy(outputs.transpose(1, 2) if tokens else outputs, targets)


def of_returned(loss_fn: Callable | None, output: Output | None) -> Callable | None:
    """Return a loss of what the model returns, where `loss_fn` is one of what `output` takes from that."""
    if output is None:
        return loss_fn
    return lambda returned, targets: (loss_fn or cross_entropy)(output(returned), targets)


def _ways(targets) -> str:
    dropped = "targets.squeeze(1) drops the dimension of 1, and " if len(targets) > 1 and targets[1] == 1 else ""
    return f"{dropped}metric=lambda outputs, targets: ... (a number for each sample) judges anything else"


def _not_a_tensor(outputs, whose) -> str:
    kind, example = type(outputs).__name__, "..."
    if isinstance(outputs, Mapping) and outputs:
        keys = [str(key) for key in outputs]
        likely = next((key for key in ("logits", "out", "output") if key in keys), keys[0])
        kind, example = f"{kind} with {', '.join(map(repr, keys))}", f"out[{likely!r}]"
    elif isinstance(outputs, (tuple, list)):
        kind, example = f"{kind} of {len(outputs)}", "out[0]"
    elif hasattr(outputs, "logits"):
        example = "out.logits"
    return f"{whose} returns a {kind}, not a tensor of outputs; say where these are by output=lambda out: {example}"


def _measured(value, targets) -> torch.Tensor:
    """A number for each sample, or the mean of a batch, as sums."""
    if not torch.is_tensor(value) and not isinstance(value, Real):
        raise TypeError(f"metric must return a tensor (a number for each sample) or a number, not {value!r:.60}")
    value = torch.as_tensor(value, device=targets.device).detach()
    if value.ndim == 0:  # the mean of the batch
        total, judged = value.double() * len(targets), len(targets)
    else:
        total, judged = value.double().sum(), value.numel()
    return torch.stack([total, total.new_tensor(judged), total.new_zeros(())])
