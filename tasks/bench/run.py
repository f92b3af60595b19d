"""Runs `mmadapters bench`: workers take turns, and their measurements become rows."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from typing import Any

from mmadapters import __version__

from ..core.machine import processor
from .cases import Case, Settings, forward_cases, life_cases, step_cases
from .encoders import Encoder, Preset, choose, find_preset
from .environments import PEERS, Environment, WorkerError, environments
from .limits import TowerSize, step_limit
from .results import Bench, Lane, Measured, Missing, Phase, made_rows

Tell = Callable[[str, int, int], None]


def measure(settings: Settings, *, tell: Tell = lambda what, done, of: None) -> Bench:
    """Measures all cases of `settings` that the environments can run.

    Args:
        tell: called before each turn with its name, the number of finished turns and that of all.

    Raises:
        ValueError: an encoder, a block, the device or an interpreter of a peer does not exist.
        RuntimeError: a worker process ended.
    """
    presets = {name: find_preset(name) for name in settings.encoders}
    with environments(settings.peers) as there:
        if settings.device != "cpu" and there[0].facts["accelerator"] is None:
            raise ValueError(f"--device {settings.device}: torch sees no GPU here; use cpu")
        run = _Run(settings, there, tell, len(presets))
        for name, preset in presets.items():
            run.add(name, preset)
        return Bench(
            settings, _machine(settings, there), made_rows(run.measured), run.missing, run.towers
        )


def _machine(settings: Settings, there: Sequence[Environment]) -> dict[str, Any]:
    return {
        "mmadapters": __version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": settings.threads or there[0].facts["threads"],
        "accelerator": there[0].facts["accelerator"] if settings.device != "cpu" else None,
        "environments": {
            environment.name: {"python": environment.facts["python"], **environment.packages}
            for environment in there
        },
    }


def _parts(environment: Environment) -> list[tuple[str, ...]]:
    """Groups the libraries of an environment by encoder; AdapterHub's has another encoder."""
    libraries = tuple(entry for entry in environment.libraries if entry != "adapters")
    parts = [libraries] if libraries else []
    return [*parts, ("adapters",)] if "adapters" in environment.libraries else parts


class _Run:
    """Measures the encoders of a run, one after another.

    Attributes:
        done: number of finished turns.
        of: number of all turns.
    """

    def __init__(
        self, settings: Settings, there: Sequence[Environment], tell: Tell, encoders: int
    ) -> None:
        self.settings, self.there, self.tell = settings, there, tell
        self.measured: list[Measured] = []
        self.missing: list[Missing] = []
        self.towers: dict[str, list[TowerSize]] = {}
        parts = [part for environment in there for part in _parts(environment)]
        self.done, self.of = 0, encoders * sum(map(self._turns, parts))
        present = {library for environment in there for library in environment.libraries}
        for peer, name in PEERS.items():
            if peer not in present:
                why = "it is not installed here, and no interpreter of --peers has it"
                self.missing.append(Missing("all", name, why))
        if settings.compile and settings.device == "cpu":
            self.missing.append(Missing("all", "CUDA graphs", "they need a GPU"))

    def _phases(self, libraries: Sequence[str]) -> list[tuple[Phase, list[Case]]]:
        """Returns the groups of cases that are timed together; each batch size is a group."""
        settings = self.settings
        phases: list[tuple[Phase, list[Case]]] = [
            ("forward", forward_cases(settings, libraries, batch)) for batch in settings.batches
        ]
        phases.append(("step", step_cases(settings, libraries)))
        return [*phases, ("life", life_cases(settings, libraries))]

    def _turns(self, libraries: Sequence[str]) -> int:
        cases = sum(len(cases) for _, cases in self._phases(libraries))
        return cases * (1 + self.settings.repeats)

    def add(self, name: str, preset: Preset) -> None:
        """Measures one encoder in every environment that can run it."""
        lanes = []
        for environment in self.there:
            for libraries in _parts(environment):
                encoder = self._encoder(name, preset, libraries)
                lane = None if encoder is None else self._lane(name, environment, encoder)
                if lane is None:
                    self.done += self._turns(libraries)
                else:
                    lanes.append((lane, libraries))
        for index in range(len(self._phases(()))):
            entries = []
            for lane, libraries in lanes:
                phase, cases = self._phases(libraries)[index]
                entries += [(lane, phase, case) for case in cases]
            self._rounds(entries)

    def _encoder(self, name: str, preset: Preset, libraries: Sequence[str]) -> Encoder | None:
        """Returns the encoder for some libraries, or None if they do not support it."""
        if "adapters" not in libraries:
            return choose(preset)
        if preset.twin is None:
            self.missing.append(Missing(name, PEERS["adapters"], "it has no such encoder"))
        return preset.twin

    def _lane(self, name: str, environment: Environment, encoder: Encoder) -> Lane | None:
        settings = self.settings
        try:
            towers = environment.ask(
                "set_encoder",
                name=encoder.name,
                options=dict(encoder.options),
                device=settings.device,
                precision=settings.precision,
                seconds=settings.seconds,
                size=settings.size,
                threads=settings.threads,
            )
        except WorkerError as problem:
            if "own" in environment.libraries:
                raise ValueError(f"{name} cannot be measured: {problem}") from None
            self.missing.append(Missing(name, environment.name, str(problem)))
            return None
        made = tuple(TowerSize(**tower) for tower in towers)
        for start in settings.starts:
            step_limit(made, start)  # raises for a block that the encoder does not have
        self.towers.setdefault(name, list(made))
        return Lane(name, environment, encoder, made)

    def _rounds(self, entries: Sequence[tuple[Lane, Phase, Case]]) -> None:
        """Times all entries round by round, every second round in reverse, and closes them."""
        opened: dict[int, dict[str, Any]] = {}
        for key, (lane, _, case) in enumerate(entries):
            self._told(lane, case)
            try:
                opened[key] = lane.environment.ask("open", key=key, case=case.to_dict())
            except WorkerError as problem:
                self._fail(lane, case, problem)
                self.done += self.settings.repeats
        seconds: dict[int, list[float]] = {key: [] for key in opened}
        for number in range(self.settings.repeats):
            for key in sorted(seconds, reverse=number % 2 == 1):
                lane, _, case = entries[key]
                self._told(lane, case)
                try:
                    seconds[key].append(lane.environment.ask("time", key=key))
                except WorkerError as problem:
                    self._fail(lane, case, problem)
                    self.done += self.settings.repeats - number - 1
                    del seconds[key]
        for key, times in seconds.items():
            lane, phase, case = entries[key]
            self.measured.append(Measured(lane, phase, case, tuple(times), **opened[key]))
        for environment in self.there:
            environment.ask("close")

    def _fail(self, lane: Lane, case: Case, problem: WorkerError) -> None:
        first = f" from block {case.start}" if case.kind in ("step", "cached") else ""
        what = f"{case.name}{first}, {case.kind}, {case.mode}"
        what += f", batch {case.batch}" if case.batch else ""
        what += f" ({lane.environment.name})"
        self.missing.append(Missing(lane.preset, what, str(problem)))

    def _told(self, lane: Lane, case: Case) -> None:
        self.tell(f"{lane.preset}: {case.name}, {case.kind}", self.done, self.of)
        self.done += 1
