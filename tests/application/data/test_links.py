"""Links between folders: each file is read once."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmadapters.tasks.data.layouts.links import is_circle
from mmadapters.tasks.data.layouts.media_folders import media_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two classes with links in circles, and one to a folder elsewhere."""
    for place in ("data/cat", "data/dog/deep", "elsewhere"):
        (tmp_path / place).mkdir(parents=True)
    for file in ("data/cat/1.png", "data/dog/2.png", "elsewhere/3.png"):
        (tmp_path / file).write_bytes(b"")
    (tmp_path / "data/dog/deep/all").symlink_to(tmp_path / "data")
    (tmp_path / "data/cat/here").symlink_to(".")
    (tmp_path / "data/fox").symlink_to(tmp_path / "elsewhere")
    return tmp_path / "data"


def test_a_link_in_a_circle_multiplies_no_rows(folder: Path) -> None:
    assert sorted(media_files(folder)) == ["cat/1.png", "dog/2.png", "fox/3.png"]
    assert is_circle(str(folder / "cat/here"))
    assert not is_circle(str(folder / "fox"))
    assert not is_circle(str(folder / "cat"))


def test_a_glob_reads_no_table_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmadapters.tasks.classification.config import ClassificationConfig
    from mmadapters.tasks.classification.task import ClassificationTask
    from mmadapters.tasks.data.load import load_splits

    (folder / "cat/rows.csv").write_text("image,label\n1.png,cat\n")
    monkeypatch.chdir(folder)
    data = {"source": f"{folder}/**/*.csv"}
    config = ClassificationConfig(backbone={"name": "nano/vit"}, data=data)  # type: ignore[arg-type]
    splits = load_splits(config.data, ClassificationTask(config).columns)
    assert sum(len(rows) for rows in splits.values()) == 1
