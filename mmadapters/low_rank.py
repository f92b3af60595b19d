"""Low-rank changes of a linear map, or of all parts of a fused one, in one pass over its output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# A (r, in), B (out, r) and c of c B A x.
Factors = tuple[Tensor, Tensor, float]


def plus_low_rank(y: Tensor, x: Tensor, parts: Sequence[Sequence[Factors]]) -> Tensor:
    """y + the sum of c B A x over the factors of every part.

    Args:
        y: (..., out), of a map with `len(parts)` parts of equal width one after another.
        x: (..., in).
        parts: the factors of each part, B of (out / len(parts), r); none for one without a change.

    The products with A are one for all parts. Without a gradient those with B are added to the
    parts where they lie: `y` itself is returned then, changed.
    """
    each = [factors for part in parts for factors in part]
    if any(a.dtype != x.dtype for a, _, _ in each) or torch.is_autocast_enabled(x.device.type):
        return y + _product(x, parts, y.shape[-1] // len(parts)).to(y.dtype)
    downs = [a for a, _, _ in each]
    z = F.linear(x, downs[0] if len(downs) == 1 else torch.cat(downs))
    rows, inner = y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1])
    if len(each) == len(parts) == 1:
        _, b, scale = each[0]
        return torch.addmm(rows, inner, b.t(), alpha=scale).view(y.shape)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not y.is_contiguous():
        return torch.addmm(rows, inner, _block_diagonal(parts, y).t()).view(y.shape)
    states = iter(inner.split([a.shape[0] for a in downs], dim=1))
    for own, part in zip(rows.chunk(len(parts), dim=1), parts, strict=True):
        for _, b, scale in part:
            own.addmm_(next(states), b.t(), alpha=scale)
    return y


def _block_diagonal(parts: Sequence[Sequence[Factors]], y: Tensor) -> Tensor:
    """(out, sum of r): every c B in the rows of its part and the columns of its A."""
    width = y.shape[-1] // len(parts)
    empty = y.new_empty(width, 0)
    blocks = [
        torch.cat([b if scale == 1.0 else b * scale for _, b, scale in part], dim=1)
        if part
        else empty
        for part in parts
    ]
    return torch.block_diag(*blocks)


def _product(x: Tensor, parts: Sequence[Sequence[Factors]], width: int) -> Tensor:
    """The same changes alone, each in the dtype of its factors or of autocast."""
    pieces = []
    for part in parts:
        own = [F.linear(F.linear(x.to(a.dtype), a), b) * scale for a, b, scale in part]
        pieces.append(sum(own[1:], own[0]) if own else x.new_zeros(*x.shape[:-1], width))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
