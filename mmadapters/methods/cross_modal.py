"""Adapters inside cross-attention, on what has been fetched and the query that asked for it.

    u' = u + s U act(D [LN_x(x); LN_u(u)] + b)

u is what a layer's cross-attention gives, x the residual stream that it asked with: BLIP's text
before it looks at the image, CoCa's caption. A bottleneck after cross-attention (Houlsby et al.
2019) reads u alone, and so cannot change what it makes of an image by what was asked. Each has a
LayerNorm of its own, as a residual stream is much larger than a branch. U, which has a bias, starts
at zero, so that a fresh adapter is the identity.

No paper that we know of has this form: VL-Adapter (Sung et al. 2022) puts a bottleneck on u alone,
UniAdapter (Lu et al. 2024) one beside the feed-forward part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sites.sitemap import SiteMap, Sublayer
from .adding import Adding
from .base import AdapterModule, MethodConfig, check_choice, check_count, check_number, check_rate
from .bottleneck import ACTIVATIONS, chosen_sublayers
from .init import linear, zero_linear


@dataclass(frozen=True, kw_only=True)
class CrossModalConfig(MethodConfig):
    """`size`: r; `scale`: s; `activation`: act; `dropout`: behind it."""

    size: int = 64
    activation: str = "gelu"
    scale: float = 1.0
    dropout: float = 0.0

    method: ClassVar[str] = "cross_modal"
    mergeable: ClassVar[bool | str] = (
        "a bottleneck has a non-linearity between its two projections, so no weight equals it"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("size", self.size)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_number("scale", self.scale)
        if self.scale == 0:
            raise ValueError(
                "scale must not be 0: with the up-projection at zero nothing would learn"
            )
        check_rate("dropout", self.dropout)

    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        if all(sublayer.kind != "cross" for sublayer in sites.sublayers()):
            raise ValueError(
                f"cross_modal acts inside cross-attention, and {sites.architecture} has none: take "
                "gated_cross_attention, which lets the text tower of an image-text encoder look at "
                "the image, or an encoder that has it (BLIP, CoCa)"
            )
        chosen = chosen_sublayers(self, sites, ("cross",))
        return {sublayer.name: CrossModal(self, sublayer) for sublayer in chosen}


class CrossModal(Adding):
    """Parameters of `norm_query` and `norm_fetched` (D,), `down` (r, 2 D) and `up` (D, r), with
    biases."""

    reads = frozenset({"residual"})

    def __init__(self, config: CrossModalConfig, sublayer: Sublayer) -> None:
        super().__init__()
        width, like = sublayer.width, sublayer.like()
        self.activation, self.scale, self.dropout = config.activation, config.scale, config.dropout
        self.norm_query = nn.LayerNorm(width, **like)
        self.norm_fetched = nn.LayerNorm(width, **like)
        self.down = linear(2 * width, config.size, like)
        self.up = zero_linear(config.size, width, like)

    def change(
        self, branch: Tensor, *, residual: Tensor | None, input: Tensor | None, **more: Any
    ) -> Tensor:
        assert residual is not None
        both = torch.cat([self.norm_query(residual), self.norm_fetched(branch)], dim=-1)
        inner = ACTIVATIONS[self.activation](self.down(both))
        inner = F.dropout(inner, self.dropout, self.training)
        return (self.scale * self.up(inner)).to(branch.dtype)
