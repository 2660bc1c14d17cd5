"""Which outputs are correct: one rule for `accuracy` and the training accuracy of `fit`; and the perplexity."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real

import torch
import torch.nn.functional as F
from torch import nn

from ._checks import a_function, a_model, add_shapes_to_errors, callers_level, whole
from ._torch import LEFT_OUT, autocast, batches, device_of, forward, full_float32, in_mode, resolve_precision, to_device

Output = Callable[[object], torch.Tensor]
Metric = Callable[[torch.Tensor, torch.Tensor], object]

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
        data: One (inputs, targets) pair of tensors, or an iterable of such batches; or, as a tokenizer gives, mappings
            of tensors with "labels", where padded positions do not count. Nor do targets of -100.
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
        if torch.is_tensor(outputs) or (self.metric is not None and self.output is None):
            return outputs
        what = f"{'the model' if self.output is None else 'output='} returns a {type(outputs).__name__} and no tensor"
        raise TypeError(f"{what}: give output=, such as output=lambda out: out['logits']")

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
                    returned = forward(model, to_device(inputs, device), whole=self.output is not None)
                sums = sums + self(self.outputs(returned), targets)
        return self.mean(sums)


def class_axis(outputs: torch.Tensor, targets: torch.Tensor) -> int:
    """Return the dimension of the classes; ValueError if outputs and targets do not fit together."""
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
        way = "metric=lambda out, targets: out.argmax(1) == targets reads the classes second"
        warnings.warn(f"{both} are read as (N, tokens, classes); {way}", stacklevel=callers_level())
    if shape[axes[0]] < 2:
        raise ValueError(f"{both}: one output cannot decide between classes; {_WAY}")
    return axes[0]


def cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return torch's cross-entropy, of outputs (N, tokens, classes) too."""
    tokens = outputs.ndim == 3 and outputs.shape[:2] == targets.shape
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten()) if tokens else F.cross_entropy(outputs, targets)


def of_returned(loss_fn: Callable | None, output: Output | None) -> Callable | None:
    """Return a loss of what the model returns, where `loss_fn` is one of what `output` takes from that."""
    if output is None:
        return loss_fn

    def loss(returned, targets):
        return (loss_fn or cross_entropy)(output(returned), targets)

    loss.of_returned = True
    return loss


def _measured(value, targets) -> torch.Tensor:
    """A number for each sample, or the mean of a batch, as sums."""
    if not torch.is_tensor(value) and not isinstance(value, Real):
        raise TypeError(f"metric must return a tensor (a number for each sample) or a number, not {value!r:.60}")
    value = torch.as_tensor(value, device=targets.device).detach().double()
    value = value.expand(len(targets)) if value.ndim == 0 else value
    return torch.stack([value.sum(), value.new_tensor(value.numel()), value.new_zeros(())])


@torch.no_grad()
def perplexity(model: nn.Module, tokens: object, stride: int | None = None) -> float:
    """Measure how well a language model predicts each token from those before it; 1 is perfect.

    Args:
        model: It maps tokens (N, T) to logits (N, T, vocabulary), or to an object with `.logits` as in transformers.
        tokens: Blocks (N, T), as `pu.data.text` gives them; or batches {"input_ids": ..., "attention_mask": ...}, one
            or an iterable. Padded tokens, and "labels" of -100, do not count.
        stride: None: each block stands alone. Otherwise the blocks are one text, read in full windows of T tokens that
            begin `stride` apart, and each token is predicted once.

    Returns:
        exp of the mean negative log-likelihood of a token; ValueError if there is no token to predict.

    Example:
        >>> uniform = torch.nn.Embedding.from_pretrained(torch.zeros(8, 8))
        >>> round(pu.perplexity(uniform, torch.tensor([[1, 2, 3]])), 4)
        8.0
    """
    device, loss, n = device_of(model), 0.0, 0
    with in_mode(model, training=False), full_float32():
        for inputs, following in _with_next_tokens(tokens, stride):
            logits = forward(model, to_device(inputs, device)).flatten(0, 1).float()
            loss += F.cross_entropy(logits, following.flatten().to(device), reduction="sum").item()
            n += int((following != LEFT_OUT).sum())
    if not n:
        raise ValueError("there is no token to predict: a block needs two tokens that are not padded")
    return math.exp(loss / n)


def _with_next_tokens(tokens, stride) -> Iterator[tuple]:
    """Yield what a model reads, and at each position the token that follows, LEFT_OUT where it does not count."""
    if not torch.is_tensor(tokens):
        if stride is not None:
            raise ValueError(f"stride={stride} is for a tensor of blocks (N, T), not for batches")
        for batch in [tokens] if isinstance(tokens, Mapping) else tokens:
            yield next(batches({"labels": batch["input_ids"], **batch}))
        return
    length = tokens.shape[1]
    if stride is not None:
        if whole("stride", stride) >= length:
            raise ValueError(f"stride={stride} must be less than the {length} tokens of a block")
        tokens = tokens.flatten().unfold(0, length, stride)
    following = F.pad(tokens[:, 1:], (0, 1), value=LEFT_OUT)
    if stride is not None:
        following[1:, : length - stride - 1] = LEFT_OUT  # the window before has predicted these
    n_blocks = max(1, 1024 // length)  # at a time, as the logits of a large vocabulary take memory
    yield from zip(tokens.split(n_blocks), following.split(n_blocks))
