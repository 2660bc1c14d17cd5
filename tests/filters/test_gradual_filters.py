"""Filters removed while training: the stages, their learning rates, the optimizer that goes through them."""

import copy

import pytest
import torch

import pruneutils as pu
from pruneutils._torch import derive_seed


def data(n=60):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, 1, 28, 28, generator=generator), torch.arange(n) % 10


class Recording(torch.optim.SGD):
    """Remembers at every step its learning rate, the parameters it holds, and whether they have momentum."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.01, momentum=0.9)
        self.steps = []

    def step(self, closure=None):
        group = self.param_groups[0]
        held = [id(p) for p in group["params"]]
        with_momentum = sum("momentum_buffer" in self.state.get(p, {}) for p in group["params"])
        self.steps.append((group["lr"], held, with_momentum))
        return super().step(closure)


@pytest.mark.parametrize("preserve_momentum", [True, False])
def test_stages_rates_and_the_optimizer(preserve_momentum):
    model, made = pu.models.create("lenet5"), []

    def optimizer(parameters):
        made.append(Recording(parameters))
        return made[-1]

    options = dict(ratio=0.6, rounds=3, epochs=4, warmup_epochs=1, epochs_each=2, batch_size=20, optimizer=optimizer)
    options |= dict(lr_prune=0.001, lr_schedule="step", preserve_momentum=preserve_momentum)
    table = pu.filters.gradual_filters(model, data(), data(20), "l1", **options)
    assert table.epoch.tolist() == list(range(1, 12))
    assert table.stage.tolist() == ["warm-up"] + ["pruning"] * 6 + ["final"] * 4
    assert table["round"].tolist() == [1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3]
    sizes = table.parameters.tolist()
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    assert sizes[-1] == sum(p.numel() for p in model.parameters())
    assert table.test_accuracy.notna().all()
    steps = made[-1].steps  # the first was made to check the arguments
    rates = [0.01] * 3 + [0.001] * 18 + [0.01] * 6 + [0.001] * 3 + [0.0001] * 3
    assert [rate for rate, *_ in steps] == pytest.approx(rates)
    assert steps[-1][1] == [id(p) for p in model.parameters()]
    assert made[-1].param_groups[0]["lr"] == 0.01
    after_a_removal = [steps[k][2] for k in (9, 15, 21)]
    assert after_a_removal == ([8] * 3 if preserve_momentum else [0] * 3)
    assert sum(pu.filters.filter_table(model)["after"]) == 228


def test_it_equals_the_steps_by_hand():
    first = pu.models.create("lenet5")
    model, by_hand = copy.deepcopy(first), copy.deepcopy(first)
    pu.filters.gradual_filters(
        model, data(), criterion="l1", ratio=[0.3, 0.5], epochs=1, lr=0.01, lr_schedule="constant"
    )
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    for stage, ratio in enumerate([0.3, 2 / 7, 0]):
        pu.fit(by_hand, data(), epochs=1, optimizer=optimizer, seed=derive_seed(0, stage))
        if ratio:
            pu.prune_filters(by_hand, "l1", ratio, data()[0], optimizer=optimizer, preserve_momentum=False)
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
        (dict(epochs=0), ValueError, "epochs"),
        (dict(warmup_epochs=-1), ValueError, "warmup_epochs"),
        (dict(criterion="mag"), ValueError, "unknown criterion"),
        (dict(criterion="l1", options={"T": 3}), TypeError, "no option T"),
        (dict(exclude="conv7"), ValueError, "conv7"),
        (dict(lr_schedule="coseno"), ValueError, "lr_schedule"),
    ],
)
def test_wrong_arguments_come_before_the_training(arguments, error, message):
    model = pu.models.create("lenet5")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        pu.filters.gradual_filters(model, data(), **arguments)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
