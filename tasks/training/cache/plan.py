"""Plans of cached splits: a trial on a real batch tells if a split can be cached, and its size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmadapters import FrozenTrunk
from mmadapters.trunk.store import DTYPES, TrunkStore, chunk_size

from ...core.capabilities import BatchGrouping, CacheableInputs, capability
from ...core.device import autocast, processes, to_device
from ...core.model import TaskModel
from ...core.rows import Batch, Rows
from ...core.task import Task
from ...data.batches import share_of
from .examples import CachedExamples, FillBatch, FillCollate, FillExamples
from .identity import description
from .split import CachedSplit, Pass

# The largest difference of a resumed pass, relative to the largest number, by `trainer.precision`.
_TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 5e-3}


class CacheRefused(ValueError):
    """The frozen trunk cannot be cached; the message is the reason, as the end of a sentence."""


@dataclass
class SplitPlan:
    """A split that can be cached.

    Attributes:
        split: the split; its store is empty and in memory until `placed`.
        entry_bytes: the size of the states of one place.
    """

    split: CachedSplit
    entry_bytes: float

    @classmethod
    def of(cls, task: Task, model: TaskModel, rows: Rows, *, train: bool, views: int) -> SplitPlan:
        """Plans a split after a trial on one batch of it.

        Args:
            train: whether the passes are those of training.
            views: how many views of each row are cached.

        Raises:
            CacheRefused: nothing of the split can be cached.
        """
        reason = None if train else capability(task, CacheableInputs).one_pass(rows)
        if reason is not None:
            raise CacheRefused(reason)
        config, (_, world) = task.config.trainer, processes()
        share = share_of(config.batch_size, config.accumulation, world)
        size = share if train else config.eval_batch_size or share
        order = _order(task, rows)
        trial, chosen = _trial_batch(task, model, rows, order, size=size, train=train)
        batch = to_device(trial.batch or {}, model.device)
        run = _training(model) if train else _measuring(task, model)
        with _encoder_mode(model, train), autocast(config.precision, model.device):
            trunk = FrozenTrunk.of(model.encoder, lambda: run(batch))
        model.eval()
        _check_towers(task, trunk)
        if config.cache_trunk == "auto" and not any(
            part.block > 0 or part.tower == "audio" for part in trunk.towers
        ):
            raise CacheRefused("adapters act from the first block on, and all blocks must run")
        dtypes = {"auto": DTYPES.get(config.precision), "same": None, **DTYPES}
        places = (order[:, None] * views + np.arange(views)).ravel()
        store = TrunkStore.in_memory(
            order=np.arange(len(chosen)), per_chunk=len(chosen), dtype=None
        )
        split = CachedSplit(task, model, rows, trunk, store, run, train, size)
        entries = split.entries(trial)
        store.put(0, entries)
        _check_same(split, trial, batch)
        store.dtype = dtypes[config.cache_dtype]
        store.put(0, entries)
        bytes_each = store.nbytes / len(chosen)
        lengths = capability(task, BatchGrouping).lengths(rows)
        if lengths is not None and (of_trial := np.mean([lengths[row] for row in chosen])):
            bytes_each *= float(np.mean(lengths) / of_trial)
        split.store = TrunkStore.in_memory(
            order=places,
            views=views,
            per_chunk=-(-chunk_size(bytes_each) // size) * size,
            dtype=store.dtype,
        )
        return cls(split, bytes_each)

    @property
    def bytes(self) -> int:
        """The size of the states of the whole split."""
        return int(self.entry_bytes * len(self.split.store.order))

    def placed(self, folder: Path | None) -> CachedSplit:
        """Returns the split with its store in a folder on disk, or in memory if it is None.

        Raises:
            CacheRefused: a store on disk cannot be made.
        """
        split, store = self.split, self.split.store
        if folder is not None:
            task = split.task
            try:
                identity = description(
                    task,
                    split.trunk,
                    split.rows,
                    train=split.train,
                    precision=task.config.trainer.precision,
                )
                split.store = TrunkStore.on_disk(
                    folder,
                    identity,
                    order=store.order,
                    views=store.views,
                    per_chunk=store.per_chunk,
                    dtype=store.dtype,
                )
            except ValueError as error:
                raise CacheRefused(str(error)) from error
        return split


def _order(task: Task, rows: Rows) -> np.ndarray:
    """Returns row numbers, (rows,) int64, with rows of similar length or of one group together."""
    grouping = capability(task, BatchGrouping)
    keys = grouping.lengths(rows)
    if keys is None:
        keys = grouping.groups(rows)
    if keys is None:
        return np.arange(len(rows))
    return np.argsort(np.asarray(keys), kind="stable")


def _trial_batch(
    task: Task, model: TaskModel, rows: Rows, order: np.ndarray, *, size: int, train: bool
) -> tuple[FillBatch, list[int]]:
    """Returns the middle batch of the order, or the next one with a good row, and its rows."""
    examples = FillExamples(task, rows, train=train)
    collate = FillCollate(task, list(model.encoder.sites.towers))
    starts = list(range(0, len(order), size))
    middle = len(starts) // 2
    for start in starts[middle:] + starts[:middle]:
        chosen = order[start : start + size].tolist()
        parts = [examples[row, 0] for row in chosen]
        trial = collate([((number, 0), part) for number, (_, part) in enumerate(parts)])
        if trial.batch is not None:
            return trial, chosen
    raise CacheRefused("no row can be used")


def _training(model: TaskModel) -> Pass:
    return lambda batch: model(**batch)


def _measuring(task: Task, model: TaskModel) -> Pass:
    return lambda batch: task.records(model, batch)


@contextlib.contextmanager
def _encoder_mode(model: TaskModel, train: bool) -> Iterator[None]:
    """Inside the block the encoder is in the mode of training, or of evaluation without gradients.

    All modules around the encoder are in eval mode, so that their running statistics stay.
    """
    model.train(train)
    inside = {id(module) for module in model.encoder.backbone.modules()}
    for module in model.modules():
        if id(module) not in inside:
            module.training = False
    with contextlib.nullcontext() if train else torch.no_grad():
        yield


def _check_towers(task: Task, trunk: FrozenTrunk) -> None:
    cached = {part.tower for part in trunk.towers}
    needed = capability(task, CacheableInputs).cacheable_inputs.values()
    for tower in [*needed, *([] if cached else trunk.skipped)]:
        if tower in trunk.skipped:
            raise CacheRefused(f"tower {tower!r} cannot be cached: {trunk.skipped[tower]}")
    if not cached:
        raise CacheRefused("no tower of the encoder runs")


def _check_same(split: CachedSplit, trial: FillBatch, batch: Batch) -> None:
    """Compares the plain pass on a batch with the pass that starts from its stored states."""
    precision, device = split.task.config.trainer.precision, split.model.device
    examples = CachedExamples(split.task, split.store, len(trial.places), train=False)
    loaded = split.collate([examples[number] for number in range(len(trial.places))])
    assert loaded.batch is not None
    again = to_device(loaded.batch, device)
    with torch.no_grad(), autocast(precision, device):
        plain = split.run(dict(batch))
        with split.resumed(again):
            resumed = split.run(again)
    if not _alike(plain, resumed, _TOLERANCES[precision]):
        raise CacheRefused(
            "a pass that starts from stored states gives another result than a whole one, as "
            "something outside the encoder also reads its inputs"
        )


def _alike(one: Any, other: Any, tolerance: float) -> bool:
    """Returns whether two results are equal; numbers may differ by `tolerance` of the largest."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(
            _alike(value, other[key], tolerance) for key, value in one.items()
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(
            _alike(*pair, tolerance) for pair in zip(one, other, strict=True)
        )
    if isinstance(one, torch.Tensor):
        return _alike(one.float().cpu().numpy(), other.float().cpu().numpy(), tolerance)
    if isinstance(one, float):
        return _alike(np.asarray(one), np.asarray(other), tolerance)
    if isinstance(one, np.ndarray):
        if one.shape != np.shape(other):
            return False
        scale = max(float(np.abs(one).max(initial=0)), 1.0)
        return bool(np.allclose(one, other, rtol=0, atol=tolerance * scale, equal_nan=True))
    try:
        return bool(one == other)
    except (TypeError, ValueError):
        return True  # values that cannot be compared prove no difference
