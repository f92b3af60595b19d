"""Subclasses that stand in for modules which read a weight themselves or compute attention inside.

`nn.MultiheadAttention` never calls its `out_proj` and has no module for q, k and v; EVA, BEiT and
WavLM pass weights to functions. A hook there is silently inert. Instead the module's class is
replaced by a subclass of it, in which the weight is a property: reading it gives the frozen tensor,
or, while a delta is active, the changed one, computed anew and never written back. `state_dict`
keys, the parameter objects and `isinstance` stay as they are; removing the last need for the
subclass gives the module its class back.

`raw_attention` computes attention with the keys and values of prefix tuning.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..sites.acting import ActsAsPrefix, ActsOnLeaf
from ..sites.sitemap import Leaf, Sublayer
from .raw_attention import explicit_attention, prefixed_forward
from .state import State

KEY = "_mmadapters"


@dataclass(eq=False)
class Adapted:
    """The data that a module with a replaced class keeps in its `__dict__` under `KEY`.

    Attributes:
        state: says which deltas and prefixes are active.
        base: the module's original class.
        reads: by attribute, the leaves that the property of that name serves, by their rows.
        owned: the leaves whose weights the module's forward pass reads.
        attention: the site at which prefixes enter the module's attention; None for none.
        users: the sites that need the subclass.
    """

    state: State
    base: type[Any]
    reads: dict[str, list[Leaf]] = field(default_factory=dict)
    owned: list[Leaf] = field(default_factory=list)
    attention: str | None = None
    users: dict[str, None] = field(default_factory=dict)


@dataclass(eq=False)
class Replaced:
    """The modules whose class was replaced for one site, as a handle that takes this back."""

    modules: list[nn.Module]
    site: str

    def remove(self) -> None:
        """Removes the site's needs; a module with none left gets its original class back."""
        for module in self.modules:
            adapted: Adapted | None = module.__dict__.get(KEY)
            if adapted is None:
                continue
            adapted.users.pop(self.site, None)
            adapted.owned = [leaf for leaf in adapted.owned if leaf.name != self.site]
            if adapted.attention == self.site:
                adapted.attention = None
            for attribute, leaves in list(adapted.reads.items()):
                adapted.reads[attribute] = [leaf for leaf in leaves if leaf.name != self.site]
                if not adapted.reads[attribute]:
                    del adapted.reads[attribute]
            if not (adapted.users and (adapted.reads or adapted.owned or adapted.attention)):
                module.__class__ = adapted.base
                del module.__dict__[KEY]
            else:
                module.__class__ = _subclass(adapted.base, *_needs(adapted))  # type: ignore[arg-type]


def adapt_leaf(state: State, leaf: Leaf) -> Replaced:
    """Makes the weight and the bias of a raw leaf properties, which `state` may change."""
    assert leaf.weight_at is not None
    assert leaf.owner is not None
    touched: list[nn.Module] = []
    for place in (leaf.weight_at, leaf.bias_at):
        if place is None:
            continue
        adapted = _adapted(state, place.module)
        leaves = adapted.reads.setdefault(place.attribute, [])
        if leaf not in leaves:
            leaves.append(leaf)
            leaves.sort(key=lambda other: other.index)
        touched.append(place.module)
    _adapted(state, leaf.owner).owned.append(leaf)
    touched.append(leaf.owner)
    return _replaced(touched, leaf.name)


def adapt_attention(state: State, sublayer: Sublayer) -> Replaced:
    """Lets prefixes into a sublayer's attention.

    Raises:
        ValueError: it is not known which module computes the attention.
    """
    if sublayer.attention is None:
        raise ValueError(f"{sublayer.name} does not say which module computes attention")
    _adapted(state, sublayer.attention).attention = sublayer.name
    return _replaced([sublayer.attention], sublayer.name)


def is_replaced(module: nn.Module) -> bool:
    """Says whether the module's class is replaced by a subclass of this file."""
    return KEY in module.__dict__


def _adapted(state: State, module: nn.Module) -> Adapted:
    if KEY not in module.__dict__:
        module.__dict__[KEY] = Adapted(state, type(module))
    return module.__dict__[KEY]


def _needs(adapted: Adapted) -> tuple[tuple[str, ...], bool]:
    """Returns the attributes that must be properties, and whether `forward` is replaced."""
    return tuple(sorted(adapted.reads)), bool(adapted.owned) or adapted.attention is not None


def _replaced(modules: list[nn.Module], site: str) -> Replaced:
    unique = list({id(module): module for module in modules}.values())
    for module in unique:
        adapted: Adapted = module.__dict__[KEY]
        adapted.users[site] = None
        module.__class__ = _subclass(adapted.base, *_needs(adapted))  # type: ignore[arg-type]
    return Replaced(unique, site)


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
        adapted: Adapted = self.__dict__[KEY]
        delta = adapted.state.plan().delta
        leaves = adapted.reads[attribute]
        if frozen is None or not any(leaf.name in delta for leaf in leaves):
            return frozen
        place = leaves[0].weight_at
        is_weight = place is not None and place.module is self and place.attribute == attribute
        return _assembled(adapted.state, frozen, leaves, 0 if is_weight else 1)

    return property(read)


def _assembled(state: State, frozen: Tensor, leaves: list[Leaf], which: int) -> Tensor:
    """Returns the whole tensor with the changed rows of each leaf.

    Args:
        frozen: (rows, ...), the parameter that holds the rows of all leaves.
        which: 0 for the leaves' weights, 1 for their biases.
    """
    pieces: list[Tensor] = []
    at = 0
    for leaf in leaves:
        place = leaf.weight_at if which == 0 else leaf.bias_at
        assert place is not None
        changed = _effective(state, leaf)[which]
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


def _effective(state: State, leaf: Leaf) -> tuple[Tensor, Tensor | None]:
    """Returns a leaf's weight and bias as the active deltas change them, computed once in each
    forward pass of the leaf's owner."""
    memo = None
    if not torch.compiler.is_compiling():
        memo = state.local.memo.get(id(leaf.owner))
        if memo is not None and leaf.name in memo:
            return memo[leaf.name]
    active = state.plan().delta.get(leaf.name, ())
    assert leaf.weight is not None
    changed = changed_weight(leaf, leaf.weight, active)
    if memo is not None:
        memo[leaf.name] = changed
    return changed


def changed_weight(
    leaf: Leaf, weight: Tensor, active: Iterable[ActsOnLeaf]
) -> tuple[Tensor, Tensor | None]:
    """Applies deltas to a leaf's weight and to its bias, and returns both.

    Deltas act in their order, but those that scale the leaf's input come last: in the forward pass
    they act before all others.
    """
    bias = leaf.bias
    for adapter in sorted(active, key=lambda adapter: adapter.scales_input):
        weight, bias = adapter.effective(weight, bias, leaf)
    return weight, bias


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    adapted: Adapted = self.__dict__[KEY]
    state = adapted.state
    plan = state.plan()
    owned = [leaf for leaf in adapted.owned if leaf.name in plan.delta]
    prefixes = plan.prefix.get(adapted.attention, ()) if adapted.attention else ()
    if not owned and not prefixes:
        return adapted.base.forward(self, *args, **kwargs)
    weights = all(adapter.as_weight for leaf in owned for adapter in plan.delta[leaf.name])
    if isinstance(self, nn.MultiheadAttention) and (prefixes or not weights):
        return explicit_attention(self, owned, plan.delta, prefixes, *args, **kwargs)
    if not weights:
        raise RuntimeError(
            f"{owned[0].name}: this library reads the weight itself, so dropout or a gate on its "
            "input cannot act; use dropout=0 there"
        )
    if torch.compiler.is_compiling():
        return _base_forward(self, adapted, prefixes, args, kwargs)
    state.local.memo[id(self)] = {}
    try:
        return _base_forward(self, adapted, prefixes, args, kwargs)
    finally:
        state.local.memo.pop(id(self), None)


def _base_forward(
    self: nn.Module, adapted: Adapted, prefixes: Iterable[ActsAsPrefix], args: tuple, kwargs: dict
) -> Any:
    if not prefixes:
        return adapted.base.forward(self, *args, **kwargs)
    return prefixed_forward(self, adapted.base, adapted.attention, prefixes, args, kwargs)
