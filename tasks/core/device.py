"""Devices, precision and processes of a job."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmadapters.trunk.frozen import placeholder
from mmadapters.trunk.store import DTYPES

from .rows import Batch


def processes() -> tuple[int, int]:
    """Returns this process's rank and the number of processes."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Returns the batch with all of its tensors on the device, also those in lists and dicts.

    A `Blank` becomes a tensor without values, which takes no memory there.
    """

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device, non_blocking=True)
        if isinstance(value, Blank):
            return value.on(device)
        if isinstance(value, dict):
            return {key: move(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(move, value))
        return value

    return move(batch)


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Returns the autocast context for `trainer.precision`: "fp32", "bf16" or "fp16"."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def default_device() -> str:
    """Returns the type of this machine's accelerator, or "cpu" if there is none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


@dataclass(frozen=True)
class Blank:
    """Stands for a tensor when only its shape and type are needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def on(self, device: torch.device) -> Tensor:
        """Returns a tensor of this shape without values on the device."""
        return placeholder(self.shape, dtype=self.dtype, device=device)
