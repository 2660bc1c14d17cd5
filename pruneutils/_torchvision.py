"""Import torchvision even where its wheel was built for CUDA and torch was not.

Then `import torchvision` ends with "operator torchvision::nms does not exist", and it is enough to declare the two
operators that its Python part refers to. A torchvision that works would abort the process had they been declared
before, so the plain import always comes first.
"""

import threading
from types import ModuleType

import torch

from ._checks import needs

_lock = threading.Lock()  # two threads that fail at once would both declare
_declared = None  # the operators exist only as long as this library object does


def load() -> ModuleType:
    """Return the torchvision module; timm imports it too, so call this before importing timm."""
    global _declared
    with _lock, needs("models"):
        try:
            import torchvision
        except RuntimeError as error:
            if _declared is not None or "operator torchvision::" not in str(error):
                raise
            _declared = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                _declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            import torchvision
    return torchvision
