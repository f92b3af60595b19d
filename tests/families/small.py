"""A small vision transformer of timm, for tests of what stands around encoder and adapters."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mmadapters import AdapterModel, LoRAConfig, MethodConfig, SeqBnConfig, SSFConfig, init

from . import seeded
from .vision import images

CONFIGS: dict[str, MethodConfig] = {
    "bottleneck": SeqBnConfig(size=4),
    "lora": LoRAConfig(rank=2),
    "ssf": SSFConfig(),
}


def small_vit(seed: int = 0, **options: Any) -> nn.Module:
    """Depth 2, width 32, 5 classes; equal seeds give equal weights."""
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return seeded(lambda: VisionTransformer(num_classes=5, **{**settings, **options}), seed)


@torch.no_grad()
def randomise(module: nn.Module, std: float = 0.3) -> None:
    """Moves every parameter away from where it starts."""
    for parameter in module.parameters():
        parameter.add_(std * torch.randn_like(parameter))


def filled(*names: str) -> AdapterModel:
    """A model with one random adapter for each name of CONFIGS."""
    model = init(small_vit())
    for name in names:
        model.add_adapter(name, CONFIGS[name])
        randomise(model.adapter(name))
    return model


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    """(2, 5), always on the same two images."""
    return model(images().to(next(model.parameters()).dtype))


def hooks(model: nn.Module) -> int:
    """Hooks on the modules, and modules whose class was replaced."""
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + ("_mmadapters" in m.__dict__)
        for m in model.modules()
    )
