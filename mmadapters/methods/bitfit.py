"""BitFit: training only the biases, here as differences d to the frozen ones.

    y' = y + d,  d = 0 at the start

for every linear map and LayerNorm of the blocks (and the final norm) that has a bias. Ben Zaken et
al. 2022. It learns a difference, not the bias itself, so that the frozen encoder is never touched
and can hold several such adapters at once. The biases of keys are left out: they change nothing,
because softmax(q (k + d)) shifts all scores of a query by the same q d. With normed or rotated keys
they would change something; they are left out there too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..sites.sitemap import Leaf, SiteMap
from .base import AdapterModule, Delta, MethodConfig


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(MethodConfig):
    """All biases under `sites` but those of keys. It has no options of its own."""

    method: ClassVar[str] = "bitfit"

    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        selection = sites.select(self.sites)
        built: dict[str, AdapterModule] = {
            leaf.name: BiasDelta(leaf)
            for leaf in sites.leaves()
            if leaf.name in selection and leaf.bias is not None and leaf.role != "k"
        }
        if not built:
            raise ValueError(f"{sites.architecture} has no bias under sites={self.sites!r}")
        return built


class BiasDelta(Delta):
    """Adds a difference to the bias of a leaf. Parameter `bias` (out,)."""

    def __init__(self, leaf: Leaf) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(leaf.out_features, **leaf.like()))

    def forward(self, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        return y + self.bias.to(y.dtype)

    def effective(
        self, weight: Tensor, bias: Tensor | None, leaf: Leaf
    ) -> tuple[Tensor, Tensor | None]:
        delta = self.bias.to(weight.dtype)
        return weight, delta if bias is None else bias + delta
