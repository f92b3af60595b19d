"""What the tables of transformers' models share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def path_of(model: nn.Module, *classes: str) -> str | None:
    """The path of the first module in `model` (itself included) of a class of one of the names.

    Heads keep the encoder under paths that differ by model and version; its class name does not.
    """
    for path, module in model.named_modules():
        if any(cls.__name__ in classes for cls in type(module).__mro__):
            return path
    return None


def below(path: str, child: str) -> str:
    return f"{path}.{child}" if path else child


def if_sdpa(model: Any, path: str) -> str | None:
    """`path` where attention is computed by `scaled_dot_product_attention`, the default, else None:
    "eager" multiplies matrices itself and the flash kernels are called from elsewhere."""
    return path if getattr(model.config, "_attn_implementation", None) == "sdpa" else None


def place(model: nn.Module) -> dict:
    """Factory keywords of the model's first floating parameter."""
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    return {"dtype": parameter.dtype, "device": parameter.device}


def token_ids(model: nn.Module, vocabulary: int, *shape: int) -> Tensor:
    """Random token ids of `shape`, none of them among the special ones that stand first."""
    low = min(8, vocabulary - 1)
    return torch.randint(low, vocabulary, shape, device=place(model)["device"])
