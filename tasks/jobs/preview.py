"""The look at the data before a training: what is suspicious is printed, and goes to the report."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass

from accelerate import PartialState
from rich.console import Console

from ..config.schema import Split
from ..core.findings import Finding
from ..core.rows import Rows
from ..data.doctor import look, print_findings
from ..reports.results import Run


def look_at_data(run: Run, splits: Mapping[Split, Rows]) -> None:
    """Adds to a run what is suspicious about its data, and prints it to the standard error.

    Only the first process looks. A comparison trains many times on the same rows: they are looked
    at once, and the findings are printed once.
    """
    if not PartialState().is_main_process:
        return
    known = next((past for past in _past if past.is_of(run.task.name, splits)), None)
    if known is not None:
        run.findings = list(known.findings)
        return
    run.findings = look(run.task, splits)
    print_findings(run.findings, Console(stderr=True))
    _past[:] = [past for past in _past if past.alive]
    if past := _Look.of(run.task.name, splits, run.findings):
        _past.append(past)


@dataclass(frozen=True)
class _Look:
    task: str
    rows: tuple[weakref.ref[Rows], ...]
    findings: tuple[Finding, ...]

    @classmethod
    def of(cls, task: str, splits: Mapping[Split, Rows], findings: list[Finding]) -> _Look | None:
        try:
            rows = tuple(weakref.ref(rows) for rows in splits.values())
        except TypeError:  # rows without weak references are looked at again
            return None
        return cls(task, rows, tuple(findings))

    @property
    def alive(self) -> bool:
        return all(rows() is not None for rows in self.rows)

    def is_of(self, task: str, splits: Mapping[Split, Rows]) -> bool:
        these = [*splits.values()]
        return (
            task == self.task
            and len(these) == len(self.rows)
            and all(ref() is rows for ref, rows in zip(self.rows, these, strict=True))
        )


_past: list[_Look] = []
