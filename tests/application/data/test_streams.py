"""Streams of tables and folders on this machine: the same rows as when they are loaded whole."""

from __future__ import annotations

import gc
import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
from application.data.streamed import PICTURES, load, red, refused, streamed, written
from application.training.tints import Pictures, TintTask, job, task_and_model
from PIL import Image

from mmadapters.tasks.asr.task import ASRTask
from mmadapters.tasks.config.file import read_config
from mmadapters.tasks.core.rows import Column
from mmadapters.tasks.data import media
from mmadapters.tasks.data.batches import StreamExamples
from mmadapters.tasks.data.load import load_splits
from mmadapters.tasks.data.stream import Stream
from mmadapters.tasks.data.tables import json_lines, shards
from mmadapters.tasks.data.tables.encodings import read_lines, read_text
from mmadapters.tasks.jobs.model import make_model, rows_to_fit
from mmadapters.tasks.registry import task_class
from mmadapters.tasks.training.trainer import TaskTrainer

TEXTS = {"text": Column("text"), "label": Column("label", required=False)}
SPEECH = ASRTask.columns


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(file: Path, red: int) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (red, 0, 0)).save(file)
    return file


# Tables


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "CHARACTERS", 10)
    monkeypatch.setattr(shards, "MOST_ROWS", 2)
    monkeypatch.setattr(shards, "BYTES", 30)
    monkeypatch.setattr(json_lines, "ROWS", 2)


CSV = {
    "csv": 'text,n,split\n"a, b",1,train\n007,2,train\n"two\nlines ""x""",,test\n\nNA,3,train\n',
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


def test_every_error_of_a_table_is_told_before_training(tmp_path: Path) -> None:
    lines = "".join(f"a{i},1\n" for i in range(100))
    refused(
        "line 102 has 1 cells and not 2", written(tmp_path / "a.csv", f"text,n\n{lines}b\n"), TEXTS
    )
    lines = "".join(f'{{"text": "{i}"}}\n' for i in range(2000))
    for end, message in (("[1]", "line 2001 is .1., and no object"), ("{", "line 2001, column 2")):
        refused(message, written(tmp_path / "a.jsonl", lines + end), TEXTS)
    refused(
        "2000 has .1. under 'text'",
        written(tmp_path / "a.jsonl", lines.replace('"1999"', "[1]")),
        TEXTS,
    )
    twice = written(tmp_path / "twice.csv", "text,text\na,b\n")
    refused("more than one column 'text'", twice, TEXTS)
    refused("has no rows", written(tmp_path / "none.csv", "text\n"), TEXTS)
    refused("no column 'text'", written(tmp_path / "other.csv", "words\na\n"), TEXTS)


def test_lines_that_cross_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmadapters.tasks.data.tables import encodings

    monkeypatch.setattr(encodings, "_PIECE", 8)
    for encoding in ("utf-8-sig", "utf-16"):
        file = written(tmp_path / "a.txt", "\nßßßß\n\n" + 30 * "€" + "\nend", encoding)
        assert list(read_lines(file, None)) == read_text(file, None).split("\n")
        assert read_text(file, None).startswith("\nß")
    written(tmp_path / "b.txt", 7 * "line\n" + "caf\xe9\n", "latin-1")
    with pytest.raises(ValueError, match=r"line 8 is not utf-8 .byte 0xe9"):
        list(read_lines(tmp_path / "b.txt", None))


# Splits, filters and the order


def test_splits_by_a_column_filters_and_limits(tmp_path: Path, small_blocks: None) -> None:
    rows = [f"t{i},{'abc'[i % 3]},{i % 2}" for i in range(12)]
    file = written(tmp_path / "a.csv", "\n".join(("words,set,label", *rows)))
    settings: dict[str, Any] = {"split_column": "set", "splits": {"train": ["a", "b"], "test": "c"}}
    settings |= {"columns": {"text": "words"}, "keep": {"train": {"words": ["t0", "t1", "t3"]}}}
    settings |= {"drop": {"train": {"label": [0]}}}
    rows = streamed(file, TEXTS, **settings)
    assert [row["text"] for row in rows["train"]] == ["t1", "t3"]
    limited = load(file, TEXTS, streaming=True, **settings, limit={"test": 2, "train": 1})
    assert [len(limited["test"]), len(limited["train"])] == [2, 1]
    wrong: dict[str, Any] = {**settings, "keep": {"train": {"label": [0, 7]}}}
    refused("no row of train has label '7'; there are 0, 1", file, TEXTS, **wrong)
    refused(
        "no row of train is left", file, TEXTS, **{**settings, "drop": {"train": {"label": [0, 1]}}}
    )
    wrong = {**settings, "drop": {"train": {"lable": [1]}}}
    refused("no column 'lable'; did you mean 'label'", file, TEXTS, **wrong)
    refused("no column 'st'; did you mean 'set'", file, TEXTS, **{**settings, "split_column": "st"})
    refused(
        "no test rows can be cut from a stream",
        file,
        TEXTS,
        **{**settings, "splits": {"train": "a"}, "fractions": {"test": 0.5}},
    )
    refused("data.revision is for hub", file, TEXTS, revision="main")


class Words(torch.utils.data.IterableDataset):
    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __iter__(self) -> Any:
        return (row["text"] for row in self.stream)


def test_order_and_workers(tmp_path: Path) -> None:
    for name in "abc":
        written(
            tmp_path / f"train-{name}.csv", "text\n" + "".join(f"{name}{i}\n" for i in range(9))
        )
    stream = load(tmp_path, TEXTS, streaming=True)["train"]
    orders = [list(Words(stream.shuffle(5, seed))) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == list(Words(stream))
    shuffled = Words(stream.shuffle(5, 0))
    loader = torch.utils.data.DataLoader(shuffled, batch_size=None, num_workers=1)
    assert list(loader) == orders[0] == list(pickle.loads(pickle.dumps(shuffled)))


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    import tracemalloc

    text = 1000 * "x"
    peaks = []
    for name, rows in (("small", 10_000), ("large", 40_000)):  # 10 MB and 40 MB
        file = written(tmp_path / f"{name}.csv", "text,n\n" + rows * f"{text},1\n")
        gc.collect()
        pa.default_memory_pool().release_unused()
        tracemalloc.start()
        before = pa.total_allocated_bytes()
        most = 0
        for i, _ in enumerate(load(file, TEXTS, streaming=True)["train"]):
            if i % 2500 == 0:
                most = max(most, pa.total_allocated_bytes() - before)
        peaks.append(tracemalloc.get_traced_memory()[1] + most)
        tracemalloc.stop()
    # What is held at a time varies by a block or two; all of the rows would be four times as much.
    assert peaks[1] < 1.5 * peaks[0]


# Media


def test_folders_of_pictures(tmp_path: Path) -> None:
    for i, name in enumerate(("train/cat", "train/dog", "test/cat")):
        picture(tmp_path / "folder" / name / f"{i}.png", i)
    rows = streamed(tmp_path / "folder", PICTURES)
    assert [(red(row), row["label"]) for row in rows["train"]] == [(0, "cat"), (1, "dog")]


def test_a_table_of_pictures_and_its_root(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / "media" / f"{i}.png", i)
    file = written(
        tmp_path / "tables" / "a.jsonl",
        "".join(
            json.dumps({"file_name": f"{i}.png", "label": "ab"[i % 2]}) + "\n" for i in range(3)
        ),
    )
    rows = streamed(file, PICTURES, root=str(tmp_path / "media"))["train"]
    assert [red(row) for row in rows] == [0, 1, 2]
    refused(f"data.root: .* but in {tmp_path / 'media'}", file, PICTURES)


@pytest.fixture
def sound(tmp_path: Path) -> Callable[[str], Path]:
    def write(name: str) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, np.repeat(np.float32([0.125, 0.25, 0.5]), 4000), 4000)
        return file

    return write


def test_parts_of_recordings(tmp_path: Path, sound: Callable[[str], Path]) -> None:
    sound("wavs/a.wav")
    lines = [
        {"audio_filepath": "wavs/a.wav", "text": "x", "offset": i, "duration": 1.0}
        for i in range(3)
    ]
    file = written(tmp_path / "manifest.json", "\n".join(map(json.dumps, lines)))
    rows = streamed(file, SPEECH)["train"]
    levels = [media.read_audio(row["audio"], 4000) for row in rows]
    assert [(len(part), float(part[2000])) for part in levels] == [
        *((4000, 0.125), (4000, 0.25), (4000, 0.5)),
    ]
    table = written(
        tmp_path / "a.csv",
        "audio,text,begin,end\n" + "".join(f"wavs/a.wav,x,{i},{i + 1}\n" for i in range(3)),
    )
    refused("would all read the whole of it", table, SPEECH)
    columns = {"offset": "begin", "end": "end"}
    assert streamed(table, SPEECH, columns=columns)["train"][1]["audio"]["duration"] == 1


def test_folders_of_sounds(tmp_path: Path, sound: Callable[[str], Path]) -> None:
    for name in ("train/yes", "train/no", "valid/yes"):
        sound(f"speech/{name}/a.wav")
    roles = {"audio": Column("audio"), "label": Column("label")}
    rows = streamed(tmp_path / "speech", roles)
    assert [row["label"] for row in rows["train"]] == ["no", "yes"]


def test_a_saved_data_set(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": [f"{i}" for i in range(5)], "label": range(5)})
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "saved")
    assert len(streamed(tmp_path / "saved", TEXTS)["train"]) == 5


# Training


def test_all_classes_are_among_the_rows_to_fit(tmp_path: Path) -> None:
    lines = "".join(f"t{i},{i // 10}\n" for i in range(50))
    stream = load(written(tmp_path / "a.csv", f"text,label\n{lines}"), TEXTS, streaming=True)[
        "train"
    ]
    assert isinstance(stream, Stream)
    rows = stream.to_fit(12)
    assert set(rows["label"]) == set(range(5))
    assert 12 <= len(rows) <= 16
    assert rows["text"][:] == [t for t in (f"t{i}" for i in range(50)) if t in set(rows["text"])]
    texts = load(tmp_path / "a.csv", {"text": Column("text")}, streaming=True)["train"]
    assert texts.to_fit(3)["text"][:] == ["t0", "t1", "t2"]


def test_passes_have_orders_of_their_own_and_processes_share_them(tmp_path: Path) -> None:
    class Texts(TintTask):
        def example(self, row: Any, *, train: bool) -> dict[str, Any]:
            return {"text": row["text"]}

    file = written(tmp_path / "a.csv", "text\n" + "".join(f"{i}\n" for i in range(9)))
    stream = load(file, {"text": Column("text")}, streaming=True)["train"]
    read = [
        [
            e["text"]
            for e in itertools.islice(
                StreamExamples(Texts(job()), stream, seed=0, rank=rank, world=world), 18
            )
        ]
        for rank, world in ((0, 1), (0, 2), (1, 2))
    ]
    assert sorted(read[0][:9]) == sorted(read[0][9:]) == [str(i) for i in range(9)]
    assert read[0][:9] != read[0][9:]
    assert [*itertools.chain.from_iterable(zip(read[1], read[2], strict=True))][:18] == read[0]


def test_a_stream_trains_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    pictures = Pictures(20)
    rows = [{k: v for k, v in pictures[i].items() if k != "group"} for i in range(20)]
    rows = [{**row, "image": row["image"].tolist()} for row in rows]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    heads = []
    for folder, checkpoint, workers in (
        ("a", None, 0),
        ("b", tmp_path / "a/checkpoints/checkpoint-4", 1),
    ):
        task, model = task_and_model(job(max_steps=6, save_every=2, workers=workers))
        stream = load(tmp_path / "a.parquet", task.columns, streaming=True)["train"]
        trainer = TaskTrainer(
            task, model, train=stream, validation=None, folder=tmp_path / folder, quiet=True
        )
        trainer.fit(checkpoint)
        assert trainer.state.global_step == 6
        heads.append(model.head[1].weight.detach().clone())
    assert torch.equal(*heads)


def test_a_folder_of_classes_is_trained_on_as_a_stream(tmp_path: Path) -> None:
    for i in range(12):
        name = "red" if i < 6 else "dark"
        picture(tmp_path / "pictures" / "train" / name / f"{i}.png", 200 * (i < 6) + i)
    settings = [f"data.source={tmp_path / 'pictures'}", "data.streaming=true", "data.fractions={}"]
    settings += ["backbone.name=nano/vit", "trainer.max_steps=3", "trainer.batch_size=4"]
    config = read_config("classify_folder", [*settings, "trainer.early_stopping=null"])
    stream = load_splits(config.data, task_class(config.task)(config).columns)["train"]
    task, model = make_model(config, rows_to_fit(stream))
    assert task.state["labels"]["names"] == ["dark", "red"]
    trainer = TaskTrainer(
        task, model, train=stream, validation=None, folder=tmp_path / "run", quiet=True
    )
    trainer.fit(None)
    assert trainer.state.global_step == 3
    assert not trainer.problems
