"""webdataset's tars and img2dataset's folders, whole and as streams."""

from __future__ import annotations

import io
import json
import os
import tarfile
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from application.data.streamed import PICTURES, load, red, refused, streamed, written
from application.training.tints import TintTask, job
from PIL import Image

from mmadapters.tasks.core.errors import BadRow
from mmadapters.tasks.core.rows import Column
from mmadapters.tasks.data import media
from mmadapters.tasks.data.captions import COLUMNS as CAPTIONS
from mmadapters.tasks.data.layouts.archives import shards
from mmadapters.tasks.data.layouts.archives.webdataset import expanded
from mmadapters.tasks.training.cache.identity import rows_identity


@pytest.fixture(autouse=True)
def small_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(shards, "ROWS", 2)


def picture(value: int, suffix: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, suffix)
    return buffer.getvalue()


def tar(file: Path, members: dict[str, bytes | str], mode: str = "w") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as out:
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return file


def members(numbers: range) -> dict[str, bytes | str]:
    found: dict[str, bytes | str] = {}
    for i in numbers:
        key = f"{i:06}"
        found[f"{key}.cls"] = str(i % 2)
        found[f"{key}.json"] = json.dumps({"id": i, "split": "test" if i == 4 else "train"})
        found[f"{key}.png"] = picture(i)
        found[f"{key}.txt"] = f"text {i}\n"
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, rows in enumerate((range(3), range(3, 5))):
        tar(tmp_path / "tars" / f"{number:04}.tar", members(rows))
    return tmp_path / "tars"


@pytest.mark.parametrize("source", ["", "0000.tar", "*.tar", "{0000..0001}.tar"])
def test_tars_and_their_columns(source: str, folder: Path) -> None:
    rows = streamed(folder / source, PICTURES)
    known = [(red(row), row["label"], row["txt"], row["__key__"]) for row in rows["train"]]
    count = 3 if source == "0000.tar" else 4
    assert known == [(i, i % 2, f"text {i}", f"{i:06}") for i in range(count)]
    if count == 4:
        assert [row["id"] for row in rows["test"]] == [4]
    captions = load(folder / source, CAPTIONS)["train"]
    assert captions[1]["caption"] == "text 1"


def test_media_of_a_tar_are_read_where_they_lie(folder: Path) -> None:
    row = load(folder, PICTURES)["train"][2]
    assert row["image"]["bytes"] is None
    assert media.media_name(row["image"]) == "000002.png"
    assert media.media_digest(row["image"]) == media.media_digest(picture(2))
    task = TintTask(job())
    before = rows_identity(task, load(folder, PICTURES)["train"])
    assert before == rows_identity(task, load(folder, PICTURES)["train"])
    os.utime(folder / "0000.tar", (1, 1))
    assert before != rows_identity(task, load(folder, PICTURES)["train"])
    (folder / "0000.tar").write_bytes((folder / "0000.tar").read_bytes()[:5000])
    with pytest.raises(BadRow, match=r"0000.tar is shorter than it was"):
        media.read_image(row["image"])


def test_compressed_tars_are_streamed(tmp_path: Path) -> None:
    file = tar(tmp_path / "a.tar.gz", members(range(3)), "w:gz")
    rows = list(load(file, PICTURES, streaming=True)["train"])
    assert [(red(row), row["label"]) for row in rows] == [(0, 0), (1, 1), (2, 0)]
    with pytest.raises(ValueError, match=r"is compressed.*set data.streaming: true, or decompress"):
        load(file, PICTURES)


def test_splits_of_tars(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "val-0"):
        tar(tmp_path / "named" / "data" / f"{name}.tar", {"a.png": picture(1), "a.cls": "1"})
        tar(tmp_path / "nested" / name[:-2] / f"{name}.tar", {"a.png": picture(1), "a.cls": "1"})
    for name in ("named", "nested"):
        rows = streamed(tmp_path / name, PICTURES)
        assert [len(part) for part in rows.values()] == [2, 1]


def test_several_media_of_a_row(tmp_path: Path) -> None:
    roles = {"image": Column("image"), "mask": Column("mask")}
    for names in (("0.jpg", "0.png"), ("0.image.jpg", "0.mask.png")):
        tar(tmp_path / "a.tar", {names[0]: picture(9, "JPEG"), names[1]: picture(3)})
        (row,) = streamed(tmp_path / "a.tar", roles)["train"]
        assert media.media_name(row["mask"]) == names[1]
    sound = io.BytesIO()
    soundfile.write(sound, np.full(100, 0.5), 4000, format="FLAC")
    tar(tmp_path / "a.tar", {"x/0.flac": sound.getvalue(), "x/0.txt": "hello", "README": "no"})
    speech = {"audio": Column("audio"), "text": Column("text")}
    (row,) = streamed(tmp_path / "a.tar", speech)["train"]
    assert row["text"] == "hello"
    assert float(media.read_audio(row["audio"], 4000)[50]) == 0.5


@pytest.mark.parametrize("suffix", ["pkl", "pickle", "pyd", "pth", "pt", "boxes.pkl"])
def test_pickles_are_refused_by_name(suffix: str, tmp_path: Path) -> None:
    file = tar(tmp_path / "a.tar", {"0.png": picture(0), f"0.{suffix}": b"\x80\x04N."})
    with pytest.raises(ValueError, match=rf"the member 0.{suffix} is a pickle"):
        load(file, {"image": Column("image")})
    refused(rf"the member 0.{suffix} is a pickle", file, {"image": Column("image")})


def test_what_no_task_reads_is_named(tmp_path: Path) -> None:
    parts = {f"{i}.{suffix}": picture(i) for i in range(2) for suffix in ("png", "npy")}
    tar(tmp_path / "a.tar", parts)
    for streaming in (False, True):
        with pytest.warns(UserWarning, match="passed over: 2 .npy"):
            load(tmp_path / "a.tar", {"image": Column("image")}, streaming=streaming)


def test_broken_tars_are_named(tmp_path: Path, folder: Path) -> None:
    image = {"image": Column("image")}
    for name, some, message in (
        ("unsorted", ("0.png", "1.png", "0.txt", "1.txt"), "members of '0' are not next to each"),
        ("twice", ("0.png", "0.txt", "0.txt"), "gives '0' a second 'txt'"),
        ("nothing", ("README",), "has no files that are called KEY.jpg"),
    ):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as out:
            for member in some:
                info = tarfile.TarInfo(member)
                info.size = 1
                out.addfile(info, io.BytesIO(b"x"))
        with pytest.raises(ValueError, match=message):
            list(load(tmp_path / f"{name}.tar", image, streaming=True)["train"])
    bad = tar(tmp_path / "bad.tar", {"0.png": picture(0), "0.json": "{"})
    refused("bad.tar cannot be read: the member 0.json cannot be read: line 1", bad, image)
    whole = tar(tmp_path / "two.tar", {"0.png": b"x", "1.png": b"y"}).read_bytes()
    cut = tmp_path / "cut.tar"
    for end, message in ((1024, "it has no end mark"), (1536, "unexpected end of data")):
        cut.write_bytes(whole[:end])
        refused(f"cut.tar cannot be read: it is no complete tar: {message}", cut, image)
    refused("names 3 tars, and there is no file .*0002.tar", folder / "{0000..0002}.tar", image)
    assert list(expanded("{a,b}-{08..10}.tar"))[:2] == ["a-08.tar", "a-09.tar"]


def test_a_column_that_comes_later_is_not_lost(tmp_path: Path) -> None:
    parts: dict[str, bytes | str] = {f"{i}.png": picture(i) for i in range(4)}
    file = tar(tmp_path / "a.tar", {**parts, "4.png": picture(4), "4.label.txt": "cat"})
    stream = load(file, PICTURES, streaming=True)["train"]
    with pytest.raises(ValueError, match="first rows have no label, and later ones have it"):
        list(stream)
    assert load(file, PICTURES)["train"]["label"][:] == [None, None, None, None, "cat"]


def test_an_archive_beside_what_was_unpacked_from_it(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        place = tmp_path / name / "0.png"
        place.parent.mkdir()
        place.write_bytes(picture(1))
    tar(tmp_path / "train.tar", {"cat/0.png": picture(1)})
    assert load(tmp_path, PICTURES)["train"]["label"][:] == ["cat", "dog"]


# img2dataset


def img2dataset(folder: Path, form: str) -> Path:
    for shard, numbers in (("00000", range(3)), ("00001", range(3, 5))):
        rows: list[dict[str, Any]] = []
        files: dict[str, bytes | str] = {}
        for i in numbers:
            key = f"{shard}{i:04}"
            good = i != 1
            row = {"url": f"http://host/{i}.jpg", "caption": f"text {i}", "key": key}
            row |= {"status": "success" if good else "failed_to_download"}
            row |= {"width": 4 if good else None, "exif": "{}"}
            data = picture(10 * i, "JPEG")
            rows.append(row | ({"jpg": data if good else None} if form == "parquet" else {}))
            if good:
                files |= {f"{key}.jpg": data, f"{key}.json": json.dumps(row)}
                files |= {f"{key}.txt": f"text {i}"}
        written(folder / f"{shard}_stats.json", "{}")
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard}.parquet")
        if form == "webdataset":
            tar(folder / f"{shard}.tar", files)
        for name, content in files.items() if form == "files" else ():
            (folder / shard).mkdir(exist_ok=True)
            (folder / shard / name).write_bytes(
                content.encode() if isinstance(content, str) else content
            )
    return folder


@pytest.mark.parametrize("form", ["webdataset", "files", "parquet"])
def test_img2dataset(form: str, tmp_path: Path) -> None:
    folder = img2dataset(tmp_path / "laion", form)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = streamed(folder, CAPTIONS)["train"]
    assert [row["caption"] for row in rows] == [f"text {i}" for i in (0, 2, 3, 4)]
    assert np.allclose([red(row) for row in rows], [0, 20, 30, 40], atol=2)
    assert rows[0]["width"] == 4
    (folder / "00001_stats.json").unlink()
    refused("img2dataset has not finished .*00001.* run it again to the end", folder, CAPTIONS)


def test_img2dataset_without_pictures(tmp_path: Path) -> None:
    folder = img2dataset(tmp_path / "laion", "dummy")
    refused("is a folder of img2dataset without pictures", folder, CAPTIONS)
