"""Low-rank changes of linear maps: LoRA and DoRA.

    LoRA   y' = (W + c B A) x + b,           A (r, in), B (out, r), B = 0 at the start
    DoRA   y' = m * (V x / ||V||) + b,       V = W + c B A, ||.|| per output row, m (out,)

c = alpha / r, or alpha / sqrt(r) with rsLoRA. Hu et al. 2022; Kalajdzievski 2023; Liu et al. 2024,
whose section 4.3 takes no gradient through ||V||: so does this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..low_rank import plus_low_rank
from ..sites.sitemap import ATTENTION_LEAVES, FFN_LEAVES, Leaf, SiteMap
from .base import (
    AdapterModule,
    Delta,
    MethodConfig,
    check_choice,
    check_count,
    check_number,
    check_rate,
)
from .init import kaiming

TARGETS = (*ATTENTION_LEAVES, *FFN_LEAVES)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(MethodConfig):
    """`targets`: any of q, k, v, o, up, gate, down. `alpha` defaults to the rank (c = 1).

    Dropout acts on x before A; it needs a linear map that is really called or
    `nn.MultiheadAttention`, and add_adapter says where that is not so.
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    rslora: bool = False

    method: ClassVar[str] = "lora"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_targets(self, TARGETS)
        check_rate("dropout", self.dropout)
        check_count("rank", self.rank)
        if self.alpha is not None:
            check_number("alpha", self.alpha)
            if self.alpha <= 0:
                raise ValueError(f"alpha must be above 0, not {self.alpha}")

    @property
    def scaling(self) -> float:
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
        return LoRA(self, leaf)


class LoRA(Delta):
    """Parameters `a` (r, in) and `b` (out, r)."""

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
        """c B A dropout(x): (..., in) -> (..., out)."""
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
    """LoRA on the direction of every weight row, and a learned length for each."""

    method: ClassVar[str] = "dora"

    def module(self, leaf: Leaf) -> LoRA:
        return DoRA(self, leaf)


class DoRA(LoRA):
    """Parameters of LoRA and `magnitude` (out,), which starts as the row norms of W."""

    def factors(self) -> None:
        return None

    def __init__(self, config: LoRAConfig, leaf: Leaf) -> None:
        super().__init__(config, leaf)
        assert leaf.weight is not None
        self.magnitude = nn.Parameter(row_norms(leaf.weight.detach()).to(**leaf.like()))

    def direction(self, weight: Tensor) -> Tensor:
        """m / ||W + c B A||, (out,), in the parameters' dtype so that it starts at exactly 1."""
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
            # As in forward, all but the frozen bias is turned: also what others have added to it.
            bias = bias * ratio if leaf.bias is None else leaf.bias + ratio * (bias - leaf.bias)
        return changed * ratio[:, None], bias


def row_norms(weight: Tensor) -> Tensor:
    """(out, in) -> (out,) in float32, or in float64 where the weight is."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=1, dtype=dtype)


def check_targets(config: MethodConfig, choices: tuple[str, ...]) -> None:
    """Makes `targets` a tuple and refuses names that no leaf has."""
    targets = config.targets  # type: ignore[attr-defined]
    if isinstance(targets, str):
        raise ValueError(f"targets must be a tuple of leaves, e.g. targets=({targets!r},)")
    object.__setattr__(config, "targets", tuple(targets))
    if not targets:
        raise ValueError(f"targets is empty: name at least one of {', '.join(choices)}")
    for target in targets:
        check_choice("targets", target, choices)


def chosen_leaves(config: MethodConfig, sites: SiteMap, roles: tuple[str, ...]) -> list[Leaf]:
    """The leaves of the given roles under the config's `sites`.

    Raises:
        ValueError: a role does not occur there at all.
    """
    selection = sites.select(config.sites)
    found = [leaf for leaf in sites.leaves() if leaf.name in selection and leaf.role in roles]
    there = {leaf.role for leaf in found}
    for role in roles:
        if role not in there:
            known = sorted({leaf.role for leaf in sites.leaves() if leaf.name in selection})
            raise ValueError(
                f"{sites.architecture} has no linear map {role!r} under sites={config.sites!r}; "
                f"it has {', '.join(known)}"
            )
    return found
