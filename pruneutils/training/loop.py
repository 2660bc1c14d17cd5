"""The training loop: `fit` trains a dense or a pruned model; the masks hold."""

import contextlib
import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from .. import _checks
from .._evaluation import LEFT_OUT, Judge, Metric, Output, cross_entropy
from .._torch import autocast, device_of, in_mode, resolve_precision, seed_device
from ..model_utils import count, dense_gradients
from . import numerics, optimizers
from .batches import Batches, epochs_of

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "epoch", "train_loss", "train_accuracy", "test_accuracy", "sparsity", "lr", "precision", "seconds",
)  # fmt: skip


class DivergenceError(RuntimeError):
    """The training loss or a weight is no longer finite."""


def fit(
    model: nn.Module,
    train: object,
    test: object = None,
    epochs: int = 10,
    optimizer: str | torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] = "sgd",
    lr: float | None = None,
    lr_schedule: str | Callable[[float], float] = "constant",
    seed: int = 0,
    *,
    batch_size: int = 128,
    weight_decay: float = 0.0,
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    precision: str = "float32",
    test_every: int = 1,
    steps_per_epoch: int | None = None,
    on_step: Callable[[nn.Module, int, int], None] | None = None,
    start_step: int = 0,
    output: Output | None = None,
    metric: Metric | None = None,
) -> "pd.DataFrame":
    """Train a model in place; its masks hold.

    The same seed repeats the run bit for bit on one machine. The global random state and every module's train or eval
    mode are left as they were, also by an interruption.

    Args:
        model: Any classifier that `pu.accuracy` understands; with `metric`, any model.
        train: What `pu.data.load` returns; or one (inputs, targets) pair of tensors, which is cut into shuffled
            batches; or batches that can be iterated again and have a length, such as a DataLoader.
        test: What `pu.accuracy` takes, or None.
        epochs: How often each training sample is seen, at least 1 (less often with `steps_per_epoch`).
        optimizer: "sgd" (momentum 0.9, Nesterov), "adam", an Optimizer of this model, or a function
            `parameters -> Optimizer`.
        lr: The learning rate of "sgd" (0.1 by default) or "adam" (0.001).
        lr_schedule: The learning rate of each step: "constant", "step" (a tenth of it after half of the steps, a
            hundredth after three quarters), "cosine" (falls to 0), "one-cycle" (rises for a quarter, then falls to 0),
            or a function of the progress in [0, 1] that returns a factor on `lr`.
        seed: Of the order of the samples, augmentation and dropout.
        batch_size: Samples in a step; batches that you give keep their own size.
        weight_decay: Of "sgd" or "adam".
        loss_fn: `(outputs, targets) -> mean loss over the batch`, such as
            `torch.nn.CrossEntropyLoss(label_smoothing=0.1)`; cross-entropy by default.
        precision: Of training and evaluation: "float32" (never TF32), "bfloat16" (autocast), or "auto", bfloat16 for
            convolutional networks on a GPU and on a CPU with fast instructions for it. The results of "auto" differ
            between machines.
        test_every: Measure the test accuracy after every so many epochs, and after the last one.
        steps_per_epoch: End each epoch after so many steps; None sees all samples. Each epoch is shuffled anew, so a
            short one sees other samples every time.
        on_step: Called as `on_step(model, step, steps)` after each step; the first is 1, the last is `steps`. If it has
            a true attribute `dense_gradients`, it finds the gradients of pruned weights in `.grad` too.
        start_step: Leave out so many steps but keep their place in the learning-rate schedule, the order of the
            samples and the dropout: training goes on as from a snapshot taken there, except that the optimizer has no
            momentum yet.
        output: Takes what the model returns and gives the tensor of outputs, for models that return tuples, dicts or
            objects: `output=lambda out: out["logits"]`.
        metric: `(outputs, targets) -> a number for each sample`; the columns `train_accuracy` and `test_accuracy` then
            hold its means. For outputs that are no classes, such as those of a regression.

    Returns:
        A DataFrame with a row per epoch: `epoch` (from 1), `train_loss` and `train_accuracy` (means over the epoch),
        `test_accuracy` (NaN if not measured), `sparsity` (at the end of the epoch), `lr` (of the last step),
        `precision` (the one that really ran), `seconds`.

    Raises:
        ValueError: For an unknown name, a number out of range, no training sample, an optimizer of another model, or
            outputs and targets that do not fit together.
        TypeError: If `train` cannot be iterated again, or the model returns no tensor and there is no `output`.
        DivergenceError: If the training loss or a weight becomes NaN or infinite.

    Example:
        >>> train, test = pu.data.load("digits")
        >>> model = pu.models.create("lenet300")
        >>> table = pu.fit(model, train, test, epochs=2, optimizer="adam", lr_schedule="cosine")
        >>> table.epoch.tolist(), table.precision.tolist()
        ([1, 2], ['float32', 'float32'])
        >>> bool(table.test_accuracy.iloc[-1] > 0.8)
        True
    """
    setup = _set_up(
        model, train, epochs, optimizer, lr, lr_schedule, seed, batch_size, weight_decay, precision, test_every,
        steps_per_epoch, start_step, output, metric, test, loss_fn, on_step,
    )  # fmt: skip
    optimizer, precision, device, seed = setup.optimizer, setup.precision, device_of(model), setup.seed
    judge = setup.judge
    loss_fn = loss_fn or cross_entropy
    rows, step, steps = [], 0, epochs * setup.per_epoch
    with (
        optimizers.rates_put_back(optimizer) as rates,
        numerics.reproducible(device, seed),
        numerics.fastest_layout(model),
        in_mode(model, training=True),
        dense_gradients(model) if getattr(on_step, "dense_gradients", False) else contextlib.nullcontext(),
    ):
        for epoch in range(1, epochs + 1):
            model.train()  # an `on_step` may have left it in eval mode
            started = time.perf_counter()
            loss_sum, sums, seen = torch.zeros((), device=device), torch.zeros(3, dtype=torch.long, device=device), 0
            for inputs, targets in itertools.islice(setup.new_epoch(), setup.per_epoch):
                step += 1
                if step <= start_step:
                    continue
                for group, rate in zip(optimizer.param_groups, rates):
                    group["lr"] = rate * setup.lr_factor((step - 1) / steps)
                inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
                seed_device(device, seed * 1_000_003 + step)  # a run from `start_step` draws the same dropout
                with autocast(precision, device), _unless_refused(model) if seen == 0 else contextlib.nullcontext():
                    with _checks.inputs_told(inputs, targets):
                        returned = model(inputs)
                    outputs = judge.outputs(returned)
                    judged = judge(outputs, targets)
                    loss = loss_fn(outputs, targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss_sum += loss.detach() * len(targets)
                sums = sums + judged
                seen += len(targets)
                if on_step is not None:
                    on_step(model, step, steps)
            if seen == 0:
                continue  # all of this epoch lies before start_step
            _check_finite(model, loss_sum.item() / seen, f"in epoch {epoch} of {epochs} (lr {rates[0]:g}")
            measure = test is not None and (epoch % test_every == 0 or epoch == epochs)
            rows.append(
                {
                    "epoch": epoch,
                    "train_loss": loss_sum.item() / seen,
                    "train_accuracy": judge.mean(sums),
                    "test_accuracy": judge.accuracy(model, test, precision) if measure else float("nan"),
                    "sparsity": _sparsity(model),
                    "lr": optimizer.param_groups[0]["lr"],
                    "precision": precision,
                    "seconds": time.perf_counter() - started,
                }
            )
    import pandas as pd

    return pd.DataFrame(rows, columns=COLUMNS)


@dataclass(frozen=True)
class Setup:
    """What `fit` makes of its arguments, once they are checked."""

    optimizer: torch.optim.Optimizer
    lr_factor: Callable[[float], float]
    precision: str
    seed: int
    new_epoch: Callable[[], Batches]
    per_epoch: int  # steps
    judge: Judge


def _set_up(
    model, train, epochs, optimizer, lr, lr_schedule, seed, batch_size, weight_decay, precision, test_every,
    steps_per_epoch, start_step, output, metric, test, loss_fn, on_step,
) -> Setup:  # fmt: skip
    _checks.a_model(model)
    _checks.whole("epochs", epochs)
    _checks.whole("test_every", test_every)
    _checks.whole("start_step", start_step, least=0)
    seed = _checks.a_seed(seed)
    _check_test(test)
    _checks.a_function("on_step", on_step)
    _checks.a_function("loss_fn", loss_fn)
    lr_factor = _checks.choose("lr_schedule", lr_schedule, optimizers.LR_SCHEDULES)
    judge = Judge(output=output, metric=metric, left_out=getattr(loss_fn, "ignore_index", LEFT_OUT))
    precision = resolve_precision(precision, model)
    new_epoch, per_epoch = epochs_of(train, batch_size, seed)
    if steps_per_epoch is not None:
        per_epoch = min(per_epoch, _checks.whole("steps_per_epoch", steps_per_epoch))
    if start_step > epochs * per_epoch:
        raise ValueError(f"start_step={start_step} is beyond the end of training after {epochs * per_epoch} steps")
    optimizer = optimizers.create(optimizer, model, lr, weight_decay)
    return Setup(optimizer, lr_factor, precision, seed, new_epoch, per_epoch, judge)


def check_arguments(model: nn.Module, train: object, **options: object) -> Setup:
    """Raise what `fit(model, train, **options)` would raise about its arguments, before anything changes."""
    for name in options:
        if name not in inspect.signature(fit).parameters:
            raise TypeError(f"fit has no argument {name!r}; {_checks.nearest(name, inspect.signature(fit).parameters)}")
    call = inspect.signature(fit).bind(model, train, **options)
    call.apply_defaults()
    return _set_up(**{name: call.arguments[name] for name in inspect.signature(_set_up).parameters})


def _check_test(test) -> None:
    """An error about `test` shall not wait for the end of the first epoch."""
    if test is None:
        return
    _checks.some_data("test", test)
    if isinstance(test, Iterator):
        raise TypeError(f"test must be re-iterable, since it is measured after every epoch; not {type(test).__name__}")


@contextlib.contextmanager
def _unless_refused(model) -> Iterator[None]:
    """Put the buffers back if the first batch turns out not to fit: batch norm has counted it already."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    except Exception:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
        raise


def _check_finite(model, loss, when) -> None:
    """Raise DivergenceError if the loss is not finite, or a weight: the loss of the last step is from before it."""
    broken = [name for name, weight in model.named_parameters() if not weight.detach().isfinite().all()]
    if broken or not math.isfinite(loss):
        what = f"{broken[0]} became NaN or infinite" if math.isfinite(loss) else f"the training loss became {loss}"
        raise DivergenceError(
            f"{what} {when}, sparsity {_sparsity(model):.4f}); try a smaller lr. The model is as the last step left "
            "it: pruned weights are zero, and others may be of no use, so load an earlier state"
        )


def _sparsity(model) -> float:
    try:
        return count(model).sparsity
    except ValueError:  # a model without convolution and linear layers has none
        return float("nan")
