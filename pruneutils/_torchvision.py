"""Import torchvision even where its wheel was built for CUDA and torch was not.

torchvision from PyPI is built against a CUDA torch. Beside a CPU-only torch its compiled library does not load, its
Python part then refers to two operators nobody defined, and `import torchvision` ends with "operator torchvision::nms
does not exist". Declaring the signatures of those two is enough: models, transforms and datasets work, and calling the
operators themselves still gives torchvision's own error.

The order matters. A torchvision that works defines the operators itself, and had they been declared before, that second
definition would abort the process. So the plain import always comes first, and nothing is declared unless it failed.
"""

import threading
from types import ModuleType

import torch

_lock = threading.Lock()  # two threads that fail at once would both declare
_declared = None  # the operators exist only as long as this library object does


def load() -> ModuleType:
    """Return the torchvision module; RuntimeError or ImportError where it is broken in another way.

    timm imports torchvision too, so call this before importing timm.
    """
    global _declared
    with _lock:
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
