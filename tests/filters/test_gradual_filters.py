"""Filters removed while training: the stages, their learning rates, the optimizer that goes through them."""

import copy

import pytest
import torch

import pruneutils as pu
from pruneutils._torch import derive_seed


def data(n=60):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, 1, 28, 28, generator=generator), torch.arange(n) % 10


def test_stages_rates_and_the_optimizer():
    model, made = pu.models.create("lenet5"), []

    def optimizer(parameters):
        made.append(torch.optim.SGD(parameters, lr=0.01, momentum=0.9))
        return made[-1]

    options = dict(ratio=0.6, rounds=3, epochs=4, warmup_epochs=1, epochs_each=2, batch_size=20, optimizer=optimizer)
    table = pu.filters.gradual_filters(model, data(), data(20), "l1", **options, lr_prune=0.001, lr_schedule="step")
    assert table.epoch.tolist() == list(range(1, 12))
    assert table.stage.tolist() == ["warm-up"] + ["pruning"] * 6 + ["final"] * 4
    assert table["round"].tolist() == [1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3]
    assert table.lr.tolist() == pytest.approx([0.01] + [0.001] * 6 + [0.01] * 2 + [0.001, 0.0001])
    sizes = table.parameters.tolist()
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4 and table.test_accuracy.notna().all()
    assert sizes[-1] == sum(p.numel() for p in model.parameters())
    (group,) = made[-1].param_groups  # the first was made to check the arguments
    assert group["lr"] == 0.01 and all(p is q for p, q in zip(group["params"], model.parameters(), strict=True))
    assert sum(pu.filters.filter_table(model)["after"]) == 228


@pytest.mark.parametrize("preserve_momentum", [True, False])
def test_it_equals_the_steps_by_hand(preserve_momentum):
    model, keep = pu.models.create("lenet5"), dict(preserve_momentum=preserve_momentum)
    by_hand = copy.deepcopy(model)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    options = dict(ratio=[0.3, 0.5], epochs=1, lr=0.01, lr_schedule="constant")
    pu.filters.gradual_filters(model, data(), criterion="l1", **options, **keep)
    for stage, ratio in enumerate([0.3, 2 / 7, 0]):
        pu.fit(by_hand, data(), epochs=1, optimizer=optimizer, seed=derive_seed(0, stage))
        if ratio:
            pu.prune_filters(by_hand, "l1", ratio, data()[0], optimizer=optimizer, **keep)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), by_hand.parameters(), strict=True))


@pytest.mark.parametrize("criterion", ["tfo", "biased_loss_tracked"])
def test_measures_get_training_data_or_follow_the_training(criterion):
    model = pu.models.create("lenet5")
    options = {"alpha": 0.5} if criterion == "biased_loss_tracked" else {"temperature": 1.0, "n_samples": 30}
    pu.filters.gradual_filters(
        model, data(), criterion=criterion, ratio=0.5, rounds=2, epochs=1, lr=0.01, options=options
    )
    assert sum(pu.filters.filter_table(model)["after"]) == 285


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(ratio=1.0), ValueError, "at most"),
        (dict(warmup_epochs=-1), ValueError, "warmup_epochs"),
        (dict(criterion="l1", options={"T": 3}), TypeError, "no option T"),
        (dict(lr_schedule="coseno"), ValueError, "lr_schedule"),
    ],
)
def test_wrong_arguments_come_before_the_training(arguments, error, message):
    model = pu.models.create("lenet5")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        pu.filters.gradual_filters(model, data(), **arguments)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
