"""The papers' networks, and any classifier of timm or torchvision by name.

`create` builds a network, `load_weights` fills it from a file. The networks themselves are in `networks`, a function or
a class each and one table of their names.
"""

from .building import FETCHING, create, list_models
from .networks import BasicBlock, ResNet
from .weights import imagenet_weights, load_weights

__all__ = ["FETCHING", "BasicBlock", "ResNet", "create", "imagenet_weights", "list_models", "load_weights"]
