"""Convolutional adapters for image encoders: each patch sees its neighbours in the image.

    Convpass   u' = u + s Up Dropout(q(C q(Down n)))                   beside attention and MLP
    Mona       u' = u + Up Dropout(GELU(O(Down(LN(h) g + h g_x))))     on their sums h = x + u

x is the residual stream, u the sublayer's branch, n the sublayer's own input (normed in pre-norm
blocks), q(v) = v sigmoid(1.702 v). C is a 3 x 3 convolution over the grid of patches, padded by 1.
O(v) = t + P t with t = v + (C_3 v + C_5 v + C_7 v) / 3, C_k depthwise k x k, P 1 x 1. Class and
register tokens, and prompts behind the patches, are images of one pixel: only the centre of the
kernel acts on them. Jie and Deng 2022 (Convpass); Yin et al. 2025 (Mona).

Up starts at zero, so that a fresh adapter is the identity; Mona's authors start it as nn.Linear
does. C starts as the identity, as in Convpass's code; g at 1e-6 and g_x at 1. The grid is that of
the current image, of any size and shape.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sites.acting import CHECKPOINTING, Context, runs_again
from ..sites.sitemap import Grid, SiteMap, Sublayer
from .base import AdapterModule, Branch, MethodConfig
from .bottleneck import ACTIVATIONS
from .init import linear, zero_linear
from .select import check_count, check_rate, check_scale, image_sublayers

Apply = Callable[[nn.Conv2d, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class GridConfig(MethodConfig):
    """Base of the methods that convolve over patches.

    `add_adapter` raises ValueError for towers that read no image.
    """

    # The width of the bottleneck in channels, at least 1.
    size: int
    # Probability that an element of the bottleneck is zeroed in training, 0 to below 1.
    dropout: float = 0.1

    mergeable: ClassVar[bool | str] = (
        "a convolution mixes tokens, which no weight of the encoder does"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("size", self.size)
        check_rate("dropout", self.dropout)

    @abstractmethod
    def module(self, sublayer: Sublayer, *, batch_first: bool) -> AdapterModule:
        """Returns the new module of one sublayer."""

    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        return {
            sublayer.name: self.module(sublayer, batch_first=batch_first)
            for sublayer, batch_first in image_sublayers(self, sites)
        }


@dataclass(frozen=True, kw_only=True)
class ConvpassConfig(GridConfig):
    """Convpass, Jie and Deng 2022. `sites=("*.attn",)` is the paper's Convpass-attn."""

    # h, the width of the bottleneck in channels, at least 1.
    size: int = 8
    # s, a factor on the result, not 0.
    scale: float = 1.0

    method: ClassVar[str] = "convpass"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale(self.scale)

    def module(self, sublayer: Sublayer, *, batch_first: bool) -> AdapterModule:
        return Convpass(self, sublayer, batch_first=batch_first)


@dataclass(frozen=True, kw_only=True)
class MonaConfig(GridConfig):
    """Mona, Yin et al. 2025."""

    # r, the width of the bottleneck in channels, at least 1.
    size: int = 64

    method: ClassVar[str] = "mona"

    def module(self, sublayer: Sublayer, *, batch_first: bool) -> AdapterModule:
        return Mona(self, sublayer, batch_first=batch_first)


class GridBranch(Branch):
    """A branch that convolves over the grid of an image's patches.

    `batch_first`: tokens are (B, N, D), not (N, B, D).
    """

    batch_first: bool

    def over_grid(
        self, step: Callable[[Tensor, Apply], Tensor], z: Tensor, grid: Grid | None
    ) -> Tensor:
        """Applies `step` to the patches as a map (B, r, H, W), and to each other token alone.

        Args:
            step: gets the map, or the other tokens (B, n, r), and a function that convolves them.
            z: (B, N, r), or (N, B, r) if tokens come first.
            grid: how the patches lie among the tokens.

        Returns:
            The same shape as z.

        Raises:
            ValueError: no image has been embedded, or some of its patches are missing.
        """
        if grid is None and runs_again():
            raise ValueError(f"the patches' grid is unknown in the backward pass: {CHECKPOINTING}")
        if grid is None:
            raise ValueError(
                "the grid of the patches is unknown, as no image went through the encoder's patch "
                "embedding: call the encoder itself, not its blocks"
            )
        z = z if self.batch_first else z.transpose(0, 1)
        first, height, width = grid
        behind = z.shape[1] - first - height * width
        if behind < 0:
            raise ValueError(
                f"an image of {height} x {width} patches came with {z.shape[1] - first} of them: "
                "a convolution needs all, so switch the encoder's patch dropout off"
            )
        before, patches, after = z.split([first, height * width, behind], dim=1)
        mixed = step(patches.transpose(1, 2).unflatten(2, (height, width)), _on_map)
        mixed = mixed.flatten(2).transpose(1, 2)
        if first or behind:
            alone = step(torch.cat([before, after], dim=1), _on_token)
            mixed = torch.cat([alone[:, :first], mixed, alone[:, first:]], dim=1)
        return mixed if self.batch_first else mixed.transpose(0, 1)


def _on_map(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    return convolution(x)


def _on_token(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolves each token of x (B, n, r) as an image of one pixel."""
    height, width = convolution.kernel_size
    taps = convolution.weight[:, :, height // 2, width // 2]
    if convolution.groups == 1:
        return F.linear(x, taps, convolution.bias)
    assert convolution.bias is not None
    return x * taps[:, 0] + convolution.bias


class Convpass(GridBranch):
    """Convpass at one sublayer.

    Parameters of `down` (h, D), `conv` (h, h, 3, 3) and `up` (D, h), with biases.
    """

    reads = frozenset({"input", "grid"})

    def __init__(self, config: ConvpassConfig, sublayer: Sublayer, *, batch_first: bool) -> None:
        super().__init__()
        width, size, like = sublayer.width, config.size, sublayer.like()
        self.batch_first = batch_first
        self.scale, self.dropout = config.scale, config.dropout
        self.down = linear(width, size, like)
        self.conv = nn.Conv2d(size, size, 3, padding=1, **like)
        nn.init.dirac_(self.conv.weight)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)
        self.up = zero_linear(size, width, like)

    def change(self, branch: Tensor, context: Context) -> Tensor:
        assert context.input is not None
        quick_gelu = ACTIVATIONS["quick_gelu"]
        z = quick_gelu(self.down(context.input))
        z = quick_gelu(self.over_grid(lambda v, apply: apply(self.conv, v), z, context.grid))
        z = F.dropout(z, self.dropout, self.training)
        return (self.scale * self.up(z)).to(branch.dtype)


class Mona(GridBranch):
    """Mona at one sublayer.

    Parameters of `norm` (D,), `gain` and `gain_x` (D,), `down` (r, D), `conv3`, `conv5` and `conv7`
    (r, 1, k, k), `mix` (r, r, 1, 1) and `up` (D, r), with biases.
    """

    reads = frozenset({"residual", "grid"})

    def __init__(self, config: MonaConfig, sublayer: Sublayer, *, batch_first: bool) -> None:
        super().__init__()
        width, size, like = sublayer.width, config.size, sublayer.like()
        self.batch_first, self.dropout = batch_first, config.dropout
        self.norm = nn.LayerNorm(width, **like)
        self.gain = nn.Parameter(torch.full((width,), 1e-6, **like))
        self.gain_x = nn.Parameter(torch.ones(width, **like))
        self.down = linear(width, size, like)
        self.conv3, self.conv5, self.conv7 = (
            nn.Conv2d(size, size, k, padding=k // 2, groups=size, **like) for k in (3, 5, 7)
        )
        self.mix = nn.Conv2d(size, size, 1, **like)
        self.up = zero_linear(size, width, like)

    def change(self, branch: Tensor, context: Context) -> Tensor:
        assert context.residual is not None
        h = context.residual + branch
        z = self.over_grid(
            self.operator, self.down(self.norm(h) * self.gain + h * self.gain_x), context.grid
        )
        z = F.dropout(F.gelu(z), self.dropout, self.training)
        return self.up(z).to(branch.dtype)

    def operator(self, v: Tensor, apply: Apply) -> Tensor:
        """Returns O(v) of the formula, of the shape of v."""
        convolved = apply(self.conv3, v) + apply(self.conv5, v) + apply(self.conv7, v)
        t = v + convolved / 3
        return t + apply(self.mix, t)
