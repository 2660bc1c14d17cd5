"""Scores to masks: which weights go when exactly k have to. Ties go by position: what comes first is pruned first."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

_SAMPLE = 1 << 16  # scores looked at to guess where the cut is
_CHUNK = 1 << 18  # scores handled at a time on a CPU: 1 MB of float32 stays in the cache

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Selection:
    """Bool masks by name, True = kept; and by name how many scores equal the one at the cut, if it parts such ties."""

    keep: dict[str, torch.Tensor]
    ties: dict[str, int]


def select(scores: Tensors, k: int, alive: Tensors | None = None, transform: Callable | None = None) -> Selection:
    """Prune exactly the `k` lowest of all scores, as a stable sort of their concatenation would.

    Time is linear in the number of scores, and they are not copied. A random sample brackets the cut; one pass writes
    the masks of what lies above the bracket and collects the about 1 % inside it, and only these are ranked:

        scores    ......low |======== ranked ========| high......
                   pruned   |  pruned  ^  kept       |   kept
                                       cut

    The sample decides about the speed, never about the result: where it misses the cut, the counts show it, and the
    pass is repeated on the side where the cut is.

    Args:
        scores: {name: tensor of any shape}.
        k: How many to prune.
        alive: {name: bool mask}; entries that are False stay pruned and do not count towards k. Missing masks are True.
        transform: `transform(chunk, out=buffer)`, such as torch.abs, converts each chunk to scores.

    Returns:
        The masks, and how many scores tie at the cut in each tensor.

    Raises:
        ValueError: If k is not within 0 and the number alive, or if a score is NaN or infinite.
    """
    alive = alive or {}
    total = sum(int(alive[n].count_nonzero()) if n in alive else s.numel() for n, s in scores.items())
    if not 0 <= k <= total:
        raise ValueError(f"cannot prune {k} of {total} weights")
    if not any(s.numel() for s in scores.values()):
        return Selection({name: torch.ones_like(s, dtype=torch.bool) for name, s in scores.items()}, {})
    single = (torch.float32, torch.bfloat16, torch.float16)
    dtype = torch.float32 if all(s.dtype in single for s in scores.values()) else torch.float64
    transform = transform or (lambda chunk, out: chunk)
    low, high = _bracket(scores, k / max(total, 1), alive, lambda chunk: transform(chunk.to(dtype), out=None))
    while True:
        keep, values, positions, n_above = _split(scores, low, high, alive, transform, dtype)
        n_inside = k - (total - n_above - len(values))  # how many of those inside the bracket are to be pruned
        if 0 <= n_inside <= len(values):
            break
        low, high = (-torch.inf, low) if n_inside < 0 else (high, torch.inf)  # the cut is outside: look there
    stays, tied = _rank_inside(values, n_inside)
    ends = torch.tensor([s.numel() for s in scores.values()], device=positions.device).cumsum(0)
    _keep_positions(keep, positions[stays], ends)
    ties = torch.bincount(torch.bucketize(positions[tied], ends, right=True), minlength=len(keep))
    return Selection(keep, {name: n for name, n in zip(keep, ties.tolist()) if n})


def _rank_inside(values: torch.Tensor, n_pruned: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the values stay (bool), and the indices of those that tie at the cut if it parts them."""
    nothing = torch.empty(0, dtype=torch.long, device=values.device)
    if n_pruned == 0:
        return torch.ones_like(values, dtype=torch.bool), nothing
    cut = _kth(values, n_pruned)
    tied = _positions(values == cut)  # in order of position: the first of them are pruned
    n_tied_pruned = n_pruned - int((values < cut).count_nonzero())
    stays = values > cut
    stays[tied[n_tied_pruned:]] = True
    return stays, tied if n_tied_pruned < len(tied) else nothing


def _keep_positions(keep: dict[str, torch.Tensor], positions: torch.Tensor, ends: torch.Tensor) -> None:
    """Set the masks True at these flat positions, which ascend: each tensor's are a slice of them."""
    bounds = [0, *torch.searchsorted(positions, ends).tolist()]
    for i, mask in enumerate(keep.values()):
        mine = positions[bounds[i] : bounds[i + 1]]
        if len(mine):
            mask.view(-1)[mine - (ends[i] - mask.numel())] = True


def _bracket(scores, quantile, alive, transform) -> tuple[float, float]:
    """Two scores with the `quantile` of all very probably between them; the infinite ones where scores are few."""
    total = sum(s.numel() for s in scores.values())
    if total <= 4 * _SAMPLE:
        return -torch.inf, torch.inf
    # random and not evenly spaced positions: even spacing can fall in step with 3x3 kernels
    positions = torch.randint(total, (_SAMPLE,), generator=torch.Generator().manual_seed(0)).sort().values
    start, sample = 0, []
    for name, s in scores.items():
        first, last = torch.searchsorted(positions, torch.tensor([start, start + s.numel()])).tolist()
        here = (positions[first:last] - start).to(s.device)
        values = transform(s.detach().reshape(-1)[here])
        sample.append((values[alive[name].reshape(-1)[here]] if name in alive else values).cpu())
        start += s.numel()
    sample = torch.from_numpy(np.sort(torch.cat(sample).numpy()))
    n = len(sample)
    margin = 5 * (quantile * (1 - quantile) / max(n, 1)) ** 0.5 * n + 2
    first, last = int(quantile * n - margin), int(quantile * n + margin) + 1
    # the lower end is exclusive, so step below the sampled score: what ties with it has to be inside
    low = torch.nextafter(sample[first], sample.new_tensor(-torch.inf)).item() if first >= 0 else -torch.inf
    return low, sample[last].item() if last < n else torch.inf


def _split(scores, low, high, alive, transform, dtype):
    """Masks of what is above `high`, values and flat positions of what is in (low, high], and the number above."""
    keep, values, positions, start = {}, [], [], 0
    device = next(iter(scores.values())).device
    size = _CHUNK if device.type == "cpu" else 256 * _CHUNK
    kept = torch.zeros((), dtype=torch.long, device=device)
    largest = min(size, max(s.numel() for s in scores.values()))
    # the same memory for every piece: fresh pages would cost more than the work on them
    pieces, insides = (torch.empty(largest, dtype=kind, device=device) for kind in (dtype, torch.bool))
    for name, s in scores.items():
        flat, mask = s.detach().reshape(-1), torch.empty(s.shape, dtype=torch.bool, device=s.device)
        keep[name], mask = mask, mask.view(-1)
        total = torch.zeros((), device=s.device)
        for i in range(0, len(flat), size):
            above = mask[i : i + size]
            chunk = transform(flat[i : i + size].to(dtype), out=pieces[: len(above)])
            total += chunk.sum()
            _greater(chunk, high, out=above)
            inside = _greater(chunk, low, out=insides[: len(above)]).logical_xor_(above)
            if name in alive:
                here = alive[name].reshape(-1)[i : i + size]
                above &= here
                inside &= here
            inside = _positions(inside)
            values.append(chunk[inside].to(device))
            positions.append(inside.to(device) + (start + i))
            kept += above.count_nonzero().to(device)
        start += len(flat)
        # NaN and infinity show in the sum, which is cheaper than asking each; a sum can also overflow by itself
        if not torch.isfinite(total) and not torch.isfinite(s).all():
            raise ValueError(f"{name}: {int((~torch.isfinite(s)).sum())} of {s.numel()} scores are NaN or infinite")
    return keep, torch.cat(values), torch.cat(positions), int(kept)


# On a CPU, numpy compares, searches and partitions three to nine times faster than torch.


def _greater(values, bound: float, out):
    """torch.gt(values, bound, out=out)"""
    if values.device.type == "cpu":
        np.greater(values.numpy(), bound, out=out.numpy())
        return out
    return torch.gt(values, bound, out=out)


def _positions(mask):
    """Find where a flat mask is True, ascending."""
    return torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.device.type == "cpu" else mask.nonzero().flatten()


def _kth(values, k: int):
    """The k-th lowest value; torch.kthvalue is slow on a GPU."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.partition(values.numpy(), k - 1))[k - 1]
    return values.sort().values[k - 1]


def select_n_of_m(scores: Tensors, n: int, m: int, alive: Tensors) -> Selection:
    """Keep the `n` highest of every `m` consecutive inputs, at the same output and position in the kernel."""
    keep, ties = {}, {}
    for name, s in scores.items():
        blocks = s.double().movedim(1, -1)
        if name in alive:
            blocks = blocks.masked_fill(~alive[name].movedim(1, -1), -torch.inf)
        shape, blocks = blocks.shape, blocks.reshape(-1, m)
        ranked, order = blocks.sort(dim=1, stable=True)
        mask = torch.ones_like(blocks, dtype=torch.bool).scatter_(1, order[:, : m - n], False)
        mask &= blocks > -torch.inf
        keep[name] = mask.view(shape).movedim(-1, 1).contiguous()
        if n < m:
            cut = ranked[:, m - n - 1]
            parted = (cut == ranked[:, m - n]) & (cut > -torch.inf)
            if parted.any():
                ties[name] = int((blocks[parted] == cut[parted, None]).sum())
    return Selection(keep, ties)
