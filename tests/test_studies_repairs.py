"""The studies of repaired networks and of removed filters: what their runs record, and what is made of it."""

import json

import pandas as pd
import pytest
import torch

import pruneutils as pu
from pruneutils import studies


@pytest.fixture(scope="module")
def digits():
    train, test = pu.data.load("digits")
    model = studies.residual_network("basic", blocks=1, stages=2, width=8, channels=1, stem=4)
    pu.fit(model, train.subset(1000), None, 2, "adam", lr=5e-3)
    return model, train.subset(600), test.subset(300)


@pytest.mark.parametrize("repair", studies.REPAIRS)
def test_a_repaired_network_is_tested_on_other_images_than_those_that_repair(digits, repair):
    model, _, images = digits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"calibration": 100, "tested": 150}
    rows = studies.prune_and_repair(model, images, "weights, global", repair, [0.3, 0.6], 1, **options)
    assert [(row["asked"], row["state"]) for row in rows] == [
        (ratio, state) for ratio in (0.3, 0.6) for state in studies.REPAIRS[repair]
    ]
    shown = torch.randperm(300, generator=torch.Generator().manual_seed(1))[:100]
    for row in rows:
        assert len(row["hits"]) == 300 and abs(row["weights_gone"] - row["asked"]) < 1e-3
        tested = [mark for mark in row["hits"] if mark != "-"]
        assert len(tested) == (300 if repair == "none" else 150)
        assert tested.count("1") / len(tested) == pytest.approx(row["accuracy"])
        assert repair == "none" or all(row["hits"][i] == "-" for i in shown)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_dense_network_as_it_is_has_its_accuracy(digits):
    model, _, images = digits
    (row,) = studies.prune_and_repair(model, images, "dense", "none", [0.5])
    assert row["accuracy"] == pytest.approx(pu.accuracy(model, images)) and row["weights_gone"] == 0
    hits = studies.hits_of(model, images)
    assert "".join("01"[hit] for hit in hits.int()) == row["hits"]


def runs(network, arm, asked, state, *hits):
    facts = {"network": network, "arm": arm, "asked": asked, "state": state}
    return [facts | {"seed": seed, "hits": text} for seed, text in enumerate(hits)]


def test_images_that_several_choices_have_tested_count_once():
    rows = runs("a", "dense", 0.0, "plain", "1110") + runs("a", "weights, global", 0.5, "recalibrated", "-100", "11-0")
    images = studies.hits_by_image(pd.DataFrame(rows))
    repaired = images[images.state == "recalibrated"]
    assert repaired.image.tolist() == [0, 1, 2, 3]
    assert repaired.hit.tolist() == [1, 1, 0, 0]


def test_sizes_and_states_are_compared_image_by_image():
    rows = runs("small", "dense", 0.0, "plain", "1" * 40) + runs("large", "dense", 0.0, "plain", "1" * 40)
    rows += runs("small", "weights, global", 0.5, "plain", "1" * 10 + "0" * 30)
    rows += runs("large", "weights, global", 0.5, "plain", "1" * 30 + "0" * 10)
    rows += runs("small", "weights, global", 0.7, "plain", "0" * 40) + runs(
        "large", "weights, global", 0.7, "plain", "1" * 40
    )
    rows += runs("small", "weights, global", 0.5, "recalibrated", "1" * 20 + "0" * 10 + "-" * 10)
    images = studies.hits_by_image(pd.DataFrame(rows))
    (row,) = studies.compare_sizes(images, [("small", "large")]).itertuples()  # at 70 % the small one is at chance
    assert (row.asked, row.n, row.difference, row.larger) == (0.5, 40, pytest.approx(0.5), "small")
    (row,) = studies.compare_states(images, "recalibrated").itertuples()
    assert (row.n, row.difference) == (30, pytest.approx(1 / 3))
    told = studies.tell_sizes(images, ("small", "large"), 0.5)
    assert "minus that of large is +50.0 points" in told and "so small is less robust" in told
    assert "near chance" in studies.tell_sizes(images, ("small", "large"), 0.7)
    assert "recalibrated +33.3 points" in studies.tell_repairs(images, "small")
    counted = studies.count_verdicts(studies.compare_sizes(images, [("small", "large")]))
    assert counted == "the smaller network loses more in 1 of 1 comparisons, the larger one in 0, and 0 are open"


def test_losses_are_counted_from_the_dense_networks_that_are_asked_for():
    """The small network loses 10 of 40 images by the repair alone, which is no fault of the pruning."""
    rows = [run for name in ("small", "large") for run in runs(name, "dense", 0.0, "plain", "1" * 40)]
    rows += runs("small", "dense", 0.0, "recalibrated", "0" * 10 + "1" * 30)
    rows += runs("large", "dense", 0.0, "recalibrated", "1" * 40)
    for name, lost in (("small", 20), ("large", 10)):
        rows += runs(name, "weights, global", 0.5, "recalibrated", "0" * lost + "1" * (40 - lost))
    images, pair = studies.hits_by_image(pd.DataFrame(rows)), [("small", "large")]
    assert studies.compare_sizes(images, pair, "recalibrated").difference.tolist() == [pytest.approx(0.25)]
    assert studies.compare_sizes(images, pair, "recalibrated", "recalibrated").difference.tolist() == [0]


def unique(grid):
    return len({json.dumps(config, sort_keys=True) for config in grid}) == len(grid)


def test_grids_hold_each_run_once():
    assert unique(studies.pretrained_grid(range(5), [0.1, 0.5], [0.5]))
    assert unique(studies.filters_grid(range(5), [0.5, 0.3]))
    grid = studies.prune_adapted_grid(range(5))
    assert unique(grid) and {config["seed"] for config in grid[:10]} == {0}
    at_90 = {(config["design"], config["prunings"]) for config in grid if config["target"] == 0.9}
    assert len(at_90) == 9  # each arm but dense
    scratch = studies.from_scratch_grid(range(5), device="cuda")
    assert unique(scratch) and all(config["device"] == "cuda" for config in scratch)
    densities = {round(1 - 10 ** -config["compression"], 4) for config in scratch if config["method"] != "dense"}
    assert densities == set(studies.FRANKLE)
    assert unique(studies.from_scratch_filters_grid(range(5)))


def test_measures_are_compared_at_equal_work(digits):
    model, train, test = digits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for importance in ("random", "fisher", "biased_loss_tracked"):
        rows = studies.remove_and_repair(model, train, test, importance, 0.4, samples=64, steps=2)
        assert [row["state"] for row in rows] == ["removed", "recalibrated", "fine-tuned"]
        assert all(abs(row["macs_left"] - 0.6) < 0.05 and row["gradient_norm"] > 0 for row in rows)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_round_trains_as_long_as_many(digits):
    model, train, test = digits
    settings = {"pruning_epochs": 2, "epochs": 1, "steps": 2}
    for rounds in (1, 2):
        rows = studies.remove_in_rounds(model, train, test, "l1", 0.4, rounds, **settings)
        assert [row["stage"] for row in rows] == ["pruning", "pruning", "final"]
    with pytest.raises(ValueError, match="rounds=2 does not divide pruning_epochs=5"):
        studies.remove_in_rounds(model, train, test, "l1", 0.4, 2)


def test_a_measure_is_told_from_random_only_with_five_seeds():
    gains = {"random": 0.0, "l1": 0.1, "grasp": -0.1}
    frame = pd.DataFrame(
        {"importance": name, "seed": seed, "ratio": 0.5, "of": "macs", "state": "fine-tuned", "gradient_norm": 1 + gain,
         "accuracy": 0.5 + gain * (1 + seed / 100)}
        for name, gain in gains.items() for seed in range(5)
    )  # fmt: skip
    told = studies.tell_filters(frame, 0.5, "macs")
    assert (
        "the highest mean is that of `l1`" in told
        and "1 of 2 measures beat random removal: `l1` (+10" in told
        and "Worse than random: `grasp`" in told
    )
    assert "no verdict" in studies.tell_filters(frame[frame.seed < 3], 0.5, "macs")
    assert "between +1.00 and +1.00" in studies.tell_flow(frame, 0.5, "macs")


def test_rounds_are_told_with_their_intervals_and_only_with_enough_seeds():
    rows = [
        {"importance": name, "rounds": n, "seed": seed, "epoch": epoch, "accuracy": 0.5 + gain * n * (1 + seed / 50)}
        for name, gain in {"l1": 0.01, "bn": 0.0}.items() for n in (1, 5) for seed in range(5) for epoch in (1, 2)
    ]  # fmt: skip
    frame = pd.DataFrame(rows).assign(accuracy=lambda f: f.accuracy + 0.2 * (f.epoch == 1))  # the last epoch counts
    told = studies.tell_rounds(frame)
    assert "after 5 rounds of removal minus that after 1" in told and "by `l1` +4.2 points [" in told
    assert "by `bn` +0.0 points [+0.0, +0.0], which is open" in told
    assert "no verdict" in studies.tell_rounds(frame[frame.seed < 4]) and "0 of 5" in studies.tell_rounds(frame[:0])


def finals(*arms, seeds=range(5)):
    """The last epoch of runs: (design, prunings, target, accuracy), a little more of it with each seed."""
    rows = [(*arm, seed) for arm in arms for seed in seeds]
    frame = pd.DataFrame(rows, columns=["design", "prunings", "target", "test_accuracy", "seed"])
    frame = frame.assign(test_accuracy=frame.test_accuracy + frame.seed * frame.prunings.add(1) / 1e4, epoch=8)
    return studies.last_epochs(frame.assign(status="done"))


def test_what_survives_each_design_is_told():
    arms = [("restarts", 1, 0.9, 0.80), ("restarts", 8, 0.9, 0.78), ("recovery", 1, 0.9, 0.70), ("ramp", 0, 0.9, 0.81)]
    final = finals(*arms, ("dense", 0, 0.0, 0.9))
    found = studies.gradual_against_instant(final).set_index("equal").difference.round(2)
    assert found.to_dict() == {"equal total": -0.02, "equal recovery": 0.11, studies.OWN_WAY: 0.01}
    told = studies.tell_gradual(final.assign(data="digits", precision="float32", run_device="cpu"))
    assert "- *equal total:* instant is better at 90 % (-" in told
    assert "one pruning before the first epoch):* gradual is better at 90 % (+" in told
    assert told.endswith("**What survives all comparisons:** nothing.") and studies.surviving(final) == "nothing"
    found = studies.prunings_against_one(final).set_index(["equal", "a"]).difference.round(2)
    expected = {("equal total", "8 prunings"): -0.02, ("equal recovery", "ramp"): 0.11, (studies.OWN_WAY, "ramp"): 0.01}
    assert found.to_dict() == expected


def test_an_arm_that_lacks_a_seed_is_not_compared():
    final = finals(("restarts", 1, 0.9, 0.8), ("restarts", 8, 0.9, 0.78), ("restarts", 1, 0.5, 0.9))
    late = finals(("restarts", 8, 0.5, 0.91), seeds=range(4))
    found = studies.gradual_against_instant(pd.concat([final, late], ignore_index=True))
    assert found.sparsity.tolist() == [0.9]


def test_courses_are_those_that_training_takes():
    courses = studies.courses([1, 2, 0], 0.75, 8, points=9)
    steps = {key: rows.sparsity.round(2).tolist() for key, rows in courses.groupby(["equal", "arm"])}
    assert steps["equal total", "1 pruning"] == [0.75] * 9
    assert steps["equal total", "2 prunings"] == [0.5] * 4 + [0.75] * 5
    assert steps["equal recovery", "1 pruning"] == [0.0] * 4 + [0.75] * 5
    assert steps["equal recovery", "2 prunings"] == [0.0] * 2 + [0.5] * 2 + [0.75] * 5
    assert steps["equal recovery", "ramp"] == [0.0, 0.43, 0.66, 0.74] + [0.75] * 5  # 1 - (1 - t)^3, t over half the way
    stepped = studies.courses([0], 0.75, 8, points=9, every=2).sparsity.round(2).tolist()
    assert stepped == [0.0, 0.0, 0.66, 0.66] + [0.75] * 5
    rates = courses[courses.arm == "2 prunings"].groupby("equal")["learning rate"].apply(list)
    assert rates["equal total"][0] == rates["equal total"][4] == 1 and rates["equal recovery"][4] == 0.5
