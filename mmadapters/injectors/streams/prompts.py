"""Prompts: they enter the blocks of a tower behind its tokens, and no output of a block has any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...sites.acting import CHECKPOINTING, runs_again
from ..calls import first_input, first_output, with_first, with_first_input
from ..override import Override
from ..plan import Plan
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
        blocks: the sites of all blocks of the tower.
    """

    rank: ClassVar[int] = 1

    state: State
    site: str
    tower: str
    index: int
    blocks: tuple[str, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plan, prompted = self.state.plan(), self.state.local.prompted
        entering = plan.prompt.get(self.site, ())
        if not entering and not prompted and not runs_again():
            return self.run(*args, **kwargs)
        x = first_input(args, kwargs)
        length = x.shape[1]
        states = self._joined(x, plan)
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
        if staying > length and self.index < len(self.blocks) - 1:
            states = states[:, :staying] if staying < length + count else states
            prompted[self.tower] = Prompted(plan, self.index, tokens, states)
        return with_first(output, tokens)

    def _joined(self, x: Tensor, plan: Plan) -> Tensor:
        """Returns x (B, N, D), the block's input, with the prompts of the block before."""
        before = self.state.local.prompted.pop(self.tower, None)
        # A pass that ended early must not leave its prompts to another one.
        if before is not None and (before.plan is not plan or before.block >= self.index):
            before = None
        if before is not None and before.tokens is x:
            return before.states
        if self.index > 0 and runs_again():
            return self._stored(x, plan)
        if before is None or before.tokens.shape != x.shape:
            return x
        return torch.cat([x, before.states[:, x.shape[1] :]], dim=1)

    def _stored(self, x: Tensor, plan: Plan) -> Tensor:
        """Returns x with its prompts when the library's own gradient checkpointing runs the block
        again: there they stand behind the tokens of each sample in memory.

        Raises:
            RuntimeError: they do not.
        """
        active = (a for site in self.blocks[: self.index] for a in plan.prompt.get(site, ()))
        length = x.shape[1] + sum(a.count for a in active if not a.replaces)
        if length == x.shape[1]:
            return x
        size, stride = (x.shape[0], length, x.shape[2]), x.stride()
        end = x.storage_offset() + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        # A leaf is a copy that re-entrant checkpointing has made: no gradient reaches the prompts.
        if (
            stride[0] < length * stride[1]
            or end * x.element_size() >= x.untyped_storage().nbytes()
            or (x.is_leaf and x.requires_grad)
        ):
            raise RuntimeError(f"the prompts are gone in the backward pass: {CHECKPOINTING}")
        return x.as_strided(size, stride)


def _extended(value: Any, length: int, count: int) -> Any:
    """Returns an attention mask (B, H, N or 1, N) that also shows `count` more tokens; returns
    anything else unchanged."""
    if not isinstance(value, Tensor) or value.dim() != 4 or value.shape[-1] != length:
        return value
    rows = count if value.shape[-2] == length else 0
    return F.pad(value, (0, count, 0, rows), value=value.dtype == torch.bool)
