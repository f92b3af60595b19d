"""Overrides stand in the place of a module's `forward` or another method, one around another.

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
    """Replaces a method of a module. Subclasses define `__call__`.

    Attributes:
        rank: an override of a higher rank stands around those of lower ranks.
        module: the module.
        method: the name of the method.
        otherwise: what the override covers; None for the method of the module's class.
    """

    rank: ClassVar[int]

    module: nn.Module
    method: str = field(default="forward", kw_only=True)
    otherwise: Any = field(default=None, kw_only=True)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Runs what the override covers."""
        if self.otherwise is not None:
            return self.otherwise(*args, **kwargs)
        return getattr(type(self.module), self.method)(self.module, *args, **kwargs)

    def put(self) -> None:
        """Puts it on its module."""
        outer = None
        for other in overrides(self.module, self.method):
            if other.rank < self.rank:
                break
            outer = other
        if outer is None:
            self.otherwise = self.module.__dict__.get(self.method)
            self.module.__dict__[self.method] = self
        else:
            self.otherwise, outer.otherwise = outer.otherwise, self

    def remove(self) -> None:
        """Takes it off its module, unless a wrapper of someone else covers it."""
        outer = None
        for other in overrides(self.module, self.method):
            if other is not self:
                outer = other
            elif outer is not None:
                outer.otherwise = self.otherwise
                return
            else:
                self.uncover()
                return

    def uncover(self) -> None:
        """Gives the module the method that the override covers."""
        if self.otherwise is None:
            del self.module.__dict__[self.method]
        else:
            self.module.__dict__[self.method] = self.otherwise


def overrides(module: nn.Module, method: str = "forward") -> Iterator[Override]:
    """Yields the overrides of a module's method, the outermost first."""
    override = module.__dict__.get(method)
    while isinstance(override, Override):
        yield override
        override = override.otherwise
