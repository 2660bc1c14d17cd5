"""Prune 25.6 million weights to 90 %: pu.prune and select() against torch.nn.utils.prune.global_unstructured.

Every measurement runs in a process of its own, so that its peak of memory is its own; the methods take turns. Seconds
are CPU and wall time of the pruning alone: of a process's first call, which has to ask for fresh memory, and the median
of its next three. Memory is what the peak grew by over the model before pruning; beside it stands what every method has
to hold, the masks.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

METHODS = ("pu.prune", "select", "torch prune")


def resnet50_layers():
    """The convolution and linear shapes of ResNet-50: (inputs, outputs, kernel), kernel 0 for linear."""
    layers, channels = [(3, 64, 7)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers += [(channels, width, 1), (width, width, 3), (width, 4 * width, 1)]
            if block == 0:
                layers.append((channels, 4 * width, 1))
            channels = 4 * width
    return [*layers, (channels, 1000, 0)]


def measure(method, sparsity):
    """Prune four times in this process; CPU and wall seconds of the first and the others, MB by which the peak grew."""
    import torch
    from pruneutils.selection import select
    from torch import nn
    from torch.nn.utils import prune as torch_prune

    import pruneutils as pu

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    def build(layers):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Conv2d(i, o, k, bias=False) if k else nn.Linear(i, o) for i, o, k in layers))
        for layer in model:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")  # as torchvision does it: no layer empties at 90 %
        return model

    def run(model):
        weights = {name: weight.detach() for name, weight in pu.prunable_weights(model).items()}
        if method == "pu.prune":
            return pu.prune(model, "magnitude", sparsity=sparsity).sparsity
        if method == "select":
            total = sum(weight.numel() for weight in weights.values())
            return len(select(weights, round(sparsity * total), transform=torch.abs).keep)
        layers = [(layer, "weight") for layer in model]
        return torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=sparsity)

    run(build([(8, 8, 3), (8, 8, 0)]))  # imports and first calls are not what is measured
    model = build(resnet50_layers())
    # ru_maxrss remembers building the model; a peak below that would go unseen, so ask what is resident now
    before = _resident()
    seconds = []
    for turn in range(4):
        start = time.process_time(), time.perf_counter()
        run(model)
        seconds.append((time.process_time() - start[0], time.perf_counter() - start[1]))
        if turn == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        model = build(resnet50_layers())
    (cpu, wall), (next_cpu, next_wall) = seconds[0], map(statistics.median, zip(*seconds[1:]))
    return {"cpu": cpu, "wall": wall, "next_cpu": next_cpu, "next_wall": next_wall, "memory": peak - before}


def _resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--method", choices=METHODS, help="measure this one once, here, and print JSON")
    arguments = parser.parse_args()
    if arguments.method:
        print(json.dumps(measure(arguments.method, arguments.sparsity)))
        return
    weights = sum(i * o * max(k, 1) ** 2 for i, o, k in resnet50_layers())
    print(f"{weights:,} weights, sparsity {arguments.sparsity}, medians of {arguments.repeats} processes in turn;")
    print(f"the masks take {weights / 2**20:.0f} MB as bool, {4 * weights / 2**20:.0f} MB as float32")
    columns = ("cpu", "wall", "next_cpu", "next_wall")
    print(f"{'':22}{'first call':^32}{'next calls':^32}")
    print(f"{'method':<14}{'threads':>8}" + f"{'CPU s':>8}{'x':>7}{'wall s':>10}{'x':>7}" * 2 + f"{'extra MB':>10}")
    for threads in arguments.threads:
        runs = {method: [] for method in METHODS}
        for _ in range(arguments.repeats):
            for method in METHODS:
                command = [sys.executable, __file__, "--method", method, "--sparsity", str(arguments.sparsity)]
                environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
                done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                runs[method].append(json.loads(done.stdout))
        median = {m: {key: statistics.median(r[key] for r in rs) for key in rs[0]} for m, rs in runs.items()}
        for method, row in median.items():
            cells = [f"{row[key]:8.3f}{median['torch prune'][key] / row[key]:8.1f}" for key in columns]
            print(f"{method:<14}{threads:>8}" + "".join(cells) + f"{row['memory']:>10.0f}")


if __name__ == "__main__":
    main()
