"""Devices, precision and processes: where tensors lie and who computes on them."""

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
    """This process's rank and how many there are."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor in it, also in lists and dicts, on the device; a tensor without
    values takes no room there."""

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
    """The autocast region that a `trainer.precision` means."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def default_device() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


@dataclass(frozen=True)
class Blank:
    """Stands for a tensor of which nothing but the shape is needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def on(self, device: torch.device) -> Tensor:
        return placeholder(self.shape, dtype=self.dtype, device=device)
