"""What stands in for the lower modules of a tower, so that a pass can start at one of its blocks.

The pass is the library's own: it makes masks and positions, pools and fills its output classes.
Only the modules in a tower's stem (what makes patches or frames) and its lower blocks are not run:
an `Interceptor` in the place of their `forward` asks the `Pass` of this thread what they give. What
no state was kept of is NaN, so that whatever reads it all the same cannot go unnoticed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..sites.sitemap import Stem, Tower
from .calls import first_input, first_output, with_first, with_first_input

if TYPE_CHECKING:
    from .installer import Runtime

# What a block of a tower gave, (B, N, D), by the tower's name and the block's number; -1 is what
# entered the first one.
States = dict[tuple[str, int], Tensor]
_LOCK = threading.Lock()


class Pass(Protocol):
    """What modules that are intercepted do, in the thread in which it is `local.passing`."""

    def stem(self, at: Interceptor, part: Stem, args: tuple, kwargs: dict) -> Any:
        """Of a module before the blocks of `at.tower`: its output."""

    def block(self, at: Interceptor, index: int, args: tuple, kwargs: dict) -> Any:
        """Of a block: its output."""

    def enter(self, tower: Tower, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Of what is about to enter a tower's first block: what does, None for the same."""


@dataclass(eq=False)
class Interceptor:
    """Stands for a module's `forward`, and runs it in threads that nothing passes through.

    `place`: the number of a block, or a part of the stem. `otherwise`: what stood there before,
    None for the class's own. `users`: how many passes of all threads it is there for.
    """

    runtime: Runtime
    module: nn.Module
    tower: Tower
    place: int | Stem
    otherwise: Any = None
    users: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        passing = self.runtime.local.passing
        if passing is None:
            return self.run(*args, **kwargs)
        if isinstance(self.place, Stem):
            return passing.stem(self, self.place, args, kwargs)
        return passing.block(self, self.place, args, kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if self.otherwise is not None:
            return self.otherwise(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


@dataclass(eq=False)
class ThresholdHook:
    """Shows a pass what enters a tower's first block, before all that changes it there."""

    runtime: Runtime
    tower: Tower
    passing: Pass

    # While a hook comes and goes, torch may call it in another thread without keyword arguments.
    def __call__(self, module: nn.Module, args: tuple, kwargs: Any = None) -> Any:
        if self.runtime.local.passing is not self.passing:
            return None
        return self.passing.enter(self.tower, args, kwargs or {})


def stand_for(module: nn.Module, forward: Any) -> None:
    """Lets `forward` stand for a module's own (None: nothing), below what intercepts it."""
    outer = module.__dict__.get("forward")
    if isinstance(outer, Interceptor):
        outer.otherwise = forward
    elif forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward


def stands_for(module: nn.Module) -> Any:
    """What stands for a module's own `forward` below what intercepts it; None if nothing does."""
    outer = module.__dict__.get("forward")
    return outer.otherwise if isinstance(outer, Interceptor) else outer


@contextlib.contextmanager
def passing(
    runtime: Runtime, through: Pass, blocks: Mapping[str, int], entered: Iterable[str]
) -> Iterator[None]:
    """Inside the block, in this thread, `through` is asked by the stems of some towers and by so
    many of their lowest blocks, and by what enters those of `entered`."""
    towers = [runtime.sites.towers[name] for name in blocks]
    intercepted = [
        _intercept(runtime, tower, module, place)
        for tower in towers
        for module, place in _places(tower, blocks[tower.name])
    ]
    handles = [
        _first(
            runtime.sites.towers[name], ThresholdHook(runtime, runtime.sites.towers[name], through)
        )
        for name in entered
    ]
    above, runtime.local.passing = runtime.local.passing, through
    try:
        yield
    finally:
        runtime.local.passing = above
        for handle in handles:
            handle.remove()
        for interceptor in intercepted:
            _release(interceptor)


def _places(tower: Tower, blocks: int) -> Iterator[tuple[nn.Module, int | Stem]]:
    for part in tower.stem:
        yield part.module, part
    for block in tower.blocks[:blocks]:
        yield block.module, block.index


def _first(tower: Tower, hook: ThresholdHook) -> Any:
    return tower.blocks[0].module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)


def put_first(tower: Tower) -> None:
    """Brings what shows this thread's pass the first block's input before hooks that came later."""
    if torch.compiler.is_compiling():
        return
    hooks: Any = tower.blocks[0].module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, ThresholdHook)]:
        hooks.move_to_end(key, last=False)


def _intercept(runtime: Runtime, tower: Tower, module: nn.Module, place: int | Stem) -> Interceptor:
    """The same object each time: torch.compile compiles anew for another."""
    with _LOCK:
        key = (tower.name, place if isinstance(place, int) else f"stem {place.index}")
        if key not in runtime.interceptors:
            runtime.interceptors[key] = Interceptor(runtime, module, tower, place)
        known = runtime.interceptors[key]
        present = module.__dict__.get("forward")
        if present is not known:
            known.otherwise, known.users = present, 0
            module.__dict__["forward"] = known
        known.users += 1
        return known


def _release(interceptor: Interceptor) -> None:
    with _LOCK:
        interceptor.users -= 1
        module = interceptor.module
        # Also what was put over it meanwhile: transformers 4 wraps it to collect states, and leaves
        # that there when a pass breaks off, as one does that has seen enough.
        if interceptor.users == 0 and "forward" in module.__dict__:
            _uncover(module, interceptor)


def _uncover(module: nn.Module, interceptor: Interceptor) -> None:
    if interceptor.otherwise is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = interceptor.otherwise


def remove(runtime: Runtime) -> None:
    """Takes away whatever intercepts a module of the encoder."""
    for interceptor in runtime.interceptors.values():
        if interceptor.module.__dict__.get("forward") is interceptor:
            _uncover(interceptor.module, interceptor)
    runtime.interceptors.clear()


def void(shape: Iterable[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN (0 of whole numbers) in every place of `shape`, in the memory of one number."""
    value = float("nan") if dtype.is_floating_point else 0
    return torch.full((), value, dtype=dtype, device=device).expand(*shape)


def stand_in(part: Stem, form: Any, args: tuple, kwargs: dict) -> Any:
    """What a part of the stem would give, but for its values. `form`: what it once gave, with
    tensors on the meta device."""
    x = first_input(args, kwargs)
    if part.convolution is None:

        def like(given: Any) -> Any:
            # Written to in place, behind padding: so it needs memory of its own.
            if not isinstance(given, Tensor):
                return given
            shape = (*x.shape[:-1], given.shape[-1])
            return void(shape, dtype=given.dtype, device=x.device).clone()

        return tree_map(like, form)
    convolution: Any = part.convolution
    sizes = [_steps(size, convolution, axis) for axis, size in enumerate(x.shape[2:])]
    shape = (x.shape[0], convolution.out_channels, *sizes)
    weight = convolution.weight
    given = void(shape, dtype=weight.dtype, device=weight.device)
    if isinstance(form, Tensor):
        return given
    # torchaudio's layers count along how long each utterance still is.
    lengths = args[1]
    if lengths is not None:
        lengths = _steps(lengths, convolution, 0).clamp(min=0)
    return given, lengths


def _steps(size: Any, convolution: Any, axis: int) -> Any:
    """How many steps a convolution makes along an axis of `size` (an int, or a tensor of them)."""
    kernel = convolution.dilation[axis] * (convolution.kernel_size[axis] - 1) + 1
    padding = convolution.padding
    if padding == "same":
        return size
    added = 0 if padding == "valid" else 2 * padding[axis]
    return (size + added - kernel) // convolution.stride[axis] + 1


@dataclass(eq=False)
class Kept:
    """How a tower can be resumed at block `block`.

    `layers`: whose states are kept; `dtypes` of these. `forms`: what each block gave, without its
    first tensor. `stem`: what each part of the stem gave, on the meta device.
    """

    tower: Tower
    block: int
    layers: tuple[int, ...]
    dtypes: dict[int, torch.dtype]
    forms: dict[int, Any]
    stem: dict[int, Any]


class Enough(BaseException):
    """All states are there; nothing behind them needs to run."""


@dataclass(eq=False)
class Capturing:
    """Keeps the states of towers; blocks above them hand on what they are given.

    Raises, when it runs:
        Enough: all of them are there.
    """

    kept: Mapping[str, Kept]
    states: States = field(default_factory=dict)

    def stem(self, at: Interceptor, part: Stem, args: tuple, kwargs: dict) -> Any:
        put_first(at.tower)
        return at.run(*args, **kwargs)

    def enter(self, tower: Tower, args: tuple, kwargs: dict) -> None:
        self._note(tower, -1, first_input(args, kwargs))

    def block(self, at: Interceptor, index: int, args: tuple, kwargs: dict) -> Any:
        kept = self.kept.get(at.tower.name)
        if kept is None:
            return at.run(*args, **kwargs)
        if index >= kept.block and index in kept.forms:
            return with_first(kept.forms[index], first_input(args, kwargs))
        output = at.run(*args, **kwargs)
        self._note(at.tower, index, first_output(output))
        return output

    def _note(self, tower: Tower, layer: int, state: Tensor) -> None:
        if layer not in self.kept[tower.name].layers:
            return
        state = state.detach()
        self.states[tower.name, layer] = state if tower.batch_first else state.transpose(0, 1)
        if all((kept.tower.name, kept.layers[-1]) in self.states for kept in self.kept.values()):
            raise Enough


@dataclass(eq=False)
class Resuming:
    """Gives what was kept, and NaN for what was not.

    Raises, when it runs:
        ValueError: the states are those of another batch.
    """

    kept: Mapping[str, Kept]
    states: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)

    def stem(self, at: Interceptor, part: Stem, args: tuple, kwargs: dict) -> Any:
        put_first(at.tower)
        kept = self.kept.get(at.tower.name)
        if kept is None:
            return at.run(*args, **kwargs)
        return stand_in(part, kept.stem[part.index], args, kwargs)

    def enter(self, tower: Tower, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        state = self._state(tower, -1, first_input(args, kwargs))
        return with_first_input(args, kwargs, state)

    def block(self, at: Interceptor, index: int, args: tuple, kwargs: dict) -> Any:
        kept = self.kept.get(at.tower.name)
        # Passes of other threads, or around this one, may intercept more than this one does.
        if kept is None or index >= kept.block:
            return at.run(*args, **kwargs)
        x = first_input(args, kwargs)
        if index in kept.layers:
            state = self._state(at.tower, index, x)
        else:
            state = void(x.shape, dtype=x.dtype, device=x.device)
        return with_first(kept.forms[index], state)

    def _state(self, tower: Tower, layer: int, x: Tensor) -> Tensor:
        state = self.states[tower.name, layer]
        state = state if tower.batch_first else state.transpose(0, 1)
        if state.shape != x.shape:
            raise ValueError(
                f"the states kept of tower {tower.name!r} have the shape {tuple(state.shape)} and "
                f"this batch gives {tuple(x.shape)}: they are of other examples, or of a batch "
                "that was padded differently"
            )
        return state.to(self.kept[tower.name].dtypes[layer])
