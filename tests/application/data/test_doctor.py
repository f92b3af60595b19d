"""Doctor names every row that cannot be used, whatever is wrong with it, and never fails itself."""

import io
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from mmadapters import AdapterModel
from mmadapters.tasks.config.schema import BackboneConfig, DataConfig, EvaluationConfig, JobConfig
from mmadapters.tasks.core.capabilities import DataChecks
from mmadapters.tasks.core.errors import BadRow, Problem
from mmadapters.tasks.core.model import TaskModel
from mmadapters.tasks.core.results import Figure, Scores, Table
from mmadapters.tasks.core.rows import Column, Rows
from mmadapters.tasks.core.task import Task
from mmadapters.tasks.data import doctor, media
from mmadapters.tasks.data.doctor import RowPlace, examination, examine, print_report
from mmadapters.tasks.data.load import load_splits
from mmadapters.tasks.data.stream import Stream


class ReadingTask(Task[JobConfig]):
    """Reads rows as tasks do, with the checks that they make; trains nothing."""

    name = "reading"
    metric = "accuracy"

    def __init__(self, *, groups: tuple[str, ...] = ()) -> None:
        super().__init__(
            JobConfig(
                task="reading",
                backbone=BackboneConfig(name="nano/vit"),
                data=DataConfig(source="x"),
                evaluation=EvaluationConfig(groups=groups),
            )
        )

    def fit(self, rows: Rows | None, backbone: nn.Module) -> None:
        pass

    def build(self, encoder: AdapterModel) -> TaskModel:
        raise NotImplementedError

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        raise NotImplementedError

    def records(self, model: TaskModel, batch: dict[str, Any]) -> list[dict[str, Any]]:
        raise NotImplementedError

    def score(self, records: Sequence[dict[str, Any]], *, bootstrap: int) -> Scores:
        raise NotImplementedError

    def predict(self, model: Any, inputs: Any, *, out: Any) -> Iterator[dict[str, Any]]:
        raise NotImplementedError


class Masks(ReadingTask, DataChecks):
    columns: ClassVar = {"image": Column("image"), "mask": Column("mask")}

    def example(self, row: Mapping[str, Any], *, train: bool) -> dict[str, Any]:
        image, mask = media.read_image(row["image"]), media.read_mask(row["mask"])
        if mask.shape != (image.height, image.width):
            raise BadRow(f"the mask is {mask.shape[1]}×{mask.shape[0]}, the image {image.size}")
        if mask.max() > 1:
            raise BadRow(f"label {mask.max()} is out of range")
        return {"image": torch.from_numpy(np.asarray(image)), "mask": torch.from_numpy(mask)}

    def check(self, rows: Rows) -> list[Problem]:
        return [
            Problem(i, "there is nothing on the mask")
            for i, row in enumerate(rows)
            if (mask := readable(row["mask"])) is not None and not mask.any()
        ]

    def survey(self, rows: Rows) -> list[Table]:
        lines: list[list[Any]] = [[f"[{i}]", 1000 * i] for i in range(30)]
        lines[0][1] = Figure("a picture", b"")
        return [Table("[classes]", ["[class]", "pixels"], lines)]


def readable(value: Any) -> np.ndarray | None:
    try:
        return media.read_mask(value)
    except BadRow:
        return None


class Transcripts(ReadingTask):
    columns: ClassVar = {"audio": Column("audio"), "text": Column("text")}

    def example(self, row: Mapping[str, Any], *, train: bool) -> dict[str, Any]:
        if not row["text"].strip():
            raise BadRow("the transcript is empty")
        return {"audio": torch.from_numpy(media.read_audio(row["audio"], 16_000))}


class Faulty(ReadingTask):
    """Its faults are its own: what it raises is no `BadRow`."""

    columns: ClassVar = {"text": Column("text")}

    def example(self, row: Mapping[str, Any], *, train: bool) -> dict[str, Any]:
        if row["text"] == "divide":
            1 // 0  # noqa: B018
        if row["text"] == "lines":
            raise KeyError("one\ntwo")
        if row["text"] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return {}


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (8, 8, 3), dtype=np.uint8)


@pytest.fixture
def sick(tmp_path: Path) -> Path:
    """A folder of masks with one of everything that goes wrong."""
    mask = np.zeros((8, 8), np.uint8)
    mask[0] = 1
    lines = ["image,mask,split"]

    def add(split: str, image: bytes | None, mask_: bytes | None) -> None:
        i = len(lines) - 1
        for kind, content in (("image", image), ("mask", mask_)):
            if content is not None:
                (tmp_path / f"{kind}{i}.png").write_bytes(content)
        lines.append(f"image{i}.png,mask{i}.png,{split}")

    good = png(mask)
    add("train", png(noise(0)), good)
    add("train", png(noise(1))[:100], good)
    add("train", png(noise(2)), png(mask[:4]))
    add("train", png(noise(3)), png(mask[:5]))
    add("train", png(noise(4)), png(mask * 7))
    add("train", None, good)
    add("train", b"", good)
    add("train", png(noise(5)), png(mask * 0))
    add("validation", png(noise(6)), good)
    add("test", png(noise(7)), good)
    add("test", png(noise(5)), good)
    add("test", png(noise(6)), None)
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    return tmp_path


def load(source: Path, task: Task, **settings: Any) -> dict[Any, Rows]:
    return load_splits(DataConfig(source=str(source), **settings), task.columns)


def printed(report: doctor.DataReport) -> str:
    buffer = io.StringIO()
    print_report(report, Console(file=buffer, width=120))
    return buffer.getvalue()


@pytest.mark.parametrize("workers", [0, 2])
def test_every_bad_row_is_found_and_named(
    sick: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examination, "FEW", 0)
    report = examine(Masks(), load(sick, Masks()), workers=workers)
    train, validation, test = report.splits
    assert (train.name, train.rows, train.usable) == ("train", 8, 2)
    by_row = {group.places[0].index: group for group in train.problems}
    reasons = {index: group.reason for index, group in by_row.items()}
    assert set(reasons) == {1, 2, 4, 5, 6}
    assert reasons[1].startswith("the image cannot be decoded")
    assert reasons[2] == "the mask is 8×4, the image (8, 8)"
    assert by_row[2].places == (RowPlace(2, "image2.png"), RowPlace(3, "image3.png"))
    assert by_row[2].count == 2
    assert reasons[4] == "label 7 is out of range"
    assert reasons[5].startswith("no such file: ")
    assert reasons[6] == "the image file is empty (0 bytes)"
    assert train.problems[0] is by_row[2], "the commonest stands first"
    assert [(note.reason, note.places) for note in train.notes] == [
        ("there is nothing on the mask", (RowPlace(7, "image7.png"),))
    ]
    assert validation.ok
    assert (test.rows, test.usable) == (3, 2)
    assert not report.ok


def test_pictures_in_two_splits_are_told(sick: Path) -> None:
    report = examine(Masks(), load(sick, Masks()), workers=0)
    assert report.warnings == [
        "1 of 3 rows of test have the same image as a row of train: "
        "1 (image10.png) = 7 (image7.png)",
        "1 of 3 rows of test have the same image as a row of validation: "
        "2 (image11.png) = 0 (image8.png)",
    ]


def test_good_data_is_ok_whatever_the_warnings(sick: Path) -> None:
    lines = (sick / "metadata.csv").read_text().splitlines()
    good = [lines[i + 1] for i in (0, 7, 9, 10)]
    (sick / "metadata.csv").write_text("\n".join([lines[0], *good]))
    report = examine(Masks(), load(sick, Masks()), workers=0)
    assert report.ok
    assert [split.usable for split in report.splits] == [2, 2]
    assert report.splits[0].notes
    assert any("no validation split" in warning for warning in report.warnings)
    assert any("same image" in warning for warning in report.warnings)
    assert "Every row can be used." in printed(report)


def test_printed_report_says_all(sick: Path) -> None:
    text = printed(examine(Masks(), load(sick, Masks()), workers=0))
    for expected in (
        "train: 8 rows, 2 usable",
        "the mask is 8×4, the image (8, 8)",
        "2 (image2.png), 3 (image3.png)",
        "there is nothing on the mask",
        "validation: 1 row, 1 usable",
        "warning: 1 of 3 rows of test have the same image as a row of train",
        *("[classes]", "[class]", "a picture", "[19]", "19,000"),
        "and 10 more lines",
        "7 rows cannot be used.",
    ):
        assert expected in text, expected
    assert "[20]" not in text


def test_many_rows_of_one_reason_are_counted_and_the_first_named(tmp_path: Path) -> None:
    rows = [f"{i}.wav,hello" for i in range(80)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    report = examine(Transcripts(), load(tmp_path, Transcripts()), workers=2)
    (group,) = report.splits[0].problems
    assert group.count == 80
    assert [place.index for place in group.places] == [0, 1, 2, 3, 4]
    assert "0 (0.wav), 1 (1.wav)" in printed(report)
    assert report.splits[0].usable == 0


def test_recordings_and_transcripts(tmp_path: Path) -> None:
    tone = np.sin(np.arange(1600) / 5)
    contents = {"good": tone, "empty": tone[:0], "nan": np.append(tone, np.nan)}
    for name, samples in contents.items():
        soundfile.write(tmp_path / f"{name}.wav", samples, 8000, subtype="FLOAT")
    whole = (tmp_path / "good.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
    names = ["good", "empty", "nan", "cut", "good"]
    lines = [f"{name}.wav,{'  ' if i == 4 else 'hello'}" for i, name in enumerate(names)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    report = examine(Transcripts(), load(tmp_path, Transcripts()), workers=0)
    found = {group.places[0].index: group.reason for group in report.splits[0].problems}
    assert found[1] == "the recording is empty (no samples)"
    assert found[2] == "the recording holds samples that are not finite numbers"
    assert found[3].startswith("the audio is cut off")
    assert found[4] == "the transcript is empty"
    assert report.splits[0].usable == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_faults_of_a_task_are_named_problems(
    workers: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(examination, "FEW", 0)
    rows = datasets.Dataset(pa.table({"text": ["a", "divide", "lines", "divide"]}))
    report = examine(Faulty(), {"train": rows}, workers=workers)
    found = {group.reason: group.count for group in report.splits[0].problems}
    assert found == {
        "ZeroDivisionError: integer division or modulo by zero": 2,
        "KeyError: 'one\\ntwo'": 1,
    }
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_worker_that_is_killed_is_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(examination, "FEW", 0)
    rows = datasets.Dataset(pa.table({"text": ["a"] * 100 + ["die"] + ["a"] * 100}))
    report = examine(Faulty(), {"train": rows}, workers=1)
    (error,) = report.splits[0].errors
    assert error.startswith("reading it ended at one of the rows from ")
    assert report.splits[0].usable <= 100
    assert not report.ok
    assert error[:40] in printed(report)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_faults_of_a_tasks_own_checks_are_told() -> None:
    class Unsure(Faulty, DataChecks):
        def check(self, rows: Rows) -> list[Problem]:
            raise KeyError("text")

    report = examine(Unsure(), {"train": datasets.Dataset(pa.table({"text": ["a"]}))}, workers=0)
    assert report.splits[0].errors == ["the task's own check of it failed: KeyError: 'text'"]
    assert not report.ok


def test_missing_columns_empty_splits_and_groups() -> None:
    train = datasets.Dataset(pa.table({"txt": ["a"]}))
    test = datasets.Dataset(pa.table({"text": ["a"], "accent": ["b"]}))
    empty = datasets.Dataset(pa.table({"text": pa.array([], pa.string())}))
    task = Faulty(groups=("acent",))
    report = examine(task, {"train": train, "validation": empty, "test": test}, workers=0)
    assert [split.errors for split in report.splits] == [
        ["it has no column 'text'; did you mean 'txt'?; it has txt"],
        ["it has no rows"],
        [
            "evaluation.groups names 'acent', which it does not have; did you mean 'accent'?; "
            "it has text, accent"
        ],
    ]
    assert not report.ok
    assert not examine(task, {}).ok


def test_the_start_of_a_stream_is_read() -> None:
    features = datasets.Features({"text": datasets.Value("string")})
    texts = ({"text": "divide" if i == 5 else "a"} for i in range(3000))
    made = datasets.Dataset.from_list(list(texts), features=features).to_iterable_dataset()
    stream = Stream(made, {"text": "text"}, Faulty.columns)
    report = examine(Faulty(), {"train": stream}, workers=0)
    assert report.splits[0].usable == 999
    assert "train: the first 1,000 rows, 999 usable" in printed(report)


def test_progress_is_shown_on_a_terminal_alone(sick: Path) -> None:
    for terminal in (True, False):
        buffer = io.StringIO()
        console = Console(file=buffer, force_terminal=terminal, width=80)
        examine(Masks(), load(sick, Masks()), workers=0, console=console)
        assert ("12/12" in buffer.getvalue()) is terminal


def test_shared_nuclei_are_in_order(shared_dir: Path) -> None:
    report = examine(Masks(), load(shared_dir / "data" / "nuclei", Masks()), workers=2)
    assert {split.name: split.usable for split in report.splits} == {
        "train": 504,
        "validation": 60,
        "test": 100,
    }
    assert report.ok
