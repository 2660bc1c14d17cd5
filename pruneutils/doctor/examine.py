"""What a check gets and gives: patients, findings, and the table of all checks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn

from .. import _masks
from .._checks import a_model, is_pair, some_data
from .._prunable import present_weights
from .._torch import device_of, in_mode

if TYPE_CHECKING:
    import pandas as pd

SEVERITIES = ("error", "warning", "note")  # wrong results, likely wrong results, good to know
_ENOUGH = 128  # samples that statistics are compared on


@dataclass(frozen=True)
class Finding:
    """What a check has found.

    `what` is wrong, `where` (layers or parameters), how bad it is (`severity`: "error" for wrong results, "warning" for
    likely wrong ones, "note" for what is good to know), and what to `call` about it. `check` is the name of the check.
    """

    severity: str
    what: str
    where: str
    call: str
    check: str = ""


class Findings(list[Finding]):
    """A list of findings, the worst first: empty, and so False, if all is well; a table in Jupyter."""

    def table(self) -> "pd.DataFrame":
        """Return a row per finding with the columns severity, what, where, call and check."""
        import pandas as pd  # only where a table is made: it would be half of the time of importing this package

        columns = ["severity", "what", "where", "call", "check"]
        return pd.DataFrame([[getattr(each, name) for name in columns] for each in self], columns=columns)

    @property
    def empty(self) -> bool:
        """Whether all is well."""
        return not self

    def __repr__(self) -> str:
        if not self:
            return "no findings"
        return "\n".join(f"{each.severity}: {each.what} ({each.where}). {each.call}" for each in self)

    def _repr_html_(self) -> str:
        return self.table().drop(columns="check").to_html(index=False) if self else "no findings"


def check(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, data: object = None) -> Findings:
    """Examine a model for what makes pruning experiments go wrong without an error; nothing is changed.

    It looks for weights and buffers that are not finite, pruned weights that are not zero, zeros that no mask holds,
    masks whose parameter was replaced, layers and classes without a weight, scores that tie at the cut, tied weights,
    and a large share of weights outside of every mask; with `optimizer`, for parameters that it no longer shares with
    the model; with `data`, for batch-norm statistics that do not fit and for kept weights without any effect.

    Args:
        model: Any `nn.Module`.
        optimizer: The optimizer that trains the model.
        data: One (inputs, targets) batch or an iterable of them, or inputs (N, ...) alone; the first 128 samples count.

    Returns:
        The findings, the worst first. The list is empty, and False, if all is well; Jupyter shows a table. Each finding
        tells `.what`, `.where`, `.severity` ("error", "warning" or "note"), and what to `.call`.

    Raises:
        TypeError: If `model`, `optimizer` or `data` is something else.

    Example:
        >>> model = pu.models.create("lenet300")
        >>> masks = pu.prune(model, "magnitude", 0.5)
        >>> pu.check(model)
        no findings
        >>> model.fc3.reset_parameters()
        >>> for finding in pu.check(model):
        ...     print(finding.severity, finding.where, finding.call)
        error fc3 pu.hold(model) zeroes them again, pu.make_permanent(model) keeps them
    """
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch Optimizer, not a {type(optimizer).__name__}")
    patient = Patient(a_model(model), optimizer, None if data is None else _inputs(data, model))
    found = [replace(finding, check=name) for name, looks_for in CHECKS.items() for finding in looks_for(patient)]
    return Findings(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


@dataclass
class Patient:
    """A model as the checks look at it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    inputs: torch.Tensor | None = None

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """The prunable weights by name, detached."""
        return {name: w.detach() for name, w in present_weights(self.model).items() if not w.is_meta and w.numel()}

    @cached_property
    def masks(self) -> dict[str, torch.Tensor]:
        """The masks by name, as they are now: True = kept."""
        held = {name: _masks.mask_of(weight) for name, weight in present_weights(self.model).items()}
        return {
            name: mask.keep.to(self.weights[name].device)
            for name, mask in held.items()
            if mask and name in self.weights
        }

    @cached_property
    def n_parameters(self) -> int:
        """The number of parameters, shared ones once."""
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def failure(self) -> Exception | None:
        """What a forward pass raises, None if it runs or there are no inputs."""
        if self.inputs is not None:
            try:
                with torch.no_grad(), in_mode(self.model, training=False):
                    self.model(self.inputs[:1])
            except Exception as error:
                return error
        return None


CHECKS: dict[str, Callable[[Patient], Iterable[Finding]]] = {}


def checks(function: Callable[[Patient], Iterable[Finding]]) -> Callable[[Patient], Iterable[Finding]]:
    """Register a check under the name of its function; it takes a `Patient` and yields `Finding`s."""
    CHECKS[function.__name__] = function
    return function


def _inputs(data: object, model: nn.Module) -> torch.Tensor:
    """Return the first inputs of the data, on the model's device."""
    if torch.is_tensor(data):
        parts = [data]
    elif is_pair(data):
        parts = [data[0]]
    else:
        parts, n = [], 0
        for batch in some_data("data", data):
            inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            if not torch.is_tensor(inputs):
                raise TypeError(f"a batch must be inputs or an (inputs, targets) pair, not a {type(batch).__name__}")
            parts.append(inputs)
            n += len(inputs)
            if n >= _ENOUGH:
                break
    if not sum(len(part) for part in parts):
        raise ValueError("data holds no sample")
    return torch.cat(parts)[:_ENOUGH].to(device_of(model))
