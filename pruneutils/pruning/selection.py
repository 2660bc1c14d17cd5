"""Scores to masks: which weights go when exactly k have to. Ties go by position: what comes first is pruned first."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

_SAMPLE = 1 << 16  # scores looked at, at least, to guess where the cut is
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
        transform: `transform(chunk, out=buffer)`, such as torch.abs, converts each chunk to scores; the buffer may be
            the chunk itself.

    Returns:
        The masks, and how many scores tie at the cut in each tensor.

    Raises:
        ValueError: If k is not within 0 and the number alive, or if a score is NaN or infinite.
    """
    alive = {name: mask for name, mask in (alive or {}).items() if name in scores}
    total = sum(s.numel() for n, s in scores.items() if n not in alive) + sum(n_each_true(alive.values()))
    if not 0 <= k <= total:
        raise ValueError(f"cannot prune {k} of {total} weights")
    if not any(s.numel() for s in scores.values()):
        return Selection({name: torch.ones_like(s, dtype=torch.bool) for name, s in scores.items()}, {})
    single = (torch.float32, torch.bfloat16, torch.float16)
    dtype = torch.float32 if all(s.dtype in single for s in scores.values()) else torch.float64
    way = _select_in_chunks if _all_on_cpu(scores) else _select_whole
    try:
        return way(scores, k, total, alive, transform or _as_it_is, dtype)
    except _NotFinite as error:
        bad = scores[error.args[0]]
        n_bad = bad.numel() - int(torch.isfinite(bad).count_nonzero())
        raise ValueError(f"{error}: {n_bad} of {bad.numel()} scores are NaN or infinite") from None


def _all_on_cpu(scores: Tensors) -> bool:
    return all(s.device.type == "cpu" for s in scores.values())


def _select_in_chunks(scores, k, total, alive, transform, dtype) -> Selection:
    """On a CPU, chunks stay in its cache, and numpy is fast."""
    low, high = _bracket(scores, k / max(total, 1), alive, transform, dtype)
    while True:
        keep, values, positions, n_above = _split(scores, low, high, alive, transform, dtype)
        n_inside = k - (total - n_above - len(values))  # how many of those inside the bracket are to be pruned
        if 0 <= n_inside <= len(values):
            break
        low, high = (-torch.inf, low) if n_inside < 0 else (high, torch.inf)  # the cut is outside: look there
    stays, tied = _rank_inside(values, n_inside)
    ends = torch.tensor([s.numel() for s in scores.values()]).cumsum(0)
    _keep_positions(keep, positions[stays], ends)
    ties = torch.bincount(torch.bucketize(positions[tied], ends, right=True), minlength=len(keep))
    return Selection(keep, {name: n for name, n in zip(keep, ties.tolist()) if n})


def _select_whole(scores, k, total, alive, transform, dtype) -> Selection:
    """On a GPU, every operation is a launch and every number asked for is a wait: few of both, on all scores at once.

    The scores are copied into one tensor. The program waits for the counts of what is above and inside the bracket, for
    the positions of what is inside, and for the ties.
    """
    device = next((s.device for s in scores.values() if s.device.type != "cpu"), torch.device("cpu"))
    values = torch.cat([s.detach().reshape(-1).to(device, dtype) for s in scores.values()])
    values = transform(values, out=values)
    here = None
    if alive:
        whole = (alive[n] if n in alive else torch.ones_like(s, dtype=torch.bool) for n, s in scores.items())
        here = torch.cat([mask.reshape(-1).to(device) for mask in whole])
    low, high = _bracket_whole(values, here, k / max(total, 1))
    while True:
        above = values > high
        inside = (values > low).logical_xor_(above)
        if here is not None:
            above &= here
            inside &= here
        extremes = torch.stack(values.aminmax()).isfinite().all()  # NaN if any value is
        counts = torch.stack([above.count_nonzero(), inside.count_nonzero(), extremes.long()])
        n_above, n_candidates, finite = counts.tolist()
        if not finite:
            _name_what_is_not_finite(scores, transform, dtype)
        n_inside = k - (total - n_above - n_candidates)
        if 0 <= n_inside <= n_candidates:
            break
        infinity = torch.full_like(low, torch.inf)
        low, high = (-infinity, low) if n_inside < 0 else (high, infinity)
    positions = inside.nonzero().flatten()
    ranked = values[positions].sort(stable=True)
    above[positions[ranked.indices[n_inside:]]] = True
    parts = above.split([s.numel() for s in scores.values()])
    # memory of its own for each mask: a file of tensors takes no two that share theirs
    keep = {name: part.view(s.shape).to(s.device, copy=True) for (name, s), part in zip(scores.items(), parts)}
    if not 0 < n_inside < n_candidates:
        return Selection(keep, {})
    cut = ranked.values[n_inside - 1]
    tied = (ranked.values == cut) & (ranked.values[n_inside] == cut)
    ends = torch.tensor([s.numel() for s in scores.values()], device=device).cumsum(0)
    owners = torch.bucketize(positions[ranked.indices], ends, right=True)
    ties = torch.zeros(len(keep), dtype=torch.long, device=device).index_add_(0, owners, tied.long())
    return Selection(keep, {name: n for name, n in zip(keep, ties.tolist()) if n})


def _name_what_is_not_finite(scores, transform, dtype):
    for name, s in scores.items():
        if not torch.isfinite(transform(s.detach().to(dtype))).all():
            raise _NotFinite(name)


def _as_it_is(chunk, out=None):
    return chunk


def _rank_inside(values: torch.Tensor, n_pruned: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the values stay (bool), and the indices of those that tie at the cut if it parts them."""
    nothing = torch.empty(0, dtype=torch.long)
    if n_pruned == 0:
        return torch.ones_like(values, dtype=torch.bool), nothing
    cut = torch.from_numpy(np.partition(values.numpy(), n_pruned - 1))[n_pruned - 1]
    tied = torch.from_numpy(np.flatnonzero((values == cut).numpy()))  # in order: the first of them are pruned
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


def _sampled(total: int) -> torch.Tensor:
    """Positions to look at: one at random from each stretch; evenly spaced ones can fall in step with 3x3 kernels."""
    n = max(_SAMPLE, total >> 10)  # more of very many, as what lies inside the bracket takes memory
    jitter = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return jitter.add_(torch.arange(n)).mul_(total / n).long().clamp_(max=total - 1)


def _ranks_around(quantile: float, n: int) -> tuple[int, int]:
    """Two ranks in a sorted sample of n with the `quantile` of all very probably between them; they may lie outside."""
    margin = 4 * (quantile * (1 - quantile) / max(n, 1)) ** 0.5 * n + 2
    return int(quantile * n - margin), int(quantile * n + margin) + 1


def _bracket(scores, quantile, alive, transform, dtype) -> tuple[float, float]:
    """Two scores with the `quantile` of all very probably between them; the infinite ones where scores are few."""
    total = sum(s.numel() for s in scores.values())
    if total <= 4 * _SAMPLE:
        return -torch.inf, torch.inf
    positions = _sampled(total)
    ends = torch.tensor([0, *(s.numel() for s in scores.values())]).cumsum(0)
    bounds, sample = torch.searchsorted(positions, ends).tolist(), []
    for i, (name, s) in enumerate(scores.items()):
        here = positions[bounds[i] : bounds[i + 1]] - ends[i]
        values = transform(s.detach().reshape(-1)[here].to(dtype))
        sample.append(values[alive[name].reshape(-1)[here]] if name in alive else values)
    sample = torch.from_numpy(np.sort(torch.cat(sample).numpy()))
    first, last = _ranks_around(quantile, len(sample))
    # the lower end is exclusive, so step below the sampled score: what ties with it has to be inside
    low = torch.nextafter(sample[first], sample.new_tensor(-torch.inf)).item() if first >= 0 else -torch.inf
    return low, sample[last].item() if last < len(sample) else torch.inf


def _bracket_whole(values, here, quantile) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of one tensor, and as tensors: nothing is waited for unless there is a mask."""
    infinity = values.new_tensor(torch.inf)
    if len(values) <= 4 * _SAMPLE:
        return -infinity, infinity
    positions = _sampled(len(values)).to(values.device)
    sample = values[positions]
    sample = (sample if here is None else sample[here[positions]]).sort().values
    first, last = _ranks_around(quantile, len(sample))
    low = torch.nextafter(sample[first], -infinity) if first >= 0 else -infinity
    return low, sample[last] if last < len(sample) else infinity


@dataclass(frozen=True)
class _Stretch:
    """A part of one tensor, small enough for the cache."""

    name: str
    start: int  # in the tensor
    offset: int  # of the tensor, in all scores
    scores: torch.Tensor
    mask: torch.Tensor  # to be written
    alive: torch.Tensor | None


def _split(scores, low, high, alive, transform, dtype):
    """Masks of what is above `high`, values and flat positions of what is in (low, high], and the number above."""
    keep, stretches, offset = {}, [], 0
    for name, s in scores.items():
        flat, mask = s.detach().reshape(-1), torch.empty(s.shape, dtype=torch.bool)
        here = alive[name].reshape(-1) if name in alive else None
        keep[name] = mask
        for i in range(0, len(flat), _CHUNK):
            part = slice(i, i + _CHUNK)
            own = None if here is None else here[part]
            stretches.append(_Stretch(name, i, offset, flat[part], mask.view(-1)[part], own))
        offset += len(flat)
    bounds = low, high, transform, dtype
    # Threads of our own and not those of torch: they need not wait for each other after every operation.
    alike = all(s.dtype == dtype for s in scores.values())
    n_threads = min(torch.get_num_threads(), len(stretches) // 4) if alike else 1
    if n_threads > 1:
        step = -(-len(stretches) // (4 * n_threads))
        groups = [stretches[i : i + step] for i in range(0, len(stretches), step)]
        with ThreadPoolExecutor(n_threads) as pool:
            parts = [
                part for group in pool.map(lambda group: _split_stretches(group, *bounds), groups) for part in group
            ]
    else:
        parts = _split_stretches(stretches, *bounds)
    values, positions, n_above = zip(*parts)
    del parts  # and so each list is free as soon as it is one tensor
    values = torch.cat(values)
    return keep, values, torch.cat(positions), sum(map(int, n_above))


def _split_stretches(stretches, low, high, transform, dtype) -> list[tuple]:
    """(values inside, their positions in all scores, number above) for each stretch; the masks are written."""
    # the same memory for all: fresh pages would cost more than the work on them
    largest = max(len(stretch.scores) for stretch in stretches)
    values, inside = torch.empty(largest, dtype=dtype), torch.empty(largest, dtype=torch.bool)
    parts = []
    for stretch in stretches:
        n = len(stretch.scores)
        found, positions, n_above = _split_in_numpy(stretch, low, high, transform, values[:n], inside[:n])
        parts.append((found, positions.add_(stretch.offset + stretch.start), n_above))
    return parts


def _split_in_numpy(stretch, low, high, transform, values, inside):
    """Numpy compares, counts and searches three to nine times faster than torch does on a CPU."""
    scores, above, inside = stretch.scores.to(values.dtype), stretch.mask.numpy(), inside.numpy()
    if transform is torch.abs:
        values = np.abs(scores.numpy(), out=values.numpy())
    else:
        values = transform(scores, out=values).numpy()
    # the highest value is NaN if any is
    _check_finite(stretch, values.max() < np.inf and (transform is torch.abs or values.min() > -np.inf))
    np.greater(values, high, out=above)
    np.greater(values, low, out=inside)
    inside ^= above
    if stretch.alive is not None:
        alive = stretch.alive.numpy()
        above &= alive
        inside &= alive
    positions = np.flatnonzero(inside)
    return torch.from_numpy(values[positions]), torch.from_numpy(positions), np.count_nonzero(above)


def _check_finite(stretch, finite: bool) -> None:
    if not finite:
        raise _NotFinite(stretch.name)


class _NotFinite(ValueError):
    """The scores of the tensor of this name are NaN or infinite."""


def n_true(mask: torch.Tensor) -> int:
    """Count the True entries of a mask."""
    return np.count_nonzero(mask.numpy()) if mask.device.type == "cpu" else int(mask.count_nonzero())


def n_each_true(masks: Iterable[torch.Tensor]) -> list[int]:
    """Count the True entries of each mask; for all those on GPUs the program waits once a GPU."""
    counts: dict[int, int] = {}
    waiting: dict[torch.device, list] = {}
    for i, mask in enumerate(masks):
        if mask.device.type == "cpu":
            counts[i] = n_true(mask)
        else:
            waiting.setdefault(mask.device, []).append((i, mask.count_nonzero()))
    for found in waiting.values():
        indices, numbers = zip(*found)
        counts |= zip(indices, torch.stack(numbers).tolist())
    return [counts[i] for i in sorted(counts)]


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
