"""Dense networks to start experiments from, each trained once and kept as a file."""

import ast
import contextlib
import functools
import hashlib
import inspect
import json
import os
import re
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import filelock
import torch
from safetensors import SafetensorError
from torch import nn

from .. import _checks, _torch, checkpoints, models
from .. import data as images
from .._torch import resolve_precision
from ..data import Images
from ..data.cache import cache_folder
from . import batches, loop, numerics, optimizers
from .loop import fit

_FIT = inspect.signature(fit)


def trained(
    network: str,
    dataset: str | tuple[Images, Images],
    seed: int = 0,
    *,
    train_size: int | None = None,
    device: str | torch.device = "cpu",
    checkpoint: str | os.PathLike | None = None,
    store: str | os.PathLike | None = None,
    **fit_options: object,
) -> tuple[nn.Module, Images, Images]:
    """Return a trained network by name together with its data; the same arguments train it only once.

    The network is kept as a file under a hash of all arguments, the images, the versions of torch and of the code that
    trains. Later calls load it, in any process; of two that ask at the same time one trains and the other waits. What
    comes from the file equals what was trained, bit for bit. `model.facts` tells the arguments.

    Args:
        network: A name for `pu.models.create`.
        dataset: A name for `pu.data.load`, or a pair (train, test) as it returns.
        seed: Of the initial weights and of training.
        train_size: Train on so many of the training images; on all by default.
        device: Where to train, and where the network and the images are returned.
        checkpoint: Start from the weights in this file: .safetensors from `pu.save`, or a torch checkpoint. With
            `epochs=0` they stay as they are.
        store: A folder, such as the store of a sweep; the files are kept in its subfolder `.networks`. By default they
            are kept in the user's cache folder, apart for each kind of CPU and number of threads, since these round
            differently.
        **fit_options: Options of `fit`, such as `epochs`, `optimizer` and `lr`; each a name or a number.

    Returns:
        The network, the training images (those trained on) and the test images. The network is the caller's own.

    Raises:
        ValueError: For an unknown name, as `pu.models.create`, `pu.data.load` and `fit` do.
        TypeError: For an option that is no name or number, such as a function: only what has a value of its own can
            be found again.

    Example:
        >>> model, train, test = pu.trained("lenet300", "digits", train_size=500, epochs=2, optimizer="adam")
        >>> again, _, _ = pu.trained("lenet300", "digits", train_size=500, epochs=2, optimizer="adam")
        >>> torch.equal(model.fc1.weight, again.fc1.weight)
        True
    """
    device, seed = torch.device(device), _checks.whole("seed", seed, least=0)
    options = _with_defaults(fit_options)
    train, test = images.load(dataset) if isinstance(dataset, str) else dataset
    train = train.subset(train_size) if train_size else train
    model = models.create(network, num_classes=len(train.classes), in_channels=train.images.shape[1], seed=seed)
    if checkpoint is not None:
        _start_from(checkpoint, model)
    model, train, test = model.to(device), train.to(device), test.to(device)
    if checkpoint is not None and options["epochs"] == 0:
        return model, train, test
    options["precision"] = resolve_precision(options["precision"], model)
    facts = {
        "network": network,
        "seed": seed,
        "data": _fingerprint(train),
        "checkpoint": None if checkpoint is None else hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest(),
        "device": device.type,
        **options,
        "versions": {name: version(name) for name in ("torch", "torchvision", "timm", "numpy")},
        "code": _code_that_trains(),
    }
    facts = json.loads(json.dumps(facts, sort_keys=True, default=_plain))
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]
    folder = _cache_folder(device) if store is None else Path(store) / ".networks"
    path = folder / f"{_plain_name(network)}-{key}.safetensors"
    if not _loaded(path, model):
        with _alone(path) as writable:
            if not _loaded(path, model):  # nobody else has trained it meanwhile
                fit(model, train, seed=seed, **options)
                model.zero_grad()
                model.facts = facts
                if writable:
                    _save(model, path, facts)
    return model, train, test


# --- What decides a network ------------------------------------------------------------------------------------------


def _with_defaults(fit_options) -> dict:
    """Return all options of `fit` that decide a network, so that a changed default is another network."""
    call = _FIT.bind(None, None, **fit_options)
    call.apply_defaults()
    options = {name: value for name, value in call.arguments.items() if name not in ("model", "train", "test", "seed")}
    for name, value in options.items():
        try:
            json.dumps(value, default=_plain)
        except TypeError:
            raise TypeError(
                f"trained keeps networks under the values of its arguments, so {name} must be a name or a number, not "
                f"{value!r}; for anything else use fit and save"
            ) from None
    return options


def _plain(value):
    """Convert numpy scalars and 0-d tensors for JSON."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r} is no plain value")


def _fingerprint(train: Images) -> dict:
    """Describe the training images: all labels and about a thousand images stand for the pixels."""
    sample = train.images[:: max(1, len(train) // 1000)]
    content = hashlib.sha256(train.targets.cpu().numpy().tobytes() + sample.cpu().numpy().tobytes()).hexdigest()
    own = {name: getattr(train, name) for name in ("name", "classes", "mean", "std", "augment", "flip")}
    return own | {"shape": list(train.images.shape), "content": content}


@functools.cache
def _code_that_trains() -> str:
    """Hash the modules that decide a trained network, without comments and docstrings."""
    digest = hashlib.sha256()
    files = [Path(module.__file__) for module in (batches, loop, numerics, optimizers, models, _torch)]
    for file in [*files, *sorted(Path(images.__file__).parent.glob("*.py"))]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12]


# --- Files -----------------------------------------------------------------------------------------------------------


def _cache_folder(device: torch.device) -> Path:
    """Return the folder of the user's cache for networks of this kind of machine: others round differently."""
    if device.type == "cpu":
        forced = os.environ.get("ONEDNN_MAX_CPU_ISA", "")  # which torch's own capability does not tell
        kind = f"{torch.backends.cpu.get_cpu_capability()} {forced} {torch.get_num_threads()} threads"
    else:
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return cache_folder() / "networks" / _plain_name(kind)


def _plain_name(text: str) -> str:
    return re.sub(r"[^0-9a-z_.]+", "-", text.lower())


def _start_from(checkpoint, model) -> None:
    """Load a file of `pu.save`, or a torch checkpoint, into the model."""
    if Path(checkpoint).suffix == ".safetensors":
        checkpoints.load(checkpoint, model)
    else:
        models.load_weights(model, checkpoint)


def _loaded(path, model) -> bool:
    """Load the network if it is there; False, and nothing changed, if it is not or its file is broken."""
    try:
        checkpoints.load(path, model)
    except (OSError, ValueError):
        return False
    return True


@contextlib.contextmanager
def _alone(path) -> Iterator[bool]:
    """Let one process after the other train the network at `path`; False if no file can be kept there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / ".gitignore").write_text("*\n")
        lock = filelock.FileLock(path.with_suffix(".lock"))
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        _warn_not_kept(path, error, stacklevel=5)
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _save(model, path, facts) -> None:
    try:
        checkpoints.save(model, path, **facts)
    except (OSError, SafetensorError) as error:  # such as a full disk: the network itself is there
        _warn_not_kept(path, error, stacklevel=4)


def _warn_not_kept(path, error, stacklevel) -> None:
    warnings.warn(f"networks cannot be kept in {path.parent} ({error}); each is trained anew", stacklevel=stacklevel)
