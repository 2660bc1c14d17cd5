"""Labelled images as uint8 tensors on one device; crop, flip and normalisation happen there, a batch at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from .._checks import whole

Batch = tuple[torch.Tensor, torch.Tensor]

IMAGENET_MEAN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what most pretrained networks were trained with


@dataclass(frozen=True, eq=False, repr=False)
class Images:
    """Labelled images on one device: iterate for normalised batches in order, use `batches` for training.

    Each batch is (inputs, targets): float32 (n, C, H, W), that is (image / 255 - mean) / std, and int64 (n,).

    Args:
        images: Pixels, a uint8 tensor (N, C, H, W).
        targets: Classes, an int64 tensor (N,) of indices into `classes`.
        classes: The names of the classes.
        mean: One number per channel, of images scaled to [0, 1].
        std: One number per channel, of images scaled to [0, 1].
        name: What `repr` shows.
        augment: Whether `batches` crops (and flips) unless told otherwise.
        flip: Whether the mirror image belongs to the same class.

    Raises:
        ValueError: If these do not fit together.

    Example:
        >>> pixels = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)
        >>> pu.data.Images(pixels, torch.tensor([0, 1, 0, 1, 0, 1]), ("cat", "dog"), mean=(0.5,), std=(0.5,))
        Images(images: 6 of 1x8x8, 2 classes, on cpu)
    """

    images: torch.Tensor
    targets: torch.Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str = "images"
    augment: bool = False
    flip: bool = False

    def __post_init__(self):
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise ValueError(f"images must be uint8 (N, C, H, W), got {self.images.dtype} {tuple(self.images.shape)}")
        if self.targets.dtype != torch.int64 or self.targets.shape != self.images.shape[:1]:
            raise ValueError(
                f"{len(self.images)} images need as many int64 labels, got {self.targets.dtype} "
                f"{tuple(self.targets.shape)}"
            )
        if len(self) == 0:
            raise ValueError("no images")
        low, high = int(self.targets.min()), int(self.targets.max())
        if low < 0 or high >= len(self.classes):
            raise ValueError(f"labels run from {low} to {high}, but there are {len(self.classes)} classes")
        if not len(self.mean) == len(self.std) == self.images.shape[1]:
            raise ValueError(f"mean and std need one number for each of {self.images.shape[1]} channels")
        if not all(std > 0 for std in self.std):
            raise ValueError(f"std must be above 0 in every channel, not {self.std}")

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.images.shape[1:]))
        return f"Images({self.name}: {len(self):,} of {shape}, {len(self.classes)} classes, on {self.images.device})"

    def __iter__(self) -> Iterator[Batch]:
        for images, targets in zip(self.images.split(500), self.targets.split(500), strict=True):
            yield self._normalised(images), targets

    def batches(
        self,
        batch_size: int = 128,
        shuffle: bool = True,
        augment: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Batch]:
        """Yield normalised training batches; the same state of the generator gives the same batches.

        Args:
            batch_size: Images in a batch; the last one may be smaller.
            shuffle: Take the images in random order.
            augment: Shift each image by up to 4 pixels over a black border and, where the dataset allows it, mirror it
                at random. None: as the dataset is marked.
            generator: What the random numbers are drawn from, one for the whole training.

        Raises:
            ValueError: If something is random and there is no generator, or `batch_size` is no whole number above 0.

        Example:
            >>> train, test = pu.data.load("digits")
            >>> source = torch.Generator().manual_seed(0)
            >>> inputs, targets = next(train.batches(64, generator=source))
            >>> inputs.shape
            torch.Size([64, 1, 28, 28])
        """
        augment = self.augment if augment is None else augment
        whole("batch_size", batch_size)
        if generator is None and (shuffle or augment):
            raise ValueError(
                "shuffle and augment draw from a generator, one for the whole training: "
                "generator=torch.Generator().manual_seed(seed)"
            )
        return self._batches(batch_size, shuffle, augment, generator)

    def _batches(self, batch_size, shuffle, augment, generator):
        order = _permutation(len(self), generator) if shuffle else torch.arange(len(self))
        for chosen in order.to(self.images.device).split(batch_size):
            images = self.images[chosen]
            if augment:
                images = _crop_and_flip(images, self.flip, generator)
            yield self._normalised(images), self.targets[chosen]

    def subset(self, n_or_indices: int | Sequence[int] | torch.Tensor, seed: int = 0) -> "Images":
        """Return some of the images.

        Args:
            n_or_indices: How many to draw, or the indices of those wanted, in that order.
            seed: Decides which ones are drawn.

        Raises:
            ValueError: If there are not so many images.

        Example:
            >>> train, test = pu.data.load("digits")
            >>> train.subset(100)
            Images(digits: 100 of 1x28x28, 10 classes, on cpu)
        """
        if isinstance(n_or_indices, int):
            if isinstance(n_or_indices, bool) or not 1 <= n_or_indices <= len(self):
                raise ValueError(f"n must lie between 1 and the number of images, {len(self)}, got {n_or_indices}")
            chosen = _permutation(len(self), torch.Generator().manual_seed(seed))[:n_or_indices]
        else:
            chosen = torch.as_tensor(n_or_indices)
        chosen = chosen.to(self.images.device)
        return replace(self, images=self.images[chosen], targets=self.targets[chosen])

    def batch(self, n: int, seed: int = 0) -> Batch:
        """Return one (inputs, targets) pair of `n` different images drawn by the seed, not augmented.

        Raises:
            ValueError: If there are not so many images.

        Example:
            >>> train, test = pu.data.load("digits")
            >>> inputs, targets = train.batch(100, seed=1)
            >>> inputs.dtype, tuple(targets.shape)
            (torch.float32, (100,))
        """
        some = self.subset(n, seed)
        return some._normalised(some.images), some.targets

    def balanced_batch(self, per_class: int, seed: int = 0) -> Batch:
        """Return one (inputs, targets) pair with equally many images of each class, the classes taking turns.

        Args:
            per_class: Images of each class.
            seed: Decides which ones are drawn.

        Raises:
            ValueError: If a class has fewer images.

        Example:
            >>> train, test = pu.data.load("digits")
            >>> inputs, targets = train.balanced_batch(2)
            >>> targets.tolist()
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        """
        whole("per_class", per_class)
        order = _permutation(len(self), torch.Generator().manual_seed(seed))
        shuffled = self.targets.cpu()[order]
        columns = [order[shuffled == label][:per_class] for label in range(len(self.classes))]
        for name, column in zip(self.classes, columns, strict=True):
            if len(column) < per_class:
                raise ValueError(f"per_class asks for {per_class} images; {name!r} has {len(column)}")
        some = self.subset(torch.stack(columns, dim=1).flatten())
        return some._normalised(some.images), some.targets

    def to(self, device: torch.device | str) -> "Images":
        """Return the same images on another device."""
        return replace(self, images=self.images.to(device), targets=self.targets.to(device))

    def with_mean_std(self, mean: Sequence[float], std: Sequence[float]) -> "Images":
        """Return the same images with another normalisation, such as the one that a pretrained network expects.

        Args:
            mean: One number per channel, of images scaled to [0, 1].
            std: One number per channel, of images scaled to [0, 1].

        Raises:
            ValueError: If there is not one number per channel, or an `std` is not above 0.

        Example:
            >>> train, test = pu.data.load("digits")
            >>> inputs, _ = next(iter(test.with_mean_std([0.5], [0.5])))
            >>> inputs.min().item(), inputs.max().item()
            (-1.0, 1.0)
        """
        return replace(self, mean=tuple(mean), std=tuple(std))

    def _normalised(self, images):
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return images.float().div_(255).sub_(mean).div_(std)


def mean_std(images: torch.Tensor) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel of uint8 images, scaled to [0, 1], exactly: from value counts."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(dim=1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        means.append(mean.item())
        stds.append((share * (values - mean) ** 2).sum().sqrt().item() or 1.0)  # a channel of one value stays finite
    return means, stds


def _permutation(n, generator):
    return torch.randperm(n, generator=generator, device=generator.device)


def _crop_and_flip(images, flip, generator, pad=4):
    """Shift each of (n, C, H, W) images by up to `pad` pixels over black and, with `flip`, mirror it by chance."""
    n, _, height, width = images.shape
    draw = partial(torch.randint, size=(n, 1), generator=generator, device=generator.device)
    rows = draw(0, 2 * pad + 1).to(images.device) + torch.arange(height, device=images.device)
    columns = draw(0, 2 * pad + 1).to(images.device) + torch.arange(width, device=images.device)
    if flip:
        columns = torch.where(draw(0, 2).to(images.device) == 1, columns.flip(1), columns)
    which = torch.arange(n, device=images.device)[:, None, None]
    # indices around a slice put the channels last
    cropped = F.pad(images, (pad,) * 4)[which, :, rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2).contiguous()
