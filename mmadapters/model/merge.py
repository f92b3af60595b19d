"""Merging an adapter into the encoder's weights, and undoing it."""

from __future__ import annotations

import functools

from ..adapters.merging import (
    Changes,
    MergedAdapter,
    merged_tensors,
    while_merged,
    widened_leaves,
)
from ..composition import Stack
from ..injectors.selfcheck import agrees
from .store import AdapterStore
from .widths import follow_widths


def merge(store: AdapterStore, name: str) -> None:
    """See `AdapterModel.merge_adapter`."""
    adapter = store.adapter(name)
    store.refuse_merged(name, "merged again")
    if store.runtime.local.plan is not None:
        raise ValueError(
            f"adapter {name!r} cannot be merged inside a using block, where it may act too; "
            "leave the block first"
        )
    if adapter.config.mergeable is not True:
        raise ValueError(f"adapter {name!r} cannot be merged: {adapter.config.mergeable}")
    # Computed now, from the weights without the adapter.
    store.identity()
    changes = merged_tensors(name, adapter, store.sites)
    _check_widening(store, name, changes)
    if store.composition is not None and name in store.composition.names():
        _check_separable(store, name)
        rest = [other for other in store.composition.names() if other != name]
        store.activate(Stack(*rest) if rest else None)
    merged = MergedAdapter.into_weights(name, changes, store.sites)
    store.merged.append(merged)
    store.forget(name)
    if merged.widened:  # compiled code need not look at the shapes of parameters
        store.runtime.recompile()
        follow_widths(store.backbone, store.sites)


def reset(store: AdapterStore, name: str) -> None:
    """See `AdapterModel.reset_adapter`."""
    store.adapter(name)
    names = [merge.name for merge in store.merged]
    if name not in names:
        raise ValueError(f"adapter {name!r} is not merged")
    if names[-1] != name:
        raise ValueError(f"adapter {names[-1]!r} was merged after {name!r}: reset it first")
    merged = store.merged.pop()
    merged.undo()
    if merged.widened:
        store.runtime.recompile()
        follow_widths(store.backbone, store.sites)


def _check_widening(store: AdapterStore, name: str, changes: Changes) -> None:
    """Checks an adapter that would give feed-forward parts more channels.

    Raises:
        ValueError: another adapter acts on the maps that would get them, or the outputs with the
            adapter merged would not be those with it active.
    """
    wide = {leaf.name for leaf in widened_leaves(changes, store.sites)}
    if not wide:
        return
    adapter = store.adapter(name)
    for other in store.adapter_names:
        for site in store.adapter(other).plan().delta.keys() & wide:
            raise ValueError(
                f"adapter {name!r} cannot be merged: {site} would get more channels, and "
                f"adapter {other!r} was made for those that it has; delete that first"
            )
    example = store.example_input()
    plan, folded = adapter.plan(), functools.partial(while_merged, name, adapter, store.sites)
    parts = [part.output for part in store.sites.sublayers() if part.name in plan.branch]
    if not agrees(store.model, store.runtime, plan, example, parts, folded):
        raise ValueError(
            f"adapter {name!r} cannot be merged: the feed-forward parts beside which it "
            "stands are not just two maps with its activation between them"
        )


def _check_separable(store: AdapterStore, name: str) -> None:
    """Checks that an active adapter can leave the composition and still act before the others.

    A merged adapter acts on everything, so that only a plain Stack may lose a member to the
    weights.

    Raises:
        ValueError: another composition acts, or another adapter acts before this one on the same
            feed-forward part.
    """
    active = store.composition
    assert active is not None
    if (
        store.drop
        or not isinstance(active, Stack)
        or any(not isinstance(member, str) for member in active.members)
    ):
        raise ValueError(
            f"adapter {name!r} cannot be merged while {active!r} acts: call "
            "set_active_adapters(None) first"
        )
    names = list(active.names())
    sites = store.adapter(name).plan().branch.keys()
    for other in names[: names.index(name)]:
        if store.adapter(other).plan().branch.keys() & sites:
            raise ValueError(
                f"adapter {name!r} cannot be merged while {other!r} acts before it on the "
                "same feed-forward parts, and would then act behind: call "
                "set_active_adapters(None) first"
            )
