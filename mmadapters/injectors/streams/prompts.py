"""Prompts: they enter the blocks of a tower behind its tokens, and no output of a block has any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calls import first_input, first_output, with_first, with_first_input
from ..override import Override
from ..state import Prompted, State


@dataclass(eq=False)
class PromptedBlock(Override):
    """Appends the active prompts to the tokens that enter a block, and takes them off its output.

    The states of prompts that stay (shallow ones) go on to the next block through the thread's
    state. So the library, its hooks and its users read tokens of the tower's own number between the
    blocks.

    Attributes:
        site: the block.
        tower: the tower's name.
        index: the number of the block.
        last: the block is the tower's last one.
    """

    rank: ClassVar[int] = 1

    state: State
    site: str
    tower: str
    index: int
    last: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plan, prompted = self.state.plan(), self.state.local.prompted
        entering = plan.prompt.get(self.site, ())
        before = prompted.pop(self.tower, None) if prompted else None
        if before is None and not entering:
            return self.run(*args, **kwargs)
        x = first_input(args, kwargs)
        length = x.shape[1]
        states = x
        # Without the checks, a pass that ended early might leave its prompts to another one.
        if before is not None and before.plan is plan and before.index < self.index:
            if before.tokens is x:
                states = before.states
            elif before.tokens.shape == x.shape:
                states = torch.cat([x, before.states[:, length:]], dim=1)
        staying = states.shape[1]
        # Prompts that are removed first stand last, in whatever order they act.
        for adapter in sorted(entering, key=lambda adapter: adapter.replaces):
            states = torch.cat([states, adapter(states)], dim=1)
            staying += 0 if adapter.replaces else adapter.count
        count = states.shape[1] - length
        if not count:
            return self.run(*args, **kwargs)
        kwargs = {name: _extended(value, length, count) for name, value in kwargs.items()}
        args = tuple(_extended(value, length, count) for value in args)
        args, kwargs = with_first_input(args, kwargs, states)
        output = self.run(*args, **kwargs)
        states = first_output(output)
        tokens = states[:, :length]
        if staying > length and not self.last:
            states = states[:, :staying] if staying < length + count else states
            prompted[self.tower] = Prompted(plan, self.index, tokens, states)
        return with_first(output, tokens)


def _extended(value: Any, length: int, count: int) -> Any:
    """Returns an attention mask (B, H, N or 1, N) that also shows `count` more tokens; returns
    anything else unchanged."""
    if not isinstance(value, Tensor) or value.dim() != 4 or value.shape[-1] != length:
        return value
    rows = count if value.shape[-2] == length else 0
    return F.pad(value, (0, count, 0, rows), value=value.dtype == torch.bool)
