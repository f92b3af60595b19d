"""Interceptors stand in for the stem and the lower blocks of a tower, so that these need not run.

The pass is the library's own: it makes masks and positions, pools and fills its output classes.
Only the modules in a tower's stem (which make patches or frames) and its lower blocks are not run:
an `Interceptor` in the place of their `forward` asks the `Pass` of this thread for their outputs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..sites.sitemap import SiteMap, Stem, Tower
from .override import Override
from .state import Pass, State

_LOCK = threading.Lock()


@dataclass(eq=False)
class Interceptor(Override):
    """Replaces a module's `forward`, and runs it in threads in which no `Pass` is set.

    Attributes:
        place: the number of a block, or a part of the stem.
        users: how many passes of all threads need the interceptor now.
    """

    rank: ClassVar[int] = 2

    state: State
    tower: Tower
    place: int | Stem
    users: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        passing = self.state.local.passing
        if passing is None:
            return self.run(*args, **kwargs)
        if isinstance(self.place, Stem):
            return passing.stem(self, self.place, args, kwargs)
        return passing.block(self, self.place, args, kwargs)


@dataclass(eq=False)
class FirstBlockHook:
    """Shows a pass the input of a tower's first block, before other hooks change it."""

    state: State
    tower: Tower
    passing: Pass

    # While a hook comes and goes, torch may call it in another thread without keyword arguments.
    def __call__(self, module: nn.Module, args: tuple, kwargs: Any = None) -> Any:
        if self.state.local.passing is not self.passing:
            return None
        return self.passing.enter(self.tower, args, kwargs or {})


class Interceptors:
    """The interceptors of an encoder: each is made once and used in all passes.

    Attributes:
        known: the interceptors by tower and place.
    """

    def __init__(self, state: State, sites: SiteMap) -> None:
        self.state, self.sites = state, sites
        self.known: dict[tuple[str, int | str], Interceptor] = {}

    @contextlib.contextmanager
    def passing(
        self, through: Pass, blocks: Mapping[str, int], entered: Iterable[str]
    ) -> Iterator[None]:
        """Inside the block, in this thread, `through` replaces the forward pass of modules.

        Args:
            blocks: by tower, how many of its lowest blocks are intercepted, besides its stem.
            entered: the towers of which `through` is shown the input of the first block.
        """
        towers = [self.sites.towers[name] for name in blocks]
        intercepted = [
            self._intercept(tower, module, place)
            for tower in towers
            for module, place in _places(tower, blocks[tower.name])
        ]
        handles = [self._show_input(self.sites.towers[name], through) for name in entered]
        above, self.state.local.passing = self.state.local.passing, through
        try:
            yield
        finally:
            self.state.local.passing = above
            for handle in handles:
                handle.remove()
            for interceptor in intercepted:
                _release(interceptor)

    def remove(self) -> None:
        """Removes all interceptors from the modules of the encoder."""
        for interceptor in self.known.values():
            if interceptor.module.__dict__.get("forward") is interceptor:
                interceptor.uncover()
        self.known.clear()

    def _intercept(self, tower: Tower, module: nn.Module, place: int | Stem) -> Interceptor:
        """Puts the place's interceptor on the module.

        It is the same object each time, as torch.compile compiles anew for another one.
        """
        with _LOCK:
            key = (tower.name, place if isinstance(place, int) else f"stem {place.index}")
            if key not in self.known:
                self.known[key] = Interceptor(module, self.state, tower, place)
            known = self.known[key]
            present = module.__dict__.get("forward")
            if present is not known:
                known.otherwise, known.users = present, 0
                module.__dict__["forward"] = known
            known.users += 1
            return known

    def _show_input(self, tower: Tower, through: Pass) -> RemovableHandle:
        hook = FirstBlockHook(self.state, tower, through)
        first = tower.blocks[0].module
        return first.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)


def put_first(tower: Tower) -> None:
    """Moves `FirstBlockHook`s before the hooks that the first block was given later."""
    if torch.compiler.is_compiling():
        return
    hooks: Any = tower.blocks[0].module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, FirstBlockHook)]:
        hooks.move_to_end(key, last=False)


def _places(tower: Tower, blocks: int) -> Iterator[tuple[nn.Module, int | Stem]]:
    for part in tower.stem:
        yield part.module, part
    for block in tower.blocks[:blocks]:
        yield block.module, block.index


def _release(interceptor: Interceptor) -> None:
    with _LOCK:
        interceptor.users -= 1
        module = interceptor.module
        # Also removes a `forward` that was put over it meanwhile: transformers 4 wraps it to
        # collect states, and leaves the wrapper there when a pass ends early.
        if interceptor.users == 0 and "forward" in module.__dict__:
            interceptor.uncover()
