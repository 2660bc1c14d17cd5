"""Files of tensors and text with a checksum: written whole, and believed only if every byte is as it was written."""

import hashlib
import os
from collections.abc import Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ._files import written_whole

CHECKSUM = "checksum"  # the name of its entry among the texts


def checksum(tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> str:
    """Return the SHA-256 of all names, types, shapes and bytes, whatever their order in the file."""
    digest = hashlib.sha256()
    for name, text in sorted(texts.items()):
        if name != CHECKSUM:
            digest.update(repr((name, text)).encode(errors="surrogatepass"))
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode(errors="surrogatepass"))
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> None:
    """Write CPU tensors that share no memory, texts and their checksum; OSError where that fails."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    texts = {**texts, CHECKSUM: checksum(tensors, texts)}
    try:
        with written_whole(path) as part:
            save_file(tensors, part, texts)
    except SafetensorError as error:  # how a full disk arrives
        raise OSError(f"{path} cannot be written: {error}") from error


def read(path: str | os.PathLike, checked: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors, mapped into memory, and the texts; ValueError if the file is broken.

    Without its checksum it is broken too, unless it is not `checked`, for files from elsewhere.
    """
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder, not a file")
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}{_what_else(path)}") from error
    if checked or CHECKSUM in texts:
        if texts.get(CHECKSUM) != checksum(tensors, texts):
            raise ValueError(f"{path} is damaged: its checksum is not that of its content")
    return tensors, texts


def _what_else(path) -> str:
    """Say what a file is that safetensors does not know."""
    with open(path, "rb") as file:
        start = file.read(4)
    if not start:
        return ". It is empty (0 bytes)"
    if start == b"PK\x03\x04":
        return ". It looks like a file of torch.save; pu.models.load_weights(model, path) reads its weights"
    return ""
