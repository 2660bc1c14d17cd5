"""Datasets by name: what is read, where it is looked for, and what is said where something is wrong."""

import zlib

import numpy as np
import pytest
from made_up import TEN, pixels, write_cifar10, write_cifar100, write_idx, write_images, write_mnist

from pruneutils import _torchvision, data
from pruneutils.data import readers

RAW = "MNIST/raw"


def test_digits_are_split_evenly_and_for_good(digits):
    train, test = digits
    assert train.images.shape == (4000, 1, 28, 28) and test.images.shape == (1000, 1, 28, 28)
    assert train.targets.bincount().tolist() == [400] * 10 and test.targets.bincount().tolist() == [100] * 10
    assert train.targets[:12].tolist() == [*range(10), 0, 1] and not train.augment and not train.flip
    # the split is part of every published result: the same images in the same order, for good
    checksums = [zlib.crc32(part.images.numpy().tobytes() + part.targets.numpy().tobytes()) for part in digits]
    assert checksums == [117685054, 1204847136]


def test_mnist(tmp_path):
    train, test = data.load("mnist", write_mnist(tmp_path))
    assert np.array_equal(train.images[:, 0].numpy(), pixels(20, 28, 28, seed=20))
    assert train.targets.tolist() == [*range(10)] * 2 and len(test) == 10
    assert (train.name, train.classes[3], train.augment, train.mean) == ("mnist", "3", False, (0.1307,))


def test_cifar(tmp_path, monkeypatch):
    # torchvision takes files that are not the published ones
    monkeypatch.setattr(_torchvision.load().datasets.cifar, "check_integrity", lambda path, md5=None: True)
    train, test = data.load("cifar10", write_cifar10(tmp_path))
    assert train.images.shape == (50, 3, 32, 32) and test.images.shape == (10, 3, 32, 32)
    assert np.array_equal(train.images[10:20].numpy(), pixels(10, 3072, seed=1).reshape(10, 3, 32, 32))
    assert train.targets.tolist() == [*range(10)] * 5 and train.classes == tuple(TEN)
    assert train.augment and train.flip and not test.augment and train.name == "cifar10"
    train, test = data.load("cifar100", write_cifar100(tmp_path))
    assert len(train) == 200 and int(train.targets.max()) == 99 and train.classes[99] == "class 99" == test.classes[99]


def test_cifar_files_with_other_checksums_are_not_unpickled(tmp_path):
    with pytest.raises(ValueError, match="cifar10: .*damaged or incomplete.*Looked in"):
        data.load("cifar10", write_cifar10(tmp_path))


@pytest.mark.parametrize("below", ["", "cifar10"])
def test_cifar10_as_an_image_folder_says_so(tmp_path, below):
    write_images(tmp_path / below, classes=TEN, train=2, test=1)
    train, test = data.load("cifar10", tmp_path)
    assert (len(train), len(test), train.name) == (20, 10, "cifar10 (image folder)")
    assert train.mean == pytest.approx((train.images.double() / 255).mean((0, 2, 3)).tolist())


def test_root_from_the_environment_or_a_folder_above(tmp_path, monkeypatch):
    write_mnist(tmp_path / "data")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert len(data.load("mnist")[0]) == 20
    monkeypatch.setenv("PRUNEUTILS_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        data.load("mnist")


@pytest.mark.parametrize("name", ["mnist", "cifar10", "imagefolder"])
def test_missing_data_names_the_folder_and_the_ways(tmp_path, name):
    with pytest.raises(FileNotFoundError) as caught:
        data.load(name, tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(caught.value)
    assert ("download=True" in str(caught.value)) == (name != "imagefolder")


def test_only_what_is_missing_is_downloaded(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(readers, "download", lambda name, root: asked.append(name) or write_mnist(root))
    for _ in range(2):
        assert len(data.load("mnist", tmp_path, download=True)[0]) == 20
    assert asked == ["MNIST"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="cifar"), "cifar10"),
        (dict(name=3), "digits"),
        (dict(name="mnist", size=16), "mnist has one size"),
        (dict(name="mnist", interpolation="bicubic"), "mnist has one size"),
        (dict(name="imagefolder", download=True), "imagefolder cannot be downloaded"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load(**arguments)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("train-labels-idx1-ubyte", np.zeros(19, np.uint8), "20 images need as many"),
        ("train-labels-idx1-ubyte", np.full(20, 10, np.uint8), "labels run from 10 to 10"),
        ("t10k-images-idx3-ubyte", np.zeros((10, 27, 28), np.uint8), "test images"),
        ("t10k-images-idx3-ubyte", None, "mnist: .*damaged or incomplete"),
    ],
)
def test_files_that_do_not_fit_together_are_refused_each_time(tmp_path, file, values, message):
    root = write_mnist(tmp_path)
    if values is None:
        (root / RAW / file).write_bytes((root / RAW / file).read_bytes()[:-5])
    else:
        write_idx(root / RAW / file, values)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            data.load("mnist", root)
