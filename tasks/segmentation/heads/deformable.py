"""Multi-scale deformable attention in plain PyTorch, without a compiled extension.

Zhu et al. 2021, Deformable DETR, §4.1. A query reads a few points on each level of a pyramid; it
predicts their locations and weights.

Shape legend: B images, Q queries, L levels, M heads, P points, D width, E inner width, d = E / M.
Locations are (x, y) as shares of the image: (0, 0) is its upper left corner, (1, 1) its lower right
one. So levels need not be whole multiples of each other, nor of the grid of the queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...encoders.positions import Grid


def deformable_attention(values: Sequence[Tensor], locations: Tensor, weights: Tensor) -> Tensor:
    """Returns the weighted sum of the values at the points of each head.

    Values outside of a level are 0.

    Args:
        values: (B, M, d, h, w) of each level.
        locations: (B, Q, M, L, P, 2).
        weights: (B, Q, M, L, P).

    Returns:
        (B, Q, E).
    """
    batch, _, heads = locations.shape[:3]
    places = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B·M, Q, L, P, 2) in [-1, 1]
    shares = weights.transpose(1, 2).flatten(0, 1)[:, None]  # (B·M, 1, Q, L, P)
    levels = []
    for level, value in enumerate(values):
        sampled = F.grid_sample(
            value.flatten(0, 1),
            places[:, :, level],
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )  # (B·M, d, Q, P)
        levels.append((sampled * shares[..., level, :]).sum(dim=-1))
    total = torch.stack(levels).sum(dim=0)  # (B·M, d, Q)
    return total.unflatten(0, (batch, heads)).flatten(1, 2).transpose(1, 2)


def reference_points(grids: Sequence[Grid], device: torch.device) -> Tensor:
    """Returns the centres of all cells of some grids, row by row: (Σ h·w, 2) float32."""
    points = []
    for height, width in grids:
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
        rows, columns = torch.meshgrid(y, x, indexing="ij")
        points.append(torch.stack([columns, rows], dim=-1).flatten(0, 1))
    return torch.cat(points)


class DeformableAttention(nn.Module):
    """Deformable attention with its projections.

    Offsets are in cells of their level. At the start they do not depend on the query: the points of
    head m lie in the direction 2πm/M, point p at a distance of p cells (along the longer axis), and
    all weights are equal (the authors' `_reset_parameters`).

    Args:
        width: D.
        inner: E.
        levels: L.
        heads: M.
        points: P.

    Raises:
        ValueError: `inner` is no multiple of `heads`.
    """

    def __init__(self, width: int, *, inner: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        if inner % heads:
            raise ValueError(f"a width of {inner} cannot be cut into {heads} attention heads")
        self.shape = (heads, levels, points)
        self.offsets = nn.Linear(width, 2 * heads * levels * points)
        self.weights = nn.Linear(width, heads * levels * points)
        self.value = nn.Linear(width, inner)
        self.output = nn.Linear(inner, width)
        for linear in (self.offsets, self.weights):
            nn.init.zeros_(linear.weight)
        nn.init.zeros_(self.weights.bias)
        with torch.no_grad():
            self.offsets.bias.copy_(_first_offsets(heads, levels, points).flatten())
        for linear in (self.value, self.output):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, query: Tensor, reference: Tensor, value: Tensor, grids: Sequence[Grid]
    ) -> Tensor:
        """Attends from queries to the levels of a pyramid.

        Args:
            query: (B, Q, D).
            reference: (Q, 2), the location of each query.
            value: (B, Σ h·w, D), all levels in order, row by row.
            grids: (h, w) of each level.

        Returns:
            (B, Q, D).
        """
        locations, weights = self.points_of(query, reference, grids)
        flat = self.value(value).to(locations.dtype).transpose(1, 2)  # (B, E, Σ h·w)
        levels = [
            part.unflatten(2, grid).unflatten(1, (self.shape[0], -1))
            for part, grid in zip(flat.split([h * w for h, w in grids], dim=2), grids, strict=True)
        ]
        return self.output(deformable_attention(levels, locations, weights).to(query.dtype))

    def points_of(
        self, query: Tensor, reference: Tensor, grids: Sequence[Grid]
    ) -> tuple[Tensor, Tensor]:
        """Returns the points of each query and their weights.

        Args:
            query: (B, Q, D).
            reference: (Q, 2).
            grids: (h, w) of each level.

        Returns:
            locations: (B, Q, M, L, P, 2).
            weights: (B, Q, M, L, P), which sum to 1 over levels and points.
        """
        # bfloat16 can tell at most 256 locations along a side apart.
        dtype = torch.promote_types(query.dtype, torch.float32)
        heads, levels, points = self.shape
        offsets = self.offsets(query).to(dtype).unflatten(-1, (*self.shape, 2))
        cells = torch.tensor([(w, h) for h, w in grids], dtype=dtype, device=query.device)
        locations = reference.to(dtype)[:, None, None, None] + offsets / cells[:, None]
        weights = self.weights(query).to(dtype).unflatten(-1, (heads, levels * points))
        return locations, weights.softmax(dim=-1).unflatten(-1, (levels, points))


def _first_offsets(heads: int, levels: int, points: int) -> Tensor:
    """Returns the offsets (M, L, P, 2) at the start, in cells."""
    angles = torch.arange(heads, dtype=torch.float32) * (2 * math.pi / heads)
    directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
    directions = directions / directions.abs().amax(dim=-1, keepdim=True)
    distances = torch.arange(1, points + 1, dtype=torch.float32)
    offsets = directions[:, None, None] * distances[:, None]
    return offsets.expand(heads, levels, points, 2)
