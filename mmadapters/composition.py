"""Values that say which adapters act on the encoder, and how.

    "a"                                   the adapter a
    Stack("a", "b")                       a, then b on what a left
    Fuse("a", "b")                        AdapterFusion: a learned attention over what a and b add
    Average("a", "b", weights=(3, 1))     the weighted mean of their outputs
    Split("a", "b", splits=(4,))          a on the first four tokens, b on the others
    BatchSplit("a", "b", batch_sizes=(2, 6))   a on the first two samples, b on the next six
    Route(("a", "b", "base", "a"))        an adapter for each sample of the batch, in any order
    Parallel("a", "b")                    every sample once with a and once with b, in one pass

They can be nested where that has a meaning; other nestings raise when they are written. "base" (or
None) is the encoder without any adapter. All names but `Route` are AdapterHub's (Poth et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .suggest import nearest

BASE = "base"


@dataclass(frozen=True)
class Composition:
    """The base class of all compositions."""

    # Adapter names, "base" and compositions.
    members: tuple[str | Composition, ...]

    # Its name in files.
    key: ClassVar[str]
    # The name of its option, in files and as an attribute, or None if it has none.
    option: ClassVar[str | None] = None
    # Whether "base" may be a member.
    base: ClassVar[bool] = False
    # The smallest number of members.
    least: ClassVar[int] = 2

    def __init__(self, *members: str | Composition | None) -> None:
        object.__setattr__(self, "members", tuple(BASE if m is None else m for m in members))
        name = type(self).__name__
        if len(self.members) < self.least:
            raise ValueError(f"{name} needs at least {_counted(self.least)}")
        for member in self.members:
            if not isinstance(member, (str, Composition)):
                raise ValueError(f"{name} holds adapter names and compositions, not {member!r}")
            if member == BASE and not self.base:
                raise ValueError(f"'{BASE}' is the encoder without adapters: {name} cannot hold it")
            for inner in _below(member):
                if not isinstance(inner, _HOLDS[self.key]):
                    raise ValueError(
                        f"{type(inner).__name__} cannot stand inside {name}: {_OUTSIDE[inner.key]}"
                    )
        self.check()

    def check(self) -> None:
        """Raises ValueError if the members or the option do not fit together."""

    def names(self) -> Iterator[str]:
        """Yields the names of its adapters, each once, in the order in which they are written."""
        names: dict[str, None] = {}
        for member in self.members:
            names.update(dict.fromkeys((member,) if isinstance(member, str) else member.names()))
        names.pop(BASE, None)
        yield from names

    def fusion_names(self) -> set[str]:
        """Returns the names of all AdapterFusions that take part in it."""
        return {part.name for part in _below(self) if isinstance(part, Fuse)}

    def to_data(self) -> Any:
        """Returns plain data for YAML and JSON, which `from_data` reads."""
        data: dict[str, Any] = {
            self.key: [m if isinstance(m, str) else m.to_data() for m in self.members]
        }
        value = None if self.option is None else getattr(self, self.option)
        if value is not None:
            data[str(self.option)] = list(value)
        return data

    def __repr__(self) -> str:
        parts = [*map(repr, self.members)]
        value = None if self.option is None else getattr(self, self.option)
        if value is not None:
            parts.append(f"{self.option}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"

    def _none_twice(self) -> None:
        """Raises ValueError if a member is given twice."""
        seen: set[str | Composition] = set()
        for member in self.members:
            if member in seen:
                what = f"adapter {member!r}" if isinstance(member, str) else repr(member)
                raise ValueError(f"{what} stands twice in one {type(self).__name__}")
            seen.add(member)


@dataclass(frozen=True, init=False, repr=False)
class Stack(Composition):
    """Adapters one after another at every site. Each acts on the output of the one before it."""

    key: ClassVar[str] = "stack"
    least: ClassVar[int] = 1

    def check(self) -> None:
        seen: set[str] = set()
        for member in self.members:
            names = {member} if isinstance(member, str) else set(member.names())
            if twice := sorted(names & seen):
                raise ValueError(f"adapter {twice[0]!r} stands twice in one Stack")
            seen |= names

    def to_data(self) -> Any:
        only = self.members[0]
        return only if len(self.members) == 1 and isinstance(only, str) else super().to_data()


@dataclass(frozen=True, init=False, repr=False)
class Fuse(Composition):
    """AdapterFusion (Pfeiffer et al. 2021) over adapter names and Stacks of them.

    `add_adapter_fusion` makes its parameters for the same members in the same order.
    """

    key: ClassVar[str] = "fuse"

    def check(self) -> None:
        self._none_twice()

    @property
    def name(self) -> str:
        """The fusion's name in the model and in files: `a,b`, or `a,b>c` for a Stack of b and c."""
        return ",".join(m if isinstance(m, str) else ">".join(m.names()) for m in self.members)


@dataclass(frozen=True, init=False, repr=False)
class Average(Composition):
    """The weighted mean of the members' outputs."""

    # One finite number for each member, divided by their sum, which must not be 0; None for equal
    # weights.
    weights: tuple[float, ...] | None = None

    key: ClassVar[str] = "average"
    option: ClassVar[str | None] = "weights"
    base: ClassVar[bool] = True

    def __init__(
        self, *members: str | Composition | None, weights: Sequence[float] | None = None
    ) -> None:
        object.__setattr__(self, "weights", None if weights is None else tuple(weights))
        super().__init__(*members)

    def check(self) -> None:
        self._none_twice()
        if self.weights is None:
            return
        _check_number_of(self, "weights", self.weights, len(self.members))
        for weight in self.weights:
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise ValueError(f"weights must be numbers, not {weight!r}")
            if not math.isfinite(weight):
                raise ValueError(f"weights must be finite, not {weight!r}")
        if abs(sum(self.weights)) < 1e-12:
            raise ValueError(
                "weights add up to 0, so that no mean can be taken; average_adapter adds and "
                "subtracts adapters by any weights"
            )

    def shares(self) -> tuple[float, ...]:
        """Returns the weights divided by their sum."""
        weights = self.weights or (1.0,) * len(self.members)
        return tuple(weight / sum(weights) for weight in weights)


@dataclass(frozen=True, init=False, repr=False)
class Split(Composition):
    """Members that each act on some of the tokens, one stretch after another."""

    # The number of tokens of each member, at least 0. The last may be left out: its member takes
    # all tokens that remain.
    splits: tuple[int, ...] = ()

    key: ClassVar[str] = "split"
    option: ClassVar[str | None] = "splits"
    base: ClassVar[bool] = True

    def __init__(self, *members: str | Composition | None, splits: Sequence[int]) -> None:
        object.__setattr__(self, "splits", tuple(splits))
        super().__init__(*members)

    def check(self) -> None:
        if len(self.splits) != len(self.members) - 1:
            _check_number_of(self, "splits", self.splits, len(self.members))
        _check_sizes("splits", self.splits)


@dataclass(frozen=True, init=False, repr=False)
class BatchSplit(Composition):
    """Members that each act on some samples of the batch, one stretch after another."""

    # The number of samples of each member, at least 0.
    batch_sizes: tuple[int, ...] = ()

    key: ClassVar[str] = "batch_split"
    option: ClassVar[str | None] = "batch_sizes"
    base: ClassVar[bool] = True

    def __init__(self, *members: str | Composition | None, batch_sizes: Sequence[int]) -> None:
        object.__setattr__(self, "batch_sizes", tuple(batch_sizes))
        super().__init__(*members)

    def check(self) -> None:
        _check_number_of(self, "batch_sizes", self.batch_sizes, len(self.members))
        _check_sizes("batch_sizes", self.batch_sizes)


@dataclass(frozen=True, init=False, repr=False)
class Route(Composition):
    """An adapter for each sample: `Route(["fr", "base", "de", "fr"])` for a batch of four."""

    key: ClassVar[str] = "route"
    base: ClassVar[bool] = True
    least: ClassVar[int] = 1

    def __init__(self, members: Iterable[str | Composition | None]) -> None:
        if isinstance(members, (str, Composition)):
            raise ValueError(f"Route takes a list with a member for each sample, not {members!r}")
        super().__init__(*members)

    def __repr__(self) -> str:
        return f"Route({list(self.members)!r})"


@dataclass(frozen=True, init=False, repr=False)
class Parallel(Composition):
    """Several tasks in one pass. The output has the shape (members x B, ...), member after member.

    The blocks below the first adapted one run once for all members.
    """

    key: ClassVar[str] = "parallel"
    base: ClassVar[bool] = True


_INSIDE: tuple[type[Composition], ...] = (Stack, Fuse, Average, Split)
# The compositions that may stand anywhere inside a composition, by its key.
_HOLDS: dict[str, tuple[type[Composition], ...]] = {
    "stack": (*_INSIDE, BatchSplit, Route),
    "fuse": (Stack,),
    "average": _INSIDE,
    "split": (Stack, Fuse, Average),
    "batch_split": _INSIDE,
    "route": _INSIDE,
    "parallel": _INSIDE,
}
# The advice of the error for a composition, by its key, that stands where it may not.
_OUTSIDE = {
    "stack": "write its members there one by one",
    "fuse": "it fuses adapters of one place; put a Stack or names there",
    "average": "put it around, or use Stack",
    "split": "splits of tokens do not nest; put it outermost, or below Stack, Average or Route",
    "batch_split": "it deals out the batch; put it outermost, or below Stack",
    "route": "it deals out the batch; put it outermost, or below Stack",
    "parallel": "it multiplies the batch; put it outermost, with Stacks inside",
}
# All compositions, by their key.
KINDS: dict[str, type[Composition]] = {
    kind.key: kind for kind in (Stack, Fuse, Average, Split, BatchSplit, Route, Parallel)
}
# All that a user may write for the adapters that act; see `parse`.
Setup = str | Composition | Iterable[str] | None


def parse(setup: Setup) -> Composition | None:
    """Returns the composition that a user means, or None for no adapters.

    Args:
        setup: a name, several names (a `Stack`), a composition, a mapping for `from_data`, or None.

    Raises:
        ValueError: `setup` is something else, or its members do not fit together.
    """
    if setup is None or isinstance(setup, Composition):
        return setup
    if isinstance(setup, str):
        return None if setup == BASE else Stack(setup)
    if isinstance(setup, Mapping):
        return parse(from_data(setup))
    if not isinstance(setup, Iterable):
        raise ValueError(f"adapters are given by name, not as {setup!r}")
    return Stack(*setup)


def from_data(data: Any) -> str | Composition:
    """Reads a name or composition from plain data, as `Composition.to_data` writes it.

    Args:
        data: a name, or a mapping such as {fuse: [a, {stack: [b, c]}]}.

    Raises:
        ValueError: a kind or option is unknown (the message names the nearest), or the nesting is
            not allowed.
    """
    if isinstance(data, (str, Composition)):
        return data
    if not isinstance(data, Mapping):
        raise ValueError(
            f"a composition is a name or a mapping such as {{stack: [a, b]}}, not {data!r}"
        )
    kinds = [key for key in data if key in KINDS]
    if len(kinds) != 1:
        first = next((str(key) for key in data if key not in KINDS), "")
        raise ValueError(
            f"a composition names one of {', '.join(KINDS)}{nearest(first, KINDS)}; "
            f"this one has {', '.join(map(str, data)) or 'nothing'}"
        )
    kind = KINDS[kinds[0]]
    members = data[kind.key]
    options = {key: value for key, value in data.items() if key != kind.key}
    known = [] if kind.option is None else [kind.option]
    for key in options:
        if key not in known:
            raise ValueError(f"{kind.key} has no option {key!r}{nearest(str(key), known)}")
        if isinstance(options[key], str) or not isinstance(options[key], Iterable):
            raise ValueError(f"{key} takes a list of numbers, not {options[key]!r}")
    if kind in (Split, BatchSplit) and not options:
        raise ValueError(f"{kind.key} needs {kind.option}, a list with a number for each member")
    if isinstance(members, str) or not isinstance(members, Iterable):
        raise ValueError(f"{kind.key} takes a list of members, not {members!r}")
    inner = [None if member is None else from_data(member) for member in members]
    if kind is Route:
        return Route(inner)
    return kind(*inner, **options)


def _below(member: str | Composition) -> Iterator[Composition]:
    """Yields the composition itself and all compositions inside it."""
    if isinstance(member, Composition):
        yield member
        for inner in member.members:
            yield from _below(inner)


def _counted(count: int) -> str:
    return "one adapter" if count == 1 else f"{count} members"


def _check_number_of(node: Composition, what: str, values: Sequence[Any], count: int) -> None:
    if len(values) != count:
        raise ValueError(
            f"{type(node).__name__} has {count} members and {len(values)} {what}: give one for each"
        )


def _check_sizes(what: str, values: Sequence[Any]) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{what} must be whole numbers of at least 0, not {value!r}")
