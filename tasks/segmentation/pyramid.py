"""Heads on feature pyramids: UPerNet, and a pyramid that also sees the pixels.

B images, D width of the encoder, E width of the head, C classes; a level s is (B, E, H/s, W/s).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norm import BatchNorm, conv_norm_relu

BINS = (1, 2, 3, 6)  # of pyramid pooling


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, to (h, w)."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class SimplePyramid(nn.Module):
    """Four maps of one resolution -> ×4, ×2, ×1 and ×½: transposed convolutions, nothing, pooling.

    BEiT, Bao et al. 2022 (`fpn1` … `fpn4` of the authors' segmentation backbone).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up4 = nn.Sequential(
            nn.ConvTranspose2d(width, width, 2, stride=2),
            BatchNorm(width),
            nn.GELU(),
            nn.ConvTranspose2d(width, width, 2, stride=2),
        )
        self.up2 = nn.ConvTranspose2d(width, width, 2, stride=2)
        # A map of odd sides keeps its last row and column, and one of a single patch stays one.
        self.down2 = nn.MaxPool2d(2, stride=2, ceil_mode=True)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        first, second, third, fourth = maps
        return [self.up4(first), self.up2(second), third, self.down2(fourth)]


class PyramidPooling(nn.Module):
    """The map beside its means over 1, 2², 3² and 6² parts.

    Zhao et al. 2017, PSPNet, §3.2.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.bins = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), conv_norm_relu(width, channels))
            for size in BINS
        )
        self.join = conv_norm_relu(width + len(BINS) * channels, channels, kernel=3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, E, h, w)."""
        pooled = [resized(pool(x), x.shape[-2:]) for pool in self.bins]
        return self.join(torch.cat([x, *pooled], dim=1))


class TopDown(nn.Module):
    """From coarse to fine each level gets what the coarser one knows; all of them, side by side at
    the finest resolution, make one map.

    Lin et al. 2017, FPN; joined as in UPerNet, Xiao et al. 2018, §3.1.
    """

    def __init__(self, levels: int, channels: int) -> None:
        super().__init__()
        # The coarsest level is smooth already.
        self.smooth = nn.ModuleList(
            conv_norm_relu(channels, channels, kernel=3) for _ in range(levels - 1)
        )
        self.join = conv_norm_relu(levels * channels, channels, kernel=3)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Levels (B, E, ·, ·), the finest first -> (B, E, ·, ·) as the finest."""
        summed = [levels[-1]]
        for level in reversed(levels[:-1]):
            summed.insert(0, level + resized(summed[0], level.shape[-2:]))
        outputs = [smooth(x) for smooth, x in zip(self.smooth, summed[:-1], strict=True)]
        finest = summed[0].shape[-2:]
        return self.join(torch.cat([resized(x, finest) for x in [*outputs, summed[-1]]], dim=1))


class UPerHead(nn.Module):
    """Pyramid pooling on the coarsest level, a feature pyramid over all, logits at the finest.

    Xiao et al. 2018, UPerNet, §3.1, on the simple pyramid of a plain ViT.
    """

    def __init__(self, width: int, *, classes: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.pyramid = SimplePyramid(width)
        self.lateral = nn.ModuleList(conv_norm_relu(width, channels) for _ in range(3))
        self.pooling = PyramidPooling(width, channels)
        self.top_down = TopDown(4, channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: Sequence[Tensor], pixels: Tensor) -> Tensor:
        """-> (B, C, 4h, 4w)."""
        *fine, coarse = self.pyramid(maps)
        levels = [lateral(x) for lateral, x in zip(self.lateral, fine, strict=True)]
        return self.classify(self.dropout(self.top_down([*levels, self.pooling(coarse)])))


class SpatialPrior(nn.Module):
    """Convolutions on the pixels: levels 4, 8, 16 and 32.

    Chen et al. 2023, ViT-Adapter, §3.3 and the authors' `SpatialPriorModule`; the widths are those
    of `channels` = 64 there, cut to the head's own.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            conv_norm_relu(3, channels // 4, kernel=3, stride=2),
            conv_norm_relu(channels // 4, channels // 4, kernel=3),
            conv_norm_relu(channels // 4, channels // 4, kernel=3),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        widths = [channels // 4, channels // 2, channels, channels]
        self.down = nn.ModuleList(
            conv_norm_relu(widths[i], widths[i + 1], kernel=3, stride=2) for i in range(3)
        )
        self.project = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x = self.stem(pixels)
        levels = [x]
        for down in self.down:
            x = down(x)
            levels.append(x)
        return [project(level) for project, level in zip(self.project, levels, strict=True)]


class FPNHead(nn.Module):
    """The encoder's maps added to those of a convolutional stem, and a feature pyramid over them.

    What ViT-Adapter (Chen et al. 2023) makes of its last states, without its injectors and
    extractors: outlines come from the pixels, what is inside them from the encoder.
    """

    def __init__(self, width: int, *, classes: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.prior = SpatialPrior(channels)
        self.project = nn.ModuleList(nn.Conv2d(width, channels, 1) for _ in range(4))
        self.norm = nn.ModuleList(BatchNorm(channels) for _ in range(4))
        self.top_down = TopDown(4, channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: Sequence[Tensor], pixels: Tensor) -> Tensor:
        """-> (B, C, H/4, W/4)."""
        levels = [
            norm(level + resized(project(x), level.shape[-2:]))
            for level, project, norm, x in zip(
                self.prior(pixels), self.project, self.norm, maps, strict=True
            )
        ]
        return self.classify(self.dropout(self.top_down(levels)))
