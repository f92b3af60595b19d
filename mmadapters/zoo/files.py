"""Reads and writes the directory of a shipped encoder: fp16 weights, `config.json` and a card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import replacing_file, write_text

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


def read_config(directory: Path) -> dict[str, Any]:
    """Reads `config.json` from a directory.

    Raises:
        FileNotFoundError: the directory has no such file.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the encoder was not installed or not trained")
    return json.loads(path.read_text(encoding="utf-8"))


def read_weights(directory: Path, *, file: str = WEIGHTS) -> "dict[str, Tensor]":
    """Reads the tensors of a directory, floats as fp32; integers keep their type."""
    from safetensors.torch import load_file

    tensors = load_file(directory / file)
    return {k: t.float() if t.is_floating_point() else t for k, t in tensors.items()}


def write_weights(tensors: "Mapping[str, Tensor]", directory: Path, *, file: str = WEIGHTS) -> None:
    """Writes tensors, floats as fp16; the file is complete or absent."""
    import torch
    from safetensors.torch import save_file

    half = {
        k: t.detach().to("cpu", torch.float16 if t.is_floating_point() else t.dtype).contiguous()
        for k, t in tensors.items()
    }
    with replacing_file(directory / file) as temporary:
        save_file(half, temporary)
        temporary.chmod(0o644)  # safetensors makes it readable for its owner only


def write_config(config: Mapping[str, Any], directory: Path) -> None:
    """Writes `config.json`."""
    text = json.dumps(config, indent=2, ensure_ascii=False)
    write_text(directory / CONFIG, text + "\n")
