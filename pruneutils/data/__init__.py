"""Images as uint8 tensors on the device, cropped, flipped and normalised a batch at a time; text as tokens."""

from .datasets import DATASETS, Dataset, load, load_folder
from .images import IMAGENET_MEAN_STD, Images
from .text import text

__all__ = ["DATASETS", "IMAGENET_MEAN_STD", "Dataset", "Images", "load", "load_folder", "text"]
