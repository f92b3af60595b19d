"""The shapes that scenes are drawn from, as signed distances.

A shape is a function of x (to the right) and y (down) in a frame where the shape has radius 1. It
returns the distance to the shape's edge, negative inside. The formulas are those of Inigo Quilez,
"2D distance functions".
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def _polygon(*corners: tuple[float, float]) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the exact signed distance of a simple polygon (even-odd rule)."""

    def distance(x: Tensor, y: Tensor) -> Tensor:
        nearest = torch.full_like(x, math.inf)
        sign = torch.ones_like(x)
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
            ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
            along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clamp(0, 1)
            nearest = torch.minimum(nearest, (px - ex * along) ** 2 + (py - ey * along) ** 2)
            crosses = ((y >= ay) != (y >= by)) & ((ex * py > ey * px) == (by > ay))
            sign = torch.where(crosses, -sign, sign)
        return sign * nearest.sqrt()

    return distance


def _regular(sides: int, *, turn: float = 0.0, inner: float | None = None):
    """Returns a regular polygon with a corner at the top; `inner` < 1 makes it a star."""
    radii = (1.0,) if inner is None else (1.0, inner)
    number = sides * len(radii)
    angles = [2 * math.pi * (i / number + turn) - math.pi / 2 for i in range(number)]
    return _polygon(
        *(
            (math.cos(angle) * radii[i % len(radii)], math.sin(angle) * radii[i % len(radii)])
            for i, angle in enumerate(angles)
        )
    )


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.75).abs() - 0.25


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x, y) - 1, 0.85 - torch.hypot(x - 0.5, y))


def _dome(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x, y - 0.45) - 1, y - 0.45)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    lobe = torch.hypot(x.abs() - 0.45, y + 0.3) - 0.54
    x, y = x.abs(), y + 0.3
    point = torch.maximum((x - 0.45) * 0.77 + y * 0.64 - 0.54, -y)
    return torch.minimum(lobe, point)


def _drop(x: Tensor, y: Tensor) -> Tensor:
    ball = torch.hypot(x, y - 0.4) - 0.6
    point = torch.maximum(x.abs() * 0.9 - (y + 1) * 0.436, y - 0.14)
    return torch.minimum(ball, point)


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "ring": _ring,
    "crescent": _crescent,
    "dome": _dome,
    "heart": _heart,
    "drop": _drop,
    "triangle": _regular(3),
    "square": _regular(4, turn=0.125),
    "diamond": _polygon((0, -1), (0.62, 0), (0, 1), (-0.62, 0)),
    "pentagon": _regular(5),
    "hexagon": _regular(6),
    "star": _regular(5, inner=0.42),
    "cross": _polygon(
        *((-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)),
        *((0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)),
    ),
    "rectangle": _polygon((-1, -0.45), (1, -0.45), (1, 0.45), (-1, 0.45)),
    "trapezoid": _polygon((-0.5, -0.6), (0.5, -0.6), (1, 0.6), (-1, 0.6)),
    "parallelogram": _polygon((-0.4, -0.55), (1, -0.55), (0.4, 0.55), (-1, 0.55)),
    "arrow": _polygon(
        *((0, -1), (0.8, -0.1), (0.3, -0.1), (0.3, 1), (-0.3, 1), (-0.3, -0.1), (-0.8, -0.1)),
    ),
    "arch": _polygon(
        *((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (0.35, 0.85), (0.35, -0.3)),
        *((-0.35, -0.3), (-0.35, 0.85), (-0.85, 0.85)),
    ),
}
