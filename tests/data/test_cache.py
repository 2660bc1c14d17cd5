import os

import numpy as np
import pytest
import torch
from made_up import pixels, write_idx, write_mnist
from safetensors.torch import load_file, save_file

from pruneutils import _safetensors, data
from pruneutils.data import cache, readers


@pytest.fixture
def no_reading(monkeypatch):
    """Call it to have every further reading of MNIST's files fail."""
    return lambda: monkeypatch.setattr(readers, "_read_idx", lambda *_: pytest.fail("read again"))


def cached_files():
    folder = cache.cache_folder()
    return sorted(folder.iterdir()) if folder.is_dir() else []


def test_it_lies_where_the_user_wants_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "pruneutils"


def test_it_follows_the_files(tmp_path, monkeypatch):
    root = write_mnist(tmp_path)
    data.load("mnist", root)
    (file,) = cached_files()
    with monkeypatch.context() as patch:
        patch.setattr(readers, "_read_idx", lambda *_: pytest.fail("read again"))
        data.load("mnist", root)
    write_idx(root / "MNIST/raw/train-images-idx3-ubyte", np.full((20, 28, 28), 7, np.uint8))
    assert (data.load("mnist", root)[0].images == 7).all()
    assert cached_files() == [file]


@pytest.mark.skipif(os.name != "posix", reason="needs the time of change")
@pytest.mark.parametrize("how", ["written over", "another file in its place"])
def test_a_file_of_the_same_size_and_time_is_noticed(tmp_path, how):
    root = write_mnist(tmp_path)
    data.load("mnist", root)
    path = root / "MNIST/raw/train-images-idx3-ubyte"
    before, target = path.stat(), path if how == "written over" else path.with_name("new")
    write_idx(target, np.full((20, 28, 28), 7, np.uint8))
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
    target.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert (data.load("mnist", root)[0].images == 7).all()


def flip_a_pixel(content):
    """Of an image in the middle: header and length stay as they are."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b[:-9], lambda b: b"x" * len(b), lambda b: b"\0" * 16 + b[16:], flip_a_pixel],
)
def test_a_broken_one_is_rebuilt(tmp_path, no_reading, damage):
    root = write_mnist(tmp_path)
    expected = data.load("mnist", root)[0].images.clone()
    (file,) = cached_files()
    damaged = damage(file.read_bytes())
    file.unlink()  # the loaded tensors still map the old file
    file.write_bytes(damaged)
    assert torch.equal(data.load("mnist", root)[0].images, expected)
    no_reading()
    assert torch.equal(data.load("mnist", root)[0].images, expected)


@pytest.mark.parametrize("tensors", [{"labels": torch.zeros(3, dtype=torch.int64)}, {}])
def test_one_that_is_whole_but_holds_something_else_is_rebuilt(tmp_path, tensors):
    root = write_mnist(tmp_path)
    expected = data.load("mnist", root)[0].images.clone()
    (file,) = cached_files()
    _, texts = _safetensors.read(file)
    _safetensors.write(file, tensors, texts)
    assert torch.equal(data.load("mnist", root)[0].images, expected)


def test_one_without_a_checksum_is_not_believed(tmp_path):
    root = write_mnist(tmp_path)
    data.load("mnist", root)
    (file,) = cached_files()
    _, texts = _safetensors.read(file)
    tensors = load_file(file) | {"images": torch.zeros(20, 1, 28, 28, dtype=torch.uint8)}
    save_file(tensors, file, {name: text for name, text in texts.items() if name != _safetensors.CHECKSUM})
    assert np.array_equal(data.load("mnist", root)[0].images[:, 0], pixels(20, 28, 28, seed=20))


def test_where_none_can_be_written_the_files_are_read_each_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="no cache is kept") as caught:
        train, _ = data.load("mnist", write_mnist(tmp_path))
    assert len(train) == 20 and caught[0].filename == __file__


@pytest.mark.parametrize("error", [OSError, _safetensors.SafetensorError])
def test_no_part_is_left_where_writing_fails(tmp_path, monkeypatch, error):
    def save(*_):
        raise error("disk full")

    monkeypatch.setattr(_safetensors, "save_file", save)
    with pytest.warns(UserWarning, match="disk full"):
        data.load("mnist", write_mnist(tmp_path))
    assert cached_files() == []
