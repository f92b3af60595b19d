"""ViT-Adapter: a pyramid of four levels from a plain ViT and a convolutional stem on the pixels.

Chen et al. 2023, ViT-Adapter, §3, and the authors' `vit_adapter.py`. Per stage of the encoder (four
runs of its blocks), with x the patches of the ViT and c the cells of the stem's levels 8, 16, 32:

    injector    x ← x + γ · MSDA(LN x, LN c)     γ = 0 at the start; `full` alone
    blocks      x ← the encoder's own
    extractor   c ← c + MSDA(LN c, LN x),  then  c ← c + FFN(LN c)

`frozen` has extractors alone, which read the encoder's states after each stage: nothing goes back
through the encoder (as in DINOv3's segmentation, Siméoni et al. 2025) unless something in it, an
adapter, is trained.

Class and register tokens pass untouched. The attention counts places as shares of the image, so the
levels have 1/4, 1/8, 1/16 and 1/32 of the image's sides (rounded up) whatever the patch is: 8 and
14 need no resizing of the stem's levels. Only where the encoder's maps are added to the levels, at
the end, are they resized (bilinear) to them.

B images, N patches, D width of the encoder, S = the cells of the levels 8, 16 and 32 together.
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
EPSILON = 1e-6  # of all layer norms


@dataclass(frozen=True)
class Places:
    """Where patches and cells stand: the ViT's grid, those of the levels, and their centres."""

    patches: Grid
    levels: tuple[Grid, ...]
    patch_points: Tensor  # (N, 2)
    level_points: Tensor  # (S, 2)

    @classmethod
    def of(cls, patches: Grid, levels: Sequence[Grid], device: torch.device) -> Places:
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
        """(B, S, D) -> (B, S, D)."""
        mixed = [self.mix(level).flatten(2) for level in as_maps(self.up(c), levels)]
        return self.down(self.act(torch.cat(mixed, dim=2).transpose(1, 2)))


class Injector(nn.Module):
    """What the cells know is added to the patches: x + γ · MSDA(LN x, LN c), γ = 0 at the start.

    Args:
        width: D; `attention`: `inner`, `heads` and `points` of `DeformableAttention`.
    """

    def __init__(self, width: int, *, attention: dict[str, int]) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(width, eps=EPSILON)
        self.value_norm = nn.LayerNorm(width, eps=EPSILON)
        self.attention = DeformableAttention(width, levels=3, **attention)
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, c: Tensor, places: Places) -> Tensor:
        """x (B, N, D), c (B, S, D) -> (B, N, D), in the type of x."""
        seen = self.attention(
            self.query_norm(x), places.patch_points, self.value_norm(c), places.levels
        )
        return x + (self.gamma * seen).to(x.dtype)


class Extractor(nn.Module):
    """What the patches know is added to the cells: c + MSDA(LN c, LN x), then an FFN.

    Args:
        width: D; `attention`: `inner`, `heads` and `points` of `DeformableAttention`;
        hidden: width inside the FFN.
    """

    def __init__(self, width: int, *, attention: dict[str, int], hidden: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(width, eps=EPSILON)
        self.value_norm = nn.LayerNorm(width, eps=EPSILON)
        self.attention = DeformableAttention(width, levels=1, **attention)
        self.ffn_norm = nn.LayerNorm(width, eps=EPSILON)
        self.ffn = ConvFFN(width, hidden)

    def forward(self, c: Tensor, x: Tensor, places: Places) -> Tensor:
        """c (B, S, D), x (B, N, D) -> (B, S, D)."""
        c = c + self.attention(
            self.query_norm(c), places.level_points, self.value_norm(x), [places.patches]
        )
        return c + self.ffn(self.ffn_norm(c), places.levels)


class ViTAdapter(nn.Module):
    """The neck: runs an encoder's tower and gives the levels 4, 8, 16 and 32.

    Beside the formulas above, as the authors have it: a learned vector for each level, `extra`
    extractors after the last stage, the encoder's four maps added to the levels, and a batch norm
    on each.

    Args:
        width: D of the encoder.

    Raises:
        ValueError: the width cannot be cut into the attention heads.
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
        """The pyramid: (B, D, ⌈H/s⌉, ⌈W/s⌉) for s = 4, 8, 16, 32.

        Args:
            pixels: (B, 3, H, W), multiples of the patch.
            layers: the last block of each stage, rising.
            norm: whether extractors and pyramid read the states through the encoder's final norm.
        """
        finest, *levels = self.prior(pixels)
        grid = (pixels.shape[-2] // tower.patch, pixels.shape[-1] // tower.patch)
        places = Places.of(grid, [_grid(level) for level in levels], pixels.device)
        c = torch.cat(
            [
                as_tokens(level) + embedding
                for level, embedding in zip(levels, self.level_embedding, strict=True)
            ],
            dim=1,
        )
        if self.injectors:
            c, maps = self._interact(c, places, tower, pixels, layers, norm=norm)
        else:
            trained = any(parameter.requires_grad for parameter in tower.encoder.parameters())
            with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
                maps = tower(pixels, layers, norm=norm).maps
            for extractor, x in zip(self.extractors, maps, strict=True):
                c = extractor(c, as_tokens(x), places)
        for extractor in self.extra:
            c = extractor(c, as_tokens(maps[-1]), places)
        return self._pyramid(finest, as_maps(c, places.levels), maps)

    def _interact(
        self,
        c: Tensor,
        places: Places,
        tower: ImageTower,
        pixels: Tensor,
        layers: Sequence[int],
        *,
        norm: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """The cells after all stages and the maps after each, with injectors between the blocks."""

        def entering(stage: int) -> Callable[[Tensor], Tensor]:
            def change(x: Tensor) -> Tensor:
                nonlocal c
                if stage:
                    c = self.extractors[stage - 1](c, tower.normed(x) if norm else x, places)
                return self.injectors[stage](x, c, places)

            return change

        firsts = [0, *(layer + 1 for layer in layers[:-1])]
        between = {first: entering(stage) for stage, first in enumerate(firsts)}
        maps = tower(pixels, layers, norm=norm, between=between).maps
        return self.extractors[-1](c, as_tokens(maps[-1]), places), maps

    def _pyramid(
        self, finest: Tensor, levels: Sequence[Tensor], maps: Sequence[Tensor]
    ) -> list[Tensor]:
        height, width = _grid(finest)
        # Where a side of level 8 was rounded up, twice of it is one more than that of level 4.
        first = finest + self.up(levels[0])[..., :height, :width]
        return [
            norm(level + resized(x, _grid(level)))
            for norm, level, x in zip(self.norm, [first, *levels], maps, strict=True)
        ]


class NeckedHead(nn.Module):
    """A head on the levels of a neck; both are trained and saved as one."""

    def __init__(self, neck: ViTAdapter, head: nn.Module) -> None:
        super().__init__()
        self.neck, self.head = neck, head

    def forward(self, tower: ImageTower, pixels: Tensor, *args: Any, **options: Any) -> Tensor:
        """Logits (B, C, ·, ·); arguments as those of `ViTAdapter`."""
        return self.head(self.neck(tower, pixels, *args, **options), pixels)


def _default_heads(width: int, inner: int) -> int:
    """One for each 64 channels of the encoder, or the next fewer that divide the inner width."""
    return next(heads for heads in range(max(width // 64, 1), 0, -1) if inner % heads == 0)


def as_tokens(x: Tensor) -> Tensor:
    """(B, D, h, w) -> (B, h·w, D)."""
    return x.flatten(2).transpose(1, 2)


def as_maps(tokens: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """(B, Σ h·w, D) -> (B, D, h, w) for each grid."""
    parts = tokens.transpose(1, 2).split([height * width for height, width in grids], dim=2)
    return [part.unflatten(2, grid) for part, grid in zip(parts, grids, strict=True)]


def _grid(x: Tensor) -> Grid:
    return x.shape[-2], x.shape[-1]
