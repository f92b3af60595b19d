"""Gradient checkpointing of a tower's blocks, the same for every library.

The libraries' own checkpoints only in train mode (transformers), where a frozen trunk is not, or
re-entrantly (transformers 4), which gives a frozen trunk's adapters no gradient at all.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .installer import Runtime
from .intercept import stand_for, stands_for


@dataclass(eq=False)
class Checkpointed:
    """Stands for a block's `forward`: keeps its inputs and computes the rest anew for backward.

    The adapters that acted act again then, whatever is active by that time, also in the thread of
    its own in which autograd runs on a GPU.
    """

    runtime: Runtime
    block: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = functools.partial(type(self.block).forward, self.block)
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        plan, grids = self.runtime.plan(), self.runtime.grids()
        args = tuple(_unless_cache(value) for value in args)
        kwargs = {name: _unless_cache(value) for name, value in kwargs.items()}

        def again(*args: Any, **kwargs: Any) -> Any:
            with self.runtime.pinned(plan), self.runtime.seeing(grids):
                return forward(*args, **kwargs)

        return checkpoint(again, *args, use_reentrant=False, **kwargs)


def _unless_cache(value: Any) -> Any:
    """None for a decoder's cache of keys and values, to which a second run would add again."""
    return None if hasattr(value, "get_seq_length") else value


def enable(runtime: Runtime) -> None:
    """Checkpoints every block of every tower."""
    for block in runtime.sites.blocks():
        stand_for(block.module, Checkpointed(runtime, block.module))


def disable(runtime: Runtime) -> None:
    """Gives every block its own `forward` back."""
    for block in runtime.sites.blocks():
        if isinstance(stands_for(block.module), Checkpointed):
            stand_for(block.module, None)
