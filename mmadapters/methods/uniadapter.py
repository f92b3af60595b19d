"""UniAdapter: one adapter per layer for vision, text and fusion, beside the feed-forward part.

    a(x)      ReLU(D LN(x) + b)                                       shared by all three
    vision    u' = u + s U_v a(x)
    text      u' = u + s U_t a(x)
    fusion    u' = u + s (U_f a(x) + U_t a(x) + U_t a(q))

x is the residual stream before the feed-forward part and u its branch. q is the stream before the
layer's cross-attention, which makes the queries of it. BLIP's text layers are in fusion in a call
with an image, and in text mode in a call without one. Lu et al. 2024, section 3.3 and figure 2.

LN and D belong to a layer, counted from the top if towers are of different depth; each U has a
bias. The layers of a decoder do not share with those of the encoders. If towers do not cross
(CLIP), there is no U_f.

Where ours differs from the authors' code:
- Every U starts at zero, so that a fresh adapter is the identity; they leave U_v and U_f random.
- U_f a(x) + U_t a(x) goes through no LayerNorm, whose slope at zero would be 1/sqrt(eps).
- In BLIP's post-norm text layers, the result is added before the layer's last LayerNorm, not
  behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..sites.acting import Context
from ..sites.sitemap import Block, SiteMap, Sublayer, Tower
from .base import AdapterModule, Branch, MethodConfig
from .init import linear, zero_linear
from .select import check_count, check_rate, check_scale, chosen_sublayers

# Towers that do not share with the encoders. CoCa's cross-attentions stand in blocks of their own,
# the tower "fusion", between those of its decoder.
_DECODERS = ("decoder", "fusion")


@dataclass(frozen=True, kw_only=True)
class UniAdapterConfig(MethodConfig):
    """UniAdapter, Lu et al. 2024."""

    # r, the width of the bottleneck in channels, at least 1; 128 and 512 in the paper.
    size: int = 128
    # s, a factor on the result, not 0.
    scale: float = 0.1
    # Probability that an element is zeroed behind the ReLU in training, 0 to below 1.
    dropout: float = 0.0

    method: ClassVar[str] = "uniadapter"
    mergeable: ClassVar[bool | str] = (
        "a bottleneck has a non-linearity between its two projections, so no weight equals it"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("size", self.size)
        check_rate("dropout", self.dropout)
        check_scale(self.scale, zero="the up-projections")

    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        _check_modalities(sites)
        chosen = {sublayer.name for sublayer in chosen_sublayers(self, sites, ("ffn",))}
        shared: dict[tuple[str, int], _Shared] = {}
        built: dict[str, AdapterModule] = {}
        for tower, block, ffn in _feed_forwards(sites):
            if ffn.name not in chosen:
                continue
            part = "decoder" if tower.name in _DECODERS else "encoder"
            layer = (part, len(tower.blocks) - block.index)
            if layer not in shared:
                shared[layer] = _Shared.of(ffn, self.size)
            if shared[layer].down.in_features != ffn.width:
                raise ValueError(
                    f"uniadapter shares the down-projection between towers, but {ffn.name} of "
                    f"{sites.architecture} is {ffn.width} wide and the layer beside it "
                    f"{shared[layer].down.in_features}: take mma, which shares between towers of "
                    "any width"
                )
            fused = "cross" in block.sublayers
            built[ffn.name] = UniAdapter(self, ffn, shared[layer], fused=fused)
        return built


def _check_modalities(sites: SiteMap) -> None:
    towers = sites.towers
    if "vision" not in towers or not {"text", "decoder"} & set(towers):
        raise ValueError(
            "uniadapter shares one adapter between images and texts, and "
            f"{sites.architecture} has {' and '.join(towers)} only: take an image-text encoder "
            "(BLIP, CLIP, SigLIP), or adaptformer for one tower"
        )


def _feed_forwards(sites: SiteMap) -> Iterator[tuple[Tower, Block, Sublayer]]:
    for tower in sites.towers.values():
        for block in tower.blocks:
            yield from ((tower, block, s) for s in block.sublayers.values() if s.kind == "ffn")


@dataclass(frozen=True)
class _Shared:
    """The parts that the modules of one layer share."""

    norm: nn.LayerNorm
    down: nn.Linear

    @classmethod
    def of(cls, sublayer: Sublayer, size: int) -> _Shared:
        width, like = sublayer.width, sublayer.like()
        return cls(nn.LayerNorm(width, **like), linear(width, size, like))


class UniAdapter(Branch):
    """One tower's part of a layer's adapter.

    Parameters of `norm` (D,) and `down` (r, D), which are shared, of `up` (D, r), which is the
    tower's own, and of `fusion` (D, r) if the block has cross-attention.
    """

    def __init__(
        self, config: UniAdapterConfig, sublayer: Sublayer, shared: _Shared, *, fused: bool
    ) -> None:
        super().__init__()
        like = sublayer.like()
        self.reads = frozenset({"residual", "query"}) if fused else frozenset({"residual"})
        self.scale, self.dropout = config.scale, config.dropout
        self.norm, self.down = shared.norm, shared.down
        self.up = zero_linear(config.size, sublayer.width, like)
        self.fusion = zero_linear(config.size, sublayer.width, like) if fused else None

    def change(self, branch: Tensor, context: Context) -> Tensor:
        residual, query = context.residual, context.query
        assert residual is not None
        inner = self.inner(residual)
        change = self.up(inner)
        if query is not None and self.fusion is not None:
            if query.shape != residual.shape:
                raise ValueError(
                    f"uniadapter reads the queries of a layer's cross-attention {_shape(query)} "
                    f"beside what they became {_shape(residual)}: set chunk_size_feed_forward to 0"
                )
            change = change + self.fusion(inner) + self.up(self.inner(query))
        return (self.scale * change).to(branch.dtype)

    def inner(self, x: Tensor) -> Tensor:
        """x: (B, N, D) -> a(x) of the formula, (B, N, r)."""
        return F.dropout(F.relu(self.down(self.norm(x))), self.dropout, self.training)


def _shape(x: Tensor) -> str:
    return f"of shape {tuple(x.shape)}"
