"""Adapters made for speech encoders: for a block, a whole tower, and the convolutions before it.

For a sublayer with residual stream x and branch u (Conformer adapters are in `conformer.py`),

    EAdapterConfig           u' = u + LN(U gelu(D u))
    MMSAdapterConfig         u' = u + U relu(D LN(x + u))

For the outputs h_1 .. h_L of a tower's blocks and its last hidden state h (h_L, or its norm of it),

    LAdapterConfig           h' = h + sum_l softmax(w)_l LN_l(gelu(W_l h_l))

For the output of a convolution of the front end, c (C, T),

    FrontEndAdapterConfig    c' = c + U gelu(K * (D c))

D, U and W are linear maps at one frame, K * a convolution over time of each channel by itself.
U, or the gain of a last LayerNorm, starts at zero: a fresh adapter is the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sites.acting import Context
from ..sites.sitemap import FrontLayer, SiteMap, Tower
from .base import AdapterModule, Branch, MethodConfig, Readout
from .bottleneck import BottleneckConfig, Placement, SequentialPlacement
from .init import linear
from .select import audio_tower, check_count


@dataclass(frozen=True, kw_only=True)
class EAdapterConfig(BottleneckConfig):
    """E-adapter, Otake et al. 2023 (ICASSP): behind the feed-forward part, GELU, a last LayerNorm.

    Options are those of `BottleneckConfig`, with these defaults and r = 256.
    `ConfigUnion(EAdapterConfig(), LAdapterConfig())` is their E + L.
    """

    # The sublayers that get an adapter, and what it reads there.
    placement: Placement = field(default_factory=lambda: SequentialPlacement(at=("ffn",)))
    # act, a name in `bottleneck.ACTIVATIONS`.
    activation: str = "gelu"
    # A LayerNorm "before" the down-projection or "after" the up-projection; None: neither.
    norm: Literal["before", "after"] | None = "after"
    method: ClassVar[str] = "e_adapter"
    standard = ("size", 256)


@dataclass(frozen=True, kw_only=True)
class MMSAdapterConfig(BottleneckConfig):
    """The attention adapter of MMS, Pratap et al. 2023: LayerNorm, ReLU, at the end of each block.

    Options are those of `BottleneckConfig`, with these defaults and r = 16. In pre-norm blocks, it
    is transformers' `Wav2Vec2AttnAdapterLayer`, whose `norm`, `linear_1` and `linear_2` are
    `norm_before`, `down` and `up` here. In post-norm blocks, where transformers has none, it acts
    on the sum that the block's last LayerNorm reads.
    """

    # The sublayers that get an adapter, and what it reads there.
    placement: Placement = field(
        default_factory=lambda: SequentialPlacement(at=("ffn",), residual="after")
    )
    # A LayerNorm "before" the down-projection or "after" the up-projection; None: neither.
    norm: Literal["before", "after"] | None = "before"
    method: ClassVar[str] = "mms_adapter"
    standard = ("size", 16)


@dataclass(frozen=True, kw_only=True)
class LAdapterConfig(MethodConfig):
    """L-adapter, Otake et al. 2023: a mixture of all layers joins the tower's last hidden state.

    Each layer l has a Linear W_l, GELU and LayerNorm. W_l is D x D, because the heads behind expect
    that width; the paper's may be narrower. softmax(w) weights the layers, w zero at the start.
    `sites` bounds the layers: `("audio.blocks.[6-9]",)`.

    It acts where the tower is called as a whole. torchaudio's `extract_features` gives the blocks'
    own outputs and no last hidden state: it is unchanged.
    """

    # True: the mixture is added to the last hidden state, so that a fresh adapter is the identity.
    # False: it replaces that state, as in the paper; then a head must be trained with it.
    residual: bool = True

    method: ClassVar[str] = "l_adapter"
    mergeable: ClassVar[bool | str] = "an L-adapter reads all layers, which no weight does"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.residual, bool):
            raise ValueError(f"residual must be true or false, not {self.residual!r}")

    @property
    def identity(self) -> bool:  # type: ignore[override]
        return self.residual

    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        tower, selection = audio_tower(self, sites), sites.select(self.sites)
        if tower.runner is None:
            raise ValueError(
                f"the site map of {sites.architecture} does not say which module runs its audio "
                "tower: give TowerSpec(runner=...) for l_adapter"
            )
        chosen = [block.index for block in tower.blocks if block.name in selection]
        if not chosen:
            raise ValueError(
                f"no block of the audio tower of {sites.architecture} lies under "
                f"sites={self.sites!r}; name whole blocks, e.g. sites=('audio.blocks.*',)"
            )
        return {tower.name: LAdapter(self, tower, chosen)}


class LAdapter(Readout):
    """The mixture of one tower's layers.

    Parameters of `linears` W_l (D, D) and `norms` (D,) by layer, and `weights` w (layers,) if there
    is more than one layer.
    """

    def __init__(self, config: LAdapterConfig, tower: Tower, layers: list[int]) -> None:
        super().__init__()
        like = next(iter(tower.blocks[0].sublayers.values())).like()
        self.residual, self.layers = config.residual, tuple(layers)
        self.linears = nn.ModuleDict(
            {str(layer): linear(tower.width, tower.width, like) for layer in layers}
        )
        self.norms = nn.ModuleDict(
            {str(layer): nn.LayerNorm(tower.width, **like) for layer in layers}
        )
        if config.residual:
            for norm in self.norms.values():
                nn.init.zeros_(norm.weight)  # type: ignore[arg-type]
        # The weight of a single layer is always 1.
        self.weights = nn.Parameter(torch.zeros(len(layers), **like)) if len(layers) > 1 else None

    def forward(self, last: Tensor, *, states: Mapping[int, Tensor]) -> Tensor:
        present = [place for place, layer in enumerate(self.layers) if layer in states]
        if not present:
            return last
        shares = None if self.weights is None else self.weights[present].softmax(dim=0)
        mixed = None
        for number, place in enumerate(present):
            key = str(self.layers[place])
            part = self.norms[key](F.gelu(self.linears[key](states[self.layers[place]])))
            part = part if shares is None else shares[number] * part
            mixed = part if mixed is None else mixed + part
        assert mixed is not None
        return last + mixed.to(last.dtype) if self.residual else mixed.to(last.dtype)


@dataclass(frozen=True, kw_only=True)
class FrontEndAdapterConfig(MethodConfig):
    """Adapters behind the convolutions that make frames; after CHAPTER, Chen et al. 2023.

    Each layer of the feature extractor gets a bottleneck with a convolution over time between its
    two maps. The number of frames stays. Our convolution looks back only: a front end is not told
    where an utterance ends, so a convolution that looked ahead would read the padding.
    `sites=("audio.front.[4-6]",)` takes some of the layers.

    It is the most expensive adapter. Others leave the front end out of the graph. With this one,
    the backward pass runs through all convolutions from the first adapted layer on, at up to 3,200
    steps a second, and keeps their outputs. No graph is built below that layer.
    """

    # The width of the bottleneck in channels, at least 1.
    size: int = 32
    # The length of the convolution in steps of the adapted layer, at least 1.
    kernel: int = 3

    method: ClassVar[str] = "conv_front_end"
    mergeable: ClassVar[bool | str] = (
        "a front-end adapter has a non-linearity between its maps, so no weight equals it"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("size", self.size)
        check_count("kernel", self.kernel)

    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        selection, fronts = sites.select(self.sites), list(sites.fronts())
        if not fronts:
            raise ValueError(
                f"{sites.architecture} has no convolutional front end that {self.method} can "
                "enter; wav2vec 2.0, HuBERT and WavLM have one"
            )
        chosen = [layer for layer in fronts if layer.name in selection]
        if not chosen:
            raise ValueError(
                f"no layer of the front end of {sites.architecture} lies under "
                f"sites={self.sites!r}; it has {fronts[0].name} to {fronts[-1].name}"
            )
        return {layer.name: FrontEndAdapter(self, layer) for layer in chosen}


class FrontEndAdapter(Branch):
    """Acts on (B, C, T) instead of (B, N, D).

    Parameters of `down` (r, C, 1), `depthwise` (r, 1, kernel) and `up` (C, r, 1), with biases.
    """

    def __init__(self, config: FrontEndAdapterConfig, layer: FrontLayer) -> None:
        super().__init__()
        like, size = layer.like(), config.size
        self.ahead = config.kernel - 1
        self.down = nn.Conv1d(layer.width, size, 1, **like)
        self.depthwise = nn.Conv1d(size, size, config.kernel, groups=size, **like)
        self.up = nn.Conv1d(size, layer.width, 1, **like)
        for zeros in (self.down.bias, self.depthwise.bias, self.up.weight, self.up.bias):
            assert zeros is not None
            nn.init.zeros_(zeros)

    def change(self, branch: Tensor, context: Context) -> Tensor:
        h = F.pad(self.down(branch), (self.ahead, 0))
        return self.up(F.gelu(self.depthwise(h))).to(branch.dtype)
