"""Parts of recordings: a table's offset and duration say what is read (NeMo's manifests)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from mmadapters.tasks.config.schema import DataConfig
from mmadapters.tasks.core.errors import BadRow
from mmadapters.tasks.core.rows import Column, Rows
from mmadapters.tasks.data.load import load_splits
from mmadapters.tasks.data.media import audio_samples, media_digest, read_audio

SPEECH = {"audio": Column("audio"), "text": Column("text")}
RATE = 8000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One recording of four seconds in three formats: second n is the constant n / 10."""
    folder = tmp_path_factory.mktemp("parts")
    samples = np.repeat(np.arange(4) / 10, RATE).astype(np.float32)
    for suffix in ("wav", "flac", "ogg"):
        soundfile.write(folder / f"long.{suffix}", samples, RATE)
    return folder


def load(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Rows:
    (folder / "manifest.json").write_text("\n".join(map(json.dumps, rows)))
    columns = {"audio": "audio_filepath"}
    config = DataConfig(source=str(folder / "manifest.json"), columns=columns, **settings)
    return load_splits(config, SPEECH)["train"]


@pytest.mark.parametrize(("suffix", "error"), [("wav", 1e-4), ("flac", 1e-4), ("ogg", 0.02)])
def test_only_the_part_is_read(suffix: str, error: float, folder: Path) -> None:
    rows = [
        {"audio_filepath": f"long.{suffix}", "text": "x", "offset": n + 0.25, "duration": 0.5}
        for n in range(4)
    ]
    loaded = load(folder, rows)
    for number, row in enumerate(loaded):
        assert audio_samples(row["audio"], RATE) == RATE // 2
        wave = read_audio(row["audio"], RATE)
        assert wave.shape == (RATE // 2,)
        np.testing.assert_allclose(wave, number / 10, atol=error)
        whole = read_audio(str(folder / f"long.{suffix}"), RATE)
        start = int((number + 0.25) * RATE)
        np.testing.assert_allclose(wave, whole[start : start + RATE // 2], atol=error)
    # They are parts of one recording: it must not stand in training and in test.
    assert len({media_digest(row["audio"]) for row in loaded}) == 1


def test_rows_without_a_part_are_read_whole(folder: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"audio_filepath": "long.wav", "text": "x", "offset": None, "duration": None},
        {"audio_filepath": "long.wav", "text": "x"},
        {"audio_filepath": "long.wav", "text": "x", "duration": 2.0},
    ]
    lengths = [len(read_audio(row["audio"], RATE)) / RATE for row in load(folder, rows)]
    assert lengths == [4, 4, 2]
    # A duration alone describes the file and names no part of it.
    only = [{"audio_filepath": "long.wav", "text": "x", "duration": 4.0}]
    assert load(folder, only)[0]["audio"] == {"bytes": None, "path": str(folder / "long.wav")}


@pytest.mark.parametrize(
    ("offset", "duration", "message"),
    [
        (3.5, 1.0, "the part from 3.5 to 4.5 s ends after the recording, which has 4.00 s"),
        (9.0, 1.0, "ends after the recording"),
        (-1.0, 1.0, "offset -1 s and duration 1 s name no part"),
        (1.0, 0.0, "name no part"),
    ],
)
def test_parts_that_are_none_are_told(
    offset: float, duration: float, message: str, folder: Path
) -> None:
    part = {"offset": offset, "duration": duration}
    row = load(folder, [{"audio_filepath": "long.wav", "text": "x", **part}])[0]
    with pytest.raises(BadRow, match=message):
        read_audio(row["audio"], RATE)


def test_times_of_a_table_may_be_rounded_and_are_seconds(folder: Path) -> None:
    part = {"offset": 3.0, "duration": 1.02}
    row = load(folder, [{"audio_filepath": "long.wav", "text": "x", **part}])[0]
    assert len(read_audio(row["audio"], RATE)) == RATE
    file = folder / "a.csv"
    file.write_text("audio,text,offset,duration\nlong.wav,x,1.25,0.5\nlong.wav,y,,\n")
    rows = load_splits(DataConfig(source=str(file)), SPEECH)["train"]
    assert [len(read_audio(row["audio"], RATE)) / RATE for row in rows] == [0.5, 4]
    file.write_text("audio,text,offset,duration\nlong.wav,x,soon,0.5\n")
    with pytest.raises(ValueError, match="column 'offset' holds values that are no seconds"):
        load_splits(DataConfig(source=str(file)), SPEECH)


def test_parts_of_one_recording_stay_together(folder: Path) -> None:
    for name in "abcdef":
        (folder / f"{name}.wav").write_bytes((folder / "long.wav").read_bytes())
    rows = [
        {"audio_filepath": f"{name}.wav", "text": f"{name}{n}", "offset": n, "duration": 1}
        for name in "abcdef"
        for n in range(3)
    ]
    (folder / "manifest.json").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(
        source=str(folder / "manifest.json"),
        columns={"audio": "audio_filepath"},
        fractions={"test": 0.3},
    )
    parts = load_splits(config, SPEECH)
    names = [{text[0] for text in parts[split]["text"]} for split in ("train", "test")]
    assert names[0].isdisjoint(names[1])
    assert names[0] | names[1] == set("abcdef")
