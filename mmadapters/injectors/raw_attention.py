"""Attention with the keys and values of prefix tuning, and with changes of q, k, v and o.

The keys and values enter the call of `scaled_dot_product_attention` inside a library's own forward
pass. `nn.MultiheadAttention` is computed explicitly instead.

Shape legend: B batch, N queries, M keys, P keys of a prefix, D width, H heads, d = D / H.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..sites.acting import ActsAsPrefix, ActsOnLeaf
from ..sites.sitemap import Leaf


def prefixed_forward(
    module: nn.Module,
    base: type[Any],
    site: str | None,
    prefixes: Iterable[ActsAsPrefix],
    args: tuple,
    kwargs: dict,
) -> Any:
    """Calls `base.forward` of an attention module with `prefixes` before its keys and values.

    Raises:
        RuntimeError: the module does not call `scaled_dot_product_attention`.
    """
    attention = _PrefixedAttention(_prefix(prefixes, args[0] if args else kwargs["hidden_states"]))
    with attention:
        output = base.forward(module, *args, **kwargs)
    if not attention.used:
        raise RuntimeError(
            f"the prefix at {site} did not act: {type(module).__name__} no longer calls "
            "scaled_dot_product_attention; set attn_implementation='sdpa' and do not ask for "
            "attention weights"
        )
    return output


@dataclass
class _Prefix:
    """Keys and values of all active prefixes.

    Attributes:
        keys: (B, P, D).
        values: (B, P, D).
        scores: (B, 1, N, P), added to the attention scores of these keys; None for nothing.
    """

    keys: Tensor
    values: Tensor
    scores: Tensor | None


def _prefix(prefixes: Iterable[ActsAsPrefix], x: Tensor) -> _Prefix:
    """Returns all active prefixes as one; x: (B, N, D), the input of the attention."""
    parts = [adapter(x) for adapter in prefixes]
    keys = torch.cat([key.expand(x.shape[0], -1, -1) for key, _, _ in parts], dim=1)
    values = torch.cat([value.expand(x.shape[0], -1, -1) for _, value, _ in parts], dim=1)
    scores = None
    if any(gate is not None for _, _, gate in parts):
        columns = [gate_columns(gate, key.shape[-2], x) for key, _, gate in parts]
        scores = torch.cat(columns, dim=-1)[:, None]
    return _Prefix(keys, values, scores)


def gate_columns(gate: Tensor | None, count: int, x: Tensor) -> Tensor:
    """Returns (B, N, P), what a gate adds to the attention scores of `count` = P keys.

    Args:
        gate: None for nothing; (B, N) for the same at each key; (B, N, P) for each key its own.
        x: (B, N, D), the input of the attention.
    """
    if gate is not None and gate.dim() == 3:
        return gate
    same = x.new_zeros(x.shape[:2]) if gate is None else gate
    return same[..., None].expand(-1, -1, count)


class _PrefixedAttention(TorchFunctionMode):
    """Puts a prefix before the keys and values of `scaled_dot_product_attention`.

    `used` says whether that was called.
    """

    def __init__(self, prefix: _Prefix) -> None:
        super().__init__()
        self.prefix = prefix
        self.used = False

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.used = True
        return _attend(func, self.prefix, *args, **kwargs)


def _attend(
    attend: Any,
    prefix: _Prefix,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Any:
    """Calls `attend` with the prefix before keys and values; every query sees the whole prefix.

    Args:
        query: (B, H, N, d).
        key: (B, H, M, d), as `value`.
    """
    length = prefix.keys.shape[1]
    rows, columns = query.shape[-2], key.shape[-2]
    if is_causal:
        attn_mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()
    if prefix.scores is not None:
        shown = query.new_zeros(columns) if attn_mask is None else additive(attn_mask, query.dtype)
        shown = shown.expand(query.shape[0], -1 if shown.dim() == 4 else 1, rows, columns)
        scores = prefix.scores.to(query.dtype).expand(-1, shown.shape[1], -1, -1)
        attn_mask = torch.cat([scores, shown], dim=-1)
    elif attn_mask is not None:
        attn_mask = F.pad(attn_mask, (length, 0), value=attn_mask.dtype == torch.bool)
    key = torch.cat([_heads(prefix.keys, key), key], dim=2)
    value = torch.cat([_heads(prefix.values, value), value], dim=2)
    return attend(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, **kwargs)


def additive(shown: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a mask as scores to add: 0 where a boolean mask is True (shown), -inf elsewhere."""
    if shown.dtype != torch.bool:
        return shown.to(dtype)
    return torch.zeros_like(shown, dtype=dtype).masked_fill_(~shown, -math.inf)


def _heads(prefix: Tensor, like: Tensor) -> Tensor:
    """Returns `prefix` (B, P, D) as (B, H, P, d) in the dtype of `like` (B, H, M, d)."""
    batch, heads, _, size = like.shape
    return prefix.to(like.dtype).view(batch, -1, heads, size).transpose(1, 2)


def explicit_attention(
    module: nn.MultiheadAttention,
    leaves: Iterable[Leaf],
    delta: Mapping[str, tuple[ActsOnLeaf, ...]],
    prefixes: Iterable[ActsAsPrefix],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Computes `nn.MultiheadAttention` with q, k, v and o as linear maps on which deltas act.

    Args:
        leaves: those of the maps that are changed.
        delta: by a leaf's name, the modules that change it.
        prefixes: give keys and values that stand before those of the input.

    The other arguments and the result are those of `nn.MultiheadAttention.forward`.
    """
    if not module.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    changed = {leaf.role: leaf for leaf in leaves}
    q, k, v = (
        _project(module, changed.get(role), delta, index, x)
        for index, (role, x) in enumerate(zip("qkv", (query, key, value), strict=True))
    )
    heads = module.num_heads
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    mask = _merged_mask(query, key, attn_mask, key_padding_mask, is_causal)
    dropout = module.dropout if module.training else 0.0
    attend: Any = _softmax_attention if need_weights else F.scaled_dot_product_attention
    if prefixes:
        attend = functools.partial(_attend, attend, _prefix(prefixes, query))
    out = attend(q, k, v, attn_mask=mask, dropout_p=dropout)
    weights = None
    if need_weights:
        out, weights = out
        weights = weights.mean(dim=1) if average_attn_weights else weights
    joined = out.transpose(1, 2).flatten(2)
    frozen: Any = module.out_proj._parameters
    output = F.linear(joined, frozen["weight"], frozen["bias"])
    if "o" in changed:
        for adapter in delta.get(changed["o"].name, ()):
            output = adapter(output, joined, changed["o"])
    return output if module.batch_first else output.transpose(0, 1), weights


def _project(
    module: nn.MultiheadAttention,
    leaf: Leaf | None,
    delta: Mapping[str, tuple[ActsOnLeaf, ...]],
    index: int,
    x: Tensor,
) -> Tensor:
    """Maps x (B, N, D) to q, k or v, which are parts 0, 1 and 2 of the fused weight."""
    weight = module._parameters["in_proj_weight"]
    bias = module._parameters["in_proj_bias"]
    assert weight is not None
    rows = slice(index * module.embed_dim, (index + 1) * module.embed_dim)
    y = F.linear(x, weight[rows], None if bias is None else bias[rows])
    if leaf is not None:
        for adapter in delta.get(leaf.name, ()):
            y = adapter(y, x, leaf)
    return y


def _merged_mask(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
) -> Tensor | None:
    """Returns one additive mask (N, M) or (B, H or 1, N, M), or None.

    In the boolean masks of `nn.MultiheadAttention` True means hidden.
    """

    def hidden(mask: Tensor) -> Tensor:
        return additive(~mask if mask.dtype == torch.bool else mask, query.dtype)

    merged = None
    if attn_mask is not None:
        merged = hidden(attn_mask)
        if merged.dim() == 3:
            merged = merged.unflatten(0, (query.shape[0], -1))
    elif is_causal:
        square = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device)
        merged = hidden(square.triu(1))
    if padding is not None:
        rows = hidden(padding)[:, None, None, :]
        merged = rows if merged is None else merged + rows
    return merged


def _softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Returns the output of attention (B, H, N, d) and its weights (B, H, N, M)."""
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        scores = scores + attn_mask
    weights = F.dropout(scores.softmax(dim=-1), dropout_p)
    return weights @ value, weights
