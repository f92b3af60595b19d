"""Streams of tables and folders on this machine: the same rows as when they are loaded whole."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from PIL import Image

from mmadapters.tasks.asr.task import ASRTask
from mmadapters.tasks.config.schema import DataConfig, Split
from mmadapters.tasks.core.rows import Column, Rows
from mmadapters.tasks.data import media
from mmadapters.tasks.data.load import load_splits
from mmadapters.tasks.data.stream import Stream
from mmadapters.tasks.data.tables import delimited, json_lines, shards
from mmadapters.tasks.data.tables.encodings import read_lines, read_text

TEXTS = {"text": Column("text"), "label": Column("label", required=False)}
PICTURES = {"image": Column("image"), "label": Column("label", required=False)}
SPEECH = ASRTask.columns


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


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


def picture(file: Path, red: int) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (red, 0, 0)).save(file)
    return file


def red(row: dict[str, Any]) -> int:
    return media.read_image(row["image"]).getpixel((0, 0))[0]


# Tables


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "CHARACTERS", 10)
    monkeypatch.setattr(shards, "MOST_ROWS", 2)
    monkeypatch.setattr(shards, "BYTES", 30)
    monkeypatch.setattr(json_lines, "ROWS", 2)


CSV = {
    "csv": 'text,number,split\n"a, b",1,train\n007,2,train\n"two\nlines ""x""",,test\n\nNA,3,train\n',
    "crlf": "text,number\r\na,1\r\nb,2.0\r\nc,\r\n",
    "semicolons": "text;number\na, b;1\nc;2\n",
    "bars": "text | number\n a | 1\n b | 2\n",
    "sign": 'text,number\n5" nail,1\nsay "x",2\n',
    "one": "text\na\nb\n",
}


@pytest.mark.parametrize("form", CSV)
def test_separated_cells(form: str, tmp_path: Path, small_blocks: None) -> None:
    streamed(written(tmp_path / "a.csv", CSV[form]), TEXTS)


def test_common_voices_quotes_and_other_encodings(tmp_path: Path, small_blocks: None) -> None:
    table = 'path\tsentence\na.mp3\t"Yes\nb.mp3\tNo" and 5" ß\nc.mp3\t"x"\n'
    columns = {"text": "sentence"}
    for encoding in ("utf-8", "utf-16", "cp1252"):
        settings = {"encoding": encoding} if encoding == "cp1252" else {}
        file = written(tmp_path / "a.tsv", table, encoding)
        rows = streamed(file, TEXTS, columns=columns, **settings)["train"]
        assert [row["text"] for row in rows] == ['"Yes', 'No" and 5" ß', '"x"']
    file = written(tmp_path / "a.tsv", table, "cp1252")
    refused("line 3 is not utf-8 .byte 0xdf.: name its encoding", file, TEXTS, columns=columns)


JSON_ROWS: list[dict[str, Any]] = [
    {"text": "a", "n": 1},
    {"text": 2, "n": 1.5, "more": {"x": 1}},
    {"text": 1.50, "n": None, "split": "test", "more": {"y": "z"}},
    {"text": True, "mixed": 1, "split": "train", "list": ["u"]},
    {"text": "2020-01-01", "mixed": "b", "split": "train", "list": []},
]


@pytest.mark.parametrize("form", ["lines", "list", "inside"])
def test_json(form: str, tmp_path: Path, small_blocks: None) -> None:
    text = {
        "lines": "\n".join(map(json.dumps, JSON_ROWS)) + "\n",
        "list": json.dumps(JSON_ROWS),
        "inside": json.dumps({"info": {}, "data": JSON_ROWS}, indent=1),
    }[form]
    rows = streamed(written(tmp_path / "a.json", text), TEXTS)
    assert [row["text"] for row in rows["train"]] == ["true", "2020-01-01"]
    assert rows["train"][0]["mixed"] == "1"


def test_parquet_with_pictures_and_classes(tmp_path: Path, small_blocks: None) -> None:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "date": datasets.Value("date32"),
        }
    )
    data = [picture(tmp_path / f"{i}.png", i).read_bytes() for i in range(6)]
    cells = {
        "image": [{"bytes": b, "path": f"{i}.png"} for i, b in enumerate(data)],
        "label": [0, 1, -1, 0, 1, 0],
        "date": [None] * 6,
    }
    for name, part in {"train-0": slice(0, 2), "train-1": slice(2, 5), "test": slice(5, 6)}.items():
        rows = datasets.Dataset.from_dict({k: v[part] for k, v in cells.items()}, features)
        rows.to_parquet(tmp_path / "data" / f"{name}.parquet")
    rows = streamed(tmp_path, PICTURES)
    assert [(red(row), row["label"]) for row in rows["train"]] == [
        *((0, "cat"), (1, "dog"), (2, None), (3, "cat"), (4, "dog")),
    ]


def test_several_tables_are_one(tmp_path: Path, small_blocks: None) -> None:
    written(tmp_path / "train-0.csv", "text,n,m\na,1,1\nb,2,\n")
    written(tmp_path / "train-1.csv", "m,text,x\n4,c,9\ny,d,9\n")
    written(tmp_path / "valid.csv", "text\ne\n")
    rows = streamed(tmp_path, TEXTS)["train"]
    assert [row["m"] for row in rows] == ["1", "", "4", "y"]
    assert [row["n"] for row in rows] == [1, 2, None, None]
    written(tmp_path / "train-1.csv", "")
    refused("train-1.csv cannot be read: it is empty", tmp_path, TEXTS)
