"""Many short runs on one device, the same ones in several ways: `python benchmarks/side_by_side.py [--device cuda]`.

Small networks leave a GPU idle, so runs side by side could make error bars free. Each way trains the same networks,
one a seed and 90 % pruned, on the same batches of random images that stay on the device:

in turn      `pu.fit` after `pu.fit`, as `sweep` does without an executor
processes    `pu.fit` in k processes on the device, as `sweep` does with `pu.experiments.processes(k)`
graphs       in one process, each step a captured CUDA graph, on k streams (CUDA only)
stacked      in one process, the parameters of all networks stacked, torch.func.vmap over them, a mask each

Wall time of training alone, the best of a few rounds; `gain` is runs an hour against in turn. `loss off` is how far
the mean loss of a run lies from its loss in turn, at most: rounding apart, all ways do the same work.
"""

import argparse
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

import pruneutils as pu

INPUTS = {"lenet300": (1, 28, 28), "lenet5": (1, 28, 28), "resnet20": (3, 32, 32)}
BATCH, LR, MOMENTUM, WEIGHT_DECAY = 128, 0.02, 0.9, 5e-4


def task(network, seed, steps, device):
    """A pruned network, and images enough for `steps` batches."""
    model = pu.models.create(network, seed=seed).to(device)
    pu.prune(model, "magnitude", sparsity=0.9, scope="layer")
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(steps * BATCH, *INPUTS[network], generator=generator)
    return model, (images.to(device), torch.randint(10, (len(images),), generator=generator).to(device))


def optimizer(parameters):
    return torch.optim.SGD(parameters, LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def order(seed, steps):
    """The batches that `pu.fit` draws with this seed."""
    return torch.randperm(steps * BATCH, generator=torch.Generator().manual_seed(seed)).split(BATCH)


def synchronize(device):
    torch.cuda.synchronize() if device == "cuda" else None


def fitted(network, seed, steps, device, precision):
    """One run as the notebooks do it; seconds without what comes before training."""
    model, train = task(network, seed, steps, device)
    synchronize(device)
    start = time.time()
    table = pu.fit(model, train, epochs=1, optimizer=optimizer, seed=seed, precision=precision, batch_size=BATCH)
    synchronize(device)
    return {"loss": table.train_loss.item(), "start": start, "end": time.time()}


def in_turn(network, seeds, **options):
    """(seconds, mean loss of each run); so do all ways."""
    frame = pu.experiments.sweep(fitted, {"network": network, "seed": list(seeds), **options}, progress=False)
    return (frame.end - frame.start).sum(), torch.tensor(frame.loss.to_numpy())


def in_processes(k, network, seeds, **options):
    grid, executor = {"network": network, "seed": list(seeds), **options}, pu.experiments.processes(k)
    frame = pu.experiments.sweep(fitted, grid, executor=executor, progress=False)
    return frame.end.max() - frame.start.min(), torch.tensor(frame.loss.to_numpy())


def in_graphs(streams, network, seeds, steps, device, precision):
    """Each network's step is captured once and replayed, on one of `streams` streams."""
    tasks = [task(network, seed, steps, device) for seed in seeds]
    orders = [torch.stack(order(seed, steps)).to(device) for seed in seeds]
    lanes = [torch.cuda.Stream() for _ in range(streams)]
    runs = []
    for i, (model, (images, targets)) in enumerate(tasks):
        model.to(memory_format=torch.channels_last).train()
        steps_of, sum_of = optimizer(model.parameters()), torch.zeros((), device=device)
        inputs, labels = images[:BATCH].clone(), targets[:BATCH].clone()
        before = {name: value.clone() for name, value in model.state_dict().items()}

        def step(model=model, steps_of=steps_of, sum_of=sum_of, inputs=inputs, labels=labels):
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False):
                loss = F.cross_entropy(model(inputs), labels)
            steps_of.zero_grad()
            loss.backward()
            steps_of.step()
            sum_of.add_(loss.detach())

        lane, graph = lanes[i % streams], torch.cuda.CUDAGraph()
        lane.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(lane):
            for _ in range(3):  # allocates momentum and gradients
                step()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=lane):
            step()
        # what the warming-up changed
        model.load_state_dict(before)
        for state in steps_of.state.values():
            state["momentum_buffer"].zero_()
        sum_of.zero_()
        runs.append((lane, graph, inputs, labels, images, targets, orders[i], sum_of))
    synchronize(device)
    start = time.perf_counter()
    for first in range(0, len(runs), streams):
        for k in range(steps):
            for lane, graph, inputs, labels, images, targets, chosen, _ in runs[first : first + streams]:
                with torch.cuda.stream(lane):
                    inputs.copy_(images[chosen[k]])
                    labels.copy_(targets[chosen[k]])
                    graph.replay()
    synchronize(device)
    seconds = time.perf_counter() - start
    assert all(pu.count(model).sparsity > 0.89 for model, _ in tasks)
    return seconds, torch.stack([run[-1] for run in runs]).cpu() / steps


def stacked(network, seeds, steps, device, precision):
    """One step of all networks at once."""
    tasks = [task(network, seed, steps, device) for seed in seeds]
    models = [model.train() for model, _ in tasks]
    weights, buffers = stack_module_state(models)
    weights = {name: weight.detach() for name, weight in weights.items()}
    masks = [pu.get_masks(model) for model in models]
    masked = list(masks[0])
    factors = [torch.stack([mask[name] for mask in masks]).to(weights[name]) for name in masked]
    momentum = [torch.zeros_like(weight) for weight in weights.values()]
    images = torch.stack([images for _, (images, _) in tasks])
    targets = torch.stack([targets for _, (_, targets) in tasks])
    orders = torch.stack([torch.stack(order(seed, steps)) for seed in seeds]).to(device)
    members, model = torch.arange(len(tasks), device=device)[:, None], models[0]

    def loss_of(weights, buffers, inputs, targets):
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            return F.cross_entropy(functional_call(model, (weights, buffers), (inputs,)), targets)

    gradient = vmap(grad_and_value(loss_of))
    losses = torch.zeros(len(tasks), device=device)
    synchronize(device)
    start = time.perf_counter()
    for k in range(steps):
        chosen = orders[:, k]
        gradients, loss = gradient(weights, buffers, images[members, chosen], targets[members, chosen])
        values = list(weights.values())
        steps_of = torch._foreach_add(list(gradients.values()), values, alpha=WEIGHT_DECAY)
        torch._foreach_mul_(momentum, MOMENTUM)
        torch._foreach_add_(momentum, steps_of)
        torch._foreach_add_(values, momentum, alpha=-LR)
        torch._foreach_mul_([weights[name] for name in masked], factors)
        losses += loss.detach()
    synchronize(device)
    seconds = time.perf_counter() - start
    assert all((weights[name] == 0).float().mean() > 0.89 for name in masked)
    return seconds, losses.cpu() / steps


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--networks", nargs="+", default=["lenet300", "resnet20"], choices=list(INPUTS))
    parser.add_argument("--runs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side-by-side", type=int, nargs="+", default=[2, 4, 8])
    arguments = parser.parse_args()
    device, sides = arguments.device, arguments.side_by_side
    options = {"steps": arguments.steps, "device": device, "precision": arguments.precision}
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {arguments.precision}, {arguments.runs} runs of {arguments.steps} steps")
    print(f"{'network':<10}{'way':<14}{'ms a step and run':>18}{'runs an hour':>14}{'gain':>7}{'loss off':>10}")
    # executors are made when used: there is one set of worker processes, of the size last asked for
    ways = {"in turn": in_turn, **{f"processes {k}": partial(in_processes, k) for k in sides}}
    ways |= {f"graphs {k}": partial(in_graphs, k) for k in (1, *sides) if device == "cuda"} | {"stacked": stacked}
    for network in arguments.networks:
        first = None
        for way, train in ways.items():
            try:
                train(network, range(arguments.runs), **options)  # warms up: processes, kernels, caches
                results = [train(network, range(arguments.runs), **options) for _ in range(arguments.rounds)]
            except RuntimeError as error:  # what one way cannot do is no reason to leave out the others
                print(f"{network:<10}{way:<14}failed: {str(error).splitlines()[0]}", flush=True)
                continue
            seconds, losses = min(results, key=lambda result: result[0])
            first = first or (seconds, losses)
            off, each = (losses - first[1]).abs().max(), seconds / arguments.runs
            figures = f"{1e3 * each / arguments.steps:>18.3f}{3600 / each:>14.0f}{first[0] / seconds:>7.2f}{off:>10.1e}"
            print(f"{network:<10}{way:<14}{figures}", flush=True)


if __name__ == "__main__":
    main()
