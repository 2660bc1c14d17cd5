import gzip
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from pruneutils import _torchvision, data
from pruneutils.data import readers

TEN = [f"class {number}" for number in range(10)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("PRUNEUTILS_DATA", raising=False)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("digits")))
        return data.load("digits")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def cached_files():
    folder = readers._cache_folder()
    return sorted(folder.iterdir()) if folder.is_dir() else []


def write_idx(path, values, compress=False):
    content = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    if compress:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def write_mnist(root, compress=False):
    for part, n in (("train", 20), ("t10k", 10)):
        write_idx(root / f"MNIST/raw/{part}-images-idx3-ubyte", pixels(n, 28, 28, seed=n), compress)
        write_idx(root / f"MNIST/raw/{part}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8) % 10, compress)
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


def write_images(root, classes=("cat", "dog"), train=3, test=2, size=(32, 32)):
    for part, n in (("train", train), ("test", test)):
        for index, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for number in range(n):
                image = pixels(*size, 3, seed=1000 * index + 10 * number + (part == "test"))
                Image.fromarray(image).save(root / part / name / f"{number}.png")
    return root


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


def test_digits_come_from_the_cache_the_second_time(digits, monkeypatch):
    data.load("digits")
    monkeypatch.setattr(datasets, "read_digits", lambda: pytest.fail("read again"))
    again = data.load("digits")
    assert all(torch.equal(a.images, b.images) for a, b in zip(digits, again, strict=True))
    assert not again[0].augment and not again[0].flip


# what an Images does


def test_batches_in_order_are_normalised(digits):
    _, test = digits
    inputs, targets = (torch.cat(part) for part in zip(*test, strict=True))
    assert inputs.dtype == torch.float32 and torch.equal(targets, test.targets)
    torch.testing.assert_close(inputs.double(), (test.images.double() / 255 - 0.1307) / 0.3081, rtol=1e-5, atol=1e-6)


def test_training_batches_repeat_with_the_seed_and_leave_the_global_state_alone(digits):
    train = digits[0].subset(300)
    state = torch.get_rng_state()

    def draw(seed):
        return list(train.batches(64, augment=True, generator=generator(seed)))

    one, same, other = draw(1), draw(1), draw(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(targets) for _, targets in one] == [64, 64, 64, 64, 44]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0][0], other[0][0])


def test_one_generator_gives_new_batches_each_epoch_and_each_image_once(digits):
    train, source = digits[0], generator()
    epochs = [torch.cat([inputs for inputs, _ in train.batches(128, generator=source)]) for _ in range(2)]
    assert not torch.equal(*epochs)
    expected = torch.cat([inputs for inputs, _ in train])
    for epoch in epochs:
        assert torch.equal(epoch.double().sum((1, 2, 3)).sort().values, expected.double().sum((1, 2, 3)).sort().values)


def test_random_batches_ask_for_a_generator(digits):
    with pytest.raises(ValueError, match="torch.Generator"):
        digits[0].batches(10)
    with pytest.raises(ValueError, match="torch.Generator"):
        digits[0].batches(10, shuffle=False, augment=True)
    with pytest.raises(ValueError, match="batch_size"):
        digits[0].batches(0, generator=generator())
    inputs, _ = next(digits[0].batches(10, shuffle=False))
    assert torch.equal(inputs, next(iter(digits[0]))[0][:10])


@pytest.mark.parametrize("flip", [False, True])
def test_crop_and_flip_are_shifts_over_black_of_whole_images(flip):
    images = torch.from_numpy(pixels(400, 3, 6, 7)) | 1  # never black
    out = data._crop_and_flip(images, flip, generator())
    assert out.shape == images.shape and out.dtype == torch.uint8 and out.is_contiguous()
    seen = set()
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    for before, after in zip(padded, out, strict=True):
        for down, right, mirrored in np.ndindex(9, 9, 2):
            window = before[:, down : down + 6, right : right + 7]
            if torch.equal(window.flip(2) if mirrored else window, after):
                seen.add((down, right, mirrored))
                break
        else:
            pytest.fail("not a shifted image")
    assert {down for down, _, _ in seen} == {right for _, right, _ in seen} == set(range(9))
    assert {mirrored for _, _, mirrored in seen} == ({0, 1} if flip else {0})


def test_subset_and_batch(digits):
    train = digits[0]
    some = train.subset(50, seed=3)
    assert len(some) == 50 and torch.equal(some.images, train.subset(50, seed=3).images)
    assert not torch.equal(some.images, train.subset(50, seed=4).images)
    assert torch.equal(train.subset([7, 3]).images, train.images[[7, 3]])
    inputs, targets = train.batch(50, seed=3)
    assert torch.equal(targets, some.targets) and torch.equal(inputs, next(iter(some))[0])
    for n in (0, 4001):
        with pytest.raises(ValueError, match=f"4000, got {n}"):
            train.batch(n)


def test_balanced_batch(digits):
    inputs, targets = digits[0].balanced_batch(10, seed=1)
    assert inputs.shape == (100, 1, 28, 28) and targets.tolist() == list(range(10)) * 10
    assert not torch.equal(inputs, digits[0].balanced_batch(10, seed=2)[0])
    with pytest.raises(ValueError, match="per_class .* got 401"):
        digits[0].balanced_batch(401)


def test_repr(digits):
    assert repr(digits[1]) == "Images(digits: 1,000 of 1x28x28, 10 classes, on cpu)"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"targets": torch.tensor([0, 1, 2])}, "labels run from 0 to 2"),
        ({"targets": torch.tensor([0, -1, 1])}, "labels run from -1"),
        ({"targets": torch.tensor([0, 1])}, "3 images need as many"),
        ({"images": torch.zeros(3, 1, 2, 2)}, "uint8"),
        ({"mean": (0.5, 0.5)}, "1 channels"),
        ({"images": torch.zeros(0, 1, 2, 2, dtype=torch.uint8), "targets": torch.zeros(0).long()}, "no images"),
    ],
)
def test_images_that_do_not_fit_together(change, told):
    fine = {
        "images": torch.zeros(3, 1, 2, 2, dtype=torch.uint8),
        "targets": torch.tensor([0, 1, 1]),
        "classes": ("a", "b"),
        "mean": (0.5,),
        "std": (0.5,),
    }
    data.Images(**fine)
    with pytest.raises(ValueError, match=told):
        data.Images(**fine | change)


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


def test_image_folder(tmp_path):
    root = write_images(tmp_path)
    (root / "train/cat/.DS_Store").write_bytes(b"not an image")
    train, test = data.load("imagefolder", root)
    assert (len(train), len(test), train.classes) == (6, 4, ("cat", "dog"))
    assert np.array_equal(train.images[3].permute(1, 2, 0).numpy(), pixels(32, 32, 3, seed=1000))
    scaled = train.images.double() / 255
    assert train.mean == pytest.approx(scaled.mean((0, 2, 3)).tolist()) and test.mean == train.mean
    assert train.std == pytest.approx(scaled.transpose(0, 1).flatten(1).std(1, correction=0).tolist())
    assert train.augment and train.flip and not test.augment


def test_image_folder_resized(tmp_path):
    write_images(tmp_path, size=(20, 30))
    assert data.load("imagefolder", tmp_path)[0].images.shape == (6, 3, 20, 30)
    assert data.load("imagefolder", tmp_path, size=8)[0].images.shape == (6, 3, 8, 8)
    assert data.load("imagefolder", tmp_path, size=(8, 12))[1].images.shape == (4, 3, 8, 12)


@pytest.mark.parametrize("below", ["", "cifar10"])
def test_cifar10_as_an_image_folder_says_so(tmp_path, below):
    write_images(tmp_path / below, classes=TEN, train=2, test=1)
    train, test = data.load("cifar10", tmp_path)
    assert (len(train), len(test), train.name) == (20, 10, "cifar10 (image folder)")


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


def test_options_that_do_not_apply():
    with pytest.raises(ValueError, match="size"):
        data.load("mnist", size=16)
    with pytest.raises(ValueError, match="cannot be downloaded"):
        data.load("imagefolder", download=True)


def test_download_only_when_asked_and_only_what_is_missing(tmp_path, monkeypatch):
    asked = []

    def fetch(url, root, filename=None, md5=None):
        asked.append(filename)
        write_mnist(tmp_path)

    utils = _torchvision.load().readers.utils
    monkeypatch.setattr(utils, "download_and_extract_archive", fetch)
    with pytest.raises(FileNotFoundError):
        data.load("mnist", tmp_path)
    assert asked == []
    assert len(data.load("mnist", tmp_path, download=True)[0]) == 20
    assert sorted(asked) == sorted(f"{stem}.gz" for stem in MNIST_FILES)
    data.load("mnist", tmp_path, download=True)
    assert len(asked) == 4


MNIST_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def test_failed_download_is_told(tmp_path, monkeypatch):
    def fetch(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(_torchvision.load().readers.utils, "download_and_extract_archive", fetch)
    with pytest.raises(ValueError, match=r"cifar10: no route to host. Looked in .*Put the data there"):
        data.load("cifar10", tmp_path, download=True)


# broken data


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize("stem", MNIST_FILES)
@pytest.mark.parametrize("compress", [False, True])
def test_truncated_mnist(tmp_path, stem, compress):
    root = write_mnist(tmp_path, compress)
    truncate(root / "MNIST/raw" / (f"{stem}.gz" if compress else stem))
    with pytest.raises(ValueError, match=f"mnist: {stem}.*Looked in .*download=True"):
        data.load("mnist", root)
    assert cached_files() == []


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
        ([1, 2], "holds no 'data'"),
    ],
)
def test_mixed_up_cifar(tmp_path, content, told):
    root = write_cifar10(tmp_path)
    write_pickle(root / "cifar-10-batches-py/data_batch_2", content)
    with pytest.raises(ValueError, match=told):
        data.load("cifar10", root)


def test_truncated_cifar(tmp_path):
    root = write_cifar10(tmp_path)
    truncate(root / "cifar-10-batches-py/test_batch")
    with pytest.raises(ValueError, match="test_batch is truncated"):
        data.load("cifar10", root)


def test_image_folder_of_another_number_of_classes_is_not_cifar10(tmp_path):
    with pytest.raises(ValueError, match="2 class folders instead of 10"):
        data.load("cifar10", write_images(tmp_path))


def test_class_folders_that_differ(tmp_path):
    root = write_images(tmp_path)
    (root / "test/dog").rename(root / "test/wolf")
    with pytest.raises(ValueError, match="different class folders: dog, wolf"):
        data.load("imagefolder", root)


def test_empty_class_folder(tmp_path):
    root = write_images(tmp_path)
    (root / "train/bird").mkdir()
    with pytest.raises(ValueError, match="no images in train/bird"):
        data.load("imagefolder", root)


@pytest.mark.parametrize("damage", ["garbage", "cut"])
def test_image_that_cannot_be_decoded_is_named(tmp_path, damage):
    path = write_images(tmp_path) / "train/dog/1.png"
    path.write_bytes(b"no image" if damage == "garbage" else path.read_bytes()[:200])
    with pytest.raises(ValueError, match="train/dog/1.png cannot be decoded"):
        data.load("imagefolder", tmp_path)


def test_image_of_another_size_is_named(tmp_path):
    path = write_images(tmp_path) / "test/dog/1.png"
    Image.fromarray(pixels(32, 31, 3)).save(path)
    with pytest.raises(ValueError, match=r"test/dog/1.png has \(32, 31\) pixels, others \(32, 32\); size="):
        data.load("imagefolder", tmp_path)


# the cache


def test_cache_follows_the_files(tmp_path, monkeypatch):
    root = write_mnist(tmp_path)
    data.load("mnist", root)
    (cache,) = cached_files()
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "_read_idx", lambda *_: pytest.fail("read again"))
        data.load("mnist", root)
    write_idx(root / "MNIST/raw/train-images-idx3-ubyte", np.full((20, 28, 28), 7, np.uint8))
    assert (data.load("mnist", root)[0].images == 7).all()
    assert cached_files() == [cache]


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:-9], lambda b: b"x" * len(b), lambda b: b"\0" * 16 + b[16:]]
)
def test_broken_cache_is_rebuilt(tmp_path, monkeypatch, damage):
    root = write_mnist(tmp_path)
    before = data.load("mnist", root)[0]
    expected = before.images.clone()
    (cache,) = cached_files()
    damaged = damage(cache.read_bytes())
    cache.unlink()  # the loaded tensors still map the old file
    cache.write_bytes(damaged)
    assert torch.equal(data.load("mnist", root)[0].images, expected)
    monkeypatch.setattr(datasets, "_read_idx", lambda *_: pytest.fail("read again"))
    assert torch.equal(data.load("mnist", root)[0].images, expected)


def test_cache_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="no cache kept"):
        train, _ = data.load("mnist", write_mnist(tmp_path))
    assert len(train) == 20


def test_no_part_is_left_where_writing_fails(tmp_path, monkeypatch):
    def save(tensors, path, metadata):
        raise OSError("disk full")

    monkeypatch.setattr(datasets, "save_file", save)
    with pytest.warns(UserWarning, match="disk full"):
        data.load("mnist", write_mnist(tmp_path))
    assert cached_files() == []
