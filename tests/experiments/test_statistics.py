import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pruneutils.experiments.statistics import bootstrap_images, compare, dunnett, summary, t_interval


def runs(**arms):
    """A frame with a row a seed of every arm."""
    rows = [(arm, seed, value) for arm, values in arms.items() for seed, value in enumerate(values)]
    return pd.DataFrame(rows, columns=["method", "seed", "accuracy"])


NOISE = np.array([0, 1, -1, 2, -2, 0.5])


def test_t_interval_by_hand_and_against_scipy():
    # mean 4, std 2, n 3: half width = t(.975, 2) * 2 / sqrt(3) = 4.302653 * 1.154701
    row = summary(runs(a=[2, 4, 6]), by="method").iloc[0]
    assert list(row.index) == ["method", "mean", "low", "high", "n", "std"]
    assert (row["mean"], row["n"], row["std"]) == (4, 3, 2)
    assert row["high"] - 4 == pytest.approx(4.968275, abs=1e-6) == 4 - row["low"]
    sample = np.random.default_rng(1).normal(0.9, 0.01, 12)
    t = summary(runs(a=sample), by="method", level=0.9).iloc[0]
    expected = tuple(stats.ttest_1samp(sample, 0).confidence_interval(0.9))
    assert (t["low"], t["high"]) == pytest.approx(expected, rel=1e-12) == t_interval(sample, 0.9)


def test_t_interval_is_an_errorbar_of_seaborn():
    import seaborn

    drawn = seaborn.pointplot(runs(a=[2, 4, 6], b=[1, 1.5, 3]), x="method", y="accuracy", errorbar=t_interval)
    bars = [line.get_ydata() for line in drawn.lines if len(line.get_ydata()) == 2 and line.get_xdata()[0] == 0]
    assert any(bar == pytest.approx(t_interval([2, 4, 6])) for bar in bars)


def test_groups_without_an_interval_or_a_value_stay():
    frame = runs(one=[0.5], same=[0.1] * 3, none=[np.nan] * 2, infinite=[1, np.inf])
    with pytest.warns(UserWarning, match="2 of 8 rows have no accuracy"):
        table = summary(frame, by="method").set_index("method")
    assert table.loc["one", ["low", "high", "std"]].isna().all() and table.loc["one", "n"] == 1
    assert table.loc["same", ["low", "high"]].tolist() == pytest.approx([0.1, 0.1])
    assert table.loc["none", "n"] == 0 and table.loc["none", ["mean", "low", "high", "std"]].isna().all()
    assert table.loc["infinite", "mean"] == np.inf and np.isnan(table.loc["infinite", "low"])


def test_epochs_do_not_count_as_runs():
    curve = pd.concat([runs(b=[1, 2], a=[3, 4.5]).assign(epoch=epoch) for epoch in (1, 2)])
    assert summary(curve, by=["epoch", "method"])["method"].tolist() == ["b", "a", "b", "a"]
    assert compare(curve, within="epoch")["epoch"].tolist() == [1, 2]
    calls = (summary, {"by": "method"}), (compare, {}), (dunnett, {"by": "method", "value": "accuracy", "control": "a"})
    for function, options in calls:
        with pytest.raises(ValueError, match="seed .0. comes more than once in the group {'method': 'b'}"):
            function(curve, **options)
    assert summary(curve, by="method", seed=None)["n"].tolist() == [4, 4]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda frame: summary(frame, by="arm"), "unknown column 'arm'"),
        (lambda frame: summary(frame, by="method", level=95), "level must be a fraction .* not 95"),
        (lambda frame: summary(frame, by="seed", value="method"), "not numbers"),
        (lambda frame: compare(frame, against="A"), "unknown arm 'A'"),
        (lambda frame: compare(frame, against=[("a", "b"), ("b", "a")]), "list of different pairs"),
        (lambda frame: compare(frame, within="accuracy"), "no two of the arms to compare"),
        (lambda frame: compare(frame.replace(4, np.inf)), "infinite"),
        (lambda frame: dunnett(frame, "method", "accuracy", "z"), "unknown arm 'z'"),
        (lambda frame: dunnett(frame[:3], "method", "accuracy", "a"), "arm 'b' has 1 run"),
        (lambda frame: dunnett(frame.replace(4, np.inf), "method", "accuracy", "a"), "infinite"),
        (lambda frame: dunnett(frame.assign(accuracy=1.0), "method", "accuracy", "a"), "no two runs of an arm differ"),
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
    assert not row["differs"] and row["larger"] is None
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 10), rng.normal(0.3, 1, 10)
    shuffled = runs(a=a, b=b).sample(frac=1, random_state=0)
    assert compare(shuffled)["p"].iloc[0] == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-9)
    # pairing finds what the spread between seeds hides
    start = np.array([0.80, 0.85, 0.90, 0.95, 0.70])
    assert compare(runs(weak=start, strong=start + [0.010, 0.011, 0.009, 0.010, 0.012])).larger.tolist() == ["strong"]


@given(
    st.lists(st.tuples(*[st.integers(0, 1000)] * 2), min_size=2, max_size=8),
    st.sampled_from([1e-6, 1.0, 100.0]),
)
@settings(max_examples=100, deadline=None)
def test_verdict_and_interval_agree(pairs, scale):
    a, b = scale * np.array(pairs, float).T / 1000
    row = compare(runs(a=a, b=b)).iloc[0]
    assert row["differs"] == (row["low"] > 0 or row["high"] < 0)
    assert row["low"] <= row["difference"] <= row["high"]
    other = compare(runs(a=b, b=a)).iloc[0]
    assert (other["p"], other["low"]) == pytest.approx((row["p"], -row["high"]))


def test_rounding_does_not_decide():
    start = np.linspace(0.5, 0.9, 5)
    equal = compare(runs(a=start + 0.1, b=start)).iloc[0]
    nearly = compare(runs(a=start + [0.1, 0.1, 0.1, 0.1, 0.1 + 1e-9], b=start)).iloc[0]
    assert equal["p"] == pytest.approx(nearly["p"], rel=1e-6) and equal["differs"] and nearly["differs"]
    one_image = compare(runs(a=start + 1e-4, b=start)).iloc[0]
    assert one_image["p"] > 0.05, "one of 10,000 images, always the same way"
    tiny = 1e-6 * NOISE
    same = compare(runs(a=tiny, b=np.nextafter(tiny, 1))).iloc[0]
    assert (same["p"], same["low"], same["high"]) == (1, 0, 0) and not same["differs"]


def test_holm_over_all_rows_by_hand():
    # a-b and a-c have the same small p, b-c a large one: times 3, times 2 (raised to the first), times 1
    table = compare(runs(a=10 + NOISE**2, b=NOISE, c=NOISE[::-1]))
    p = table["p"].to_numpy()
    order = np.argsort(p)
    by_hand = np.minimum(1, np.maximum.accumulate(p[order] * [3, 2, 1]))
    assert table["p_holm"].to_numpy()[order] == pytest.approx(by_hand)
    assert table["differs"].dtype == bool and table["larger"].tolist() == ["a", "a", None]
    rows = compare(runs(a=10 + NOISE**2, b=NOISE, c=NOISE[::-1]), against="a")
    assert rows["a"].tolist() == ["b", "c"] and (rows["b"] == "a").all() and rows["larger"].tolist() == ["a", "a"]
    mirrored = compare(runs(a=10 + NOISE**2, b=NOISE), against=[("b", "a")]).iloc[0]
    assert mirrored["difference"] == -table["difference"].iloc[0] and mirrored["p_holm"] == mirrored["p"] == p[0]


def test_the_family_does_not_depend_on_what_has_finished():
    better = NOISE + [0.9, 1.3, 0.2, 1.5, 0.6, 0.8]
    full = runs(a=NOISE, b=better, c=NOISE[::-1] + 1, d=NOISE)
    started = full.assign(accuracy=full.accuracy.where(full.method.isin(["a", "b"]) | (full.seed == 0)))
    with pytest.warns(UserWarning, match="rows have no accuracy|without a partner"):
        early = compare(started, against="a").set_index("a")
    late = compare(full, against="a").set_index("a")
    assert early.loc["b", "p_holm"] == late.loc["b", "p_holm"] == pytest.approx(3 * late.loc["b", "p"])
    assert early["n"].to_dict() == {"b": 6, "c": 1, "d": 1}
    assert early.loc["c", ["low", "high", "p", "p_holm"]].isna().all() and not early.loc["c", "differs"]
    assert late.loc["d", "p"] == 1, "identical arms belong to the family"


def test_runs_without_a_partner_are_left_out_with_a_warning():
    frame = runs(a=[1, 2, 3, 4], b=[2, 3, 5], c=[7])
    with pytest.warns(UserWarning, match="same seed are left out .3 comparisons, first a and b"):
        assert compare(frame)["n"].tolist() == [3, 1, 1]


def test_within_compares_at_equal_values_only():
    low, high = (runs(a=[1, 2, 3.1], b=[1, 2, 3]).assign(sparsity=s) for s in (0.5, 0.9))
    high.loc[high.method == "a", "accuracy"] += [4, 4.1, 4.2]
    table = compare(pd.concat([low, high]), within=["sparsity"])
    columns = [*"ab", "n", "difference", "low", "high", "p", "p_holm", "differs", "larger"]
    assert list(table.columns) == ["sparsity", *columns] and table["larger"].tolist() == [None, "a"]
    assert table["p_holm"].iloc[1] == pytest.approx(2 * table["p"].iloc[1])


def test_dunnett_against_scipy_and_its_example():
    # Dunnett (1955), table 1: blood counts of animals; drug B's is higher, drug A's is not
    control, a, b = [7.40, 8.50, 7.20, 8.24, 9.84, 8.32], [9.76, 8.80, 7.68, 9.36], [12.80, 9.68, 12.16, 9.20, 10.55]
    table = dunnett(runs(control=control, a=a, b=b), "method", "accuracy", "control")
    assert table["p"].tolist() == pytest.approx([0.62, 0.0058], abs=5e-3)
    assert table["differs"].tolist() == [False, True] and table["larger"].tolist() == [None, "b"]
    assert table["difference"].tolist() == pytest.approx([np.mean(a) - np.mean(control), np.mean(b) - np.mean(control)])
    assert (table["low"] < table["difference"]).all() and (table["difference"] < table["high"]).all()
    assert table["n"].tolist() == [4, 5] and (table["b"] == "control").all()
    pd.testing.assert_frame_equal(table, dunnett(runs(control=control, a=a, b=b), "method", "accuracy", "control"))


def test_the_bootstrap_over_images_covers_like_the_normal_interval():
    hits = [(1, 1)] * 500 + [(1, 0)] * 120 + [(0, 1)] * 80 + [(0, 0)] * 300
    a, b = torch.tensor(hits).bool().unbind(1)
    half = 1.96 * (a.float() - b.float()).std().item() / np.sqrt(1000)
    found = bootstrap_images(a, b)
    assert found.difference == pytest.approx(0.04) and found.n == 1000
    assert (found.low, found.high) == pytest.approx((0.04 - half, 0.04 + half), abs=2e-3)
    assert found.p == pytest.approx(2 * stats.norm.sf(0.04 / (half / 1.96)), rel=0.3)
    assert found == bootstrap_images(a, b)
    drop = bootstrap_images(a.int() - b.int(), torch.zeros(1000))  # any number for each image
    assert (drop.difference, drop.low, drop.high) == pytest.approx((found.difference, found.low, found.high))


def test_the_bootstrap_draws_runs_and_images():
    effect = 0.5 * np.random.default_rng(0).standard_normal((50, 1))  # of each run, the same for all images
    found = bootstrap_images(values := effect + np.zeros((50, 40)), 0 * values)
    assert (found.difference, found.n) == (pytest.approx(effect.mean()), 40)
    assert found.high - found.low == pytest.approx(2 * 1.96 * effect.std() / 50**0.5, rel=0.05)
    one = bootstrap_images(values.T, 0 * values.T)  # now of each image, the same in all runs
    assert one.high - one.low == pytest.approx(found.high - found.low, rel=0.05)
    values[0], values[1, 7:] = np.nan, np.nan  # not tested
    found = bootstrap_images(values, 0 * values)
    assert found.difference == pytest.approx(np.nanmean(values)) and found.low < found.difference < found.high


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_a_few_images_prove_nothing(n):
    found = bootstrap_images([1] * n, [0] * n)
    assert np.isnan(found.p) if n == 1 else found.p == 2.0 ** (1 - n)
    assert np.isnan(found.low) == (n < 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_images([1, 0], [1]), r"same images, not \(2,\) and \(1,\)"),
        (lambda: bootstrap_images([[[1, 0]]], [[[0, 1]]]), r"not \(1, 1, 2\)"),
        (lambda: bootstrap_images([[1, 0], [1, 1]], [[0, 1], [np.nan, 1]]), "image 0 has 1.0 and nan"),
        (lambda: bootstrap_images([1, 2, np.nan], [0, 1, 1]), "image 2 has nan and 1.0"),
        (lambda: bootstrap_images([1, 2], [0, np.inf]), "image 1 has 2.0 and inf"),
    ],
)
def test_networks_that_did_not_see_the_same_images(call, message):
    with pytest.raises(ValueError, match=message):
        call()
