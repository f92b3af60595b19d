"""FacT: changes of all layers' weights as one factorised tensor.

    y' = (W_l + s V C_l U) x + b      U (r, in) and V (out, r) for all layers, C_l (r, r) for each

V = 0 at the start. Jie and Deng 2023, FacT-TT: the transpose of their s U C_l V^T, because their W
acts from the right. With `core` k (FacT-TK), the C_l are combinations of k matrices that all layers
share:

    C_l = sum_j p_lj K_j,    K (k, r, r), p_l (k,)

The paper cuts the feed-forward part's maps into squares of the width, which share U and V with
attention. Here maps of any shape share U with the maps that read as many features, and V with the
maps that give as many. Their code applies dropout to the result of C_l in training; ours does not.
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
from .select import check_count, check_scale, check_targets, chosen_leaves


@dataclass(frozen=True, kw_only=True)
class FacTConfig(MethodConfig):
    """FacT-TT, or FacT-TK with `core`."""

    # r, at least 1, at most the width of each target.
    rank: int = 16
    # k of FacT-TK, at least 1; None: FacT-TT.
    core: int | None = None
    # s, a factor on the change, not 0.
    scale: float = 1.0
    # The linear maps that change, one or more of q, k, v, o, up, gate and down.
    targets: tuple[str, ...] = ("q", "k", "v", "o", "up", "down")

    method: ClassVar[str] = "fact"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_targets(self)
        check_count("rank", self.rank)
        if self.core is not None:
            check_count("core", self.core)
        check_scale(self.scale, zero="V")

    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        shared: dict[tuple, nn.Parameter] = {}
        built: dict[str, AdapterModule] = {}
        for leaf in chosen_leaves(self, sites, self.targets):
            if self.rank > min(leaf.in_features, leaf.out_features):
                raise ValueError(
                    f"rank {self.rank} is larger than {leaf.name} is wide "
                    f"({leaf.in_features} -> {leaf.out_features})"
                )
            # Towers are trained apart; that they are of one width would be a coincidence.
            tower, like = leaf.name.split(".")[0], leaf.like()
            u, v, core = (tower, "u", leaf.in_features), (tower, "v", leaf.out_features), (tower,)
            if u not in shared:
                shared[u] = nn.Parameter(kaiming(torch.empty(self.rank, leaf.in_features, **like)))
            if v not in shared:
                shared[v] = nn.Parameter(torch.zeros(leaf.out_features, self.rank, **like))
            if self.core is not None and core not in shared:
                cores = torch.empty(self.core, self.rank, self.rank, **like)
                shared[core] = nn.Parameter(cores.normal_(std=self.rank**-0.5))
            built[leaf.name] = FacT(self, leaf, shared[u], shared[v], shared.get(core))
        return built


class FacT(Delta):
    """The change of one linear map.

    Parameters `u` (r, in) and `v` (out, r), which are shared, and `c` (r, r); for FacT-TK `core`
    (k, r, r), which is shared, and `p` (k,) instead of `c`.
    """

    def __init__(
        self,
        config: FacTConfig,
        leaf: Leaf,
        u: nn.Parameter,
        v: nn.Parameter,
        core: nn.Parameter | None,
    ) -> None:
        super().__init__()
        like, rank = leaf.like(), config.rank
        self.scale = config.scale
        self.u, self.v = u, v
        if core is None:
            self.c = nn.Parameter(kaiming(torch.empty(rank, rank, **like)))
        else:
            self.core = core
            self.p = nn.Parameter(torch.empty(len(core), **like).normal_(std=len(core) ** -0.5))

    def middle(self) -> Tensor:
        """Returns s C_l, (r, r)."""
        if "p" in self._parameters:
            return self.scale * torch.einsum("k,kij->ij", self.p, self.core)
        return self.scale * self.c

    def forward(self, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        h = F.linear(F.linear(x.to(self.u.dtype), self.u), self.middle())
        return y + F.linear(h, self.v).to(y.dtype)

    def effective(
        self, weight: Tensor, bias: Tensor | None, leaf: Leaf
    ) -> tuple[Tensor, Tensor | None]:
        return weight + (self.v @ self.middle() @ self.u).to(weight.dtype), bias
