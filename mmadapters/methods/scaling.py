"""Methods that scale and shift activations: IA3 and SSF.

    IA3   y' = l * (W x + b)  for all maps but down;   y' = W (l * x) + b  for down
    SSF   y' = g * y + t      after every linear map and LayerNorm

Liu et al. 2022 (T-Few), section 3.3; Lian et al. 2022. All l and g start at 1, all t at 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..sites.sitemap import Leaf, SiteMap
from .base import AdapterModule, Delta, MethodConfig
from .select import check_targets, chosen_leaves


@dataclass(frozen=True, kw_only=True)
class IA3Config(MethodConfig):
    """IA3, Liu et al. 2022. For "down", the input is scaled: the inner state of the FFN."""

    # The linear maps that are scaled, one or more of q, k, v, o, up, gate and down; the paper's are
    # k, v and down.
    targets: tuple[str, ...] = ("k", "v", "down")

    method: ClassVar[str] = "ia3"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_targets(self)

    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        built: dict[str, AdapterModule] = {}
        for leaf in chosen_leaves(self, sites, self.targets):
            if leaf.role == "down":
                if leaf.parts > 1:
                    raise ValueError(f"{leaf.name} is part of a fused map, so its input is shared")
                built[leaf.name] = InputScale(leaf)
            else:
                built[leaf.name] = OutputScale(leaf)
        return built


class OutputScale(Delta):
    """Scales the output of a leaf. Parameter `scale` (out,)."""

    def __init__(self, leaf: Leaf) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(leaf.out_features, **leaf.like()))

    def forward(self, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        return y * self.scale.to(y.dtype)

    def effective(
        self, weight: Tensor, bias: Tensor | None, leaf: Leaf
    ) -> tuple[Tensor, Tensor | None]:
        scale = self.scale.to(weight.dtype)
        rows = scale if weight.dim() == 1 else scale[:, None]
        return weight * rows, None if bias is None else bias * scale


class InputScale(Delta):
    """Scales the input of a linear map. Parameter `scale` (in,)."""

    scales_input = True

    def __init__(self, leaf: Leaf) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(leaf.in_features, **leaf.like()))

    def enter(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype)

    def effective(
        self, weight: Tensor, bias: Tensor | None, leaf: Leaf
    ) -> tuple[Tensor, Tensor | None]:
        return weight * self.scale.to(weight.dtype), bias


@dataclass(frozen=True, kw_only=True)
class SSFConfig(MethodConfig):
    """SSF, Lian et al. 2022: scale and shift behind every linear map and LayerNorm under `sites`.

    It has no options of its own.
    """

    method: ClassVar[str] = "ssf"

    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        selection = sites.select(self.sites)
        chosen = [leaf for leaf in sites.leaves() if leaf.name in selection]
        for leaf in chosen:
            if leaf.raw and leaf.bias is None:
                raise ValueError(
                    f"{leaf.name}: {sites.architecture} reads this weight itself and has no bias "
                    "there, so there is nothing to shift; leave it out with sites=..."
                )
        return {leaf.name: ScaleShift(leaf) for leaf in chosen}


class ScaleShift(OutputScale):
    """Scales and shifts the output of a leaf. Parameters `scale` and `shift`, (out,) each."""

    def __init__(self, leaf: Leaf) -> None:
        super().__init__(leaf)
        self.shift = nn.Parameter(torch.zeros(leaf.out_features, **leaf.like()))

    def forward(self, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        return super().forward(y, x, leaf) + self.shift.to(y.dtype)

    def effective(
        self, weight: Tensor, bias: Tensor | None, leaf: Leaf
    ) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().effective(weight, bias, leaf)
        shift = self.shift.to(weight.dtype)
        return weight, shift if bias is None else bias + shift
