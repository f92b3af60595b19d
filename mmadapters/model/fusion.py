"""Making, recording, saving and loading the AdapterFusions of a model."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..adapters import storage
from ..adapters.adapter import Adapter, Fusion, kind_of
from ..adapters.identity import check_backbone
from ..adapters.shapes import NoShapes, shapes_alone
from ..composition import Composition, Fuse, from_data
from ..methods import FusionConfig
from ..methods.fusion import FusionAttention
from ..methods.fusion import recorded as recorded_weights
from .store import AdapterStore


def build(store: AdapterStore, members: Fuse, config: FusionConfig) -> Fusion:
    """Makes fresh attention modules for every sublayer where a member acts, without adding them.

    Raises:
        ValueError: a member is not here or is not a bottleneck adapter.
    """
    sites: dict[str, None] = {}
    outside = {point.name for point in (*store.sites.points(), *store.sites.blocks())}
    for name in members.names():
        adapter = store.adapter(name)
        for site, module in adapter.entries():
            if kind_of(module) != "branch" or site in outside:
                raise ValueError(
                    f"adapter {name!r}, a {adapter.config.method}, cannot be fused: AdapterFusion "
                    "attends over what bottleneck adapters add to a sublayer; use Average or Stack"
                )
            sites[site] = None
    config = dataclasses.replace(config, sites=tuple(sites))
    built = config.build(store.sites)
    return Fusion(members, config, {f"{site}#fusion": built[site] for site in sites})


def penalty(store: AdapterStore) -> Tensor:
    """Returns the sum of the penalties of all trainable attention modules, a scalar."""
    parts = [
        module.penalty()
        for module in store.fusions.modules()
        if isinstance(module, FusionAttention) and module.value.weight.requires_grad
    ]
    return torch.stack(parts).sum() if parts else torch.zeros(())


@contextlib.contextmanager
def recorded(store: AdapterStore) -> Iterator[Mapping[str, Mapping[str, Tensor]]]:
    """Yields a mapping by fusion and site of the mean weights (members,) of the calls so far."""
    with recorded_weights() as table:
        yield _Record(store, table)


class _Record(Mapping[str, Mapping[str, Tensor]]):
    """The mean weights by fusion and site, computed when they are asked for.

    So every call of the model adds to them. A member that does not act at a site has NaN there.
    """

    def __init__(self, store: AdapterStore, table: dict[FusionAttention, list[Tensor]]) -> None:
        self._store, self._table = store, table

    def __getitem__(self, name: str) -> Mapping[str, Tensor]:
        fusion = self._store.fusion(name)
        means = {}
        for site, module in fusion.entries():
            assert isinstance(module, FusionAttention)
            if module in self._table:
                present = torch.tensor(
                    [_acts(self._store, member, site) for member in fusion.members.members]
                )
                mean = torch.stack(self._table[module]).mean(0).cpu()
                means[site] = torch.full(present.shape, torch.nan).masked_scatter(present, mean)
        return means

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._store.fusion_names if self[name])

    def __len__(self) -> int:
        return len(list(iter(self)))


def _acts(store: AdapterStore, member: str | Composition, site: str) -> bool:
    names = (member,) if isinstance(member, str) else tuple(member.names())
    return any(site == where for name in names for where, _ in store.adapter(name).entries())


def fingerprint(adapter: Adapter) -> str:
    """Returns the SHA-256 of an adapter's values in float32 under their canonical names."""
    digest = hashlib.sha256()
    for key, tensor in sorted(adapter.tensors().items()):
        digest.update(key.encode())
        values = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
        digest.update(values.numpy().data)
    return digest.hexdigest()


def described(fusion: Fusion) -> dict[str, Any]:
    """Returns the members and options of a fusion as plain data, which `config_of` reads."""
    assert isinstance(fusion.config, FusionConfig)
    return {
        "composition": fusion.members.to_data(),
        "dropout": fusion.config.dropout,
        "regularization": fusion.config.regularization,
    }


def config_of(description: Any, directory: str | os.PathLike) -> FusionConfig:
    """Returns the config of a fusion from the data of `described`.

    Raises:
        ValueError: the data are others.
    """
    options = ("dropout", "regularization")
    if not isinstance(description, dict) or not description.keys() >= {*options}:
        raise ValueError(f"{directory} lacks the options of a fusion: it was changed by hand")
    return FusionConfig(**{key: description[key] for key in options})


def members_of(description: Any, directory: str | os.PathLike) -> Fuse:
    """Returns the members of a fusion from the data of `described`.

    Raises:
        ValueError: the data name none.
    """
    data = description.get("composition") if isinstance(description, dict) else None
    try:
        members = from_data(data)
    except RecursionError:
        raise ValueError(f"{directory} holds a fusion that is nested too deeply") from None
    if not isinstance(members, Fuse):
        raise ValueError(f"{directory} names no members to fuse: it was changed by hand")
    return members


def save(store: AdapterStore, directory: str | os.PathLike, name: str) -> None:
    """See `AdapterModel.save_adapter_fusion`."""
    fusion = store.fusion(name)
    config = {
        "method": FusionConfig.method,
        "members": {
            member: fingerprint(store.adapter(member)) for member in fusion.members.names()
        },
        **described(fusion),
    }
    stored = storage.Stored(
        name=name, config=config, backbone=store.identity(), tensors=fusion.tensors()
    )
    storage.write(directory, stored)


def load(store: AdapterStore, directory: str | os.PathLike) -> str:
    """See `AdapterModel.load_adapter_fusion`."""
    stored = storage.read(directory)
    config = stored.config
    if not isinstance(config, dict) or config.get("method") != FusionConfig.method:
        raise ValueError(f"{directory} holds an adapter, not an AdapterFusion: use load_adapter")
    check_backbone(stored.backbone, store.identity(), allow_different_weights=False)
    members = members_of(config, directory)
    if not isinstance(config.get("members"), dict):
        raise ValueError(f"{directory} names no members to fuse: it was changed by hand")
    for name, value in config["members"].items():
        if name not in store.adapter_names:
            raise ValueError(
                f"{directory} fuses adapter {name!r}, which is not here: load it first, under "
                "that name"
            )
        if fingerprint(store.adapter(name)) != value:
            raise ValueError(
                f"{directory} fuses an adapter {name!r} with other values than the one that is "
                "here: load the one that the fusion was trained with"
            )
    if members.name in store.fusion_names:
        raise ValueError(f"there is an AdapterFusion of {members.name!r} already")
    options = config_of(config, directory)
    with contextlib.suppress(NoShapes), shapes_alone():
        build(store, members, options).check_fit(stored.tensors, directory)
    fusion = build(store, members, options)
    fusion.load(stored.tensors, directory)
    store.insert_fusion(fusion)
    return members.name
