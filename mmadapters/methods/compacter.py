"""Compacter: bottleneck adapters whose projections are sums of Kronecker products.

    W = sum_i  A_i (x) (s_i t_i^T),   i = 1 .. n

A (n, n, n) is one parameter for all sites; s_i (in/n, rank) and t_i (rank, out/n) belong to each
projection. Karimi Mahabadi et al. 2021, equations 4 to 6. The s of the up-projection starts at
zero, for a fresh adapter to be the identity; in the original, s and t start at small random values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..sites.sitemap import SiteMap
from .base import AdapterModule
from .bottleneck import Bottleneck, BottleneckConfig
from .select import bottleneck_size, check_count, chosen_sublayers


@dataclass(frozen=True, kw_only=True)
class CompacterConfig(BottleneckConfig):
    """Compacter. Its other options are those of `BottleneckConfig`, with a GELU by default."""

    # act, a name in `bottleneck.ACTIVATIONS`.
    activation: str = "gelu"
    # n of the formula, at least 1; it must divide the width and the bottleneck.
    phm_dim: int = 4
    # The rank of each s_i t_i^T, at least 1.
    phm_rank: int = 1
    method: ClassVar[str] = "compacter"
    standard = ("reduction_factor", 32)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("phm_dim", self.phm_dim)
        check_count("phm_rank", self.phm_rank)

    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        chosen = chosen_sublayers(self, sites, self.placement.at)
        for sublayer in chosen:
            size = bottleneck_size(sublayer, self.size, self.reduction_factor)
            for what, value in (("width", sublayer.width), ("bottleneck", size)):
                if value % self.phm_dim:
                    raise ValueError(
                        f"phm_dim {self.phm_dim} does not divide the {what} {value} of "
                        f"{sublayer.name}"
                    )
        n = self.phm_dim
        shared = nn.Parameter(torch.empty(n, n, n, **chosen[0].like()).normal_(std=0.01))

        def project(in_features: int, out_features: int, like: dict) -> nn.Module:
            return KroneckerLinear(in_features, out_features, shared, rank=self.phm_rank, like=like)

        built: dict[str, AdapterModule] = {}
        for sublayer in chosen:
            module = Bottleneck(self, sublayer, project=project)
            if module.norm_after is None:
                nn.init.zeros_(module.up.left)  # type: ignore[arg-type]
            built[sublayer.name] = module
        return built


class KroneckerLinear(nn.Module):
    """y = x W + b, W (in, out) the sum of Kronecker products.

    Parameters `rule` A (n, n, n), which is shared, `left` s (n, in/n, rank), `right` t (n, rank,
    out/n) and `bias` (out,).
    """

    def __init__(
        self, in_features: int, out_features: int, rule: nn.Parameter, *, rank: int, like: dict
    ) -> None:
        super().__init__()
        n = len(rule)
        self.rule = rule
        self.left = nn.Parameter(torch.empty(n, in_features // n, rank, **like))
        self.right = nn.Parameter(torch.empty(n, rank, out_features // n, **like))
        self.bias = nn.Parameter(torch.zeros(out_features, **like))
        for factor in (self.left, self.right):
            for part in factor.data:
                nn.init.xavier_uniform_(part)

    def forward(self, x: Tensor) -> Tensor:
        factors = self.left @ self.right
        weight = torch.einsum("nij,nkl->ikjl", self.rule.to(factors), factors)
        return x @ weight.flatten(2).flatten(0, 1) + self.bias
