"""What a sweep costs beside its runs, and what two processes gain: `python benchmarks/sweep_overhead.py`."""

import tempfile
import time

import torch

from pruneutils.experiments import processes, sweep


def trivial(index):
    return {"value": index}


def training(seed, steps=1000):
    """About a second of small-network training on one core."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, 300), torch.nn.ReLU(), torch.nn.Linear(300, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = torch.randn(128, 64), torch.randint(10, (128,))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return {"loss": loss}


def seconds(*args, **options):
    start = time.perf_counter()
    sweep(*args, progress=False, **options)
    return time.perf_counter() - start


def main(runs=1000, trainings=8, rounds=3):
    two = processes(2)
    sweep(training, {"seed": range(4), "steps": 5}, executor=two, progress=False)  # start the workers
    print(f"per trivial run, {runs} runs:")
    with tempfile.TemporaryDirectory() as store, tempfile.TemporaryDirectory() as other:
        grid = {"index": range(runs)}
        for name, options in {
            "in memory": {},
            "with a store": {"store": store},
            "read back": {"store": store},
            "two processes with a store": {"store": other, "executor": two},
        }.items():
            print(f"  {name:28s} {1000 * seconds(trivial, grid, **options) / runs:6.2f} ms")
    grid = {"seed": range(trainings)}
    for _ in range(rounds):  # the best round counts: others may use the machine
        one, side_by_side = seconds(training, grid), seconds(training, grid, executor=two)
        print(f"{trainings} trainings: in turn {one:.1f} s, in two processes {side_by_side:.1f} s", end=", ")
        print(f"gain {one / side_by_side:.2f}")


if __name__ == "__main__":
    main()
