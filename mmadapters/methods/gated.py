"""Gated cross-attention: lets a frozen text tower read the tokens of an image.

Before a block of the text tower, with x the tokens that enter it and z the image's,

    x'  = x  + tanh(g) O Attention(Q LN(x), K LN(z), V LN(z))
    x'' = x' + tanh(g') F2 GELU(F1 LN(x'))                       with `feed_forward`

g = g' = 0 at the start, for a fresh adapter to be the identity; Q, K, V, O, F1 and F2 have no bias.
Alayrac et al. 2022 (Flamingo), section 3.1.2 and figure 4. Here z is the output of the image
tower's last block, before any norm of the tower. Theirs is the output of a Perceiver resampler,
already normed; this is why ours has a LayerNorm of z. Theirs always has the feed-forward part, four
times as wide as the tower, and masks all images but the last one before a text token: here a text
has one image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sites.acting import Context
from ..sites.sitemap import Block, SiteMap, Tower
from .base import AdapterModule, Branch, MethodConfig
from .init import linear
from .select import check_count, check_rate


@dataclass(frozen=True, kw_only=True)
class GatedCrossAttentionConfig(MethodConfig):
    """Gated cross-attention before blocks of the text tower."""

    # w, the width of all heads together in channels, a multiple of `heads`.
    size: int = 256
    # The number of attention heads, at least 1.
    heads: int = 4
    # n: acts before blocks 0, n, 2n and so on; at least 1.
    every: int = 1
    # The inner width of F1 and F2 over the tower's width, a whole number; 0 leaves that part out.
    feed_forward: int = 0
    # Probability that an attention weight, or an element inside the feed-forward part, is zeroed in
    # training, 0 to below 1.
    dropout: float = 0.0

    method: ClassVar[str] = "gated_cross_attention"
    mergeable: ClassVar[bool | str] = "it depends on the image, so no weight equals it"

    def __post_init__(self) -> None:
        super().__post_init__()
        for what in ("size", "heads", "every"):
            check_count(what, getattr(self, what))
        if self.size % self.heads:
            raise ValueError(f"size {self.size} is no multiple of the {self.heads} heads")
        if self.feed_forward != 0:
            check_count("feed_forward", self.feed_forward)
        check_rate("dropout", self.dropout)

    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        vision, text = _towers(sites)
        selection = sites.select(self.sites)
        chosen = [b for b in text.blocks[:: self.every] if b.name in selection]
        if not chosen:
            raise ValueError(
                f"gated_cross_attention acts before the blocks {text.blocks[0].name} to "
                f"{text.blocks[-1].name} (every={self.every}), and sites={self.sites!r} names none"
            )
        return {block.name: GatedCrossAttention(self, block, vision.width) for block in chosen}


def _towers(sites: SiteMap) -> tuple[Tower, Tower]:
    vision, text = sites.towers.get("vision"), sites.towers.get("text")
    crossed = any(tower.crossed for tower in sites.towers.values())
    if vision is not None and (text.crossed if text is not None else crossed):
        raise ValueError(
            f"the text of {sites.architecture} looks at the image already, by cross-attention of "
            "its own: take cross_modal, which adapts that"
        )
    if vision is None or text is None:
        missing = "vision" if vision is None else "text"
        raise ValueError(
            "gated_cross_attention lets a text tower look at an image, and "
            f"{sites.architecture} has no tower {missing!r}: take an image-text encoder (CLIP, "
            "SigLIP)"
        )
    return vision, text


class GatedCrossAttention(Branch):
    """The cross-attention before one block. E: the width of the image tower.

    Parameters of `norm` (D,) and `norm_image` (E,), `query` (w, D), `key` and `value` (w, E),
    `out` (D, w) and `gate` (); with `feed_forward` those of `inner`.
    """

    reads = frozenset({"image"})

    def __init__(self, config: GatedCrossAttentionConfig, block: Block, image_width: int) -> None:
        super().__init__()
        sublayer = next(iter(block.sublayers.values()))
        width, size, like = sublayer.width, config.size, sublayer.like()
        self.heads, self.dropout = config.heads, config.dropout
        self.norm = nn.LayerNorm(width, **like)
        self.norm_image = nn.LayerNorm(image_width, **like)
        self.query = linear(width, size, like, bias=False)
        self.key = linear(image_width, size, like, bias=False)
        self.value = linear(image_width, size, like, bias=False)
        self.out = linear(size, width, like, bias=False)
        self.gate = nn.Parameter(torch.zeros((), **like))
        hidden = config.feed_forward * width
        self.inner = _FeedForward(width, hidden, config.dropout, like) if hidden else None

    def change(self, branch: Tensor, context: Context) -> Tensor:
        """branch: (B, L, D), the input of the block; the image is (B, N, E) -> (B, L, D)."""
        assert context.image is not None
        change = self.gate.tanh() * self.fetched(branch, context.image)
        if self.inner is not None:
            change = change + self.inner(branch + change)
        return change.to(branch.dtype)

    def fetched(self, x: Tensor, image: Tensor) -> Tensor:
        """x: (B, L, D), image: (B, N, E) -> the attention's output without the gate, (B, L, D)."""
        image = self.norm_image(image.to(self.norm_image.weight.dtype))
        q, k, v = (
            states.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for states in (self.query(self.norm(x)), self.key(image), self.value(image))
        )
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.out(attended.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    """The gated feed-forward part; it returns what is added to its input.

    Parameters of `norm` (D,), `up` (h, D) and `down` (D, h), and `gate` ().
    """

    def __init__(self, width: int, hidden: int, dropout: float, like: dict) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm = nn.LayerNorm(width, **like)
        self.up = linear(width, hidden, like, bias=False)
        self.down = linear(hidden, width, like, bias=False)
        self.gate = nn.Parameter(torch.zeros((), **like))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.dropout(F.gelu(self.up(self.norm(x))), self.dropout, self.training)
        return self.gate.tanh() * self.down(inner)
