"""Adapters made for speech encoders: of a block, of a whole tower, and of the convolutions before.

For a sublayer with residual stream x and branch u (Conformer adapters are in `conformer.py`),

    EAdapterConfig           u' = u + LN(U gelu(D u))
    MMSAdapterConfig         u' = u + U relu(D LN(x + u))

For the outputs h_1 .. h_L of a tower's blocks and its last hidden state h (h_L, or its norm of it),

    LAdapterConfig           h' = h + sum_l softmax(w)_l LN_l(gelu(W_l h_l))

For what a convolution of the front end gives, c (C, T),

    FrontEndAdapterConfig    c' = c + U gelu(K * (D c))

D, U and W are linear maps at one frame, K * a convolution over time of each channel by itself.
U, or the gain of a LayerNorm that stands last, starts at zero: a fresh adapter is the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sites.sitemap import FrontLayer, SiteMap, Tower
from .base import AdapterModule, Branch, MethodConfig, Readout, check_count
from .bottleneck import BottleneckConfig, Placement, SequentialPlacement
from .init import linear


@dataclass(frozen=True, kw_only=True)
class EAdapterConfig(BottleneckConfig):
    """E-adapter, Otake et al. 2023 (ICASSP): after the feed-forward part alone, GELU, a LayerNorm
    behind the up-projection. `ConfigUnion(EAdapterConfig(), LAdapterConfig())` is their E + L."""

    placement: Placement = field(default_factory=lambda: SequentialPlacement(at=("ffn",)))
    activation: str = "gelu"
    norm: Literal["before", "after"] | None = "after"
    method: ClassVar[str] = "e_adapter"
    standard = ("size", 256)


@dataclass(frozen=True, kw_only=True)
class MMSAdapterConfig(BottleneckConfig):
    """The attention adapter of MMS, Pratap et al. 2023: LayerNorm, ReLU, at the end of each block.

    In pre-norm blocks it is transformers' `Wav2Vec2AttnAdapterLayer` (`norm`, `linear_1`,
    `linear_2` are ours `norm_before`, `down`, `up`), which post-norm ones lack: there it acts on
    the sum that the block's last LayerNorm is about to read.
    """

    placement: Placement = field(
        default_factory=lambda: SequentialPlacement(at=("ffn",), residual="after")
    )
    norm: Literal["before", "after"] | None = "before"
    method: ClassVar[str] = "mms_adapter"
    standard = ("size", 16)


@dataclass(frozen=True, kw_only=True)
class LAdapterConfig(MethodConfig):
    """L-adapter, Otake et al. 2023: what all layers gave stands for the tower's last hidden state.

    Each layer l has a Linear W_l (D x D, as wide as the heads behind expect; the paper's may be
    narrower), GELU and LayerNorm; softmax(w) weights them, w zero at the start. `sites` bounds the
    layers: `("audio.blocks.[6-9]",)`.

    residual: the sum is added to the last hidden state, so that a fresh adapter is the identity;
        False is the paper's form, in which the sum replaces it and a head must be trained with it.

    Acts where the tower is called as a whole; torchaudio's `extract_features`, which lists the
    blocks' own outputs, has no last hidden state and is as it was.
    """

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
    """Parameters `linears` and `norms` by layer, and `weights` (layers,) of more than one."""

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
        # The weight of a single layer is 1 whatever is learned.
        self.weights = nn.Parameter(torch.zeros(len(layers), **like)) if len(layers) > 1 else None

    def forward(self, last: Tensor, *, states: Mapping[int, Tensor]) -> Tensor:
        present = [place for place, layer in enumerate(self.layers) if layer in states]
        if not present:
            return last
        shares = None if self.weights is None else self.weights[present].softmax(dim=0)
        mixed = None
        for number, place in enumerate(present):
            key = str(self.layers[place])
            own = self.norms[key](F.gelu(self.linears[key](states[self.layers[place]])))
            own = own if shares is None else shares[number] * own
            mixed = own if mixed is None else mixed + own
        assert mixed is not None
        return last + mixed.to(last.dtype) if self.residual else mixed.to(last.dtype)


@dataclass(frozen=True, kw_only=True)
class FrontEndAdapterConfig(MethodConfig):
    """Adapters behind the convolutions that make frames; after CHAPTER, Chen et al. 2023.

    Each layer of the feature extractor gets a bottleneck of `size` channels with a convolution over
    `kernel` steps of time between its two maps; the number of frames stays. Ours looks back only: a
    front end is not told where an utterance ends, and what looked ahead would read the padding.
    `sites=("audio.front.[4-6]",)` takes some layers alone.

    The dearest adapter: all else leaves the front end out of the graph, but with this one the
    backward pass runs through all convolutions from the first adapted layer on, at up to 3,200
    steps a second, and keeps their outputs. No graph is built below that layer.
    """

    size: int = 32
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
    """On (B, C, T) instead of (B, N, D); parameters `down`, `depthwise` and `up`."""

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

    def forward(self, branch: Tensor, *, residual: Tensor | None, input: Tensor | None) -> Tensor:
        return branch + self.change(branch, residual=residual, input=input)

    def change(self, branch: Tensor, *, residual: Tensor | None, input: Tensor | None) -> Tensor:
        h = F.pad(self.down(branch), (self.ahead, 0))
        return self.up(F.gelu(self.depthwise(h))).to(branch.dtype)


def audio_tower(config: MethodConfig, sites: SiteMap) -> Tower:
    """The tower of speech.

    Raises:
        ValueError: there is none.
    """
    tower = sites.towers.get("audio")
    if tower is None:
        raise ValueError(
            f"{config.method} is for speech, and {sites.architecture} has no audio tower; "
            f"it has {', '.join(sites.towers)}"
        )
    return tower
