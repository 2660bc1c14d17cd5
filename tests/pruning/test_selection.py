"""Selection is exact, stable and the same as a sort of everything, however the scores are spread."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruneutils.pruning import granularities, selection
from pruneutils.pruning.selection import select, select_n_of_m

KINDS = ("normal", "quantised", "zeros", "constant", "subnormal", "integers")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def values(kind, shape, generator):
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return {
        "normal": x,
        "quantised": (x * 2).round() / 2,
        "zeros": x * (torch.rand(shape, generator=generator) > 0.8),
        "constant": torch.full_like(x, -0.25),
        "subnormal": x * 1e-42,
        "integers": (x * 3).round(),
    }[kind]


def expected(scores, k, alive):
    """The k first of a stable argsort over all that is alive."""
    flat = np.concatenate([s.detach().double().contiguous().reshape(-1).numpy() for s in scores.values()])
    here = np.concatenate(
        [alive[n].reshape(-1).numpy() if n in alive else np.ones(s.numel(), bool) for n, s in scores.items()]
    )
    places = np.flatnonzero(here)
    order = places[np.argsort(flat[places], kind="stable")]
    keep = here.copy()
    keep[order[:k]] = False
    ties = np.zeros(len(flat), bool)
    if 0 < k < len(order) and flat[order[k - 1]] == flat[order[k]]:
        ties[places] = flat[places] == flat[order[k - 1]]
    masks, counts, start = {}, {}, 0
    for name, s in scores.items():
        masks[name] = torch.from_numpy(keep[start : start + s.numel()]).view(s.shape)
        counts[name] = int(ties[start : start + s.numel()].sum())
        start += s.numel()
    return masks, {name: n for name, n in counts.items() if n}


def assert_as_sorted(scores, k, alive=None):
    before = {name: s.clone() for name, s in scores.items()}
    masks, ties = expected(scores, k, alive or {})
    for on_gpu in (False, True):
        with as_on_a_gpu(on_gpu):
            chosen = select(scores, k, alive)
        assert list(chosen.keep) == list(masks)
        for name, mask in masks.items():
            assert chosen.keep[name].dtype == torch.bool and torch.equal(chosen.keep[name], mask)
            assert torch.equal(scores[name], before[name])
        assert chosen.ties == ties
        assert len({mask.untyped_storage().data_ptr() for mask in chosen.keep.values()}) == len(masks)


@contextmanager
def as_on_a_gpu(forced=True):
    """Select among tensors of the CPU in the way of those on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if forced:
            patch.setattr(selection, "_all_on_cpu", lambda scores: False)
        yield


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_select_equals_a_stable_sort_of_all_scores(data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    scores, alive = {}, {}
    for i in range(data.draw(st.integers(1, 4))):
        shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=4)))
        score = values(data.draw(st.sampled_from(KINDS)), shape, generator).to(data.draw(st.sampled_from(DTYPES)))
        if len(shape) == 4 and data.draw(st.booleans()):
            score = score.to(memory_format=torch.channels_last)
        scores[f"layer{i}.weight"] = score
        if data.draw(st.booleans()):
            alive[f"layer{i}.weight"] = torch.rand(shape, generator=generator) < data.draw(st.sampled_from((0, 0.5, 1)))
    total = sum(int(alive[n].sum()) if n in alive else s.numel() for n, s in scores.items())
    k = min(total, data.draw(st.sampled_from((0, 1, total - 1, total)) | st.integers(0, total)))
    assert_as_sorted(scores, max(k, 0), alive)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fraction", [0, 0.5, 0.83, 1])
def test_select_equals_a_stable_sort_where_it_samples(kind, fraction):
    generator = torch.Generator().manual_seed(1)
    scores = {
        "a": values(kind, (300, 400), generator).float(),
        "b": values("normal", (64, 64, 6, 7), generator).to(memory_format=torch.channels_last).bfloat16(),
        "c": values(kind, (99, 1001), generator),
    }
    alive = {"b": torch.rand(scores["b"].shape, generator=generator) < 0.5}
    total = int(alive["b"].sum()) + 120_000 + 99_099
    assert sum(s.numel() for s in scores.values()) > 1 << 18
    assert_as_sorted(scores, round(fraction * total), alive)


@pytest.mark.parametrize("bracket", [(5.0, torch.inf), (-torch.inf, -5.0), (9.0, 10.0), (-10.0, -9.0), (0.0, 0.0)])
def test_a_bracket_that_misses_the_cut_changes_nothing(monkeypatch, bracket):
    scores = {"a": torch.randn(50, 40), "b": (torch.randn(30, 30) * 2).round()}
    monkeypatch.setattr(selection, "_bracket", lambda *_: bracket)
    for k in (0, 1, 700, 1450, 2899, 2900):
        assert_as_sorted(scores, k)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_scores_may_be_transformed_and_of_any_size(on_gpu):
    weights = {"a": torch.randn(600, 500), "b": torch.randn(40, 40).bfloat16()}
    plain = select({name: w.abs() for name, w in weights.items()}, 200_000)
    with as_on_a_gpu(on_gpu):
        chosen = select(weights, 200_000, transform=torch.abs)
        assert select({"w": torch.tensor([2**40 + 1, 2**40])}, 1).keep["w"].tolist() == [True, False]
        assert select({"w": torch.tensor([3e38, 3e38, 1e38])}, 2).keep["w"].tolist() == [False, True, False]
    assert chosen.ties == plain.ties and all(torch.equal(chosen.keep[n], plain.keep[n]) for n in weights)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [10, 300_000])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_scores_that_are_not_finite_raise_and_name_the_layer(bad, size, on_gpu):
    scores = {"fine": torch.rand(10, 10), "broken.weight": torch.rand(size, 1)}
    scores["broken.weight"][size // 2] = bad
    with as_on_a_gpu(on_gpu), pytest.raises(ValueError, match="broken.weight: some scores are NaN or infinite"):
        select(scores, 5)


@pytest.mark.parametrize("kind", ["normal", "zeros", "quantised"])
@pytest.mark.parametrize("n_threads", [2, 3])
def test_threads_change_nothing(monkeypatch, n_threads, kind):
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    monkeypatch.setattr(selection, "_CHUNK", 1 << 12)
    pools, pool = [], selection.ThreadPoolExecutor
    monkeypatch.setattr(selection, "ThreadPoolExecutor", lambda n: pools.append(n) or pool(n))
    generator = torch.Generator().manual_seed(2)
    scores = {name: values(kind, shape, generator).float() for name, shape in {"a": (300, 500), "b": (7, 9)}.items()}
    alive = {"a": torch.rand(300, 500, generator=generator) < 0.5}
    assert_as_sorted(scores, 60_000, alive)
    assert set(pools) == {n_threads}


# --- Units -----------------------------------------------------------------------------------------------------------


def brute_units(scores, k, alive, granularity, normalize):
    """Go through the units in order of (score, position) and stop where the number is nearest to k."""
    units = []
    for name, s in scores.items():
        dims = {"weight": s.ndim, "kernel": 2, "filter": 1}[granularity]
        for place in np.ndindex(*s.shape[:dims]):
            live = alive[name][place]
            size, score = int(live.sum()), float((s[place].double() * live).sum())
            score = score / s[place].numel() if normalize else score
            units.append((score if size else -np.inf, size, name, place))
    order = sorted(range(len(units)), key=lambda i: units[i][0])
    sums = np.cumsum([0] + [units[i][1] for i in order])
    best = min(range(len(sums)), key=lambda i: (abs(sums[i] - k), -i if sums[i] <= k else i))
    keep = {name: mask.clone() for name, mask in alive.items()}
    for i in order[:best]:
        _, _, name, place = units[i]
        keep[name][place] = False
    return keep


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_units_are_pruned_lowest_first_as_near_as_whole_ones_allow(data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    kind, granularity = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(("weight", "kernel", "filter")))
    shapes = [(4, 3, 3, 3), (3, 4, 1, 1), (5, 4), (2, 3, 5)]
    scores = {str(i): values(kind, shape, generator).abs() for i, shape in enumerate(shapes)}
    if kind in ("zeros", "quantised", "integers"):
        scores = {name: (s * 4).round() / 4 for name, s in scores.items()}  # sums are exact, so ties are ties
    alive = {name: torch.rand(s.shape, generator=generator) < 0.7 for name, s in scores.items()}
    k, normalize = data.draw(st.integers(0, sum(int(m.sum()) for m in alive.values()))), data.draw(st.booleans())
    if normalize and kind in ("zeros", "quantised", "integers", "constant"):
        normalize = False  # a mean over nine is not exact in binary, so the order of ties would be luck
    n_gone = sum(int((~mask).sum()) for mask in alive.values())
    chosen = granularities.find(granularity).select(scores, n_gone + k, alive, normalize)
    masks = brute_units(scores, k, alive, granularity, normalize)
    assert all(torch.equal(chosen.keep[name], mask) for name, mask in masks.items())
    tied = granularities.find("filter").select({"a": torch.ones(4, 2, 3, 3), "b": torch.zeros(1, 2, 3, 3)}, 36, {})
    assert tied.ties == {"a": 72} and [int(m.sum()) for m in tied.keep["a"]] == [0, 18, 18, 18]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_n_of_m_keeps_the_highest_n_of_every_m_inputs(data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    m = data.draw(st.integers(1, 4))
    n = data.draw(st.integers(1, m))
    shape = (3, 2 * m, *data.draw(st.sampled_from(((), (3,), (2, 3)))))
    s = values(data.draw(st.sampled_from(KINDS)), shape, generator)
    alive = torch.rand(shape, generator=generator) < data.draw(st.sampled_from((0.5, 1)))
    chosen, tied = select_n_of_m({"w": s}, n, m, {"w": alive}), 0
    rows, live = s.movedim(1, -1).reshape(-1, m), alive.movedim(1, -1).reshape(-1, m)
    kept = chosen.keep["w"].movedim(1, -1).reshape(-1, m)
    for row, here, mask in zip(rows.tolist(), live.tolist(), kept.tolist()):
        order = sorted(range(m), key=lambda i: row[i] if here[i] else -np.inf)  # sorted is stable
        assert mask == [here[i] and i not in order[: m - n] for i in range(m)]
        if n < m and here[order[m - n - 1]] and row[order[m - n - 1]] == row[order[m - n]]:
            tied += sum(here[i] and row[i] == row[order[m - n]] for i in range(m))
    assert sum(chosen.ties.values()) == tied
    for name in ("4:2", "0:4", "2:", ":4", "a:b", "2:4:8", "-1:4"):
        with pytest.raises(ValueError, match="N:M"):
            granularities.find(name)


def test_nothing_is_selected_from_nothing():
    assert select({}, 0).keep == {} and select({"a": torch.zeros(0, 3)}, 0).keep["a"].shape == (0, 3)
    assert select({"a": torch.zeros(0), "b": torch.arange(3.0)}, 1).keep["b"].tolist() == [False, True, True]
    for k, scores in ((1, torch.zeros(0)), (-1, torch.rand(2, 3)), (7, torch.rand(2, 3))):
        with pytest.raises(ValueError, match=f"cannot prune {k} of {scores.numel()} weights"):
            select({"a": scores}, k)
