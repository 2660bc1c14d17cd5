"""Dense networks to start experiments from, each trained once and kept as a file."""

import hashlib
import inspect
import json
import os
from numbers import Real
from pathlib import Path

import filelock
import torch
from torch import nn

from .. import data, files
from ..data import Images
from ..data.cache import cache_folder
from ..training import fit
from .building import create


def trained(
    network: str,
    dataset: str | tuple[Images, Images],
    seed: int = 0,
    *,
    train_size: int | None = None,
    device: str | torch.device = "cpu",
    store: str | os.PathLike | None = None,
    **fit_options: object,
) -> tuple[nn.Module, Images, Images]:
    """Return a trained network by name together with its data; the same arguments train it only once.

    `model.facts` holds what decides the file that later calls load. They do not see whether the code that trains has
    changed: to train anew, delete the folder `networks` in `pu.data.cache.cache_folder()`.

    Args:
        network: A name for `pu.models.create`.
        dataset: A name for `pu.data.load`, or a pair (train, test) as it returns.
        seed: Of the initial weights and of training.
        train_size: Train on so many of the training images; on all by default.
        device: Where to train, and where the network and the images are returned.
        store: The folder for the file; by default one in the user's cache folder.
        **fit_options: Options of `fit`, such as `epochs`, `optimizer` and `lr`; each a name or a number.

    Returns:
        The network, the images trained on and the test images.

    Example:
        >>> options = dict(train_size=500, epochs=2, optimizer="adam")
        >>> model, train, test = pu.trained("lenet300", "digits", **options)
        >>> again, _, _ = pu.trained("lenet300", "digits", **options)
        >>> torch.equal(model.fc1.weight, again.fc1.weight)
        True
    """
    train, test = (part.to(device) for part in (data.load(dataset) if isinstance(dataset, str) else dataset))
    train = train.subset(train_size) if train_size else train
    model = create(network, num_classes=len(train.classes), in_channels=train.images.shape[1], seed=seed).to(device)
    call = inspect.signature(fit).bind(model, train, seed=seed, **fit_options)
    call.apply_defaults()  # a changed default is another network
    facts = {name: value for name, value in call.arguments.items() if name not in ("model", "train", "test")}
    for name, value in facts.items():
        if value is not None and not isinstance(value, str | Real):
            raise TypeError(f"trained keeps a network under its options, so {name} must be a name or a number")
    facts |= {"network": network, "data": _fingerprint(train), "device": str(device), "torch": torch.__version__}
    facts |= {"threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}  # they round
    facts = json.loads(json.dumps(facts, default=lambda number: number.item()))
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]
    folder = cache_folder() / "networks" if store is None else Path(store)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{network.replace('/', '-')}-{key}.safetensors"
    with filelock.FileLock(path.with_suffix(".lock")):  # of two processes that ask at once, one trains
        if path.exists():
            files.load(path, model)
        else:
            fit(model, train, seed=seed, **fit_options)
            model.zero_grad()
            model.facts = facts
            files.save(model, path, **facts)
    return model, train, test


def _fingerprint(train: Images) -> dict:
    """Describe the training images: all labels and about a thousand images stand for the pixels."""
    sample = train.images[:: max(1, len(train) // 1000)]
    content = hashlib.sha256(train.targets.cpu().numpy().tobytes() + sample.cpu().numpy().tobytes()).hexdigest()
    own = {name: getattr(train, name) for name in ("name", "classes", "mean", "std", "augment", "flip")}
    return own | {"shape": list(train.images.shape), "content": content}
