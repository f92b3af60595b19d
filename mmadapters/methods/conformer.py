"""Conformer adapters: the convolution module of the Conformer beside a frozen sublayer of speech.

For a sublayer with residual stream x and branch u, and h as the placement says (see
`bottleneck.py`), by default x + u,

    u' = u + U Dropout(silu(BN(K * glu(E LN(h)))))

E (2r, D) and U (D, r) are linear maps at one frame, K * a convolution over time of each channel by
itself, BN a batch norm. U starts at zero: a fresh adapter is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sites.acting import Context
from ..sites.sitemap import SiteMap, Sublayer
from .base import AdapterModule, MethodConfig
from .bottleneck import ParallelPlacement, Placed, Placement, SequentialPlacement
from .init import linear, zero_linear
from .select import audio_tower, check_count, check_rate


@dataclass(frozen=True, kw_only=True)
class ConformerAdapterConfig(MethodConfig):
    """The convolution module of the Conformer (Gulati et al. 2020, section 2.2).

    LayerNorm, a 1 x 1 map to 2 r and a GLU, a convolution over time, batch norm, SiLU, dropout, and
    a 1 x 1 map back. The mask that the block's attention is given shows which frames are padding.
    Padding enters the convolution as zeros, and does not count in the mean and variance of the
    batch norm. In training, these are of the batch; otherwise they are running ones, which are
    saved with the adapter. Gradient checkpointing runs a block twice, and so moves them twice in a
    step.

    An encoder without a mask (Whisper; torchaudio's WavLM) knows of no padding: all its frames
    count. Masks are `attention_mask` and `key_padding_mask`, given to the attention by name.
    """

    # The sublayers that get an adapter, and what it reads there.
    placement: Placement = field(
        default_factory=lambda: SequentialPlacement(at=("ffn",), residual="after")
    )
    # r, the width of the convolution in channels, at least 1.
    size: int = 64
    # The length of the convolution in frames, an odd number.
    kernel: int = 31
    # Probability that an element is zeroed in front of U in training, 0 to below 1.
    dropout: float = 0.0

    method: ClassVar[str] = "conformer_adapter"
    mergeable: ClassVar[bool | str] = "a Conformer adapter looks at other frames, as no weight does"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.placement, (SequentialPlacement, ParallelPlacement)):
            raise ValueError(
                "placement must be SequentialPlacement or ParallelPlacement, "
                f"not {self.placement!r}"
            )
        check_count("size", self.size)
        check_count("kernel", self.kernel)
        if self.kernel % 2 == 0:
            raise ValueError(
                f"kernel must be odd, to look as far back as ahead, not {self.kernel}; "
                f"use {self.kernel + 1}"
            )
        check_rate("dropout", self.dropout)

    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        tower, selection = audio_tower(self, sites), sites.select(self.sites)
        if any("attn" not in block.sublayers for block in tower.blocks):
            raise ValueError(
                f"{self.method} cannot enter {sites.architecture}: it reads padding off the mask "
                "of its blocks' attention, which the site map does not name as 'attn'"
            )
        if not tower.batch_first:
            raise ValueError(
                f"{self.method} cannot enter {sites.architecture}, whose blocks take frames first "
                "and the batch second; build it with batch_first=True"
            )
        built: dict[str, AdapterModule] = {
            sublayer.name: ConformerAdapter(self, sublayer)
            for block in tower.blocks
            for sublayer in block.sublayers.values()
            if sublayer.name in selection and sublayer.kind in self.placement.at
        }
        if not built:
            raise ValueError(
                f"the audio tower of {sites.architecture} has no "
                f"{' or '.join(self.placement.at)} under sites={self.sites!r}"
            )
        return built


class ConformerAdapter(Placed):
    """One adapter at one sublayer.

    Parameters of `norm` (D,), `expand` (2 r, D), `depthwise` (r, 1, kernel), `batch_norm` (r,),
    which has buffers too, and `up` (D, r).
    """

    def __init__(self, config: ConformerAdapterConfig, sublayer: Sublayer) -> None:
        super().__init__(config.placement)
        self.reads |= {"mask"}
        width, size, like = sublayer.width, config.size, sublayer.like()
        self.dropout = config.dropout
        self.norm = nn.LayerNorm(width, **like)
        self.expand = linear(width, 2 * size, like)
        # No bias: the batch norm would subtract it again.
        self.depthwise = nn.Conv1d(
            *(size, size, config.kernel),
            padding=config.kernel // 2,
            groups=size,
            bias=False,
            **like,
        )
        self.batch_norm = FrameNorm(size, like)
        self.up = zero_linear(size, width, like)

    def change(self, branch: Tensor, context: Context) -> Tensor:
        mask = context.mask
        h = self.norm(self.read(branch, context))
        h = F.glu(self.expand(h), dim=-1)
        if mask is not None:
            h = h.masked_fill(~mask[..., None], 0.0)
        h = self.depthwise(h.transpose(1, 2)).transpose(1, 2)
        h = F.silu(self.batch_norm(h, mask))
        return self.up(F.dropout(h, self.dropout, self.training)).to(branch.dtype)


class FrameNorm(nn.Module):
    """Batch norm (Ioffe and Szegedy 2015) over all frames that are no padding.

    Parameters `weight` and `bias` (r,), buffers `running_mean` and `running_var` (r,) in float32 or
    wider. It counts no batches: the count would be the only whole number in an adapter's file.
    """

    MOMENTUM, EPSILON = 0.1, 1e-5

    def __init__(self, size: int, like: dict) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, **like))
        self.bias = nn.Parameter(torch.zeros(size, **like))
        wide = {**like, "dtype": torch.promote_types(like["dtype"], torch.float32)}
        self.register_buffer("running_mean", torch.zeros(size, **wide))
        self.register_buffer("running_var", torch.ones(size, **wide))
        self.running_mean: Tensor
        self.running_var: Tensor

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x: (B, N, r); mask: (B, N), True for frames that count, None if all do -> (B, N, r)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, variance = self.running_mean, self.running_var
        if self.training:
            mean, variance = self._measured(wide, mask)
        normed = (wide - mean) * (variance + self.EPSILON).rsqrt()
        return (normed * self.weight + self.bias).to(x.dtype)

    def _measured(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns mean and variance (r,) of these frames; moves the running ones towards them."""
        keep = x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype)
        keep, count = keep[..., None], keep.sum()
        mean = (x * keep).sum((0, 1)) / count
        variance = ((x - mean).square() * keep).sum((0, 1)) / count
        with torch.no_grad():
            unbiased = variance * count / (count - 1).clamp(min=1)
            for kept, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                kept.lerp_(new.to(kept.dtype), self.MOMENTUM)
        return mean, variance
