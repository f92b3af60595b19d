"""The measured cases: one `Case` for each figure, and the cases of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .limits import first_block

Library = Literal["torch", "mmadapters", "peft", "adapters"]
Kind = Literal["forward", "mixed", "step", "cached", "switch", "load"]
Mode = Literal["eager", "compile", "graph", "compile+graph"]

METHODS = ("double_seq_bn", "seq_bn", "lora")
PRECISIONS = ("fp32", "bf16")
NAMES = {"torch": "", "mmadapters": "ours", "peft": "peft", "adapters": "AdapterHub"}
MIXED = 8  # number of adapters in a mixed batch
# Parallel bottlenecks that are merged into the feed-forward parts as further channels. They are
# twice as wide as others, since there are half as many.
WIDER = "parallel merged"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One figure.

    Attributes:
        method: one of `METHODS`, "lora merged", `WIDER`, or of the bare encoder "bare" or "full",
            which is full fine-tuning.
        kind: "forward" is a forward pass; "mixed" is one with another adapter for each eighth of
            the batch; "step" is a training step; "cached" is one from stored states; "switch" is a
            switch between two adapters; "load" loads an adapter from disk.
        batch: batch size; 0 if the case has none.
        start: the first adapted block, see `limits.first_block`.
        mode: eager or compiled, with or without a CUDA graph.
    """

    library: Library
    method: str
    kind: Kind
    batch: int = 0
    start: str = "0"
    mode: Mode = "eager"

    @property
    def name(self) -> str:
        """Returns the name in tables, as "peft lora"."""
        words = {"bare": "bare encoder", "full": "full fine-tuning"}
        parts = [NAMES[self.library], words.get(self.method, self.method)]
        if self.kind == "mixed":
            parts.append(f"×{MIXED}")
        if self.kind == "cached":
            parts.append("from cached trunk")
        return " ".join(filter(None, parts))

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON-ready fields."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run.

    Attributes:
        encoders: names of presets, or names that `load_backbone` takes.
        device: "cpu", "cuda" or "cuda:1".
        precision: "fp32" or "bf16", of weights and inputs.
        batches: batch sizes of forward passes, 1 or more.
        train_batch: batch size of training steps, 1 or more.
        seconds: length of a waveform, above 0 and at most 600.
        starts: first adapted blocks of training steps, see `limits.first_block`.
        method: one of `METHODS`, for training steps and compiled forward passes.
        size: bottleneck size, 1 or more.
        compile: measure compiled models, and on a GPU CUDA graphs, too.
        repeats: number of rounds, 1 or more.
        threads: number of CPU threads, 1 or more; None keeps torch's default.
        peers: interpreters that have peft or adapters.

    Raises:
        ValueError: a setting has a wrong value.
    """

    encoders: tuple[str, ...]
    device: str = "cpu"
    precision: str = "fp32"
    batches: tuple[int, ...] = (1, 8)
    train_batch: int = 16
    seconds: float = 10.0
    starts: tuple[str, ...] = ("0", "half", "three-quarters")
    method: str = "double_seq_bn"
    size: int = 48
    compile: bool = False
    repeats: int = 7
    threads: int | None = None
    peers: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("method", self.method, METHODS)
        _one_of("device", self.device.partition(":")[0], ("cpu", "cuda"))
        counts = {"batches": self.batches, "repeats": (self.repeats,), "size": (self.size,)}
        counts |= {"train-batch": (self.train_batch,)}
        counts |= {} if self.threads is None else {"threads": (self.threads,)}
        for name, values in counts.items():
            if not values or min(values) < 1:
                raise ValueError(f"--{name} must be 1 or more, not {_listed(values)}")
        if not 0 < self.seconds <= 600:
            raise ValueError(f"--seconds must be above 0 and at most 600, not {self.seconds:g}")
        if not self.encoders:
            raise ValueError("name at least one encoder")
        if not self.starts:
            raise ValueError("--blocks names no block")
        for start in self.starts:
            # The depth is not known yet; this rejects blocks that no encoder has.
            first_block(start, 1000)

    @property
    def command(self) -> str:
        """Returns the command of these settings, with PYTHON for the interpreters of peers."""
        batches, starts = ",".join(map(str, self.batches)), ",".join(self.starts)
        words = [f"mmadapters bench {' '.join(self.encoders)} --device {self.device}"]
        words += [f"--precision {self.precision} --batches {batches}"]
        words += [f"--train-batch {self.train_batch} --seconds {self.seconds:g}"]
        words += [f"--blocks {starts} --method {self.method} --size {self.size}"]
        words += ["--compile"] if self.compile else []
        words += [f"--repeats {self.repeats}"]
        words += [] if self.threads is None else [f"--threads {self.threads}"]
        return " ".join([*words, *("--peers PYTHON" for _ in self.peers)])

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON-ready fields without the paths of interpreters."""
        return {key: value for key, value in asdict(self).items() if key != "peers"}


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"--{name} must be one of {', '.join(known)}, not {value!r}")


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values)) or "nothing"


def forward_cases(settings: Settings, libraries: Sequence[str], batch: int) -> list[Case]:
    """Returns the forward passes of the bare encoder and of every method of every library."""
    cases = [Case(library="torch", method="bare", kind="forward", batch=batch)]
    for library, method in _contenders(settings, libraries):
        cases.append(Case(library=library, method=method, kind="forward", batch=batch))
        if method == "lora":
            cases.append(Case(library=library, method="lora merged", kind="forward", batch=batch))
        if batch >= MIXED:
            cases.append(Case(library=library, method=method, kind="mixed", batch=batch))
    wider = Case(library="mmadapters", method=WIDER, kind="forward", batch=batch)
    if "own" in libraries:
        cases.append(wider)
    if settings.compile and "own" in libraries:
        graphs: tuple[Mode, ...] = ("graph", "compile+graph")
        modes: tuple[Mode, ...] = ("compile", *(graphs if settings.device != "cpu" else ()))
        bare = Case(library="torch", method="bare", kind="forward", batch=batch)
        ours = Case(library="mmadapters", method=settings.method, kind="forward", batch=batch)
        cases += [_in_mode(case, mode) for mode in modes for case in (bare, ours, wider)]
    return cases


def step_cases(settings: Settings, libraries: Sequence[str]) -> list[Case]:
    """Returns the frozen forward pass for the limits, full fine-tuning, and training steps."""
    batch = settings.train_batch
    frozen = Case(library="torch", method="bare", kind="forward", batch=batch)
    full = Case(library="torch", method="full", kind="step", batch=batch)
    cases = [frozen, full]
    if "own" in libraries:
        steps = [
            Case(
                library="mmadapters", method=settings.method, kind="step", batch=batch, start=start
            )
            for start in settings.starts
        ]
        steps += [Case(**{**step.to_dict(), "kind": "cached"}) for step in steps]
        cases += steps
        if settings.compile:
            cases += [_in_mode(case, "compile") for case in (frozen, full, *steps)]
    cases += [
        Case(library=library, method=method, kind="step", batch=batch)
        for library, method in _contenders(settings, libraries)
    ]
    return list(dict.fromkeys(cases))


def life_cases(settings: Settings, libraries: Sequence[str]) -> list[Case]:
    """Returns the cases of switching between adapters and of loading one."""
    return [
        Case(library=library, method=method, kind=kind)
        for kind in ("switch", "load")
        for library, method in _contenders(settings, libraries)
    ]


def _contenders(settings: Settings, libraries: Sequence[str]) -> list[tuple[Library, str]]:
    """Returns pairs of library and method, with ours for each of a peer's."""
    pairs: dict[tuple[Library, str], None] = {}
    if "own" in libraries:
        ours = (settings.method, "seq_bn", "lora")
        pairs |= {("mmadapters", method): None for method in ours}
    theirs: tuple[tuple[Library, tuple[str, ...]], ...] = (
        ("peft", ("lora",)),
        ("adapters", ("seq_bn", "double_seq_bn")),
    )
    for library, methods in theirs:
        if library in libraries:
            pairs |= {("mmadapters", method): None for method in methods}
            pairs |= {(library, method): None for method in methods}
    return list(pairs)


def _in_mode(case: Case, mode: Mode) -> Case:
    return Case(**{**case.to_dict(), "mode": mode})
