"""From seconds to rows: medians, quartiles, ratios and the share of the limit that is reached.

Ratios are taken round by round, between calls that followed each other, and then their median: what
else the machine did in a round falls on both.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .cases import Case, Kind, Library, Mode
from .limits import FULL, cached_limit, step_limit

if TYPE_CHECKING:
    from .run import Measured


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = sorted(values)
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the tables.

    Attributes:
        preset, environment, encoder: what was asked for, where it ran, what it was.
        phase: what was timed together: "forward", "step", "life".
        first: the first adapted block of each tower.
        parameters: trained, without the head.
        kept, peak: bytes, see `stepping.Runner`.
        ratio: to the seconds of `over`, in the same environment and mode.
        limit: seconds of the limit, by the frozen forward pass; None where there is none.
        reached: limit over seconds.
    """

    preset: str
    environment: str
    encoder: str
    phase: str
    name: str
    library: Library
    method: str
    kind: Kind
    batch: int
    start: str
    mode: Mode
    parameters: int
    kept: int | None
    peak: int | None
    seconds: Spread
    rounds: tuple[float, ...]
    over: str | None = None
    ratio: Spread | None = None
    limit: float | None = None
    reached: Spread | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def made_rows(measured: Sequence[Measured]) -> list[Row]:
    """A row for each case, in order."""
    return [_row(entry, _beside(entry, measured)) for entry in measured]


def ratios(of: Sequence[float], over: Sequence[float]) -> Spread:
    """Of two cases, round by round."""
    return Spread.of(a / b for a, b in zip(of, over, strict=True))


def _beside(entry: Measured, measured: Sequence[Measured]) -> list[Measured]:
    """What ran in the same rounds, lane and batch."""
    return [
        other
        for other in measured
        if other.lane == entry.lane
        and other.phase == entry.phase
        and other.case.batch == entry.case.batch
    ]


def _row(entry: Measured, beside: Sequence[Measured]) -> Row:
    case, lane = entry.case, entry.lane
    reference = _reference(entry, beside)
    limits = _limits(entry, beside)
    return Row(
        preset=lane.preset,
        environment=lane.environment.name,
        encoder=lane.encoder.name,
        phase=entry.phase,
        name=case.name,
        **case.to_dict(),
        parameters=entry.parameters,
        kept=entry.kept,
        peak=entry.peak,
        seconds=Spread.of(entry.seconds),
        rounds=entry.seconds,
        over=None if reference is None else reference.case.name,
        ratio=None if reference is None else ratios(entry.seconds, reference.seconds),
        limit=None if limits is None else Spread.of(limits).median,
        reached=None if limits is None else ratios(limits, entry.seconds),
    )


def _reference(entry: Measured, beside: Sequence[Measured]) -> Measured | None:
    """The bare encoder of a forward pass, full fine-tuning of a step, ours of a peer's switch."""
    case = entry.case
    if entry.phase == "life":
        mine = (case.kind, case.method)
        return next(
            (o for o in beside if (o.case.kind, o.case.method) == mine and _is_ours(o.case)), None
        )
    method = "bare" if entry.phase == "forward" else "full"
    return _found(beside, method, case.mode)


def _is_ours(case: Case) -> bool:
    return case.library == "mmadapters"


def _found(beside: Sequence[Measured], method: str, mode: Mode) -> Measured | None:
    return next((o for o in beside if o.case.method == method and o.case.mode == mode), None)


def _limits(entry: Measured, beside: Sequence[Measured]) -> list[float] | None:
    """The limit in seconds, of each round."""
    case, towers = entry.case, entry.lane.towers
    frozen = _found(beside, "bare", case.mode)
    if frozen is None or case.kind not in ("step", "cached"):
        return None
    if case.method == "full":
        forwards = FULL
    elif case.kind == "cached":
        forwards = cached_limit(towers, case.start)
    else:
        forwards = step_limit(towers, case.start)
    return [forwards * seconds for seconds in frozen.seconds]
