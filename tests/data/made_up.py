"""Small made-up files in the layouts of the real datasets."""

import pickle
import struct

import numpy as np
from PIL import Image

TEN = [f"class {number}" for number in range(10)]


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_idx(path, values):
    content = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_mnist(root):
    for part, n in (("train", 20), ("t10k", 10)):
        write_idx(root / f"MNIST/raw/{part}-images-idx3-ubyte", pixels(n, 28, 28, seed=n))
        write_idx(root / f"MNIST/raw/{part}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8) % 10)
    return root


def write_pickle(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=3))


def write_cifar10(root):
    folder = root / "cifar-10-batches-py"
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        write_pickle(folder / name, {"data": pixels(10, 3072, seed=number), "labels": list(range(10))})
    write_pickle(folder / "batches.meta", {"label_names": TEN})
    return root


def write_cifar100(root):
    for part, n in (("train", 200), ("test", 100)):
        labels = {"fine_labels": [i % 100 for i in range(n)], "coarse_labels": [0] * n}
        write_pickle(root / "cifar-100-python" / part, {"data": pixels(n, 3072), **labels})
    write_pickle(root / "cifar-100-python/meta", {"fine_label_names": [f"class {i}" for i in range(100)]})
    return root


def write_images(root, classes=("cat", "dog"), train=3, test=2, size=(32, 32)):
    for part, n in (("train", train), ("test", test)):
        for index, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for number in range(n):
                image = pixels(*size, 3, seed=1000 * index + 10 * number + (part == "test"))
                Image.fromarray(image).save(root / part / name / f"{number}.png")
    return root
