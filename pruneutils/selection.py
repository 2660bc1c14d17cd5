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

    Entries where `alive` (masks by name, missing ones all True) is False stay pruned and do not count towards k.
    `transform(piece, out=buffer)`, such as torch.abs, makes scores out of what is handed in, a piece at a time. Time is
    linear in the number of scores, and they are not copied: a random sample brackets the cut, one pass writes the
    masks of what is above the bracket and collects the about 1 % inside, and only these are ranked. The sample decides
    about the speed, never about the result.

    Raises ValueError if k is not within 0 and the number alive, or if a score is NaN or infinite.
    """
    alive = alive or {}
    total = sum(int(alive[n].count_nonzero()) if n in alive else s.numel() for n, s in scores.items())
    if not 0 <= k <= total:
        raise ValueError(f"cannot prune {k} of {total} weights")
    single = (torch.float32, torch.bfloat16, torch.float16)
    dtype = torch.float32 if all(s.dtype in single for s in scores.values()) else torch.float64
    transform = transform or (lambda chunk, out: chunk)
    low, high = _bracket(scores, k / max(total, 1), alive, lambda chunk: transform(chunk.to(dtype), out=None))
    while True:
        keep, values, places, kept = _split(scores, low, high, alive, transform, dtype)
        going = k - (total - kept - len(values))  # how many of the collected have to go
        if 0 <= going <= len(values):
            break
        low, high = (-torch.inf, low) if going < 0 else (high, torch.inf)  # the cut is outside: look there
    names, ends = list(scores), torch.tensor([s.numel() for s in scores.values()], device=places.device).cumsum(0)
    stays, ties = torch.ones_like(values, dtype=torch.bool), torch.zeros(len(names), dtype=torch.long)
    if going:
        cut = _kth(values, going)
        tied = _places(values == cut)  # in order of position
        going_tied = going - int((values < cut).count_nonzero())
        stays = values > cut
        stays[tied[going_tied:]] = True
        if going_tied < len(tied):
            ties = torch.bincount(torch.bucketize(places[tied], ends, right=True), minlength=len(names))
    places = places[stays]
    bounds = [0, *torch.searchsorted(places, ends).tolist()]  # places ascend, so each tensor's are a slice of them
    for i, name in enumerate(names):
        mine = places[bounds[i] : bounds[i + 1]]
        if len(mine):
            keep[name].view(-1)[mine - (ends[i] - scores[name].numel())] = True
    return Selection(keep, {name: n for name, n in zip(names, ties.tolist()) if n})


def _bracket(scores, quantile, alive, transform) -> tuple[float, float]:
    """Two scores with the `quantile` of all very probably between them; the infinite ones where scores are few."""
    total = sum(s.numel() for s in scores.values())
    if total <= 4 * _SAMPLE:
        return -torch.inf, torch.inf
    # random and not evenly spaced places: even spacing can fall in step with 3x3 kernels
    places = torch.randint(total, (_SAMPLE,), generator=torch.Generator().manual_seed(0)).sort().values
    start, sample = 0, []
    for name, s in scores.items():
        first, last = torch.searchsorted(places, torch.tensor([start, start + s.numel()])).tolist()
        here = (places[first:last] - start).to(s.device)
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
    """Masks of what is above `high`, values and flat places of what is in (low, high], and the number above."""
    keep, values, places, start = {}, [], [], 0
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
            inside = _places(inside)
            values.append(chunk[inside].to(device))
            places.append(inside.to(device) + (start + i))
            kept += above.count_nonzero().to(device)
        start += len(flat)
        # NaN and infinity show in the sum, which is cheaper than asking each; a sum can also overflow by itself
        if not torch.isfinite(total) and not torch.isfinite(s).all():
            raise ValueError(f"{name}: {int((~torch.isfinite(s)).sum())} of {s.numel()} scores are NaN or infinite")
    return keep, torch.cat(values), torch.cat(places), int(kept)


# On a CPU, numpy compares, searches and partitions three to nine times faster than torch.


def _greater(values, bound: float, out):
    """torch.gt(values, bound, out=out)"""
    if values.device.type == "cpu":
        np.greater(values.numpy(), bound, out=out.numpy())
        return out
    return torch.gt(values, bound, out=out)


def _places(mask):
    """Where a flat mask is True, ascending."""
    return torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.device.type == "cpu" else mask.nonzero().flatten()


def _kth(values, k: int):
    """The k-th lowest value; torch.kthvalue is slow on a GPU."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.partition(values.numpy(), k - 1))[k - 1]
    return values.sort().values[k - 1]


# --- Units larger than one weight ------------------------------------------------------------------------------------


def unit_shape(shape: torch.Size, granularity: str) -> tuple[int, ...]:
    """A weight's shape (out, in, *kernel) with 1 for the dimensions that a unit spans."""
    spans = {"weight": len(shape), "kernel": 2, "filter": 1}.get(granularity, len(shape))
    return tuple(shape[:spans]) + (1,) * (len(shape) - spans)


def unit_scores(scores: torch.Tensor, granularity: str, alive: torch.Tensor | None, normalize: bool) -> torch.Tensor:
    """Sum of the scores alive in each unit, with `normalize` divided by the unit's size; shape as `unit_shape`."""
    shape = unit_shape(scores.shape, granularity)
    spanned = [dim for dim, size in enumerate(shape) if size != scores.shape[dim]]
    scores = scores.double()  # sums in another order, as on a GPU, then hardly ever differ
    scores = scores if alive is None else scores * alive
    if not spanned:
        return scores
    return scores.mean(spanned, keepdim=True) if normalize else scores.sum(spanned, keepdim=True)


def select_units(scores: Tensors, k: int, alive: Tensors, granularity: str, normalize: bool) -> Selection:
    """Prune the lowest kernels or filters until the number of weights is as near to `k` as whole ones allow."""
    alive = {name: alive.get(name, torch.ones_like(s, dtype=torch.bool)) for name, s in scores.items()}
    units = {name: unit_scores(s, granularity, alive[name], normalize) for name, s in scores.items()}
    device = next(iter(scores.values())).device
    values = torch.cat([u.reshape(-1).to(device) for u in units.values()])
    sizes = torch.cat([_sum_to(alive[name], u.shape).reshape(-1).to(device) for name, u in units.items()])
    values[sizes == 0] = -torch.inf  # units without a weight left go first, at no cost
    values, order = values.sort(stable=True)
    weights = sizes[order].cumsum(0)
    going = int(torch.searchsorted(weights, k, right=True))  # the most units that take no more than k weights
    if going < len(weights):
        less = int(weights[going - 1]) if going else 0
        going += int(weights[going]) - k < k - less
    stays = torch.ones(len(order), dtype=torch.bool, device=device)
    stays[order[:going]] = False
    tied = torch.zeros_like(stays)
    if 0 < going < len(order) and values[going - 1] == values[going]:
        tied[order[values == values[going - 1]]] = True
    keep, ties, start = {}, {}, 0
    for name, u in units.items():
        here = slice(start, start + u.numel())
        keep[name] = alive[name] & stays[here].view(u.shape).to(u.device)
        if n := int(sizes[here][tied[here]].sum()):
            ties[name] = n
        start += u.numel()
    return Selection(keep, ties)


def _sum_to(mask: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The number of True entries in each unit of a mask."""
    spanned = [dim for dim, size in enumerate(shape) if size != mask.shape[dim]]
    return mask.sum(spanned, keepdim=True) if spanned else mask.long()


def n_of_m(granularity: str) -> tuple[int, int]:
    """(2, 4) for "2:4"; ValueError unless 0 < N <= M."""
    n, _, m = granularity.partition(":")
    if not (n.isdecimal() and m.isdecimal() and 0 < int(n) <= int(m)):
        raise ValueError(f"granularity {granularity!r} is not N:M with whole numbers 0 < N <= M, such as 2:4")
    return int(n), int(m)


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
