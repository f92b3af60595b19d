"""Saving a composition to one directory, with its adapters and fusions, and loading it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .. import methods
from ..adapters import storage
from ..adapters.identity import check_backbone
from ..composition import Composition, Setup, from_data, parse
from . import fusion as fusions
from .store import AdapterStore

METHOD = "composition"
_ADAPTERS, _FUSIONS = "adapters/", "fusions/"


def save(
    store: AdapterStore,
    directory: str | os.PathLike,
    *,
    setup: Setup,
    head: nn.Module | None,
    metadata: Mapping[str, Any] | None,
) -> None:
    """See `AdapterModel.save_composition`."""
    composition = parse(setup)
    if composition is None:
        raise ValueError("there is no composition to save, as nothing acts: name adapters")
    tensors: dict[str, Tensor] = {}
    adapters: dict[str, Any] = {}
    for name in composition.names():
        adapter = store.adapter(name)
        adapters[name] = methods.to_dict(adapter.config)
        tensors |= {f"{_ADAPTERS}{name}/{key}": t for key, t in adapter.tensors().items()}
    fused: dict[str, Any] = {}
    for name in sorted(composition.fusion_names()):
        fusion = store.fusion(name)
        fused[name] = fusions.described(fusion)
        tensors |= {f"{_FUSIONS}{name}/{key}": t for key, t in fusion.tensors().items()}
    stored = storage.Stored(
        name=METHOD,
        config={
            "method": METHOD,
            "composition": composition.to_data(),
            "adapters": adapters,
            "fusions": fused,
        },
        backbone=store.identity(),
        tensors=tensors,
        head={} if head is None else dict(head.state_dict()),
        metadata=dict(metadata or {}),
    )
    storage.write(directory, stored)


def load(
    store: AdapterStore, directory: str | os.PathLike, *, allow_different_weights: bool
) -> tuple[Composition, storage.Stored]:
    """See `AdapterModel.load_composition`."""
    stored = storage.read(directory)
    if not isinstance(stored.config, dict) or stored.config.get("method") != METHOD:
        raise ValueError(f"{directory} holds no composition: use load_adapter")
    check_backbone(
        stored.backbone, store.identity(), allow_different_weights=allow_different_weights
    )
    composition = _described(stored.config, directory)
    built = []
    for name, config in stored.config["adapters"].items():
        tensors = _below(stored.tensors, f"{_ADAPTERS}{name}/")
        adapter = store.filled(name, methods.from_dict(config), tensors=tensors, source=directory)
        built.append((name, adapter))
    with store.all_or_nothing():
        for name, adapter in built:
            store.insert(name, adapter)
        for name, description in stored.config["fusions"].items():
            members = fusions.members_of(description, directory)
            fusion = fusions.build(store, members, fusions.config_of(description, directory))
            fusion.load(_below(stored.tensors, f"{_FUSIONS}{name}/"), directory)
            store.insert_fusion(fusion)
    return composition, stored


def _described(config: Mapping[str, Any], directory: str | os.PathLike) -> Composition:
    """Returns the composition that a directory holds.

    Raises:
        ValueError: it is none, or its adapters or fusions are not those that the directory holds.
    """
    adapters, fused = config.get("adapters"), config.get("fusions")
    if not isinstance(adapters, dict) or not isinstance(fused, dict):
        raise ValueError(f"{directory} lists no adapters and fusions: it was changed by hand")
    try:
        composition = parse(from_data(config.get("composition")))
    except RecursionError:
        raise ValueError(f"{directory} holds a composition that is nested too deeply") from None
    if composition is None:
        raise ValueError(f"{directory} holds a composition of no adapters")
    for noun, there, named in (
        ("adapter", adapters.keys(), set(composition.names())),
        ("fusion", fused.keys(), composition.fusion_names()),
    ):
        for name in sorted(named ^ there):
            how = "which it does not hold" if name in named else "which its composition leaves out"
            raise ValueError(f"{directory} names the {noun} {name!r}, {how}")
    return composition


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
