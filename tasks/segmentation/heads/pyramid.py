"""Heads on feature pyramids: UPerNet, Panoptic FPN, and a pyramid that also reads the pixels.

Shape legend: B images, D width of the encoder, E width of the head, C classes; level s of a pyramid
is (B, E, H/s, W/s).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norm import BatchNorm, conv_norm_relu

BINS = (1, 2, 3, 6)  # sides of the pooled maps of pyramid pooling


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resizes maps bilinearly to (h, w)."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class SimplePyramid(nn.Module):
    """Turns four maps of one resolution into a pyramid of ×4, ×2, ×1 and ×½.

    It uses transposed convolutions, no change, and pooling. Bao et al. 2022, BEiT (`fpn1` … `fpn4`
    of the authors' segmentation backbone).
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
        # With ceil_mode, odd sides keep their last row and column and a single patch remains.
        self.down2 = nn.MaxPool2d(2, stride=2, ceil_mode=True)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Returns four levels (B, D, ·, ·), the finest first, from four maps (B, D, h, w)."""
        first, second, third, fourth = maps
        return [self.up4(first), self.up2(second), third, self.down2(fourth)]


class PyramidPooling(nn.Module):
    """Joins a map with its means over 1, 2², 3² and 6² parts.

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
        """Returns (B, E, h, w) from (B, D, h, w)."""
        pooled = [resized(pool(x), x.shape[-2:]) for pool in self.bins]
        return self.join(torch.cat([x, *pooled], dim=1))


class TopDown(nn.Module):
    """Adds each coarser level to the next finer one, then joins all at the finest resolution.

    Lin et al. 2017, FPN; joined as in UPerNet, Xiao et al. 2018, §3.1.
    """

    def __init__(self, levels: int, channels: int) -> None:
        super().__init__()
        # The coarsest level gets no addition, so it needs no smoothing.
        self.smooth = nn.ModuleList(
            conv_norm_relu(channels, channels, kernel=3) for _ in range(levels - 1)
        )
        self.join = conv_norm_relu(levels * channels, channels, kernel=3)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Returns one map (B, E, ·, ·) of the finest resolution.

        Args:
            levels: (B, E, ·, ·) each, the finest first.
        """
        summed = [levels[-1]]
        for level in reversed(levels[:-1]):
            summed.insert(0, level + resized(summed[0], level.shape[-2:]))
        outputs = [smooth(x) for smooth, x in zip(self.smooth, summed[:-1], strict=True)]
        finest = summed[0].shape[-2:]
        return self.join(torch.cat([resized(x, finest) for x in [*outputs, summed[-1]]], dim=1))


class UPerHead(nn.Module):
    """Pyramid pooling on the coarsest level, a feature pyramid over all, logits at the finest.

    Xiao et al. 2018, UPerNet, §3.1.

    Args:
        width: D.
        pyramid: makes four levels (B, D, ·, ·), the finest first, of the head's input:
            `SimplePyramid`, or the identity if a neck gives the levels.
        channels: E.
        dropout: probability of dropping a channel before the last layer.
    """

    def __init__(
        self, width: int, *, pyramid: nn.Module, classes: int, channels: int, dropout: float
    ) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.lateral = nn.ModuleList(conv_norm_relu(width, channels) for _ in range(3))
        self.pooling = PyramidPooling(width, channels)
        self.top_down = TopDown(4, channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: Sequence[Tensor], pixels: Tensor) -> Tensor:
        """Returns logits (B, C, ·, ·) at the resolution of the finest level."""
        *fine, coarse = self.pyramid(maps)
        levels = [lateral(x) for lateral, x in zip(self.lateral, fine, strict=True)]
        return self.classify(self.dropout(self.top_down([*levels, self.pooling(coarse)])))


class PanopticFPN(nn.Module):
    """A feature pyramid that sums all levels at the finest resolution.

    3×3 convolutions and ×2 in turn bring each level there. Kirillov et al. 2019, Panoptic Feature
    Pyramid Networks, §3.1, the semantic branch, with E / 2 channels. Unlike there, the norm is
    batch norm, not group norm, and all resizing is bilinear.

    Args:
        width, pyramid, channels, dropout: as for `UPerHead`.
    """

    def __init__(
        self, width: int, *, pyramid: nn.Module, classes: int, channels: int, dropout: float
    ) -> None:
        super().__init__()
        half = channels // 2
        self.pyramid = pyramid
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for _ in range(4))
        self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(4))
        self.branches = nn.ModuleList(
            nn.ModuleList(
                conv_norm_relu(half if step else channels, half, kernel=3)
                for step in range(max(level, 1))
            )
            for level in range(4)
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(half, classes, 1)

    def forward(self, maps: Sequence[Tensor], pixels: Tensor) -> Tensor:
        """Returns logits (B, C, ·, ·) at the resolution of the finest level."""
        levels = [lateral(x) for lateral, x in zip(self.lateral, self.pyramid(maps), strict=True)]
        sizes = [level.shape[-2:] for level in levels]
        for level in (2, 1, 0):
            levels[level] = levels[level] + resized(levels[level + 1], sizes[level])
        risen = []
        for level, branch in enumerate(self.branches):
            x = self.smooth[level](levels[level])
            assert isinstance(branch, nn.ModuleList)
            for step, convolve in enumerate(branch):
                x = resized(convolve(x), sizes[max(level - step - 1, 0)])
            risen.append(x)
        return self.classify(self.dropout(torch.stack(risen).sum(dim=0)))


class SpatialPrior(nn.Module):
    """Makes levels 4, 8, 16 and 32 of the pixels by convolutions.

    Chen et al. 2023, ViT-Adapter, §3.3 and the authors' `SpatialPriorModule`.

    Args:
        channels: number of channels of each output level.
        inner: number of channels inside at levels 16 and 32 (256 in the paper). Level 8 has half as
            many, the first convolutions a quarter.
    """

    def __init__(self, channels: int, *, inner: int) -> None:
        super().__init__()
        widths = [inner // 4, inner // 2, inner, inner]
        stem = widths[0]
        self.stem = nn.Sequential(
            conv_norm_relu(3, stem, kernel=3, stride=2),
            conv_norm_relu(stem, stem, kernel=3),
            conv_norm_relu(stem, stem, kernel=3),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.down = nn.ModuleList(
            conv_norm_relu(widths[i], widths[i + 1], kernel=3, stride=2) for i in range(3)
        )
        self.project = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Returns (B, channels, ⌈H/s⌉, ⌈W/s⌉) for s = 4, 8, 16, 32 from pixels (B, 3, H, W)."""
        x = self.stem(pixels)
        levels = [x]
        for down in self.down:
            x = down(x)
            levels.append(x)
        return [project(level) for project, level in zip(self.project, levels, strict=True)]


class FPNHead(nn.Module):
    """A feature pyramid over the encoder's maps added to those of a convolutional stem.

    It is the last step of ViT-Adapter (Chen et al. 2023; `head.neck`) without injectors and
    extractors. Outlines come from the pixels, their content from the encoder.

    Args:
        width: D.
        channels: E.
        dropout: probability of dropping a channel before the last layer.
    """

    def __init__(self, width: int, *, classes: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.prior = SpatialPrior(channels, inner=channels)
        self.project = nn.ModuleList(nn.Conv2d(width, channels, 1) for _ in range(4))
        self.norm = nn.ModuleList(BatchNorm(channels) for _ in range(4))
        self.top_down = TopDown(4, channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: Sequence[Tensor], pixels: Tensor) -> Tensor:
        """Returns logits (B, C, H/4, W/4)."""
        levels = [
            norm(level + resized(project(x), level.shape[-2:]))
            for level, project, norm, x in zip(
                self.prior(pixels), self.project, self.norm, maps, strict=True
            )
        ]
        return self.classify(self.dropout(self.top_down(levels)))
