"""Image towers of timm and open_clip at sizes that they were not built for.

Both add position embeddings of one grid of patches; timm resizes them only where the model was
built with `dynamic_img_size=True`. Here they are resized as timm and open_clip resize them when
they load a checkpoint (bicubic with antialiasing), kept for each size, and put into the model for
the length of one call: its own tensors, keys and settings never change.
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
SIZES = 32  # grids kept; multi-scale inference uses about ten
_MISSING = object()


class Kept:
    """What was computed for the latest grids, as long as the tensors it came from are the same.

    Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple, Any] = OrderedDict()

    def __reduce__(self) -> tuple:
        return Kept, ()

    def get(self, grid: Grid, source: Tensor, make: Callable[[], Any]) -> Any:
        """`make()`, which depends on `grid` and `source` alone."""
        if source.requires_grad and torch.is_grad_enabled():
            return make()
        key = (grid, source.data_ptr(), source._version, source.device, source.dtype)
        if key not in self._kept:
            # What is made in inference mode could never be used in training afterwards.
            with torch.inference_mode(False), torch.no_grad():
                self._kept[key] = make()
            while len(self._kept) > SIZES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


class Lock:
    """A re-entrant lock that can be copied and pickled, as a new one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple:
        return Lock, ()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@contextlib.contextmanager
def replaced(*changes: tuple[dict[str, Any], str, Any]) -> Iterator[None]:
    """Inside the block, `table[key]` is `value` for each (table, key, value)."""
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


def resized(embedding: Tensor, old: Grid, new: Grid, *, prefix: int) -> Tensor:
    """Position embeddings (1, prefix + h·w, D) of grid `old` for grid `new`."""
    from timm.layers import resample_abs_pos_embed

    return resample_abs_pos_embed(
        embedding, new_size=list(new), old_size=list(old), num_prefix_tokens=prefix
    )


def timm_at(model: Any, grid: Grid, kept: Kept) -> contextlib.AbstractContextManager[None]:
    """A block inside which a timm vision transformer takes images of `grid` patches."""
    embed = model.patch_embed
    changes: list[tuple[dict[str, Any], str, Any]] = [
        (embed.__dict__, "strict_img_size", False),
        (embed.__dict__, "grid_size", grid),
    ]
    position = getattr(model, "pos_embed", None)
    if position is not None:
        prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
        old = embed.grid_size
        value = kept.get(grid, position, lambda: resized(position, old, grid, prefix=prefix))
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
        changes.append((model._modules, "rope", kept.get(grid, buffer, lambda: _rope(rope, grid))))
    return replaced(*changes)


def _is_of_one_size(rope: nn.Module) -> bool:
    """Whether rotary embeddings were computed once, from nothing that is trained.

    Others make them for the grid they are asked for: those with parameters, and DINOv3's in
    timm 1.0.20, which has no such function.
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


def open_clip_at(visual: Any, grid: Grid, kept: Kept) -> contextlib.AbstractContextManager[None]:
    """A block inside which open_clip's own image tower takes images of `grid` patches."""
    position = visual.positional_embedding
    value = kept.get(
        grid,
        position,
        lambda: resized(position[None], visual.grid_size, grid, prefix=1)[0],
    )
    return replaced((visual._parameters, "positional_embedding", value))
