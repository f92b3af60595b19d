"""The results of a run: medians, quartiles, ratios and the share of the limit that is reached.

Ratios are taken in each round, between calls that follow each other, and then their median. Other
load on the machine during a round affects both calls.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .cases import Case, Kind, Library, Mode, Settings
from .encoders import Encoder
from .environments import Environment
from .limits import FULL, TowerSize, cached_limit, step_limit

Phase = Literal["forward", "step", "life"]


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Computes the median and the quartiles of some values."""
        values = sorted(values)
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One line of the tables.

    Attributes:
        preset: name of the encoder as the run was asked for it.
        environment: name of the environment that measured it.
        encoder: name of the encoder as `load_backbone` takes it.
        phase: cases of one phase were timed together.
        name: see `cases.Case.name`.
        library, method, kind, batch, start, mode: see `cases.Case`.
        parameters: number of trained parameters without the head.
        kept, peak: bytes or None, see `stepping.Runner`.
        seconds: of one call.
        rounds: seconds of one call in each round.
        over: name of the reference of `ratio`, None without one.
        ratio: seconds relative to those of `over`, in the same environment and mode.
        limit: seconds of the limit, from the frozen forward pass; None if there is no limit.
        reached: limit over seconds, 1 at the limit.
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
        """Returns the JSON-ready fields."""
        return asdict(self)


@dataclass(frozen=True)
class Missing:
    """A case that was not measured, and the reason."""

    encoder: str
    what: str
    why: str


@dataclass(frozen=True)
class Lane:
    """An encoder in one environment; ratios compare cases of one lane.

    Attributes:
        preset: name of the encoder as the run was asked for it.
        towers: sizes of its towers, for the limits.
    """

    preset: str
    environment: Environment
    encoder: Encoder
    towers: tuple[TowerSize, ...]


@dataclass(frozen=True)
class Measured:
    """The seconds of one case in each round; the cases of a phase share their rounds.

    Attributes:
        parameters, kept, peak: see `BenchRow`.
    """

    lane: Lane
    phase: Phase
    case: Case
    seconds: tuple[float, ...]
    parameters: int
    kept: int | None
    peak: int | None


@dataclass(frozen=True)
class Bench:
    """All results of a run.

    Attributes:
        machine: processor, threads, accelerator and versions.
        towers: sizes of the towers of each preset.
    """

    settings: Settings
    machine: dict[str, Any]
    rows: list[BenchRow]
    missing: list[Missing]
    towers: dict[str, list[TowerSize]]

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `bench.json` without the checks."""
        return {
            "settings": self.settings.to_dict(),
            "machine": self.machine,
            "encoders": {
                name: [tower.to_dict() for tower in towers] for name, towers in self.towers.items()
            },
            "rows": [row.to_dict() for row in self.rows],
            "missing": [asdict(entry) for entry in self.missing],
        }


def made_rows(measured: Sequence[Measured]) -> list[BenchRow]:
    """Makes a row of each measured case, in order."""
    return [_row(entry, _together(entry, measured)) for entry in measured]


def ratios(of: Sequence[float], over: Sequence[float]) -> Spread:
    """Returns the spread of the ratios of two cases, round by round."""
    return Spread.of(a / b for a, b in zip(of, over, strict=True))


def _together(entry: Measured, measured: Sequence[Measured]) -> list[Measured]:
    """Returns the cases that ran in the same rounds, lane and batch."""
    return [
        other
        for other in measured
        if other.lane == entry.lane
        and other.phase == entry.phase
        and other.case.batch == entry.case.batch
    ]


def _row(entry: Measured, together: Sequence[Measured]) -> BenchRow:
    case, lane = entry.case, entry.lane
    reference = _reference(entry, together)
    limits = _limits(entry, together)
    return BenchRow(
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


def _reference(entry: Measured, together: Sequence[Measured]) -> Measured | None:
    """Returns the case that a case is compared with, or None if there is none.

    This is the bare encoder for a forward pass, full fine-tuning for a step, and the same case of
    ours for a peer's switching or loading.
    """
    case = entry.case
    if entry.phase == "life":
        mine = (case.kind, case.method)
        return next(
            (o for o in together if (o.case.kind, o.case.method) == mine and _is_ours(o.case)), None
        )
    method = "bare" if entry.phase == "forward" else "full"
    return _of_method(together, method, case.mode)


def _is_ours(case: Case) -> bool:
    return case.library == "mmadapters"


def _of_method(together: Sequence[Measured], method: str, mode: Mode) -> Measured | None:
    return next((o for o in together if o.case.method == method and o.case.mode == mode), None)


def _limits(entry: Measured, together: Sequence[Measured]) -> list[float] | None:
    """Returns the limit in seconds of each round, or None if the case has no limit."""
    case, towers = entry.case, entry.lane.towers
    frozen = _of_method(together, "bare", case.mode)
    if frozen is None or case.kind not in ("step", "cached"):
        return None
    if case.method == "full":
        forwards = FULL
    elif case.kind == "cached":
        forwards = cached_limit(towers, case.start)
    else:
        forwards = step_limit(towers, case.start)
    return [forwards * seconds for seconds in frozen.seconds]
