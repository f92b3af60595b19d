"""Adapters inside cross-attention, on its output and on the query that asked for it.

    u' = u + s U act(D [LN_x(x); LN_u(u)] + b)

u is the output of a layer's cross-attention. x is the residual stream that gave the queries:
BLIP's text before its cross-attention to the image, CoCa's caption. A bottleneck behind the
cross-attention (Houlsby et al. 2019) reads u alone, and so its change cannot depend on the query.
x and u have a LayerNorm each, because a residual stream is much larger than a branch. U, which has
a bias, starts at zero, so that a fresh adapter is the identity.

We know of no paper with this form. VL-Adapter (Sung et al. 2022) puts a bottleneck on u alone,
UniAdapter (Lu et al. 2024) one beside the feed-forward part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sites.acting import Context
from ..sites.sitemap import SiteMap, Sublayer
from .base import AdapterModule, Branch, MethodConfig
from .bottleneck import ACTIVATIONS
from .init import linear, zero_linear
from .select import check_choice, check_count, check_rate, check_scale, chosen_sublayers


@dataclass(frozen=True, kw_only=True)
class CrossModalConfig(MethodConfig):
    """A bottleneck inside every cross-attention under `sites`."""

    # r, the width of the bottleneck in channels, at least 1.
    size: int = 64
    # act, a name in `bottleneck.ACTIVATIONS`.
    activation: str = "gelu"
    # s, a factor on the result, not 0.
    scale: float = 1.0
    # Probability that an element is zeroed behind act in training, 0 to below 1.
    dropout: float = 0.0

    method: ClassVar[str] = "cross_modal"
    mergeable: ClassVar[bool | str] = (
        "a bottleneck has a non-linearity between its two projections, so no weight equals it"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("size", self.size)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_scale(self.scale)
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


class CrossModal(Branch):
    """One adapter in one cross-attention.

    Parameters of `norm_query` and `norm_fetched` (D,), `down` (r, 2 D) and `up` (D, r), with
    biases.
    """

    reads = frozenset({"residual"})

    def __init__(self, config: CrossModalConfig, sublayer: Sublayer) -> None:
        super().__init__()
        width, like = sublayer.width, sublayer.like()
        self.activation, self.scale, self.dropout = config.activation, config.scale, config.dropout
        self.norm_query = nn.LayerNorm(width, **like)
        self.norm_fetched = nn.LayerNorm(width, **like)
        self.down = linear(2 * width, config.size, like)
        self.up = zero_linear(config.size, width, like)

    def change(self, branch: Tensor, context: Context) -> Tensor:
        assert context.residual is not None
        both = torch.cat([self.norm_query(context.residual), self.norm_fetched(branch)], dim=-1)
        inner = ACTIVATIONS[self.activation](self.down(both))
        inner = F.dropout(inner, self.dropout, self.training)
        return (self.scale * self.up(inner)).to(branch.dtype)
