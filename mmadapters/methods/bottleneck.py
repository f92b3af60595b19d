"""Bottleneck adapters: down-projection, activation, up-projection, beside a frozen sublayer.

For a sublayer with residual stream x and branch u, whose sum is the stream's next state,

    u' = u + s * DropPath(Norm(U Dropout(act(D Norm(h) + b_D)) + b_U))

where the placement says what h is:

    SequentialPlacement(residual="before")   u        Houlsby et al. 2019
    SequentialPlacement(residual="after")    x + u    Pfeiffer et al. 2021
    ParallelPlacement(input="residual")      x        He et al. 2022; AdaptFormer, Chen et al. 2022
    ParallelPlacement(input="normed")        the sublayer's own input

D (r, D) starts as nn.Linear does and U (D, r) at zero, so that a fresh adapter is the identity.
Both at zero would never learn. Houlsby et al. start both near zero instead. With a LayerNorm after
U, the gain of the norm starts at zero, and U as nn.Linear does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sites.acting import Context
from ..sites.sitemap import SiteMap, Sublayer
from .base import AdapterModule, Branch, MethodConfig, drop_path
from .init import linear, zero_linear
from .kernels import fused
from .kernels.linear import is_plain, mapped
from .select import (
    bottleneck_size,
    check_choice,
    check_rate,
    check_scale,
    check_size,
    chosen_sublayers,
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "identity": lambda x: x,
}
SUBLAYERS = ("attn", "cross", "ffn")


@dataclass(frozen=True, kw_only=True)
class SequentialPlacement:
    """Behind the named sublayers: the adapter reads the branch, or its sum with the residual."""

    # Kinds of sublayer, one or more of "attn", "cross" and "ffn".
    at: tuple[str, ...] = SUBLAYERS
    # "before": h is the branch u, before the residual is added; "after": h is the sum x + u.
    residual: Literal["before", "after"] = "before"

    def __post_init__(self) -> None:
        _check_at(self)
        check_choice("residual", self.residual, ("before", "after"))


@dataclass(frozen=True, kw_only=True)
class ParallelPlacement:
    """Beside the named sublayers: the adapter reads the residual stream or the sublayer's input."""

    # Kinds of sublayer, one or more of "attn", "cross" and "ffn".
    at: tuple[str, ...] = ("ffn",)
    # "residual": h is the stream x, not normed; "normed": h is the sublayer's own input.
    input: Literal["residual", "normed"] = "residual"

    def __post_init__(self) -> None:
        _check_at(self)
        check_choice("input", self.input, ("residual", "normed"))


Placement = SequentialPlacement | ParallelPlacement


def _check_at(placement: Placement) -> None:
    if isinstance(placement.at, str):
        raise ValueError(f"at must be a tuple of sublayers, e.g. at=({placement.at!r},)")
    object.__setattr__(placement, "at", tuple(placement.at))
    if not placement.at:
        raise ValueError(f"at is empty: name at least one of {', '.join(SUBLAYERS)}")
    for sublayer in placement.at:
        check_choice("at", sublayer, SUBLAYERS)


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(MethodConfig):
    """Any bottleneck adapter. Give `size` or `reduction_factor`, or neither for `standard`."""

    # The sublayers that get an adapter, and what it reads there.
    placement: Placement = field(default_factory=SequentialPlacement)
    # r, the width of the bottleneck in channels, at least 1.
    size: int | None = None
    # The sublayer's width over r: above 0, at most the width. r is rounded down.
    reduction_factor: float | None = None
    # The function between both projections, a name in `ACTIVATIONS`.
    activation: str = "relu"
    # A LayerNorm "before" the down-projection or "after" the up-projection; None: neither.
    norm: Literal["before", "after"] | None = None
    # s, a factor on the result, not 0; the initial value if it is learned.
    scale: float = 1.0
    # Makes s a parameter: one number ("scalar") or one for each channel ("channel").
    learn_scale: Literal["scalar", "channel"] | None = None
    # Probability that an element of the bottleneck is zeroed in training, 0 to below 1.
    dropout: float = 0.0
    # Probability that the result is left out for a whole sample in training, 0 to below 1.
    drop_path: float = 0.0

    method: ClassVar[str] = "bottleneck"
    # The option that is set, and its value, where neither size nor factor is given.
    standard: ClassVar[tuple[Literal["size", "reduction_factor"], int]] = ("reduction_factor", 16)

    @property
    def mergeable(self) -> bool | str:  # type: ignore[override]
        """True if it equals more channels of the feed-forward part that it stands beside."""
        placement = self.placement
        if (
            isinstance(placement, ParallelPlacement)
            and placement.input == "normed"
            and placement.at == ("ffn",)
            and self.norm is None
        ):
            return True
        return (
            "a bottleneck has a non-linearity between its two projections, so no weight equals it"
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.placement, (SequentialPlacement, ParallelPlacement)):
            raise ValueError(
                "placement must be SequentialPlacement or ParallelPlacement, "
                f"not {self.placement!r}"
            )
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("norm", self.norm, ("before", "after", None))
        check_choice("learn_scale", self.learn_scale, ("scalar", "channel", None))
        check_rate("dropout", self.dropout)
        check_rate("drop_path", self.drop_path)
        check_scale(self.scale)
        if self.size is None and self.reduction_factor is None:
            object.__setattr__(self, *self.standard)
        check_size(self.size, self.reduction_factor)

    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        return {
            sublayer.name: Bottleneck(self, sublayer)
            for sublayer in chosen_sublayers(self, sites, self.placement.at)
        }


class Placed(Branch):
    """A branch whose placement says what it reads."""

    def __init__(self, placement: Placement) -> None:
        super().__init__()
        self.parallel = isinstance(placement, ParallelPlacement)
        if isinstance(placement, ParallelPlacement):
            self.reads = frozenset({"residual" if placement.input == "residual" else "input"})
        elif placement.residual == "after":
            self.reads = frozenset({"residual"})

    def read(self, branch: Tensor, context: Context) -> Tensor:
        """Returns h of the formula, (B, N, D)."""
        # Not by which fields are set: another adapter may have asked for more.
        if "residual" in self.reads:
            assert context.residual is not None
            return context.residual if self.parallel else context.residual + branch
        if "input" in self.reads:
            assert context.input is not None
            return context.input
        return branch


class Bottleneck(Placed):
    """One bottleneck at one sublayer.

    Parameters of `down` (r, D) and `up` (D, r), with biases; of `norm_before` or `norm_after` (D,)
    and `scale` () or (D,) if the config asks for them.
    """

    def __init__(
        self,
        config: BottleneckConfig,
        sublayer: Sublayer,
        *,
        project: Callable[[int, int, dict], nn.Module] | None = None,
    ) -> None:
        """
        Args:
            project: makes a projection of an input width, an output width and the factory keywords
                dtype and device; by default a linear map.
        """
        super().__init__(config.placement)
        width, like = sublayer.width, sublayer.like()
        size = bottleneck_size(sublayer, config.size, config.reduction_factor)
        self.activation = config.activation
        self.dropout, self.drop_path = config.dropout, config.drop_path
        self.norm_before = nn.LayerNorm(width, **like) if config.norm == "before" else None
        self.norm_after = nn.LayerNorm(width, **like) if config.norm == "after" else None
        self.down = (project or linear)(width, size, like)
        # A LayerNorm of zeros would multiply the first gradients by 1/sqrt(eps), some 300. Behind
        # the up-projection, the gain of the norm starts at zero instead.
        make_up = linear if self.norm_after is not None else zero_linear
        self.up = (project or make_up)(size, width, like)
        if self.norm_after is not None:
            nn.init.zeros_(self.norm_after.weight)
        self.scale: float | nn.Parameter = config.scale
        if config.learn_scale is not None:
            shape = (width,) if config.learn_scale == "channel" else ()
            self.scale = nn.Parameter(torch.full(shape, config.scale, **like))

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        """Both projections of a bottleneck whose projections are plain linear maps."""
        assert type(self.down) is type(self.up) is nn.Linear
        return self.down, self.up

    def forward(self, branch: Tensor, context: Context) -> Tensor:
        h = self.read(branch, context)
        total = fused.sum_of(self, h, branch)
        return branch + self.added(h).to(branch.dtype) if total is None else total

    def change(self, branch: Tensor, context: Context) -> Tensor:
        return self.added(self.read(branch, context)).to(branch.dtype)

    def added(self, h: Tensor) -> Tensor:
        """Returns s * DropPath(Norm(U Dropout(act(D Norm(h) + b_D)) + b_U)), (B, N, D)."""
        if self.norm_before is not None:
            h = self.norm_before(h)
        h = ACTIVATIONS[self.activation](mapped(self.down, h))
        h = mapped(self.up, F.dropout(h, self.dropout, self.training))
        if self.norm_after is not None:
            h = self.norm_after(h)
        if isinstance(self.scale, Tensor) or self.scale != 1.0:
            h = h * self.scale
        return drop_path(h, self.drop_path, self.training)

    def channels(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        if self.reads != {"input"} or self.norm_before is not None or self.norm_after is not None:
            return None
        if not (is_plain(self.down) and is_plain(self.up)):
            return None
        down, up = self.linears
        scale = torch.as_tensor(self.scale, dtype=up.weight.dtype, device=up.weight.device)
        return down.weight, down.bias, up.weight * scale.reshape(-1, 1), up.bias * scale


@dataclass(frozen=True, kw_only=True)
class DoubleSeqBnConfig(BottleneckConfig):
    """Houlsby et al. 2019: behind every sublayer, before its residual is added.

    Options are those of `BottleneckConfig`, with a GELU by default.
    """

    # act, a name in `ACTIVATIONS`.
    activation: str = "gelu"
    method: ClassVar[str] = "double_seq_bn"


@dataclass(frozen=True, kw_only=True)
class SeqBnConfig(BottleneckConfig):
    """Pfeiffer et al. 2021: once in a block, behind the feed-forward part and its residual.

    Options are those of `BottleneckConfig`, with this placement by default.
    """

    # The sublayers that get an adapter, and what it reads there.
    placement: Placement = field(
        default_factory=lambda: SequentialPlacement(at=("ffn",), residual="after")
    )
    method: ClassVar[str] = "seq_bn"


@dataclass(frozen=True, kw_only=True)
class ParBnConfig(BottleneckConfig):
    """He et al. 2022: beside the feed-forward part, reads the residual stream, times 4.

    Options are those of `BottleneckConfig`, with these defaults and half of the width.
    """

    # The sublayers that get an adapter, and what it reads there.
    placement: Placement = field(default_factory=ParallelPlacement)
    # s, a factor on the result, not 0.
    scale: float = 4.0
    method: ClassVar[str] = "par_bn"
    standard = ("reduction_factor", 2)


@dataclass(frozen=True, kw_only=True)
class AdaptFormerConfig(BottleneckConfig):
    """AdaptFormer, Chen et al. 2022: beside the MLP on the stream, not normed; r = 64, times 0.1.

    Options are those of `BottleneckConfig`, with these defaults.
    """

    # The sublayers that get an adapter, and what it reads there.
    placement: Placement = field(default_factory=ParallelPlacement)
    # s, a factor on the result, not 0.
    scale: float = 0.1
    # Probability that an element of the bottleneck is zeroed in training, 0 to below 1.
    dropout: float = 0.1
    method: ClassVar[str] = "adaptformer"
    standard = ("size", 64)


@dataclass(frozen=True, kw_only=True)
class AdapterPlusConfig(BottleneckConfig):
    """Adapter+, Steitz and Roth 2024: behind the MLP's residual, GELU, a learned scale per channel.

    Options are those of `BottleneckConfig`, with these defaults and r = 8.
    """

    # The sublayers that get an adapter, and what it reads there.
    placement: Placement = field(
        default_factory=lambda: SequentialPlacement(at=("ffn",), residual="after")
    )
    # act, a name in `ACTIVATIONS`.
    activation: str = "gelu"
    # Makes s a parameter: one number ("scalar") or one for each channel ("channel").
    learn_scale: Literal["scalar", "channel"] | None = "channel"
    # Probability that the result is left out for a whole sample in training, 0 to below 1.
    drop_path: float = 0.1
    method: ClassVar[str] = "adapter_plus"
    standard = ("size", 8)
