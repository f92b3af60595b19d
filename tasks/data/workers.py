"""The number of worker processes that read and decode data, and their loader's generator."""

from __future__ import annotations

import multiprocessing
import os

import torch

from ..config.schema import TrainerConfig
from ..core.device import default_device

MOST = 8  # largest number of workers
NUMBER = "MMADAPTERS_WORKERS"  # the environment variable that says what "auto" is


def readers(config: TrainerConfig, *, decoded: bool = False) -> int:
    """Returns `trainer.workers`, or for "auto" all cores of this process but one, at most 8.

    If the model runs on the CPU, "auto" gives at most one. It then gives none if the data are
    already decoded, and none if new processes are not forked, since they import everything again
    for each pass over the data.

    The environment variable MMADAPTERS_WORKERS sets another number for "auto".

    Args:
        decoded: whether nothing is left to decode.

    Raises:
        ValueError: the variable is no number.
    """
    if config.workers != "auto":
        return config.workers
    if chosen := os.environ.get(NUMBER):
        if not chosen.isdecimal():
            raise ValueError(f"{NUMBER} is {chosen!r}: set it to a number of processes, 0 or more")
        return int(chosen)
    most = MOST
    if "cpu" in (config.device, default_device()):
        most = 1 if forks() and not decoded else 0
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(0, min((os.cpu_count() or 1) // sharing - 1, most))


def forks() -> bool:
    """Whether a new process starts as a copy of this one and shares its memory."""
    # Without `allow_none` the call itself would fix the start method of this process.
    chosen = multiprocessing.get_start_method(allow_none=True)
    return (chosen or multiprocessing.get_all_start_methods()[0]) == "fork"


def loader_generator() -> torch.Generator:
    """Returns a generator for a data loader.

    A loader draws a number whenever it starts. Drawn from torch's global generator, it would change
    the randomness of the model, depending on how often data are read.
    """
    return torch.Generator()
