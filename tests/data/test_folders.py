"""Image folders: which files count, and how each picture becomes pixels."""

import numpy as np
import pytest
import torch
from made_up import pixels, write_images
from PIL import Image

from pruneutils import _torchvision, data


def write_one(root, image, name="1.png", **options):
    """A folder of one class with one picture."""
    (root / "one").mkdir(parents=True)
    image.save(root / "one" / name, **options)
    return root


def loaded(root, **options):
    """The pixels of the only picture, (height, width, 3)."""
    return data.load_folder(root, **options).images[0].permute(1, 2, 0).numpy()


def test_image_folder(tmp_path):
    root = write_images(tmp_path)
    for name in (".DS_Store", "._1.png", "Thumbs.db"):
        (root / "train/cat" / name).write_bytes(b"hidden, or not an image")
    train, test = data.load("imagefolder", root)
    assert (len(train), len(test), train.classes) == (6, 4, ("cat", "dog"))
    assert np.array_equal(train.images[3].permute(1, 2, 0).numpy(), pixels(32, 32, 3, seed=1000))
    scaled = train.images.double() / 255
    assert train.mean == pytest.approx(scaled.mean((0, 2, 3)).tolist()) and test.mean == train.mean
    assert train.std == pytest.approx(scaled.transpose(0, 1).flatten(1).std(1, correction=0).tolist())
    assert train.augment and train.flip and not test.augment
    assert data.load("imagefolder", root, size=8)[1].images.shape == (4, 3, 8, 8)


def test_a_folder_without_split(tmp_path):
    root = write_images(tmp_path)
    images, (train, _) = data.load_folder(root / "train"), data.load("imagefolder", root)
    assert torch.equal(images.images, train.images) and torch.equal(images.targets, train.targets)
    assert (images.classes, images.name, images.augment, images.mean) == (("cat", "dog"), "train", False, train.mean)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.load_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (lambda root: (root / "test/dog").rename(root / "test/wolf"), "imagefolder", "folders: dog, wolf in one only"),
        (lambda root: (root / "train/bird").mkdir(), "imagefolder", "bird"),
        (lambda root: None, "cifar10", "2 class folders instead of 10"),
        (lambda root: (root / "train/dog/1.png").write_bytes(b"x"), "imagefolder", "dog/1.png cannot be decoded"),
        (
            lambda root: Image.fromarray(pixels(32, 31, 3)).save(root / "test/dog/1.png"),
            "imagefolder",
            r"test/dog/1.png has \(32, 31\) pixels, others \(32, 32\); size=",
        ),
    ],
)
def test_folders_that_do_not_fit(tmp_path, change, name, message):
    change(write_images(tmp_path))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.load(name, tmp_path)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_gray_palettes_and_print_colours_are_as_pillow_has_them(tmp_path, mode):
    image = Image.fromarray(pixels(9, 9, 3)).convert(mode)
    assert np.array_equal(loaded(write_one(tmp_path, image, "1.tif")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("image", [Image.fromarray(np.zeros((4, 4), np.uint16)), Image.new("F", (4, 4), 7)])
def test_more_than_8_bits_are_refused(tmp_path, image):
    with pytest.raises(ValueError, match="one/1.tif cannot be decoded .*more than 8 bits"):
        data.load_folder(write_one(tmp_path, image, "1.tif"))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_white(tmp_path, mode):
    image = Image.new("RGB", (2, 1), (51, 51, 51))
    image.putalpha(Image.fromarray(np.array([[0, 255]], np.uint8)))
    assert loaded(write_one(tmp_path, image.convert(mode)))[0].tolist() == [[255] * 3, [51] * 3]


def test_pictures_stand_upright(tmp_path):
    values, exif = pixels(3, 5), Image.Exif()
    exif[0x0112] = 6  # the first row of the file is the right side of the picture (EXIF 2.3, tag 274)
    assert np.array_equal(loaded(write_one(tmp_path, Image.fromarray(values), exif=exif))[..., 0], values.T[:, ::-1])


def test_a_crop_is_that_of_torchvision(tmp_path):
    transforms = _torchvision.load().transforms
    image = Image.fromarray(pixels(61, 47, 3))
    resize = transforms.Resize(36, transforms.InterpolationMode.BICUBIC)
    found = loaded(write_one(tmp_path, image), size=32, crop=0.875, interpolation="bicubic")
    assert np.array_equal(found, np.asarray(transforms.CenterCrop(32)(resize(image))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "32"}, "size must be a whole number"),
        ({"size": 0}, "size must be a whole number"),
        ({"crop": 0.5}, "crop must be a fraction .* beside a size"),
        ({"size": 8, "crop": 1.5}, r"crop must be a fraction in \(0, 1\]"),
        ({"size": 8, "interpolation": "cubic"}, "'cubic'"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(tmp_path, options, message):
    for call in (data.load_folder, lambda root, **options: data.load("imagefolder", root, **options)):
        with pytest.raises(ValueError, match=message):
            call(tmp_path / "nowhere", **options)
