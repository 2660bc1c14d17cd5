"""The architectures of the papers. To add one is to write a function of `num_classes` and enter it in `NETWORKS`."""

from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .. import _torchvision


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
    features = [nn.Conv2d(in_channels, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU()]
    classifier = [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(50 * side**2, 500), nn.ReLU(), nn.Linear(500, num_classes)]
    names = "conv1 relu1 pool1 conv2 relu2 pool2 flatten fc1 relu3 fc2".split()
    return nn.Sequential(OrderedDict(zip(names, features + classifier)))


def _classifier(features, width, num_classes):
    """Convolutions, the mean over the image, one linear layer; any image size that survives the poolings."""
    pool, flatten, linear = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)
    layers = OrderedDict(features=nn.Sequential(*features), pool=pool, flatten=flatten, linear=linear)
    return _kaiming(nn.Sequential(layers))


def _vgg(convolutions, order, num_classes, in_channels=3):
    """VGG for CIFAR: blocks of 3x3 convolutions, max-pool between the blocks, one linear layer.

    "relu bn" is the order of Lubana and Dick 2021, who leave out the biases and pool after the last block too.
    """
    layers, channels = [], in_channels
    for block, (width, repeats) in enumerate(zip((64, 128, 256, 512, 512), convolutions, strict=True)):
        for _ in range(repeats):
            layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=order != "relu bn"))
            layers += [nn.BatchNorm2d(width) if kind == "bn" else nn.ReLU() for kind in order.split()]
            channels = width
        if block < 4 or order == "relu bn":
            layers.append(nn.MaxPool2d(2))
    return _classifier(layers, channels, num_classes)


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
    return _classifier(layers, channels, num_classes)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which where the shape changes is one of two (He et al. 2016, 4.2).

    Option A takes every other pixel and leaves the new channels zero; option B is a 1x1 convolution with batch norm.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, option: str = "A"):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.new_channels = outputs - inputs
        self.shortcut = None
        if option == "B" and stride > 1:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.stride > 1:
            before = self.new_channels // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))
        return F.relu(out + x)


class ResNet(nn.Module):
    """The CIFAR ResNet of 6n+2 layers (He et al. 2016, 4.2), with the parameter names of the public checkpoints."""

    def __init__(self, depth: int, num_classes: int, in_channels: int = 3, option: str = "A"):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(depth, 16, 16, 1, option)
        self.layer2 = self._stage(depth, 16, 32, 2, option)
        self.layer3 = self._stage(depth, 32, 64, 2, option)
        self.linear = nn.Linear(64, num_classes)
        _kaiming(self)

    @staticmethod
    def _stage(depth, inputs, outputs, stride, option):
        others = [BasicBlock(outputs, outputs, 1) for _ in range((depth - 2) // 6 - 1)]
        return nn.Sequential(BasicBlock(inputs, outputs, stride, option), *others)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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
NETWORKS = {
    "fc": partial(_mlp, (100,) * 5),
    "lenet300": partial(_mlp, (300, 100)),
    "lenet5": _lenet5,
    **{name: partial(_vgg, plan, "relu") for name, plan in _VGG.items()},
    **{f"{name}_bn": partial(_vgg, plan, "bn relu") for name, plan in _VGG.items()},
    "vgg13_relu_bn": partial(_vgg, _VGG["vgg13"], "relu bn"),
    **{f"resnet{depth}": partial(ResNet, depth) for depth in (20, 32, 44, 56, 110)},
    **{f"resnet{depth}_b": partial(ResNet, depth, option="B") for depth in (20, 32, 44, 56, 110)},
    **{name: partial(_cifar_stem, name) for name in ("resnet18", "resnet34")},
    "mobilenet_v1": _mobilenet_v1,
}
