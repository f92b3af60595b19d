"""Data sets of captions and questions are read as they are published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from mmadapters.tasks.config.schema import DataConfig, Split
from mmadapters.tasks.core.rows import Column, Rows
from mmadapters.tasks.data.captions import COLUMNS as CAPTIONS
from mmadapters.tasks.data.captions import captions_of, image_id
from mmadapters.tasks.data.load import load_splits
from mmadapters.tasks.vqa.answers import answers_of
from mmadapters.tasks.vqa.task import VQATask

QUESTIONS = VQATask.columns
Columns = Mapping[str, Column]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(source: Path, columns: Columns, /, **settings: Any) -> dict[Split, Rows]:
    return load_splits(DataConfig(source=str(source), **settings), columns)


def refused(message: str, source: Path, columns: Columns, /, **settings: Any) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(source, columns, **settings)
    assert "\n" not in str(caught.value)


def written(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    file.write_text(text, "utf-8")
    return file


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name)


def files(rows: Rows) -> list[str | None]:
    """Returns the names of the pictures, after a check that they are there."""
    paths = [row["image"] and row["image"]["path"] for row in rows]
    assert all(path is None or Path(path).is_file() for path in paths)
    return [None if path is None else Path(path).name for path in paths]


# data.root


def test_relative_paths_start_in_the_root(tmp_path: Path) -> None:
    pictures(tmp_path / "elsewhere", "a.png")
    absolute = tmp_path / "elsewhere" / "a.png"
    table = written(tmp_path / "t" / "a.csv", f"image,caption\na.png,one\n{absolute},two\n")
    rows = load(table, CAPTIONS, root=str(tmp_path / "elsewhere"))["train"]
    assert files(rows) == ["a.png", "a.png"]
    table.rename(tmp_path / "t" / "metadata.csv")
    assert files(load(tmp_path / "t", CAPTIONS, root=str(tmp_path / "elsewhere"))["train"])


def test_a_root_without_effect_is_refused(tmp_path: Path) -> None:
    table = written(tmp_path / "a.csv", "image,caption\na.png,one\n")
    refused("data.root: there is no folder /nowhere", table, CAPTIONS, root="/nowhere")
    pictures(tmp_path / "classes", "cat/a.png", "dog/b.png")
    roles = {"image": Column("image"), "label": Column("text")}
    refused("data.root is for tables", tmp_path / "classes", roles, root=str(tmp_path))
    with pytest.raises(ValueError, match="is for tables on this machine"):
        load_splits(DataConfig(source="builtin/shapes", root=str(tmp_path)), roles)


# Data sets that `datasets` has saved


def saved(names: list[str], folder: Path) -> datasets.Dataset:
    pictures(folder, *names)
    columns = {"image": [str(folder / name) for name in names], "caption": names}
    made = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    return made.with_format("numpy", columns=["caption"])  # a format that is saved too


@pytest.mark.parametrize("form", ["dict", "folders"])
def test_saved_splits(form: str, tmp_path: Path) -> None:
    splits = {"train": saved(["a.png", "b.png"], tmp_path), "dev": saved(["c.png"], tmp_path)}
    if form == "dict":
        datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    else:
        for name, part in splits.items():
            part.save_to_disk(str(tmp_path / "saved" / name))
    for file in tmp_path.glob("*.png"):
        file.unlink()  # the pictures lie in the saved files
    parts = load(tmp_path / "saved", CAPTIONS)
    assert [(s, p["caption"][:]) for s, p in parts.items()] == [
        ("train", ["a.png", "b.png"]),
        ("validation", ["c.png"]),
    ]
    assert parts["train"][0]["image"]["bytes"].startswith(b"\x89PNG")


def test_one_saved_data_set(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"image": ["a.png"], "caption": ["x"]})
    made.save_to_disk(str(tmp_path / "saved"))
    pictures(tmp_path / "pictures", "a.png")
    rows = load(tmp_path / "saved", CAPTIONS, root=str(tmp_path / "pictures"))["train"]
    assert files(rows) == ["a.png"]


def test_a_broken_save_is_named(tmp_path: Path) -> None:
    made = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"caption": ["x"]})})
    made.save_to_disk(str(tmp_path))
    next((tmp_path / "train").glob("*.arrow")).unlink()
    refused(f"saved in {tmp_path / 'train'} cannot be read", tmp_path, CAPTIONS)
    written(tmp_path / "dataset_dict.json", {"splits": ["train", "test"]})
    refused("names the split test, but .* save the data again", tmp_path, CAPTIONS)


# COCO captions


def coco(*numbers: int) -> dict[str, Any]:
    """Returns captions of pictures with these numbers, two a picture, in another order."""
    notes = [{"image_id": n, "id": n + k, "caption": f"{n}-{k}"} for k in (1, 2) for n in numbers]
    images = [{"id": n, "file_name": f"{n:012d}.jpg", "height": 4} for n in numbers]
    return {"info": {"year": 2017}, "images": images, "licenses": [], "annotations": notes[::-1]}


@pytest.mark.parametrize("place", ["", "images/"])
def test_coco_captions(place: str, tmp_path: Path) -> None:
    # Both splits have a picture 1: each split takes its own.
    pictures(tmp_path, *(f"{place}{d}2017/{1:012d}.jpg" for d in ("train", "val")))
    pictures(tmp_path, f"{place}train2017/{7:012d}.jpg")
    train = written(tmp_path / "annotations" / "captions_train2017.json", coco(1, 7))
    written(tmp_path / "annotations" / "captions_val2017.json", coco(1))
    written(tmp_path / "annotations" / "instances_val2017.json", {"images": [], "annotations": []})
    parts = load(tmp_path, CAPTIONS)
    assert list(parts) == ["train", "validation"]
    assert parts["train"]["captions"][:] == [["1-2", "1-1"], ["7-2", "7-1"]]
    assert files(parts["train"]) == [f"{1:012d}.jpg", f"{7:012d}.jpg"]
    folders = [Path(part[0]["image"]["path"]).parent.name for part in parts.values()]
    assert folders == ["train2017", "val2017"]
    assert len({image_id(row) for row in parts["train"]}) == 2
    assert captions_of(parts["train"][0]) == ["1-2", "1-1"]

    alone = load(train, CAPTIONS)["train"]  # one file of any name
    assert files(alone) == files(parts["train"])
    moved = written(tmp_path / "elsewhere" / "deep" / "mine.json", coco(1))
    refused("names the picture 000000000001.jpg, .*data.root", moved, CAPTIONS)
    assert files(load(moved, CAPTIONS, root=str(tmp_path / place))["train"])


def test_bad_coco_captions(tmp_path: Path) -> None:
    pictures(tmp_path, f"{1:012d}.jpg")
    content = coco(1)
    content["annotations"][1]["image_id"] = 5
    file = written(tmp_path / "captions_train.json", content)
    refused("annotation 1 is of the image 5, and no image has", file, CAPTIONS)
    del content["annotations"][0]["caption"]
    refused(
        "annotations 0 has no 'caption'", written(tmp_path / "captions_a.json", content), CAPTIONS
    )
    refused("not a file for each split", tmp_path, CAPTIONS)
    (tmp_path / "captions_a.json").unlink()
    file.write_text('{"images": [],\n "annotations": [{"caption": }]}')
    refused("line 2, column 30 is not valid JSON", tmp_path, CAPTIONS)


def test_other_tasks_do_not_read_captions(tmp_path: Path) -> None:
    pictures(tmp_path, "cat/a.png", "dog/b.png")
    written(tmp_path / "annotations" / "captions_train2017.json", coco(1))
    roles = {"image": Column("image"), "label": Column("text")}
    assert load(tmp_path, roles)["train"]["label"][:] == ["cat", "dog"]


# Karpathy's splits


@pytest.mark.parametrize("nested", [True, False])
def test_karpathy(nested: bool, tmp_path: Path) -> None:
    images = [
        {
            "filepath": "val2014",
            "filename": f"{split}.jpg",
            "split": split,
            "cocoid": n,
            "sentences": [{"raw": f"{split} {k}.", "tokens": [split]} for k in range(n + 1)],
        }
        for n, split in enumerate(("test", "restval", "train", "val"))
    ]
    names = [f"{image['filename']}" for image in images]
    pictures(tmp_path / ("val2014" if nested else "images"), *names)
    file = written(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    for source in (file, tmp_path):
        parts = load(source, CAPTIONS)
        assert {split: files(rows) for split, rows in parts.items()} == {
            "train": ["restval.jpg", "train.jpg"],
            "validation": ["val.jpg"],
            "test": ["test.jpg"],
        }
        assert parts["train"]["captions"][0] == ["restval 0.", "restval 1."]
        assert parts["test"]["image_id"][:] == ["0"]
    images[1]["sentences"] = [{"tokens": ["a"]}]
    written(file, {"images": images})
    refused("images 1 has sentences without the text 'raw'", file, CAPTIONS)


# Flickr


LINES = {
    "results.csv": "image_name| comment_number| comment\n"
    'b.jpg| 0| Two men, one | the other .\nb.jpg| 1   A dog runs .\na.jpg| 0| A "sign" .\n',
    "results_20130124.token": "b.jpg#0\tTwo men, one | the other .\nb.jpg#1\tA dog runs .\n"
    'a.jpg#0\tA "sign" .\n',
    "captions.txt": 'image,caption\nb.jpg,"Two men, one | the other ."\nb.jpg,A dog runs .\r\n'
    'a.jpg,"A ""sign"" ."\n',
}


@pytest.mark.parametrize("name", LINES)
def test_flickr(name: str, tmp_path: Path) -> None:
    pictures(tmp_path / "flickr30k_images" / "flickr30k_images", "a.jpg", "b.jpg")
    file = written(tmp_path / "flickr30k_images" / name, LINES[name])
    for source in (file, file.parent, tmp_path):
        rows = load(source, CAPTIONS)["train"]
        assert rows["captions"][:] == [
            ["Two men, one | the other .", "A dog runs ."],
            ['A "sign" .'],
        ]
        assert files(rows) == ["b.jpg", "a.jpg"]
    written(file, LINES[name] + "oh no\n")
    refused(r"line \d begins with no name of a picture: 'oh no'", file, CAPTIONS)


def test_flickr8k_with_its_lists(tmp_path: Path) -> None:
    names = [f"{letter}.jpg" for letter in "abcde"]
    pictures(tmp_path / "Flicker8k_Dataset", *names)
    texts = tmp_path / "Flickr8k_text"
    odd = "x.jpg.1#0\tA picture that does not exist .\n"
    token = "".join(f"{name}#{k}\t{name} {k}\n" for name in names for k in range(5))
    file = written(texts / "Flickr8k.token.txt", token + odd)
    for name, some in {"train": names[2:4], "dev": names[1:2], "test": names[:1]}.items():
        written(texts / f"Flickr_8k.{name}Images.txt", "\n".join(some) + "\n")
    for source in (file, texts.parent):
        parts = load(source, CAPTIONS)
        assert [(split, files(rows)) for split, rows in parts.items()] == [
            ("train", ["c.jpg", "d.jpg"]),
            ("validation", ["b.jpg"]),
            ("test", ["a.jpg"]),
        ]
        assert parts["test"]["captions"][0] == [f"a.jpg {k}" for k in range(5)]
    written(texts / "Flickr_8k.devImages.txt", "c.jpg\n")
    refused("both name c.jpg", file, CAPTIONS)


# VQA


STEM = "mscoco_train2014"
ASKED = f"v2_OpenEnded_{STEM}_questions.json"
TOLD = f"v2_{STEM}_annotations.json"


def vqa(folder: Path, subset: str = "train2014") -> Path:
    ids = [458752000, 458752001]
    head = {"info": {}, "data_type": "mscoco", "data_subtype": subset}
    asked = [{"image_id": 458752, "question": f"q{i}?", "question_id": i} for i in ids]
    told = [
        {
            "question_type": "what is",
            "multiple_choice_answer": "yes",
            "answers": [{"answer": f"a{i}-{n}", "answer_id": n + 1} for n in range(10)],
            "image_id": 458752,
            "answer_type": "other",
            "question_id": i,
        }
        for i in reversed(ids)
    ]
    names = [name.replace("train2014", subset) for name in (ASKED, TOLD)]
    written(folder / names[1], {**head, "annotations": told})
    return written(folder / names[0], {**head, "task_type": "Open-Ended", "questions": asked})


def test_vqa_pairs(tmp_path: Path) -> None:
    for subset in ("train2014", "val2014"):
        vqa(tmp_path, subset)
        pictures(tmp_path / subset, f"COCO_{subset}_000000458752.jpg")
    test = vqa(tmp_path, "test2015")  # published without answers
    (tmp_path / TOLD.replace("train2014", "test2015")).unlink()
    parts = load(tmp_path, QUESTIONS)
    assert list(parts) == ["train", "validation"]
    for source in (tmp_path / ASKED, tmp_path / TOLD):
        rows = load(source, QUESTIONS)["train"]
        assert rows[:] == parts["train"][:]
        assert rows["question"][:] == ["q458752000?", "q458752001?"]
        assert answers_of(rows[1]) == [f"a458752001-{n}" for n in range(10)]
        assert rows["answer_type"][:] == ["other", "other"]
        assert rows["image_id"][:] == ["458752", "458752"]
        assert files(rows) == ["COCO_train2014_000000458752.jpg"] * 2
    refused("has no partner: put the file of its annotations, v2_mscoco_test2015", test, QUESTIONS)


def test_a_missing_partner_is_named(tmp_path: Path) -> None:
    vqa(tmp_path)
    (tmp_path / TOLD).rename(tmp_path / "annotations.txt")
    for source in (tmp_path, tmp_path / ASKED):
        refused(f"has no partner: put the file of its annotations, {TOLD},", source, QUESTIONS)
    (tmp_path / "annotations.txt").rename(tmp_path / TOLD)
    (tmp_path / ASKED).unlink()
    for source in (tmp_path, tmp_path / TOLD):
        refused(f"has no partner: put the file of its questions, {ASKED},", source, QUESTIONS)


def test_questions_and_annotations_in_folders_of_their_own(tmp_path: Path) -> None:
    vqa(tmp_path / "questions")
    pictures(tmp_path / "train2014", "COCO_train2014_000000458752.jpg")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "questions" / TOLD).rename(tmp_path / "annotations" / TOLD)
    for source in (tmp_path, tmp_path / "questions" / ASKED, tmp_path / "annotations" / TOLD):
        assert len(load(source, QUESTIONS)["train"]) == 2


# LLaVA


TALK = [
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "<image>\nHow many?"},
    {"from": "gpt", "value": "2"},
    {"from": "human", "value": "Why?"},
    {"from": "gpt", "value": "Because."},
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_llava(suffix: str, tmp_path: Path) -> None:
    pictures(tmp_path, "images/coco/a.jpg")
    rows = [
        {"id": "x", "image": "coco/a.jpg", "conversations": TALK},
        {"id": 7, "conversations": TALK[3:4]},
    ]
    text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
    file = written(tmp_path / f"llava_v1_5_mix665k{suffix}", text)
    for source in (file, tmp_path):
        read = load(source, QUESTIONS)["train"]
        assert read["question"][:] == ["How many?", "Why?", "Why?"]
        assert read["answer"][:] == ["2", "Because.", ""]  # the last one is told as unusable
        assert files(read) == ["a.jpg", "a.jpg", None]
        assert read["id"][:] == ["x", "x", "7"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": TALK[2:]}, "row 0 has an answer without a question: '2'"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "a turn of 'bot', which is none of"),
        ({"conversations": [*TALK, "hello"]}, "without 'from' and a text 'value'"),
        ({"conversations": TALK, "image": ["a.jpg", "b.jpg"]}, "row 0 has 2 pictures"),
    ],
)
def test_bad_conversations(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(message, written(tmp_path / "a.json", [row]), QUESTIONS)


# SLAKE


def test_slake(tmp_path: Path) -> None:
    pictures(tmp_path / "imgs", "xmlab1/source.jpg", "xmlab2/source.jpg")

    def row(number: int, answer: Any, **more: Any) -> dict[str, Any]:
        name = f"xmlab{number}/source.jpg"
        asked = {"img_id": number, "img_name": name, "question": "q?", "answer": answer}
        return {**asked, "q_lang": "en", "triple": ["vhead", "_"], **more}

    file = written(tmp_path / "train.json", [row(1, 2), row(2, "Yes", q_lang="zh"), row(2, "No")])
    written(tmp_path / "validate.json", [row(1, "MRI", base_type="vqa")])
    parts = load(tmp_path, QUESTIONS, keep={"train": {"q_lang": ["en"]}})
    assert [(s, p["answer"][:]) for s, p in parts.items()] == [
        ("train", ["2", "No"]),
        ("validation", ["MRI"]),
    ]
    assert parts["train"]["image_id"][:] == ["1", "2"]
    assert [Path(r["image"]["path"]).parent.name for r in parts["train"]] == ["xmlab1", "xmlab2"]
    assert len(load(file, QUESTIONS)["train"]) == 3
    # A config that reads it as a table goes on to do so.
    plain = load(file, QUESTIONS, columns={"image": "img_name"}, root=str(tmp_path / "imgs"))
    assert files(plain["train"]) == ["source.jpg"] * 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", {"questions": [{"question_id": 1, "image_id": 2, "answer": "a"}]}),
        ("a.json", {"annotations": [{"question_id": 1, "image_id": 2, "answer": "a"}]}),
        ("a.json", [{"conversations": [{"from": "human", "value": "x"}], "answer": "a"}]),
        ("a.json", [{"img_name": "x/b.png", "answer": "a"}]),
        ("a.csv", "image|question|answer\nb.png|q|a\n"),
    ],
)
def test_tables_that_look_alike_stay_tables(name: str, content: Any, tmp_path: Path) -> None:
    pictures(tmp_path / "x", "b.png")
    rows = content if isinstance(content, list) else None
    rows = next(iter(content.values())) if isinstance(content, dict) else rows
    for row in rows or ():
        row |= {"image": "b.png", "question": "q"}
    pictures(tmp_path, "b.png")
    read = load(written(tmp_path / name, content), QUESTIONS)["train"]
    assert (read["answer"][:], read["question"][:], files(read)) == (["a"], ["q"], ["b.png"])
    assert Path(read[0]["image"]["path"]).parent == tmp_path


def test_bars_between_images_and_captions_stay_a_table(tmp_path: Path) -> None:
    pictures(tmp_path, "b.png")
    table = written(tmp_path / "a.csv", "image|caption\nb.png|x\nb.png|y\n")
    assert load(table, CAPTIONS)["train"]["caption"][:] == ["x", "y"]


def test_a_source_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(tmp_path / "train2017", f"{1:012d}.jpg")
    written(tmp_path / "annotations" / "captions_train2017.json", coco(1))
    monkeypatch.chdir(tmp_path / "annotations")
    assert files(load(Path("captions_train2017.json"), CAPTIONS)["train"])
    monkeypatch.chdir(tmp_path)
    assert files(load(Path("."), CAPTIONS)["train"])


def test_a_table_for_each_split_comes_first(tmp_path: Path) -> None:
    pictures(tmp_path, "b.png")
    written(tmp_path / "train.csv", "image,caption,question,answer\nb.png,x,q,a\n")
    written(tmp_path / "captions.txt", LINES["captions.txt"])
    written(tmp_path / "annotations" / "captions_train2017.json", coco(1))
    written(tmp_path / "dataset_coco.json", {"images": [{"sentences": []}]})
    vqa(tmp_path)
    written(tmp_path / "llava.json", [{"id": "x", "image": "b.png", "conversations": TALK}])
    assert load(tmp_path, CAPTIONS)["train"]["caption"][:] == ["x"]
    assert load(tmp_path, QUESTIONS)["train"]["answer"][:] == ["a"]
