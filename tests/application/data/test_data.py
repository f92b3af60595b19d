"""Data from tables, folders and the cache of `datasets`: columns, splits, filters, limits."""

import io
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmadapters.tasks.config.schema import DataConfig, Split
from mmadapters.tasks.core.rows import Column, Rows
from mmadapters.tasks.data import media
from mmadapters.tasks.data.load import load_splits

PICTURES = {"image": Column("image"), "text": Column("text")}
MASKS = {"image": Column("image"), "mask": Column("mask")}
SPEECH = {"audio": Column("audio"), "text": Column("text")}
CLASSES = {"image": Column("image"), "label": Column("label", required=False)}
TEXTS = {"text": Column("text")}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(source: Path | str, roles: dict[str, Column], /, **settings: Any) -> dict[Split, Rows]:
    return load_splits(DataConfig(source=str(source), **settings), roles)


def refused(message: str, source: Path | str, roles: dict[str, Column], /, **settings: Any) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(source, roles, **settings)
    assert "\n" not in str(caught.value)


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_csv(file: Path, *lines: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def write_jsonl(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures of rising redness with texts, six of them to train on."""
    (tmp_path / "set" / "images").mkdir(parents=True)
    lines = ["file_name,text,split,group"]
    for i in range(10):
        (tmp_path / "set" / "images" / f"{i}.png").write_bytes(png(i))
        split = "train" if i < 6 else "validation" if i < 8 else "test"
        lines.append(f"images/{i}.png,number {i},{split},{'even' if i % 2 == 0 else 'odd'}")
    write_csv(tmp_path / "set" / "metadata.csv", *lines)
    return tmp_path / "set"


def redness(rows: Rows) -> list[int]:
    return [np.asarray(media.read_image(row["image"]))[0, 0, 0] for row in rows]


# Where data lies


def test_folder_with_metadata(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    for source in (folder, "set", "set/metadata.csv", "./set/*.csv"):
        found = load(source, PICTURES)
        assert list(found) == ["train", "validation", "test"]
        assert redness(found["train"]) == [0, 1, 2, 3, 4, 5]
        assert redness(found["test"]) == [8, 9]
        row = found["validation"][0]
        assert row["text"] == "number 6"
        assert row["group"] == "even"
        assert row["image"] == {"bytes": None, "path": str(folder / "images" / "6.png")}
        assert set(found["train"].column_names) == {"image", "text", "split", "group"}


def test_json_lines_json_list_and_parquet_hold_the_same(folder: Path) -> None:
    rows = [
        {"file_name": f"images/{i}.png", "text": f"n {i}", "split": "train" if i < 8 else "test"}
        for i in range(10)
    ]
    cells = [list(rows[0]), *(row.values() for row in rows)]
    files = [
        write_jsonl(folder / "a.jsonl", rows),
        write_jsonl(folder / "b.json", rows),
        folder / "c.json",
        folder / "d.parquet",
        write_csv(folder / "e.tsv", *("\t".join(line) for line in cells)),
        write_csv(folder / "f.csv", *(";".join(line) for line in cells)),
    ]
    files[2].write_text(json.dumps(rows, indent=2))
    pq.write_table(pa.Table.from_pylist(rows), files[3])
    for file in files:
        found = load(file, PICTURES)
        assert redness(found["test"]) == [8, 9], file
        assert found["train"]["text"][:3] == ["n 0", "n 1", "n 2"], file


def test_metadata_jsonl(folder: Path) -> None:
    (folder / "metadata.csv").unlink()
    write_jsonl(folder / "metadata.jsonl", [{"file_name": "images/3.png", "text": "three"}])
    assert redness(load(folder, PICTURES)["train"]) == [3]


def test_files_named_by_split_and_globs_of_them(folder: Path) -> None:
    parts = {"train-0": [0, 1], "train-1": [2], "val": [3], "test": [4, 5]}
    for name, numbers in parts.items():
        lines = [f"images/{i}.png,{i}" for i in numbers]
        write_csv(folder / f"{name}.csv", "file_name,text", *lines)
    (folder / "metadata.csv").unlink()
    for source in (folder, folder / "*.csv"):
        found = {split: redness(rows) for split, rows in load(source, PICTURES).items()}
        assert found == {"train": [0, 1, 2], "validation": [3], "test": [4, 5]}
    assert list(load(folder / "train-*.csv", PICTURES)) == ["train"]


def test_folders_named_by_split_have_their_own_paths(folder: Path) -> None:
    (folder / "metadata.csv").unlink()
    for name, i in (("train", 1), ("dev", 2)):
        (folder / name).mkdir()
        (folder / name / "here.png").write_bytes(png(i))
        write_csv(folder / name / "metadata.csv", "file_name,text", "here.png,x")
    found = {split: redness(rows) for split, rows in load(folder, PICTURES).items()}
    assert found == {"train": [1], "validation": [2]}


def test_glob_over_folders_keeps_each_ones_paths(tmp_path: Path) -> None:
    for i, text in enumerate(("a", "7")):
        place = tmp_path / f"part{i}"
        write_csv(place / "list.csv", "file_name,text", f"x.png,{text}")
        (place / "x.png").write_bytes(png(i))
    found = load(tmp_path / "*" / "list.csv", PICTURES)["train"]
    assert redness(found) == [0, 1]
    assert found["text"][:] == ["a", "7"]


def test_folder_for_each_class(tmp_path: Path) -> None:
    for name in ("train/cat", "train/dog", "test/cat"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.png").write_bytes(png(1))
    (tmp_path / "train" / "cat" / "note.txt").touch()
    found = load(tmp_path, CLASSES)
    assert found["train"]["label"][:] == ["cat", "dog"]
    assert found["test"]["label"][:] == ["cat"]
    assert redness(found["train"]) == [1, 1]


@pytest.mark.parametrize("layout", ["{split}/{kind}", "{kind}/{split}"])
def test_folders_of_images_and_masks(tmp_path: Path, layout: str) -> None:
    for split, i in (("train", 1), ("train", 2), ("val", 3)):
        for kind, suffix in (("images", "bmp"), ("masks", "png")):
            place = tmp_path / layout.format(split=split, kind=kind)
            place.mkdir(parents=True, exist_ok=True)
            Image.new("L", (2, 2), i).save(place / f"{i}.{suffix}")
    next(tmp_path.glob("**/2.png")).unlink()
    found = load(tmp_path, MASKS)
    assert redness(found["train"]) == [1, 2]
    assert media.read_mask(found["train"][0]["mask"]).max() == 1
    assert found["train"][1]["mask"] is None
    assert media.read_mask(found["validation"][0]["mask"]).max() == 3


def test_masks_of_other_names_than_the_images_are_told(tmp_path: Path) -> None:
    for kind, name in (("images", "1.png"), ("masks", "2_mask.png")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / name).write_bytes(png(1))
    refused(r"no image and mask have the same name \(images/1.png, masks/2_mask", tmp_path, MASKS)


def test_parquet_with_media_and_classes_inside(tmp_path: Path) -> None:
    """As `datasets` writes them: undecoded, memory-mapped, classes by name."""
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "sound": datasets.Audio(),
            "more": datasets.List(datasets.Image()),
        }
    )
    storage = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    embedded = [{"bytes": png(i), "path": f"{i}.png"} for i in range(4)]
    table = pa.table(
        {
            "img": pa.array(embedded, storage),
            "label": pa.array([0, 1, -1, None], pa.int64()),
            "sound": pa.array([None] * 4, storage),
            "more": pa.array([[]] * 4, pa.list_(storage)),
        }
    )
    pq.write_table(
        table.replace_schema_metadata(features.arrow_schema.metadata), tmp_path / "a.parquet"
    )
    rows = load(tmp_path / "a.parquet", CLASSES, columns={"image": "img"})["train"]
    assert rows[0] == {"image": embedded[0], "label": "cat", "sound": None}
    assert rows["label"][:] == ["cat", "dog", None, None]
    assert redness(rows) == [0, 1, 2, 3]
    assert isinstance(rows, datasets.Dataset)
    assert rows.cache_files, "media should stay on disk"


def test_class_labels_can_be_texts(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.ClassLabel(names=["yes", "no"])})
    table = pa.table({"text": pa.array([1, 0, None], pa.int64())})
    table = table.replace_schema_metadata(features.arrow_schema.metadata)
    pq.write_table(table, tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet", TEXTS)["train"]["text"][:] == ["no", "yes", ""]


def test_parquet_of_bare_bytes_and_of_paths(folder: Path) -> None:
    columns = {
        "bytes": pa.array([png(1), png(2)]),
        "large": pa.array([png(1), png(2)], pa.large_binary()),
        "paths": pa.array(["images/1.png", "images/2.png"]),
        "large_paths": pa.array(["images/1.png", "images/2.png"], pa.large_string()),
        "structs": pa.array([{"path": "images/1.png"}, {"path": "images/2.png"}]),
        "mixed": pa.array(
            [{"bytes": png(1), "path": "x"}, {"bytes": None, "path": "images/2.png"}]
        ),
    }
    (folder / "a").mkdir()
    pq.write_table(pa.table(columns), folder / "a.parquet")
    for name in columns:
        rows = load(folder / "a.parquet", {"image": Column("image")}, columns={"image": name})
        assert redness(rows["train"]) == [1, 2], name


def test_lists_of_texts_and_decoded_samples_stay(tmp_path: Path) -> None:
    rows = [{"captions": ["a", "b"], "audio": {"array": [0.0, 0.5], "sampling_rate": 8000}}]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    found = load(file, {"audio": Column("audio"), "captions": Column("texts")})["train"]
    assert found[0]["captions"] == ["a", "b"]
    np.testing.assert_array_equal(media.read_audio(found[0]["audio"], 8000), [0, 0.5])


# Cells


def test_csv_cells_are_what_is_written_there(tmp_path: Path) -> None:
    texts = ["NA", "null", "nan", "007", "1.50", "2020-01-01", "true", "", '"a, ""b"""', "é\u2028"]
    file = write_csv(tmp_path / "a.csv", "text", *(text or '""' for text in texts))
    expected = [*texts[:8], 'a, "b"', texts[9]]
    assert load(file, TEXTS)["train"]["text"][:] == expected


def test_csv_of_whole_numbers(tmp_path: Path) -> None:
    columns = {"text": Column("text"), "label": Column("label")}
    file = write_csv(tmp_path / "a.csv", "text,label,code", "7,3,01", "12,,02", "-4,10,03")
    rows = load(file, columns)["train"]
    assert rows["text"][:] == ["7", "12", "-4"]
    assert rows["label"][:] == [3, None, 10]
    assert rows["code"][:] == ["01", "02", "03"]


def test_text_is_never_none(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": None}, {"text": "a"}, {}, {"text": ""}])
    assert load(file, TEXTS)["train"]["text"][:] == ["", "a", "", ""]
    file = write_jsonl(tmp_path / "b.jsonl", [{"text": 1.5}, {"text": 2}])
    assert load(file, TEXTS)["train"]["text"][:] == ["1.5", "2"]


def test_byte_order_mark_and_line_breaks_in_cells(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbftext,x\r\n"one\ntwo",1\r\n')
    rows = load(tmp_path / "a.csv", TEXTS)["train"]
    assert rows["text"][:] == ["one\ntwo"]


def test_absolute_empty_and_foreign_paths(tmp_path: Path) -> None:
    paths = ["/a/b.png", "C:\\a\\b.png", "hf://x/y.png", "", "../c.png"]
    file = write_jsonl(tmp_path / "a.jsonl", [{"image": path} for path in [*paths, None]])
    rows = load(file, {"image": Column("image")})["train"]
    found = [row["image"] and row["image"]["path"] for row in rows]
    assert found == [*paths[:3], None, str(tmp_path / "../c.png"), None]


def test_media_behind_urls_are_fetched(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/a.png", png(9))
    url = f"zip://in/a.png::{tmp_path / 'a.zip'}"
    file = write_jsonl(tmp_path / "a.jsonl", [{"image": url}, {"image": url + "x"}])
    rows = load(file, {"image": Column("image")})["train"]
    assert redness(rows.select([0])) == [9]
    with pytest.raises(ValueError, match="cannot fetch zip://"):
        media.read_image(rows[1]["image"])


# Columns


def test_columns_are_mapped_and_may_swap(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", "text,caption,image,picture", "t,c,old.png,new.png")
    mapping = {"text": "caption", "caption": "text", "image": "picture"}
    columns = {"text": Column("text"), "caption": Column("text"), "image": Column("image")}
    row = load(file, columns, columns=mapping)["train"][0]
    path = str(tmp_path / "new.png")
    assert row == {"text": "c", "caption": "t", "image": {"bytes": None, "path": path}}


def test_columns_found_without_mapping(tmp_path: Path) -> None:
    file = write_csv(
        tmp_path / "a.csv", "file_name,depth_file_name,mask_file_name", "a.png,b.png,c.png"
    )
    columns = {"image": Column("image"), "depth": Column("image"), "truth": Column("mask")}
    row = load(file, columns)["train"][0]
    assert {role: Path(row[role]["path"]).name for role in columns} == {
        "image": "a.png",
        "depth": "b.png",
        "truth": "c.png",
    }


def test_optional_columns_may_be_missing(folder: Path) -> None:
    assert "label" not in load(folder, CLASSES)["train"].column_names


def test_missing_columns_are_told_with_the_nearest(folder: Path) -> None:
    refused(
        r"no column 'groups' \(who\); did you mean 'group'\?; its columns are file_name, text, "
        r"split, group: say which one it is by data.columns: \{groups: group\}",
        folder,
        {"groups": Column("text", description="who")},
    )
    refused("no column 'answer'; its columns", folder, {"answer": Column("text")})
    refused("data.columns: text is 'txt'.*mean 'text'", folder, TEXTS, columns={"text": "txt"})
    refused("no 'imag' to fill; did you mean 'image'", folder, PICTURES, columns={"imag": "text"})
    refused(
        "image and text would both be the column 'text'",
        folder,
        PICTURES,
        columns={"image": "text", "text": "text"},
    )
    refused(
        "'n' holds int64, which is no image",
        write_csv(folder / "n.csv", "n", "1"),
        {"image": Column("image")},
        columns={"image": "n"},
    )


# Splits


def test_split_column_of_another_name_and_values(tmp_path: Path) -> None:
    lines = [f"{i},{'abc'[i % 3]}" for i in range(6)]
    file = write_csv(tmp_path / "a.csv", "text,part", *lines)
    settings = {"split_column": "part", "splits": {"train": "a", "test": "c"}}
    found = load(file, TEXTS, **settings)
    assert {split: rows["text"][:] for split, rows in found.items()} == {
        "train": ["0", "3"],
        "test": ["2", "5"],
    }
    refused("none of its splits a, b, c .* as {train: a}", file, TEXTS, split_column="part")
    refused(
        "data.splits: test is 'd', .*splits are a, b, c",
        file,
        TEXTS,
        split_column="part",
        splits={"test": "d"},
    )
    refused("data.split_column: .*no column 'prt'; did", file, TEXTS, split_column="prt")


@pytest.mark.parametrize("name", ["Valid", "DEV", "val", "validation"])
def test_usual_names_of_splits_are_known(tmp_path: Path, name: str) -> None:
    file = write_csv(tmp_path / "a.csv", "text,split", "a,Training", f"b,{name}", "c,", "d,extra")
    found = load(file, TEXTS)
    assert {split: rows["text"][:] for split, rows in found.items()} == {
        "train": ["a"],
        "validation": ["b"],
    }


def test_one_part_may_serve_two_splits_by_filters(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", "text,speaker", "1,ann", "2,bob", "3,eve", "4,bob")
    found = load(
        file,
        TEXTS,
        splits={"test": "train", "train": "train"},
        keep={"test": {"speaker": ["bob"]}},
        drop={"train": {"speaker": ["bob"]}},
    )
    assert {split: rows["text"][:] for split, rows in found.items()} == {
        "test": ["2", "4"],
        "train": ["1", "3"],
    }


def numbers(tmp_path: Path, count: int = 100) -> Path:
    return write_csv(tmp_path / "n.csv", "text", *map(str, range(count)))


def test_fractions_are_drawn_from_training_by_seed(tmp_path: Path) -> None:
    file = numbers(tmp_path)

    def texts(**settings: Any) -> dict[Split, list[str]]:
        return {split: r["text"][:] for split, r in load(file, TEXTS, **settings).items()}

    found = texts(fractions={"validation": 0.1, "test": 0.2})
    assert {split: len(some) for split, some in found.items()} == {
        "train": 70,
        "validation": 10,
        "test": 20,
    }
    together = sorted((text for some in found.values() for text in some), key=int)
    assert together == list(map(str, range(100)))
    assert found == texts(fractions={"test": 0.2, "validation": 0.1})
    assert found["test"] == texts(fractions={"test": 0.2})["test"]
    other = texts(fractions={"validation": 0.1, "test": 0.2}, seed=1)
    assert other["test"] != found["test"]
    assert found["test"] == sorted(found["test"], key=int), "rows keep their order"
    only = load_splits(
        DataConfig(source=str(file), fractions={"validation": 0.1, "test": 0.2}), TEXTS, ("test",)
    )
    assert list(only) == ["test"]
    assert only["test"]["text"][:] == found["test"]


def test_fractions_are_of_missing_splits_alone(folder: Path) -> None:
    found = load(folder, PICTURES, fractions={"test": 0.5})
    assert {split: len(rows) for split, rows in found.items()} == {
        "train": 6,
        "validation": 2,
        "test": 2,
    }


def test_validation_is_drawn_from_the_filtered_training_rows(tmp_path: Path) -> None:
    lines = [f"{i},{'ab'[i % 2]},{'test' if i > 79 else 'train'}" for i in range(100)]
    file = write_csv(tmp_path / "a.csv", "text,accent,split", *lines)
    settings = {"fractions": {"validation": 0.25}, "keep": {"train": {"accent": ["a"]}}}
    found = load(file, TEXTS, **settings)
    assert len(found["train"]) == 30
    assert len(found["validation"]) == 10
    assert set(found["validation"]["accent"][:]) == {"a"}
    assert set(found["test"]["accent"][:]) == {"a", "b"}


@pytest.mark.parametrize("kind", ["paths", "embedded"])
def test_rows_of_one_picture_stay_together(tmp_path: Path, kind: str) -> None:
    rows = [{"image": f"{i // 4}.png", "text": str(i)} for i in range(80)]
    if kind == "paths":
        file = write_jsonl(tmp_path / "a.jsonl", rows)
    else:
        # All of one name, as some data sets have it.
        embedded = [{"bytes": png(i // 4), "path": "image.png"} for i in range(80)]
        table = pa.table({"image": embedded, "text": [row["text"] for row in rows]})
        file = tmp_path / "a.parquet"
        pq.write_table(table, file)
    found = load(file, PICTURES, fractions={"validation": 0.1, "test": 0.2})
    groups = {split: {int(text) // 4 for text in rows["text"]} for split, rows in found.items()}
    assert {split: len(some) for split, some in groups.items()} == {
        "train": 14,
        "validation": 2,
        "test": 4,
    }
    assert len(found["test"]) == 16


def test_rows_without_a_picture_are_cut_one_by_one(tmp_path: Path) -> None:
    rows = [{"image": None if i else "a.png", "text": str(i)} for i in range(20)]
    found = load(write_jsonl(tmp_path / "a.jsonl", rows), PICTURES, fractions={"test": 0.25})
    assert len(found["test"]) == 5


def test_fractions_that_cannot_be_cut(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", "text,split", "a,test", "b,test")
    refused(
        "no training rows to cut validation from; the data has test",
        file,
        TEXTS,
        fractions={"validation": 0.5},
    )
    refused(
        "1 rows .* too few to cut test",
        write_csv(tmp_path / "b.csv", "text", "a"),
        TEXTS,
        fractions={"test": 0.5},
    )


# Filters and limits


def test_keep_and_drop(tmp_path: Path) -> None:
    lines = [f"{i},{'abc'[i % 3]},{i % 2},train" for i in range(12)]
    file = write_csv(tmp_path / "a.csv", "text,letter,odd,split", *lines, "99,a,1,test")
    found = load(
        file,
        TEXTS,
        keep={"train": {"letter": ["a", "b"], "odd": [1]}},
        drop={"train": {"text": [7, "1"]}},
    )
    assert found["train"]["text"][:] == ["3", "9"]
    assert found["test"]["text"][:] == ["99"]


def test_filters_of_booleans_numbers_and_nothing(tmp_path: Path) -> None:
    rows = [{"text": "a", "x": True, "y": 1.5}, {"text": "b", "x": False, "y": None}]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    assert load(file, TEXTS, keep={"train": {"x": [True]}})["train"]["text"][:] == ["a"]
    assert load(file, TEXTS, keep={"train": {"y": [1.5]}})["train"]["text"][:] == ["a"]
    assert load(file, TEXTS, drop={"train": {"y": [None]}})["train"]["text"][:] == ["a"]


def test_a_filter_may_name_the_sources_column(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", "sentence", "a", "b")
    settings = {"columns": {"text": "sentence"}, "keep": {"train": {"sentence": ["b"]}}}
    assert load(file, TEXTS, **settings)["train"]["text"][:] == ["b"]


def test_wrong_filters_are_told(folder: Path) -> None:
    cases = [
        (
            r"data.keep.train: no row of train has group 'evn'; did you mean 'even'\?",
            "group",
            "evn",
        ),
        ("data.keep.train: the data has no column 'grup'; did you mean 'group'", "grup", "even"),
        ("data.keep.train: 'image' holds struct.*, not a value", "image", "a"),
    ]
    for message, column, value in cases:
        refused(message, folder, PICTURES, keep={"train": {column: [value]}})
    refused(
        "data.drop.train: no row of train is left",
        folder,
        PICTURES,
        drop={"train": {"group": ["even", "odd"]}},
    )
    (folder / "metadata.csv").rename(folder / "all.csv")
    lines = (folder / "all.csv").read_text().replace("validation", "extra")
    (folder / "all.csv").write_text(lines)
    refused(
        "data.limit names the split validation, but the data has train, test: say its share",
        folder / "all.csv",
        PICTURES,
        limit={"validation": 3},
    )


def test_limits_are_drawn_by_seed_and_nested(tmp_path: Path) -> None:
    file = numbers(tmp_path)

    def texts(count: int, seed: int = 0) -> list[str]:
        return load(file, TEXTS, limit={"train": count}, seed=seed)["train"]["text"][:]

    assert len(texts(10)) == 10
    assert texts(10) == sorted(texts(10), key=int)
    assert set(texts(10)) < set(texts(20))
    assert texts(10) != texts(10, seed=1)
    assert texts(10) != [str(i) for i in range(10)]
    assert texts(1000) == [str(i) for i in range(100)]


# What cannot be read


def test_sources_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    refused(
        "no file is at .*metadta.csv; did you mean 'metadata.csv'", folder / "metadta.csv", TEXTS
    )
    refused(r"no file is at .*\*.parquet$", folder / "*.parquet", TEXTS)
    refused("no file is at ./nowhere", "./nowhere", TEXTS)
    refused("images/0.png is none of .csv", folder / "images" / "0.png", TEXTS)
    refused("'a b' is neither a local folder or file nor a hub name", "a b", TEXTS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    refused("has no metadata.csv or .jsonl.*; it has notes.txt", tmp_path / "other", TEXTS)
    refused("data.options are for builtin", folder, TEXTS, options={"a": 1})
    refused("data.revision is for hub data sets", folder, TEXTS, revision="main")
    refused("is for hub data sets, tables and folders", "builtin/shapes", TEXTS, streaming=True)


def test_broken_tables_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").touch()
    (tmp_path / "empty.jsonl").touch()
    write_csv(tmp_path / "ragged.csv", "text,a", "x,1", "y,1,2")
    write_csv(tmp_path / "twice.csv", "text,text", "x,1")
    write_csv(tmp_path / "headers.csv", "text,a")
    (tmp_path / "latin.csv").write_bytes("text\ncafé\n".encode("latin-1"))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "mixed.jsonl").write_text('{"text": "a"}\n{"text": [1]}\n')
    (tmp_path / "bad.json").write_text('[{"text": "a"}, 3]')
    (tmp_path / "torn.json").write_text('[{"text": "a"}')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 this is none")
    cases = {
        "empty.csv": "cannot be read: it is empty",
        "empty.jsonl": "cannot be read: it is empty",
        "ragged.csv": "line 3 has 3 cells and not 2, one for each of text, a: 'y,1,2'",
        "twice.csv": "more than one column 'text'",
        "headers.csv": "has no rows",
        "latin.csv": "cannot be read: .*(UTF8|utf-8)",
        "bad.jsonl": "cannot be read: line 2, column 10 is not valid JSON",
        "mixed.jsonl": r"cannot be read: line 2 has \[1\] under 'text', where other rows have",
        "bad.json": "its list holds values that are not objects",
        "torn.json": "cannot be read: .*delimiter",
        "bad.parquet": "bad.parquet cannot be read: ",
    }
    for name, message in cases.items():
        refused(message, tmp_path / name, TEXTS)
    write_jsonl(tmp_path / "part-1.jsonl", [{"text": "a"}])
    write_jsonl(tmp_path / "part-2.jsonl", [{"text": [1]}])
    refused("differ in the kinds of their columns", tmp_path / "part-*.jsonl", TEXTS)


# Size


def test_a_million_rows_are_loaded_in_a_fifth_of_the_time_of_reading_each(tmp_path: Path) -> None:
    count = 1_000_000
    lines = (f"images/{i}.png,text {i},{'abc'[i % 3]}\n" for i in range(count))
    with open(tmp_path / "a.csv", "w") as file:
        file.write("file_name,text,group\n")
        file.writelines(lines)
    started = time.perf_counter()
    found = load(
        tmp_path / "a.csv",
        PICTURES,
        keep={"train": {"group": ["a", "b"]}},
        fractions={"test": 0.1},
        limit={"test": 1000},
    )
    seconds = time.perf_counter() - started
    assert len(found["test"]) == 1000
    assert len(found["train"]) == 600_000
    assert Counter(found["test"]["group"][:]).keys() == {"a", "b"}
    # 20 s where a row takes 0.1 ms.
    started = time.perf_counter()
    assert len([found["test"][row] for row in range(1000)]) == 1000
    one_by_one = (time.perf_counter() - started) * count / 1000
    assert seconds < one_by_one / 5, f"{seconds:.1f} s, one by one {one_by_one:.1f} s"


# The data beside the repository


def test_shared_nuclei(shared_dir: Path) -> None:
    found = load(shared_dir / "data" / "nuclei", MASKS)
    assert {split: len(rows) for split, rows in found.items()} == {
        "train": 504,
        "validation": 60,
        "test": 100,
    }
    row = found["test"][0]
    image, mask = media.read_image(row["image"]), media.read_mask(row["mask"])
    assert (image.height, image.width) == mask.shape
    assert set(np.unique(mask)) == {0, 1}


def test_shared_spoken_digits_by_accent(shared_dir: Path) -> None:
    found = load(
        shared_dir / "data" / "spoken_digits",
        SPEECH,
        keep={"train": {"accent": ["German"]}, "test": {"accent": ["German"]}},
    )
    assert set(found["train"]["accent"][:]) == set(found["test"]["accent"][:]) == {"German"}
    assert len(set(found["validation"]["accent"][:])) == 4
    samples = media.read_audio(found["train"][0]["audio"], 16_000)
    assert 1000 < len(samples) < 40_000


def test_shared_emoji_captions(shared_dir: Path) -> None:
    found = load(shared_dir / "data" / "emoji", PICTURES, columns={"text": "caption"})
    assert [len(rows) for rows in found.values()] == [1186, 150, 300]
    assert media.read_image(found["test"][0]["image"]).size == (64, 64)


def test_shared_photographs_in_parquet(shared_dir: Path) -> None:
    found = load(shared_dir / "data" / "tiny_imagenet_64", CLASSES, limit={"train": 100})
    assert [len(rows) for rows in found.values()] == [100, 2500]
    assert media.read_image(found["train"][0]["image"]).size == (64, 64)
