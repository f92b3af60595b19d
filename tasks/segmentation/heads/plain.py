"""Heads: from maps of an encoder's blocks to class logits.

Each takes the maps of the blocks that it reads, a list of (B, D, h, w), and the normalised pixels
(B, 3, H, W) that they come from, and gives logits (B, C, h', w') at whatever resolution it works;
h = H / patch and w = W / patch. Behind a neck (`NeckedHead`) it takes the neck's levels instead.
B images, D width of the encoder, C classes, E width of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import BEHIND_NECK, HeadConfig
from .norm import BatchNorm, conv_norm_relu
from .pyramid import FPNHead, PanopticFPN, SimplePyramid, UPerHead
from .vit_adapter import STAGES, NeckedHead, ViTAdapter

__all__ = [
    "FPNHead",
    "LinearHead",
    "PanopticFPN",
    "Segmenter",
    "SetrPup",
    "UPerHead",
    "head_layers",
    "make_head",
]

FOUR_BLOCKS = (*BEHIND_NECK, "fpn")  # the heads that read so many


def make_head(
    config: HeadConfig, *, width: int, patch: int, layers: int, classes: int
) -> nn.Module:
    """A fresh head.

    Args:
        width: D; `patch`: in pixels; `layers`: how many maps it will get.

    Raises:
        ValueError: the head takes another number of maps, or the neck does not fit the width.
    """
    wanted = layers if config.kind == "linear" else 4 if config.kind in FOUR_BLOCKS else 1
    if layers != wanted:
        raise ValueError(f"the {config.kind} head reads {wanted} blocks, head.layers has {layers}")
    inner: dict[str, Any] = {
        "classes": classes,
        "channels": config.channels,
        "dropout": config.dropout,
    }
    if config.kind == "linear":
        return LinearHead(width * layers, classes=classes, dropout=config.dropout)
    if config.kind == "setr_pup":
        return SetrPup(width, patch=patch, **inner)
    if config.kind == "segmenter":
        return Segmenter(width, depth=config.depth, **inner)
    if config.kind == "fpn":
        return FPNHead(width, **inner)
    on_pyramid = UPerHead if config.kind == "upernet" else PanopticFPN
    if config.neck is None:
        return on_pyramid(width, pyramid=SimplePyramid(width), **inner)
    neck = ViTAdapter(width, config.vit_adapter)
    return NeckedHead(neck, on_pyramid(width, pyramid=nn.Identity(), **inner))


def head_layers(config: HeadConfig, depth: int) -> tuple[int, ...]:
    """The blocks that a head reads in an encoder of `depth` blocks.

    Raises:
        ValueError: one of them is not there, or they do not end the stages of a neck.
    """
    layers = _head_layers(config, depth)
    if config.neck is not None and (len(layers) != STAGES or sorted(set(layers)) != list(layers)):
        if config.layers is None:
            raise ValueError(
                f"head.neck: {config.neck} works in {STAGES} stages, of a block or more each; the "
                f"encoder has {depth}: take the neck out"
            )
        raise ValueError(
            f"head.layers: the neck reads the last block of each of {STAGES} stages, so give "
            f"{STAGES} blocks that rise, not {list(config.layers)}"
        )
    return layers


def _head_layers(config: HeadConfig, depth: int) -> tuple[int, ...]:
    if config.layers is not None:
        for layer in config.layers:
            if not -depth <= layer < depth:
                raise ValueError(
                    f"head.layers: there is no block {layer}, the encoder has {depth} (0 to "
                    f"{depth - 1}, or -{depth} to -1)"
                )
        return tuple(layer % depth for layer in config.layers)
    if config.kind in FOUR_BLOCKS:
        return tuple(max((part + 1) * depth // 4 - 1, 0) for part in range(4))
    return (depth - 1,)


class LinearHead(nn.Module):
    """Batch norm and a 1×1 convolution on the maps side by side.

    Oquab et al. 2024, DINOv2, §7.4: `lin.` with the last block, the head of `+ms` with four.
    """

    def __init__(self, width: int, *, classes: int, dropout: float) -> None:
        super().__init__()
        self.norm = BatchNorm(width)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(width, classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        assert self.classify.bias is not None
        nn.init.zeros_(self.classify.bias)

    def forward(self, maps: Sequence[Tensor], pixels: Tensor) -> Tensor:
        """-> (B, C, h, w)."""
        return self.classify(self.dropout(self.norm(torch.cat(list(maps), dim=1))))


class SetrPup(nn.Module):
    """Progressive upsampling: 3×3 convolution and ×2, until the resolution is that of the pixels.

    Zheng et al. 2021, SETR, §3.2; four times for patches of 14 and 16, three times for 8.
    """

    def __init__(
        self, width: int, *, patch: int, classes: int, channels: int, dropout: float
    ) -> None:
        super().__init__()
        steps = max((patch - 1).bit_length(), 1)
        widths = [width, *[channels] * steps]
        self.steps = nn.ModuleList(
            conv_norm_relu(widths[step], widths[step + 1], kernel=3) for step in range(steps)
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: Sequence[Tensor], pixels: Tensor) -> Tensor:
        """-> (B, C, 2^k h, 2^k w), 2^k ≥ patch."""
        x = maps[-1]
        for step in self.steps:
            x = F.interpolate(step(x), scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.classify(self.dropout(x))


class Segmenter(nn.Module):
    """Mask transformer: class tokens go through transformer layers with the patches, and a patch's
    logits are its cosines to them, layer-normed over the classes.

    Strudel et al. 2021, Segmenter, §3.2 and the authors' `decoder.py`. With two classes the cosines
    are scaled by a learned factor instead: a norm over two numbers leaves nothing but their order.
    """

    def __init__(
        self, width: int, *, depth: int, classes: int, channels: int, dropout: float
    ) -> None:
        super().__init__()
        heads = max(channels // 64, 1)
        if channels % heads:
            raise ValueError(f"head.channels {channels} cannot be cut into heads of about 64")
        self.project = nn.Linear(width, channels)
        self.class_tokens = nn.Parameter(torch.zeros(classes, channels))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                channels,
                heads,
                4 * channels,
                dropout=dropout,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(channels)
        self.project_patches = nn.Linear(channels, channels, bias=False)
        self.project_classes = nn.Linear(channels, channels, bias=False)
        self.mask_norm = nn.LayerNorm(classes) if classes > 2 else Scale(10.0)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.class_tokens, std=0.02)
        for projection in (self.project_patches, self.project_classes):
            nn.init.normal_(projection.weight, std=channels**-0.5)

    def forward(self, maps: Sequence[Tensor], pixels: Tensor) -> Tensor:
        """-> (B, C, h, w)."""
        batch, _, height, width = maps[-1].shape
        patches = self.project(maps[-1].flatten(2).transpose(1, 2))
        x = torch.cat([patches, self.class_tokens.to(patches).expand(batch, -1, -1)], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        patches, classes = x[:, : height * width], x[:, height * width :]
        patches = F.normalize(self.project_patches(patches), dim=-1)
        classes = F.normalize(self.project_classes(classes), dim=-1)
        masks = self.mask_norm(patches @ classes.transpose(1, 2))
        return masks.transpose(1, 2).unflatten(2, (height, width))


class Scale(nn.Module):
    """A learned factor."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(start))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x
