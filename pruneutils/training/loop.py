"""Training of pruned (or dense) models, and the recipes that prune while training."""

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from .. import _checks, data, models
from .._torch import autocast, device_of, own_random_state, resolve_precision, seed_device
from ..model_utils import accuracy, count, prunable_weights
from ..pruning import prune, sparsity_at
from ..pruning.criteria import bind
from ..pruning.scopes import SCOPES

OPTIMIZERS = {
    "sgd": lambda parameters, lr, weight_decay: torch.optim.SGD(
        parameters, lr=0.1 if lr is None else lr, momentum=0.9, nesterov=True, weight_decay=weight_decay
    ),
    "adam": lambda parameters, lr, weight_decay: torch.optim.Adam(
        parameters, lr=1e-3 if lr is None else lr, weight_decay=weight_decay
    ),
}
# the factor on the learning rate at progress t in [0, 1]
LR_SCHEDULES = {
    "constant": lambda t: 1.0,
    "step": lambda t: 0.1 ** ((t >= 0.5) + (t >= 0.75)),
    "cosine": lambda t: 0.5 * (1 + np.cos(np.pi * t)),
    "one-cycle": lambda t: t / 0.25 if t < 0.25 else (1 - t) / 0.75,
}


class DivergenceError(RuntimeError):
    """The training loss is no longer finite."""


def fit(
    model: nn.Module,
    train,
    test=None,
    epochs: int = 10,
    optimizer: str | torch.optim.Optimizer | Callable = "sgd",
    lr: float | None = None,
    lr_schedule: str | Callable[[float], float] = "constant",
    seed: int = 0,
    *,
    batch_size: int = 128,
    weight_decay: float = 0.0,
    label_smoothing: float = 0.0,
    loss_fn: Callable | None = None,
    precision: str = "float32",
    start_step: int = 0,
    on_step: Callable | None = None,
    test_every: int = 1,
    progress: bool = False,
) -> pd.DataFrame:
    """Train `model` in place, masks hold; a row per epoch.

    Columns: epoch, train_loss, train_accuracy, test_accuracy, lr, precision (what really ran), seconds.

    `train` is what `data.load` returns, one (inputs, targets) pair that is cut into shuffled batches, or an iterable
    of batches; `test` anything that `accuracy` takes, used in eval mode every `test_every` epochs and after the last
    one (NaN in between). `optimizer`: "sgd" (momentum 0.9, Nesterov), "adam", any callable `parameters -> Optimizer`,
    or an Optimizer; `lr` defaults to 0.1 and 0.001. `lr_schedule` sets the learning rate of every step: "constant",
    "step" (a tenth at 50 % and 75 % of the way), "cosine" (to 0), "one-cycle" (up for a quarter, then down to 0) or any
    callable from progress in [0, 1] to a factor. `precision`, of training and evaluation: "float32", "bfloat16"
    (autocast), or "auto": bfloat16 for convolutional networks on a GPU, or on a CPU that a short probe finds fast at
    it, so that results differ between machines. `on_step(model, step, steps)` is
    called after every step. `start_step` leaves out the first steps, but not their place in the schedule, the data
    order and the dropout: training goes on as from a snapshot taken there, except that the optimizer has no momentum.

    The same `seed` on the same machine repeats the run bit for bit; the global random state is left alone. Raises
    DivergenceError when the loss is NaN or infinite, ValueError for an unknown name.
    """
    device = device_of(model)
    factor = _checks.choose("lr_schedule", lr_schedule, LR_SCHEDULES)
    if isinstance(optimizer, str):
        optimizer = _checks.choose("optimizer", optimizer, OPTIMIZERS)(model.parameters(), lr, weight_decay)
    elif lr is not None or weight_decay:
        raise ValueError("lr and weight_decay go with an optimizer's name; an Optimizer or a callable has its own")
    elif not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer(model.parameters())
    precision = resolve_precision(precision, model)
    convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
    loss_fn = loss_fn or (lambda outputs, targets: F.cross_entropy(outputs, targets, label_smoothing=label_smoothing))
    batches, per_epoch = _batches(train, batch_size, torch.Generator().manual_seed(seed))
    if per_epoch == 0:
        raise ValueError("train holds no sample")
    rates = [group["lr"] for group in optimizer.param_groups]
    rows, step, steps = [], 0, epochs * per_epoch
    with _rates_back(optimizer), _reproducible(device, seed), _layout(model, convolutional and not _corrupts(model)):
        for epoch in tqdm(range(1, epochs + 1), "fit", unit="epoch", leave=False, disable=not progress):
            model.train()
            started = time.perf_counter()
            loss_sum, hits, seen = torch.zeros((), device=device), torch.zeros((), device=device), 0
            for inputs, targets in batches():
                step += 1
                if step <= start_step:
                    continue
                for group, rate in zip(optimizer.param_groups, rates):
                    group["lr"] = rate * factor((step - 1) / steps)
                inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
                seed_device(device, seed * 1_000_003 + step)  # a run from `start_step` draws the same dropout
                with autocast(precision, device):
                    outputs = model(inputs)
                    loss = loss_fn(outputs, targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss_sum += loss.detach() * len(targets)
                hits += (outputs.detach().argmax(1) == targets).sum()
                seen += len(targets)
                if on_step is not None:
                    on_step(model, step, steps)
            if seen == 0:
                continue  # all of this epoch lies before start_step
            if not torch.isfinite(loss_sum):
                raise DivergenceError(
                    f"the training loss became {loss_sum.item()} in epoch {epoch} of {epochs} "
                    f"(lr {rates[0]:g}, {count(model).sparsity:.2%} of the weights pruned); try a smaller lr"
                )
            tested = float("nan")
            if test is not None and (epoch % test_every == 0 or epoch == epochs):
                tested = accuracy(model, test, precision=precision)
            rows.append(
                {
                    "epoch": epoch,
                    "train_loss": loss_sum.item() / seen,
                    "train_accuracy": hits.item() / seen,
                    "test_accuracy": tested,
                    "lr": optimizer.param_groups[0]["lr"],
                    "precision": precision,
                    "seconds": time.perf_counter() - started,
                }
            )
    return pd.DataFrame(rows)


def trained(network: str, dataset: str, seed: int = 0, *, train_size: int | None = None, device="cpu", **fit_options):
    """A network by name, trained on a data set by name (or on `train_size` images of it): (model, train, test).

    The start of many experiments: every arm of a seed gets its own copy of the same network, which is trained once in
    a process as long as the arguments stay the same. `fit_options` are those of `fit`.
    """
    model, train, test = _trained(network, dataset, seed, train_size, str(device), tuple(sorted(fit_options.items())))
    return copy.deepcopy(model), train, test


@functools.lru_cache(maxsize=1)
def _trained(network, dataset, seed, train_size, device, fit_options):
    train, test = data.load(dataset, device=device)
    train = train.subset(train_size) if train_size else train
    model = models.create(network, num_classes=len(train.classes), in_channels=train.images.shape[1], seed=seed)
    fit(model.to(device), train, seed=seed, **dict(fit_options))
    return model, train, test


def gradual(
    model: nn.Module,
    train,
    test=None,
    sparsities: Sequence[float] = (0.5, 0.75, 0.9),
    epochs_each: int = 1,
    criterion="magnitude",
    *,
    scope: str = "global",
    granularity: str = "weight",
    data=None,
    exclude: Iterable[str] = (),
    seed: int = 0,
    **fit_options,
) -> pd.DataFrame:
    """Prune to each of `sparsities` (fractions, ascending) in turn and train `epochs_each` epochs after each.

    One sparsity is instant pruning. `[sparsity_at(i / n, 0.9) for i in range(1, n + 1)]` gives the sparsities of n
    prunings that each take the same share of what is left. Pruning arguments are those of `prune`, `fit_options` those
    of `fit`; each stage has an optimizer and a learning-rate schedule of its own. A row per epoch, as from `fit`, with
    `epoch` counted through and the columns `stage` and `sparsity`.
    """
    sparsities = list(sparsities)
    for sparsity in sparsities:
        _checks.fraction("sparsities: each", sparsity)
    if not sparsities or sparsities != sorted(sparsities):
        raise ValueError(f"sparsities must be ascending fractions, at least one, not {sparsities!r}")
    tables = []
    for stage, sparsity in enumerate(sparsities):
        prune(
            model, criterion, sparsity, scope, granularity, data=data, exclude=exclude, seed=seed,
            loss_fn=fit_options.get("loss_fn"),
        )  # fmt: skip
        table = fit(model, train, test, epochs_each, seed=seed + stage, **fit_options)
        table["epoch"] += stage * epochs_each
        tables.append(table.assign(stage=stage + 1, sparsity=count(model).sparsity))
    return pd.concat(tables, ignore_index=True)


def lottery_ticket(
    model: nn.Module,
    train,
    test=None,
    sparsity: float = 0.9,
    rounds: int = 5,
    epochs: int = 10,
    rewind_step: int = 0,
    criterion="magnitude",
    *,
    scope: str = "global",
    exclude: Iterable[str] = (),
    seed: int = 0,
    on_step: Callable | None = None,
    **fit_options,
) -> pd.DataFrame:
    """Iterative magnitude pruning with rewinding (Frankle & Carbin 2019; Frankle et al. 2020): finds a lottery ticket.

    Trains for `epochs`; then `rounds` times prunes (the same share of what is left each time, `sparsity` in the end),
    puts what is left back to where it was after `rewind_step` steps, and trains on from there to the same end, with
    the same data order and schedule. The model ends trained, with the ticket as its masks. A row per epoch, as from
    `fit`, with the columns `round` (0 is dense) and `sparsity`.
    """
    # what would fail only after the dense training
    prunable_weights(model, exclude)
    _checks.fraction("sparsity", sparsity)
    _checks.choose("scope", scope, SCOPES)
    bind(criterion, None, None, seed, {})
    steps = epochs * _batches(train, fit_options.get("batch_size", 128), torch.Generator())[1]
    if not 0 <= rewind_step <= steps:
        raise ValueError(f"rewind_step={rewind_step} is beyond the end of training after {steps} steps")
    snapshot = {}

    def take(model, step, steps):
        if step == rewind_step:
            snapshot.update({name: value.detach().clone() for name, value in model.state_dict().items()})
        if on_step is not None:
            on_step(model, step, steps)

    take(model, 0, 0) if rewind_step == 0 else None
    tables = []
    for turn in range(rounds + 1):
        if turn:
            prune(model, criterion, sparsity_at(turn / rounds, sparsity), scope, exclude=exclude, seed=seed)
            model.load_state_dict(snapshot)  # masks stay on, and hold
        start = rewind_step if turn else 0
        hook = on_step if turn else take
        table = fit(model, train, test, epochs, seed=seed, start_step=start, on_step=hook, **fit_options)
        tables.append(table.assign(round=turn, sparsity=count(model).sparsity))
    return pd.concat(tables, ignore_index=True)


def _batches(train, batch_size, generator) -> tuple[Callable, int]:
    """A function that starts a new epoch of shuffled batches, and the number of batches of an epoch."""
    if hasattr(train, "batches"):
        return lambda: train.batches(batch_size, generator=generator), -(-len(train) // batch_size)
    if _checks.is_pair(train):
        inputs, targets = train

        def shuffled():
            for places in torch.randperm(len(targets), generator=generator).split(batch_size):
                places = places.to(targets.device)
                yield inputs[places], targets[places]

        return shuffled, -(-len(targets) // batch_size)
    if not hasattr(train, "__len__") or isinstance(train, Iterator):
        raise TypeError("train must be re-iterable and have a length: a data set, a pair of tensors, or a DataLoader")
    return lambda: iter(train), len(train)


@contextlib.contextmanager
def _reproducible(device: torch.device, seed: int):
    """A random state of its own, and on a GPU only kernels that repeat."""
    deterministic = torch.backends.cudnn.deterministic
    with own_random_state(device, seed):
        torch.backends.cudnn.deterministic = True
        try:
            yield
        finally:
            torch.backends.cudnn.deterministic = deterministic


@contextlib.contextmanager
def _rates_back(optimizer):
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate


@contextlib.contextmanager
def _layout(model: nn.Module, channels_last: bool):
    """Convolutions run fastest with channels last, in any precision; the model gets its usual layout back."""
    if channels_last:
        _set_layout(model, torch.channels_last)
    try:
        yield
    finally:
        if channels_last:
            _set_layout(model, torch.contiguous_format)


def _corrupts(model: nn.Module) -> bool:
    """Whether a CPU could write past its memory with channels last: strided 1x1 convolutions of few channels.

    oneDNN issue 6035: their weight gradient overruns a buffer where the input has fewer channels than a vector holds,
    8 with AVX2 and 16 with AVX-512. It ends in a crash, a hang, or wrong gradients. The answer depends on the model
    alone, 16 channels everywhere, so that no machine changes the layout and with it the rounding.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return any(set(m.kernel_size) == {1} and max(m.stride) > 1 and m.in_channels // m.groups < 16 for m in layers)


def _set_layout(model, memory_format):
    for p in model.parameters():
        if p.ndim == 4:  # Module.to() refuses the five dimensions of Conv3d
            p.data = p.data.contiguous(memory_format=memory_format)
