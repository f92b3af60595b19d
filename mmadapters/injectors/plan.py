"""A `Plan` says which adapter modules act at which site."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from ..sites.acting import (
    Acting,
    ActsAsPrefix,
    ActsAsPrompt,
    ActsAsReadout,
    ActsOnBranch,
    ActsOnLeaf,
)

Kind = Literal["branch", "delta", "prefix", "prompt", "readout"]


@dataclass(eq=False)
class Plan:
    """The active adapter modules by canonical site name, in the order in which they act.

    Attributes:
        branch: modules that change the output of a sublayer, of a front layer or of an embedding,
            or the input of a block.
        delta: modules that change a linear map or a norm.
        prefix: modules that give keys and values to an attention.
        prompt: modules that append tokens to the input of a block.
        readout: modules that change the last state of a tower.
        stands_for: the composition from which the plan was made.
        copies: how many times the batch is repeated.
        starts: by tower, the block at whose input the batch is repeated.
    """

    branch: dict[str, tuple[ActsOnBranch, ...]] = field(default_factory=dict)
    delta: dict[str, tuple[ActsOnLeaf, ...]] = field(default_factory=dict)
    prefix: dict[str, tuple[ActsAsPrefix, ...]] = field(default_factory=dict)
    prompt: dict[str, tuple[ActsAsPrompt, ...]] = field(default_factory=dict)
    readout: dict[str, tuple[ActsAsReadout, ...]] = field(default_factory=dict)
    stands_for: Any = None
    copies: int = 1
    starts: dict[str, int] = field(default_factory=dict)
    _for_copies: Plan | None = field(default=None, init=False)

    @property
    def for_copies(self) -> Plan:
        """The same plan for a batch that has been repeated already; always the same object."""
        if self._for_copies is None:
            self._for_copies = dataclasses.replace(self, copies=1, starts={})
        return self._for_copies

    def add(self, kind: Kind, site: str, module: Acting) -> None:
        """Lets `module` act at `site`, after the modules that act there already."""
        table = getattr(self, kind)
        table[site] = (*table.get(site, ()), module)

    def entries(self) -> Iterable[tuple[Kind, str, nn.Module]]:
        """Yields every module with its kind and its site."""
        for kind in ("branch", "delta", "prefix", "prompt", "readout"):
            for site, modules in getattr(self, kind).items():
                for module in modules:
                    yield kind, site, module

    def clear(self) -> None:
        """Removes all modules, so that nothing acts any more wherever this plan is in use."""
        tables = (self.branch, self.delta, self.prefix, self.prompt, self.readout, self.starts)
        for table in tables:
            table.clear()
        self.stands_for, self.copies = None, 1

    def mapped(self, change: Callable[[Kind, str, nn.Module], Acting]) -> Plan:
        """Returns a plan in which every module is replaced by `change(kind, site, module)`."""
        plan = Plan()
        for kind, site, module in self.entries():
            plan.add(kind, site, change(kind, site, module))
        return plan


NOTHING = Plan()
