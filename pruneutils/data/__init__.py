"""Image datasets as uint8 tensors on the device; crop, flip and normalisation happen there, a batch at a time."""

from .images import IMAGENET_MEAN_STD, Images, load

__all__ = ["IMAGENET_MEAN_STD", "Images", "load"]
