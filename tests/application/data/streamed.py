"""Loads data whole and as a stream, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmadapters.tasks.config.schema import DataConfig, Split
from mmadapters.tasks.core.rows import Column, Rows
from mmadapters.tasks.data import media
from mmadapters.tasks.data.load import load_splits
from mmadapters.tasks.data.stream import Stream

PICTURES = {"image": Column("image"), "label": Column("label", required=False)}


def load(source: Path | str, roles: dict[str, Column], /, **settings: Any) -> dict[Split, Rows]:
    return load_splits(DataConfig(source=str(source), **settings), roles)


def streamed(
    source: Path | str, roles: dict[str, Column], /, **settings: Any
) -> dict[Split, list[dict[str, Any]]]:
    """The rows of each split as a stream, which are those of the whole data."""
    whole = load(source, roles, **settings)
    rows = load(source, roles, streaming=True, **settings)
    assert list(rows) == list(whole)
    assert "train" not in rows or isinstance(rows["train"], Stream)
    lists = {split: list(part) for split, part in rows.items()}
    for split, part in lists.items():
        assert part == list(whole[split])
        assert set(rows[split].column_names) == set(whole[split].column_names)
    return lists


def refused(message: str, source: Path | str, roles: dict[str, Column], /, **settings: Any) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(source, roles, streaming=True, **settings)
    assert "\n" not in str(caught.value)


def written(file: Path, text: str, encoding: str = "utf-8") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode(encoding))
    return file


def red(row: dict[str, Any]) -> int:
    return media.read_image(row["image"]).getpixel((0, 0))[0]
