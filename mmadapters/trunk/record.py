"""What a plain pass shows of how to resume a tower: what its modules give, and who reads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map

from ..injectors.calls import first_input, first_output, with_first
from ..injectors.intercept import Interceptor, put_first
from ..sites.sitemap import Stem, Tower

if TYPE_CHECKING:
    from ..injectors.installer import Plan, Runtime

# Their hooks stay on blocks once hidden states were asked for, and do nothing at other times.
_RECORDERS = "transformers.utils.output_capturing"


def reads_layers(plan: Plan, tower: Tower) -> bool:
    """Whether something acts on what a tower gives last that reads what its blocks gave."""
    return bool(plan.readout.keys() & {tower.name, tower.blocks[-1].name})


class Noted(dict[int, Tensor]):
    """States by layer that note which of them were read."""

    def __init__(self, states: dict[int, Tensor], read: set[int]) -> None:
        super().__init__(states)
        self.read = read

    def __getitem__(self, layer: int) -> Tensor:
        self.read.add(layer)
        return super().__getitem__(layer)

    def get(self, layer: int, default: Any = None) -> Any:
        self.read.add(layer)
        return super().get(layer, default)

    def items(self) -> Any:
        self.read.update(self)
        return super().items()

    def values(self) -> Any:
        self.read.update(self)
        return super().values()


@dataclass(eq=False)
class Seen:
    """Of one tower, as it ran.

    `order`: the blocks that ran. `turns`: another tower that ran between two of them. `bound`: the
    first block whose input is not what the one before it gave. `handed`: the first block that hands
    on more than one tensor. `trained`: what enters the first block requires gradients. `read`: the
    layers that something above reads, apart from those that `held` tells of: each layer's memory,
    as long as someone keeps it. `forms`: what each block gave, without its first tensor; `stem`:
    what each part of the stem gave, on the meta device.
    """

    tower: Tower
    order: list[int] = field(default_factory=list)
    turns: str | None = None
    bound: int | None = None
    handed: int | None = None
    trained: bool = False
    read: set[int] = field(default_factory=set)
    held: dict[int, StorageWeakRef] = field(default_factory=dict)
    forms: dict[int, Any] = field(default_factory=dict)
    dtypes: dict[int, torch.dtype] = field(default_factory=dict)
    stem: dict[int, Any] = field(default_factory=dict)
    last: Tensor | None = None


@dataclass(eq=False)
class Recording:
    """A `Pass` that changes nothing."""

    runtime: Runtime
    seen: dict[str, Seen]
    latest: str | None = None
    # A state that is still there when the block after the next one begins was kept by someone.
    collected: set[tuple[str, int]] = field(default_factory=set)

    @classmethod
    def of(cls, runtime: Runtime) -> Recording:
        return cls(runtime, {name: Seen(tower) for name, tower in runtime.sites.towers.items()})

    def stem(self, at: Interceptor, part: Stem, args: tuple, kwargs: dict) -> Any:
        put_first(at.tower)
        output = at.run(*args, **kwargs)
        self.seen[at.tower.name].stem[part.index] = tree_map(_form, output)
        return output

    def enter(self, tower: Tower, args: tuple, kwargs: dict) -> None:
        seen, x = self.seen[tower.name], first_input(args, kwargs)
        seen.last, seen.dtypes[-1] = x, x.dtype
        seen.held[-1] = _memory(x)
        seen.trained = seen.trained or x.requires_grad
        # Callers hold what enters while the blocks run: who reads it has to say so.
        if any(getattr(h, "reads_input", False) for h in _at_first(tower)):
            seen.read.add(-1)

    def block(self, at: Interceptor, index: int, args: tuple, kwargs: dict) -> Any:
        seen, x = self.seen[at.tower.name], first_input(args, kwargs)
        if seen.order and self.latest != at.tower.name:
            seen.turns = self.latest
        self.latest = at.tower.name
        seen.order.append(index)
        if seen.last is None or not _same(seen.last, x):
            seen.bound = index if seen.bound is None else min(seen.bound, index)
        seen.last = None
        if index > 1 and index - 2 in seen.held and not seen.held[index - 2].expired():
            self.collected.add((at.tower.name, index - 2))
        with torch.no_grad():
            output = at.run(*args, **kwargs)
        given = first_output(output)
        form = with_first(output, torch.empty(0, device="meta"))
        seen.forms[index] = form
        if seen.handed is None and sum(isinstance(p, Tensor) for p in tree_leaves(form)) > 1:
            seen.handed = index
        seen.last, seen.dtypes[index] = given, given.dtype
        seen.held[index] = _memory(given)
        if any(_reads(hook) for hook in at.module._forward_hooks.values()):
            seen.read.add(index)
        if index == len(at.tower.blocks) - 1:
            self._note_readouts(seen)
        return output

    def _note_readouts(self, seen: Seen) -> None:
        """Lets readouts, which act once the last block has run, say what they read."""
        states = self.runtime.local.states
        for site in (seen.tower.name, seen.tower.blocks[-1].name):
            if site in states:
                states[site] = Noted(states[site], seen.read)

    def reads(self, plan: Plan, name: str, block: int) -> Iterator[int]:
        """The layers below `block`'s input that something reads. To be asked while what the pass
        gave is still there."""
        seen = self.seen[name]
        yield from seen.read
        # A readout is given all states and so holds them, and has noted which ones it read.
        if reads_layers(plan, seen.tower):
            return
        collected = {layer for tower, layer in self.collected if tower == name}
        collected |= {
            layer
            for layer in (-1, block - 2)
            if layer in seen.held and not seen.held[layer].expired()
        }
        yield from collected
        collected -= seen.read
        if collected and block == len(seen.tower.blocks):
            # No block runs after which it would be gone if nobody kept it.
            yield block - 2
        if 0 in collected:
            # Who lists hidden states begins with what entered the first block.
            yield -1

    def forget(self) -> None:
        for seen in self.seen.values():
            seen.last = None


def _at_first(tower: Tower) -> list[Any]:
    """The hooks on what enters the first block."""
    return list(tower.blocks[0].module._forward_pre_hooks.values())


def _form(value: Any) -> Any:
    return value.new_empty(value.shape, device="meta") if isinstance(value, Tensor) else value


def _memory(x: Tensor) -> StorageWeakRef:
    return StorageWeakRef(x.untyped_storage())


def _same(given: Tensor, x: Tensor) -> bool:
    return given is x or (given.shape == x.shape and torch.equal(given, x))


def _reads(hook: Any) -> bool:
    """Whether a hook on a block's output may read it; the runtime's own are known."""
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return home != _RECORDERS and not home.startswith(f"{__package__}.")
