"""How the sparsity gets there: a schedule is a function `(progress, start, target) -> sparsity`, all four fractions."""

from collections.abc import Callable

from .._checks import choose, fraction

Schedule = Callable[[float, float, float], float]
SCHEDULES: dict[str, Schedule] = {}


def schedule(function: Schedule) -> Schedule:
    """Register a schedule under the name of its function.

    Args:
        function: `(progress, start, target) -> sparsity`, which is `start` at progress 0 and `target` at 1.

    Returns:
        The same function.

    Example:
        >>> @pu.schedule
        ... def late(progress, start, target):
        ...     return start + (target - start) * progress**3
        >>> pu.pruning.sparsity_at(0.5, 0.8, schedule="late")
        0.1
    """
    SCHEDULES[function.__name__] = function
    return function


@schedule
def exponential(progress: float, start: float, target: float) -> float:
    """Remove the same share of what is left in every step (Tanaka et al. 2020)."""
    return 1 - (1 - start) ** (1 - progress) * (1 - target) ** progress


@schedule
def linear(progress: float, start: float, target: float) -> float:
    """Remove the same number of weights in every step."""
    return start + (target - start) * progress


@schedule
def cubic(progress: float, start: float, target: float) -> float:
    """Remove most at first and little at the end: target + (start - target) (1 - t)^3 (Zhu and Gupta 2017)."""
    return target + (start - target) * (1 - progress) ** 3


def sparsity_at(
    progress: float, sparsity: float, start: float = 0.0, schedule: str | Schedule = "exponential"
) -> float:
    """Compute the sparsity that a schedule has reached.

    Args:
        progress: How much of the way is done, in [0, 1].
        sparsity, start: The sparsities at the end and at the beginning.
        schedule: "exponential", "linear", "cubic", or as for `pu.schedule`.

    Returns:
        The sparsity, a fraction.

    Example:
        >>> [round(pu.pruning.sparsity_at(step / 3, 0.875), 3) for step in (1, 2, 3)]
        [0.5, 0.75, 0.875]
    """
    rule = choose("schedule", schedule, SCHEDULES)
    return rule(fraction("progress", progress), fraction("start", start), fraction("sparsity", sparsity))
