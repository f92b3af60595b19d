"""How fast a training step can be, in forward passes of the frozen encoder.

A block's backward pass costs as much as its forward pass for the gradient of its input, and as much
again for that of its weights, which frozen ones do not need; the products of attention have two
inputs and no weights: 1 + a forwards, where a is their share. With L blocks of which k is the first
adapted one, whose input needs no gradient,

    full    3
    T(k)    1 + s (1 + a) (L - 1 - k) / L
    T_c(k)  s ((L - k) / L + (1 + a) (L - 1 - k) / L),  the states that enter block k being stored

s is the blocks' share of the forward pass, near 1 for a ViT, less for a speech encoder, whose
convolutions come before. What adapters, heads and optimisers cost is left out: these are limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

FULL = 3.0


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A stack of L = `blocks` blocks on N = `tokens` states of D = `width` channels.

    Attributes:
        share: of the encoder's forward pass, by floating-point operations.
    """

    name: str
    blocks: int
    tokens: int
    width: int
    share: float = 1.0

    @property
    def attention(self) -> float:
        """a: the share of a block's operations that are products of attention."""
        return 4 * self.tokens / (24 * self.width + 4 * self.tokens)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def first_block(start: str, blocks: int) -> int:
    """k of a tower of so many blocks: a number, "half" or "three-quarters".

    Raises:
        ValueError: neither, or there is no such block.
    """
    if start in STARTS:
        return int(STARTS[start] * blocks)
    if not start.isdecimal():
        raise ValueError(f"a first block is a number, {' or '.join(STARTS)}, not {start!r}")
    if int(start) >= blocks:
        raise ValueError(f"the first block {start} is none of {blocks}: they count from 0")
    return int(start)


STARTS = {"half": 1 / 2, "three-quarters": 3 / 4}


def step_limit(towers: Sequence[Tower], start: str) -> float:
    """T(k), in forward passes of the whole encoder."""
    return 1 + sum(_backward(tower, start) for tower in towers)


def cached_limit(towers: Sequence[Tower], start: str) -> float:
    """T_c(k), in forward passes of the whole encoder."""
    return sum(
        tower.share * (tower.blocks - first_block(start, tower.blocks)) / tower.blocks
        + _backward(tower, start)
        for tower in towers
    )


def _backward(tower: Tower, start: str) -> float:
    differentiated = tower.blocks - 1 - first_block(start, tower.blocks)
    return tower.share * (1 + tower.attention) * differentiated / tower.blocks
