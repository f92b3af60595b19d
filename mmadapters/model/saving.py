"""Saving one adapter to a directory and loading it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from .. import methods
from ..adapters import storage
from ..adapters.identity import check_backbone
from ..methods import FusionConfig
from . import bundles
from .store import AdapterStore


def save(
    store: AdapterStore,
    directory: str | os.PathLike,
    *,
    name: str,
    head: nn.Module | None,
    metadata: Mapping[str, Any] | None,
) -> None:
    """See `AdapterModel.save_adapter`."""
    adapter = store.adapter(name)
    identity = store.identity()
    used = {site for site, _ in adapter.entries()}
    if "image" in adapter.reads:
        used.add("vision")
    towers = {
        tower.name: identity["towers"][tower.name]
        for tower in store.sites.towers.values()
        if not used.isdisjoint(tower.site_names())
    }
    stored = storage.Stored(
        name=name,
        config=methods.to_dict(adapter.config),
        backbone={**identity, "towers": towers},
        tensors=adapter.tensors(),
        head={} if head is None else dict(head.state_dict()),
        metadata=dict(metadata or {}),
    )
    storage.write(directory, stored)


def load(
    store: AdapterStore,
    directory: str | os.PathLike,
    *,
    name: str | None,
    allow_different_weights: bool,
) -> storage.Stored:
    """See `AdapterModel.load_adapter`."""
    _check_language(store, directory)
    stored = storage.read(directory)
    method = stored.config.get("method") if isinstance(stored.config, dict) else None
    if method == FusionConfig.method:
        raise ValueError(
            f"{directory} holds an AdapterFusion: load it with load_adapter_fusion, after its "
            "members"
        )
    if method == bundles.METHOD:
        raise ValueError(f"{directory} holds a composition: load it with load_composition")
    check_backbone(
        stored.backbone, store.identity(), allow_different_weights=allow_different_weights
    )
    name = stored.name if name is None else name
    config = methods.from_dict(stored.config)
    store.insert(name, store.filled(name, config, tensors=stored.tensors, source=directory))
    return stored


def _check_language(store: AdapterStore, directory: str | os.PathLike) -> None:
    """Says what a language of MMS is taken for: transformers' method of this name loads languages.

    Raises:
        FileNotFoundError: the name is no directory, and the encoder has a method for languages.
    """
    name = os.fspath(directory)
    languages = getattr(getattr(store.backbone, "config", None), "adapter_attn_dim", None)
    if languages is None or os.path.exists(name) or not isinstance(name, str) or os.sep in name:
        return
    raise FileNotFoundError(
        f"{name!r} is taken for an adapter directory, and there is none; to load this language of "
        f"MMS call load_adapter({name!r}) of the encoder itself, before init or after detach()"
    )
