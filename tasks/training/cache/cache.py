"""The frozen part of an encoder, computed once for a run's rows: what is kept, and where.

`prepare` looks at one real batch, decides, and fills; the trainer then reads `KeptSplit`s in place
of the rows. What it decides is the same in every process of a group.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmadapters import FrozenTrunk
from mmadapters.trunk.budget import GIB, cache_folder, check_room, free_memory
from mmadapters.trunk.store import DTYPES, TrunkStore, chunk_size

from ...core.capabilities import BatchGrouping, CacheableInputs, capability
from ...core.device import autocast, processes, to_device
from ...core.model import TaskModel
from ...core.rows import Batch, Rows
from ...core.task import Task
from ...data.batches import share_of
from ...data.workers import readers
from .examples import KeptExamples, PlainExamples, Probe, ProbeCollate
from .identity import description
from .split import KeptSplit, Run

_CLOSE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 5e-3}


class Refused(ValueError):
    """Why states are not kept, as the end of a sentence."""


@dataclass
class TrunkCache:
    """What is kept for a run: the splits, and `reason` where there are none."""

    where: str = "off"
    reason: str | None = None
    train: KeptSplit | None = None
    validation: KeptSplit | None = None
    plainly: str | None = None  # why the validation split is not kept

    def facts(self) -> dict[str, Any]:
        """For a run's figures, JSON-ready."""
        if self.train is None:
            return {"where": "off", "reason": self.reason}
        depths = {n: len(t.blocks) for n, t in self.train.model.encoder.sites.towers.items()}
        validation = self.plainly if self.validation is None else self.validation.facts()
        return {
            "where": self.where,
            "towers": {
                part.tower: {"block": part.block, "blocks": depths[part.tower]}
                for part in self.train.prefix.towers
            },
            "dtype": str(self.train.store.dtype or "as they are").removeprefix("torch."),
            "train": self.train.facts(),
            **({} if validation is None else {"validation": validation}),
        }


def prepare(
    task: Task,
    model: TaskModel,
    train: Any,
    validation: Rows | None,
    *,
    passes: float,
    evaluations: int,
    quiet: bool,
) -> TrunkCache:
    """Decides what is kept by `trainer.cache_trunk`, and fills it; the model and all random
    states are left as they were.

    Args:
        train: training rows, or a stream of them.
        passes: over the training rows.
        evaluations: passes over the validation rows.

    Raises:
        ValueError: memory or disk is asked for and nothing can be kept, or too much would be.
    """
    config = task.config.trainer
    if config.cache_trunk == "off":
        return TrunkCache()
    try:
        with _undisturbed(model):
            cache = _prepared(task, model, train, validation, passes, evaluations, quiet=quiet)
    except Refused as error:
        if config.cache_trunk != "auto":
            raise ValueError(f"trainer.cache_trunk {config.cache_trunk}: {error}") from error
        return TrunkCache(reason=str(error))
    return cache


def _prepared(
    task: Task,
    model: TaskModel,
    train: Any,
    validation: Rows | None,
    passes: float,
    evaluations: int,
    *,
    quiet: bool,
) -> TrunkCache:
    config = task.config.trainer
    auto = config.cache_trunk == "auto"
    if (reason := _never(task, model, train)) is not None:
        raise Refused(reason)
    views = config.views or 1
    if auto and passes <= views:
        raise Refused(f"{passes:.3g} passes over the training rows are too few to gain by it")
    drawn = capability(task, CacheableInputs).randomness(train)
    if drawn is None:
        views = 1
    elif config.views is None:
        raise Refused(
            f"training examples are drawn anew each time ({drawn}): set trainer.views to how many "
            "ways of each row are kept, or turn that off"
        )
    planned = [_Planned.of(task, model, train, train=True, views=views)]
    plainly: str | None = None
    if validation is not None and len(validation):
        if evaluations < 2 and auto:
            plainly = "it is evaluated once"
        else:
            try:
                planned.append(_Planned.of(task, model, validation, train=False, views=1))
            except Refused as error:
                plainly = str(error)
    where, folder = _agreed(lambda: _place(task, planned))
    cache = TrunkCache(where, plainly=plainly)
    for plan in planned:
        split = plan.settled(folder)
        try:
            split.fill(workers=readers(config), quiet=quiet)
        except ValueError as error:
            raise Refused(str(error)) from error
        if split.train:
            cache.train = split
        else:
            cache.validation = split
    return cache


def _never(task: Task, model: TaskModel, train: Any) -> str | None:
    """Why nothing can be kept, as the config says it."""
    config = task.config.trainer
    if config.mode == "full":
        return "trainer.mode full trains the whole encoder"
    if not hasattr(train, "__len__"):
        return "a streamed training split has no rows to come back to (data.streaming)"
    if model.encoder.train_trunk:
        return "the encoder's own dropout acts (trainer.trunk_dropout)"
    if model.active_in_training:
        return "the encoder draws in training (backbone.layerdrop, backbone.spec_augment)"
    return None


@dataclass
class _Planned:
    """A split that can be kept, and how many bytes an example takes."""

    split: KeptSplit
    entry_bytes: float

    @classmethod
    def of(cls, task: Task, model: TaskModel, rows: Rows, *, train: bool, views: int) -> _Planned:
        """
        Raises:
            Refused: nothing of the split can be kept.
        """
        reason = None if train else capability(task, CacheableInputs).one_pass(rows)
        if reason is not None:
            raise Refused(reason)
        config, (_, world) = task.config.trainer, processes()
        share = share_of(config.batch_size, config.accumulation, world)
        size = share if train else config.eval_batch_size or share
        order = _order(task, rows)
        probe, chosen = _probe(task, model, rows, order, size=size, train=train)
        batch = to_device(probe.batch or {}, model.device)
        run = _training(model) if train else _measuring(task, model)
        with _as_trained(model, train), autocast(config.precision, model.device):
            prefix = FrozenTrunk.of(model.encoder, lambda: run(batch))
        model.eval()
        _check_towers(task, prefix)
        if config.cache_trunk == "auto" and not any(
            part.block > 0 or part.tower == "audio" for part in prefix.towers
        ):
            raise Refused("adapters act from the first block on, and all blocks must run")
        dtypes = {"auto": DTYPES.get(config.precision), "same": None, **DTYPES}
        places = (order[:, None] * views + np.arange(views)).ravel()
        store = TrunkStore.in_memory(
            order=np.arange(len(chosen)), per_chunk=len(chosen), dtype=None
        )
        split = KeptSplit(task, model, rows, prefix, store, run, train, size)
        entries = split.entries(probe)
        store.put(0, entries)
        _check_same(split, probe, batch)
        store.dtype = dtypes[config.cache_dtype]
        store.put(0, entries)
        bytes_each = store.nbytes / len(chosen)
        lengths = capability(task, BatchGrouping).lengths(rows)
        if lengths is not None and (own := np.mean([lengths[row] for row in chosen])):
            bytes_each *= float(np.mean(lengths) / own)
        split.store = TrunkStore.in_memory(
            order=places,
            views=views,
            per_chunk=-(-chunk_size(bytes_each) // size) * size,
            dtype=store.dtype,
        )
        return cls(split, bytes_each)

    @property
    def bytes(self) -> int:
        return int(self.entry_bytes * len(self.split.store.order))

    def settled(self, folder: Path | None) -> KeptSplit:
        """The split with its store in a folder, or in memory (None)."""
        split, store = self.split, self.split.store
        if folder is not None:
            task = split.task
            try:
                told = description(
                    task,
                    split.prefix,
                    split.rows,
                    train=split.train,
                    precision=task.config.trainer.precision,
                )
                split.store = TrunkStore.on_disk(
                    folder,
                    told,
                    order=store.order,
                    views=store.views,
                    per_chunk=store.per_chunk,
                    dtype=store.dtype,
                )
            except ValueError as error:
                raise Refused(str(error)) from error
        return split


def _order(task: Task, rows: Rows) -> np.ndarray:
    """(rows,) int64: those of similar lengths, or of one group, follow each other."""
    grouping = capability(task, BatchGrouping)
    found = grouping.lengths(rows)
    if found is None:
        found = grouping.groups(rows)
    if found is None:
        return np.arange(len(rows))
    return np.argsort(np.asarray(found), kind="stable")


def _probe(
    task: Task, model: TaskModel, rows: Rows, order: np.ndarray, *, size: int, train: bool
) -> tuple[Probe, list[int]]:
    """A batch from the middle of the order, or the next one that has a good row."""
    examples = PlainExamples(task, rows, train=train)
    collate = ProbeCollate(task, list(model.encoder.sites.towers))
    starts = list(range(0, len(order), size))
    middle = len(starts) // 2
    for start in starts[middle:] + starts[:middle]:
        chosen = order[start : start + size].tolist()
        parts = [examples[row, 0] for row in chosen]
        probe = collate([((number, 0), part) for number, (_, part) in enumerate(parts)])
        if probe.batch is not None:
            return probe, chosen
    raise Refused("no row can be used")


def _training(model: TaskModel) -> Run:
    return lambda batch: model(**batch)


def _measuring(task: Task, model: TaskModel) -> Run:
    return lambda batch: task.records(model, batch)


@contextlib.contextmanager
def _as_trained(model: TaskModel, train: bool) -> Iterator[None]:
    """Inside, the encoder is in the mode in which it is trained (or measured), and nothing around
    it, whose running statistics must not move."""
    model.train(train)
    inside = {id(module) for module in model.encoder.backbone.modules()}
    for module in model.modules():
        if id(module) not in inside:
            module.training = False
    with contextlib.nullcontext() if train else torch.no_grad():
        yield


def _check_towers(task: Task, prefix: FrozenTrunk) -> None:
    kept = {part.tower for part in prefix.towers}
    needed = capability(task, CacheableInputs).cacheable_inputs.values()
    for tower in [*needed, *([] if kept else prefix.skipped)]:
        if tower in prefix.skipped:
            raise Refused(f"tower {tower!r} cannot be kept: {prefix.skipped[tower]}")
    if not kept:
        raise Refused("no tower of the encoder runs")


def _check_same(split: KeptSplit, probe: Probe, batch: Batch) -> None:
    """Compares a batch's plain pass with the one that starts from what the store gives again."""
    precision, device = split.task.config.trainer.precision, split.model.device
    examples = KeptExamples(split.task, split.store, len(probe.places), train=False)
    loaded = split.collate([examples[number] for number in range(len(probe.places))])
    assert loaded.batch is not None
    again = to_device(loaded.batch, device)
    with torch.no_grad(), autocast(precision, device):
        plain = split.run(dict(batch))
        with split.resumed(again):
            resumed = split.run(again)
    if not _alike(plain, resumed, _CLOSE[precision]):
        raise Refused(
            "a pass that starts from kept states gives something else than one that does not: "
            "something beside the encoder reads what it reads"
        )


def _alike(one: Any, other: Any, tolerance: float) -> bool:
    """Whether two results are the same, numbers up to a difference that their size allows."""
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
        return True  # what cannot be compared says nothing


def _place(task: Task, planned: Sequence[_Planned]) -> tuple[str, Path | None]:
    """Where there is room for all of the splits, as the config lets it be looked for.

    Raises:
        Refused: nowhere.
    """
    config, (_, world) = task.config.trainer, processes()
    folder = cache_folder() if config.cache_folder is None else Path(config.cache_folder)
    needed = sum(plan.bytes for plan in planned)
    stores = [plan.split.store for plan in planned]
    options: dict[str, Any] = {
        "records": sum(len(plan.split.rows) for plan in planned),
        "views": stores[0].views,
        "budget": config.cache_budget,
    }
    # In memory every process of this machine has a copy.
    copies = needed * _local(world)
    wanted = config.cache_trunk
    if wanted == "auto":
        fits = copies <= min(free_memory(), config.cache_budget * GIB)
        wanted = "memory" if fits else "disk"
    try:
        if wanted == "memory":
            check_room(copies, folder=None, **options)
            return "memory", None
        check_room(needed, folder=folder, **options)
    except ValueError as error:
        raise Refused(f"{error} (trainer.cache_budget)") from error
    return "disk", folder


def _local(world: int) -> int:
    """Processes of the group on this machine."""
    return min(int(os.environ.get("LOCAL_WORLD_SIZE", world)), world)


def _agreed(choose: Callable[[], tuple[str, Path | None]]) -> tuple[str, Path | None]:
    """What all processes of the group settle on: what the first of them refuses, none does, and
    disk is what all can have."""
    try:
        own: Any = choose()
    except Refused as error:
        own = str(error)
    _, world = processes()
    if world > 1:
        every: list[Any] = [None] * world
        torch.distributed.all_gather_object(every, own)
        own = next((one for one in every if isinstance(one, str)), None) or next(
            (one for one in every if one[0] == "disk"), own
        )
    if isinstance(own, str):
        raise Refused(own)
    return own


@contextlib.contextmanager
def _undisturbed(model: TaskModel) -> Iterator[None]:
    """Afterwards modes, buffers and all random states are what they were."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in _moving(model)]
    states = random.getstate(), np.random.get_state()
    cuda = [model.device.index or 0] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _moving(model: nn.Module) -> Iterator[torch.Tensor]:
    """Buffers that a pass may change."""
    for module in model.modules():
        if hasattr(module, "running_mean") or hasattr(module, "num_batches_tracked"):
            yield from (buffer for buffer in module.buffers(recurse=False))
