import numpy as np
import pytest
import torch
from made_up import TEN, pixels, write_images
from PIL import Image

from pruneutils import data


def test_image_folder(tmp_path):
    root = write_images(tmp_path)
    (root / "train/cat/.DS_Store").write_bytes(b"hidden, and not an image")
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


# pictures of every kind


def write_one(root, image, name="1.png", **options):
    """A folder of one class with one picture."""
    (root / "one").mkdir(parents=True)
    image.save(root / "one" / name, **options)
    return root


def loaded(root, **options):
    """The pixels of the only picture, (height, width, 3)."""
    return data.load_folder(root, **options).images[0].permute(1, 2, 0).numpy()


def test_gray_of_16_bits_is_scaled(tmp_path):
    gray = np.array([[0, 128, 129, 255], [256, 32768, 65406, 65535]], np.uint16)
    found = loaded(write_one(tmp_path, Image.fromarray(gray)))
    assert (found == found[..., :1]).all()
    assert found[..., 0].tolist() == [[0, 0, 1, 1], [1, 128, 254, 255]]


@pytest.mark.parametrize("name", ["1.png", "1.tif"])
def test_every_gray_of_8_bits_survives_16(tmp_path, name):
    gray = np.arange(256, dtype=np.uint16).reshape(16, 16)
    found = loaded(write_one(tmp_path, Image.fromarray(gray * 257), name))
    assert np.array_equal(found[..., 0], gray)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_gray_of_unknown_range_is_refused(tmp_path, mode):
    root = write_one(tmp_path, Image.new(mode, (4, 4), 7), "1.tif")
    with pytest.raises(ValueError, match="one/1.tif cannot be decoded .*32 bits"):
        data.load_folder(root)


def test_black_and_white_gray_and_palettes_are_as_pillow_has_them(tmp_path):
    for mode in ("1", "L", "P", "CMYK"):
        image = Image.fromarray(pixels(9, 9, 3)).convert(mode)
        found = loaded(write_one(tmp_path / mode, image, "1.tif"))
        assert np.array_equal(found, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("background", ["white", "black"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparent_pixels_show_the_background(tmp_path, mode, background):
    hidden, seen = (204, 204, 204), (51, 51, 51)
    image = Image.new("RGB", (2, 1), seen)
    image.putpixel((0, 0), hidden)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(np.array([[0, 255]], np.uint8)))
        root = write_one(tmp_path, image.convert(mode))
    else:
        image = image.convert(mode)
        root = write_one(tmp_path, image, transparency=image.getpixel((0, 0)))
    behind = (255,) * 3 if background == "white" else (0,) * 3
    assert loaded(root, background=background)[0].tolist() == [list(behind), list(seen)]


def test_half_transparent_pixels_are_mixed(tmp_path):
    root = write_one(tmp_path, Image.new("RGBA", (2, 2), (100, 0, 0, 51)))
    assert loaded(root)[0, 0].tolist() == [224, 204, 204]  # a fifth of the colour, four fifths of white
    assert loaded(root, background="black")[0, 0].tolist() == [20, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(tmp_path, orientation):
    values = pixels(3, 5)
    # what a viewer shows, by the first row and the first column of the file (EXIF 2.3, tag 274)
    shown = {
        1: values, 2: values[:, ::-1], 3: values[::-1, ::-1], 4: values[::-1],
        5: values.T, 6: values.T[:, ::-1], 7: values.T[::-1, ::-1], 8: values.T[::-1],
    }[orientation]  # fmt: skip
    image, exif = Image.fromarray(values), Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(loaded(write_one(tmp_path, image, exif=exif))[..., 0], shown)


def test_files_without_the_name_of_an_image_are_skipped_and_told(tmp_path):
    root = write_images(tmp_path)
    for name in ("Thumbs.db", "readme.txt"):
        (root / "train/cat" / name).write_bytes(b"junk")
    (root / "test/dog/more.png").mkdir()
    with pytest.warns(UserWarning) as caught:
        train, test = data.load("imagefolder", root)
    told = [str(warning.message) for warning in caught]
    assert told[0].startswith("skipped 2 without the name of an image file: ") and "cat/Thumbs.db" in told[0]
    assert told[1].startswith("skipped 1 ") and "dog/more.png" in told[1]
    assert {warning.filename for warning in caught} == {__file__}
    assert (len(train), len(test)) == (6, 4)


def test_a_class_of_junk_alone_is_an_error(tmp_path):
    root = write_images(tmp_path)
    (root / "train/notes").mkdir()
    (root / "train/notes/a.txt").write_text("a")
    with pytest.raises(ValueError, match="no images in train/notes"):
        data.load("imagefolder", root)


# one size for all


def ramp(height, width):
    """Pixels that know their place: red is the row, green the column."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8))


def test_a_crop_is_the_centre_of_what_was_scaled(tmp_path):
    root = write_one(tmp_path, ramp(20, 40))
    found = loaded(root, size=10, crop=0.5)  # covers 20 x 20, so nothing is scaled
    assert np.array_equal(found, np.asarray(ramp(20, 40))[5:15, 15:25])
    found = loaded(root, size=(10, 20), crop=1.0, interpolation="bicubic")
    assert np.array_equal(found, np.asarray(ramp(20, 40).resize((20, 10), Image.Resampling.BICUBIC)))


def test_a_crop_is_that_of_torchvision(tmp_path):
    from pruneutils import _torchvision

    transforms = _torchvision.load().transforms
    image = Image.fromarray(pixels(61, 47, 3))
    bicubic = transforms.Compose(
        [transforms.Resize(36, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(32)]
    )
    found = loaded(write_one(tmp_path, image), size=32, crop=0.875, interpolation="bicubic")
    assert np.array_equal(found, np.asarray(bicubic(image)))


def test_a_folder_without_split(tmp_path):
    root = write_images(tmp_path)
    images = data.load_folder(root / "train")
    train, _ = data.load("imagefolder", root)
    assert torch.equal(images.images, train.images) and torch.equal(images.targets, train.targets)
    assert (images.classes, images.name, images.augment) == (("cat", "dog"), "train", False)
    assert images.mean == train.mean
    assert torch.equal(data.load_folder(root / "train", size=8).images, data.load_folder(root / "train", size=8).images)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.load_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no images in .*/test.*imagefolder"):
        data.load_folder(root)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"size": "32"}, "size must be a whole number"),
        ({"size": (32, 0)}, "size must be a whole number"),
        ({"size": (1, 2, 3)}, "size must be"),
        ({"crop": 0.5}, "crop .* needs a size"),
        ({"size": 8, "crop": 0}, r"crop must be a fraction in \(0, 1\]"),
        ({"size": 8, "crop": 1.5}, "crop must be"),
        ({"size": 8, "interpolation": "cubic"}, "interpolation 'cubic'; did you mean 'bicubic'"),
        ({"background": "grey"}, "background 'grey'; known: white, black"),
    ],
)
def test_wrong_options_are_told_before_anything_is_read(tmp_path, options, told):
    for call in (data.load_folder, lambda root, **options: data.load("imagefolder", root, **options)):
        with pytest.raises(ValueError, match=told):
            call(tmp_path / "nowhere", **options)
