"""How cost grows: weights to select among, runs of a sweep, layers of a network, layers in the explorer.

`make bench GROWTH=1` measures all four and draws growth.png and growth_dark.png; growth.json holds the figures.
"""

import gc
import json
import statistics
import time

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import EngFormatter, StrMethodFormatter
from torch import nn

import pruneutils as pu
from pruneutils.plots import look
from pruneutils.pruning.selection import select

from . import table, tools
from .selection import linear_layers, pruned_by_torch

CURVES = {  # what is timed, and what grows
    "selection": ("Select the lowest 90 % of all weights", "weights"),
    "sweep": ("A sweep of trivial runs with a store", "runs"),
    "layers": ("Prune many small layers", "layers of 1,024 weights"),
    "explorer": ("Move the explorer's slider", "layers of 4,096 weights"),
}
SIZES = {
    "selection": (1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000, 300_000_000),
    "sweep": (10, 30, 100, 300, 1000),
    "layers": (10, 30, 100, 300, 1000),
    "explorer": (3, 10, 30, 100, 200),
}
LARGEST_FOR_TORCH = 30_000_000  # torch.nn.utils.prune needs 50 bytes a weight and five seconds for so many


def seconds(prepare, rounds: int = 5) -> float:
    """CPU seconds of what `prepare` returns, the median of some rounds after a first one that warms up."""
    times = []
    if rounds > 1:
        prepare()()
    for _ in range(rounds):
        run = prepare()
        gc.collect()
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


def selection(n: int) -> dict[str, float]:
    model = linear_layers(n)
    scores = {name: weight.detach() for name, weight in model.named_parameters()}
    k = round(0.9 * sum(score.numel() for score in scores.values()))
    times = {
        "pruneutils": seconds(lambda: lambda: select(scores, k, transform=torch.abs)),
        "one read": seconds(lambda: lambda: [score.sum() for score in scores.values()]),
    }
    if n <= LARGEST_FOR_TORCH:
        times["torch.nn.utils.prune"] = seconds(lambda: lambda: pruned_by_torch(model), rounds=1)
    return times


def sweep(n: int) -> dict[str, float]:
    def prepare():
        folder = tools.empty_folder()
        return lambda: tools._sweep(tools.trivial, {"index": range(n)}, store=folder)

    return {"pruneutils": seconds(prepare, rounds=3)}


def layers(n: int) -> dict[str, float]:
    def ours():
        model = linear_layers(1024 * n, width=32)
        return lambda: pu.prune(model, sparsity=0.9)

    def theirs():
        model = linear_layers(1024 * n, width=32)
        return lambda: pruned_by_torch(model)

    return {"pruneutils": seconds(ours), "torch.nn.utils.prune": seconds(theirs)}


def explorer(n: int) -> dict[str, float]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(n)))
    data = torch.randn(16, 64), torch.randint(10, (16,))
    return {"pruneutils": seconds(tools.moves(pu.widgets.sparsity_explorer(model, data)), rounds=3)}


def measure(sizes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """{curve: {arm: [(size, seconds)]}}."""
    figures = {}
    for curve, points in sizes.items():
        for size in points:
            for arm, value in globals()[curve](size).items():
                figures.setdefault(curve, {}).setdefault(arm, []).append((size, value))
                print(f"{curve:12}{size:>13,}  {arm:22}{1e3 * value:12.2f} ms", flush=True)
    return figures


def draw(figures: dict, style: str) -> plt.Figure:
    """One panel a curve, both axes logarithmic; the dotted line grows in proportion to the size."""
    chosen = look.find_style(style)
    colors = dict(zip(("pruneutils", "torch.nn.utils.prune", "one read"), chosen.methods))
    with plt.rc_context(chosen.rc()):
        figure, axes = plt.subplots(2, 2, figsize=(8, 6.4), layout="constrained")
        lines = {}
        for ax, (curve, arms) in zip(axes.flat, figures.items()):
            for arm, points in arms.items():
                (lines[arm],) = ax.loglog(*zip(*points), marker="o", markersize=4, color=colors[arm])
            size, value = arms["pruneutils"][-1]
            first = arms["pruneutils"][0][0]
            proportional = [first, size], [value * first / size, value]
            (lines["in proportion to size"],) = ax.loglog(*proportional, color=chosen.muted, linestyle=":", zorder=0)
            title, grows = CURVES[curve]
            ax.set(title=title, xlabel=grows, ylabel="CPU time")
            ax.xaxis.set_major_formatter(EngFormatter() if size >= 1_000_000 else StrMethodFormatter("{x:,.0f}"))
            ax.yaxis.set_major_formatter(EngFormatter("s"))
        figure.legend(lines.values(), lines, loc="outside upper left", ncols=len(lines), frameon=False)
    return figure


def main() -> None:
    facts, figures = table.machine(), measure(SIZES)
    (table.HERE / "growth.json").write_text(json.dumps({"machine": facts, "figures": figures}, indent=1) + "\n")
    for style, name in (("light", "growth.png"), ("dark", "growth_dark.png")):
        figure = draw(figures, style)
        figure.savefig(table.HERE / name, dpi=130, facecolor=figure.get_facecolor())
        plt.close(figure)
        print(f"written to {table.HERE / name}")
