"""Heads without a pyramid: linear, SETR-PUP and Segmenter.

Every head takes the maps of the blocks that it reads, a list of (B, D, h, w), and the normalised
pixels (B, 3, H, W) of the images, where h = H / patch and w = W / patch. It returns logits
(B, C, h', w') at a resolution of its own.

Shape legend: B images, D width of the encoder, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norm import BatchNorm, conv_norm_relu


class LinearHead(nn.Module):
    """Batch norm and a 1×1 convolution on the concatenated maps.

    Oquab et al. 2024, DINOv2, §7.4: with the last block it is `lin.`, with four the head of `+ms`.

    Args:
        width: number of channels of all maps together.
        dropout: probability of dropping a channel.
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
        """Returns logits (B, C, h, w)."""
        return self.classify(self.dropout(self.norm(torch.cat(list(maps), dim=1))))


class SetrPup(nn.Module):
    """Progressive upsampling: 3×3 convolutions and ×2 in turn, up to the resolution of the pixels.

    Zheng et al. 2021, SETR, §3.2. There are four steps for patches of 14 and 16, three for 8.

    Args:
        width: D; `patch`: side of a patch in pixels; `channels`: width of the convolutions.
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
        """Returns logits (B, C, 2^k h, 2^k w) with 2^k ≥ patch."""
        x = maps[-1]
        for step in self.steps:
            x = F.interpolate(step(x), scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.classify(self.dropout(x))


class Segmenter(nn.Module):
    """Mask transformer: transformer layers over patches and class tokens.

    The logits of a patch are its cosines to the class tokens, layer-normed over the classes.
    Strudel et al. 2021, Segmenter, §3.2 and the authors' `decoder.py`. Unlike there, a learned
    factor scales the cosines of two classes, since a norm over two numbers keeps only their order.

    Raises:
        ValueError: `channels` is no multiple of the number of attention heads.
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
        self.mask_norm = nn.LayerNorm(classes) if classes > 2 else LearnedFactor(10.0)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.class_tokens, std=0.02)
        for projection in (self.project_patches, self.project_classes):
            nn.init.normal_(projection.weight, std=channels**-0.5)

    def forward(self, maps: Sequence[Tensor], pixels: Tensor) -> Tensor:
        """Returns logits (B, C, h, w)."""
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


class LearnedFactor(nn.Module):
    """Multiplies by a learned factor."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(start))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x
