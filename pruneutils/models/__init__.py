"""The papers' networks, any classifier of timm or torchvision by name, and language models."""

from .building import create
from .language import language
from .networks import NETWORKS, BasicBlock, ResNet
from .weights import imagenet_weights as imagenet_weights
from .weights import load_weights

__all__ = ["NETWORKS", "BasicBlock", "ResNet", "create", "language", "load_weights"]
