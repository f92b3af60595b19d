"""Modules that read a weight themselves, or compute attention inside: a subclass stands in.

`nn.MultiheadAttention` never calls its `out_proj` and has no module for q, k and v; EVA, BEiT and
WavLM pass weights to functions. A hook there is silently inert. Instead the module's class is
replaced by a subclass of it, in which the weight is a property: reading it gives the frozen tensor,
or, while a delta is active, the changed one, computed anew and never written back. `state_dict`
keys, the parameter objects and `isinstance` stay as they are; `restore` gives the class back.

Keys and values for prefix tuning are put in where attention is computed, in the call of
`scaled_dot_product_attention`, or, for `nn.MultiheadAttention`, by computing it explicitly.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..sites.acting import ActsAsPrefix, ActsOnLeaf
from ..sites.sitemap import Leaf, Sublayer

if TYPE_CHECKING:
    from .installer import Runtime

KEY = "_mmadapters"


@dataclass(eq=False)
class Adapted:
    """What a module with a replaced class remembers.

    `reads`: which leaves each property serves; `owned`: the leaves whose weights this module's
    forward reads; `attention`: the site of a prefix; `users`: the sites that need the subclass.
    """

    runtime: Runtime
    base: type[Any]
    reads: dict[str, list[Leaf]] = field(default_factory=dict)
    owned: list[Leaf] = field(default_factory=list)
    attention: str | None = None
    users: dict[str, None] = field(default_factory=dict)


def adapt_leaf(runtime: Runtime, leaf: Leaf) -> list[nn.Module]:
    """Makes a raw leaf's weight and bias properties; returns the modules it touched."""
    assert leaf.weight_at is not None
    assert leaf.owner is not None
    touched: list[nn.Module] = []
    for place in (leaf.weight_at, leaf.bias_at):
        if place is None:
            continue
        state = _state(runtime, place.module)
        leaves = state.reads.setdefault(place.attribute, [])
        if leaf not in leaves:
            leaves.append(leaf)
            leaves.sort(key=lambda other: other.index)
        touched.append(place.module)
    _state(runtime, leaf.owner).owned.append(leaf)
    touched.append(leaf.owner)
    return _finish(touched, leaf.name)


def adapt_attention(runtime: Runtime, sublayer: Sublayer) -> list[nn.Module]:
    """Lets prefixes into a sublayer's attention; returns the module it touched."""
    if sublayer.attention is None:
        raise ValueError(f"{sublayer.name} does not say which module computes attention")
    _state(runtime, sublayer.attention).attention = sublayer.name
    return _finish([sublayer.attention], sublayer.name)


def restore(modules: Iterable[Any], site: str) -> None:
    """Takes one site's needs off the modules; one with none left gets its own class back."""
    for module in modules:
        state: Adapted | None = module.__dict__.get(KEY)
        if state is None:
            continue
        state.users.pop(site, None)
        state.owned = [leaf for leaf in state.owned if leaf.name != site]
        if state.attention == site:
            state.attention = None
        for attribute, leaves in list(state.reads.items()):
            state.reads[attribute] = [leaf for leaf in leaves if leaf.name != site]
            if not state.reads[attribute]:
                del state.reads[attribute]
        if not (state.users and (state.reads or state.owned or state.attention)):
            module.__class__ = state.base
            del module.__dict__[KEY]
        else:
            module.__class__ = _subclass(state.base, *_needs(state))  # type: ignore[arg-type]


def _state(runtime: Runtime, module: nn.Module) -> Adapted:
    if KEY not in module.__dict__:
        module.__dict__[KEY] = Adapted(runtime, type(module))
    return module.__dict__[KEY]


def _needs(state: Adapted) -> tuple[tuple[str, ...], bool]:
    return tuple(sorted(state.reads)), bool(state.owned) or state.attention is not None


def _finish(modules: list[nn.Module], site: str) -> list[nn.Module]:
    unique = list({id(module): module for module in modules}.values())
    for module in unique:
        state: Adapted = module.__dict__[KEY]
        state.users[site] = None
        module.__class__ = _subclass(state.base, *_needs(state))  # type: ignore[arg-type]
    return unique


@functools.cache
def _subclass(base: type, reads: tuple[str, ...], forward: bool) -> type:
    namespace: dict[str, Any] = {name: _property(name) for name in reads}
    if forward:
        namespace["forward"] = _forward

    def reduce(self: nn.Module, protocol: Any) -> tuple:
        return _rebuild, (base, reads, forward), self.__getstate__()

    namespace["__reduce_ex__"] = reduce
    namespace["__module__"] = base.__module__
    namespace["__qualname__"] = base.__qualname__
    namespace["__doc__"] = base.__doc__
    return type(base)(base.__name__, (base,), namespace)


def _rebuild(base: type, reads: tuple[str, ...], forward: bool) -> nn.Module:
    cls: Any = _subclass(base, reads, forward)
    return cls.__new__(cls)


def _property(attribute: str) -> property:
    def read(self: nn.Module) -> Tensor | None:
        frozen = self._parameters[attribute]
        state: Adapted = self.__dict__[KEY]
        delta = state.runtime.plan().delta
        leaves = state.reads[attribute]
        if frozen is None or not any(leaf.name in delta for leaf in leaves):
            return frozen
        place = leaves[0].weight_at
        is_weight = place is not None and place.module is self and place.attribute == attribute
        return _assembled(state.runtime, frozen, leaves, 0 if is_weight else 1)

    return property(read)


def _assembled(runtime: Runtime, frozen: Tensor, leaves: list[Leaf], which: int) -> Tensor:
    """The whole tensor with the changed rows of each leaf; `which`: 0 its weight, 1 its bias."""
    pieces: list[Tensor] = []
    at = 0
    for leaf in leaves:
        place = leaf.weight_at if which == 0 else leaf.bias_at
        assert place is not None
        changed = effective(runtime, leaf)[which]
        assert changed is not None
        if place.start is None or place.stop is None:
            return changed
        if place.start > at:
            pieces.append(frozen[at : place.start])
        pieces.append(changed)
        at = place.stop
    if at < len(frozen):
        pieces.append(frozen[at:])
    return torch.cat(pieces)


def effective(runtime: Runtime, leaf: Leaf) -> tuple[Tensor, Tensor | None]:
    """A leaf's weight and bias as the active deltas change them; computed once per forward."""
    memo = None
    if not torch.compiler.is_compiling():
        memo = runtime.local.memo.get(id(leaf.owner))
        if memo is not None and leaf.name in memo:
            return memo[leaf.name]
    active = runtime.plan().delta.get(leaf.name, ())
    assert leaf.weight is not None
    changed = changed_weight(leaf, leaf.weight, active)
    if memo is not None:
        memo[leaf.name] = changed
    return changed


def changed_weight(
    leaf: Leaf, weight: Tensor, active: Iterable[ActsOnLeaf]
) -> tuple[Tensor, Tensor | None]:
    """Applies deltas in order; those that scale the input last, as they act before all others."""
    bias = leaf.bias
    for adapter in sorted(active, key=lambda adapter: adapter.scales_input):
        weight, bias = adapter.effective(weight, bias, leaf)
    return weight, bias


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    state: Adapted = self.__dict__[KEY]
    runtime = state.runtime
    plan = runtime.plan()
    owned = [leaf for leaf in state.owned if leaf.name in plan.delta]
    prefixes = plan.prefix.get(state.attention, ()) if state.attention else ()
    if not owned and not prefixes:
        return state.base.forward(self, *args, **kwargs)
    weights = all(adapter.as_weight for leaf in owned for adapter in plan.delta[leaf.name])
    if isinstance(self, nn.MultiheadAttention) and (prefixes or not weights):
        return _explicit_attention(self, state, prefixes, *args, **kwargs)
    if not weights:
        raise RuntimeError(
            f"{owned[0].name}: this library reads the weight itself, so dropout or a gate on its "
            "input cannot act; use dropout=0 there"
        )
    if torch.compiler.is_compiling():
        return _prefixed(self, state, prefixes, args, kwargs)
    runtime.local.memo[id(self)] = {}
    try:
        return _prefixed(self, state, prefixes, args, kwargs)
    finally:
        runtime.local.memo.pop(id(self), None)


def _prefixed(
    self: nn.Module, state: Adapted, prefixes: Iterable[ActsAsPrefix], args: tuple, kwargs: dict
) -> Any:
    if not prefixes:
        return state.base.forward(self, *args, **kwargs)
    attention = _PrefixedAttention(_prefix(prefixes, args[0] if args else kwargs["hidden_states"]))
    with attention:
        output = state.base.forward(self, *args, **kwargs)
    if not attention.used:
        raise RuntimeError(
            f"the prefix at {state.attention} did not act: {type(self).__name__} no longer calls "
            "scaled_dot_product_attention; set attn_implementation='sdpa' and do not ask for "
            "attention weights"
        )
    return output


@dataclass
class _Prefix:
    """Keys and values (B, P, D), and what is added to the scores (B, 1, N, P), None for nothing."""

    keys: Tensor
    values: Tensor
    scores: Tensor | None


def _prefix(prefixes: Iterable[ActsAsPrefix], x: Tensor) -> _Prefix:
    """All active prefixes as one; x: (B, N, D), what the attention reads."""
    parts = [adapter(x) for adapter in prefixes]
    keys = torch.cat([key.expand(x.shape[0], -1, -1) for key, _, _ in parts], dim=1)
    values = torch.cat([value.expand(x.shape[0], -1, -1) for _, value, _ in parts], dim=1)
    scores = None
    if any(gate is not None for _, _, gate in parts):
        columns = [gate_columns(gate, key.shape[-2], x) for key, _, gate in parts]
        scores = torch.cat(columns, dim=-1)[:, None]
    return _Prefix(keys, values, scores)


def gate_columns(gate: Tensor | None, count: int, x: Tensor) -> Tensor:
    """What a gate adds to the scores of `count` keys, (B, N, P): None nothing, (B, N) the same to
    all; one of three dimensions says it for each. x: (B, N, D)."""
    if gate is not None and gate.dim() == 3:
        return gate
    same = x.new_zeros(x.shape[:2]) if gate is None else gate
    return same[..., None].expand(-1, -1, count)


class _PrefixedAttention(TorchFunctionMode):
    """Puts a prefix before the keys and values of `scaled_dot_product_attention`."""

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
    """query (B, H, N, d), key and value (B, H, M, d); every query sees the whole prefix."""
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
    """A mask as scores to add: of a boolean one, where True is shown, 0 and -inf."""
    if shown.dtype != torch.bool:
        return shown.to(dtype)
    return torch.zeros_like(shown, dtype=dtype).masked_fill_(~shown, -math.inf)


def _heads(prefix: Tensor, like: Tensor) -> Tensor:
    """(B, P, D) -> (B, H, P, d) in the dtype of `like` (B, H, M, d)."""
    batch, heads, _, size = like.shape
    return prefix.to(like.dtype).view(batch, -1, heads, size).transpose(1, 2)


def _explicit_attention(
    module: nn.MultiheadAttention,
    state: Adapted,
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
    """`nn.MultiheadAttention` with q, k, v and o as linear maps that deltas act on."""
    if not module.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    leaves = {leaf.role: leaf for leaf in state.owned}
    q, k, v = (
        _project(module, state, leaves.get(role), index, x)
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
    if "o" in leaves:
        for adapter in state.runtime.plan().delta.get(leaves["o"].name, ()):
            output = adapter(output, joined, leaves["o"])
    return output if module.batch_first else output.transpose(0, 1), weights


def _project(
    module: nn.MultiheadAttention, state: Adapted, leaf: Leaf | None, index: int, x: Tensor
) -> Tensor:
    weight = module._parameters["in_proj_weight"]
    bias = module._parameters["in_proj_bias"]
    assert weight is not None
    rows = slice(index * module.embed_dim, (index + 1) * module.embed_dim)
    y = F.linear(x, weight[rows], None if bias is None else bias[rows])
    if leaf is not None:
        for adapter in state.runtime.plan().delta.get(leaf.name, ()):
            y = adapter(y, x, leaf)
    return y


def _merged_mask(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
) -> Tensor | None:
    """One additive mask (N, M) or (B, H or 1, N, M); True in a boolean mask of MHA means hidden."""

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
    """Attention that also gives its weights (B, H, N, M)."""
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        scores = scores + attn_mask
    weights = F.dropout(scores.softmax(dim=-1), dropout_p)
    return weights @ value, weights
