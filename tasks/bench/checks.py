"""What the figures are held to. A figure that a run did not measure is no pass and no miss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from .cases import Kind, Mode
from .results import Row, ratios
from .run import Bench

TEN_PERCENT = 1 / 1.1


@dataclass(frozen=True)
class Check:
    """A figure and its bound; `holds` is None where there is no figure."""

    what: str
    value: float | None
    bound: float
    relation: Literal["≤", "≥"]
    holds: bool | None


@dataclass(frozen=True, kw_only=True)
class Target:
    """A bound for the rows of ours that fit.

    Attributes:
        mode: of the rows; None: the best of all counts.
        most, least: a bound of the ratio, or of the share of the limit.
    """

    what: str
    device: Literal["cpu", "cuda"]
    preset: str
    kind: Kind
    batch: int | None = None
    start: str = "0"
    mode: Mode | None = "eager"
    most: float | None = None
    least: float | None = None

    def check(self, rows: Iterable[Row]) -> Check:
        found = [row for row in rows if self._fits(row)]
        if self.least is not None:
            reached = [row.reached.median for row in found if row.reached is not None]
            best = max(reached, default=None)
            holds = None if best is None else best >= self.least
            return Check(self.what, best, self.least, "≥", holds)
        assert self.most is not None
        medians = [row.ratio.median for row in found if row.ratio is not None]
        best = min(medians, default=None)
        return Check(self.what, best, self.most, "≤", None if best is None else best <= self.most)

    def _fits(self, row: Row) -> bool:
        own = (row.library, row.preset, row.kind, row.start)
        return (
            own == ("mmadapters", self.preset, self.kind, self.start)
            and row.environment == "here"
            and self.batch in (None, row.batch)
            and self.mode in (None, row.mode)
        )


def _on_cpu() -> list[Target]:
    step, cached = "step over full fine-tuning", "step from the cached prefix over full fine-tuning"
    held: tuple[tuple[str, str, Kind, float], ...] = (
        (f"vit-s16, upper half: {step}", "vit-s16", "step", 0.60),
        (f"vit-s16, upper half: {cached}", "vit-s16", "cached", 0.35),
        (f"wav2vec2-base, upper half: {cached}", "wav2vec2-base", "cached", 0.30),
    )
    return [
        Target(device="cpu", what=what, preset=preset, kind=kind, start="half", most=most)
        for what, preset, kind, most in held
    ]


def _on_gpu() -> list[Target]:
    forwards: tuple[tuple[Mode, int, float], ...] = (
        *(("compile+graph", batch, 1.015) for batch in (1, 32, 256)),
        ("eager", 256, 1.08),
        ("eager", 1, 1.25),
    )
    found = [
        Target(
            device="cuda",
            what=f"vit-b16, batch {batch}, {mode}: forward over bare",
            preset="vit-b16",
            kind="forward",
            batch=batch,
            mode=mode,
            most=most,
        )
        for mode, batch, most in forwards
    ]
    return found + [
        Target(
            device="cuda",
            what=f"{preset}, first block {start}: share of the limit, eager or compiled",
            preset=preset,
            kind="step",
            start=start,
            mode=None,
            least=TEN_PERCENT,
        )
        for preset in ("vit-b16", "vit-l16", "wav2vec2-base", "clip-b32")
        for start in ("0", "half", "three-quarters")
    ]


TARGETS = (*_on_cpu(), *_on_gpu())


def checks(bench: Bench) -> list[Check]:
    """Everything that this run's device and encoders are held to."""
    device = bench.settings.device.partition(":")[0]
    main = [row for row in bench.rows if row.method in (bench.settings.method, "bare", "full")]
    found = [
        target.check(main)
        for target in TARGETS
        if target.device == device and target.preset in bench.settings.encoders
    ]
    found += [check for row in bench.rows if (check := _merged(row, bench.rows)) is not None]
    found += [check for row in bench.rows if (check := _beside_peer(row, bench.rows)) is not None]
    failed = [entry for entry in bench.missing if entry.what.startswith("ours ")]
    return [*found, Check("cases of ours that could not run", len(failed), 0, "≤", not failed)]


def _merged(row: Row, rows: Sequence[Row]) -> Check | None:
    """A merged adapter costs nothing: no more than how far its or the bare encoder's times are
    apart."""
    if (row.library, row.method) != ("mmadapters", "lora merged") or row.ratio is None:
        return None
    bare = next(r for r in rows if r.method == "bare" and _together(r, row) and r.mode == row.mode)
    noise = max((s.high - s.low) / s.median for s in (bare.seconds, row.seconds))
    bound = 1 + max(noise, 0.005)
    what = f"{row.preset}, batch {row.batch}, {row.name} ({row.environment}): forward over bare"
    return Check(what, row.ratio.median, bound, "≤", row.ratio.median <= bound)


def _beside_peer(row: Row, rows: Sequence[Row]) -> Check | None:
    """Ours is as fast as a peer on the same work: in a quarter of the rounds at least."""
    if row.library in ("torch", "mmadapters") or "merged" in row.method:
        return None
    work = (row.kind, row.method, row.start, row.mode)
    ours = [
        other
        for other in rows
        if other.library == "mmadapters"
        and _together(other, row)
        and (other.kind, other.method, other.start, other.mode) == work
    ]
    if not ours:
        return None
    found = ratios(ours[0].rounds, row.rounds)
    batch = f", batch {row.batch}" if row.batch else ""
    what = f"{row.preset}{batch}, {row.kind}: ours over {row.name}, lower quartile"
    if ours[0].parameters != row.parameters:
        what += f" (ours of {ours[0].parameters:,} parameters, theirs of {row.parameters:,})"
    return Check(what, found.low, 1.0, "≤", found.low <= 1.0)


def _together(row: Row, other: Row) -> bool:
    """Whether two rows were timed in the same rounds."""

    def where(row: Row) -> tuple[object, ...]:
        return (row.preset, row.environment, row.encoder, row.phase, row.batch)

    return where(row) == where(other)
