"""AdapterFusion: attention over what several adapters add at a site, with their parameters frozen.

    u_i = change of adapter i at this sublayer,  h = x + branch, the layer's state there
    w   = softmax_i(u_i . K^T (Q h + b_q))
    branch' = branch + V sum_i w_i u_i

Pfeiffer et al. 2021, section 3.2. Q and K (D, D) start at N(0, 0.02) and V at the identity, which
`regularization` x ||V - I||^2 in the loss keeps it near to. The authors' code adds a bias to the
keys, which shifts all scores alike and so does nothing; and it computes K and V for every adapter,
where here V acts once, on the sum.

In inference everything folds: with u_i = U_i a_i + b_i, a_i (r,) the bottleneck's state,

    score_i = [a_i, 1] . [U_i, b_i]^T K^T (Q h + b_q)
    V sum_i w_i u_i = sum_i w_i V [U_i, b_i] [a_i, 1]

so that Q, K and V cost what n more bottlenecks do, not D x D maps.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sites.sitemap import SiteMap, Sublayer
from .base import (
    AdapterModule,
    Branch,
    Changing,
    MethodConfig,
    check_number,
    check_rate,
    reads_of,
    wanted,
)
from .bottleneck import ACTIVATIONS, Bottleneck, chosen_sublayers


@dataclass(frozen=True, kw_only=True)
class FusionConfig(MethodConfig):
    """`dropout`: on the attention weights; `regularization`: of V's distance from the identity.

    `sites` are those of the members: `add_adapter_fusion` fills them in.
    """

    dropout: float = 0.0
    regularization: float = 0.01

    method: ClassVar[str] = "fusion"
    mergeable: ClassVar[bool | str] = "its attention depends on the input, so no weight equals it"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rate("dropout", self.dropout)
        check_number("regularization", self.regularization)
        if self.regularization < 0:
            raise ValueError(f"regularization must be at least 0, not {self.regularization}")

    def build(self, sites: SiteMap) -> dict[str, AdapterModule]:
        chosen = chosen_sublayers(self, sites, ("attn", "cross", "ffn"))
        return {sublayer.name: FusionAttention(self, sublayer) for sublayer in chosen}


class FusionAttention(Branch):
    """The attention of one site: parameters `query` (with bias), `key` and `value`, (D, D) each."""

    reads = frozenset({"residual"})

    def __init__(self, config: FusionConfig, sublayer: Sublayer) -> None:
        super().__init__()
        width, like = sublayer.width, sublayer.like()
        self.dropout, self.regularization = config.dropout, config.regularization
        self.query = nn.Linear(width, width, **like)
        self.key = nn.Linear(width, width, bias=False, **like)
        self.value = nn.Linear(width, width, bias=False, **like)
        for linear in (self.query, self.key):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.query.bias)
        nn.init.eye_(self.value.weight)

    def weights(self, scores: Tensor) -> Tensor:
        """Scores (B, N, n) -> attention weights, which `recorded` notes."""
        dtype = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(dim=-1, dtype=dtype).to(scores.dtype)
        if not torch.compiler.is_compiling() and _recording.table is not None:
            _recording.table.setdefault(self, []).append(weights.detach().float().mean((0, 1)))
        return F.dropout(weights, self.dropout, self.training)

    def penalty(self) -> Tensor:
        """regularization x ||V - I||^2, a scalar in float32."""
        value = self.value.weight.float()
        identity = torch.eye(len(value), device=value.device)
        return self.regularization * (value - identity).square().sum()


class _Recording(threading.local):
    table: dict[FusionAttention, list[Tensor]] | None = None


_recording = _Recording()


@contextlib.contextmanager
def recorded() -> Iterator[dict[FusionAttention, list[Tensor]]]:
    """Inside the block, in this thread, the mean weights (n,) of every call, by module."""
    above = _recording.table
    table: dict[FusionAttention, list[Tensor]] = {}
    _recording.table = table
    try:
        yield table
    finally:
        _recording.table = above


class Fused(Changing):
    """The fusion of `members`, anything with a `change`, by the attention of one site."""

    def __init__(self, attention: FusionAttention, members: Sequence[Any]) -> None:
        self.attention, self.members = attention, tuple(members)
        self.foldable = _foldable(self.members)
        self.reads = reads_of((attention, *self.members))

    def change(
        self, branch: Tensor, *, residual: Tensor | None, input: Tensor | None, **more: Any
    ) -> Tensor:
        """V sum_i w_i u_i, (B, N, D)."""
        assert residual is not None
        state = residual + branch
        if self.foldable and not torch.is_grad_enabled() and not self.attention.training:
            # Made anew each time, a few D x D x r products: kept, it would miss writes to `.data`.
            folded = _Folded.of(self.attention, self.members)
            return folded(self.attention, branch, state, residual, input)
        changes = [
            m.change(branch, residual=residual, input=input, **wanted(m, more))
            for m in self.members
        ]
        query = self.attention.query(state.to(self.attention.query.weight.dtype))
        probe = F.linear(query, self.attention.key.weight.t())
        scores = torch.stack([(probe * change).sum(-1) for change in changes], dim=-1)
        weights = self.attention.weights(scores)
        mixed = sum(
            weight[..., None] * change
            for weight, change in zip(weights.unbind(-1), changes, strict=True)
        )
        assert isinstance(mixed, Tensor)
        return self.attention.value(mixed).to(branch.dtype)


def _foldable(members: Sequence[Any]) -> bool:
    """Whether all are plain bottlenecks that read the same tensor, so that one map serves all."""
    first = members[0]
    return all(
        type(m) is Bottleneck
        and type(m.down) is type(m.up) is nn.Linear
        and m.norm_before is None
        and m.norm_after is None
        and (m.reads, m.parallel, m.activation) == (first.reads, first.parallel, first.activation)
        for m in members
    )


@dataclass
class _Folded:
    """`down` (R, D) with its bias; `probe` and `up` over R + n columns: [a_1 .. a_n, 1 .. 1]."""

    members: Sequence[Bottleneck]
    sizes: list[int]
    down: Tensor
    down_bias: Tensor
    probe: Tensor
    probe_bias: Tensor
    up: Tensor

    @classmethod
    def of(cls, attention: FusionAttention, members: Sequence[Bottleneck]) -> _Folded:
        downs = [m.linears[0] for m in members]
        ups = [m.linears[1].weight * _column(m.scale) for m in members]
        shifts: list[Tensor] = [m.linears[1].bias * m.scale for m in members]
        maps = torch.cat([*ups, torch.stack(shifts, dim=1)], dim=1)  # (D, R + n)
        keyed = (attention.key.weight @ maps).t()
        return cls(
            members=members,
            sizes=[down.out_features for down in downs],
            down=torch.cat([down.weight for down in downs]),
            down_bias=torch.cat([down.bias for down in downs]),
            probe=keyed @ attention.query.weight,
            probe_bias=keyed @ attention.query.bias,
            up=attention.value.weight @ maps,
        )

    def __call__(
        self,
        attention: FusionAttention,
        branch: Tensor,
        state: Tensor,
        residual: Tensor | None,
        input: Tensor | None,
    ) -> Tensor:
        """V sum_i w_i u_i, (B, N, D)."""
        total = sum(self.sizes)
        inner, probe = self._looked_at(branch, state, residual, input)
        inner = ACTIVATIONS[self.members[0].activation](inner)
        products = (inner * probe[..., :total]).split(self.sizes, dim=-1)
        own = torch.stack([product.sum(-1) for product in products], dim=-1)
        weights = attention.weights(own + probe[..., total:])
        if len(set(self.sizes)) == 1:
            shape = (len(self.sizes), -1)
            weighted = (inner.unflatten(-1, shape) * weights[..., None]).flatten(-2)
        else:
            pieces = zip(inner.split(self.sizes, dim=-1), weights.split(1, dim=-1), strict=True)
            weighted = torch.cat([piece * weight for piece, weight in pieces], dim=-1)
        return F.linear(torch.cat([weighted, weights], dim=-1), self.up).to(state.dtype)

    def _looked_at(
        self, branch: Tensor, state: Tensor, residual: Tensor | None, input: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What goes into the activation (B, N, R), and what the scores multiply (B, N, R + n)."""
        first, total = self.members[0], sum(self.sizes)
        if "residual" in first.reads and not first.parallel:
            # The members read the state itself: one map for both.
            weight = torch.cat([self.down, self.probe])
            both = F.linear(state, weight, torch.cat([self.down_bias, self.probe_bias]))
            return both[..., :total], both[..., total:]
        h = first.read(branch, residual=residual, input=input)
        inner = F.linear(h, self.down, self.down_bias)
        return inner, F.linear(state, self.probe, self.probe_bias)


def _column(scale: float | Tensor) -> float | Tensor:
    """A scale, one or one per channel, as it multiplies the rows of the up-projection."""
    return scale[:, None] if isinstance(scale, Tensor) and scale.dim() == 1 else scale
