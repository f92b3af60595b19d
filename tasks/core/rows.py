"""Rows of a data set, and the forms that they take on their way to a score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

# One row as a task reads it: tensors and plain values by name.
Example = dict[str, Any]
# Examples put together: the keyword arguments of a model's forward pass.
Batch = dict[str, Any]
# What evaluation keeps of one example: numbers, text and small arrays by name.
Record = dict[str, Any]


class Rows(Protocol):
    """A split of a data set: rows by number, columns by name. `datasets.Dataset` is one."""

    column_names: list[str]

    def __len__(self) -> int: ...
    def __getitem__(self, key: Any) -> Any:
        """Returns a row as a dict for a number, and a column as a list for a name."""


@dataclass(frozen=True)
class Column:
    """A column that a task reads.

    Attributes:
        kind: the type of its values: "image", "mask", "segments", "audio", "seconds", "text",
            "label" or "texts". `mmadapters doctor` checks them accordingly.
        required: whether every data set of the task must have the column.
        description: what the column holds, in words for a user.
    """

    kind: str
    required: bool = True
    description: str = ""
