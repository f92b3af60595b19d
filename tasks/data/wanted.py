"""Says which rows and columns a run asks of its data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..config.schema import DataConfig
from ..core.rows import Column

FILE = "file_name"  # the column of paths in a metadata file, as Hugging Face's folders have it


@dataclass(frozen=True)
class Wanted:
    """A request for the rows of a data set.

    Attributes:
        config: the data section of the run.
        columns: the task's columns by role.
    """

    config: DataConfig
    columns: Mapping[str, Column]

    @property
    def path(self) -> Path:
        """The source as a local path, with ~ expanded."""
        return Path(self.config.source).expanduser()

    def root(self, folder: Path) -> Path:
        """Returns the folder from which relative paths in a table start.

        Args:
            folder: the folder of the table, for configs without data.root.

        Raises:
            ValueError: data.root is no folder.
        """
        if self.config.root is None:
            return folder
        root = Path(self.config.root).expanduser()
        if not root.is_dir():
            raise ValueError(f"data.root: no folder is at {self.config.root}")
        return root

    def source_name(self, role: str) -> str:
        """Returns the source's column that fills a role, as far as the config says it."""
        return self.config.columns.get(role, role)
