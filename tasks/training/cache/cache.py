"""The cache of the frozen trunk of a run: it decides what is cached and where, and fills it.

`prepare` tries one real batch (`plan`), decides, and computes the states; the trainer then reads
`CachedSplit`s in place of the rows. All processes of a group decide the same.
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

from mmadapters.trunk.budget import GIB, cache_folder, check_room, free_memory

from ...core.capabilities import CacheableInputs, capability
from ...core.device import processes
from ...core.model import TaskModel
from ...core.rows import Rows
from ...core.task import Task
from ...data.workers import readers
from .plan import CacheRefused, SplitPlan
from .split import CachedSplit


@dataclass
class TrunkCache:
    """The cached trunk states of a run.

    Attributes:
        where: "memory", "disk" or "off".
        reason: why nothing is cached, as the end of a sentence; None if it was not asked for.
        train: the training split; None if nothing is cached.
        validation: the validation split; None if it is not cached.
        no_validation: why the validation split is not cached.
    """

    where: str = "off"
    reason: str | None = None
    train: CachedSplit | None = None
    validation: CachedSplit | None = None
    no_validation: str | None = None

    def facts(self) -> dict[str, Any]:
        """Returns the figures of the cache for `metrics.json`."""
        if self.train is None:
            return {"where": "off", "reason": self.reason}
        depths = {n: len(t.blocks) for n, t in self.train.model.encoder.sites.towers.items()}
        validation = self.no_validation if self.validation is None else self.validation.facts()
        return {
            "where": self.where,
            "towers": {
                part.tower: {"block": part.block, "blocks": depths[part.tower]}
                for part in self.train.trunk.towers
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
    """Caches the trunk states that `trainer.cache_trunk` asks for.

    Modes and buffers of the model and all random states are afterwards as before.

    Args:
        train: the training rows, or a stream of them.
        passes: how often the run reads all training rows.
        evaluations: how often the run reads all validation rows.
        quiet: no progress bar.

    Raises:
        ValueError: memory or disk is asked for, and nothing can be cached or the room is too small.
    """
    config = task.config.trainer
    if config.cache_trunk == "off":
        return TrunkCache()
    try:
        with _undisturbed(model):
            cache = _prepared(task, model, train, validation, passes, evaluations, quiet=quiet)
    except CacheRefused as error:
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
    if (reason := _obstacle(task, model, train)) is not None:
        raise CacheRefused(reason)
    views = config.views or 1
    if auto and passes <= views:
        raise CacheRefused(f"{passes:.3g} passes over the training rows are too few to save time")
    randomness = capability(task, CacheableInputs).randomness(train)
    if randomness is None:
        views = 1
    elif config.views is None:
        raise CacheRefused(
            f"training examples differ in every epoch ({randomness}): set trainer.views to the "
            "number of views of each row to cache, or turn that off"
        )
    plans = [SplitPlan.of(task, model, train, train=True, views=views)]
    no_validation: str | None = None
    if validation is not None and len(validation):
        if evaluations < 2 and auto:
            no_validation = "it is evaluated once"
        else:
            try:
                plans.append(SplitPlan.of(task, model, validation, train=False, views=1))
            except CacheRefused as error:
                no_validation = str(error)
    where, folder = _agreed(lambda: _place(task, plans))
    cache = TrunkCache(where, no_validation=no_validation)
    for plan in plans:
        split = plan.placed(folder)
        try:
            split.fill(workers=readers(config), quiet=quiet)
        except ValueError as error:
            raise CacheRefused(str(error)) from error
        if split.train:
            cache.train = split
        else:
            cache.validation = split
    return cache


def _obstacle(task: Task, model: TaskModel, train: Any) -> str | None:
    """Returns the setting of the config that excludes any cache, or None if there is none."""
    config = task.config.trainer
    if config.mode == "full":
        return "trainer.mode full trains the whole encoder"
    if not hasattr(train, "__len__"):
        return "a streamed training split has no rows that come back (data.streaming)"
    if model.encoder.train_trunk:
        return "the encoder's own dropout is active in training (trainer.trunk_dropout)"
    if model.active_in_training:
        return "the encoder is random in training (backbone.layerdrop, backbone.spec_augment)"
    return None


def _place(task: Task, plans: Sequence[SplitPlan]) -> tuple[str, Path | None]:
    """Chooses "memory", or "disk" and a folder, by the config and the room for all splits.

    Raises:
        CacheRefused: the room is too small.
    """
    config, (_, world) = task.config.trainer, processes()
    folder = cache_folder() if config.cache_folder is None else Path(config.cache_folder)
    needed = sum(plan.bytes for plan in plans)
    stores = [plan.split.store for plan in plans]
    options: dict[str, Any] = {
        "records": sum(len(plan.split.rows) for plan in plans),
        "views": stores[0].views,
        "budget": config.cache_budget,
    }
    # Every process of this machine holds a copy in memory.
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
        raise CacheRefused(f"{error} (trainer.cache_budget)") from error
    return "disk", folder


def _local(world: int) -> int:
    """Returns the number of processes of the group on this machine."""
    return min(int(os.environ.get("LOCAL_WORLD_SIZE", world)), world)


def _agreed(choose: Callable[[], tuple[str, Path | None]]) -> tuple[str, Path | None]:
    """Returns the choice that all processes of the group make together.

    If one process refuses, all do; if one of them chooses the disk, all do.
    """
    choice: Any
    try:
        choice = choose()
    except CacheRefused as error:
        choice = str(error)
    _, world = processes()
    if world > 1:
        every: list[Any] = [None] * world
        torch.distributed.all_gather_object(every, choice)
        choice = next((one for one in every if isinstance(one, str)), None) or next(
            (one for one in every if one[0] == "disk"), choice
        )
    if isinstance(choice, str):
        raise CacheRefused(choice)
    return choice


@contextlib.contextmanager
def _undisturbed(model: TaskModel) -> Iterator[None]:
    """After the block all modes, buffers and random states are as before."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in _statistics(model)]
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


def _statistics(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yields the running statistics of a model: the buffers that a pass may change."""
    for module in model.modules():
        if hasattr(module, "running_mean") or hasattr(module, "num_batches_tracked"):
            yield from (buffer for buffer in module.buffers(recurse=False))
