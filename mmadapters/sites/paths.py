"""Helpers of the tables: find what a module holds, and put specs under a path."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from torch import nn

from .spec import EmbeddingSpec, PatchSpec, TableRow, TowerSpec


def at(root: nn.Module, path: str) -> nn.Module | None:
    """Returns the submodule at `path`, or None if there is none."""
    module: nn.Module | None = root
    for step in path.split(".") if path else ():
        if module is None:
            return None
        module = module._modules.get(step)
    return module


def first_at(root: nn.Module, *paths: str) -> str | None:
    """Returns the first of `paths` at which there is a module other than `nn.Identity`, or None."""
    for path in paths:
        module = at(root, path)
        if module is not None and not isinstance(module, nn.Identity):
            return path
    return None


def patches_at(root: nn.Module, num_prefix_tokens: int, *paths: str) -> PatchSpec | None:
    """Returns a spec of the patches that the first module at one of `paths` makes, or None if there
    is no module.

    Args:
        num_prefix_tokens: the number of class and register tokens before the patches.
    """
    path = first_at(root, *paths)
    return None if path is None else PatchSpec(path=path, num_prefix_tokens=num_prefix_tokens)


def under(prefix: str, tower: TowerSpec, name: str | None = None) -> TowerSpec:
    """Returns `tower`, which describes the module at `prefix` of a larger one, for the larger one.

    Args:
        name: replaces the tower's name if it is given.
    """
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


def nested(root: nn.Module, path: str, rows: Iterable[TableRow], name: str) -> Iterator[TowerSpec]:
    """Yields the towers that `rows` describe for the module at `path` of `root`.

    Args:
        name: the towers' name in `root`.
    """
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
