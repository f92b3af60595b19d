"""Bottleneck adapters: down-projection, activation, up-projection, beside a frozen sublayer.

For a sublayer with residual stream x and branch u, whose sum is the stream's next state,

    u' = u + s * DropPath(Norm(U Dropout(act(D Norm(h) + b_D)) + b_U))

where h is, by the placement,

    SequentialPlacement(residual="before")   u        Houlsby et al. 2019
    SequentialPlacement(residual="after")    x + u    Pfeiffer et al. 2021
    ParallelPlacement(input="residual")      x        He et al. 2022; AdaptFormer, Chen et al. 2022
    ParallelPlacement(input="normed")        what the sublayer itself reads

D (r, D) starts as nn.Linear does and U (D, r) at zero, so that a fresh adapter is the identity;
never both at zero, or neither would ever learn. Houlsby's near-zero start of both differs by that.
With a LayerNorm after U it is the norm's gain that starts at zero instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sites.sitemap import SiteMap, Sublayer
from .base import (
    AdapterModule,
    Branch,
    MethodConfig,
    check_choice,
    check_count,
    check_number,
    check_rate,
    drop_path,
)
from .init import linear, zero_linear
from .kernels import fused

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
    """After the named sublayers, on the branch (`before` the residual add) or on the sum."""

    at: tuple[str, ...] = SUBLAYERS
    residual: Literal["before", "after"] = "before"

    def __post_init__(self) -> None:
        _check_at(self)
        check_choice("residual", self.residual, ("before", "after"))


@dataclass(frozen=True, kw_only=True)
class ParallelPlacement:
    """Beside the named sublayers, reading the un-normed residual stream or the sublayer's input."""

    at: tuple[str, ...] = ("ffn",)
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
    """Any bottleneck adapter. Give `size` or `reduction_factor`, or neither for `standard`.

    norm: LayerNorm before the down-projection, or after the up-projection, or none.
    scale: factor on the result; `learn_scale` makes it a parameter, one or one per channel.
    """

    placement: Placement = field(default_factory=SequentialPlacement)
    size: int | None = None
    reduction_factor: float | None = None
    activation: str = "relu"
    norm: Literal["before", "after"] | None = None
    scale: float = 1.0
    learn_scale: Literal["scalar", "channel"] | None = None
    dropout: float = 0.0
    drop_path: float = 0.0

    method: ClassVar[str] = "bottleneck"
    standard: ClassVar[tuple[Literal["size", "reduction_factor"], int]] = ("reduction_factor", 16)

    @property
    def mergeable(self) -> bool | str:  # type: ignore[override]
        """True where it is a few more channels of the feed-forward part that it stands beside."""
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
        check_number("scale", self.scale)
        if self.scale == 0:
            raise ValueError(
                "scale must not be 0: with the up-projection at zero nothing would learn"
            )
        if self.size is None and self.reduction_factor is None:
            object.__setattr__(self, *self.standard)
        check_size(self.size, self.reduction_factor)

    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        return {
            sublayer.name: Bottleneck(self, sublayer)
            for sublayer in chosen_sublayers(self, sites, self.placement.at)
        }


class Placed(Branch):
    """A branch that reads what its placement says."""

    def __init__(self, placement: Placement) -> None:
        super().__init__()
        self.parallel = isinstance(placement, ParallelPlacement)
        if isinstance(placement, ParallelPlacement):
            self.reads = frozenset({"residual" if placement.input == "residual" else "input"})
        elif placement.residual == "after":
            self.reads = frozenset({"residual"})

    def read(self, branch: Tensor, *, residual: Tensor | None, input: Tensor | None) -> Tensor:
        """h of the formula, (B, N, D), by the placement."""
        # What it does not read may be given all the same, for another adapter at this site.
        if "residual" in self.reads:
            assert residual is not None
            return residual if self.parallel else residual + branch
        if "input" in self.reads:
            assert input is not None
            return input
        return branch


class Bottleneck(Placed):
    """One bottleneck at one sublayer; parameters `down`, `up`, and `norm`, `scale` if asked for."""

    def __init__(
        self,
        config: BottleneckConfig,
        sublayer: Sublayer,
        *,
        project: Callable[[int, int, dict], nn.Module] | None = None,
    ) -> None:
        """`project(in, out, like)` makes the projections; by default linear maps."""
        super().__init__(config.placement)
        width, like = sublayer.width, sublayer.like()
        size = bottleneck_size(sublayer, config.size, config.reduction_factor)
        self.activation = config.activation
        self.dropout, self.drop_path = config.dropout, config.drop_path
        self.norm_before = nn.LayerNorm(width, **like) if config.norm == "before" else None
        self.norm_after = nn.LayerNorm(width, **like) if config.norm == "after" else None
        self.down = (project or linear)(width, size, like)
        # A LayerNorm of zeros would multiply the first gradients by 1/sqrt(eps), some 300: with one
        # behind the up-projection, it is its gain that starts at zero.
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
        """Both projections, of a bottleneck whose projections are plain linear maps."""
        assert type(self.down) is type(self.up) is nn.Linear
        return self.down, self.up

    def forward(self, branch: Tensor, *, residual: Tensor | None, input: Tensor | None) -> Tensor:
        maps = None
        if branch.is_cuda and not torch.compiler.is_compiling():
            maps = self._maps(branch)
        if maps is not None:
            h = self.read(branch, residual=residual, input=input)
            if h is branch or fused.fits(h, branch, maps, self.activation):
                scale: float = self.scale  # type: ignore[assignment]
                return fused.bottleneck(h, branch, maps, activation=self.activation, scale=scale)
        return branch + self.change(branch, residual=residual, input=input)

    def _maps(self, branch: Tensor) -> fused.Maps | None:
        """What one kernel can put on the branch; None where this is not two linear maps, an
        activation and a fixed scale with nothing drawn, or the kernel does not take the tensors.

        Parts are looked up where nn.Module keeps them: its own attribute access, which searches,
        would take as long as the launch.
        """
        parts = self._modules
        down, up = parts["down"], parts["up"]
        if (
            parts.get("norm_before") is not None
            or parts.get("norm_after") is not None
            or "scale" in self._parameters
            or (self.training and (self.dropout or self.drop_path))
            or not _is_map(down)
            or not _is_map(up)
        ):
            return None
        first, second = down._parameters, up._parameters
        maps: Any = (first["weight"], first["bias"], second["weight"], second["bias"])
        return maps if fused.fits(branch, branch, maps, self.activation) else None

    def channels(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        if self.reads != {"input"} or self.norm_before is not None or self.norm_after is not None:
            return None
        if not (_is_map(self.down) and _is_map(self.up)):
            return None
        down, up = self.linears
        scale = torch.as_tensor(self.scale, dtype=up.weight.dtype, device=up.weight.device)
        return down.weight, down.bias, up.weight * scale.reshape(-1, 1), up.bias * scale

    def change(self, branch: Tensor, *, residual: Tensor | None, input: Tensor | None) -> Tensor:
        h = _mapped(self.up, self.inner(branch, residual=residual, input=input))
        if self.norm_after is not None:
            h = self.norm_after(h)
        if isinstance(self.scale, Tensor) or self.scale != 1.0:
            h = h * self.scale
        return drop_path(h, self.drop_path, self.training).to(branch.dtype)

    def inner(self, branch: Tensor, *, residual: Tensor | None, input: Tensor | None) -> Tensor:
        """The bottleneck's state (B, N, r), from which the up-projection makes the change."""
        h = self.read(branch, residual=residual, input=input)
        if self.norm_before is not None:
            h = self.norm_before(h)
        h = ACTIVATIONS[self.activation](_mapped(self.down, h))
        return F.dropout(h, self.dropout, self.training)


def _is_map(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether calling it does what nn.Linear does and no more."""
    return type(module) is nn.Linear and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _mapped(module: nn.Module, x: Tensor) -> Tensor:
    """module(x). In a small batch the call of a module takes longer than its product does, so plain
    maps are not called; compiled code calls nothing in any case."""
    if torch.compiler.is_compiling() or not _is_map(module):
        return module(x)
    own = module._parameters
    weight = own["weight"]
    assert weight is not None
    return F.linear(x, weight, own["bias"])


def check_size(size: int | None, reduction_factor: float | None) -> None:
    """Raises ValueError for a bottleneck that is given twice or is not a positive number."""
    if size is not None and reduction_factor is not None:
        raise ValueError(
            f"give the bottleneck as size={size} or as reduction_factor={reduction_factor}, "
            "not as both"
        )
    if size is not None:
        check_count("size", size)
    if reduction_factor is not None:
        check_number("reduction_factor", reduction_factor)
        if reduction_factor <= 0:
            raise ValueError(f"reduction_factor must be above 0, not {reduction_factor}")


def bottleneck_size(sublayer: Sublayer, size: int | None, reduction_factor: float | None) -> int:
    """The bottleneck of one sublayer: as given, or its width over the factor, rounded down."""
    if size is not None:
        return size
    assert reduction_factor is not None
    if reduction_factor > sublayer.width:
        raise ValueError(
            f"reduction_factor {reduction_factor:g} is larger than the width {sublayer.width} of "
            f"{sublayer.name}: nothing would be left; use at most {sublayer.width} or give size"
        )
    return int(sublayer.width / reduction_factor)


def chosen_sublayers(
    config: MethodConfig, sites: SiteMap, kinds: tuple[str, ...]
) -> list[Sublayer]:
    """The sublayers of the given kinds under the config's `sites`.

    Raises:
        ValueError: there is none.
    """
    selection = sites.select(config.sites)
    found = [s for s in sites.sublayers() if s.name in selection and s.kind in kinds]
    if not found:
        there = sorted({sublayer.kind for sublayer in sites.sublayers()})
        raise ValueError(
            f"{sites.architecture} has no {' or '.join(kinds)} under sites={config.sites!r}; "
            f"it has {', '.join(there)}"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class DoubleSeqBnConfig(BottleneckConfig):
    """Houlsby et al. 2019: after every sublayer, before its residual is added."""

    activation: str = "gelu"
    method: ClassVar[str] = "double_seq_bn"


@dataclass(frozen=True, kw_only=True)
class SeqBnConfig(BottleneckConfig):
    """Pfeiffer et al. 2021: once per block, after the feed-forward part and its residual."""

    placement: Placement = field(
        default_factory=lambda: SequentialPlacement(at=("ffn",), residual="after")
    )
    method: ClassVar[str] = "seq_bn"


@dataclass(frozen=True, kw_only=True)
class ParBnConfig(BottleneckConfig):
    """He et al. 2022: parallel to the feed-forward part, reading the residual stream, scaled."""

    placement: Placement = field(default_factory=ParallelPlacement)
    scale: float = 4.0
    method: ClassVar[str] = "par_bn"
    standard = ("reduction_factor", 2)


@dataclass(frozen=True, kw_only=True)
class AdaptFormerConfig(BottleneckConfig):
    """AdaptFormer, Chen et al. 2022: parallel to the MLP on the un-normed stream, 64 wide, x0.1."""

    placement: Placement = field(default_factory=ParallelPlacement)
    scale: float = 0.1
    dropout: float = 0.1
    method: ClassVar[str] = "adaptformer"
    standard = ("size", 64)


@dataclass(frozen=True, kw_only=True)
class AdapterPlusConfig(BottleneckConfig):
    """Adapter+, Steitz and Roth 2024: after the MLP's residual, GELU, learned scale per channel."""

    placement: Placement = field(
        default_factory=lambda: SequentialPlacement(at=("ffn",), residual="after")
    )
    activation: str = "gelu"
    learn_scale: Literal["scalar", "channel"] | None = "channel"
    drop_path: float = 0.1
    method: ClassVar[str] = "adapter_plus"
    standard = ("size", 8)
