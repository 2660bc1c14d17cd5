"""What it costs a training step to hold masks: unmasked, pu.prune and torch.nn.utils.prune, taking turns.

MLP 784-300-100-10 and LeNet-5 at batch 128, 90 % of the weights pruned, SGD with momentum and weight decay, and Adam.
Every variant trains its own copy; a round is a block of steps of each. Milliseconds are the median over the rounds of
the CPU time per step, the ratio the median of the rounds' ratios to unmasked.
"""

import argparse
import copy
import statistics
import time

import torch
import torch.nn.functional as F
from torch.nn.utils import prune as torch_prune

import pruneutils as pu

OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4),
    "adam": lambda model: torch.optim.Adam(model.parameters(), 1e-3),
}


def with_pruneutils(model):
    pu.prune(model, "magnitude", sparsity=0.9, scope="layer")


def with_torch(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch_prune.l1_unstructured(module, "weight", 0.9)


VARIANTS = {"unmasked": lambda model: None, "pu.prune": with_pruneutils, "torch prune": with_torch}


def block(model, optimizer, inputs, targets, steps):
    """CPU seconds per step."""
    start = time.process_time()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return (time.process_time() - start) / steps


def measure(name, optimizer, rounds, steps):
    """{variant: seconds per step in each round}."""
    base = pu.models.create(name)
    inputs, targets = torch.randn(128, 1, 28, 28), torch.randint(10, (128,))
    arms = {}
    for variant, mask in VARIANTS.items():
        model = copy.deepcopy(base)
        mask(model)
        arms[variant] = model, OPTIMIZERS[optimizer](model)
        block(*arms[variant], inputs, targets, steps)
    seconds = {variant: [] for variant in arms}
    for _ in range(rounds):
        for variant, arm in arms.items():
            seconds[variant].append(block(*arm, inputs, targets, steps))
    assert pu.count(arms["pu.prune"][0]).sparsity > 0.89
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{'model':<10}{'optimizer':<11}{'variant':<13}{'ms a step':>10}{'ratio':>8}")
    for name, steps in (("lenet300", 60), ("lenet5", 5)):
        for optimizer in OPTIMIZERS:
            seconds = measure(name, optimizer, arguments.rounds, steps)
            for variant, times in seconds.items():
                ratio = statistics.median(a / b for a, b in zip(times, seconds["unmasked"]))
                print(f"{name:<10}{optimizer:<11}{variant:<13}{1e3 * statistics.median(times):>10.3f}{ratio:>8.3f}")


if __name__ == "__main__":
    main()
