"""RepAdapter: a linear adapter on the input of linear maps, which folds into them exactly.

    y = W (x + s (B (A x + a) + b)) + b_W      A (r, D), B (D, r) of `groups` blocks, B = b = 0

before q, k and v, which share one adapter, and before the first map of the feed-forward part: up,
and gate if there is one. As a weight:

    W' = W (I + s B A),    b_W' = b_W + s W (B a + b)

Luo et al. 2023. Their code applies dropout to A x + a in training; ours does not. If other adapters
act on the same map, its change goes through the frozen W, not through the changed one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sites.sitemap import Leaf, SiteMap
from .base import AdapterModule, Delta, MethodConfig
from .init import kaiming
from .select import check_count, check_scale

# The maps of a sublayer that read the same input.
READERS = {"attn": ("q", "k", "v"), "ffn": ("up", "gate")}


@dataclass(frozen=True, kw_only=True)
class RepAdapterConfig(MethodConfig):
    """RepAdapter, Luo et al. 2023: one adapter in each sublayer, for the maps under `sites`."""

    # r, the width of the bottleneck in channels, a multiple of `groups`.
    size: int = 8
    # The number of blocks of B, at least 1; it must divide r and the width.
    groups: int = 2
    # s, a factor on the change, not 0.
    scale: float = 1.0

    method: ClassVar[str] = "repadapter"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("size", self.size)
        check_count("groups", self.groups)
        check_scale(self.scale, zero="B and b")
        if self.size % self.groups:
            raise ValueError(f"groups {self.groups} does not divide size {self.size}")

    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        selection = sites.select(self.sites)
        built: dict[str, AdapterModule] = {}
        for sublayer in sites.sublayers():
            roles = READERS.get(sublayer.kind, ())
            leaves = [sublayer.leaves[role] for role in roles if role in sublayer.leaves]
            leaves = [leaf for leaf in leaves if leaf.name in selection]
            for leaf in leaves:
                self._check(leaf, sites)
            if leaves:
                shared = RepAdapter(self, leaves[0])
                built |= {leaf.name: shared for leaf in leaves}
        if not built:
            raise ValueError(
                f"{sites.architecture} has no linear map q, k, v, up or gate under "
                f"sites={self.sites!r}"
            )
        return built

    def _check(self, leaf: Leaf, sites: SiteMap) -> None:
        if leaf.in_features % self.groups:
            raise ValueError(
                f"groups {self.groups} does not divide the width {leaf.in_features} that "
                f"{leaf.name} reads"
            )
        if leaf.raw and leaf.bias is None:
            raise ValueError(
                f"{leaf.name}: {sites.architecture} reads this weight itself and has no bias "
                "there, so there is nothing to shift; leave it out with sites=..."
            )


class RepAdapter(Delta):
    """One adapter, shared by the maps that read the same input.

    Parameters `down` A (r, D), `down_bias` a (r,), `up` B (D, r/groups) and `up_bias` b (D,).
    """

    def __init__(self, config: RepAdapterConfig, leaf: Leaf) -> None:
        super().__init__()
        width, like = leaf.in_features, leaf.like()
        self.scale, self.groups = config.scale, config.groups
        self.down = nn.Parameter(kaiming(torch.empty(config.size, width, **like)))
        self.down_bias = nn.Parameter(torch.zeros(config.size, **like))
        self.up = nn.Parameter(torch.zeros(width, config.size // config.groups, **like))
        self.up_bias = nn.Parameter(torch.zeros(width, **like))

    def through(self, leaf: Leaf) -> tuple[Tensor, Tensor]:
        """Returns s W B (out, r) and s W b (out,), for the weight W of the frozen leaf."""
        assert leaf.weight is not None
        weight = leaf.weight.to(self.up.dtype)
        columns = weight.unflatten(1, (self.groups, -1))
        blocks = self.up.unflatten(0, (self.groups, -1))
        maps = torch.einsum("ogd,gdr->ogr", columns, blocks).flatten(1)
        return self.scale * maps, self.scale * (weight @ self.up_bias)

    def forward(self, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        h = F.linear(x.to(self.down.dtype), self.down, self.down_bias)
        return y + F.linear(h, *self.through(leaf)).to(y.dtype)

    def effective(
        self, weight: Tensor, bias: Tensor | None, leaf: Leaf
    ) -> tuple[Tensor, Tensor | None]:
        maps, shift = self.through(leaf)
        shift = (shift + maps @ self.down_bias).to(weight.dtype)
        changed = weight + (maps @ self.down).to(weight.dtype)
        return changed, shift if bias is None else bias + shift
