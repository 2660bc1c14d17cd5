import numpy as np
import pytest
import torch
from made_up import pixels

from pruneutils import data
from pruneutils.data.images import _crop_and_flip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


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


def test_random_batches_ask_for_a_generator(digits):
    with pytest.raises(ValueError, match="torch.Generator"):
        next(digits[0].batches(10))
    with pytest.raises(ValueError, match="torch.Generator"):
        next(digits[0].batches(10, shuffle=False, augment=True))
    with pytest.raises(ValueError, match="batch_size"):
        next(digits[0].batches(0, generator=generator()))
    inputs, _ = next(digits[0].batches(10, shuffle=False))
    assert torch.equal(inputs, next(iter(digits[0]))[0][:10])


@pytest.mark.parametrize("flip", [False, True])
def test_crop_and_flip_are_shifts_over_black_of_whole_images(flip):
    images = torch.from_numpy(pixels(400, 3, 6, 7)) | 1  # never black
    out = _crop_and_flip(images, flip, generator())
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
    with pytest.raises(ValueError, match="per_class asks for 401 images; there are fewer of '0'"):
        digits[0].balanced_batch(401)
    with pytest.raises(ValueError, match="per_class must be a whole number"):
        digits[0].balanced_batch(0)


def test_another_normalisation(digits):
    other = digits[1].with_mean_std([0.5], [0.25])
    inputs, _ = next(iter(other))
    torch.testing.assert_close(inputs, (digits[1].images[:500] / 255 - 0.5) / 0.25)
    assert digits[1].mean == (0.1307,) and other.images is digits[1].images
    with pytest.raises(ValueError, match="each of 1 channels"):
        digits[1].with_mean_std(*data.IMAGENET_MEAN_STD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.tensor([0, 1, 2])}, "labels run from 0 to 2"),
        ({"targets": torch.tensor([0, -1, 1])}, "labels run from -1"),
        ({"targets": torch.tensor([0, 1])}, "3 images need as many"),
        ({"images": torch.zeros(3, 1, 2, 2)}, "uint8"),
        ({"mean": (0.5, 0.5)}, "1 channels"),
        ({"images": torch.zeros(0, 1, 2, 2, dtype=torch.uint8), "targets": torch.zeros(0).long()}, "no images"),
    ],
)
def test_images_that_do_not_fit_together(change, message):
    fine = {
        "images": torch.zeros(3, 1, 2, 2, dtype=torch.uint8),
        "targets": torch.tensor([0, 1, 1]),
        "classes": ("a", "b"),
        "mean": (0.5,),
        "std": (0.5,),
    }
    data.Images(**fine)
    with pytest.raises(ValueError, match=message):
        data.Images(**fine | change)
