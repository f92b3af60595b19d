"""Low-rank changes of linear maps: LoRA and DoRA.

    LoRA   y' = (W + c B A) x + b,           A (r, in), B (out, r), B = 0 at the start
    DoRA   y' = m * (V x / ||V||) + b,       V = W + c B A, ||.|| per output row, m (out,)

c = alpha / r, or alpha / sqrt(r) with rsLoRA. Hu et al. 2022 (LoRA); Kalajdzievski 2023 (rsLoRA);
Liu et al. 2024 (DoRA). As in DoRA's section 4.3, no gradient goes through ||V||.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..low_rank import plus_low_rank
from ..sites.sitemap import ATTENTION_LEAVES, FFN_LEAVES, Leaf, SiteMap
from .base import AdapterModule, Delta, MethodConfig
from .init import kaiming
from .select import check_count, check_number, check_rate, check_targets, chosen_leaves

TARGETS = (*ATTENTION_LEAVES, *FFN_LEAVES)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(MethodConfig):
    """LoRA, Hu et al. 2022.

    Dropout needs a linear map that the library calls as a module, or `nn.MultiheadAttention`;
    `add_adapter` raises ValueError elsewhere.
    """

    # r, at least 1, at most the width of each target.
    rank: int = 8
    # alpha of the formula, above 0; None: the rank, so that c = 1 without rsLoRA.
    alpha: float | None = None
    # The linear maps that change, one or more of q, k, v, o, up, gate and down.
    targets: tuple[str, ...] = ("q", "v")
    # Probability that an element of x is zeroed in front of A in training, 0 to below 1.
    dropout: float = 0.0
    # Takes c = alpha / sqrt(r), Kalajdzievski 2023, instead of alpha / r.
    rslora: bool = False

    method: ClassVar[str] = "lora"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_targets(self)
        check_rate("dropout", self.dropout)
        check_count("rank", self.rank)
        if self.alpha is not None:
            check_number("alpha", self.alpha)
            if self.alpha <= 0:
                raise ValueError(f"alpha must be above 0, not {self.alpha}")

    @property
    def scaling(self) -> float:
        """c of the formula."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.rslora else self.rank)

    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        built: dict[str, AdapterModule] = {}
        for leaf in chosen_leaves(self, sites, self.targets):
            if self.rank > min(leaf.in_features, leaf.out_features):
                raise ValueError(
                    f"rank {self.rank} is larger than {leaf.name} is wide "
                    f"({leaf.in_features} -> {leaf.out_features})"
                )
            if self.dropout and leaf.raw and not isinstance(leaf.owner, nn.MultiheadAttention):
                raise ValueError(
                    f"{leaf.name}: {sites.architecture} reads this weight itself, so dropout "
                    "cannot act on its input; use dropout=0"
                )
            built[leaf.name] = self.module(leaf)
        return built

    def module(self, leaf: Leaf) -> LoRA:
        """Returns the new module of one leaf."""
        return LoRA(self, leaf)


class LoRA(Delta):
    """LoRA of one linear map. Parameters `a` (r, in) and `b` (out, r)."""

    def __init__(self, config: LoRAConfig, leaf: Leaf) -> None:
        super().__init__()
        like = leaf.like()
        self.scaling, self.dropout = config.scaling, config.dropout
        self.a = nn.Parameter(kaiming(torch.empty(config.rank, leaf.in_features, **like)))
        self.b = nn.Parameter(torch.zeros(leaf.out_features, config.rank, **like))

    @property
    def as_weight(self) -> bool:
        return not (self.training and self.dropout > 0.0)

    def low_rank(self, x: Tensor) -> Tensor:
        """x: (..., in) -> c B A dropout(x), (..., out)."""
        x = F.dropout(x, self.dropout, self.training).to(self.a.dtype)
        return F.linear(F.linear(x, self.a), self.b) * self.scaling

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        return (self.a, self.b, self.scaling) if self.as_weight else None

    def forward(self, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        factors = self.factors()
        if factors is None:
            return y + self.low_rank(x).to(y.dtype)
        return plus_low_rank(y, x, [[factors]])

    def effective(
        self, weight: Tensor, bias: Tensor | None, leaf: Leaf
    ) -> tuple[Tensor, Tensor | None]:
        return weight + (self.b @ self.a).to(weight.dtype) * self.scaling, bias


@dataclass(frozen=True, kw_only=True)
class DoRAConfig(LoRAConfig):
    """DoRA, Liu et al. 2024: LoRA on the direction of every weight row, and a learned length each.

    Its options are those of `LoRAConfig`.
    """

    method: ClassVar[str] = "dora"

    def module(self, leaf: Leaf) -> LoRA:
        return DoRA(self, leaf)


class DoRA(LoRA):
    """DoRA of one linear map.

    Parameters of `LoRA` and `magnitude` m (out,), which starts as the row norms of W.
    """

    def factors(self) -> None:
        return None

    def __init__(self, config: LoRAConfig, leaf: Leaf) -> None:
        super().__init__(config, leaf)
        assert leaf.weight is not None
        self.magnitude = nn.Parameter(row_norms(leaf.weight.detach()).to(**leaf.like()))

    def direction(self, weight: Tensor) -> Tensor:
        """weight: (out, in) -> m / ||weight + c B A||, (out,), in the dtype of the parameters.

        In that dtype it starts at exactly 1.
        """
        changed = weight.detach() + (self.b @ self.a).detach().to(weight.dtype) * self.scaling
        return self.magnitude / row_norms(changed).to(self.magnitude.dtype)

    def forward(self, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        assert leaf.weight is not None
        ratio = self.direction(leaf.weight)
        linear = y if leaf.bias is None else y - leaf.bias
        return y + ((ratio - 1) * linear + ratio * self.low_rank(x)).to(y.dtype)

    def effective(
        self, weight: Tensor, bias: Tensor | None, leaf: Leaf
    ) -> tuple[Tensor, Tensor | None]:
        assert leaf.weight is not None
        changed, _ = super().effective(weight, bias, leaf)
        ratio = self.direction(leaf.weight).to(weight.dtype)
        if bias is not None:
            # As in forward, the ratio scales all but the frozen bias, so also what others added.
            bias = bias * ratio if leaf.bias is None else leaf.bias + ratio * (bias - leaf.bias)
        return changed * ratio[:, None], bias


def row_norms(weight: Tensor) -> Tensor:
    """weight: (out, in) -> the norms of its rows (out,), in float32 or the weight's wider dtype."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=1, dtype=dtype)
