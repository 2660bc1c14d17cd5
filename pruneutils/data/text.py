"""Blocks of tokens from texts that come with Python and with gensim, or from a file."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import torch

from .._checks import a_path, whole


def text(
    source: str | os.PathLike, tokenizer: Callable[[str], object] | None = None, length: int = 256
) -> torch.Tensor:
    """Cut a text into blocks of tokens, in order, without the rest that fills no block.

    Args:
        source: "python": the documentation of the language, which each Python carries. "news": the 300 texts of Lee et
            al. 2005, which come with gensim. Or the path of a text file in UTF-8.
        tokenizer: From a text to {"input_ids": numbers}, such as those of transformers; by default, its bytes.
        length: The number of tokens in a block.

    Returns:
        The tokens, an int64 tensor (blocks, length).

    Raises:
        FileNotFoundError: If there is no such text; ValueError if it fills no block.

    Example:
        >>> pu.data.text("python", length=128).shape[1]
        128
    """
    whole("length", length)
    content = _read(a_path(source))
    numbers = list(content.encode()) if tokenizer is None else tokenizer(content)["input_ids"]
    if len(numbers) < length:
        raise ValueError(f"{source} has {len(numbers)} tokens, and a block has length={length}")
    return torch.tensor(numbers[: len(numbers) // length * length]).view(-1, length)


def _read(source) -> str:
    if source == "python":
        from pydoc_data.topics import topics  # a large file

        return "\n\n".join(topics[name] for name in sorted(topics))
    path = Path(source).expanduser()
    if source == "news":
        gensim = importlib.util.find_spec("gensim")  # not imported: it needs more than its texts do
        if gensim is None:
            raise FileNotFoundError("the news texts come with a package: pip install --no-deps gensim")
        path = Path(gensim.origin).parent / "test/test_data/lee_background.cor"
    if not path.is_file():
        raise FileNotFoundError(f"no text {str(source)!r}: give 'python', 'news' or the path of a text file")
    return path.read_text(encoding="utf-8")
