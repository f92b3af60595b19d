"""AdapterFusion: attention over the changes of several adapters at a site, which stay frozen.

    u_i = change of adapter i at this sublayer,  h = x + branch, the layer's state there
    w   = softmax_i(u_i . K^T (Q h + b_q))
    branch' = branch + V sum_i w_i u_i

Pfeiffer et al. 2021, section 3.2. Q and K (D, D) start at N(0, 0.02), V at the identity. The loss
has the term `regularization` x ||V - I||^2, which keeps V near the identity. The authors' code adds
a bias to the keys, which shifts all scores alike and so does nothing. It computes K and V for every
adapter; here V acts once, on the sum.

In inference everything is folded. With u_i = U_i a_i + b_i, a_i (r,) the bottleneck's state,

    score_i = [a_i, 1] . [U_i, b_i]^T K^T (Q h + b_q)
    V sum_i w_i u_i = sum_i w_i V [U_i, b_i] [a_i, 1]

so that Q, K and V cost as much as n more bottlenecks, not as much as D x D maps.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sites.acting import ActsOnBranch, Context
from ..sites.sitemap import SiteMap, Sublayer
from .base import AdapterModule, Branch, CombinedBranch, MethodConfig, reads_of
from .bottleneck import ACTIVATIONS, Bottleneck
from .select import check_number, check_rate, chosen_sublayers


@dataclass(frozen=True, kw_only=True)
class FusionConfig(MethodConfig):
    """Options of an AdapterFusion. `add_adapter_fusion` sets `sites` to those of the members."""

    # Probability that an attention weight is zeroed in training, 0 to below 1.
    dropout: float = 0.0
    # Factor on ||V - I||^2 in the loss, at least 0.
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
    """The attention of one site.

    Parameters of `query` (with bias), `key` and `value`, (D, D) each.
    """

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
        """scores: (B, N, n) -> attention weights of that shape, which `recorded` collects."""
        dtype = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(dim=-1, dtype=dtype).to(scores.dtype)
        if not torch.compiler.is_compiling() and _recording.table is not None:
            _recording.table.setdefault(self, []).append(weights.detach().float().mean((0, 1)))
        return F.dropout(weights, self.dropout, self.training)

    def penalty(self) -> Tensor:
        """Returns regularization x ||V - I||^2, a scalar in float32."""
        value = self.value.weight.float()
        identity = torch.eye(len(value), device=value.device)
        return self.regularization * (value - identity).square().sum()


class _Recording(threading.local):
    table: dict[FusionAttention, list[Tensor]] | None = None


_recording = _Recording()


@contextlib.contextmanager
def recorded() -> Iterator[dict[FusionAttention, list[Tensor]]]:
    """Collects the mean weights (n,) of every call inside the block, in this thread, by module."""
    above = _recording.table
    table: dict[FusionAttention, list[Tensor]] = {}
    _recording.table = table
    try:
        yield table
    finally:
        _recording.table = above


class Fused(CombinedBranch):
    """The fusion of `members` by the attention of one site."""

    def __init__(self, attention: FusionAttention, members: Sequence[ActsOnBranch]) -> None:
        self.attention, self.members = attention, tuple(members)
        self.foldable = self.members if _foldable(self.members) else None
        self.reads = reads_of((attention, *self.members))

    def change(self, branch: Tensor, context: Context) -> Tensor:
        """Returns V sum_i w_i u_i, (B, N, D)."""
        assert context.residual is not None
        state = context.residual + branch
        if (
            self.foldable is not None
            and not torch.is_grad_enabled()
            and not self.attention.training
        ):
            # Not kept, as a cache would miss writes to `.data`: it is a few D x D x r products.
            folded = _Folded.of(self.attention, self.foldable)
            return folded(self.attention, branch, state, context)
        changes = [member.change(branch, context) for member in self.members]
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


def _foldable(members: Sequence[ActsOnBranch]) -> TypeGuard[Sequence[Bottleneck]]:
    """Whether all are plain bottlenecks that read the same tensor, so that one map serves all."""
    plain = [
        m
        for m in members
        if type(m) is Bottleneck
        and type(m.down) is type(m.up) is nn.Linear
        and m.norm_before is None
        and m.norm_after is None
    ]
    kinds = {(m.reads, m.parallel, m.activation) for m in plain}
    return len(plain) == len(members) and len(kinds) == 1


@dataclass
class _Folded:
    """Q, K and V folded into the members' projections. R: the sum of their sizes; n: their number.

    `down` (R, D) and its bias (R,); `probe` (R + n, D), its bias (R + n,) and `up` (D, R + n) over
    the columns [a_1 .. a_n, 1 .. 1].
    """

    members: Sequence[Bottleneck]
    sizes: list[int]
    down: Tensor
    down_bias: Tensor
    probe: Tensor
    probe_bias: Tensor
    up: Tensor

    @classmethod
    def of(cls, attention: FusionAttention, members: Sequence[Bottleneck]) -> _Folded:
        """Returns the folded maps of bottlenecks that are foldable."""
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
        context: Context,
    ) -> Tensor:
        """Returns V sum_i w_i u_i, (B, N, D)."""
        total = sum(self.sizes)
        inner, probe = self._projected(branch, state, context)
        inner = ACTIVATIONS[self.members[0].activation](inner)
        products = (inner * probe[..., :total]).split(self.sizes, dim=-1)
        scores = torch.stack([product.sum(-1) for product in products], dim=-1)
        weights = attention.weights(scores + probe[..., total:])
        if len(set(self.sizes)) == 1:
            shape = (len(self.sizes), -1)
            weighted = (inner.unflatten(-1, shape) * weights[..., None]).flatten(-2)
        else:
            pieces = zip(inner.split(self.sizes, dim=-1), weights.split(1, dim=-1), strict=True)
            weighted = torch.cat([piece * weight for piece, weight in pieces], dim=-1)
        return F.linear(torch.cat([weighted, weights], dim=-1), self.up).to(state.dtype)

    def _projected(self, branch: Tensor, state: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Returns the input of the activation (B, N, R) and the factors of the scores
        (B, N, R + n)."""
        first, total = self.members[0], sum(self.sizes)
        if "residual" in first.reads and not first.parallel:
            # The members read the state itself: one map for both.
            weight = torch.cat([self.down, self.probe])
            both = F.linear(state, weight, torch.cat([self.down_bias, self.probe_bias]))
            return both[..., :total], both[..., total:]
        h = first.read(branch, context)
        inner = F.linear(h, self.down, self.down_bias)
        return inner, F.linear(state, self.probe, self.probe_bias)


def _column(scale: float | Tensor) -> float | Tensor:
    """Returns a scale, () or (D,), in the shape that multiplies the rows of the up-projection."""
    return scale[:, None] if isinstance(scale, Tensor) and scale.dim() == 1 else scale
