"""The papers' networks, and any timm or torchvision model by name."""

import difflib
import pickle
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from pruneutils import _torchvision

# arguments of timm and torchvision that load weights from elsewhere: no recipe from a file may hold one
FETCHING = frozenset(
    ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "weights")
)


def create(name, num_classes=10, seed=0, **kwargs):
    """Return a freshly initialised model on the CPU; the same seed gives the same weights, bit for bit.

    `name` is one of `list_models()`, or "timm/<name>" or "torchvision/<name>" for any classifier of those libraries.
    Further arguments go to the model: this module's take `in_channels` (default 1 for "fc", "lenet300" and "lenet5", 3
    for the others) and those three `image_size` (default 28); timm's and torchvision's take what these libraries
    document, such as `in_chans`. Nothing is downloaded unless an argument asks for pretrained weights, and the global
    random state is not touched. `model.recipe` holds these arguments, so that create(**model.recipe) builds the same
    architecture, without anything pretrained. ValueError for an unknown name (with the nearest known ones) or fewer
    than one class.
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes must be a whole number of at least 1, got {num_classes!r}")
    build = _builder(name)
    # torch.manual_seed would also seed the GPUs, whose state fork_rng would then have to keep: seed the CPU's alone
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        model = build(num_classes=num_classes, **kwargs)
    plain = {key: value for key, value in kwargs.items() if key not in FETCHING}
    model.recipe = {"name": name, "num_classes": num_classes, "seed": seed, **plain}
    return model


def list_models():
    """Return the names of this module's models; "timm/<name>" and "torchvision/<name>" are known besides."""
    return list(_BUILDERS)


def load_weights(model, path):
    """Load a torch checkpoint of plain tensors into `model` and return it; nothing in the file can run code.

    The file holds a state_dict, alone or under the key "state_dict"; a "module." prefix from DataParallel is dropped.
    ValueError names missing and unexpected keys and differing shapes; the model is changed only if everything fits.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is not a checkpoint of plain tensors, so it is not loaded") from error
    if isinstance(found, dict):
        found = found.get("state_dict", found)
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no state_dict (a dict of names and tensors)")
    found = {key.removeprefix("module."): value for key, value in found.items()}
    wanted = model.state_dict()
    # batch norm of torch before 0.4.1 did not count batches; torch fills the counter in
    missing = [key for key in wanted if key not in found and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in found if key not in wanted]
    shapes = [
        f"{key}: {tuple(value.shape)} in the file, {tuple(wanted[key].shape)} in the model"
        for key, value in found.items()
        if key in wanted and value.shape != wanted[key].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    told = [f"{what}: {_shorten(keys)}" for what, keys in problems.items() if keys]
    if told:
        raise ValueError(f"{path} does not fit this {type(model).__name__}; keys {'; keys '.join(told)}")
    model.load_state_dict(found)
    return model


def _shorten(keys, most=6):
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


def _builder(name):
    library, _, inner = name.rpartition("/") if isinstance(name, str) else ("", "", name)
    if library == "timm":
        _torchvision.load()
        import timm

        # the part after a dot names pretrained weights, not another model
        if not timm.is_model(inner.split(".")[0]):
            raise _unknown(name, [f"timm/{known}" for known in timm.list_models()])
        return partial(timm.create_model, inner)
    if library == "torchvision":
        models = _torchvision.load().models
        known = models.list_models(module=models)  # the classifiers; the others fetch a pretrained backbone unasked
        if inner not in known:
            raise _unknown(name, [f"torchvision/{model}" for model in known])
        return partial(models.get_model, inner)
    if name not in _BUILDERS:
        raise _unknown(name, list_models())
    return _BUILDERS[name]


def _unknown(name, known):
    nearest = difflib.get_close_matches(str(name).lower(), known, n=3, cutoff=0.5)
    hint = f"the nearest known: {', '.join(nearest)}" if nearest else f"known: {_shorten(known, most=20)}"
    return ValueError(f'no model named {name!r}; {hint} (also "timm/<name>" and "torchvision/<name>")')


def _kaiming(model):
    """Normal weights with variance 2 / fan_in, no bias (He et al. 2015, eq. 10 and 14)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def _mlp(widths, num_classes, in_channels=1, image_size=28):
    layers = OrderedDict(flatten=nn.Flatten())
    inputs = in_channels * image_size**2
    for number, width in enumerate(widths, start=1):
        layers[f"fc{number}"] = nn.Linear(inputs, width)
        layers[f"relu{number}"] = nn.ReLU()
        inputs = width
    layers[f"fc{len(widths) + 1}"] = nn.Linear(inputs, num_classes)
    return nn.Sequential(layers)


def _lenet5(num_classes, in_channels=1, image_size=28):
    """LeNet-5 as Caffe has it: 20 and 50 filters, 500 hidden units."""
    side = ((image_size - 4) // 2 - 4) // 2
    if side < 1:
        raise ValueError(f"lenet5 needs images of at least 16 pixels a side, got image_size={image_size}")
    layers = OrderedDict(
        conv1=nn.Conv2d(in_channels, 20, 5), relu1=nn.ReLU(), pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(20, 50, 5), relu2=nn.ReLU(), pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(50 * side**2, 500), relu3=nn.ReLU(),
        fc2=nn.Linear(500, num_classes),
    )  # fmt: skip
    return nn.Sequential(layers)


def _classifier(features, width, num_classes):
    """Convolutions, the mean over the image, one linear layer; any image size that survives the poolings."""
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*features),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(width, num_classes),
        )
    )


def _vgg(convolutions, batch_norm, num_classes, in_channels=3):
    """VGG for CIFAR: blocks of 3x3 convolutions with bias, max-pool between the blocks, one linear layer."""
    layers, channels = [], in_channels
    for block, (width, repeats) in enumerate(zip((64, 128, 256, 512, 512), convolutions, strict=True)):
        if block > 0:
            layers.append(nn.MaxPool2d(2))
        for _ in range(repeats):
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU())
            channels = width
    return _kaiming(_classifier(layers, channels, num_classes))


def _mobilenet_v1(num_classes, in_channels=3):
    """MobileNet-V1 for CIFAR: a stem of stride 1, then depthwise and pointwise convolutions in turn."""

    def convolution(inputs, outputs, kernel, stride=1, groups=1):
        conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    layers, channels = convolution(in_channels, 32, 3), 32
    widths = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    for width, stride in widths:
        layers += convolution(channels, channels, 3, stride, groups=channels) + convolution(channels, width, 1)
        channels = width
    return _kaiming(_classifier(layers, channels, num_classes))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and an option-A shortcut: every other pixel, new channels zero (He et al. 2016, 4.2)."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.new_channels = outputs - inputs

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride > 1:
            before = self.new_channels // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))
        return F.relu(out + x)


class ResNet(nn.Module):
    """The CIFAR ResNet of 6n+2 layers (He et al. 2016, 4.2), with the parameter names of the public checkpoints."""

    def __init__(self, depth, num_classes, in_channels=3):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(depth, 16, 16, stride=1)
        self.layer2 = self._stage(depth, 16, 32, stride=2)
        self.layer3 = self._stage(depth, 32, 64, stride=2)
        self.linear = nn.Linear(64, num_classes)
        _kaiming(self)

    @staticmethod
    def _stage(depth, inputs, outputs, stride):
        others = [BasicBlock(outputs, outputs, 1) for _ in range((depth - 2) // 6 - 1)]
        return nn.Sequential(BasicBlock(inputs, outputs, stride), *others)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean(dim=(2, 3)))


def _cifar_stem(name, num_classes, in_channels=3):
    """torchvision's ResNet with the stem for small images: 3x3, stride 1, no max-pool."""
    model = _torchvision.load().models.get_model(name, num_classes=num_classes)
    model.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's other layers
    model.maxpool = nn.Identity()
    return model


_VGG = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
_BUILDERS = {
    "fc": partial(_mlp, (100,) * 5),
    "lenet300": partial(_mlp, (300, 100)),
    "lenet5": _lenet5,
    **{name: partial(_vgg, plan, False) for name, plan in _VGG.items()},
    **{f"{name}_bn": partial(_vgg, plan, True) for name, plan in _VGG.items()},
    **{f"resnet{depth}": partial(ResNet, depth) for depth in (20, 32, 44, 56, 110)},
    **{name: partial(_cifar_stem, name) for name in ("resnet18", "resnet34")},
    "mobilenet_v1": _mobilenet_v1,
}
