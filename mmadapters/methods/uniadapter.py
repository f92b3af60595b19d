"""UniAdapter: one adapter per layer for vision, text and fusion, beside the feed-forward part.

    a(x)      ReLU(D LN(x) + b)                                       shared by all that follows
    vision    u' = u + s U_v a(x)
    text      u' = u + s U_t a(x)
    fusion    u' = u + s (U_f a(x) + U_t a(x) + U_t a(q))

x is the residual stream before the feed-forward part and u its branch; q is the stream before the
layer's cross-attention, whose query it is. BLIP's text layers are in fusion whenever they are given
an image, and in text mode when they are not: the call at hand decides. Lu et al. 2024, section 3.3
and figure 2.

LN and D belong to a layer, counted from the top where towers are of different depth; each U has a
bias. A decoder's layers share theirs among themselves alone. Where towers do not cross (CLIP) there
is no U_f.

Where ours differs from the authors' code: every U starts at zero, so that a fresh adapter is the
identity, while they leave U_v and U_f random; U_f a(x) + U_t a(x) goes through no LayerNorm, whose
slope at zero would be 1/sqrt(eps); and in BLIP's post-norm text layers the result is added before
the layer's last LayerNorm, not behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..sites.sitemap import Block, SiteMap, Sublayer, Tower
from .adding import Adding
from .base import AdapterModule, MethodConfig, check_count, check_number, check_rate
from .bottleneck import chosen_sublayers
from .init import linear, zero_linear

# CoCa's cross-attentions stand in blocks of their own, between those of its decoder.
_DECODERS = ("decoder", "fusion")


@dataclass(frozen=True, kw_only=True)
class UniAdapterConfig(MethodConfig):
    """`size`: the bottleneck (the paper's 128 and 512); `scale`: s; `dropout`: behind the ReLU."""

    size: int = 128
    scale: float = 0.1
    dropout: float = 0.0

    method: ClassVar[str] = "uniadapter"
    mergeable: ClassVar[bool | str] = (
        "a bottleneck has a non-linearity between its two projections, so no weight equals it"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("size", self.size)
        check_rate("dropout", self.dropout)
        check_number("scale", self.scale)
        if self.scale == 0:
            raise ValueError(
                "scale must not be 0: with the up-projections at zero nothing would learn"
            )

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
    """What the modules of one layer have in common."""

    norm: nn.LayerNorm
    down: nn.Linear

    @classmethod
    def of(cls, sublayer: Sublayer, size: int) -> _Shared:
        width, like = sublayer.width, sublayer.like()
        return cls(nn.LayerNorm(width, **like), linear(width, size, like))


class UniAdapter(Adding):
    """One tower's part of a layer's adapter: parameters of `norm` (D,) and `down` (r, D), which are
    shared, of `up` (D, r), its own tower's, and of `fusion` (D, r) where the block can cross."""

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

    def change(
        self,
        branch: Tensor,
        *,
        residual: Tensor | None,
        input: Tensor | None,
        query: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        assert residual is not None
        inner = self.inner(residual)
        change = self.up(inner)
        if query is not None:
            assert self.fusion is not None
            if query.shape != residual.shape:
                raise ValueError(
                    f"uniadapter reads the queries of a layer's cross-attention {_shape(query)} "
                    f"beside what they became {_shape(residual)}: set chunk_size_feed_forward to 0"
                )
            change = change + self.fusion(inner) + self.up(self.inner(query))
        return (self.scale * change).to(branch.dtype)

    def inner(self, x: Tensor) -> Tensor:
        """a(x) of the formula, (B, N, D) -> (B, N, r)."""
        return F.dropout(F.relu(self.down(self.norm(x))), self.dropout, self.training)


def _shape(x: Tensor) -> str:
    return f"of shape {tuple(x.shape)}"
