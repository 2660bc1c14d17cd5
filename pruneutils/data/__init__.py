"""Image datasets as uint8 tensors on the device; crop, flip and normalisation happen there, a batch at a time.

`load` reads a dataset by name. The table of names is in `datasets`, the readers of the formats in `readers` and
`folders`, what keeps later calls short in `cache`, and what a loaded dataset can do in `images`.
"""

from .datasets import DATASETS, Dataset, load, load_folder
from .images import IMAGENET_MEAN_STD, Images

__all__ = ["DATASETS", "IMAGENET_MEAN_STD", "Dataset", "Images", "load", "load_folder"]
