"""ViT-Adapter: a pyramid of four levels from a plain ViT and a convolutional stem on the pixels.

Chen et al. 2023, ViT-Adapter, §3, and the authors' `vit_adapter.py`. The blocks of the encoder are
cut into four stages. With the patches x of the ViT and the cells c of the stem's levels 8, 16 and
32, each stage computes

    injector    x ← x + γ · MSDA(LN x, LN c)     γ = 0 at the start; mode `full` only
    blocks      x ← blocks of the encoder
    extractor   c ← c + MSDA(LN c, LN x),  then  c ← c + FFN(LN c)

Mode `frozen` has only extractors, which read the encoder's states after each stage. No gradient
passes through the encoder (as in DINOv3's segmentation, Siméoni et al. 2025), unless a part of it,
such as an adapter, is trained.

Class and register tokens do not change. Locations of the attention are shares of the image, so the
levels have 1/4, 1/8, 1/16 and 1/32 of the image's sides (rounded up) for any patch. Patches of 8
and 14 need no resizing of the stem's levels. At the end, the encoder's maps are resized (bilinear)
and added to the levels.

Shape legend: B images, N patches, D width of the encoder, S cells of levels 8, 16 and 32 together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...encoders.positions import Grid
from ...encoders.vision import ImageTower
from ..config import ViTAdapterConfig
from .deformable import DeformableAttention, reference_points
from .norm import BatchNorm
from .pyramid import SpatialPrior, resized

__all__ = ["Extractor", "Injector", "NeckedHead", "SpatialPrior", "ViTAdapter"]

STAGES = 4
EPSILON = 1e-6  # epsilon of all layer norms


@dataclass(frozen=True)
class CellLocations:
    """The grids of the patches and of the levels, and the centres of their cells.

    Attributes:
        patches: (h, w) of the patches.
        levels: (h, w) of levels 8, 16 and 32.
        patch_points: (N, 2), centres as shares of the image.
        level_points: (S, 2), the same of the levels' cells.
    """

    patches: Grid
    levels: tuple[Grid, ...]
    patch_points: Tensor
    level_points: Tensor

    @classmethod
    def of(cls, patches: Grid, levels: Sequence[Grid], device: torch.device) -> CellLocations:
        """Computes the centres of the cells of some grids."""
        points = reference_points([patches], device), reference_points(levels, device)
        return cls(patches, tuple(levels), *points)


class ConvFFN(nn.Module):
    """Linear, 3×3 depthwise convolution on each level, GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.mix = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.GELU()
        self.down = nn.Linear(hidden, width)

    def forward(self, c: Tensor, levels: Sequence[Grid]) -> Tensor:
        """Returns (B, S, D) from cells (B, S, D) of some levels."""
        mixed = [self.mix(level).flatten(2) for level in as_maps(self.up(c), levels)]
        return self.down(self.act(torch.cat(mixed, dim=2).transpose(1, 2)))


class Injector(nn.Module):
    """Adds information of the cells to the patches: x + γ · MSDA(LN x, LN c), γ = 0 at the start.

    Args:
        width: D.
        attention: `inner`, `heads` and `points` of `DeformableAttention`.
    """

    def __init__(self, width: int, *, attention: dict[str, int]) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(width, eps=EPSILON)
        self.value_norm = nn.LayerNorm(width, eps=EPSILON)
        self.attention = DeformableAttention(width, levels=3, **attention)
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, c: Tensor, locations: CellLocations) -> Tensor:
        """Returns patches (B, N, D) in the dtype of x.

        Args:
            x: patches (B, N, D).
            c: cells (B, S, D).
        """
        attended = self.attention(
            self.query_norm(x), locations.patch_points, self.value_norm(c), locations.levels
        )
        return x + (self.gamma * attended).to(x.dtype)


class Extractor(nn.Module):
    """Adds information of the patches to the cells: c + MSDA(LN c, LN x), then an FFN.

    Args:
        width: D.
        attention: `inner`, `heads` and `points` of `DeformableAttention`.
        hidden: width inside the FFN.
    """

    def __init__(self, width: int, *, attention: dict[str, int], hidden: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(width, eps=EPSILON)
        self.value_norm = nn.LayerNorm(width, eps=EPSILON)
        self.attention = DeformableAttention(width, levels=1, **attention)
        self.ffn_norm = nn.LayerNorm(width, eps=EPSILON)
        self.ffn = ConvFFN(width, hidden)

    def forward(self, c: Tensor, x: Tensor, locations: CellLocations) -> Tensor:
        """Returns cells (B, S, D) from cells c (B, S, D) and patches x (B, N, D)."""
        c = c + self.attention(
            self.query_norm(c), locations.level_points, self.value_norm(x), [locations.patches]
        )
        return c + self.ffn(self.ffn_norm(c), locations.levels)


class ViTAdapter(nn.Module):
    """The neck: runs an encoder's tower and returns levels 4, 8, 16 and 32.

    As in the authors' code, it also has a learned vector for each level, `extra` extractors after
    the last stage, the encoder's four maps added to the levels, and a batch norm on each level.

    Args:
        width: D of the encoder.

    Raises:
        ValueError: the inner width is no multiple of the number of attention heads.
    """

    def __init__(self, width: int, config: ViTAdapterConfig) -> None:
        super().__init__()
        inner = config.width or width
        heads = config.heads or _default_heads(width, inner)
        if inner % heads:
            raise ValueError(
                f"head.vit_adapter: a width of {inner} cannot be cut into {heads} heads: set heads "
                "to a divisor of it, or width to a multiple"
            )
        attention = {"inner": inner, "heads": heads, "points": config.points}
        hidden = max(int(config.ffn_ratio * width), 1)

        def extractors(count: int) -> nn.ModuleList:
            made = [Extractor(width, attention=attention, hidden=hidden) for _ in range(count)]
            return nn.ModuleList(made)

        self.prior = SpatialPrior(width, inner=4 * config.stem)
        self.level_embedding = nn.Parameter(torch.randn(3, width))
        self.injectors = nn.ModuleList(
            Injector(width, attention=attention)
            for _ in range(STAGES if config.mode == "full" else 0)
        )
        self.extractors = extractors(STAGES)
        self.extra = extractors(config.extra)
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.norm = nn.ModuleList(BatchNorm(width) for _ in range(4))

    def forward(
        self, tower: ImageTower, pixels: Tensor, layers: Sequence[int], *, norm: bool = True
    ) -> list[Tensor]:
        """Returns the levels (B, D, ⌈H/s⌉, ⌈W/s⌉) for s = 4, 8, 16, 32.

        Args:
            pixels: (B, 3, H, W); H and W are multiples of the patch.
            layers: the last block of each stage, in ascending order.
            norm: whether the encoder's final norm is applied to the states that are read.
        """
        finest, *levels = self.prior(pixels)
        grid = (pixels.shape[-2] // tower.patch, pixels.shape[-1] // tower.patch)
        locations = CellLocations.of(grid, [_grid(level) for level in levels], pixels.device)
        c = torch.cat(
            [
                as_tokens(level) + embedding
                for level, embedding in zip(levels, self.level_embedding, strict=True)
            ],
            dim=1,
        )
        if self.injectors:
            c, maps = self._interact(c, locations, tower, pixels, layers, norm=norm)
        else:
            trained = any(parameter.requires_grad for parameter in tower.encoder.parameters())
            with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
                maps = tower(pixels, layers, norm=norm).maps
            for extractor, x in zip(self.extractors, maps, strict=True):
                c = extractor(c, as_tokens(x), locations)
        for extractor in self.extra:
            c = extractor(c, as_tokens(maps[-1]), locations)
        return self._pyramid(finest, as_maps(c, locations.levels), maps)

    def _interact(
        self,
        c: Tensor,
        locations: CellLocations,
        tower: ImageTower,
        pixels: Tensor,
        layers: Sequence[int],
        *,
        norm: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs the encoder with injectors between its blocks.

        Returns:
            the cells (B, S, D) after all stages, and the map (B, D, h, w) after each stage.
        """

        def entering(stage: int) -> Callable[[Tensor], Tensor]:
            def change(x: Tensor) -> Tensor:
                nonlocal c
                if stage:
                    c = self.extractors[stage - 1](c, tower.normed(x) if norm else x, locations)
                return self.injectors[stage](x, c, locations)

            return change

        firsts = [0, *(layer + 1 for layer in layers[:-1])]
        between = {first: entering(stage) for stage, first in enumerate(firsts)}
        maps = tower(pixels, layers, norm=norm, between=between).maps
        return self.extractors[-1](c, as_tokens(maps[-1]), locations), maps

    def _pyramid(
        self, finest: Tensor, levels: Sequence[Tensor], maps: Sequence[Tensor]
    ) -> list[Tensor]:
        height, width = _grid(finest)
        # If a side of level 8 was rounded up, its double is one more than that of level 4.
        first = finest + self.up(levels[0])[..., :height, :width]
        return [
            norm(level + resized(x, _grid(level)))
            for norm, level, x in zip(self.norm, [first, *levels], maps, strict=True)
        ]


class NeckedHead(nn.Module):
    """A head on the levels of a neck; both are trained and saved together."""

    def __init__(self, neck: ViTAdapter, head: nn.Module) -> None:
        super().__init__()
        self.neck, self.head = neck, head

    def forward(self, tower: ImageTower, pixels: Tensor, *args: Any, **options: Any) -> Tensor:
        """Returns logits (B, C, ·, ·); takes the arguments of `ViTAdapter.forward`."""
        return self.head(self.neck(tower, pixels, *args, **options), pixels)


def _default_heads(width: int, inner: int) -> int:
    """Returns one head for each 64 channels, or the next smaller divisor of the inner width."""
    return next(heads for heads in range(max(width // 64, 1), 0, -1) if inner % heads == 0)


def as_tokens(x: Tensor) -> Tensor:
    """Flattens a map (B, D, h, w) to tokens (B, h·w, D)."""
    return x.flatten(2).transpose(1, 2)


def as_maps(tokens: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """Splits tokens (B, Σ h·w, D) into a map (B, D, h, w) for each grid."""
    parts = tokens.transpose(1, 2).split([height * width for height, width in grids], dim=2)
    return [part.unflatten(2, grid) for part, grid in zip(parts, grids, strict=True)]


def _grid(x: Tensor) -> Grid:
    return x.shape[-2], x.shape[-1]
