"""Reads and changes the states between the blocks of a tower during a forward pass."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmadapters.sites.sitemap import Tower


class AllStatesRead(Exception):
    """Ends a forward pass after the last requested block."""


# Maps the input (B, N, D) of a block and the number of its tokens without prompts to another input.
StateChange = Callable[[Tensor, int], Tensor]


class BlockStates:
    """Records the outputs of a tower's blocks, in this thread, inside a `with` block.

    Hooks are around the blocks, so the outputs include adapters. Prompts follow the tokens that
    entered the first block.

    Attributes:
        entered: input (B, N, D) of the first block that runs, without prompts; None before it ran.
        states: output (B, N, D) of each requested block that has run, by its number.
    """

    def __init__(
        self,
        tower: Tower,
        layers: Sequence[int],
        *,
        stop: bool = False,
        changes: Mapping[int, StateChange] | None = None,
        reads_entered: bool = False,
        skips: bool = False,
    ) -> None:
        """Prepares the hooks; entering the `with` block installs them.

        Args:
            layers: numbers of the requested blocks, from 0.
            stop: whether to raise `AllStatesRead` after the last requested block.
            changes: changes of the inputs of blocks, by their number.
            reads_entered: whether more than the shape of `entered` is read, so that a `FrozenTrunk`
                must store it, too.
            skips: whether LayerDrop may leave out blocks, also the first one.
        """
        self.blocks = tower.blocks
        self.layers = layers
        self.stop = stop
        self.changes = changes or {}
        self.reads_entered = reads_entered
        self.skips = skips
        self.entered: Tensor | None = None
        self.states: dict[int, Tensor] = {}
        self._thread = threading.get_ident()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> BlockStates:
        for layer, change in self.changes.items():
            self._handles.append(
                self.blocks[layer].module.register_forward_pre_hook(
                    self._changed(change), prepend=True, with_kwargs=True
                )
            )
        enters: Any = functools.partial(self._enters)
        enters.reads_input = self.reads_entered
        # It must run before the hook that appends prompts and before that of a change.
        for block in self.blocks if self.skips else self.blocks[:1]:
            self._handles.append(
                block.module.register_forward_pre_hook(enters, prepend=True, with_kwargs=True)
            )
        for layer in dict.fromkeys(self.layers):
            self._handles.append(
                self.blocks[layer].module.register_forward_hook(self._record(layer))
            )
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    # While a hook is added or removed, torch may call it in another thread without `kwargs`.
    def _enters(self, module: nn.Module, args: tuple, kwargs: Any = None) -> None:
        if threading.get_ident() == self._thread and (self.entered is None or not self.skips):
            self.entered = args[0] if args else kwargs["hidden_states"]

    def _changed(self, change: StateChange) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple, kwargs: Any = None) -> Any:
            if threading.get_ident() != self._thread:
                return None
            assert self.entered is not None
            length = self.entered.shape[1]
            if args:
                return (change(args[0], length), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"], length)}

        return hook

    def _record(self, layer: int) -> Callable[[nn.Module, tuple, Any], None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if threading.get_ident() == self._thread:
                self.states[layer] = output if isinstance(output, Tensor) else output[0]
                if self.stop and layer == max(self.layers):
                    raise AllStatesRead

        return hook
