"""How long a move of the sparsity explorer's slider takes: to the new masks, and to the new picture and text.

Wall and CPU milliseconds (medians and 95 % quantiles) over `--moves` positions of the slider; "first" is what making
the panel takes, scores and sorting included. A picture's time includes that of its masks and of the accuracy on the
subset. Set OMP_NUM_THREADS=1 where other processes work on the same cores.
"""

import argparse
import random
import time

import torch
from torch import nn

import pruneutils as pu
from pruneutils.widgets import sparsity_explorer


def network(hidden: int) -> nn.Module:
    """784-hidden-450-10: with 800 hidden units, 991,700 weights."""
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 450), nn.ReLU(), nn.Linear(450, 10)]
    return nn.Sequential(*layers)


def measure(work, moves) -> tuple[list[float], list[float]]:
    """Wall and CPU milliseconds of `work(sparsity)` for each of the moves, sorted."""
    wall, cpu = [], []
    for sparsity in moves:
        start = time.perf_counter(), time.process_time()
        work(sparsity)
        wall.append(1000 * (time.perf_counter() - start[0]))
        cpu.append(1000 * (time.process_time() - start[1]))
    return sorted(wall), sorted(cpu)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=800)
    parser.add_argument("--moves", type=int, default=40)
    arguments = parser.parse_args()
    model = network(arguments.hidden)
    data = torch.rand(1000, 1, 28, 28), torch.randint(10, (1000,))
    print(f"{pu.count(model).total:,} weights, {arguments.moves} moves, {torch.get_num_threads()} threads")
    print(f"{'':<38}{'wall ms':>10}{'95 %':>8}{'CPU ms':>10}{'95 %':>8}{'first s':>10}")
    for criterion, scope, granularity in (
        ("magnitude", "global", "weight"),
        ("magnitude", "layer", "weight"),
        ("snip", "erk", "weight"),
        ("magnitude", "global", "filter"),
    ):
        start = time.perf_counter()
        panel = sparsity_explorer(model, data, criterion=criterion, scope=scope, granularity=granularity)
        first = time.perf_counter() - start

        def masks(sparsity, panel=panel):
            panel.slider.value = sparsity
            panel._select()

        def picture(sparsity, panel=panel):
            panel.slider.value = sparsity
            panel._redraw()

        generator = random.Random(0)
        moves = [generator.uniform(0.3, 0.99) for _ in range(arguments.moves)]
        panel.slider.unobserve_all("value")
        for name, work in (("masks", masks), ("picture", picture)):
            wall, cpu = measure(work, moves)
            at = len(moves) // 2, int(0.95 * len(moves))
            row = "".join(f"{times[i]:>{width}.1f}" for times in (wall, cpu) for i, width in zip(at, (10, 8)))
            print(f"{f'{criterion}, {scope}, {granularity}: {name}':<38}{row}{first:>10.2f}")


if __name__ == "__main__":
    main()
