"""Rebuild a model from the recipe in an untrusted file."""

from typing import Any

from torch import nn

from .building import build, create

# The options that a recipe from a file may set: none of them loads another file or makes a model deeper.
_OPTIONS = frozenset(
    "name num_classes seed in_channels image_size in_chans img_size patch_size stem_width channels embed_dim "
    "num_heads width_mult drop_rate drop_path_rate global_pool".split()
)


def follow(recipe: dict[str, Any], n_entries: int) -> nn.Module:
    """Return models.create(**recipe); ValueError if it is much larger than tensors of so many entries in all."""
    if unknown := sorted(set(recipe) - _OPTIONS):
        raise ValueError(f"its recipe sets {', '.join(unknown)}, which files may not; give load a model that you made")
    try:
        on_meta = build("meta", **recipe)  # takes no memory
        wanted = sum(value.numel() for value in on_meta.state_dict().values())
        if wanted > 10 * n_entries + 1_000_000:  # filters may be gone, and buffers that are not in the file
            raise ValueError(f"it would have {wanted:,} entries, and the file holds {n_entries:,}")
        return create(**recipe)
    except Exception as error:  # timm and torchvision raise whatever they raise for wrong arguments
        raise ValueError(f"its recipe {recipe!r} cannot be followed: {error}") from error
