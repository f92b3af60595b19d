"""Tables as people have them: nothing is lost, merged or changed without a word."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from mmadapters.tasks.classification.labels import labels_of
from mmadapters.tasks.config.schema import DataConfig, Split
from mmadapters.tasks.core.errors import BadRow
from mmadapters.tasks.core.rows import Column, Rows
from mmadapters.tasks.data.captions import captions_of
from mmadapters.tasks.data.cells import listed
from mmadapters.tasks.data.load import load_splits
from mmadapters.tasks.segmentation.coco import draw_segments, lines_among
from mmadapters.tasks.vqa.answers import answers_of

TEXTS = {"text": Column("text")}
VQA = {
    "question": Column("text"),
    "answer": Column("text", required=False),
    "answers": Column("texts", required=False),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(source: Path, roles: dict[str, Column], /, **settings: Any) -> dict[Split, Rows]:
    return load_splits(DataConfig(source=str(source), **settings), roles)


def texts(file: Path, **settings: Any) -> list[str]:
    return load(file, TEXTS, **settings)["train"]["text"][:]


def refused(message: str, file: Path, roles: dict[str, Column], /, **settings: Any) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(file, roles, **settings)
    assert "\n" not in str(caught.value)


def written(file: Path, text: str, encoding: str = "utf-8") -> Path:
    file.write_bytes(text.encode(encoding))
    return file


# JSON


@pytest.mark.parametrize("form", ["list", "lines", "pretty"])
def test_columns_are_the_keys_of_all_rows(form: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "a"}, {"text": "b", "split": "test"}]
    rows += [{"text": "c", "split": "train"}, {"split": "train", "text": "d", "x": 1}]
    text = {
        "list": json.dumps(rows),
        "lines": "\n".join(map(json.dumps, rows)),
        "pretty": json.dumps({"info": {"year": 2020}, "data": rows}, indent=1),
    }[form]
    found = load(written(tmp_path / "a.json", text), TEXTS)
    assert {split: part["text"][:] for split, part in found.items()} == {
        "train": ["c", "d"],
        "test": ["b"],
    }
    assert found["train"]["x"][:] == [None, 1]


@pytest.mark.parametrize("form", ["list", "lines"])
def test_what_a_task_reads_as_text_is_the_text_that_is_written(form: str, tmp_path: Path) -> None:
    values = ["1", "2", '"yes"', "1.50", "1e3", "true", "null", '"2020-01-01"', '"007"', "-0.0"]
    values += [str(10**30), '"NA"', '"é\\u2028"']
    objects = [f'{{"question": "q", "answer": {value}}}' for value in values]
    text = "\n".join(objects) if form == "lines" else f"[{', '.join(objects)}]"
    rows = load(written(tmp_path / "a.json", text), VQA)["train"]
    assert rows["answer"][:] == [
        *("1", "2", "yes", "1.50", "1e3", "true", "", "2020-01-01", "007", "-0.0"),
        *(str(10**30), "NA", "é\u2028"),
    ]


@pytest.mark.parametrize(
    "values",
    [['"2020-01-01"', '"2021-02-03T04:05:06Z"'], ["1.50", "2.25"], ["1", "2"], ["true", "false"]],
)
def test_a_type_that_fits_every_value_changes_no_text(values: list[str], tmp_path: Path) -> None:
    lines = "\n".join(f'{{"text": {value}}}' for value in values)
    assert texts(written(tmp_path / "a.jsonl", lines)) == [value.strip('"') for value in values]


def test_other_columns_keep_their_values_and_never_stop_a_table(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "day": "2020-01-01", "mixed": 1, "n": 1, "part": {"a": [1]}},
        {"text": "b", "day": "2020-01-02", "mixed": "x", "n": 2, "part": {"a": {"b": 1}}},
    ]
    file = written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    found = load(file, TEXTS, keep={"train": {"day": ["2020-01-02"]}})["train"]
    assert found[0] == {
        **rows[1],
        "mixed": "x",
        "part": '{"a": {"b": 1}}',
    }


def test_polygons_and_run_lengths_stand_in_one_column(tmp_path: Path) -> None:
    polygon = {"category_id": 1, "segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]], "iscrowd": 0}
    crowd = {
        "category_id": 2,
        "segmentation": {"size": [4, 6], "counts": [16, 8]},
        "iscrowd": 1,
    }
    line = {"category_id": 3, "segmentation": [[1, 1, 2, 2]], "iscrowd": 0}
    rows = [{"segments": [polygon, line]}, {"segments": [crowd, polygon]}, {"segments": [line]}]
    roles = {"segments": Column("segments")}
    for text in (json.dumps(rows), "\n".join(map(json.dumps, rows))):
        found = load(written(tmp_path / "a.json", text), roles)["train"]
        drawn = [draw_segments(row["segments"], (4, 6)) for row in found]
        assert [sorted(set(mask.ravel().tolist())) for mask in drawn] == [[0, 1], [1, 255], [0]]
        assert (drawn[1][:, 4:] == 255).all()
        # Two corners cover nothing; the picture and its other segments stay, and doctor tells it.
        assert [lines_among(row["segments"]) for row in found] == [[1], [], [0]]


def test_faults_of_json_name_line_column_and_value(tmp_path: Path) -> None:
    cases = {
        '{"text": "a"}\n{"text": \n': "line 2, column 10 is not valid JSON",
        '{"text": "a"}\n{"text": ["b"]}': r"line 2 has \[\"b\"\] under 'text', .* write a text",
        '{"text": "a"}\n[1]': r"line 2 is \[1\], and no object",
        '[{"text": "a"},\n 3]': "values that are not objects: value 1 is 3",
        '[{"text": "a"}': "line 1, column 15 is not valid JSON: .*delimiter",
        '{\n"images": 3, "info": {}}': "one JSON object with the keys images, info",
        " ": "it is empty",
    }
    for text, message in cases.items():
        refused(f"a.json cannot be read: .*{message}", written(tmp_path / "a.json", text), TEXTS)


# CSV and its relatives

SENTENCES = [
    'He said "stop" and left.',
    '"Lone at the start',
    "plain",
    'ends with one"',
    '"Whole."',
    'an inch is 1"',
    '""doubled""',
    "tail",
]


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
def test_unquoted_tables_keep_every_row_and_every_quote(name: str, tmp_path: Path) -> None:
    separator = "\t" if name.endswith("tsv") else ";"
    lines = [separator.join(("file", "text"))]
    lines += [f"{i}.mp3{separator}{text}" for i, text in enumerate(SENTENCES)]
    file = written(tmp_path / name, "\r\n".join(lines) + "\r\n")
    assert texts(file) == SENTENCES


def test_a_table_that_can_be_read_in_two_ways_asks_which(tmp_path: Path) -> None:
    rows = 'file,text\n1.jpg,"Stop\n2.jpg,go"\n3.jpg,plain\n'
    file = written(tmp_path / "a.csv", rows)
    refused("lines 2 to 3 are one row .* and 2 rows .*set data.quoting", file, TEXTS)
    assert texts(file, quoting=False) == ['"Stop', 'go"', "plain"]
    assert texts(file, quoting=True) == ["Stop\n2.jpg,go", "plain"]
    # A TSV has no quotes.
    assert texts(written(tmp_path / "a.tsv", rows.replace(",", "\t"))) == ['"Stop', 'go"', "plain"]


def test_what_csv_writers_write_is_read(tmp_path: Path) -> None:
    rng = random.Random(0)
    parts = ["a", '"', ",", "\n", ";", "|", " ", "é", "\t", "'"]
    rows = [["".join(rng.choices(parts, k=rng.randrange(1, 8))) + "x", str(i)] for i in range(300)]
    for writer in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        buffer = io.StringIO()
        csv.writer(buffer, quoting=writer).writerows([["text", "n"], *rows])
        file = written(tmp_path / "a.csv", buffer.getvalue())
        assert texts(file) == [row[0] for row in rows]
    pd.DataFrame(rows, columns=["text", "n"]).to_csv(tmp_path / "b.csv", index=False)
    assert texts(tmp_path / "b.csv") == [row[0] for row in rows]


def test_bars_and_blanks_of_flickr(tmp_path: Path) -> None:
    rows = 'image_name| comment_number| comment\n1.jpg| 0| Two men, one "boss" .\n1.jpg| 1| Men\n'
    roles = {"image": Column("image"), "caption": Column("text")}
    columns = {"image": "image_name", "caption": "comment"}
    found = load(written(tmp_path / "results.csv", rows), roles, columns=columns)["train"]
    assert found["caption"][:] == ['Two men, one "boss" .', "Men"]
    assert found[0]["image"]["path"] == str(tmp_path / "1.jpg")


def test_a_table_without_names_of_columns(tmp_path: Path) -> None:
    rows = "LJ001|Printing, in the only sense|printing\nLJ002|in being, comparatively|in being\n"
    file = written(tmp_path / "metadata.csv", rows)
    refused(
        r"LJ001.*name the columns by data.header: \[file_name, text\]",
        written(tmp_path / "b.csv", rows.replace("LJ001", "LJ001.wav")),
        TEXTS,
    )
    assert texts(file, header=("id", "text", "spoken")) == [
        "Printing, in the only sense",
        "in being, comparatively",
    ]
    refused("data.header names 2 columns, and line 1 has 3 cells", file, TEXTS, header=("a", "b"))
    with_given = texts(
        written(tmp_path / "c.csv", "x~text\n1~a~\n".replace("~\n", "\n")), separator="~"
    )
    assert with_given == ["a"]


@pytest.mark.parametrize(
    ("encoding", "named"),
    [("utf-8-sig", False), ("utf-16", False), ("utf-16-le", False), ("cp1252", True)],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_encodings(encoding: str, named: bool, suffix: str, tmp_path: Path) -> None:
    text = "text,n\ncafé,1\nnaïve,2\n"
    if suffix == "jsonl":
        text = '{"text": "café"}\n{"text": "naïve"}\n'
    file = written(tmp_path / f"a.{suffix}", text, encoding)
    if named:
        line = 2 if suffix == "csv" else 1
        refused(
            f"line {line} is not utf-8 .byte 0xe9.: name its encoding in data.encoding, as "
            "cp1252 .then it reads .*café",
            file,
            TEXTS,
        )
    assert texts(file, encoding=encoding if named else None) == ["café", "naïve"]
    refused("there is no encoding 'klingon'", file, TEXTS, encoding="klingon")


def test_ragged_lines_are_named(tmp_path: Path) -> None:
    file = written(tmp_path / "a.csv", "text,a\nx,1\n\ny,1,2\n")
    refused("line 4 has 3 cells and not 2, one for each of text, a: 'y,1,2'; quote", file, TEXTS)


# Lists in cells


@pytest.mark.parametrize(
    ("cell", "items"),
    [
        ('["a dog", "two, dogs"]', ["a dog", "two, dogs"]),
        ("['a dog', \"it's\"]", ["a dog", "it's"]),
        ("[1, 2.50]", ["1", "2.50"]),
        ("[]", []),
        (["a", 1], ["a", 1]),
        ("[Photo] a dog", None),
        ("[a dog]", None),
        ("a dog", None),
        ("[" * 5000 + "]" * 5000, None),
        (None, None),
        (3, None),
    ],
)
def test_a_cell_holds_a_list_or_it_does_not(cell: Any, items: list[Any] | None) -> None:
    assert listed(cell) == items


def test_every_task_reads_a_list_in_a_cell(tmp_path: Path) -> None:
    table = {"caption": [json.dumps(["a dog", "two dogs"]), "[Photo] a cat"]}
    pd.DataFrame(table).to_csv(tmp_path / "captions.csv", index=False)
    rows = load(tmp_path / "captions.csv", {"caption": Column("text")})["train"]
    assert [captions_of(row) for row in rows] == [["a dog", "two dogs"], ["[Photo] a cat"]]
    # LAVIS has the answers of several people under "answer".
    lines = [{"question": "q", "answer": ["no", "no", "yes"]}, {"question": "q", "answer": ["a"]}]
    file = written(tmp_path / "vqa.json", json.dumps(lines))
    assert [answers_of(row) for row in load(file, VQA)["train"]] == [["no", "no", "yes"], ["a"]]
    assert answers_of({"answer": "['no', 'yes']"}) == ["no", "yes"]
    assert answers_of({"answers": "['no', 'yes']"}) == ["no", "yes"]
    assert labels_of('["red", "blue"]', (), ",") == ["red", "blue"]
    assert labels_of("red, blue", (), ",") == ["red", "blue"]
    with pytest.raises(BadRow, match="begin with"):
        answers_of({"answers": "[no"})
