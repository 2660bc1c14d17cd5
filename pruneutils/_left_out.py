"""Say once what pruning leaves out of a model, and what it prunes under a second name."""

import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterable

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from ._checks import callers_level
from ._prunable import find, layer_name, prunable_parameters, rule_of


class LeftOutWarning(UserWarning):
    """A large share of the parameters is in layers that are not prunable, or is pruned under a second name."""


_told = weakref.WeakSet()  # models
_WORTH_TELLING = 0.01  # of all parameters


def tell_left_out(model: nn.Module, exclude: str | Iterable[str] = ()) -> None:
    """Warn, once for each model, of matrices that are not prunable and of weights that are embeddings too.

    Biases, norms and scales are vectors, and no news.
    """
    if model in _told:
        return
    prunable_ids = {id(weight) for _, weight in prunable_parameters(model) if weight is not None}
    chosen = {id(weight): name for name, weight in find(model, exclude)[0].items()}
    left, examples, tied, seen = defaultdict(int), {}, {}, set()
    for layer, module in model.named_modules():
        if isinstance(module, ParametrizationList) or rule_of(module):
            continue
        for name, parameter in module._parameters.items():
            whole_name, kind = f"{layer}.{name}" if layer else name, type(module).__name__
            if parameter is not None and id(parameter) in chosen:
                tied[chosen[id(parameter)]] = f"{whole_name} of {kind}"
            elif parameter is not None and parameter.ndim >= 2 and id(parameter) not in prunable_ids | seen:
                seen.add(id(parameter))
                left[kind] += parameter.numel()
                examples.setdefault(kind, whole_name)
    total = sum(parameter.numel() for parameter in model.parameters())
    told = []
    if sum(left.values()) >= _WORTH_TELLING * total:
        kinds = ", ".join(f"{kind} {n:,} (such as {examples[kind]})" for kind, n in left.items())
        told.append(
            f"{sum(left.values()) / total:.0%} of the parameters are weights that are not prunable: {kinds}. "
            "pu.prunable(type, 'weight') makes a type prunable"
        )
    told += [
        f"{name} is {other} too, which is pruned with it; exclude={layer_name(name)!r} leaves both alone"
        for name, other in tied.items()
    ]
    if told:
        warnings.warn("; ".join(told), LeftOutWarning, stacklevel=callers_level())
    _told.add(model)
