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
from ..media import media_name, spread
from ..stream import Stream
from .checks import RowFacts, answer_of, conflicts_of, facts_of, media_findings, texts_of
from .files import file_findings
from .repeats import Answer, Keys, about_parts, answer_role, paths_of, shared_findings
from .results import RowPlace

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
    facts = {split: RowFacts(rows=len(rows)) for split, rows in local.items()}

    def files() -> list[Finding]:
        return file_findings(task)

    def columns() -> list[Finding]:
        return _of_columns(task, local)

    def media() -> list[Finding]:
        return _of_media(task, local, facts, seconds)

    def of_task() -> list[Finding]:
        return _of_task(task, local, facts)

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
    keys = {split: _paths(task, rows) for split, rows in few.items()}
    results += shared_findings(keys)
    role = answer_role(task.columns)
    for split, rows in few.items():
        places = {place.index: place for of_role in keys[split].values() for _, place in of_role}
        results += texts_of(task, split, rows, places)
        kind = "" if role is None else task.columns[role].kind
        if role is None or kind == "mask" or about_parts(rows):
            continue
        if keys[split] and role in rows.column_names:
            values = ((index, answer_of(value, kind)) for index, value in enumerate(rows[role]))
            answers = {index: Answer(text) for index, text in values if text is not None}
            results += conflicts_of(task, split, keys[split], answers)
    return results


def _paths(task: Task, rows: Rows) -> Keys:
    keys: Keys = {}
    for role, column in task.columns.items():
        if column.kind in ("image", "audio"):
            paths = enumerate(paths_of(rows, role))
            named = [(path, RowPlace(i, media_name(path))) for i, path in paths if path]
            keys |= {role: named} if named else {}
    return keys


def _of_media(
    task: Task, splits: Splits, facts: Mapping[Split, RowFacts], seconds: float
) -> list[Finding]:
    results: list[Finding] = []
    kinds = {role: column.kind for role, column in task.columns.items()}
    names = {role for role, kind in kinds.items() if kind in ("image", "audio")}
    for split, rows in splits.items():
        end = time.perf_counter() + seconds / len(splits)
        seen: dict[int, tuple[RowPlace, dict[str, Any]]] = {}
        for number, index in enumerate(spread(len(rows), LOOKED_AT)):
            if number >= LEAST and time.perf_counter() > end:
                break
            row = rows[index]
            name = next((n for role in names if (n := media_name(row.get(role)))), None)
            seen[index] = RowPlace(index, name), facts_of(task, row, keys=False)
        for index in sorted(seen):
            facts[split].add(*seen[index])
        results += media_findings(task, split, rows, facts[split])
    return results


def _of_task(task: Task, splits: Splits, facts: Mapping[Split, RowFacts]) -> list[Finding]:
    samples = {
        split: SampledRows(rows, sorted(facts[split].places)) for split, rows in splits.items()
    }
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
