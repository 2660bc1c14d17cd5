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
    """

    images: torch.Tensor  # pixels, uint8 (N, C, H, W)
    targets: torch.Tensor  # classes, int64 (N,), indices into `classes`
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # a number per channel, of images scaled to [0, 1]
    std: tuple[float, ...]
    name: str = "images"  # what `repr` shows
    augment: bool = False  # whether `batches` crops (and flips) by default
    flip: bool = False  # whether the mirror image belongs to the same class

    def __post_init__(self):
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise ValueError(f"images must be uint8 (N, C, H, W), got {self.images.dtype} {tuple(self.images.shape)}")
        if self.targets.dtype != torch.int64 or self.targets.shape != self.images.shape[:1]:
            given = f"{self.targets.dtype} {tuple(self.targets.shape)}"
            raise ValueError(f"{len(self.images)} images need as many int64 labels, got {given}")
        if len(self) == 0:
            raise ValueError("no images")
        low, high = int(self.targets.min()), int(self.targets.max())
        if low < 0 or high >= len(self.classes):
            raise ValueError(f"labels run from {low} to {high}, but there are {len(self.classes)} classes")
        if not len(self.mean) == len(self.std) == self.images.shape[1]:
            raise ValueError(f"mean and std need one number for each of {self.images.shape[1]} channels")

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
        """Yield normalised batches; `augment` shifts images by up to 4 pixels and, with `flip`, mirrors some."""
        augment = self.augment if augment is None else augment
        whole("batch_size", batch_size)
        if generator is None and (shuffle or augment):
            raise ValueError("shuffle and augment draw random numbers; give generator=torch.Generator().manual_seed(0)")
        order = _permutation(len(self), generator) if shuffle else torch.arange(len(self))
        for chosen in order.to(self.images.device).split(batch_size):
            images = self.images[chosen]
            if augment:
                images = _crop_and_flip(images, self.flip, generator)
            yield self._normalised(images), self.targets[chosen]

    def subset(self, n_or_indices: int | Sequence[int] | torch.Tensor, seed: int = 0) -> "Images":
        """Return some of the images: `n` that the seed draws, or those of the given indices, in that order."""
        if isinstance(n_or_indices, int):
            if not 1 <= n_or_indices <= len(self):
                raise ValueError(f"n must lie between 1 and the number of images, {len(self)}, got {n_or_indices}")
            chosen = _permutation(len(self), torch.Generator().manual_seed(seed))[:n_or_indices]
        else:
            chosen = torch.as_tensor(n_or_indices)
        chosen = chosen.to(self.images.device)
        return replace(self, images=self.images[chosen], targets=self.targets[chosen])

    def batch(self, n: int, seed: int = 0) -> Batch:
        """Return one (inputs, targets) pair of `n` different images drawn by the seed, not augmented."""
        some = self.subset(n, seed)
        return some._normalised(some.images), some.targets

    def balanced_batch(self, per_class: int, seed: int = 0) -> Batch:
        """Return one (inputs, targets) pair of `per_class` images drawn of each class, the classes taking turns."""
        whole("per_class", per_class)
        order = _permutation(len(self), torch.Generator().manual_seed(seed))
        shuffled = self.targets.cpu()[order]
        columns = [order[shuffled == label][:per_class] for label in range(len(self.classes))]
        if rare := [name for name, column in zip(self.classes, columns) if len(column) < per_class]:
            raise ValueError(f"per_class asks for {per_class} images; there are fewer of {rare[0]!r}")
        some = self.subset(torch.stack(columns, dim=1).flatten())
        return some._normalised(some.images), some.targets

    def to(self, device: torch.device | str) -> "Images":
        """Return the same images on another device."""
        return replace(self, images=self.images.to(device), targets=self.targets.to(device))

    def with_mean_std(self, mean: Sequence[float], std: Sequence[float]) -> "Images":
        """Return the same images with the normalisation that a pretrained network expects, a number per channel."""
        return replace(self, mean=tuple(mean), std=tuple(std))

    def _normalised(self, images):
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return images.float().div_(255).sub_(mean).div_(std)


def mean_std(images: torch.Tensor) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel of uint8 images, scaled to [0, 1], exactly: from value counts."""
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = torch.stack([torch.bincount(c.flatten(), minlength=256).double() / c.numel() for c in images.unbind(1)])
    means = shares @ values
    stds = (shares * (values - means[:, None]) ** 2).sum(1).sqrt()
    return means.tolist(), [std or 1.0 for std in stds.tolist()]  # a channel of one value stays finite


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
