"""Helpers that the tables of transformers' models share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def path_of(model: nn.Module, *classes: str) -> str | None:
    """Returns the path of the first module in `model` that is an instance of one of `classes`.

    Models with a head keep the encoder under paths that differ by model and version, but the name
    of its class does not differ. The path of `model` itself is "".

    Args:
        classes: names of classes, without their modules.

    Returns:
        None if there is no such module.
    """
    for path, module in model.named_modules():
        if any(cls.__name__ in classes for cls in type(module).__mro__):
            return path
    return None


def below(path: str, child: str) -> str:
    """Returns the path of `child` below `path`, which may be empty."""
    return f"{path}.{child}" if path else child


def if_sdpa(model: Any, path: str) -> str | None:
    """Returns `path` if the model's attention calls `scaled_dot_product_attention`, else None.

    It does by default; "eager" attention multiplies matrices itself, and the flash kernels are
    called from elsewhere.
    """
    return path if getattr(model.config, "_attn_implementation", None) == "sdpa" else None


def place(model: nn.Module) -> dict:
    """Returns dtype and device of the model's first floating parameter, as keyword arguments."""
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    return {"dtype": parameter.dtype, "device": parameter.device}


def token_ids(model: nn.Module, vocabulary: int, *shape: int) -> Tensor:
    """Returns random token ids of `shape`, none of them special: those start the vocabulary."""
    low = min(8, vocabulary - 1)
    return torch.randint(low, vocabulary, shape, device=place(model)["device"])
