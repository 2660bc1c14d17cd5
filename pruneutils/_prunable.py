"""What is prunable: the weights of convolution and linear layers, by name."""

import fnmatch
from collections.abc import Iterable, Iterator

from torch import nn

from ._checks import a_model, nearest

_PRUNABLE = (nn.modules.conv._ConvNd, nn.Linear)


def prunable_weights(model: nn.Module, exclude: str | Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """Return the weights of all convolution and linear layers, in module order, shared ones once.

    Args:
        model: Any `nn.Module`.
        exclude: Names or globs of layers to leave out ("fc", "layer1.*"), or of their weights ("fc.weight").

    Returns:
        {parameter name: parameter}. These are the model's own parameters, not copies.

    Raises:
        ValueError: If nothing is left to prune, if an entry of `exclude` fits no layer, or if a layer's weight is
            computed by a parametrization (torch.nn.utils.prune, weight_norm) instead of being a parameter.

    Example:
        >>> model = pu.models.create("lenet300")
        >>> {name: tuple(weight.shape) for name, weight in pu.prunable_weights(model, exclude="fc3").items()}
        {'fc1.weight': (300, 784), 'fc2.weight': (100, 300)}
    """
    patterns = _patterns(a_model(model), exclude)
    weights, seen = {}, set()
    for name, module in _prunable_layers(model):
        weight = module._parameters.get("weight")
        if weight is None:
            raise ValueError(
                f"{name} is computed by a parametrization (torch.nn.utils.prune, weight_norm, ...) and cannot be "
                "pruned as a parameter; remove the parametrization first"
            )
        if id(weight) not in seen:
            seen.add(id(weight))
            weights[name] = weight
    if not weights:
        raise ValueError(f"{type(model).__name__} has no convolution or linear layer: nothing to prune")
    excluded = match_layers(weights, patterns, "exclude")
    weights = {name: weight for name, weight in weights.items() if name not in excluded}
    if not weights:
        raise ValueError(f"exclude={exclude!r} leaves nothing to prune")
    return weights


def _patterns(model, exclude) -> list[str]:
    """Return the names and globs of `exclude`; TypeError for anything else, with the names of modules given."""
    given = [exclude] if isinstance(exclude, (str, nn.Module)) else exclude
    if not isinstance(given, Iterable):
        raise TypeError(f"exclude must be names or globs of layers, such as ['fc1', 'layer1.*'], not {exclude!r:.80}")
    given = list(given)
    for each in given:
        if not isinstance(each, str):
            name = next((name for name, module in model.named_modules() if module is each), "")
            kind = f"a {type(each).__name__}; say {name!r}" if name else f"{each!r:.80}"
            raise TypeError(f"exclude takes the names or globs of layers, not {kind}")
    return given


def present_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what `prunable_weights` does, leaving out computed weights; empty if there is nothing to prune."""
    weights, seen = {}, set()
    for name, module in _prunable_layers(model):
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) not in seen:
            seen.add(id(weight))
            weights[name] = weight
    return weights


def _prunable_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for layer, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(module, _PRUNABLE) and (weight is None or 0 not in weight.shape):  # a layer of size zero has none
            yield f"{layer}.weight" if layer else "weight", module


def layer_name(name: str) -> str:
    """Return the layer that a weight belongs to: "conv1" for "conv1.weight"."""
    return name.removesuffix("weight").removesuffix(".")


def match_layers(names: Iterable[str], patterns: Iterable[str], argument: str) -> dict[str, str]:
    """Return {parameter name: the first of `patterns` that fits it}; each must fit a layer's or a parameter's name."""
    names, found = list(names), {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument}: layers are told by name or glob, such as 'fc1', not {pattern!r:.80}")
        fits = [n for n in names if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(layer_name(n), pattern)]
        if not fits:
            layers = [layer_name(name) for name in names]
            inside = any(name.startswith(f"{pattern}.") for name in layers)
            hint = f"did you mean '{pattern}.*', the layers inside of it?" if inside else nearest(pattern, layers)
            raise ValueError(f"{argument}: no prunable layer fits {pattern!r}; {hint}")
        for name in fits:
            found.setdefault(name, pattern)
    return found
