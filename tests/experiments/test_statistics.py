import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pruneutils.experiments.statistics import compare, summary


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
        (lambda frame: summary(frame, by="arm"), "no column 'arm'; possible are method, seed, accuracy"),
        (lambda frame: summary(frame, by="method", interval="z"), "interval 'z'"),
        (lambda frame: summary(frame, by="method", level=95), "level 95"),
        (lambda frame: summary(frame, by="seed", value="method"), "not numbers"),
        (lambda frame: compare(frame, test="z"), "test 'z'"),
        (lambda frame: compare(frame, pair_on="start"), "no column 'start'"),
        (lambda frame: compare(frame[frame.method == "a"]), "one arm only"),
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
    assert p_and_verdict(6, 0.0) == (1.0, "cannot be told apart")


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
    assert list(table.columns) == ["sparsity", *"ab", "n", "difference", "low", "high", "p", "p_holm", "verdict"]
    assert table["verdict"].tolist() == ["cannot be told apart", "a > b"]
    assert table["p_holm"].iloc[1] == pytest.approx(2 * table["p"].iloc[1])
