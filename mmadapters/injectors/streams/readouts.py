"""Hooks that let readouts act on a tower's last state and see the outputs of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..calls import first_input, first_output, with_first
from ..state import Hook


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


@dataclass(eq=False)
class SideHook(ReadoutHook):
    """Lets the active `Readout` modules act on the output of a tower's last block.

    It runs before the block's other hooks, so that all of them see the same output.

    Attributes:
        index: the number of that block.
    """

    first = True

    index: int

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        states = self.state.local.states.get(self.site)
        if states is not None:
            states[self.index] = first_output(output)
        return super().__call__(module, args, output)
