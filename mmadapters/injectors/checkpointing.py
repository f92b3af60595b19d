"""Gradient checkpointing of a tower's blocks, the same for every library.

The libraries' own checkpointing works in train mode only (transformers), in which a frozen encoder
is not, or is re-entrant (transformers 4), which gives adapters on a frozen encoder no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .installer import Runtime
from .override import Override, overrides
from .state import State


@dataclass(eq=False)
class Checkpointed(Override):
    """Replaces a block's `forward`: keeps its inputs and computes the rest anew in backward.

    The adapters that acted act again then, whatever is active by that time, also in the thread of
    its own in which autograd runs on a GPU.
    """

    rank: ClassVar[int] = 0

    state: State

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.run(*args, **kwargs)
        plan, grids = self.state.plan(), self.state.grids()
        args = tuple(_unless_cache(value) for value in args)
        kwargs = {name: _unless_cache(value) for name, value in kwargs.items()}

        def again(*args: Any, **kwargs: Any) -> Any:
            with self.state.pinned(plan), self.state.seeing(grids):
                return self.run(*args, **kwargs)

        return checkpoint(again, *args, use_reentrant=False, **kwargs)


def _unless_cache(value: Any) -> Any:
    """Returns None for a decoder's cache of keys and values, and any other value unchanged.

    A second run would add to the cache again.
    """
    return None if hasattr(value, "get_seq_length") else value


def enable(runtime: Runtime) -> None:
    """Checkpoints every block of every tower."""
    for block in runtime.sites.blocks():
        if not _checkpointed(block.module):
            Checkpointed(block.module, runtime.state).put()


def disable(runtime: Runtime) -> None:
    """Gives every block its own `forward` back."""
    for block in runtime.sites.blocks():
        for checkpointed in _checkpointed(block.module):
            checkpointed.remove()


def _checkpointed(block: nn.Module) -> list[Checkpointed]:
    return [other for other in overrides(block) if isinstance(other, Checkpointed)]
