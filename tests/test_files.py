"""A pruned model survives its file to the bit, and nothing in the file can run."""

import copy
import json
import os
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

import pruneutils as pu


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


def test_the_masks_of_the_file_replace_those_of_the_model(tmp_path):
    model, other = trained(0.5)[0], trained(0.9)[0]
    assert_same(pu.load(pu.save(model, tmp_path / "m"), other), model)
    assert_same(pu.load(pu.save(dense := Net(), tmp_path / "dense"), other), dense)


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
def test_a_wrong_class_is_refused_by_tensor_and_not_changed(tmp_path, other, message):
    refused(pu.save(trained()[0], tmp_path / "m"), other(), message)


def test_foreign_and_broken_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "foreign")
    (tmp_path / "garbage").write_bytes(b"garbage" * 10)
    whole = pu.save(trained()[0], tmp_path / "m").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-100])
    for name, message in (("foreign", "not written by pu.save"), ("garbage", "garbage"), ("cut", "cut")):
        with pytest.raises(ValueError, match=message):
            pu.load(tmp_path / name, Net())
    with pytest.raises(FileNotFoundError):
        pu.load(tmp_path / "none", Net())


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda model: torch.compile(nn.DataParallel(model))])
def test_wrapped_models_and_plain_ones_load_each_other(tmp_path, wrap):
    model, create = pu.models.create("lenet5", seed=3).half(), pu.models.create
    pu.prune_filters(model, ratio=0.5, example_inputs=torch.randn(2, 1, 28, 28).half())
    pu.prune(model, "magnitude", 0.5)
    plain, wrapped = pu.save(model, tmp_path / "plain", seed=1), pu.save(wrap(model), tmp_path / "wrapped", seed=1)
    assert_same(pu.load(wrapped), model)
    assert_same(pu.load(wrapped, create("lenet5").half()), model)
    for path in (plain, wrapped):
        other = create("lenet5").half()
        assert pu.load(path, wrap(other)).facts == {"seed": 1}
        assert_same(other, model)
    average = AveragedModel(model)  # holds a number of its own
    average.update_parameters(model)
    assert_same(pu.load(pu.save(average, tmp_path / "average"), AveragedModel(model)), average)


def test_attributes_of_the_same_names_do_no_harm(tmp_path):
    model, other = Net(), Net()
    model.recipe, model.removed, model.facts = "cake", {"stains": 3}, nn.Linear(2, 2)
    other.facts = nn.Linear(2, 2)
    pu.prune(model, "random", 0.5)
    back = pu.load(pu.save(model, tmp_path / "m", seed=1), other)
    assert_same(back, model)
    assert back.facts is other.facts and not hasattr(back, "removed")


def test_two_masked_weights_on_one_storage_come_back(tmp_path):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = nn.Parameter(model[0].weight.data)
    masks = {name: torch.rand(6, 6) < 0.5 for name in ("0.weight", "1.weight")}
    pu.set_masks(model, masks)
    back = pu.load(pu.save(model, tmp_path / "m"), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    assert_same(back, model)
    assert all(torch.equal(pu.get_masks(back)[name], mask) for name, mask in masks.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: pu.make_permanent(layer).to("meta"), "weight is on the meta device"),
        (lambda layer: layer.to(torch.complex128), "weight holds torch.complex128"),
        (lambda layer: layer.register_buffer("a", torch.ones(2, 2).to_sparse()), "a is stored as torch.sparse_coo"),
        (lambda layer: layer.register_buffer("weight#kept", torch.ones(2)), "weight#kept: .* the mask of weight"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_the_format_does_not_know_is_named_before_anything_is_written(tmp_path, change, message):
    layer = nn.Linear(4, 4)
    pu.set_masks(layer, {"weight": torch.eye(4)})
    change(layer)
    with pytest.raises(ValueError, match=f"^{message}"):
        pu.save(layer, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_overflow_in_the_model_are_refused(tmp_path):
    model = nn.Linear(3, 2).double()
    path = pu.save(model, tmp_path / "small")
    assert torch.equal(pu.load(path, nn.Linear(3, 2).half()).weight, model.weight.half())
    model.weight.data[0, 0] = 1e5
    refused(pu.save(model, tmp_path / "m"), nn.Linear(3, 2).half(), "weight has numbers too large for torch.float16")


def test_a_link_stays_and_the_file_that_it_names_is_written(tmp_path):
    (tmp_path / "link").symlink_to("file")
    pu.save(model := Net(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same(pu.load(tmp_path / "file", Net()), model)


def test_without_a_recipe_a_model_is_needed_and_with_one_it_is_not(tmp_path):
    path = pu.save(layer := nn.BatchNorm1d(3), tmp_path / "m")  # with nothing to prune
    assert_same(pu.load(path, nn.BatchNorm1d(3)), layer)
    with pytest.raises(ValueError, match="no recipe"):
        pu.load(path)
    for name in ("vgg11_bn", "timm/vit_tiny_patch16_224", "torchvision/mobilenet_v3_small"):
        model = pu.models.create(name, num_classes=3, seed=2)
        pu.prune(model, "magnitude", 0.9)
        assert_same(pu.load(pu.save(model, tmp_path / "m")), model)


@pytest.mark.parametrize("value", [Net, torch.tensor(0.5), {1, 2}, [1, object()]])
def test_facts_that_are_not_json_are_named_before_anything_is_written(tmp_path, value):
    with pytest.raises(TypeError, match="the fact 'accuracy' is .* and no JSON value"):
        pu.save(Net(), tmp_path / "m", seed=1, accuracy=value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_what_its_masks_say_is_not_saved(tmp_path):
    model, _ = trained()
    with torch.no_grad():
        model.fc.weight[0] = 1
    with pytest.raises(ValueError, match="fc: .* pruned weights are not zero"):
        pu.save(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def language_model(tied=True):
    """An embedding that may be the decoder too."""
    model = nn.ModuleDict({"embedding": nn.Embedding(50, 8), "decoder": nn.Linear(8, 50, bias=False)})
    if tied:
        model["decoder"].weight = model["embedding"].weight
    return model


def test_tied_weights_are_stored_once(tmp_path):
    model = language_model()
    path = pu.save(model, tmp_path / "m")
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["embedding.weight"]
    assert_same(pu.load(path, language_model()), model)
    pu.prune(model, "magnitude", 0.5)
    path = pu.save(model, tmp_path / "m")
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["decoder.weight#kept", "decoder.weight#mask"]
    for tied in (True, False):
        back = pu.load(path, language_model(tied))
        assert_same(back, model)
        assert (back["embedding"].weight is back["decoder"].weight) == tied


def test_two_values_for_one_tied_tensor_are_refused(tmp_path):
    path = pu.save(language_model(tied=False), tmp_path / "m")
    refused(path, language_model(), "one tensor in the model, and two in the file")


def test_a_network_that_lost_filters_comes_back(tmp_path):
    x = torch.randn(2, 1, 28, 28)
    model = pu.prune_filters(pu.models.create("lenet5", seed=3), ratio=0.5, example_inputs=x)
    pu.prune(model, "magnitude", 0.5)
    path = pu.save(model, tmp_path / "m")
    for target in (None, pu.models.create("lenet5")):
        back = pu.load(path, target)
        assert_same(back, model)
        assert torch.equal(back(x), model(x)) and back.removed == model.removed
        assert target in (None, back)
    assert_same(pu.load(path, back), model)  # one that has lost the same filters already
    refused(path, pu.models.create("lenet5", num_classes=7), "fc2.weight has shape|fc2.bias has shape")


# Files from strangers


def version_1(tensors, shapes, facts="{}", recipe="null", **more):
    """What the first version has written, which has no checksum, so that one can write it by hand."""
    texts = {"format": "pruneutils", "shapes": json.dumps(shapes), "facts": facts, "recipe": recipe}
    return serialize(tensors, texts | more)


def test_files_of_the_first_version_are_read(tmp_path):
    bits, kept = torch.tensor([0b10010000], dtype=torch.uint8), torch.tensor([1.0, 2.0])
    tensors = {"weight#mask": bits, "weight#kept": kept, "bias": torch.tensor([3.0, 4.0])}
    (tmp_path / "m").write_bytes(version_1(tensors, {"weight": [2, 3]}, facts='{"seed": 1}'))
    model = pu.load(tmp_path / "m", nn.Linear(3, 2))
    assert model.weight.tolist() == [[1, 0, 0], [2, 0, 0]] and model.facts == {"seed": 1}
    assert pu.get_masks(model)["weight"].tolist() == [[True, False, False], [True, False, False]]


def test_files_of_a_later_version_are_refused(tmp_path):
    (tmp_path / "m").write_bytes(version_1({"a": torch.ones(1)}, {}, version="3"))
    with pytest.raises(ValueError, match="version '3'"):
        pu.load(tmp_path / "m", Net())


BITS, KEPT = torch.tensor([0b10010000], dtype=torch.uint8), torch.ones(2)


@pytest.mark.parametrize(
    ("tensors", "shape"),
    [
        ({"weight#mask": BITS, "weight#kept": KEPT[:1]}, [2, 3]),  # fewer values than ones
        ({"weight#mask": BITS | 1, "weight#kept": KEPT}, [2, 3]),  # a one behind the end
        ({"weight#mask": BITS, "weight#kept": KEPT}, [10**5, 3 * 10**5]),
        ({"weight#mask": BITS.int(), "weight#kept": KEPT}, [2, 3]),
        ({"weight#mask": BITS}, [2, 3]),
        ({"weight": torch.ones(2, 3)}, [2, 3]),
        ({"weight#mask": BITS, "weight#kept": KEPT}, [2, -3]),
        ({"weight": KEPT.clone(), "weight#mask": BITS, "weight#kept": KEPT}, [2, 3]),
        ({"weight#mask": BITS, "weight#kept": KEPT.int()}, [2, 3]),
    ],
)
def test_masks_that_do_not_fit_their_weights_are_refused(tmp_path, tensors, shape):
    (tmp_path / "m").write_bytes(version_1(tensors | {"bias": torch.zeros(2)}, {"weight": shape}))
    refused(tmp_path / "m", nn.Linear(3, 2), "m: ")


@pytest.mark.parametrize("name", ["shapes", "facts", "recipe"])
@pytest.mark.parametrize("text", ["", "{", "[]", "7", "[" * 100_000, None])
def test_texts_that_are_no_json_or_missing_are_refused(tmp_path, name, text):
    texts = {"format": "pruneutils", "shapes": "{}", "facts": "{}", "recipe": "null"} | {name: text}
    texts = {key: value for key, value in texts.items() if value is not None}
    (tmp_path / "m").write_bytes(serialize({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, texts))
    refused(tmp_path / "m", nn.Linear(3, 2), "m: ")


def refused(path, model, message):
    """The file is refused with ValueError, and the model stays as it was, masks and all."""
    pu.prune(model, "random", 0.5)
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        pu.load(path, model)
    assert_same(model, twin)
    assert not hasattr(model, "facts")


HOSTILE = [
    {"name": "lenet300", "num_classes": 20_000_000},
    {"name": "vgg16", "in_channels": 10**6},
    {"name": "timm/vit_tiny_patch16_224", "depth": 900_000},
    {"name": "timm/resnet18", "layers": [900_000, 2, 2, 2]},
    {"name": "timm/swin_tiny_patch4_window7_224", "img_size": 900_000},
    {"name": "torchvision/resnet18", "width_per_group": 900_000},
    {"name": "lenet300", "pretrained": True},
    {"name": "lenet300", "seed": 10**400},
    {"name": "lenet300", "num_classes": "10"},
    {"name": "../../etc/passwd"},
    {"name": ["lenet300"]},
    {},
]


@pytest.mark.parametrize("recipe", HOSTILE, ids=lambda recipe: json.dumps(recipe)[:60])
def test_a_hostile_recipe_is_refused_before_it_takes_memory(tmp_path, recipe):
    tracer = _Largest()
    (tmp_path / "m").write_bytes(version_1({"a": torch.ones(5)}, {}, recipe=json.dumps(recipe)))
    with pytest.raises(ValueError, match="m: "), tracer:
        pu.load(tmp_path / "m")
    assert tracer.n_entries <= 20_000_000


class _Largest(TorchDispatchMode):
    """The largest tensor that is made inside."""

    n_entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if torch.is_tensor(result) and result.device.type != "meta":
            self.n_entries = max(self.n_entries, result.numel())
        return result


# Damaged files: each either is refused or loads what was saved


def test_every_single_flipped_bit_is_noticed(tmp_path):
    model, other = (nn.Sequential(nn.Linear(12, 9), nn.BatchNorm1d(9), nn.Linear(9, 3)) for _ in range(2))
    pu.prune(model, "random", 0.5)
    path = pu.save(model, tmp_path / "m", accuracy=0.5, note="n")
    content = path.read_bytes()
    for position in range(0, len(content), 1 + len(content) // 400):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        loaded = copy.deepcopy(other)
        try:
            pu.load(path, loaded)
        except ValueError:
            assert_same(loaded, other)
        else:
            assert_same(loaded, model)
            assert loaded.facts == {"accuracy": 0.5, "note": "n"}


# Writing


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, where):
    path = pu.save(trained()[0], tmp_path / "m")
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, where, fail)
    with pytest.raises(OSError, match="disk full"):
        pu.save(Net(), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m"]
