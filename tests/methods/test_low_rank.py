"""Low-rank changes of plain and fused maps, against the sum written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmadapters.low_rank import Factors, plus_low_rank

WIDTH, INTO = 6, 5
# Ranks of what acts on each part of a map.
PARTS = {
    "plain": [[2]],
    "two on one": [[2, 3]],
    "fused": [[2], [2], [2]],
    "fused, the middle alone": [[], [3], []],
    "fused, of several ranks": [[1, 2], [], [4]],
}


def made(ranks: list[list[int]], dtype: torch.dtype) -> list[list[Factors]]:
    return [
        [
            (torch.randn(r, INTO, dtype=dtype), torch.randn(WIDTH, r, dtype=dtype), 0.5 + place)
            for place, r in enumerate(part)
        ]
        for part in ranks
    ]


def written_out(y: Tensor, x: Tensor, parts: list[list[Factors]]) -> Tensor:
    pieces = list(y.double().chunk(len(parts), dim=-1))
    for place, part in enumerate(parts):
        for a, b, scale in part:
            pieces[place] = pieces[place] + scale * (x.double() @ a.double().T @ b.double().T)
    return torch.cat(pieces, dim=-1)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", PARTS)
def test_one_pass_gives_the_sum_of_all_changes(name: str, grad: bool) -> None:
    parts = made(PARTS[name], torch.float32)
    x, y = torch.randn(2, 3, INTO), torch.randn(2, 3, WIDTH * len(parts))
    wanted = written_out(y, x, parts)
    with torch.set_grad_enabled(grad):
        found = plus_low_rank(y, x, parts)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PARTS)
def test_gradients_are_those_of_the_sum(name: str) -> None:
    parts = made(PARTS[name], torch.float64)
    x = torch.randn(2, INTO, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, WIDTH * len(parts), dtype=torch.float64, requires_grad=True)
    flat = [t.requires_grad_() for part in parts for a, b, _ in part for t in (a, b)]
    assert torch.autograd.gradcheck(lambda *_: plus_low_rank(y, x, parts), (y, x, *flat))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", PARTS)
def test_without_a_second_factor_nothing_changes(name: str, grad: bool) -> None:
    parts = [
        [(a, torch.zeros_like(b), c) for a, b, c in p] for p in made(PARTS[name], torch.float32)
    ]
    y = torch.randn(2, 3, WIDTH * len(parts))
    before = y.clone()
    with torch.set_grad_enabled(grad):
        assert torch.equal(plus_low_rank(y, torch.randn(2, 3, INTO), parts), before)


@pytest.mark.parametrize("name", PARTS)
def test_autocast_computes_in_its_own_precision(name: str) -> None:
    parts = made(PARTS[name], torch.float32)
    x, y = torch.randn(2, 3, INTO), torch.randn(2, 3, WIDTH * len(parts)).bfloat16()
    wanted = written_out(y, x, parts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = plus_low_rank(y, x, parts)
    assert found.dtype == torch.bfloat16
    error = (found.double() - wanted).norm() / wanted.norm()
    assert error < 0.02
