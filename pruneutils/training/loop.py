"""The training loop: `fit` trains a dense or a pruned model; the masks hold."""

import contextlib
import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import nn

from .. import _checks
from .._evaluation import LEFT_OUT, Judge, Metric, Output, cross_entropy
from .._torch import autocast, device_of, forward, in_mode, resolve_precision, seed_device, to_device
from ..model_utils import count, dense_gradients
from . import numerics, optimizers
from .batches import epochs_of

if TYPE_CHECKING:
    import pandas as pd

OnStep = Callable[[nn.Module, int, int], None]


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
    on_step: OnStep | None = None,
    start_step: int = 0,
    output: Output | None = None,
    metric: Metric | None = None,
) -> "pd.DataFrame":
    """Train a model in place; its masks hold. The same seed repeats the run bit for bit on one machine.

    Args:
        model: Any classifier that `pu.accuracy` understands; with `metric`, any model.
        train: What `pu.data.load` returns, one (inputs, targets) pair of tensors, or batches such as a DataLoader.
        test: What `pu.accuracy` takes, or None.
        epochs: How often each training sample is seen.
        optimizer: "sgd" (momentum 0.9, Nesterov), "adam", an Optimizer, or a function `parameters -> Optimizer`.
        lr, weight_decay: Those of "sgd" (lr 0.1 by default) or "adam" (0.001).
        lr_schedule: "constant", "step" (a tenth at 1/2 and 3/4), "cosine", "one-cycle" or a function of the progress.
        seed: Of the order of the samples, augmentation and dropout; the global random state is left alone.
        batch_size: Samples in a step; batches that you give keep their own size.
        loss_fn: `(outputs, targets) -> mean loss over the batch`; cross-entropy by default.
        precision: "float32" (never TF32), "bfloat16" (autocast), or "auto": bfloat16 for convolutions where it pays.
        test_every: Measure the test accuracy after every so many epochs, and after the last one.
        steps_per_epoch: End each epoch after so many steps; the next one sees other samples. None: all samples.
        on_step: Called as `on_step(model, step, steps)` after each step, from 1 to `steps`.
        start_step: Skip so many steps of the schedule and the samples, to go on from a snapshot taken there.
        output, metric: As for `pu.accuracy`; with `metric`, both columns of accuracies hold its means.

    Returns:
        A row per epoch: epoch, train_loss, train_accuracy, test_accuracy (or NaN), sparsity, lr, precision, seconds.

    Raises:
        ValueError: For an argument that is unknown or out of range, or outputs and targets that do not fit together.
        DivergenceError: If the training loss or a weight becomes NaN or infinite.

    Example:
        >>> train, test = pu.data.load("digits")
        >>> table = pu.fit(pu.models.create("lenet300"), train, test, epochs=2, optimizer="adam")
        >>> bool(table.test_accuracy.iloc[-1] > 0.8)
        True
    """
    setup = check_arguments(**locals())
    optimizer, judge, device = setup.optimizer, setup.judge, device_of(model)
    rows, step, steps = [], 0, epochs * setup.per_epoch
    with (
        optimizers.preserve_learning_rates(optimizer) as rates,
        numerics.reproducible(device, setup.seed),
        numerics.fastest_layout(model),
        in_mode(model, training=True),
        # an `on_step` marked so finds the gradients of pruned weights in `.grad`, too
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
                inputs, targets = to_device((inputs, targets), device)
                seed_device(device, setup.seed * 1_000_003 + step)  # a run from `start_step` draws the same dropout
                with autocast(setup.precision, device), _restore_on_error(model, first_batch=seen == 0):
                    with _checks.add_shapes_to_errors(inputs, targets):
                        returned = forward(model, inputs, whole=judge.output is not None)
                    outputs = judge.outputs(returned)
                    judged = judge(outputs, targets)
                    loss = setup.loss_fn(outputs, targets)
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
            loss = loss_sum.item() / seen
            _check_finite(model, loss, f"in epoch {epoch} of {epochs} (lr {rates[0]:g}")
            measure = test is not None and (epoch % test_every == 0 or epoch == epochs)
            test_accuracy = judge.accuracy(model, test, setup.precision) if measure else float("nan")
            row = [epoch, loss, judge.mean(sums), test_accuracy, _sparsity(model), optimizer.param_groups[0]["lr"]]
            rows.append([*row, setup.precision, time.perf_counter() - started])
    import pandas as pd

    columns = "epoch train_loss train_accuracy test_accuracy sparsity lr precision seconds"
    return pd.DataFrame(rows, columns=columns.split())


def check_arguments(model: nn.Module, train: object, **options: object) -> SimpleNamespace:
    """Check the arguments of `fit(model, train, **options)`, before anything changes; return them as it needs them."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(fit).parameters.items()}
    if foreign := [name for name in options if name not in defaults]:
        raise TypeError(f"fit has no argument {foreign[0]!r}; {_checks.nearest(foreign[0], defaults)}")
    call = SimpleNamespace(**defaults | options | {"model": model, "train": train})
    _checks.a_model(call.model)
    _checks.whole("epochs", call.epochs)
    _checks.whole("test_every", call.test_every)
    _checks.whole("start_step", call.start_step, least=0)
    call.seed = _checks.whole("seed", call.seed, least=0)
    if call.test is not None and isinstance(_checks.some_data("test", call.test), Iterator):
        raise TypeError(f"test is measured after every epoch: give data that can be read again, not {call.test!r:.60}")
    _checks.a_function("on_step", call.on_step)
    _checks.a_function("loss_fn", call.loss_fn)
    call.lr_factor = _checks.choose("lr_schedule", call.lr_schedule, optimizers.LR_SCHEDULES)
    call.judge = Judge(output=call.output, metric=call.metric, left_out=getattr(call.loss_fn, "ignore_index", LEFT_OUT))
    call.loss_fn = call.loss_fn or cross_entropy
    call.precision = resolve_precision(call.precision, call.model)
    call.new_epoch, call.per_epoch = epochs_of(call.train, call.batch_size, call.seed)
    if call.steps_per_epoch is not None:
        call.per_epoch = min(call.per_epoch, _checks.whole("steps_per_epoch", call.steps_per_epoch))
    if call.start_step > (steps := call.epochs * call.per_epoch):
        raise ValueError(f"start_step={call.start_step} is beyond the end of training after {steps} steps")
    call.optimizer = optimizers.create(call.optimizer, call.model, call.lr, call.weight_decay)
    return call


@contextlib.contextmanager
def _restore_on_error(model, first_batch: bool) -> Iterator[None]:
    """Restore the buffers if the first batch turns out not to fit: batch norm has counted it already."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()] if first_batch else []
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
        raise DivergenceError(f"{what} {when}, sparsity {_sparsity(model):.4f}): load an earlier state, lower the lr")


def _sparsity(model) -> float:
    try:
        return count(model).sparsity
    except ValueError:  # a model without convolution and linear layers has none
        return float("nan")
