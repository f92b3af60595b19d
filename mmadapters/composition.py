"""Values that say which adapters act on the encoder, and how.

"a"              the adapter a
Stack("a", "b")  a, then b on what a left
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Stack:
    """Adapters one after another at every site: each acts on the output of the one before it."""

    members: tuple[str | Stack, ...]

    def __init__(self, *members: str | Stack) -> None:
        if not members:
            raise ValueError("a Stack needs at least one adapter")
        for member in members:
            if not isinstance(member, (str, Stack)):
                raise ValueError(f"a Stack holds adapter names and Stacks, not {member!r}")
        object.__setattr__(self, "members", members)
        names = list(self.names())
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"adapter {twice!r} stands twice in one Stack")

    def names(self) -> Iterator[str]:
        """Adapter names in the order in which they act."""
        for member in self.members:
            if isinstance(member, str):
                yield member
            else:
                yield from member.names()

    def __repr__(self) -> str:
        return f"Stack({', '.join(map(repr, self.members))})"


Composition = Stack
Setup = str | Stack | Iterable[str] | None


def parse(setup: Setup) -> Composition | None:
    """A composition from what a user may write: a name, several names, a composition or None."""
    if setup is None or isinstance(setup, Stack):
        return setup
    if isinstance(setup, str):
        return Stack(setup)
    if not isinstance(setup, Iterable):
        raise ValueError(f"adapters are given by name, not as {setup!r}")
    return Stack(*setup)
