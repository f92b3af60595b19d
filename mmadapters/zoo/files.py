"""The directory of a shipped encoder: fp16 safetensors, `config.json` and a card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import replacing_file, write_text

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json` of a directory.

    Raises:
        FileNotFoundError: the directory holds none.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the encoder was not installed or not trained")
    return json.loads(path.read_text(encoding="utf-8"))


def read_weights(directory: Path, *, file: str = WEIGHTS) -> "dict[str, Tensor]":
    """The tensors of a directory in fp32; integers stay as they are."""
    from safetensors.torch import load_file

    tensors = load_file(directory / file)
    return {k: t.float() if t.is_floating_point() else t for k, t in tensors.items()}


def write_weights(tensors: "Mapping[str, Tensor]", directory: Path, *, file: str = WEIGHTS) -> None:
    """Write tensors in fp16, whole or not at all."""
    import torch
    from safetensors.torch import save_file

    half = {
        k: t.detach().to("cpu", torch.float16 if t.is_floating_point() else t.dtype).contiguous()
        for k, t in tensors.items()
    }
    with replacing_file(directory / file) as temporary:
        save_file(half, temporary)
        temporary.chmod(0o644)  # safetensors leaves it readable by its owner alone


def write_config(config: Mapping[str, Any], directory: Path) -> None:
    """Write `config.json`."""
    text = json.dumps(config, indent=2, ensure_ascii=False)
    write_text(directory / CONFIG, text + "\n")
