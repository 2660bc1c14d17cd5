"""A pruned model survives its file to the bit, and nothing in the file can run."""

import copy
import json
import os
import zipfile

import pytest
import torch
from safetensors import safe_open
from torch import nn

import pruneutils as pu
from pruneutils import checkpoints


class Net(nn.Module):
    def __init__(self, width=8, classes=5):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width * 16, classes)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).relu().flatten(1))


def trained(sparsity=0.9):
    model = Net()
    pu.prune(model, "magnitude", sparsity, scope="layer")
    data = torch.randn(32, 1, 6, 6), torch.randint(5, (32,))
    pu.fit(model, data, epochs=2, batch_size=8)
    return model, data


def bits(tensor):
    """The bytes, with all zeros positive: the product of a weight with its mask may be -0.0."""
    return (tensor + 0).contiguous().view(-1).view(torch.uint8)


def assert_same(model, other):
    state, masks = other.state_dict(), pu.get_masks(other)
    assert model.state_dict().keys() == state.keys() and pu.get_masks(model).keys() == masks.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(mask, masks[name]) for name, mask in pu.get_masks(model).items())


def test_weights_buffers_masks_and_facts_come_back_to_the_bit(tmp_path):
    model, data = trained()
    path = pu.save(model, tmp_path / "new" / "m.safetensors", accuracy=0.5, layers=["conv"], note={"seed": 1})
    assert path == tmp_path / "new" / "m.safetensors"
    back = pu.load(path, Net())
    assert_same(back, model)
    assert all(torch.equal(bits(v), bits(model.state_dict()[n])) for n, v in back.state_dict().items())
    assert back.facts == {"accuracy": 0.5, "layers": ["conv"], "note": {"seed": 1}}
    assert torch.equal(back.eval()(data[0]), model.eval()(data[0]))
    pu.fit(back, data, epochs=1)
    assert pu.count(back) == pu.count(model)
    assert int(back.fc.weight.count_nonzero()) <= int(pu.get_masks(model)["fc.weight"].sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_and_layouts_come_back(tmp_path, dtype):
    model = trained()[0].to(dtype).to(memory_format=torch.channels_last)
    assert_same(pu.load(pu.save(model, tmp_path / "m"), Net().to(dtype)), model)


def test_unpruned_and_tied_models_come_back(tmp_path):
    assert_same(pu.load(pu.save(model := Net(), tmp_path / "m"), Net()), model)

    def tied():
        a, b = nn.Linear(6, 6), nn.Linear(6, 6)
        b.weight = a.weight
        return nn.Sequential(a, b)

    model = tied()
    pu.prune(model, "magnitude", 0.5)
    back = pu.load(pu.save(model, tmp_path / "tied"), tied())
    assert_same(back, model)
    assert back[0].weight is back[1].weight


def test_the_masks_of_the_file_replace_those_of_the_model(tmp_path):
    model, other = trained(0.5)[0], trained(0.9)[0]
    assert_same(pu.load(pu.save(model, tmp_path / "m"), other), model)
    assert_same(pu.load(pu.save(dense := Net(), tmp_path / "dense"), other), dense)


def test_a_file_at_90_percent_is_a_bit_per_weight_and_the_kept_values(tmp_path):
    model = nn.Linear(1000, 1000)
    pu.prune(model, "magnitude", 0.9)
    size = pu.save(model, tmp_path / "m").stat().st_size
    expected = 1_000_000 / 8 + 100_000 * 4 + 1000 * 4
    assert expected <= size < expected + 1000


def test_the_file_is_safetensors_with_json_and_no_pickle(tmp_path):
    path = pu.save(trained()[0], tmp_path / "m", seed=1)
    assert not zipfile.is_zipfile(path) and path.read_bytes()[8:9] == b"{"
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "pruneutils" and json.loads(file.metadata()["facts"]) == {"seed": 1}
        assert set(file.keys()) >= {"conv.weight#mask", "conv.weight#kept", "norm.running_mean", "fc.bias"}


@pytest.mark.parametrize(
    "other, message",
    [
        (lambda: Net(width=4), r"has shape \(.*\), in the model \("),
        (lambda: nn.Sequential(Net()), "the (model|file) lacks '.*'"),
        (lambda: nn.ModuleDict({"conv": nn.Conv2d(1, 8, 3), "fc": nn.Linear(128, 5)}), "the model lacks 'norm"),
    ],
)
def test_a_wrong_class_is_told_by_tensor_and_not_changed(tmp_path, other, message):
    path, model = pu.save(trained()[0], tmp_path / "m"), other()
    pu.prune(model, "magnitude", 0.25)
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        pu.load(path, model)
    assert_same(model, twin)
    assert not hasattr(model, "facts")


def test_a_mask_for_what_is_no_layer_is_told_and_nothing_changed(tmp_path):
    path = pu.save(pruned := nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4)}), tmp_path / "m")
    pu.prune(pruned, "magnitude", 0.5)
    path = pu.save(pruned, tmp_path / "m")
    model = nn.ModuleDict({"a": nn.Embedding(4, 4), "b": nn.Linear(4, 4)})
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match="'a.weight'"):
        pu.load(path, model)
    assert_same(model, twin)


def test_foreign_and_broken_files_are_told(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "foreign")
    (tmp_path / "garbage").write_bytes(b"garbage" * 10)
    whole = pu.save(trained()[0], tmp_path / "m").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-100])
    for name, message in (("foreign", "not written by pruneutils"), ("garbage", "garbage"), ("cut", "cut")):
        with pytest.raises(ValueError, match=message):
            pu.load(tmp_path / name, Net())
    with pytest.raises(FileNotFoundError):
        pu.load(tmp_path / "none", Net())


def test_without_a_recipe_a_model_is_needed_and_with_one_it_is_not(tmp_path):
    path = pu.save(trained()[0], tmp_path / "m")
    with pytest.raises(ValueError, match="no recipe"):
        pu.load(path)
    model = pu.models.create("lenet300", seed=3)
    pu.prune(model, "magnitude", 0.9)
    path = pu.save(model, tmp_path / "lenet", accuracy=1)
    assert_same(pu.load(path), model)


def test_facts_that_are_not_json_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError):
        pu.save(Net(), tmp_path / "m", model_class=Net)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["save_file", "replace"])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, where):
    path = pu.save(trained()[0], tmp_path / "m")
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(*((checkpoints, "save_file") if where == "save_file" else (os, "replace")), fail)
    with pytest.raises(OSError, match="disk full"):
        pu.save(Net(), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX")
def test_others_may_read_the_file_as_any_other(tmp_path):
    (tmp_path / "plain").write_text("")
    assert pu.save(Net(), tmp_path / "m").stat().st_mode == (tmp_path / "plain").stat().st_mode
