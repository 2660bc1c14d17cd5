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
    assert repaired.hit.tolist() == [1, 1, 0, 0] and repaired.lost.tolist() == [0, 0, 1, 0]


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


def unique(grid):
    return len({json.dumps(config, sort_keys=True) for config in grid}) == len(grid)


def test_grids_hold_each_run_once():
    assert unique(studies.pretrained_grid(range(5), [0.1, 0.5], [0.5]))
    assert unique(studies.filters_grid(range(5), [0.5, 0.3]))
    grid = studies.prune_adapted_grid(range(5))
    assert unique(grid) and {config["seed"] for config in grid[:10]} == {0}
    at_90 = {(config["design"], config["prunings"]) for config in grid if config["target"] == 0.9}
    assert len(at_90) == 9  # each arm but dense


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
    assert "`l1` is best" in told and "1 of 2 measures beat random" in told and "Worse than random: `grasp`" in told
    assert "no verdict" in studies.tell_filters(frame[frame.seed < 3], 0.5, "macs")
    assert "between +1.00 and +1.00" in studies.tell_flow(frame, 0.5, "macs")
