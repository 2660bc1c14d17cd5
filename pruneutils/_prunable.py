"""What is prunable: a table of module types and their weights, to which one line adds a type."""

import fnmatch
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ._checks import a_model, nearest


@dataclass(frozen=True)
class Rule:
    """Which parameters of a module type are prunable, and how they are laid out."""

    parameters: tuple[str, ...]  # names or globs
    transposed: bool = False  # (in, out, ...) instead of (out, in, ...)
    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)  # by name or glob: layers stacked along dim 0


RULES: dict[type | str, Rule] = {
    nn.modules.conv._ConvNd: Rule(("weight",)),
    nn.Linear: Rule(("weight",)),
    nn.MultiheadAttention: Rule(("in_proj_weight", "[qkv]_proj_weight"), parts={"in_proj_weight": "qkv"}),
    "transformers.pytorch_utils.Conv1D": Rule(("weight",), transposed=True),
}


def prunable(
    kind: type[nn.Module] | str,
    *parameters: str,
    transposed: bool = False,
    parts: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Say which parameters of a module type are prunable, from now on and in every model.

    Convolutions, linear layers, `nn.MultiheadAttention` and the Conv1D of transformers are prunable from the start.
    Biases, embeddings and recurrent layers are on request:

        pu.prunable(torch.nn.Linear, "weight", "bias")
        pu.prunable(torch.nn.Embedding, "weight")
        pu.prunable(torch.nn.LSTM, "weight_*", parts={"weight_*": "ifgo"})

    Args:
        kind: A module type, or its full name such as "transformers.pytorch_utils.Conv1D", which need not be imported.
            It takes the place of what was said about the type before, and holds for subclasses about which nothing is
            said.
        *parameters: Names or globs of its parameters; without any, nothing of this type is prunable.
        transposed: Whether the weights are (in, out) and not (out, in). Such weights are pruned one by one only.
        parts: {name or glob: labels} of weights that hold several layers along their first dimension, a label for each.
            These compete as layers of their own in `scope="layer"` and "erk".

    Raises:
        TypeError: If `kind` is neither a module type nor a name.

    Example:
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.factor = torch.nn.Parameter(torch.tensor([[1.0, -3.0, 2.0, 4.0]]))
        >>> pu.prunable(Scale, "factor")
        >>> pu.prune(Scale(), "magnitude", 0.5)["factor"]
        tensor([[False,  True, False,  True]])
    """
    if not isinstance(kind, str) and not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"kind must be a module type or its full name, not {kind!r}")
    if bad := [name for name in parameters if not isinstance(name, str)]:
        raise TypeError(f"parameters must be names such as 'weight', not {bad[0]!r}")
    RULES[kind] = Rule(parameters, transposed, dict(parts or {}))


def rule_of(module: nn.Module) -> Rule | None:
    """Return the rule of a module's type, or of the nearest type that it inherits from."""
    for kind in type(module).__mro__:
        rule = RULES.get(kind) or RULES.get(f"{kind.__module__}.{kind.__qualname__}")
        if rule is not None:
            return rule
    return None


def prunable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter | None]]:
    """Yield (name, parameter) in module order, shared ones every time; None for one that is computed."""
    for layer, module in a_model(model).named_modules():
        rule = rule_of(module)
        for pattern in rule.parameters if rule else ():
            names = fnmatch.filter(module._parameters, pattern)
            if pattern in getattr(module, "parametrizations", ()) or (not names and pattern in module.__dict__):
                yield f"{layer}.{pattern}" if layer else pattern, None  # not looked at: that may compute something
            for name in names:
                weight = module._parameters[name]
                if weight is not None and 0 not in weight.shape:
                    yield f"{layer}.{name}" if layer else name, weight


def prunable_weights(model: nn.Module, exclude: str | Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """Return the prunable weights of a model, in module order, shared ones once.

    These are the weights of convolution, linear and attention layers, and of what `prunable` has added.

    Args:
        model: Any `nn.Module`.
        exclude: Names or globs of layers to leave out ("fc", "layer1.*"), or of their weights ("fc.weight"). A shared
            weight has a name in each of its layers, and any of them will do.

    Returns:
        {parameter name: parameter}. These are the model's own parameters, not copies.

    Raises:
        ValueError: If nothing is left to prune, or if an entry of `exclude` fits no layer. Weights computed by a
            parametrization (torch.nn.utils.prune, weight_norm) are no parameters, and not among the result.

    Example:
        >>> model = pu.models.create("lenet300")
        >>> {name: tuple(weight.shape) for name, weight in pu.prunable_weights(model, exclude="fc3").items()}
        {'fc1.weight': (300, 784), 'fc2.weight': (100, 300)}
    """
    weights, computed = find(model, exclude)
    if not weights:
        _refuse(computed)
    return weights


def weights_to_prune(model: nn.Module, exclude: str | Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """Return `prunable_weights`; ValueError if one that is not excluded is computed by a parametrization."""
    weights, computed = find(model, exclude)
    if computed:
        _refuse(computed)
    return weights


def find(model, exclude) -> tuple[dict[str, nn.Parameter], list[str]]:
    """Return the prunable weights, and the names of those that are computed."""
    patterns = _patterns(a_model(model), exclude)
    weights, names_of = {}, defaultdict(list)
    for name, weight in prunable_parameters(model):
        names = names_of[name if weight is None else id(weight)]
        if not names:
            weights[name] = weight
        names.append(name)
    if not weights:
        raise ValueError(
            f"{type(model).__name__} has no convolution or linear layer: nothing to prune; pu.prunable makes other "
            "types prunable"
        )
    excluded = {}
    if patterns:
        for name, parameter in model.named_parameters(remove_duplicate=False):  # in layers of other types too
            if id(parameter) in names_of:
                names_of[id(parameter)].append(name)
        other_names = {names[0]: names[1:] for names in names_of.values()}
        excluded = match_layers(weights, patterns, "exclude", other_names)
    weights = {name: weight for name, weight in weights.items() if name not in excluded}
    if not weights:
        raise ValueError(f"exclude={exclude!r} leaves nothing to prune")
    computed = [name for name, weight in weights.items() if weight is None]
    return {name: weight for name, weight in weights.items() if weight is not None}, computed


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


def _refuse(computed):
    name = computed[0]
    raise ValueError(
        f"{name} is computed by a parametrization (torch.nn.utils.prune, weight_norm, ...) and cannot be pruned as a "
        f"parameter; exclude {layer_name(name)!r}, remove the parametrization first, or let pu.take_over(model) make "
        "masks of those of torch.nn.utils.prune"
    )


def prunable_names(model: nn.Module) -> set[str]:
    """Return every name of every prunable weight, computed ones included."""
    return {name for name, _ in prunable_parameters(model)}


def present_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what `prunable_weights` does, leaving out computed weights; empty if there is nothing to prune."""
    weights, seen = {}, set()
    for name, weight in prunable_parameters(model):
        if weight is not None and id(weight) not in seen:
            seen.add(id(weight))
            weights[name] = weight
    return weights


# --- Names -----------------------------------------------------------------------------------------------------------


def layer_name(name: str) -> str:
    """Return what a weight's layer is called: "conv1" for "conv1.weight"; other parameters keep their whole name."""
    return name.removesuffix(".weight")


def module_of(model: nn.Module, name: str) -> nn.Module:
    """Return the module that a parameter belongs to."""
    return model.get_submodule(name.rpartition(".")[0])


def is_transposed(model: nn.Module, name: str) -> bool:
    """Tell whether a weight is (in, out, ...), as those of transposed convolutions are."""
    module = module_of(model, name)
    return getattr(module, "transposed", False) or rule_of(module).transposed


def match_layers(
    names: Iterable[str],
    patterns: Iterable[str],
    argument: str,
    other_names: Mapping[str, Iterable[str]] | None = None,
) -> dict[str, str]:
    """Return {parameter name: the first of `patterns` that fits it}; each must fit a layer's or a parameter's name."""
    names, found = list(names), {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument}: layers are told by name or glob, such as 'fc1', not {pattern!r:.80}")
        fits = [n for n in names if any(_fits(each, pattern) for each in (n, *(other_names or {}).get(n, ())))]
        if not fits:
            layers = [layer_name(name) for name in names]
            inside = any(name.startswith(f"{pattern}.") for name in layers)
            hint = f"did you mean '{pattern}.*', the layers inside of it?" if inside else nearest(pattern, layers)
            raise ValueError(f"{argument}: no prunable layer fits {pattern!r}; {hint}")
        for name in fits:
            found.setdefault(name, pattern)
    return found


def _fits(name, pattern) -> bool:
    whole = name.partition("[")[0]  # of a part such as "attention.in_proj_weight[q]"
    known = {name, whole, layer_name(whole), whole.rpartition(".")[0]}
    return pattern in known or any(fnmatch.fnmatchcase(each, pattern) for each in known - {""})


# --- Weights that hold several layers --------------------------------------------------------------------------------


def split_parts(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors with those of several layers split into views: "in_proj_weight" to "in_proj_weight[q]", ..."""
    split = {}
    for name, tensor in tensors.items():
        labels = _labels(model, name)
        views = tensor.chunk(len(labels)) if labels and len(tensor) % len(labels) == 0 else ()
        split |= {f"{name}[{label}]": view for label, view in zip(labels, views)} if views else {name: tensor}
    return split


def join_parts(names: Iterable[str], parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of these names, put back together from what `split_parts` made of them."""
    return {
        name: parts[name] if name in parts else torch.cat([parts[p] for p in parts if p.rpartition("[")[0] == name])
        for name in names
    }


def _labels(model, name) -> Sequence[str]:
    parts, attribute = rule_of(module_of(model, name)).parts, name.rpartition(".")[2]
    return next((labels for pattern, labels in parts.items() if fnmatch.fnmatchcase(attribute, pattern)), ())
