"""The papers' networks, and any classifier of timm or torchvision by name."""

from .building import create
from .networks import NETWORKS, BasicBlock, ResNet
from .weights import imagenet_weights, load_weights

__all__ = ["NETWORKS", "BasicBlock", "ResNet", "create", "imagenet_weights", "load_weights"]
