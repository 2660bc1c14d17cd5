"""Image datasets as uint8 tensors on the device; crop, flip and normalisation happen there, a batch at a time."""

from .datasets import DATASETS, Dataset, load, load_folder
from .images import IMAGENET_MEAN_STD, Images

__all__ = ["DATASETS", "IMAGENET_MEAN_STD", "Dataset", "Images", "load", "load_folder"]
