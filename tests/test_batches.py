"""Batches of every form: as a tokenizer gives them, several inputs, inputs alone; what is padded counts nowhere."""

from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pruneutils as pu
from pruneutils import target

NEED_TARGETS = ("gradient", "snip", "taylor", "fisher", "grasp")
pytestmark = pytest.mark.filterwarnings("ignore::pruneutils.pruning.LeftOutWarning")


class Tokens(nn.Module):
    """Returns an object with logits, as models of transformers do, and calls its layers by keyword."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.norm = nn.Embedding(11, 6), nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.second, self.head = nn.Conv1d(8, 8, 1), nn.Linear(8, 11)

    def forward(self, input_ids, attention_mask=None):
        x = self.norm(input=self.hidden(input=self.embed(input_ids)).mT)
        return SimpleNamespace(logits=self.head(input=self.second(input=x.relu()).mT))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tokens().double()


def texts(side="right"):
    """Three texts padded to one batch, and the same as batches of one text each without padding."""
    tokens = [torch.randint(11, (1, n), generator=torch.Generator().manual_seed(n)) for n in (5, 3, 2)]
    pads = [(0, 5 - each.shape[1])[:: 1 if side == "right" else -1] for each in tokens]
    padded = torch.cat([F.pad(each, pad, value=7) for each, pad in zip(tokens, pads)])
    mask = torch.cat([F.pad(torch.ones_like(each), pad) for each, pad in zip(tokens, pads)])
    return UserDict(input_ids=padded, attention_mask=mask), tokens


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*NEED_TARGETS, "wanda"])
def test_padded_texts_score_as_the_same_texts_one_by_one(model, name, side):
    padded, tokens = texts(side)
    wanted = pu.scores(model, name, [(each, F.pad(each[:, 1:], (0, 1), value=-100)) for each in tokens])
    labelled = {**padded, "labels": padded["input_ids"]}  # labels that repeat the tokens mean the next ones
    alone = [padded, tokens, tokens[:2] + [(tokens[2], None)]] if name == "wanda" else []  # which needs no targets
    one_by_one = iter([{key: value[i : i + 1] for key, value in labelled.items()} for i in range(3)])
    for data in (labelled, one_by_one, *alone):
        for key, score in pu.scores(model, name, data).items():
            torch.testing.assert_close(score, wanted[key], rtol=1e-8, atol=1e-12)
    if name == "wanda":
        found, wanted = pu.scores(model, name, tokens[:2]), pu.scores(model, name, (torch.cat(tokens[:2], 1), None))
        torch.testing.assert_close(found, wanted)  # a list of two is no pair


def test_padding_counts_neither_in_accuracy_nor_in_batch_norm(model):
    padded, tokens = texts()
    right = [model.eval()(each).logits[0, :-1].argmax(1) == each[0, 1:] for each in tokens]
    wanted = torch.cat(right).double().mean().item()
    assert pu.accuracy(model, {**padded, "labels": padded["input_ids"]}) == pytest.approx(wanted)
    labels = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(9))  # which stay where they are
    right = (model(padded["input_ids"]).logits.argmax(2) == labels)[padded["attention_mask"] == 1]
    assert pu.accuracy(model, (padded, labels)) == pytest.approx(right.double().mean().item())
    pu.recalibrate(model, [padded, {key: value[:1, :3] for key, value in padded.items()}])  # of two lengths
    read = model.hidden(model.embed(torch.cat([*tokens, tokens[0][:, :3]], 1)[0]))
    torch.testing.assert_close(model.norm.running_mean, read.mean(0))
    torch.testing.assert_close(model.norm.running_var, read.var(0))


def test_other_calls_take_them_too(model):
    padded, tokens = texts()
    assert pu.cost(model, padded).macs == pu.cost(model, padded["input_ids"]).macs
    torch.testing.assert_close(pu.dead_weights(model, padded), pu.dead_weights(model, padded["input_ids"]))
    assert not [finding for finding in pu.check(model, data=padded) if finding.severity == "error"]
    labelled = {**padded, "labels": padded["input_ids"]}
    assert pu.prune(model, "snip", 0.5, data=labelled, iterations=3).sparsity == 0.5
    assert len(pu.fit(model, [labelled], epochs=1)) == 1


def test_several_inputs_stand_in_a_tuple():
    class Sum(nn.Sequential):
        def forward(self, a, b):
            return super().forward(a + b)

    plain, (a, b), targets = nn.Sequential(nn.Linear(4, 3)), torch.rand(2, 6, 4), torch.arange(6) % 3
    parts = [((a[:2], b[:2]), targets[:2]), ((a[2:], b[2:]), targets[2:])]
    for name in ("fisher", "grasp", "wanda"):
        torch.testing.assert_close(pu.scores(Sum(*plain), name, parts), pu.scores(plain, name, (a + b, targets)))
    assert pu.accuracy(Sum(*plain), ((a, b), targets)) == pu.accuracy(plain, (a + b, targets))
    assert not pu.check(Sum(*plain), data=((a, b), None))


def test_layers_that_a_criterion_cannot_score_are_named(monkeypatch):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.used, self.dead = nn.Embedding(9, 2), nn.Linear(2, 2), nn.Linear(2, 2)
            self.pair = nn.Bilinear(2, 2, 2)

        def forward(self, x):
            x = self.embed(x)
            return self.pair(self.used(x) + self.dead(x[:0]).sum() + torch.ones(2), x)

    monkeypatch.setattr(target, "RULES", dict(target.RULES))
    pu.prunable(nn.Bilinear, "weight")
    pu.prunable(nn.Embedding, "weight")
    names = ["embed", "dead", "pair"]
    for name in names:  # of a dead expert, what no batch has reached
        with pytest.raises(ValueError, match=f"no scores for {name}.weight: .*no batch has reached it.*exclude"):
            pu.scores(Experts(), "wanda", torch.arange(9), exclude=[each for each in names if each != name])
    assert list(pu.scores(Experts(), "wanda", torch.arange(9), exclude=names)) == ["used.weight"]
    inner = nn.Sequential(nn.Linear(2, 2))
    inner.register_forward_pre_hook(lambda _, args: args[0] @ torch.ones(2, 2))
    with pytest.raises(ValueError, match="synflow sends ones in float64 through.*dtype=x.dtype"):
        pu.scores(inner, "synflow", torch.rand(1, 2))
