"""The least time of a training step, in forward passes of the frozen encoder.

The backward pass of a block costs one forward pass for the gradient of its input, and another one
for the gradient of its weights, which frozen weights do not need. The products of attention have
two inputs and no weights, so a frozen block costs 1 + a forward passes, where a is their share.
With L blocks, of which block k is the first adapted one and its input needs no gradient,

    full    3
    T(k)    1 + s (1 + a) (L - 1 - k) / L
    T_c(k)  s ((L - k) / L + (1 + a) (L - 1 - k) / L)   if the states that enter block k are stored

s is the blocks' share of the forward pass: near 1 for a ViT, less for a speech encoder, which has
convolutions before its blocks. The costs of adapters, heads and optimisers are left out, so that
these are limits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

FULL = 3.0  # full fine-tuning, in forward passes
STARTS = {"half": 1 / 2, "three-quarters": 3 / 4}  # shares of the blocks that stay below


@dataclass(frozen=True, kw_only=True)
class TowerSize:
    """The size of a tower: L = `blocks` blocks on N = `tokens` states of D = `width` channels.

    Attributes:
        name: "vision", "audio" or "text".
        share: s, the blocks' share of the encoder's floating-point operations, in (0, 1].
    """

    name: str
    blocks: int
    tokens: int
    width: int
    share: float = 1.0

    @property
    def attention(self) -> float:
        """Returns a, the share of a block's operations that are products of attention."""
        return 4 * self.tokens / (24 * self.width + 4 * self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON-ready fields."""
        return asdict(self)


def first_block(start: str, blocks: int) -> int:
    """Returns the number k of the first adapted block.

    Args:
        start: a number from 0, "half" or "three-quarters".
        blocks: number of blocks of the tower.

    Raises:
        ValueError: `start` is none of these, or the tower has no such block.
    """
    if start in STARTS:
        return int(STARTS[start] * blocks)
    if not start.isdecimal():
        raise ValueError(f"a first block is a number, {' or '.join(STARTS)}, not {start!r}")
    if int(start) >= blocks:
        raise ValueError(f"the first block {start} is none of {blocks}, which count from 0")
    return int(start)


def first_blocks(start: str, towers: Iterable[TowerSize]) -> str:
    """Words the first adapted blocks of some towers, each once: "6 of 12"."""
    words = [f"{first_block(start, tower.blocks)} of {tower.blocks}" for tower in towers]
    return ", ".join(dict.fromkeys(words))


def step_limit(towers: Sequence[TowerSize], start: str) -> float:
    """Returns T(k) in forward passes of the whole encoder."""
    return 1 + sum(_backward(tower, start) for tower in towers)


def cached_limit(towers: Sequence[TowerSize], start: str) -> float:
    """Returns T_c(k) in forward passes of the whole encoder."""
    return sum(
        tower.share * (tower.blocks - first_block(start, tower.blocks)) / tower.blocks
        + _backward(tower, start)
        for tower in towers
    )


def _backward(tower: TowerSize, start: str) -> float:
    differentiated = tower.blocks - 1 - first_block(start, tower.blocks)
    return tower.share * (1 + tower.attention) * differentiated / tower.blocks
