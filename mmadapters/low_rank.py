"""Low-rank changes of a linear map, or of all parts of a fused map, in one pass over its output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# A (r, in), B (out, r) and the scale c of the change c B A x.
Factors = tuple[Tensor, Tensor, float]


def plus_low_rank(y: Tensor, x: Tensor, parts: Sequence[Sequence[Factors]]) -> Tensor:
    """Returns y plus the sum of c B A x over the factors of every part.

    Args:
        y: (..., out), the output of a map with `len(parts)` parts of equal width in a row.
        x: (..., in), the input of the map.
        parts: the factors of each part, with B of shape (out / len(parts), r); an empty sequence
            for a part without a change.

    One product with all A serves all parts. Without gradients each product with B is added in place
    to its part: then `y` itself is changed and returned.
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
    for columns, part in zip(rows.chunk(len(parts), dim=1), parts, strict=True):
        for _, b, scale in part:
            columns.addmm_(next(states), b.t(), alpha=scale)
    return y


def _block_diagonal(parts: Sequence[Sequence[Factors]], y: Tensor) -> Tensor:
    """Returns (out, sum of r), with each c B in the rows of its part and the columns of its A."""
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
    """Returns the changes (..., out), each computed in the dtype of its factors or of autocast.

    Args:
        width: out / len(parts).
    """
    pieces = []
    for part in parts:
        changes = [F.linear(F.linear(x.to(a.dtype), a), b) * scale for a, b, scale in part]
        total = sum(changes[1:], changes[0]) if changes else x.new_zeros(*x.shape[:-1], width)
        pieces.append(total)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
