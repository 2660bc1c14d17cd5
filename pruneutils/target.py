"""What is prunable: a table of module types, and a `Target`, made once from a model and carried through a call."""

import fnmatch
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from ._checks import a_model, callers_level, nearest
from ._torch import unmaskable
from .masks import Modules, joined, mask_of, settle

Parts = Mapping[str, Sequence[str]]  # {name or glob of a parameter: a label for each of the layers that it holds}


@dataclass(frozen=True)
class Rule:
    """Which parameters of a module type are prunable, and how they are laid out."""

    parameters: tuple[str, ...]  # names or globs
    transposed: bool = False  # (in, out, ...) instead of (out, in, ...)
    parts: Parts = field(default_factory=dict)  # layers one after the other along dim 0
    stack: bool = False  # (n, out, in): a layer in each matrix


RULES: dict[type | str, Rule] = {
    nn.modules.conv._ConvNd: Rule(("weight",)),
    nn.Linear: Rule(("weight",)),
    nn.MultiheadAttention: Rule(("in_proj_weight", "[qkv]_proj_weight"), parts={"in_proj_weight": "qkv"}),
    "transformers.pytorch_utils.Conv1D": Rule(("weight",), transposed=True),
}


def prunable(
    kind: type | str, *parameters: str, transposed: bool = False, parts: Parts | None = None, stack: bool = False
) -> None:
    """Say which parameters of a module type are prunable, from now on and in every model.

    Convolutions, linear layers, `nn.MultiheadAttention` and the Conv1D of transformers are prunable from the start.
    Others are on request, such as `pu.prunable(torch.nn.LSTM, "weight_*", parts={"weight_*": "ifgo"})`.

    Args:
        kind: A module type, or its full name; this replaces an earlier rule, and holds for subclasses too.
        *parameters: Names or globs of its parameters; without any, nothing of this type is prunable.
        transposed: Whether the weights are (in, out) and not (out, in). Such weights are pruned one by one only.
        parts: {name or glob: labels} of weights that hold several layers along their first dimension, a label for each.
        stack: Whether weights are stacks of matrices (n, out, in), each a layer of its own, such as those of experts.

    Example:
        >>> pu.prunable(torch.nn.Embedding, "weight")
        >>> pu.count(torch.nn.Embedding(10, 4)).total
        40
    """
    if not isinstance(kind, str) and not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"kind must be a module type or its full name, not {kind!r}")
    RULES[kind] = Rule(parameters, transposed, dict(parts or {}), stack)


def rule_of(module: nn.Module) -> Rule | None:
    """Return the rule of a module's type, or of the nearest type that it inherits from."""
    kinds = type(module).__mro__
    rules = (RULES.get(kind) or RULES.get(f"{kind.__module__}.{kind.__qualname__}") for kind in kinds)
    return next((rule for rule in rules if rule is not None), None)


def is_transposed(module: nn.Module) -> bool:
    """Return whether the weights of a module are (in, out, ...), as those of transposed convolutions are."""
    return getattr(module, "transposed", False) or rule_of(module).transposed


@dataclass(frozen=True)
class Target:
    """The weights of a model that a call is about, looked up once: nothing after that walks the modules again."""

    model: nn.Module
    modules: dict[str, nn.Module]  # model.named_modules()
    prunable: dict[str, nn.Parameter]  # every prunable weight that is a parameter, in module order, shared ones once
    weights: dict[str, nn.Parameter]  # those that take part, without the excluded ones
    masks: dict[str, torch.Tensor]  # True = kept, of the prunable weights that have masks already

    @classmethod
    def of(cls, model: nn.Module, exclude: str | Iterable[str] = (), strict: bool = True) -> "Target":
        """Look up the weights of a model; everything wrong with them raises here, unless `strict` is off."""
        modules = dict(a_model(model).named_modules())
        found = find(modules)
        weights = _without(found, exclude, modules) if strict else found
        settle(modules)
        for name, weight in weights.items() if strict else ():
            if weight is None:
                raise _computed_error(name)
            if why := unmaskable(weight):
                raise ValueError(f"{name} {why}")
        prunable = {name: weight for name, weight in found.items() if weight is not None}
        masks = {name: mask.keep for name, weight in prunable.items() if (mask := mask_of(weight)) is not None}
        return cls(model, modules, prunable, {name: prunable[name] for name in prunable if name in weights}, masks)

    def module(self, name: str) -> nn.Module:
        """Return the module that a parameter belongs to."""
        return self.modules[name.rpartition(".")[0]]

    def split(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Split tensors of weights that hold several layers into views: "in_proj_weight" to "in_proj_weight[q]", ..."""
        parts = {}
        for name, tensor in tensors.items():
            attribute, rule = name.rpartition(".")[2], rule_of(self.module(name))
            labels = next((each for glob, each in rule.parts.items() if fnmatch.fnmatchcase(attribute, glob)), ())
            if rule.stack and tensor.ndim == 3:
                parts |= {f"{name}[{number}]": matrix for number, matrix in enumerate(tensor)}
            elif labels and len(tensor) % len(labels) == 0:
                parts |= {f"{name}[{label}]": view for label, view in zip(labels, tensor.chunk(len(labels)))}
            else:
                parts[name] = tensor
        return parts

    def join(self, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Put together what `split` has made, in the order of `parts`."""
        pieces = defaultdict(list)
        for part, tensor in parts.items():
            pieces[part if part in self.prunable else part.rpartition("[")[0]].append(tensor)
        for name, found in pieces.items():
            stacked = found[0].ndim < self.prunable[name].ndim
            pieces[name] = torch.stack(found) if stacked else torch.cat(found) if len(found) > 1 else found[0]
        return dict(pieces)


def prunable_weights(model: nn.Module, exclude: str | Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """Return the prunable weights of a model, in module order, shared ones once.

    Args:
        model: Any `nn.Module`.
        exclude: Names or globs of layers to leave out ("fc", "layer1.*"), or of their weights ("fc.weight").

    Returns:
        {parameter name: parameter}, the model's own parameters. Weights that a parametrization computes are none.

    Raises:
        ValueError: If nothing is left to prune, or if an entry of `exclude` fits no layer.

    Example:
        >>> model = pu.models.create("lenet300")
        >>> {name: tuple(weight.shape) for name, weight in pu.prunable_weights(model, exclude="fc3").items()}
        {'fc1.weight': (300, 784), 'fc2.weight': (100, 300)}
    """
    modules = dict(a_model(model).named_modules())
    found = _without(find(modules), exclude, modules)
    weights = {name: weight for name, weight in found.items() if weight is not None}
    if not weights:
        raise _computed_error(next(iter(found)))
    return weights


def find(modules: Modules) -> dict[str, nn.Parameter | None]:
    """Return the prunable weights in module order, shared ones once, None for those that are computed."""
    found, seen = {}, set()
    for layer, module in modules.items():
        rule = rule_of(module)
        for pattern in rule.parameters if rule else ():
            names = fnmatch.filter(module._parameters, pattern)
            if pattern in getattr(module, "parametrizations", ()) or (not names and pattern in module.__dict__):
                found[joined(layer, pattern)] = None  # not looked at: that may compute something
            for name in names:
                weight, name = module._parameters[name], joined(layer, name)
                if is_lazy(weight):
                    raise ValueError(f"{name} has no shape yet; run the model on a batch first")
                if weight is not None and 0 not in weight.shape and id(weight) not in seen:
                    seen.add(id(weight))
                    found[name] = weight
    return found


def _without(found, exclude, modules) -> dict[str, nn.Parameter | None]:
    """Leave out what `exclude` names; ValueError if nothing is prunable or nothing is left."""
    if not found:
        raise ValueError(f"{type(modules['']).__name__} {_no_layers(modules)}")
    patterns = [exclude] if isinstance(exclude, str) or not isinstance(exclude, Iterable) else list(exclude)
    if not patterns:
        return found
    names = {id(weight): [name] for name, weight in found.items() if weight is not None}
    for name, parameter in modules[""].named_parameters(remove_duplicate=False):  # in layers of other types too
        names.get(id(parameter), []).append(name)
    excluded = match_layers(found, patterns, "exclude", {each[0]: each for each in names.values()})
    left = {name: weight for name, weight in found.items() if name not in excluded}
    if not left:
        raise ValueError(f"exclude={exclude!r} leaves nothing to prune")
    return left


def _no_layers(modules) -> str:
    """Say why nothing is prunable, and the way out."""
    if isinstance(modules[""], torch.jit.ScriptModule):
        return "is compiled by torch.jit, which hides its layers; prune the model before it is scripted or traced"
    if quantized := [name for name, module in modules.items() if ".quantized." in type(module).__module__]:
        return f"has quantized layers only, such as {quantized[0]!r}; prune the model before it is quantized"
    return "has nothing to prune, such as a linear layer; pu.prunable makes others prunable"


def _computed_error(name) -> ValueError:
    way = f"exclude {layer_name(name)!r}, remove the parametrization, or call pu.takeover.take_over on the model"
    return ValueError(f"{name} is computed by a parametrization (torch.nn.utils.prune, weight_norm, ...); {way}")


def layer_name(name: str) -> str:
    """Return what a weight's layer is called: "conv1" for "conv1.weight"; other parameters keep their whole name."""
    return name.removesuffix(".weight")


def match_layers(
    names: Iterable[str], patterns: Iterable[str], argument: str, other_names: Mapping[str, Iterable[str]] = {}
) -> dict[str, str]:
    """Return {parameter name: the first of `patterns` that fits it}; each must fit a layer's or a parameter's name."""
    names, found = list(names), {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} takes names or globs of layers, such as 'fc1', not {pattern!r:.80}")
        fits = [n for n in names if any(_fits(each, pattern) for each in (n, *other_names.get(n, ())))]
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


class LeftOutWarning(UserWarning):
    """A large share of the parameters is in layers that are not prunable, or is pruned under a second name."""


_warned = weakref.WeakSet()  # models


def warn_unprunable(target: Target) -> None:
    """Warn, once for each model, of matrices that are not prunable, and of weights that are something else too."""
    if target.model in _warned:
        return
    known = {id(weight) for weight in target.prunable.values()}
    chosen = {id(weight): name for name, weight in target.weights.items()}
    kinds, examples, reports = defaultdict(int), {}, []
    for layer, module in target.modules.items():
        if isinstance(module, ParametrizationList) or rule_of(module):
            continue
        for attribute, parameter in module._parameters.items():
            name, kind = joined(layer, attribute), type(module).__name__
            if id(parameter) in chosen:
                own = chosen[id(parameter)]
                reports.append(f"{own} is {name} of {kind} too: exclude={layer_name(own)!r} leaves both alone")
            elif parameter is not None and parameter.ndim >= 2 and id(parameter) not in known:  # vectors are no news
                known.add(id(parameter))
                kinds[kind] += parameter.numel()
                examples.setdefault(kind, name)
    share = sum(kinds.values()) / sum(parameter.numel() for parameter in target.model.parameters())
    if share >= 0.01:
        each = ", ".join(f"{kind} {n:,} (such as {examples[kind]})" for kind, n in kinds.items())
        reports.insert(0, f"{share:.0%} of the parameters are not prunable: {each}; see pu.prunable")
    adapters = [name for name in target.weights if "lora_" in name]
    if 0 < len(adapters) < len(target.weights):
        reports.append(f"{len(adapters)} LoRA adapters are pruned too, such as {adapters[0]}: exclude='*lora_*'")
    if reports:
        warnings.warn("; ".join(reports), LeftOutWarning, stacklevel=callers_level())
    _warned.add(target.model)
