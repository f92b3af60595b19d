"""An adapter for each sample of one batch, in one pass.

`Routed` stands at a site for the modules of several adapters. An index says which sample belongs to
which. Modules of one kind are stacked (`stacked.py`); any other module acts on its own rows, and
the result is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..injectors.raw_attention import gate_columns
from ..methods.base import CombinedBranch, reads_of
from ..sites.acting import (
    READS,
    ActsAsPrefix,
    ActsAsReadout,
    ActsOnBranch,
    ActsOnLeaf,
    Context,
    Read,
)
from ..sites.sitemap import Leaf
from .mixed import CombinedDelta
from .stacked import ModuleStack, StackPlaces, stack_of

# Gives the member of every sample of a batch of a size, -1 for none.
Index = Callable[[int], list[int]]
M = TypeVar("M")


@dataclass(eq=False)
class Routed(Generic[M]):
    """The members of a composition at one site, each acting on its own samples.

    Attributes:
        members: by member, its modules in the order in which they act.
        index: gives the member of every sample.

    Raises, when it runs:
        ValueError: the batch has another length than the composition.
    """

    site: str
    members: list[list[M]]
    index: Index
    groups: list[_Group] = field(init=False)
    _placed: dict[tuple[int, torch.device], list[_Placed]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.groups = _grouped(self.members)

    def placed(self, batch: int, device: torch.device) -> list[_Placed]:
        """Returns each group with the rows that it acts on, and the place of each in its stack."""
        key = (batch, device)
        if key not in self._placed:
            owner = self.index(batch)
            placed = []
            for group in self.groups:
                rows = [row for row, member in enumerate(owner) if member in group.places]
                if not rows:
                    continue
                others = any(
                    member >= 0 and self.members[member] and member not in group.places
                    for member in owner
                )
                whole = group.stack is not None and not others
                if whole:
                    rows = list(range(batch))
                places = [group.places.get(owner[row], len(group.modules)) for row in rows]
                placed.append(
                    _Placed(
                        group,
                        None if len(rows) == batch else torch.tensor(rows, device=device),
                        StackPlaces(places, device),
                    )
                )
            self._placed[key] = placed
        return self._placed[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_placed": {}}


@dataclass(eq=False)
class _Placed:
    """A group and the rows of a batch that it acts on. `rows`: None for the whole batch."""

    group: _Group
    rows: Tensor | None
    places: StackPlaces

    def take(self, x: Tensor) -> Tensor:
        """x: (B, ...) -> its rows."""
        return x if self.rows is None else x.index_select(0, self.rows)

    def around(self, context: Context, reads: frozenset[Read]) -> Context:
        """Returns the rows of the fields that are read; a grid is that of all samples."""
        if self.rows is None:
            return context
        rows: list[Any] = [
            None if name not in reads else self.take(value) if isinstance(value, Tensor) else value
            for name, value in zip(READS, context, strict=True)
        ]
        return Context(*rows)

    def put(self, x: Tensor, changed: Tensor) -> Tensor:
        """Returns x (B, ...) with `changed` in its rows."""
        return changed if self.rows is None else x.index_copy(0, self.rows, changed.to(x.dtype))


@dataclass(eq=False)
class _Group:
    """Members that one stack serves, or one member that acts alone (`stack` is None).

    `places`: the place of each member in the stack.
    """

    places: dict[int, int]
    modules: list[Any]
    stack: ModuleStack | None


def _grouped(members: list[list[Any]]) -> list[_Group]:
    groups: dict[Any, _Group] = {}
    for index, modules in enumerate(members):
        if not modules:
            continue
        kind = stack_of(modules)
        key = ("alone", index) if kind is None else kind
        if key not in groups:
            groups[key] = _Group({}, [], None)
        group = groups[key]
        same = [place for place, known in enumerate(group.modules) if known is modules[0]]
        group.places[index] = same[0] if same and kind is not None else len(group.modules)
        if kind is None:
            group.modules = modules
        elif not same:
            group.modules.append(modules[0])
    for key, group in groups.items():
        if key[0] != "alone":
            group.stack = key[0](group.modules)
    return list(groups.values())


@dataclass(eq=False)
class RoutedBranch(Routed[ActsOnBranch], CombinedBranch):
    """Branches, each on its samples."""

    reads: frozenset[Read] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reads = reads_of(module for modules in self.members for module in modules)

    def __call__(self, branch: Tensor, context: Context) -> Tensor:
        for placed in self.placed(len(branch), branch.device):
            part, around = placed.take(branch), placed.around(context, self.reads)
            if placed.group.stack is not None:
                part = placed.group.stack.on_branch(placed.places, part, around)
            else:
                for module in placed.group.modules:
                    part = module(part, around)
            branch = placed.put(branch, part)
        return branch


class RoutedDelta(Routed[ActsOnLeaf], CombinedDelta):
    """Deltas of one leaf, each on its samples; no single weight equals them."""

    as_weight = False

    @property
    def scales_input(self) -> bool:
        return any(module.scales_input for modules in self.members for module in modules)

    def enter(self, x: Tensor) -> Tensor:
        for placed in self.placed(len(x), x.device):
            if not any(module.scales_input for module in placed.group.modules):
                continue
            part = placed.take(x)
            if placed.group.stack is not None:
                part = placed.group.stack.enter(placed.places, part)
            else:
                for module in placed.group.modules:
                    part = module.enter(part) if module.scales_input else part
            x = placed.put(x, part)
        return x

    def __call__(self, y: Tensor, x: Tensor, leaf: Leaf) -> Tensor:
        for placed in self.placed(len(y), y.device):
            part, read = placed.take(y), placed.take(x)
            if placed.group.stack is not None:
                part = placed.group.stack.on_leaf(placed.places, part, read, leaf)
            else:
                for module in placed.group.modules:
                    part = module(part, read, leaf)
            y = placed.put(y, part)
        return y


class RoutedReadout(Routed[ActsAsReadout]):
    """Readouts, each on its samples."""

    def __call__(self, last: Tensor, *, states: Mapping[int, Tensor]) -> Tensor:
        given = last
        for placed in self.placed(len(last), last.device):
            part = placed.take(given)
            taken = {index: placed.take(state) for index, state in states.items()}
            for module in placed.group.modules:
                part = module(part, states=taken)
            last = placed.put(last, part)
        return last


@dataclass(eq=False)
class RoutedPrefix(Routed[ActsAsPrefix]):
    """Prefixes, each for its samples: shorter prefixes are filled up and hidden."""

    _rows: dict[tuple[int, torch.device], dict[int, Tensor]] = field(
        init=False, default_factory=dict
    )

    def rows_of(self, batch: int, device: torch.device) -> dict[int, Tensor]:
        """Returns the samples of each member that has prefixes and samples."""
        key = (batch, device)
        if key not in self._rows:
            owner = self.index(batch)
            rows = {
                member: [row for row, other in enumerate(owner) if other == member]
                for member, modules in enumerate(self.members)
                if modules
            }
            self._rows[key] = {
                member: torch.tensor(each, device=device) for member, each in rows.items() if each
            }
        return self._rows[key]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, N, D) -> keys and values (B, P, D), and what is added to their scores (B, N, P).

        P is the length of the longest prefix.
        """
        batch, tokens, _ = x.shape
        given = {m: self._joined(modules, x) for m, modules in enumerate(self.members) if modules}
        length = max(keys.shape[-2] for keys, _, _ in given.values())
        width = next(iter(given.values()))[0].shape[-1]
        keys, values = x.new_zeros(batch, length, width), x.new_zeros(batch, length, width)
        scores = x.new_full((batch, tokens, length), -torch.inf)
        for member, at in self.rows_of(batch, x.device).items():
            behind = length - given[member][0].shape[-2]
            picked = (
                part.expand(len(at), -1, -1) if len(part) == 1 else part.index_select(0, at)
                for part in given[member]
            )
            key, value, shown = picked
            pad = (0, 0, 0, behind)
            keys = keys.index_copy(0, at, F.pad(key, pad).to(keys.dtype))
            values = values.index_copy(0, at, F.pad(value, pad).to(values.dtype))
            shown = F.pad(shown, (0, behind), value=-torch.inf)
            scores = scores.index_copy(0, at, shown.to(scores.dtype))
        return keys, values, scores

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_rows": {}}

    @staticmethod
    def _joined(modules: list[ActsAsPrefix], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns keys, values (1 or B, P, D) and scores (B, N, P) of one member's prefixes."""
        keys, values, scores = [], [], []
        for key, value, gate in (module(x) for module in modules):
            keys.append(key if key.dim() == 3 else key[None])
            values.append(value if value.dim() == 3 else value[None])
            scores.append(gate_columns(gate, key.shape[-2], x))
        return torch.cat(keys, dim=1), torch.cat(values, dim=1), torch.cat(scores, dim=-1)
