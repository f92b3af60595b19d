"""The states that pass between the blocks of an encoder's tower, as it runs."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmadapters.sites.sitemap import Tower


class Reached(Exception):
    """All requested states are there; nothing behind them needs to run."""


# From the tokens that a block was given (B, N, D), and how many of them are no prompts, to others.
Change = Callable[[Tensor, int], Tensor]


class Watch:
    """Notes the states of a tower's blocks in this thread while it is entered.

    Hooks stand around the blocks, so adapters have acted in what is noted; prompts stand behind the
    tokens that entered the first block.

    Attributes:
        entered: what the first block was given, before prompts joined it; None until it ran.
        states: what each requested block gave, by its number.
    """

    def __init__(
        self,
        tower: Tower,
        layers: Sequence[int],
        *,
        stop: bool = False,
        changes: Mapping[int, Change] | None = None,
        reads_entered: bool = False,
    ) -> None:
        """
        Args:
            reads_entered: more than the shape of `entered` is looked at, so that a `FrozenTrunk`
                keeps it, too.
            stop: raise `Reached` after the last of the requested blocks.
            changes: of what is given to blocks, by their number.
        """
        self.blocks = tower.blocks
        self.layers = layers
        self.stop = stop
        self.changes = changes or {}
        self.reads_entered = reads_entered
        self.entered: Tensor | None = None
        self.states: dict[int, Tensor] = {}
        self._thread = threading.get_ident()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Watch:
        first = self.blocks[0].module
        for layer, change in self.changes.items():
            self._handles.append(
                self.blocks[layer].module.register_forward_pre_hook(
                    self._changed(change), prepend=True, with_kwargs=True
                )
            )
        enters: Any = functools.partial(self._enters)
        enters.reads_input = self.reads_entered
        # Before the hook that appends prompts, and before that of a change.
        self._handles.append(
            first.register_forward_pre_hook(enters, prepend=True, with_kwargs=True)
        )
        for layer in dict.fromkeys(self.layers):
            self._handles.append(self.blocks[layer].module.register_forward_hook(self._note(layer)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    # While a hook comes and goes, torch may call it in another thread without keyword arguments.
    def _enters(self, module: nn.Module, args: tuple, kwargs: Any = None) -> None:
        if threading.get_ident() == self._thread:
            self.entered = args[0] if args else kwargs["hidden_states"]

    def _changed(self, change: Change) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple, kwargs: Any = None) -> Any:
            if threading.get_ident() != self._thread:
                return None
            assert self.entered is not None
            length = self.entered.shape[1]
            if args:
                return (change(args[0], length), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"], length)}

        return hook

    def _note(self, layer: int) -> Callable[[nn.Module, tuple, Any], None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if threading.get_ident() == self._thread:
                self.states[layer] = output if isinstance(output, Tensor) else output[0]
                if self.stop and layer == max(self.layers):
                    raise Reached

        return hook
