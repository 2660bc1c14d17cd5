"""A lottery ticket is rewound and trains to the same end."""

import copy

import pytest
import torch
from tiny import assert_same, net, plain_sgd, samples

import pruneutils as pu
from pruneutils.training import lottery


@pytest.mark.parametrize("rewind_step", [0, 4])
def test_a_lottery_ticket_is_rewound_and_trained_on_from_there(rewind_step, monkeypatch):
    model, data, starts, real_fit = net(), samples(), [], lottery.fit
    first = {0: copy.deepcopy(model.state_dict())}
    options = dict(epochs=2, batch_size=8, optimizer=plain_sgd, lr_schedule="cosine")

    def note(model, step, steps):
        if step <= rewind_step and step not in first:
            first[step] = copy.deepcopy(model.state_dict())

    def fit(model, *args, **kwargs):
        starts.append((copy.deepcopy(model.state_dict()), pu.get_masks(model), kwargs.get("start_step", 0)))
        return real_fit(model, *args, **kwargs)

    monkeypatch.setattr(lottery, "fit", fit)
    table = pu.lottery_ticket(model, data, data, 0.8, 3, rewind_step=rewind_step, on_step=note, **options)
    total = pu.count(model).total
    assert table.groupby("round").sparsity.first().tolist() == [
        round(pu.pruning.sparsity_at(i / 3, 0.8) * total) / total for i in range(4)
    ]
    assert len(starts) == 4 and [start for _, _, start in starts] == [0] + [rewind_step] * 3
    for state, masks, _ in starts[1:]:
        for name, value in first[rewind_step].items():
            assert torch.equal(state[name], value * masks[name] if name in masks else value), name
    # the ticket, put on a fresh copy of the snapshot, trains to the same end
    twin = net()
    twin.load_state_dict(first[rewind_step])
    pu.set_masks(twin, pu.get_masks(model))
    pu.fit(twin, data, start_step=rewind_step, **options)
    assert_same(twin, model.state_dict())


def test_a_dense_round_from_the_snapshot_ends_where_the_first_did():
    model, data, ends = net(), samples(), []
    options = dict(epochs=2, batch_size=8, optimizer=plain_sgd)

    def note(model, step, steps):
        if step == steps:
            ends.append(copy.deepcopy(model.state_dict()))

    pu.lottery_ticket(model, data, sparsity=0.0, rounds=2, rewind_step=3, on_step=note, **options)
    assert len(ends) == 3
    assert_same(model, ends[0])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(criterion="snip"), "needs data"),
        (dict(sparsity=1.1), "not 1.1"),
        (dict(rounds=0), "rounds must be a whole number of at least 1, not 0"),
        (dict(exclude=["fc"]), "no prunable layer fits 'fc'"),
        (dict(rewind_step=99), "rewind_step=99 is beyond the end of training"),
    ],
)
def test_lottery_ticket_refuses_before_it_trains(options, message):
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        pu.lottery_ticket(model, samples(), epochs=1, **options)
    assert_same(model, before)
