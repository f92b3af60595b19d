"""`doctor` on many files: each is decoded once, and memory does not grow with their number."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import datasets
import numpy as np
import pytest
import torch
from application.data.test_doctor import ReadingTask, noise, png, printed
from application.data.test_doctor_findings import halves, image, masks, segmenter, table
from PIL import PngImagePlugin

from mmadapters.tasks.core.capabilities import DataChecks, Tally
from mmadapters.tasks.core.findings import Places, named_rows
from mmadapters.tasks.core.rows import Column
from mmadapters.tasks.data import media
from mmadapters.tasks.data.doctor import DataReport, examination, examine
from mmadapters.tasks.data.doctor.repeats import AnswerHashes, Hashes
from mmadapters.tasks.data.examples import seeded


class Counted(ReadingTask, DataChecks):
    """Looks at each row, and makes no example."""

    columns: ClassVar = {"image": Column("image"), "label": Column("label")}

    def example(self, row: Mapping[str, Any], *, train: bool) -> dict[str, Any]:
        return {}

    def tally(self) -> Tally:
        return Tally()

    def inspect(self, index: int, row: Any, tally: Any, *, train: bool) -> str | None:
        media.read_image(row["image"])
        return None


class Made:
    """Rows that are made when they are asked for, so that they take no memory themselves."""

    column_names: ClassVar = ["image", "label"]

    def __init__(self, count: int, task_rows: Callable[[int], dict[str, Any]]) -> None:
        self.count, self.row = count, task_rows

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return (self.row(index)[key] for index in range(self.count))
        return self.row(key)


def blank(index: int) -> dict[str, Any]:
    """A row with two findings: the picture is blank, and one label of ten differs from the rest."""
    pixels = np.full((2, 2, 3), (index // 10) % 256, np.uint8)
    return {"image": {"bytes": png(pixels), "path": f"{index}.png"}, "label": str(index % 10)}


def peak(rows: int) -> int:
    """The most bytes that an examination of so many rows holds at a time."""
    tracemalloc.start()
    try:
        examine(Counted(), {"train": Made(rows, blank)}, workers=0)  # type: ignore[dict-item]
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_row_takes_some_bytes_of_memory() -> None:
    peak(64)
    few, many = peak(200), peak(1000)
    # 16 for the picture, 24 for its label, one whether it failed, twice that for sorting.
    assert (many - few) / 800 < 250


def test_seeding_an_example_keeps_nothing_and_draws_the_same() -> None:
    """torch.manual_seed keeps each call, with its stack, for a device that may come later."""

    def seed() -> None:
        for number in range(200):
            with seeded(number):
                pass

    seed()
    tracemalloc.start()
    seed()
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 20_000
    with seeded(7):
        drawn, plain = torch.rand(3), random.random()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        assert torch.equal(drawn, torch.rand(3))
    assert plain == random.Random(7).random()


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often PNG files are decoded, by mode."""
    counts: Counter[str] = Counter()
    prepare = PngImagePlugin.PngImageFile.load_prepare

    def counted(self: Any) -> None:
        counts[self.mode] += 1
        prepare(self)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", counted)
    return counts


def test_pictures_and_masks_are_decoded_once_but_for_the_rows_made_into_examples(
    decodes: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examination, "EXAMPLES", 2)
    report = examine(segmenter(), {"train": masks(*halves(0, 1, 20))}, workers=0)
    (split,) = report.splits
    assert (split.rows, split.usable, split.made) == (20, 20, 2)
    assert decodes == {"RGB": 20 + 2, "L": 20 + 2}
    assert "all rows were read, and examples for training made of 2\n" in printed(report)


def test_a_bad_row_is_found_that_is_not_made_into_an_example(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(examination, "EXAMPLES", 1)
    values = halves(0, 1, 9)
    values[5] = np.full((16, 16), 77)
    values[6] = np.full((16, 16), 255)
    rows = masks(*values)
    cut = [image(png(noise(i, 16, 16, 3))[: -40 if i == 7 else None]) for i in range(9)]
    rows = datasets.Dataset(rows.data.table.set_column(0, "image", table(image=cut).data.column(0)))
    (split,) = examine(segmenter(), {"train": rows}, workers=0).splits
    assert {group.places[0].index: group.reason[:24] for group in split.problems} == {
        5: "the mask holds 77, where",
        7: "the image cannot be deco",
    }
    assert [(n.reason, n.places[0].index) for n in split.notes] == [
        ("every pixel of the mask is ignored", 6)
    ]
    (counts,) = split.tables
    assert counts.rows[0][1] == 6 * 128  # without rows 5 to 7
    assert counts.caption == "7 masks that can be used."


def test_workers_change_nothing_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "FEW", 8)
    monkeypatch.setattr(examination, "READ_AT_ONCE", 8)
    values = [*halves(0, 1, 20), *halves(0, 255, 6), *halves(3, 1, 4)]
    data = {"train": masks(*values), "validation": masks(*halves(1, 0, 12))}

    def told(report: DataReport) -> list[Any]:
        return [printed(report), report.findings, [split.usable for split in report.splits]]

    reports = [examine(segmenter(), data, workers=workers) for workers in (0, 2)]  # type: ignore[arg-type]
    assert told(reports[0]) == told(reports[1])
    assert reports[0].splits[0].usable == 26


def test_rows_of_findings_are_counted_and_the_first_kept() -> None:
    first, later = Places(), Places()
    for index in range(4):
        first.add(index)
    for index in range(4, 12):
        later.add(index, lambda number: f"{number} (x.png)")
    first.merge(later)
    assert named_rows(first) == "rows 0, 1, 2, 3, 4 (x.png), … (12 in all)"


def test_repeated_pictures_are_those_that_dictionaries_find() -> None:
    generator = np.random.default_rng(0)
    keys, others = (generator.integers(0, 60, 200).tolist() for _ in range(2))
    parts, texts = (generator.integers(0, 3, 200).tolist() for _ in range(2))
    ours, theirs, answers = Hashes(), Hashes(), AnswerHashes()
    for index in range(200):
        ours.add(str(keys[index]), index)
        theirs.add(str(others[index]), index)
        if index % 7:
            answers.add(index, str(texts[index]), str(parts[index] or ""))
    rows, first = ours.found_in(theirs)
    known = {key: index for index, key in reversed([*enumerate(others)])}
    assert [*zip(rows, first, strict=True)] == [
        (i, known[k]) for i, k in enumerate(keys) if k in known
    ]
    seen: dict[tuple[int, int], int] = {}
    pairs = []
    for index in (i for i in range(200) if i % 7):
        one = seen.setdefault((keys[index], parts[index]), index)
        if texts[one] != texts[index]:
            pairs.append((index, one))
    assert answers.conflicts(ours) == pairs
    assert len(pairs) > 20
    assert AnswerHashes().conflicts(ours) == []
    assert [len(part) for part in Hashes().found_in(ours)] == [0, 0]
