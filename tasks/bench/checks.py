"""The targets of the figures. A figure that a run did not measure neither holds nor misses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from .cases import Kind, Mode
from .results import Bench, BenchRow, ratios

TEN_PERCENT = 1 / 1.1  # at most ten percent slower than the limit


@dataclass(frozen=True)
class Check:
    """A figure and its bound.

    Attributes:
        what: names the figure.
        value: the measured figure, None if there is none.
        relation: how `value` must compare with `bound`.
        holds: None if there is no figure.
    """

    what: str
    value: float | None
    bound: float
    relation: Literal["≤", "≥"]
    holds: bool | None


@dataclass(frozen=True, kw_only=True)
class Target:
    """A bound for the best of the matching rows of our library.

    Attributes:
        what: names the figure.
        device, preset, kind, batch, start: of the rows; a `batch` of None matches all.
        mode: of the rows; None matches all.
        most: upper bound of the ratio, None without one.
        least: lower bound of the share of the limit in [0, 1], None without one.
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

    def check(self, rows: Iterable[BenchRow]) -> Check:
        """Compares the best of the matching rows with the bound."""
        fitting = [row for row in rows if self._fits(row)]
        if self.least is not None:
            reached = [row.reached.median for row in fitting if row.reached is not None]
            best = max(reached, default=None)
            holds = None if best is None else best >= self.least
            return Check(self.what, best, self.least, "≥", holds)
        assert self.most is not None
        medians = [row.ratio.median for row in fitting if row.ratio is not None]
        best = min(medians, default=None)
        return Check(self.what, best, self.most, "≤", None if best is None else best <= self.most)

    def _fits(self, row: BenchRow) -> bool:
        case = (row.library, row.preset, row.kind, row.start)
        return (
            case == ("mmadapters", self.preset, self.kind, self.start)
            and row.environment == "here"
            and self.batch in (None, row.batch)
            and self.mode in (None, row.mode)
        )


def _on_cpu() -> list[Target]:
    step, cached = "step over full fine-tuning", "step from the cached trunk over full fine-tuning"
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
    targets = [
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
    return targets + [
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
    """Returns the checks for the device and the encoders of a run."""
    device = bench.settings.device.partition(":")[0]
    main = [row for row in bench.rows if row.method in (bench.settings.method, "bare", "full")]
    results = [
        target.check(main)
        for target in TARGETS
        if target.device == device and target.preset in bench.settings.encoders
    ]
    results += [check for row in bench.rows if (check := _merged(row, bench.rows)) is not None]
    results += [check for row in bench.rows if (check := _beside_peer(row, bench.rows)) is not None]
    failed = [entry for entry in bench.missing if entry.what.startswith("ours ")]
    return [*results, Check("cases of ours that could not run", len(failed), 0, "≤", not failed)]


def _merged(row: BenchRow, rows: Sequence[BenchRow]) -> Check | None:
    """Checks that a merged adapter is as fast as the bare encoder.

    The difference may be as large as the quartile range of either, but at least half a percent.
    """
    if (row.library, row.method) != ("mmadapters", "lora merged") or row.ratio is None:
        return None
    bare = next(r for r in rows if r.method == "bare" and _together(r, row) and r.mode == row.mode)
    noise = max((s.high - s.low) / s.median for s in (bare.seconds, row.seconds))
    bound = 1 + max(noise, 0.005)
    what = f"{row.preset}, batch {row.batch}, {row.name} ({row.environment}): forward over bare"
    return Check(what, row.ratio.median, bound, "≤", row.ratio.median <= bound)


def _beside_peer(row: BenchRow, rows: Sequence[BenchRow]) -> Check | None:
    """Checks that ours is as fast as a peer on the same work in a quarter of the rounds."""
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
    spread = ratios(ours[0].rounds, row.rounds)
    batch = f", batch {row.batch}" if row.batch else ""
    what = f"{row.preset}{batch}, {row.kind}: ours over {row.name}, lower quartile"
    if ours[0].parameters != row.parameters:
        what += f" (ours of {ours[0].parameters:,} parameters, theirs of {row.parameters:,})"
    return Check(what, spread.low, 1.0, "≤", spread.low <= 1.0)


def _together(row: BenchRow, other: BenchRow) -> bool:
    """Tells whether two rows were timed in the same rounds."""

    def where(row: BenchRow) -> tuple[object, ...]:
        return (row.preset, row.environment, row.encoder, row.phase, row.batch)

    return where(row) == where(other)
