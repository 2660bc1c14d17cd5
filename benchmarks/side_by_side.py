"""Rows about many short runs on one device: small networks leave a GPU idle, so runs side by side could be free.

Each arm trains the same networks, one a seed and 90 % pruned, on the same batches of random images that stay on the
device; its check says how far the mean losses lie from those in turn:

in turn      `pu.fit` after `pu.fit`, as `sweep` does without an executor
processes    `pu.fit` in k processes on the device, as `sweep` does with `pu.experiments.processes(k)`
graphs       in one process, each step a captured CUDA graph, on k streams (CUDA only)
stacked      in one process, the parameters of all networks stacked, torch.func.vmap over them, a mask each
"""

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

import pruneutils as pu

from .harness import at_least, row

INPUTS = {"lenet300": (1, 28, 28), "resnet20": (3, 32, 32)}
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


def fitted(network, seed, steps, device, precision):
    """One run as the notebooks do it."""
    model, train = task(network, seed, steps, device)
    table = pu.fit(model, train, epochs=1, optimizer=optimizer, seed=seed, precision=precision, batch_size=BATCH)
    return {"loss": table.train_loss.item()}


def in_turn(network, seeds, executor=None, **options):
    """An arm that returns the mean loss of each run; so do all of these."""
    grid = {"network": network, "seed": list(seeds), **options}

    def run():
        frame = pu.experiments.sweep(fitted, grid, executor=executor, progress=False)
        return torch.tensor(frame.loss.to_numpy())

    return lambda: run


def in_graphs(streams, network, seeds, steps, device, precision):
    """Each network's step is captured once and replayed, on one of `streams` streams; to be run once."""
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
    torch.cuda.synchronize()

    def run():
        for first in range(0, len(runs), streams):
            for k in range(steps):
                for lane, graph, inputs, labels, images, targets, chosen, _ in runs[first : first + streams]:
                    with torch.cuda.stream(lane):
                        inputs.copy_(images[chosen[k]])
                        labels.copy_(targets[chosen[k]])
                        graph.replay()
        torch.cuda.synchronize()
        return torch.stack([run[-1] for run in runs]).cpu() / steps

    return run


def stacked(network, seeds, steps, device, precision):
    """One step of all networks at once; to be run once."""
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

    def run():
        nonlocal losses
        for k in range(steps):
            chosen = orders[:, k]
            gradients, loss = gradient(weights, buffers, images[members, chosen], targets[members, chosen])
            values = list(weights.values())
            steps_of = torch._foreach_add(list(gradients.values()), values, alpha=WEIGHT_DECAY)
            torch._foreach_mul_(momentum, MOMENTUM)
            torch._foreach_add_(momentum, steps_of)
            torch._foreach_add_(values, momentum, alpha=-LR)
            torch._foreach_mul_([weights[name] for name in masked], factors)
            losses = losses + loss.detach()
        return losses.cpu() / steps

    return run


def _arms(network, runs, steps, device, precision, sides):
    options = {"steps": steps, "device": device, "precision": precision}
    arms = {"in turn": in_turn(network, range(runs), **options)}
    for k in sides:
        arms[f"{k} processes"] = in_turn(network, range(runs), pu.experiments.processes(k), **options)
        if device == "cuda":
            arms[f"{k} graphs"] = lambda k=k: in_graphs(k, network, range(runs), **options)
    arms["stacked"] = lambda: stacked(network, range(runs), **options)

    def check():
        first = arms["in turn"]()()
        apart = max(float((arm()() - first).abs().max()) for name, arm in arms.items() if name in ("stacked",))
        return f"losses of stacked {apart:.0e} from those in turn"

    return arms | {"check": check}


@row(
    "16 trainings of LeNet-300-100, 50 steps each",
    at_least(None, "2 processes", "in turn"),
    at_least(None, "stacked", "in turn"),
    rounds=3,
    clock="wall",
    threads=1,
)
def side_by_side():
    return _arms("lenet300", 16, 50, "cpu", "float32", (2,))


@row(
    "GPU: 8 trainings of ResNet-20, 60 steps each, bfloat16",
    at_least(None, "4 processes", "in turn"),
    at_least(None, "4 graphs", "in turn"),
    at_least(None, "stacked", "in turn"),
    rounds=3,
    clock="wall",
    gpu=True,
)
def side_by_side_on_gpu():
    return _arms("resnet20", 8, 60, "cuda", "bfloat16", (4,))
