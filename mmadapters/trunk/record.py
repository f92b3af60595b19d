"""A plain pass that shows how a tower can be resumed: what its modules give, and who reads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map

from ..injectors.calls import first_input, first_output, with_first
from ..injectors.installer import Runtime
from ..injectors.intercept import put_first
from ..injectors.plan import Plan
from ..injectors.state import Hook, Intercepted, State
from ..sites.sitemap import Stem, Tower

# The hooks of this module stay on blocks once hidden states were asked for, and do nothing at other
# times.
_RECORDERS = "transformers.utils.output_capturing"


def reads_layers(plan: Plan, tower: Tower) -> bool:
    """Says whether a module of the plan acts on the tower's last state and reads the outputs of its
    blocks."""
    return bool(plan.readout.keys() & {tower.name, tower.blocks[-1].name})


class WatchedStates(dict[int, Tensor]):
    """A dict of states by layer, which adds every layer that is read to the set `read`."""

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
class TowerRecord:
    """Records how one tower ran in a pass.

    Attributes:
        order: the blocks that ran.
        turns: another tower that ran between two of them.
        bound: the first block whose input is not the output of the block before it.
        handed: the first block that hands on more than one tensor.
        trained: the input of the first block requires gradients.
        read: the layers that something above reads, apart from those that `held` tells of.
        held: by layer, the memory of its state, which lives as long as someone keeps the state.
        outputs: by block, its output with an empty first tensor.
        dtypes: by layer, the dtype of its state; -1 is the input of the first block.
        stem: by number of a part of the stem, its output with tensors on the meta device.
        last: the input that the next block is expected to have.
    """

    tower: Tower
    order: list[int] = field(default_factory=list)
    turns: str | None = None
    bound: int | None = None
    handed: int | None = None
    trained: bool = False
    read: set[int] = field(default_factory=set)
    held: dict[int, StorageWeakRef] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)
    dtypes: dict[int, torch.dtype] = field(default_factory=dict)
    stem: dict[int, Any] = field(default_factory=dict)
    last: Tensor | None = None


@dataclass(eq=False)
class RecordPass:
    """A `Pass` that changes nothing and records how each tower runs.

    Attributes:
        records: by tower.
        latest: the tower whose block ran last.
        collected: (tower, layer) of states that were still there when the block after the next one
            began: someone keeps them.
    """

    state: State
    records: dict[str, TowerRecord]
    latest: str | None = None
    collected: set[tuple[str, int]] = field(default_factory=set)

    @classmethod
    def of(cls, runtime: Runtime) -> RecordPass:
        """Makes an empty record for each tower of an encoder."""
        records = {name: TowerRecord(tower) for name, tower in runtime.sites.towers.items()}
        return cls(runtime.state, records)

    def stem(self, at: Intercepted, part: Stem, args: tuple, kwargs: dict) -> Any:
        put_first(at.tower)
        output = at.run(*args, **kwargs)
        self.records[at.tower.name].stem[part.index] = tree_map(_on_meta, output)
        return output

    def enter(self, tower: Tower, args: tuple, kwargs: dict) -> None:
        record, x = self.records[tower.name], first_input(args, kwargs)
        record.last, record.dtypes[-1] = x, x.dtype
        record.held[-1] = _memory(x)
        record.trained = record.trained or x.requires_grad
        # Callers hold this input while the blocks run: a hook that reads it has to say so.
        if any(getattr(hook, "reads_input", False) for hook in _first_hooks(tower)):
            record.read.add(-1)

    def block(self, at: Intercepted, index: int, args: tuple, kwargs: dict) -> Any:
        record, x = self.records[at.tower.name], first_input(args, kwargs)
        if record.order and self.latest != at.tower.name:
            record.turns = self.latest
        self.latest = at.tower.name
        record.order.append(index)
        if record.last is None or not _same(record.last, x):
            record.bound = index if record.bound is None else min(record.bound, index)
        record.last = None
        if index > 1 and index - 2 in record.held and not record.held[index - 2].expired():
            self.collected.add((at.tower.name, index - 2))
        with torch.no_grad():
            output = at.run(*args, **kwargs)
        state = first_output(output)
        rest = with_first(output, torch.empty(0, device="meta"))
        record.outputs[index] = rest
        if record.handed is None and sum(isinstance(p, Tensor) for p in tree_leaves(rest)) > 1:
            record.handed = index
        record.last, record.dtypes[index] = state, state.dtype
        record.held[index] = _memory(state)
        if any(_reads(hook) for hook in at.module._forward_hooks.values()):
            record.read.add(index)
        if index == len(at.tower.blocks) - 1:
            self._watch_readouts(record)
        return output

    def _watch_readouts(self, record: TowerRecord) -> None:
        """Records what readouts read, which act once the last block has run."""
        states = self.state.local.states
        for site in (record.tower.name, record.tower.blocks[-1].name):
            if site in states:
                states[site] = WatchedStates(states[site], record.read)

    def reads(self, plan: Plan, name: str, block: int) -> Iterator[int]:
        """Yields the layers below the input of `block` of tower `name` that something reads.

        Call it while the output of the pass is still there.
        """
        record = self.records[name]
        yield from record.read
        # A readout is given all states and so holds them; those that it read are recorded.
        if reads_layers(plan, record.tower):
            return
        collected = {layer for tower, layer in self.collected if tower == name}
        collected |= {
            layer
            for layer in (-1, block - 2)
            if layer in record.held and not record.held[layer].expired()
        }
        yield from collected
        collected -= record.read
        if collected and block == len(record.tower.blocks):
            # No block runs after which it would be gone if nobody kept it.
            yield block - 2
        if 0 in collected:
            # A list of hidden states begins with the input of the first block.
            yield -1

    def forget(self) -> None:
        """Drops the tensors that the records hold."""
        for record in self.records.values():
            record.last = None


def _first_hooks(tower: Tower) -> list[Any]:
    """Returns the hooks on the input of the first block."""
    return list(tower.blocks[0].module._forward_pre_hooks.values())


def _on_meta(value: Any) -> Any:
    return value.new_empty(value.shape, device="meta") if isinstance(value, Tensor) else value


def _memory(x: Tensor) -> StorageWeakRef:
    return StorageWeakRef(x.untyped_storage())


def _same(output: Tensor, x: Tensor) -> bool:
    return output is x or (output.shape == x.shape and torch.equal(output, x))


def _reads(hook: Any) -> bool:
    """Says whether a hook on a block's output may read it; the hooks of adapters are known."""
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return home != _RECORDERS and not isinstance(hook, Hook)
