"""What rows need to be written down: what a module holds, and specs put under a path."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from torch import nn

from .spec import EmbeddingSpec, PatchSpec, Row, TowerSpec


def at(root: nn.Module, path: str) -> nn.Module | None:
    """The submodule at `path`, None if there is none."""
    module: nn.Module | None = root
    for step in path.split(".") if path else ():
        if module is None:
            return None
        module = module._modules.get(step)
    return module


def first_at(root: nn.Module, *paths: str) -> str | None:
    """The first of `paths` that holds a module which does something (`nn.Identity` does not)."""
    for path in paths:
        module = at(root, path)
        if module is not None and not isinstance(module, nn.Identity):
            return path
    return None


def patches_at(root: nn.Module, prefix: int, *paths: str) -> PatchSpec | None:
    """The first of `paths` that holds a module, as where an image becomes tokens behind `prefix`
    others; None if none does."""
    path = first_at(root, *paths)
    return None if path is None else PatchSpec(path=path, prefix=prefix)


def under(prefix: str, tower: TowerSpec, name: str | None = None) -> TowerSpec:
    """`tower` of a module that stands at `prefix` of a larger one, named `name`."""
    patches = tower.patches
    if patches is not None:
        patches = dataclasses.replace(patches, path=f"{prefix}.{patches.path}")
    embedding = tower.embedding
    if isinstance(embedding, EmbeddingSpec):
        embedding = dataclasses.replace(embedding, path=f"{prefix}.{embedding.path}")
    return dataclasses.replace(
        tower,
        name=name or tower.name,
        blocks=f"{prefix}.{tower.blocks}",
        norm=None if tower.norm is None else f"{prefix}.{tower.norm}",
        patches=patches,
        embedding=embedding,
        stem=tuple(f"{prefix}.{path}" for path in tower.stem),
    )


def nested(root: nn.Module, path: str, rows: Iterable[Row], name: str) -> Iterator[TowerSpec]:
    """The towers that `rows` know for the module at `path` of `root`, as its tower `name`."""
    module = at(root, path)
    if module is None:
        return
    rows = tuple(rows)
    for cls in type(module).__mro__:
        for row in rows:
            if row.matches(f"{cls.__module__}.{cls.__name__}"):
                for architecture in row.architectures(module):
                    if len(architecture.towers) == 1:
                        yield under(path, architecture.towers[0], name)
                return
