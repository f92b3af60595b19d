"""Says which files of a source are in no row."""

from __future__ import annotations

from ...core.findings import Finding
from ...core.task import Task
from ..layouts.find import local_parts
from ..wanted import Wanted


def file_findings(task: Task) -> list[Finding]:
    """Returns what is suspicious about the files of a local folder; its tables are not read."""
    try:
        parts = local_parts(Wanted(task.config.data, task.columns)) or {}
    except (ValueError, OSError):  # the rows came from elsewhere, or the folder has changed
        return []
    pieces = (piece for some in parts.values() for piece in some)
    return list(dict.fromkeys(finding for piece in pieces for finding in piece.findings))
