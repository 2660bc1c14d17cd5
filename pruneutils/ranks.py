"""Masks of a model that several processes train together (torch.distributed): prune on one, send, and check."""

import hashlib

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from . import _masks
from ._torch import device_of
from .model_utils import Masks, get_masks, prunable_weights, set_masks


def broadcast_masks(model: nn.Module, source: int = 0) -> Masks:
    """Give the model of every process the masks that it has in one of them.

    All processes call this. Prune in one process, where the data or the time is, and send the masks before training:

        if torch.distributed.get_rank() == 0:
            pu.prune(model, "snip", 0.9, data=batch)
        pu.broadcast_masks(model)
        model = torch.nn.parallel.DistributedDataParallel(model)

    Masks in the other processes are replaced or removed, and pruned weights become zero there. Kept weights stay as
    they are; DistributedDataParallel sends those.

    Args:
        model: The same network in every process, wrapped in the same way.
        source: The rank of the process whose masks are sent.

    Returns:
        The masks of the model.

    Raises:
        ValueError: If torch.distributed is not initialised, `source` is no rank, or the processes hold different
            networks. Nothing is changed then.

    Example:
        >>> meeting = dict(store=torch.distributed.HashStore(), rank=0, world_size=1)  # each process has its rank
        >>> torch.distributed.init_process_group("gloo", **meeting)
        >>> model = pu.models.create("lenet300")
        >>> masks = pu.prune(model, "magnitude", 0.9)
        >>> pu.broadcast_masks(model)
        Masks(3 weights, 26,620 of 266,200 kept, sparsity 0.9000)
        >>> torch.distributed.destroy_process_group()
    """
    weights = _weights_of_all(model)
    if isinstance(source, bool) or not isinstance(source, int) or not 0 <= source < dist.get_world_size():
        raise ValueError(f"source must be a rank below {dist.get_world_size()}, not {source!r}")
    masks, device = get_masks(model), device_of(model)
    flags = torch.tensor([name in masks for name in weights], dtype=torch.uint8, device=device)
    dist.broadcast(flags, source)
    sent = [name for name, flag in zip(weights, flags.tolist()) if flag]
    sizes = [-(-weights[name].numel() // 8) for name in sent]
    if dist.get_rank() == source:
        packed = torch.from_numpy(np.concatenate([_packed(masks[name]) for name in sent] or [np.zeros(0, np.uint8)]))
    else:
        packed = torch.zeros(sum(sizes), dtype=torch.uint8)
    packed = packed.to(device)
    dist.broadcast(packed, source)
    if dist.get_rank() != source:
        _masks.let_go(model, [weights[name] for name in weights if name not in sent])
        set_masks(
            model,
            {
                name: torch.from_numpy(np.unpackbits(bits.cpu().numpy())[: weights[name].numel()]).view(
                    weights[name].shape
                )
                for name, bits in zip(sent, packed.split(sizes))
            },
        )
    return get_masks(model)


def disagreeing_masks(model: nn.Module) -> list[str]:
    """List the weights whose masks are not the same in all processes, such as after each has pruned by its own data.

    All processes call this, and all get the same answer.

    Args:
        model: The same network in every process, wrapped in the same way.

    Returns:
        The parameter names, in module order; empty if the processes agree.

    Raises:
        ValueError: If torch.distributed is not initialised, or the processes hold different networks.

    Example:
        >>> meeting = dict(store=torch.distributed.HashStore(), rank=0, world_size=1)  # each process has its rank
        >>> torch.distributed.init_process_group("gloo", **meeting)
        >>> pu.disagreeing_masks(pu.models.create("lenet300"))
        []
        >>> torch.distributed.destroy_process_group()
    """
    weights, masks = _weights_of_all(model), get_masks(model)
    digests = [_digest(_packed(masks[name]).tobytes()) if name in masks else 0 for name in weights]
    everywhere = _gathered(digests, model)
    return [name for name, same in zip(weights, (everywhere == everywhere[0]).all(0).tolist()) if not same]


def _weights_of_all(model) -> dict[str, nn.Parameter]:
    """Return the prunable weights; ValueError in every process if names or shapes differ between them."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("torch.distributed is not initialised: call torch.distributed.init_process_group first")
    try:
        weights = prunable_weights(model)
    except ValueError:  # told below, when the other processes do not wait any more
        weights = {}
    told = str([(name, tuple(weight.shape)) for name, weight in weights.items()])
    everywhere = _gathered([_digest(told.encode()), len(weights)], model)
    if (everywhere != everywhere[0]).any():
        numbers = ", ".join(map(str, everywhere[:, 1].tolist()))
        raise ValueError(f"the processes hold different networks: {numbers} prunable weights, by other names or shapes")
    return weights or prunable_weights(model)


def _packed(mask) -> np.ndarray:
    return np.packbits(mask.cpu().numpy().reshape(-1))


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:7], "big") + 1


def _gathered(numbers: list[int], model) -> torch.Tensor:
    """Return what every process gives, (processes, numbers)."""
    own = torch.tensor(numbers, dtype=torch.int64, device=device_of(model))
    everywhere = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, own)
    return torch.stack(everywhere).cpu()
