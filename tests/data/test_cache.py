"""Files are read once, and again when they have changed or the cache is broken."""

import dataclasses
import os

import numpy as np
import pytest
import torch
from made_up import write_idx, write_mnist

from pruneutils import data
from pruneutils.data import cache

IMAGES = "MNIST/raw/train-images-idx3-ubyte"


@pytest.fixture
def reads(monkeypatch):
    """The roots from which MNIST was read."""
    roots, read = [], data.DATASETS["mnist"].read
    counting = dataclasses.replace(data.DATASETS["mnist"], read=lambda *args: [roots.append(args[0]), read(*args)][1])
    monkeypatch.setitem(data.DATASETS, "mnist", counting)
    return roots


def test_files_are_read_once_and_again_when_they_change(tmp_path, reads):
    root = write_mnist(tmp_path)
    first, again = data.load("mnist", root)[0], data.load("mnist", root)[0]
    assert len(reads) == 1 and torch.equal(first.images, again.images) and first.classes == again.classes
    assert (first.mean, first.std, first.name, first.augment) == (again.mean, again.std, again.name, again.augment)
    write_idx(root / IMAGES, np.full((20, 28, 28), 7, np.uint8))
    assert (data.load("mnist", root)[0].images == 7).all() and len(reads) == 2
    assert len(list(cache.cache_folder().iterdir())) == 1


@pytest.mark.skipif(os.name != "posix", reason="needs the time of change")
def test_a_file_of_the_same_size_and_time_is_noticed(tmp_path):
    root = write_mnist(tmp_path)
    data.load("mnist", root)
    before = (root / IMAGES).stat()
    write_idx(root / IMAGES, np.full((20, 28, 28), 7, np.uint8))
    os.utime(root / IMAGES, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (data.load("mnist", root)[0].images == 7).all()


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-9], lambda b: b"x" * len(b)])
def test_a_broken_cache_is_rebuilt(tmp_path, reads, damage):
    root = write_mnist(tmp_path)
    expected = data.load("mnist", root)[0].images.clone()
    (file,) = cache.cache_folder().iterdir()
    content = file.read_bytes()
    file.unlink()  # the loaded tensors still map the old file
    file.write_bytes(damage(content))
    for _ in range(2):
        assert torch.equal(data.load("mnist", root)[0].images, expected)
    assert len(reads) == 2


def test_where_no_cache_can_be_written_the_files_are_read_each_time(tmp_path, monkeypatch, reads):
    def full(tensors, path, texts):
        path.touch()
        raise OSError("disk full")

    monkeypatch.setattr(cache, "save_file", full)
    for number in (1, 2):
        with pytest.warns(UserWarning, match="no cache is kept .*disk full") as caught:
            data.load("mnist", write_mnist(tmp_path))
        assert caught[0].filename == __file__ and len(reads) == number
    assert not list(cache.cache_folder().iterdir()), "no part of a file"
