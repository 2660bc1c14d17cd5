import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pruneutils.experiments.statistics import bootstrap_images, by_image, compare, mcnemar, summary


def runs(**arms):
    """A frame with a row a seed of every arm."""
    rows = [(arm, seed, value) for arm, values in arms.items() for seed, value in enumerate(values)]
    return pd.DataFrame(rows, columns=["method", "seed", "accuracy"])


def test_t_interval_by_hand():
    # mean 4, std 2, n 3: half width = t(.975, 2) * 2 / sqrt(3) = 4.302653 * 1.154701
    row = summary(runs(a=[2, 4, 6]), by="method").iloc[0]
    assert list(row.index) == ["method", "mean", "low", "high", "n", "std"]
    assert (row["mean"], row["n"], row["std"]) == (4, 3, 2)
    assert row["high"] - 4 == pytest.approx(4.968275, abs=1e-6) == 4 - row["low"]


def test_intervals_against_scipy():
    sample = np.random.default_rng(1).normal(0.9, 0.01, 12)
    t = summary(runs(a=sample), by="method", level=0.9).iloc[0]
    assert (t["low"], t["high"]) == pytest.approx(
        tuple(stats.ttest_1samp(sample, 0).confidence_interval(0.9)), rel=1e-12
    )
    boot = summary(runs(a=sample), by="method", interval="bootstrap").iloc[0]
    means = np.random.default_rng(5).choice(sample, (20_000, 12)).mean(axis=1)
    assert (boot["low"], boot["high"]) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=3e-4)
    pd.testing.assert_series_equal(boot, summary(runs(a=sample), by="method", interval="bootstrap").iloc[0])


@pytest.mark.parametrize("interval", ["t", "bootstrap"])
def test_one_run_has_no_interval_and_equal_runs_have_width_zero(interval):
    table = summary(runs(one=[0.5], same=[0.1, 0.1, 0.1]), by="method", interval=interval).set_index("method")
    assert table.loc["one", ["low", "high", "std"]].isna().all() and table.loc["one", "n"] == 1
    assert table.loc["same", ["low", "high"]].tolist() == pytest.approx([0.1, 0.1])


def test_groups_keep_their_order_and_sizes_their_distance():
    frame = pd.concat([runs(b=[1, 2], a=[3, 4]).assign(size=size) for size in ("quick", "full")])
    with pytest.raises(ValueError, match=r"sizes \['quick', 'full'\] do not mix"):
        summary(frame, by="method")
    with pytest.raises(ValueError, match="do not mix"):
        compare(frame)
    assert summary(frame, by=["size", "method"])["method"].tolist() == ["b", "a", "b", "a"]
    assert compare(frame, within="size")["size"].tolist() == ["quick", "full"]


def test_a_seed_counts_once():
    curve = pd.concat([runs(a=[1, 2], b=[2, 3]).assign(epoch=epoch) for epoch in (0, 1)])
    with pytest.raises(ValueError, match="seed .0. comes more than once in the group {'method': 'a'}"):
        summary(curve, by="method")
    with pytest.raises(ValueError, match="comes more than once"):
        compare(curve)
    assert summary(curve, by=["method", "epoch"])["n"].tolist() == [2, 2, 2, 2]
    assert summary(curve, by="method", seed=None)["n"].tolist() == [4, 4]
    assert len(compare(curve, within="epoch")) == 2


def test_rows_without_a_value_are_left_out_aloud():
    with pytest.warns(UserWarning, match="1 of 3 rows have no accuracy"):
        assert summary(runs(a=[1, np.nan, 3]), by="method")["n"].tolist() == [2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda frame: summary(frame, by="arm"), "unknown column 'arm'; known: method, seed, accuracy"),
        (lambda frame: summary(frame, by="method", interval="z"), "unknown interval 'z'; known: t, bootstrap"),
        (lambda frame: summary(frame, by="method", level=95), "level must be a fraction .* not 95"),
        (lambda frame: summary(frame, by="seed", value="method"), "not numbers"),
        (lambda frame: compare(frame, test="z"), "unknown test 'z'"),
        (lambda frame: compare(frame, pair_on="start"), "unknown column 'start'"),
        (lambda frame: compare(frame[frame.method == "a"]), "one arm only"),
        (lambda frame: compare(frame, against="A"), "unknown arm 'A'; did you mean 'a'"),
        (lambda frame: compare(frame, against=[("a", "z")]), "unknown arm 'z'"),
        (lambda frame: compare(frame, against=["a"]), "list of pairs of two different arms, not .'a'."),
        (lambda frame: compare(frame, against=[("a", "b"), ("b", "a")]), "none twice"),
        (lambda frame: compare(frame, test="mcnemar"), "more than 0 and 1"),
        (lambda frame: compare(frame, within="accuracy", pair_on="seed"), "no two of the arms to compare"),
    ],
)
def test_errors_say_what_and_where(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(runs(a=[1, 2], b=[3, 4]))


def test_paired_t_by_hand_and_against_scipy():
    # differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t = 3.4641 on 2 degrees of freedom, p = 0.0742
    row = compare(runs(a=[11, 22, 33], b=[10, 20, 30])).iloc[0]
    assert (row["a"], row["b"], row["n"], row["difference"]) == ("a", "b", 3, 2)
    assert row["p"] == row["p_holm"] == pytest.approx(0.0741799, abs=1e-6)
    assert (row["low"], row["high"]) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-6)
    assert row["verdict"] == "cannot be told apart"
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 10), rng.normal(0.3, 1, 10)
    shuffled = runs(a=a, b=b).sample(frac=1, random_state=0)
    expected = {"t": stats.ttest_rel(a, b).pvalue, "wilcoxon": stats.wilcoxon(a, b).pvalue}
    for test, p in expected.items():
        assert compare(shuffled, test=test)["p"].iloc[0] == pytest.approx(p, rel=1e-12)


def test_pairing_finds_what_the_spread_between_seeds_hides():
    start = np.array([0.80, 0.85, 0.90, 0.95, 0.70])
    table = compare(runs(weak=start, strong=start + [0.010, 0.011, 0.009, 0.010, 0.012]))
    assert table["verdict"].tolist() == ["strong > weak"]
    assert stats.ttest_ind(start, start + 0.01).pvalue > 0.8


def test_holm_over_all_rows_by_hand():
    # a-b and a-c have the same small p, b-c a large one: times 3, times 2 (raised to the first), times 1
    noise = np.array([0, 1, -1, 2, -2, 0.5])
    table = compare(runs(a=10 + noise**2, b=noise, c=noise[::-1]))
    p = table["p"].to_numpy()
    order = np.argsort(p)
    by_hand = np.minimum(1, np.maximum.accumulate(p[order] * [3, 2, 1]))
    assert table["p_holm"].to_numpy()[order] == pytest.approx(by_hand)
    assert table["verdict"].tolist() == ["a > b", "a > c", "cannot be told apart"]


def test_holm_turns_a_lucky_pair_down():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 1, 5)
    lucky = {"a": base, "b": base + [0.9, 1.3, 0.2, 1.5, 0.6]}
    assert compare(runs(**lucky))["verdict"].tolist() == ["b > a"]
    many = compare(runs(**lucky, **{name: rng.normal(0, 1, 5) for name in "cdefgh"}))
    assert many["p"].iloc[0] < 0.05 < many["p_holm"].iloc[0] and many["verdict"].iloc[0] == "cannot be told apart"


def test_equal_differences_are_judged_by_sign():
    def p_and_verdict(n, step):
        start = np.linspace(0.5, 0.9, n)
        row = compare(runs(a=start + step, b=start)).iloc[0]
        return row["p"], row["verdict"]

    assert p_and_verdict(2, 0.001) == (0.5, "cannot be told apart")
    assert p_and_verdict(6, 0.001) == (0.03125, "a > b")


def test_missing_pairs():
    frame = runs(a=[1, 2, 3, 4], b=[2, 3, 5], c=[7])
    with pytest.warns(
        UserWarning, match="without a partner of the same seed are left out .3 comparisons, first a and b"
    ):
        table = compare(frame)
    assert table["n"].tolist() == [3, 1, 1]
    assert table["verdict"].tolist()[1:] == ["too few pairs (1)"] * 2
    assert table.loc[1:, ["low", "high", "p", "p_holm"]].isna().all(axis=None)
    assert table["p_holm"].iloc[0] == table["p"].iloc[0]  # what was not tested does not count
    apart = frame.assign(seed=[0, 1, 2, 3, 10, 11, 12, 20])
    with pytest.warns(UserWarning, match="without a partner"):
        assert compare(apart)["verdict"].tolist() == ["too few pairs (0)"] * 3


def test_within_compares_at_equal_values_only():
    low, high = (runs(a=[1, 2, 3.1], b=[1, 2, 3]).assign(sparsity=s) for s in (0.5, 0.9))
    high.loc[high.method == "a", "accuracy"] += [4, 4.1, 4.2]
    table = compare(pd.concat([low, high]), within=["sparsity"])
    columns = [*"ab", "n", "difference", "low", "high", "p", "p_holm", "differs", "larger", "verdict"]
    assert list(table.columns) == ["sparsity", *columns]
    assert table["verdict"].tolist() == ["cannot be told apart", "a > b"]
    assert table["p_holm"].iloc[1] == pytest.approx(2 * table["p"].iloc[1])


def test_only_the_comparisons_asked_for_are_corrected():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 1, 6)
    arms = {"a": base, "b": base + [0.9, 1.3, 0.2, 1.5, 0.6, 0.8], "c": base + 1, "d": -base, "e": rng.normal(0, 1, 6)}
    frame = runs(**arms)
    every = compare(frame)
    assert len(every) == 10 and compare(frame, against=list(every[["a", "b"]].itertuples(index=False))).equals(every)
    one = compare(frame, against=[("b", "d")]).iloc[0]
    assert one["p_holm"] == one["p"] < every.set_index(["a", "b"]).p_holm["b", "d"]
    rows = compare(frame, against="a")
    assert rows["a"].tolist() == list("bcde") and set(rows["b"]) == {"a"}
    mirrored = compare(frame, against=[("a", "b")]).iloc[0]
    assert mirrored["difference"] == -rows["difference"].iloc[0] and mirrored["p"] == rows["p"].iloc[0]
    p = np.sort(rows["p"])
    assert np.sort(rows["p_holm"]) == pytest.approx(np.minimum(1, np.maximum.accumulate(p * [4, 3, 2, 1])))


def test_which_arm_is_larger_needs_no_reading_of_sentences():
    noise = np.array([0, 1, -1, 2, -2, 0.5])
    table = compare(runs(low=noise, high=10 + noise**2, other=noise[::-1]))
    assert table["differs"].dtype == bool and table["differs"].tolist() == [True, False, True]
    assert table["larger"].tolist() == ["high", None, "high"]
    numbers = compare(runs(low=noise, high=10 + noise**2).replace({"method": {"low": 1, "high": 8}}))
    assert numbers["larger"].tolist() == [8] and numbers["verdict"].tolist() == ["8 > 1"]


def test_arms_that_are_identical_by_construction_are_no_test():
    noise = np.array([0, 1, -1, 2, -2, 0.5])
    at_first = runs(a=noise, b=noise, c=noise).assign(sparsity=0.1)
    later = runs(a=noise, b=noise + [0.3, 0.1, 0.4, 0.1, 0.5, 0.2], c=noise).assign(sparsity=0.9)
    frame = pd.concat([at_first, later])
    table = compare(frame, against="a", within="sparsity").set_index(["sparsity", "a"])
    row = table.loc[0.9, "b"]
    assert row["p_holm"] == row["p"] and row["differs"]  # the other three rows are no tests
    same = table[table.verdict == "identical"]
    assert len(same) == 3 and same[["p", "p_holm"]].isna().all(axis=None)
    assert (same[["difference", "low", "high"]] == 0).all(axis=None) and not same["differs"].any()
    # a difference of rounding is none, on any scale
    tiny = 1e-6 * noise
    assert compare(runs(a=tiny, b=np.nextafter(tiny, 1)))["verdict"].tolist() == ["identical"]


# ---------------------------------------------------------------- single networks


def two_networks(both, only_a, only_b, neither):
    """Hits of two networks with these counts of images."""
    pairs = [(1, 1)] * both + [(1, 0)] * only_a + [(0, 1)] * only_b + [(0, 0)] * neither
    return torch.tensor(pairs).bool().unbind(1)


def test_mcnemar_by_hand():
    # 10 images that only a gets right, 2 that only b does: 2 * (C(12, 0) + C(12, 1) + C(12, 2)) / 2**12
    a, b = two_networks(50, 10, 2, 38)
    found = mcnemar(a, b)
    assert found.p == pytest.approx(2 * (1 + 12 + 66) / 4096) and found.n == 100
    assert found.difference == pytest.approx(0.08)
    assert 0 < found.low < 0.08 < found.high < 0.2
    assert mcnemar(b, a).p == found.p and mcnemar(b, a).difference == -found.difference
    assert mcnemar(a, a).p == 1 and mcnemar(a, a).high == 0
    assert mcnemar(a, b) == found and mcnemar(a.tolist(), b.numpy()) == found


@given(st.integers(2, 10), st.integers(0, 10), st.integers(0, 10), st.integers(0, 10))
@settings(max_examples=25, deadline=None)
def test_images_right_in_both_or_wrong_in_both_change_the_interval_but_not_p(only_a, only_b, both, neither):
    small = mcnemar(*two_networks(0, only_a, only_b, 0))
    large = mcnemar(*two_networks(both, only_a, only_b, neither))
    assert small.p == large.p and abs(large.difference) <= abs(small.difference)
    assert large.low <= large.difference <= large.high


def test_the_bootstrap_over_images_covers_like_the_normal_interval():
    a, b = two_networks(500, 120, 80, 300)
    difference = (a.float() - b.float()).numpy()
    half = 1.96 * difference.std(ddof=1) / np.sqrt(1000)
    found = bootstrap_images(a, b)
    assert (found.low, found.high) == pytest.approx((0.04 - half, 0.04 + half), abs=2e-3)
    assert found.p == pytest.approx(2 * stats.norm.sf(0.04 / (half / 1.96)), rel=0.3)
    assert found == bootstrap_images(a, b)
    # any number for each image: the pruned network's loss against the dense one
    drop = bootstrap_images(a.int() - b.int(), torch.zeros(1000))
    assert (drop.difference, drop.low, drop.high) == pytest.approx((found.difference, found.low, found.high))


def test_images_take_the_place_of_seeds():
    a, b = two_networks(50, 10, 2, 38)
    rows = [("snip", 0.5, a.int().tolist()), ("random", 0.5, b.int().tolist()), ("dense", 0.5, a.int().tolist())]
    frame = pd.DataFrame(rows, columns=["method", "sparsity", "hits"])
    texts = frame.assign(hits=frame.hits.map(json.dumps))  # as a sweep's table holds them
    table = by_image(texts)
    assert list(table.columns) == ["method", "sparsity", "image", "hit"] and len(table) == 300
    pd.testing.assert_frame_equal(table, by_image(frame.assign(hits=[a, b.numpy(), a])))
    pd.testing.assert_frame_equal(table, by_image(frame.set_index(pd.Index([0, 0, 0]))))
    compared = compare(table, value="hit", pair_on="image", test="mcnemar", within="sparsity", against="random")
    expected = mcnemar(a, b)
    for row in compared.itertuples():
        assert (row.p, row.difference, row.low, row.high) == pytest.approx(
            (expected.p, expected.difference, expected.low, expected.high)
        )
    everything = compare(table, value="hit", pair_on="image", test="mcnemar")
    assert everything["verdict"].tolist()[1] == "identical"
    means = summary(table, by="method", value="hit", interval="bootstrap", seed="image")
    assert means["n"].tolist() == [100] * 3 and means["mean"].tolist() == pytest.approx([0.6, 0.52, 0.6])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mcnemar([1, 0], [1]), "same images, but one has 2 and the other 1"),
        (lambda: mcnemar([], []), "same images"),
        (lambda: mcnemar([1, 2], [0, 1]), "0 or 1"),
        (lambda: mcnemar([[1, 0]], [[0, 1]]), r"not values of shape \(1, 2\)"),
        (lambda: bootstrap_images([1], [0], level=2), "level must be"),
        (lambda: by_image(pd.DataFrame({"hits": [[1], [1, 0]]})), "rows of 1 and 2 images"),
    ],
)
def test_networks_that_did_not_see_the_same_images(call, message):
    with pytest.raises(ValueError, match=message):
        call()
