"""Prefix tuning: learned keys and values before those of every attention.

    softmax(q [P_k; k]^T / sqrt(d)) [P_v; v],   P_k, P_v (P, D) per layer

Li and Liang 2021. With `reparametrise=m`, [P_k, P_v] = W_2 tanh(W_1 E + b_1) + b_2 from E (P, D),
W_1 (m, D), W_2 (2D, m). The paper has one such network for all layers; here each layer has its own.
A fresh prefix is not the identity: it always takes some attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..sites.sitemap import SiteMap, Sublayer
from .base import AdapterModule, MethodConfig, Prefix
from .select import check_count, chosen_sublayers

CAN = "timm ViT and EVA, transformers ViT, DINOv2, CLIP, SigLIP, wav2vec2, HuBERT, BERT, open_clip"


@dataclass(frozen=True, kw_only=True)
class PrefixConfig(MethodConfig):
    """Prefix tuning, Li and Liang 2021."""

    # P, the number of keys and of values in each layer, at least 1.
    length: int = 10
    # m, the inner width of the network that makes keys and values, at least 1; None: no network.
    reparametrise: int | None = None

    method: ClassVar[str] = "prefix"
    identity: ClassVar[bool] = False
    mergeable: ClassVar[bool | str] = "a prefix adds keys and values, which no weight can hold"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("length", self.length)
        if self.reparametrise is not None:
            check_count("reparametrise", self.reparametrise)

    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        chosen = chosen_sublayers(self, sites, ("attn",))
        for sublayer in chosen:
            if sublayer.attention is None:
                raise ValueError(
                    f"prefix tuning cannot enter {sublayer.name} of {sites.architecture}, whose "
                    "attention does not go through scaled_dot_product_attention; these can take "
                    f"it: {CAN}; or name other sites"
                )
        return {sublayer.name: KeyValuePrefix(self, sublayer) for sublayer in chosen}


class KeyValuePrefix(Prefix):
    """The prefix of one attention.

    Parameters `keys` and `values` (P, D); or, if reparametrised, `embedding` E (P, D) and those of
    `inner` W_1 and `outer` W_2.
    """

    def __init__(self, config: PrefixConfig, sublayer: Sublayer) -> None:
        super().__init__()
        like = sublayer.like()
        key = sublayer.leaves.get("k")
        width = sublayer.width if key is None else key.out_features
        self.reparametrised = config.reparametrise is not None
        if config.reparametrise is None:
            self.keys = nn.Parameter(torch.empty(config.length, width, **like).normal_(std=0.02))
            self.values = nn.Parameter(torch.empty(config.length, width, **like).normal_(std=0.02))
        else:
            embedding = torch.empty(config.length, width, **like).normal_()
            self.embedding = nn.Parameter(embedding)
            self.inner = nn.Linear(width, config.reparametrise, **like)
            self.outer = nn.Linear(config.reparametrise, 2 * width, **like)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        if not self.reparametrised:
            return self.keys, self.values, None
        keys, values = self.outer(torch.tanh(self.inner(self.embedding))).chunk(2, dim=-1)
        return keys, values, None
