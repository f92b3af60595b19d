"""How many processes read and decode data beside one that trains, and what their loader draws."""

from __future__ import annotations

import multiprocessing
import os

import torch

from ..config.schema import TrainerConfig
from ..core.device import default_device

MOST = 8  # processes that read


def readers(config: TrainerConfig, *, decoded: bool = False) -> int:
    """`trainer.workers`; by itself one for each core that this process has beside its own, 8 at
    most, and one at most where the model runs on the CPU and wants the cores.

    None there where a process is not forked but starts anew, as it imports everything again for
    each pass over the data; and none where there is nothing to decode.
    """
    if config.workers != "auto":
        return config.workers
    most = MOST
    if "cpu" in (config.device, default_device()):
        most = 1 if forks() and not decoded else 0
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(0, min((os.cpu_count() or 1) // sharing - 1, most))


def forks() -> bool:
    """Whether a new process starts as a copy of this one, whose memory it shares."""
    # Without `allow_none` the question itself would settle the way for the whole process.
    chosen = multiprocessing.get_start_method(allow_none=True)
    return (chosen or multiprocessing.get_all_start_methods()[0]) == "fork"


def loader_generator() -> torch.Generator:
    """For a loader. It draws a number whenever it starts: from torch's own generator that would
    change what the model draws next, by how often and with how many workers data is read."""
    return torch.Generator()
