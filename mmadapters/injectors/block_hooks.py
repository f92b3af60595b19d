"""Hooks on blocks and towers: copies of the batch, prompts, and readouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calls import first_input, first_output, with_first, with_first_input
from .state import Hook


@dataclass(eq=False)
class CopyHook(Hook):
    """Repeats the batch that enters the first adapted block of `tower`, and the arguments that come
    with it there and further up (masks, the states of another tower).

    Attributes:
        index: the number of the hooked block.
        crossed: the tower attends to another one, whose states may have been repeated already.
    """

    before = with_kwargs = first = True

    tower: str
    index: int
    crossed: bool

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        plan = self.state.plan()
        start = plan.starts.get(self.tower)
        if start is None or self.index < start:
            return None
        x = first_input(args, kwargs)
        copies, batch = plan.copies, x.shape[0]
        if self.index > start:
            batch //= copies

        def repeated(value: Any, name: str = "") -> Any:
            if isinstance(value, tuple):
                return tuple(map(repeated, value))
            if value is x:
                return x if self.index > start else _repeated(x, copies)
            # A tensor with two dimensions, (B, N), is repeated only if it is a padding mask.
            least = 2 if name == "attention_mask" else 3
            if not isinstance(value, Tensor) or value.dim() < least or len(value) == 1 != batch:
                return value
            # Masks, states and biases by sample or by sample and head are repeated; all else is
            # shared. T5's first block hands on biases of four dimensions, repeated already.
            carried_on = self.index > start and value.dim() == 4
            done = (self.crossed or carried_on) and value.shape[0] == copies * batch
            return value if done or value.shape[0] % batch else _repeated(value, copies)

        # WavLM's first block makes these for all others, which hand them on.
        carried = {"position_bias"} if self.index > start else set()
        kwargs = {k: v if k in carried else repeated(v, k) for k, v in kwargs.items()}
        return tuple(map(repeated, args)), kwargs


def _repeated(x: Tensor, copies: int) -> Tensor:
    return x.repeat(copies, *(1,) * (x.dim() - 1))


@dataclass(eq=False)
class PromptHook(Hook):
    """Appends the active prompts to the tokens that enter a block."""

    before = with_kwargs = True

    site: str

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        active = self.state.plan().prompt.get(self.site)
        if not active:
            return None
        x = first_input(args, kwargs)
        length = x.shape[1]
        # Prompts that are removed first stand last, in whatever order they act.
        for adapter in sorted(active, key=lambda adapter: adapter.replaces):
            x = torch.cat([x, adapter(x)], dim=1)
        count = x.shape[1] - length
        kwargs = {name: _extended(value, length, count) for name, value in kwargs.items()}
        args = tuple(_extended(value, length, count) for value in args)
        return with_first_input(args, kwargs, x)


def _extended(value: Any, length: int, count: int) -> Any:
    """Returns an attention mask (B, H, N or 1, N) that also shows `count` more tokens; returns
    anything else unchanged."""
    if not isinstance(value, Tensor) or value.dim() != 4 or value.shape[-1] != length:
        return value
    rows = count if value.shape[-2] == length else 0
    return F.pad(value, (0, count, 0, rows), value=value.dtype == torch.bool)


@dataclass(eq=False)
class UnpromptHook(Hook):
    """Removes from a block's output the prompts that the site's adapters appended.

    It runs before the block's other hooks, so that whatever reads the output finds no prompts.

    Attributes:
        site: the block into which the prompts were put.
        replaces: removes the prompts that later blocks replace, else those that stay to the end.
    """

    first = True

    site: str
    replaces: bool

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        active = self.state.plan().prompt.get(self.site, ())
        count = sum(adapter.count for adapter in active if adapter.replaces is self.replaces)
        if not count:
            return None
        tokens = first_output(output)
        return with_first(output, tokens[:, : tokens.shape[1] - count])


@dataclass(eq=False)
class StartHook(Hook):
    """Drops the block outputs of an earlier pass when a tower begins.

    LayerDrop may leave out any block of a pass, whose output would then be that of an earlier pass.
    """

    before = True

    site: str

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if self.state.plan().readout.get(self.site):
            self.state.local.states[self.site] = {}


@dataclass(eq=False)
class EntryHook(Hook):
    """Drops the block outputs of an earlier pass when the first block begins, and keeps the states
    that enter it."""

    before = with_kwargs = True

    site: str

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.state.plan().readout.get(self.site):
            self.state.local.states[self.site] = {-1: first_input(args, kwargs)}


@dataclass(eq=False)
class CollectHook(Hook):
    """Keeps the output of block `index` until its tower has run."""

    site: str
    index: int

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        # A library may run the blocks without their tower: then nothing reads them.
        states = self.state.local.states.get(self.site)
        if states is not None:
            states[self.index] = first_output(output)


@dataclass(eq=False)
class ReadoutHook(Hook):
    """Lets the active `Readout` modules act on a tower's last state."""

    site: str

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        states = self.state.local.states.pop(self.site, None)
        if not states:
            return None
        last = first_output(output)
        for adapter in self.state.plan().readout.get(self.site, ()):
            last = adapter(last, states=states)
        return with_first(output, last)
