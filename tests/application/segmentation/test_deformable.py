"""Deformable attention against loops in NumPy, and its gradients against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mmadapters.tasks.segmentation.heads.deformable import (
    DeformableAttention,
    deformable_attention,
    reference_points,
)

BATCH, QUERIES, HEADS, POINTS, DEPTH = 2, 5, 3, 4, 6
GRIDS = ((4, 7), (2, 3), (1, 2))


def drawn(spread: float = 1.0) -> tuple[list[Tensor], Tensor, Tensor]:
    """Values, locations and weights in float64; places lie `spread` around the image's centre."""
    values = [torch.randn(BATCH, HEADS, DEPTH, *grid, dtype=torch.float64) for grid in GRIDS]
    shape = (BATCH, QUERIES, HEADS, len(GRIDS), POINTS)
    locations = 0.5 + spread * (torch.rand(*shape, 2, dtype=torch.float64) - 0.5)
    weights = torch.rand(shape, dtype=torch.float64)
    return values, locations, weights


def at(level: np.ndarray, x: float, y: float) -> np.ndarray:
    """(d,) of a level (d, h, w) at a place, bilinear between the centres of cells, 0 outside."""
    height, width = level.shape[1:]
    column, row = x * width - 0.5, y * height - 0.5
    found = np.zeros(len(level))
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                found += (1 - abs(row - i)) * (1 - abs(column - j)) * level[:, i, j]
    return found


def by_loops(values: list[Tensor], locations: Tensor, weights: Tensor) -> np.ndarray:
    out = np.zeros((BATCH, QUERIES, HEADS, DEPTH))
    for b, q, m, level, p in np.ndindex(*weights.shape):
        x, y = locations[b, q, m, level, p].tolist()
        out[b, q, m] += weights[b, q, m, level, p].item() * at(values[level][b, m].numpy(), x, y)
    return out.reshape(BATCH, QUERIES, -1)


@pytest.mark.parametrize("spread", [0.5, 1.0, 3.0])
def test_it_is_a_weighted_sum_of_what_is_at_the_points(spread: float) -> None:
    """With a spread of 3 most points lie outside of the image."""
    values, locations, weights = drawn(spread)
    found = deformable_attention(values, locations, weights)
    np.testing.assert_allclose(found.numpy(), by_loops(values, locations, weights), atol=1e-12)


def test_far_outside_there_is_nothing() -> None:
    values, locations, weights = drawn()
    assert (deformable_attention(values, locations + 5, weights) == 0).all()


@pytest.mark.parametrize("spread", [0.8, 3.0])
def test_gradients_of_the_sum(spread: float) -> None:
    values, locations, weights = drawn(spread)
    given = [*values, locations, weights]
    for tensor in given:
        tensor.requires_grad_()

    def run(*tensors: Tensor) -> Tensor:
        return deformable_attention(tensors[:3], tensors[3], tensors[4])

    assert torch.autograd.gradcheck(run, given)


def module(width: int = 12, inner: int = 18) -> DeformableAttention:
    made = DeformableAttention(width, inner=inner, levels=3, heads=HEADS, points=POINTS).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def inputs(width: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    cells = sum(h * w for h, w in GRIDS)
    query = torch.randn(BATCH, QUERIES, width, dtype=torch.float64)
    return query, torch.rand(QUERIES, 2), torch.randn(BATCH, cells, width, dtype=torch.float64)


def test_gradients_of_the_module() -> None:
    """Every parameter too; offsets of up to four cells leave the smaller levels."""
    attention = module()
    query, reference, value = inputs()
    names = [name for name, _ in attention.named_parameters()]
    given = [query, value, *(p.detach().clone() for _, p in attention.named_parameters())]
    for tensor in given:
        tensor.requires_grad_()

    def run(query: Tensor, value: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(attention, state, (query, reference, value, GRIDS))

    assert torch.autograd.gradcheck(run, given, fast_mode=True)


def test_the_module_is_projections_around_the_sum() -> None:
    attention = module()
    query, reference, value = inputs()
    with torch.no_grad():
        found = attention(query, reference, value, GRIDS)
        offsets = attention.offsets(query).reshape(BATCH, QUERIES, HEADS, 3, POINTS, 2)
        logits = attention.weights(query).reshape(BATCH, QUERIES, HEADS, 3 * POINTS)
        weights = logits.softmax(-1).reshape(BATCH, QUERIES, HEADS, 3, POINTS)
        locations = torch.zeros_like(offsets)
        levels, start = [], 0
        for level, (h, w) in enumerate(GRIDS):
            locations[..., level, :, 0] = (
                reference[:, 0, None, None] + offsets[..., level, :, 0] / w
            )
            locations[..., level, :, 1] = (
                reference[:, 1, None, None] + offsets[..., level, :, 1] / h
            )
            cells = attention.value(value[:, start : start + h * w])
            levels.append(cells.reshape(BATCH, h, w, HEADS, DEPTH).permute(0, 3, 4, 1, 2))
            start += h * w
        summed = torch.from_numpy(by_loops(levels, locations, weights))
        torch.testing.assert_close(found, attention.output(summed), atol=1e-12, rtol=0)


def test_weights_sum_to_one_over_levels_and_points() -> None:
    query, reference, _ = inputs()
    _, weights = module().points_of(query, reference, GRIDS)
    assert weights.shape == (BATCH, QUERIES, HEADS, 3, POINTS)
    torch.testing.assert_close(weights.sum(dim=(-1, -2)), torch.ones_like(weights[..., 0, 0]))


def test_at_the_start_heads_look_in_directions_and_points_at_distances() -> None:
    """Deformable DETR's `_reset_parameters`: with four heads right, down, left and up."""
    attention = DeformableAttention(8, inner=8, levels=3, heads=4, points=2)
    locations, weights = attention.points_of(torch.randn(1, 1, 8), torch.full((1, 2), 0.5), GRIDS)
    assert torch.allclose(weights, torch.tensor(1 / 6))
    cells = torch.tensor([(w, h) for h, w in GRIDS])[:, None]
    steps = (locations[0, 0] - 0.5) * cells  # (M, L, P, 2)
    directions = torch.tensor([(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)])
    for level in range(3):
        for point in range(2):
            torch.testing.assert_close(
                steps[:, level, point], (point + 1) * directions, atol=1e-5, rtol=0
            )


def test_reference_points_are_the_centres_of_cells() -> None:
    points = reference_points([(2, 4), (1, 1)], torch.device("cpu"))
    assert points.shape == (9, 2)
    assert points[0].tolist() == [0.125, 0.25]  # x, y
    assert points[1].tolist() == [0.375, 0.25]
    assert points[7].tolist() == [0.875, 0.75]
    assert points[8].tolist() == [0.5, 0.5]


def test_half_precision_keeps_places_in_float32() -> None:
    """bfloat16 would put points of a side of 256 cells and more into its neighbours."""
    attention = DeformableAttention(8, inner=8, levels=1, heads=2, points=2)
    grid = [(2, 600)]
    query, value = torch.randn(1, 1200, 8), torch.randn(1, 1200, 8)
    reference = reference_points(grid, query.device)
    expected = attention(query, reference, value, grid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        locations, _ = attention.points_of(query, reference, grid)
        found = attention(query, reference, value, grid)
    assert locations.dtype == torch.float32
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)
    half = attention.bfloat16()
    assert half(query.bfloat16(), reference, value.bfloat16(), grid).dtype == torch.bfloat16


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="width of 10 cannot be cut into 3 attention heads"):
        DeformableAttention(8, inner=10, levels=1, heads=3, points=1)
