"""`State`: what hooks read and write while an encoder with adapters runs.

It holds the model's active plan and, for each thread, a plan that may take precedence over it, and
the tensors that one hook leaves for another. Hooks know the state only, not the installer.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..sites.sitemap import Grid, Stem, Tower
from .plan import NOTHING, Plan

_GENERATIONS = itertools.count(1)


def _next_generation() -> str:
    """Returns a string that this process has not used before.

    What is compiled for one model's hooks must not run for those of another model, nor for hooks of
    the same model that have changed since.
    """
    return str(next(_GENERATIONS))


@dataclass(eq=False)
class ImageTokens:
    """The image tokens to which texts attend.

    Attributes:
        tokens: (B, N, D), one image for each text; None while there are none.
        given: the user passed them, so that no image tower replaces them. Then None means that
            texts attend to no image.
    """

    tokens: Tensor | None = None
    given: bool = False


class Intercepted(Protocol):
    """A module of the encoder whose `forward` is intercepted: see `intercept.Interceptor`."""

    module: nn.Module
    tower: Tower

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the `forward` that is intercepted."""


class Pass(Protocol):
    """Replaces the forward pass of intercepted modules in the thread in which it is set."""

    def stem(self, at: Intercepted, part: Stem, args: tuple, kwargs: dict) -> Any:
        """Returns the output of `part`, a module before the blocks of `at.tower`."""

    def block(self, at: Intercepted, index: int, args: tuple, kwargs: dict) -> Any:
        """Returns the output of block `index` of `at.tower`."""

    def enter(self, tower: Tower, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Returns the arguments with which the tower's first block is called, or None if `args` and
        `kwargs` are unchanged."""


class Prompted(NamedTuple):
    """The output of a block with the states of prompts that enter the next block too.

    Attributes:
        plan: the plan that was active.
        block: the number of the block.
        tokens: (B, N, D), the tokens that the block returned.
        states: (B, N + P, D), the same tokens, and the prompts behind them.
    """

    plan: Plan
    block: int
    tokens: Tensor
    states: Tensor


class ThreadState(threading.local):
    """The part of the state that each thread has for itself.

    Attributes:
        plan: takes precedence over the model's own plan; None for that one.
        stash: by site and name, tensors that one hook of a block leaves for a later one.
        memo: by the id of a module, the changed weights that its forward pass has computed.
        states: by site, the outputs of the blocks below a readout, by index of the block.
        rows: how many rows the inputs of this call have, if all of them were repeated for
            `Parallel`; else 0.
        prompted: by tower, the output of the block that ran last, if prompts go on behind it.
        image_tokens: the images to which texts attend now; None outside of such a call.
        passing: replaces the forward pass of intercepted modules; None if nothing does.
    """

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.stash: dict[tuple[str, str], Any] = {}
        self.memo: dict[int, dict[str, tuple[Tensor, Tensor | None]]] = {}
        self.states: dict[str, dict[int, Tensor]] = {}
        self.rows = 0
        self.prompted: dict[str, Prompted] = {}
        self.image_tokens: ImageTokens | None = None
        self.passing: Pass | None = None

    def __reduce__(self) -> tuple:
        return ThreadState, ()


class State:
    """The active plan of a model, and what its hooks keep between their calls.

    Attributes:
        active: the plan that acts in threads without a plan of their own.
        local: what each thread has for itself.
        generation: changes with the installed hooks, so that torch.compile compiles anew.
    """

    def __init__(self) -> None:
        self.active: Plan = NOTHING
        self.local = ThreadState()
        # A string: torch.compile guards it by value, so that installing hooks recompiles.
        self.generation = _next_generation()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.generation = _next_generation()

    def plan(self) -> Plan:
        """Returns the plan that is active in this thread."""
        # Compared, not just read: only then does torch.compile guard it. It guards no hooks.
        if self.generation == "":
            raise RuntimeError("this model has lost its hooks")
        above = self.local.plan
        return self.active if above is None else above

    @contextlib.contextmanager
    def pinned(self, plan: Plan) -> Iterator[None]:
        """Inside the block, in this thread alone, `plan` is active."""
        local = self.local
        above = local.plan
        local.plan = plan
        try:
            yield
        finally:
            local.plan = above

    def grids(self) -> dict[tuple[str, str], Grid]:
        """Returns the patch grids of the images that are being encoded, by where they are read."""
        return {key: grid for key, grid in self.local.stash.items() if key[1] == "grid"}

    @contextlib.contextmanager
    def seeing(self, grids: Mapping[tuple[str, str], Grid]) -> Iterator[None]:
        """Inside the block, in this thread, hooks read `grids`.

        Afterwards the grids from before are back, without those that were read in the block.
        """
        stash = self.local.stash
        before = {key: stash[key] for key in grids if key in stash}
        stash.update(grids)
        try:
            yield
        finally:
            for key in grids:
                if stash.pop(key, None) is not None and key in before:
                    stash[key] = before[key]

    def recompile(self) -> None:
        """Makes torch.compile compile anew whatever it has compiled of the encoder so far."""
        self.generation = _next_generation()

    def reset(self) -> None:
        """Lets nothing act any more, and drops what all threads have kept."""
        self.active = NOTHING
        self.local = ThreadState()


@dataclass(eq=False)
class Hook:
    """Base class of the hooks that an installer puts on modules of the encoder.

    Subclasses define `__call__` with the arguments that torch passes to a hook of their kind.

    Attributes:
        before: the hook runs before the module's forward pass, else after it.
        with_kwargs: the hook is also given the keyword arguments of the call.
        first: the hook runs before the module's other hooks of the same kind.
    """

    before: ClassVar[bool] = False
    with_kwargs: ClassVar[bool] = False
    first: ClassVar[bool] = False

    state: State

    def register(self, module: nn.Module) -> RemovableHandle:
        """Puts the hook on `module`."""
        put: Any = module.register_forward_pre_hook if self.before else module.register_forward_hook
        return put(self, prepend=self.first, with_kwargs=self.with_kwargs)
