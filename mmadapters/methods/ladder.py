"""Ladder side-tuning: a small network beside the frozen encoder; no gradient enters the encoder.

For the outputs of a tower's blocks, b_1 .. b_L, and the input of the first one, b_0, D wide,

    h_0 = W_0 b_0
    h_l = f_l(g_l W_l b_l + (1 - g_l) h_(l-1)),  g_l = sigmoid(a_l / T)
    b_L' = b_L + U h_L

The W_l are linear maps to the side network's width, f_l its transformer blocks, T = 0.1, a_l zero
at the start. All b are detached: the backward pass runs through the side network alone, whatever
else acts in the encoder. U starts at zero: a fresh adapter is the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sites.sitemap import SiteMap, Tower
from .base import AdapterModule, MethodConfig, Readout
from .init import linear, zero_linear
from .select import bottleneck_size, check_count, check_number, check_rate, check_size


@dataclass(frozen=True, kw_only=True)
class LadderConfig(MethodConfig):
    """Ladder side-tuning, Sung, Cho and Bansal 2022, on the image tower of any encoder.

    The paper's side blocks are narrow copies of the encoder's own, pruned from its weights; ours
    are pre-norm transformer blocks with fresh weights. The result is added to the last block's
    output, before the tower's last norm, so that every reader of the encoder gets it.

    `sites` bounds the blocks that are read: `("vision.blocks.[6-9]",)`.
    """

    # The width of the side network in channels, a multiple of `heads`.
    size: int | None = None
    # Or the encoder's width over it: above 0, at most the width; 4 if neither is given.
    reduction_factor: float | None = None
    # The number of heads of its attention, at least 1.
    heads: int = 4
    # The inner width of its feed-forward parts over its width, above 0.
    mlp_ratio: float = 4.0
    # One side block for so many blocks of the encoder, counted from the last one; at least 1.
    every: int = 1
    # T, the temperature of the gates, above 0.
    temperature: float = 0.1
    # Probability that an element is zeroed behind its sublayers in training, 0 to below 1.
    dropout: float = 0.0

    method: ClassVar[str] = "ladder"
    mergeable: ClassVar[bool | str] = "a ladder is a network beside the encoder, which no weight is"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is None and self.reduction_factor is None:
            object.__setattr__(self, "reduction_factor", 4)
        check_size(self.size, self.reduction_factor)
        check_count("heads", self.heads)
        check_count("every", self.every)
        check_rate("dropout", self.dropout)
        for what, value in (("mlp_ratio", self.mlp_ratio), ("temperature", self.temperature)):
            check_number(what, value)
            if value <= 0:
                raise ValueError(f"{what} must be above 0, not {value!r}")

    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        tower, selection = sites.towers.get("vision"), sites.select(self.sites)
        if tower is None:
            raise ValueError(
                f"{self.method} is for image encoders, and {sites.architecture} has no vision "
                f"tower; it has {', '.join(sites.towers)}"
            )
        below = [block.index for block in tower.blocks if block.name in selection]
        chosen = sorted(below[:: -self.every])
        if not chosen:
            raise ValueError(
                f"no block of the vision tower of {sites.architecture} lies under "
                f"sites={self.sites!r}; name whole blocks, e.g. sites=('vision.blocks.*',)"
            )
        return {tower.blocks[-1].name: Ladder(self, tower, chosen)}


class Ladder(Readout):
    """The side network of one tower, with width r.

    Parameters of `entry` W_0 (r, D), `downs` W_l (r, D) and `blocks` f_l by layer, `gates` a
    (layers,) and `up` U (D, r).
    """

    def __init__(self, config: LadderConfig, tower: Tower, layers: list[int]) -> None:
        super().__init__()
        sublayer = next(iter(tower.blocks[0].sublayers.values()))
        like, width = sublayer.like(), tower.width
        size = bottleneck_size(sublayer, config.size, config.reduction_factor)
        if size % config.heads:
            raise ValueError(
                f"{config.heads} heads do not divide the side network's width, {size}; set heads "
                "or size"
            )
        self.layers, self.temperature = tuple(layers), config.temperature
        self.batch_first = tower.batch_first
        self.entry = linear(width, size, like)
        self.downs = nn.ModuleDict({str(layer): linear(width, size, like) for layer in layers})
        self.blocks = nn.ModuleDict({str(layer): SideBlock(config, size, like) for layer in layers})
        self.gates = nn.Parameter(torch.zeros(len(layers), **like))
        self.up = zero_linear(size, width, like)

    def forward(self, last: Tensor, *, states: Mapping[int, Tensor]) -> Tensor:
        shares = (self.gates / self.temperature).sigmoid()
        h = self.entry(self._detached(states[-1]))
        for place, layer in enumerate(self.layers):
            if layer not in states:
                continue
            down = self.downs[str(layer)](self._detached(states[layer]))
            h = self.blocks[str(layer)](h + shares[place] * (down - h))
        change = self.up(h).to(last.dtype)
        return last + (change if self.batch_first else change.transpose(0, 1))

    def _detached(self, state: Tensor) -> Tensor:
        """Returns the state (B, N, D) without its graph."""
        return state.detach() if self.batch_first else state.detach().transpose(0, 1)


class SideBlock(nn.Module):
    """A pre-norm transformer block: parameters `norm_1`, `qkv`, `proj`, `norm_2`, `fc1`, `fc2`."""

    def __init__(self, config: LadderConfig, size: int, like: dict) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        hidden = max(1, int(config.mlp_ratio * size))
        self.norm_1, self.norm_2 = nn.LayerNorm(size, **like), nn.LayerNorm(size, **like)
        self.qkv, self.proj = linear(size, 3 * size, like), linear(size, size, like)
        self.fc1, self.fc2 = linear(size, hidden, like), linear(hidden, size, like)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, size) -> (B, N, size)."""
        batch, tokens, size = x.shape
        parts = self.qkv(self.norm_1(x)).view(batch, tokens, 3, self.heads, size // self.heads)
        attended = F.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4))
        x = x + self._dropped(self.proj(attended.transpose(1, 2).flatten(2)))
        return x + self._dropped(self.fc2(F.gelu(self.fc1(self.norm_2(x)))))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)
