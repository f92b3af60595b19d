"""Runs image towers of timm and open_clip at sizes that they were not built for.

Both add position embeddings of one grid of patches. timm resizes them only in models that were
built with `dynamic_img_size=True`. This module resizes them as both libraries do when they load a
checkpoint (bicubic with antialiasing), caches them for each size, and puts them into the model for
one call. The model's own tensors, keys and settings never change.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Grid = tuple[int, int]
SIZES = 32  # most cached grids; multi-scale inference uses about ten
_MISSING = object()


class GridCache:
    """Caches values for the latest grids, as long as their source tensors do not change.

    Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._values: OrderedDict[tuple, Any] = OrderedDict()

    def __reduce__(self) -> tuple:
        return GridCache, ()

    def get(self, grid: Grid, source: Tensor, make: Callable[[], Any]) -> Any:
        """Returns the cached result of `make()`, which depends only on `grid` and `source`."""
        if source.requires_grad and torch.is_grad_enabled():
            return make()
        key = (grid, source.data_ptr(), source._version, source.device, source.dtype)
        if key not in self._values:
            # Tensors that are made in inference mode could not be used in training later.
            with torch.inference_mode(False), torch.no_grad():
                self._values[key] = make()
            while len(self._values) > SIZES:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]


class CopyableLock:
    """A re-entrant lock that can be copied and pickled, as a new one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple:
        return CopyableLock, ()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@contextlib.contextmanager
def replaced(*changes: tuple[dict[str, Any], str, Any]) -> Iterator[None]:
    """Sets `table[key]` to `value` inside the block, for each (table, key, value)."""
    before = [(table, key, table.get(key, _MISSING)) for table, key, _ in changes]
    for table, key, value in changes:
        table[key] = value
    try:
        yield
    finally:
        for table, key, value in before:
            if value is _MISSING:
                del table[key]
            else:
                table[key] = value


def resized(embedding: Tensor, old: Grid, new: Grid, *, num_prefix_tokens: int) -> Tensor:
    """Resizes position embeddings (1, num_prefix_tokens + h·w, D) from grid `old` to `new`."""
    from timm.layers import resample_abs_pos_embed

    return resample_abs_pos_embed(
        embedding, new_size=list(new), old_size=list(old), num_prefix_tokens=num_prefix_tokens
    )


def timm_at(model: Any, grid: Grid, cache: GridCache) -> contextlib.AbstractContextManager[None]:
    """Makes a timm vision transformer accept images of `grid` patches inside the block."""
    embed = model.patch_embed
    changes: list[tuple[dict[str, Any], str, Any]] = [
        (embed.__dict__, "strict_img_size", False),
        (embed.__dict__, "grid_size", grid),
    ]
    position = getattr(model, "pos_embed", None)
    if position is not None:
        num_prefix_tokens = (
            0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
        )
        old = embed.grid_size
        value = cache.get(
            grid,
            position,
            lambda: resized(position, old, grid, num_prefix_tokens=num_prefix_tokens),
        )
        changes.append((model._parameters, "pos_embed", value))
    if hasattr(model, "dynamic_img_size"):
        from timm.layers import Format

        changes += [
            (model.__dict__, "dynamic_img_size", True),
            (embed.__dict__, "flatten", False),
            (embed.__dict__, "output_fmt", Format.NHWC),
        ]
    rope = getattr(model, "rope", None)
    if rope is not None and _is_of_one_size(rope):
        buffer = next(rope.buffers())
        changes.append((model._modules, "rope", cache.get(grid, buffer, lambda: _rope(rope, grid))))
    return replaced(*changes)


def _is_of_one_size(rope: nn.Module) -> bool:
    """Tells whether rotary embeddings are computed once for one size, without parameters.

    Other modules compute them for each grid: those with parameters, and DINOv3's in timm 1.0.20,
    which has no `update_feat_shape`.
    """
    return (
        getattr(rope, "feat_shape", None) is not None
        and hasattr(rope, "update_feat_shape")
        and not list(rope.parameters())
    )


def _rope(rope: Any, grid: Grid) -> nn.Module:
    rope = copy.deepcopy(rope)
    rope.update_feat_shape(list(grid))
    return rope


def open_clip_at(
    visual: Any, grid: Grid, cache: GridCache
) -> contextlib.AbstractContextManager[None]:
    """Makes open_clip's own image tower accept images of `grid` patches inside the block."""
    position = visual.positional_embedding
    value = cache.get(
        grid,
        position,
        lambda: resized(position[None], visual.grid_size, grid, num_prefix_tokens=1)[0],
    )
    return replaced((visual._parameters, "positional_embedding", value))
