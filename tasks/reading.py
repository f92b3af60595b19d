"""How many processes read and decode data beside one that trains."""

from __future__ import annotations

import os

from .artifact import default_device
from .config import TrainerConfig

MOST = 8


def readers(config: TrainerConfig) -> int:
    """`trainer.workers`; by itself none where the model runs on the CPU, whose cores they would
    take from it, else one for each core that this process has beside its own, 8 at most."""
    if config.workers != "auto":
        return config.workers
    if "cpu" in (config.device, default_device()):
        return 0
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(0, min((os.cpu_count() or 1) // sharing - 1, MOST))
