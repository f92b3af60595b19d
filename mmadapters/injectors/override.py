"""Overrides stand in the place of a module's `forward`, one around another.

The hooks of a module run around all of its overrides, whoever put them there: so they see the same
inputs and outputs as the module's caller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn


@dataclass(eq=False)
class Override:
    """Replaces the `forward` of a module. Subclasses define `__call__`.

    Attributes:
        rank: an override of a higher rank stands around those of lower ranks.
        module: the module.
        otherwise: the `forward` that the override covers; None for that of the module's class.
    """

    rank: ClassVar[int]

    module: nn.Module
    otherwise: Any = field(default=None, kw_only=True)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the `forward` that the override covers."""
        if self.otherwise is not None:
            return self.otherwise(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def put(self) -> None:
        """Puts it on its module."""
        outer = None
        for other in overrides(self.module):
            if other.rank < self.rank:
                break
            outer = other
        if outer is None:
            self.otherwise = self.module.__dict__.get("forward")
            self.module.__dict__["forward"] = self
        else:
            self.otherwise, outer.otherwise = outer.otherwise, self

    def remove(self) -> None:
        """Takes it off its module, unless a `forward` of someone else covers it."""
        outer = None
        for other in overrides(self.module):
            if other is not self:
                outer = other
            elif outer is not None:
                outer.otherwise = self.otherwise
                return
            else:
                self.uncover()
                return

    def uncover(self) -> None:
        """Gives the module the `forward` that the override covers."""
        if self.otherwise is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.otherwise


def overrides(module: nn.Module) -> Iterator[Override]:
    """Yields the overrides of a module, the outermost first."""
    forward = module.__dict__.get("forward")
    while isinstance(forward, Override):
        yield forward
        forward = forward.otherwise
