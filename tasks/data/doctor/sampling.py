"""Looks at a sample of the data at the start of training, in about two seconds.

`examine` reads all rows; who did not run it is told here what can be seen at once. Text columns and
the paths of files are read as a whole, if there are no more than 100,000 rows; of pictures and
recordings so many are decoded, spread over the split, as fit into the time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from mmadapters.errors import first_line

from ...config.schema import SPLITS, Split
from ...core.capabilities import DataChecks, capability
from ...core.findings import Finding
from ...core.rows import Rows
from ...core.task import Task
from ..media import spread
from ..stream import Stream
from .checks import RowFacts, RowNames, answer_of, conflicts_of, facts_of, media_findings, texts_of
from .files import file_findings
from .repeats import Hashes, Keys, about_parts, answer_role, paths_of, shared_findings

SECONDS = 1.0  # in which media are decoded; the task's own look takes about as long
LOOKED_AT = 64  # rows of a split whose media are decoded, at most
READ = 100_000  # rows of a split whose texts and paths are read, at most
LEAST = 4  # rows of a split that are decoded, whatever the time

Splits = Mapping[Split, Rows]


def look(task: Task, splits: Splits, *, seconds: float = SECONDS) -> list[Finding]:
    """Returns what is suspicious about a data set, as far as a short look shows it.

    Streams are not looked at, since that would download them.

    Args:
        task: the fitted task.
        seconds: the time in which media are decoded.
    """
    local: dict[Split, Rows] = {
        split: splits[split]
        for split in SPLITS
        if split in splits and not isinstance(splits[split], Stream) and len(splits[split])
    }
    facts = {split: RowFacts(len(rows), RowNames(task, rows)) for split, rows in local.items()}
    looked: dict[Split, list[int]] = {split: [] for split in local}

    def files() -> list[Finding]:
        return file_findings(task)

    def columns() -> list[Finding]:
        return _of_columns(task, local)

    def media() -> list[Finding]:
        return _of_media(task, local, facts, looked, seconds=seconds)

    def of_task() -> list[Finding]:
        return _of_task(task, local, looked)

    results: list[Finding] = []
    for step in (files, columns, media, of_task):
        try:
            results += step()
        except Exception as error:  # no reason to end a training
            reason = f"{type(error).__name__}: {first_line(error)}"
            results.append(Finding(f"a look at the data failed: {reason}", "run mmadapters doctor"))
    return results


def _of_columns(task: Task, splits: Splits) -> list[Finding]:
    results: list[Finding] = []
    few = {split: rows for split, rows in splits.items() if len(rows) <= READ}
    facts = {
        split: RowFacts(len(rows), RowNames(task, rows), keys=_paths(task, rows))
        for split, rows in few.items()
    }
    results += shared_findings(
        {split: of_split.keys for split, of_split in facts.items()},
        {split: of_split.place for split, of_split in facts.items()},
    )
    role = answer_role(task.columns)
    for split, rows in few.items():
        results += texts_of(task, split, rows, facts[split].place)
        kind = "" if role is None else task.columns[role].kind
        if role is None or kind == "mask" or about_parts(rows):
            continue
        if facts[split].keys and role in rows.column_names:
            for index, value in enumerate(rows[role]):
                if (text := answer_of(value, kind)) is not None:
                    facts[split].answers.add(index, text)
            results += conflicts_of(task, split, rows, facts[split])
    return results


def _paths(task: Task, rows: Rows) -> Keys:
    keys: Keys = {}
    for role, column in task.columns.items():
        if column.kind in ("image", "audio"):
            hashes = Hashes()
            for index, path in enumerate(paths_of(rows, role)):
                if path:
                    hashes.add(path, index)
            keys |= {role: hashes} if len(hashes) else {}
    return keys


def _of_media(
    task: Task,
    splits: Splits,
    facts: Mapping[Split, RowFacts],
    looked: Mapping[Split, list[int]],
    *,
    seconds: float,
) -> list[Finding]:
    """Decodes media of some rows, and adds the numbers of those rows to `looked`."""
    results: list[Finding] = []
    for split, rows in splits.items():
        end = time.perf_counter() + seconds / len(splits)
        seen: dict[int, dict[str, Any]] = {}
        for number, index in enumerate(spread(len(rows), LOOKED_AT)):
            if number >= LEAST and time.perf_counter() > end:
                break
            seen[index] = facts_of(task, rows[index], keys=False)
        for index in sorted(seen):
            facts[split].add(index, seen[index])
            looked[split].append(index)
        results += media_findings(task, split, rows, facts[split])
    return results


def _of_task(task: Task, splits: Splits, looked: Mapping[Split, list[int]]) -> list[Finding]:
    samples = {split: SampledRows(rows, sorted(looked[split])) for split, rows in splits.items()}
    whole = all(len(samples[split]) == len(rows) for split, rows in splits.items())
    return capability(task, DataChecks).findings(samples, whole=whole)


class SampledRows:
    """Some rows of a split.

    Args:
        rows: of the split.
        chosen: the numbers of the rows, in order.
    """

    def __init__(self, rows: Rows, chosen: list[int]) -> None:
        self.rows, self.chosen = rows, chosen
        self.column_names = rows.column_names

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return [self.rows[index][key] for index in self.chosen]
        return self.rows[self.chosen[key]]
