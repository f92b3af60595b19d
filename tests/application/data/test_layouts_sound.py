"""Layouts of recordings, as published data sets have them: what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile

import mmadapters
from mmadapters.tasks.asr.config import ASRConfig
from mmadapters.tasks.asr.task import ASRTask
from mmadapters.tasks.classification.config import ClassificationConfig
from mmadapters.tasks.classification.task import ClassificationTask
from mmadapters.tasks.config.schema import DataConfig, Split
from mmadapters.tasks.core.errors import BadRow
from mmadapters.tasks.core.rows import Rows
from mmadapters.tasks.data import media
from mmadapters.tasks.data.doctor import examine
from mmadapters.tasks.data.load import load_splits
from mmadapters.tasks.data.stream import Stream
from mmadapters.tasks.training.cache.identity import rows_identity

RATE = 8000
LABELLED = {role: column for role, column in ClassificationTask.columns.items() if role != "image"}


def write(file: Path, *, level: float = 0.1, seconds: float = 0.1, **options: Any) -> Path:
    """Writes a recording of one constant level."""
    file.parent.mkdir(parents=True, exist_ok=True)
    samples = np.full(round(seconds * RATE), level, np.float32)
    soundfile.write(file, samples, RATE, **options)
    return file


def lines(file: Path, *text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(text) + "\n", encoding="utf-8")
    return file


def speech(source: Path, **settings: Any) -> dict[Split, Rows]:
    return load_splits(DataConfig(source=str(source), **settings), ASRTask.columns)


def classes(source: Path, **settings: Any) -> dict[Split, Rows]:
    return load_splits(DataConfig(source=str(source), **settings), LABELLED)


def refused(message: str, source: Path, **settings: Any) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        speech(source, **settings)
    assert "\n" not in str(caught.value)


def level(row: dict[str, Any]) -> float:
    return round(float(media.read_audio(row["audio"], RATE).mean()), 2)


def levels(rows: Rows) -> list[float]:
    return [level(row) for row in rows]


# Common Voice


@pytest.fixture
def voices(tmp_path: Path) -> Path:
    folder = tmp_path / "en"
    for number, name in enumerate(("train", "dev", "test", "other", "invalidated"), 1):
        write(folder / "clips" / f"{name}.mp3", level=number / 10, seconds=0.5, format="MP3")
        lines(
            folder / f"{name}.tsv",
            "client_id\tpath\tsentence\taccents",
            f'abc\t{name}.mp3\tHe said "{name}\tScotland',
        )
    kept = [(folder / f"{name}.tsv").read_text().splitlines()[1] for name in ("train", "dev")]
    lines(folder / "validated.tsv", "client_id\tpath\tsentence\taccents", *kept)
    return folder


def test_common_voice(voices: Path) -> None:
    splits = speech(voices)
    assert list(splits) == ["train", "validation", "test"]
    assert [rows["text"][:] for rows in splits.values()] == [
        ['He said "train'],
        ['He said "dev'],
        ['He said "test'],
    ]
    assert splits["train"]["accents"][:] == ["Scotland"]
    assert Path(splits["test"][0]["audio"]["path"]) == voices / "clips" / "test.mp3"
    validated = speech(voices, splits={"train": "validated"})["train"]
    assert validated["text"][:] == ['He said "train', 'He said "dev']
    assert speech(voices / "test.tsv")["train"]["text"][:] == ['He said "test']
    labelled = classes(voices, columns={"label": "accents"})["train"]
    assert labelled["label"][:] == ["Scotland"]
    refused("holds languages of Common Voice, en: say data.source: .*en", voices.parent)


def test_a_row_of_common_voice_becomes_an_example(voices: Path) -> None:
    config = ASRConfig(backbone={"name": "nano/wav2vec2"}, data={"source": str(voices)})
    rows = load_splits(config.data, ASRTask.columns)["train"]
    task = ASRTask(config)
    task.fit(rows, mmadapters.load_backbone("nano/wav2vec2"))
    example = task.example(rows[0], train=False)
    assert example["text"] == "he said train"
    assert abs(len(example["wave"]) - 8000) < 2000


# LibriSpeech


def libri(folder: Path) -> Path:
    for number, subset in enumerate(
        ("train-clean-100", "train-other-500", "dev-clean", "dev-other", "test-clean"), 1
    ):
        chapter = folder / subset / f"{number}" / "77"
        write(chapter / f"{number}-77-0000.flac", level=number / 10)
        write(chapter / f"{number}-77-0001.flac", level=number / 10)
        lines(chapter / f"{number}-77.trans.txt", f"{number}-77-0000 SUBSET {number}")
    return folder


def test_librispeech(tmp_path: Path) -> None:
    folder = libri(tmp_path / "LibriSpeech")
    for source in (tmp_path, folder):
        splits = speech(source)
        assert levels(splits["train"]) == [0.1, 0.1, 0.2, 0.2]
        assert levels(splits["validation"]) == [0.3, 0.3, 0.4, 0.4]
        assert levels(splits["test"]) == [0.5, 0.5]
    # A recording without a transcript is a row that cannot be used, and is told as one.
    assert splits["test"]["text"][:] == ["SUBSET 5", ""]
    row = splits["test"][0]
    assert (row["speaker"], row["chapter"], row["subset"]) == ("5", "77", "test-clean")
    chosen = speech(
        folder, splits={"train": ["train-clean-100", "dev-clean"], "validation": "dev-other"}
    )
    assert levels(chosen["train"]) == [0.1, 0.1, 0.3, 0.3]
    assert levels(chosen["validation"]) == [0.4, 0.4]
    assert levels(speech(folder / "dev-clean")["train"]) == [0.3, 0.3]


# Kaldi


@pytest.fixture
def kaldi(tmp_path: Path) -> Path:
    second = np.repeat(np.arange(1, 5) / 10, RATE).astype(np.float32)
    soundfile.write(tmp_path / "long.wav", second, RATE)
    for name in ("train", "test"):
        folder = tmp_path / "data" / name
        lines(folder / "wav.scp", f"rec1 {tmp_path / 'long.wav'}", "rec2 missing.wav")
        lines(folder / "segments", "u1 rec1 0 1", "u2 rec1 1.25 1.75", "u3 rec1 3.0 -1")
        lines(folder / "text", "u1 one", "u2 two and more", "u3 four")
        lines(folder / "utt2spk", "u1 ann", "u2 bob", "u3 ann")
    return tmp_path


def test_kaldi_with_segments(kaldi: Path) -> None:
    for source in (kaldi, kaldi / "data"):
        splits = speech(source)
        assert list(splits) == ["train", "test"]
    rows = splits["train"]
    assert rows["text"][:] == ["one", "two and more", "four"]
    assert rows["speaker"][:] == ["ann", "bob", "ann"]
    assert levels(rows) == [0.1, 0.2, 0.4]
    waves = [len(media.read_audio(row["audio"], RATE)) / RATE for row in rows]
    assert waves == [1, 0.5, 1]
    assert [media.audio_samples(row["audio"], RATE) / RATE for row in rows] == waves
    names = [media.media_name(row["audio"]) for row in rows]
    assert names == ["long.wav from 0 s", "long.wav from 1.25 s", "long.wav from 3 s"]
    assert len({media.media_digest(row["audio"]) for row in rows}) == 1


def test_kaldi_without_segments(kaldi: Path) -> None:
    folder = kaldi / "data" / "train"
    (folder / "segments").unlink()
    lines(folder / "text", "rec1 all of it", "rec3 nothing")
    rows = speech(folder)["train"]
    assert rows["id"][:] == ["rec1", "rec2", "rec3"]
    assert rows["text"][:] == ["all of it", "", "nothing"]
    assert len(media.read_audio(rows[0]["audio"], RATE)) == 4 * RATE
    assert rows[1]["audio"]["path"] == str(folder / "missing.wav")


def test_commands_and_archives_of_kaldi_are_refused_and_never_run(kaldi: Path) -> None:
    folder = kaldi / "data" / "train"
    lines(folder / "wav.scp", f"rec1 touch {kaldi / 'run'} |")
    refused("line 1 gives rec1 by a command .* which is never run: run it yourself", folder)
    assert not (kaldi / "run").exists()
    lines(folder / "wav.scp", "rec1 raw.ark:1234")
    refused("line 1 gives rec1 in an archive", folder)
    lines(folder / "wav.scp", "rec1 a.wav", "rec1 b.wav")
    refused("line 2 names rec1 a second time", folder)
    lines(folder / "wav.scp", "rec1 a.wav")
    lines(folder / "segments", "u1 rec9 0 1")
    refused("line 1 names rec9, which is not in wav.scp", folder)
    lines(folder / "segments", "u1 rec1 zero 1")
    refused("line 1 is u1 rec1 zero 1, and not an utterance, a recording", folder)


# NeMo, and parts of recordings in other tables


def test_nemo_manifests(kaldi: Path) -> None:
    for name in ("an4_train_manifest.json", "an4_val_manifest.jsonl"):
        rows = [
            {"audio_filepath": "long.wav", "text": "two", "offset": 1, "duration": 0.5},
            {"audio_filepath": "long.wav", "text": "three", "duration": 0.75, "offset": 2.25},
        ]
        lines(kaldi / "nemo" / name, *map(json.dumps, rows))
    splits = speech(kaldi / "nemo", root=str(kaldi))
    assert list(splits) == ["train", "validation"]
    assert levels(splits["train"]) == levels(splits["validation"]) == [0.2, 0.3]
    one = kaldi / "nemo" / "an4_val_manifest.jsonl"
    assert levels(speech(one, root=str(kaldi))["train"]) == [0.2, 0.3]
    refused(r"data.root: the column 'audio_filepath' names long.wav, .* say data.root: ", one)


def test_starts_and_ends_of_a_table(kaldi: Path) -> None:
    file = lines(kaldi / "a.csv", "audio,text,start,end", "long.wav,x,1,1.5", "long.wav,y,2.5,3")
    refused("would all read the whole of it: say data.columns: {offset: start, end: end}", file)
    rows = speech(file, columns={"offset": "start", "end": "end"})["train"]
    assert levels(rows) == [0.2, 0.3]
    assert [media.audio_samples(row["audio"], RATE) for row in rows] == [RATE // 2] * 2
    lines(file, "audio,text,onset,offset", "long.wav,x,1,1.5", "long.wav,y,2.5,3")
    refused("offset: onset, end: offset", file)
    assert levels(speech(file, columns={"offset": "onset", "end": "offset"})["train"]) == [0.2, 0.3]
    lines(file, "audio,text,offset", "long.wav,x,3", "long.wav,y,4.5", "long.wav,z,-1")
    rows = speech(file)["train"]
    assert level(rows[0]) == 0.4
    for row, message in ((rows[1], "starts after the recording"), (rows[2], "0 or more")):
        with pytest.raises(BadRow, match=message):
            media.read_audio(row["audio"], RATE)


def test_parts_count_in_doctor_and_in_the_identity_of_kept_states(kaldi: Path) -> None:
    files = {
        name: lines(kaldi / f"{name}.csv", "audio,text,offset,duration", *rows)
        for name, rows in {
            "train": ("long.wav,a b,0,1", "long.wav,a b,1,1"),
            "test": ("long.wav,a b,2,1",),
            "other": ("long.wav,a b,0,1", "long.wav,a b,1,0.75"),
        }.items()
    }
    rows = {name: speech(file)["train"] for name, file in files.items()}
    task = ASRTask(
        ASRConfig(backbone={"name": "nano/wav2vec2"}, data={"source": str(files["train"])})
    )
    task.fit(rows["train"], mmadapters.load_backbone("nano/wav2vec2"))
    assert rows_identity(task, rows["train"]) != rows_identity(task, rows["other"])
    report = examine(task, {"train": rows["train"], "test": rows["test"]}, workers=0)
    assert [split.usable for split in report.splits] == [2, 1]
    assert any("1 of 1 rows of test have the same audio" in text for text in report.warnings)


def test_parts_of_a_stream(kaldi: Path) -> None:
    recording = {"bytes": (kaldi / "long.wav").read_bytes(), "path": "long.wav"}
    cells: dict[str, list[Any]] = {"audio": [recording], "text": ["x"], "start": [1], "end": [1.5]}
    dataset = datasets.Dataset.from_dict(cells).to_iterable_dataset()
    by_role = {"audio": "audio", "text": "text", "offset": "start", "end": "end"}
    stream = Stream(dataset, by_role, ASRTask.columns)
    (row,) = stream
    assert level(row) == level(stream.head(1)[0]) == 0.2
    assert len(media.read_audio(row["audio"], RATE)) == RATE // 2


def test_reading_a_part_seeks_within_the_file(tmp_path: Path) -> None:
    def read_bytes() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    if not Path("/proc/self/io").exists():
        pytest.skip("the system does not count what is read")
    noise = 0.1 * np.random.default_rng(0).standard_normal(300 * RATE)
    for suffix in ("wav", "flac", "ogg"):
        file = tmp_path / f"long.{suffix}"
        with soundfile.SoundFile(file, "w", RATE, channels=1) as sound:
            for second in noise.reshape(-1, RATE):  # libsndfile cannot encode Vorbis at one go
                sound.write(second)
        before = read_bytes()
        part = {"bytes": None, "path": str(file), "offset": 150.0, "duration": 0.1}
        assert len(media.read_audio(part, RATE)) == RATE // 10
        assert read_bytes() - before < 0.5 * file.stat().st_size


# LJSpeech, ESC-50, UrbanSound8K


def test_ljspeech(tmp_path: Path) -> None:
    for name in ("LJ001-0001", "LJ001-0002"):
        write(tmp_path / "wavs" / f"{name}.wav", level=int(name[-1]) / 10)
    file = lines(
        tmp_path / "metadata.csv",
        'LJ001-0001|He said "no, in 2|He said "no, in two',
        "LJ001-0002|Mr. A|Mister A",
    )
    for source in (tmp_path, file):
        rows = speech(source)["train"]
        assert rows["text"][:] == ['He said "no, in two', "Mister A"]
        assert levels(rows) == [0.1, 0.2]
    assert speech(file, columns={"text": "text"})["train"]["text"][1] == "Mr. A"


def test_folds_of_esc50_and_urbansound8k(tmp_path: Path) -> None:
    table = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in range(1, 6):
        write(tmp_path / "esc" / "audio" / f"{fold}-1-A-0.wav", level=fold / 10)
        table.append(f"{fold}-1-A-0.wav,{fold},0,{'dog' if fold % 2 else 'rain'},True,1,A")
    lines(tmp_path / "esc" / "meta" / "esc50.csv", *table)
    folds = {"train": ["1", "3", "2"], "validation": ["4"], "test": "5"}
    splits = classes(tmp_path / "esc", split_column="fold", splits=folds)
    assert {split: levels(rows) for split, rows in splits.items()} == {
        "train": [0.1, 0.2, 0.3],
        "validation": [0.4],
        "test": [0.5],
    }
    assert splits["train"]["label"][:] == ["dog", "rain", "dog"]
    with pytest.raises(ValueError, match=r"data.splits: train is '9', which the data does not"):
        classes(tmp_path / "esc", split_column="fold", splits={"train": ["1", "9"]})
    with pytest.raises(ValueError, match="'1' is in train and in test"):
        DataConfig(source="x", splits={"train": ["1", "2"], "test": "1"})

    write(tmp_path / "us" / "audio" / "fold2" / "a.wav", level=0.2)
    lines(
        tmp_path / "us" / "metadata" / "UrbanSound8K.csv",
        "slice_file_name,fsID,start,end,salience,fold,classID,class",
        "a.wav,1,70.5,74.5,1,2,3,dog_bark",
    )
    # Their starts and ends are those in the long recordings from which the files were cut.
    rows = classes(tmp_path / "us")["train"]
    assert (rows["label"][:], levels(rows)) == (["dog_bark"], [0.2])


# Folders


def test_speech_commands(tmp_path: Path) -> None:
    for name in ("yes/a_nohash_0", "yes/b_nohash_0", "no/a_nohash_0", "no/c_nohash_1"):
        write(tmp_path / f"{name}.wav")
    write(tmp_path / "_background_noise_" / "hum.wav")
    lines(tmp_path / "validation_list.txt", "yes/b_nohash_0.wav")
    lines(tmp_path / "testing_list.txt", "no/c_nohash_1.wav")
    splits = classes(tmp_path)
    assert {split: rows["label"][:] for split, rows in splits.items()} == {
        "train": ["no", "yes"],
        "validation": ["yes"],
        "test": ["no"],
    }
    assert splits["test"]["speaker"][:] == ["c"]


def test_voxceleb(tmp_path: Path) -> None:
    for name in ("id10001/vid1/00001", "id10001/vid2/00001", "id10002/vid3/00001"):
        write(tmp_path / "wav" / f"{name}.wav")
    rows = classes(tmp_path)["train"]
    assert rows["label"][:] == ["id10001", "id10001", "id10002"]
    assert rows["video"][:] == ["vid1", "vid2", "vid3"]
    lines(
        tmp_path / "iden_split.txt",
        *("1 id10001/vid1/00001.wav", "3 id10001/vid2/00001.wav", "1 id10002/vid3/00001.wav"),
    )
    splits = classes(tmp_path)
    assert splits["train"]["label"][:] == ["id10001", "id10002"]
    assert splits["test"]["video"][:] == ["vid2"]
    for file in tmp_path.rglob("*.wav"):
        file.rename(file.with_suffix(".m4a"))
    with pytest.raises(ValueError, match=r"as by ffmpeg -i 00001.m4a 00001.flac"):
        classes(tmp_path)


def test_timit(tmp_path: Path) -> None:
    for split in ("TRAIN", "TEST"):
        place = tmp_path / "data" / split / "DR1" / "FCJF0"
        write(place / "SA1.WAV", format="NIST")
        lines(place / "SA1.TXT", "0 46797 She had your dark suit.")
    write(place / "SA1.WAV.wav", level=0.2)
    splits = speech(tmp_path)
    assert list(splits) == ["train", "test"]
    row = splits["train"][0]
    assert (row["text"], row["speaker"], row["dialect"], row["sentence"]) == (
        *("She had your dark suit.", "FCJF0", "DR1"),
        "SA",
    )
    assert (levels(splits["train"]), levels(splits["test"])) == ([0.1], [0.2])


# Roots and formats


def test_root_is_where_the_paths_of_a_table_start(tmp_path: Path) -> None:
    write(tmp_path / "clips" / "a.wav", level=0.3)
    rows = [{"audio": "a.wav", "text": "x"}]
    files = [
        lines(tmp_path / "a.csv", "audio,text", "a.wav,x"),
        lines(tmp_path / "b.jsonl", *map(json.dumps, rows)),
        lines(tmp_path / "c.json", json.dumps(rows)),
    ]
    for file in files:
        assert levels(speech(file, root=str(tmp_path / "clips"))["train"]) == [0.3]
        refused("data.root: the column 'audio' names a.wav, .* data.root: .*clips", file)
    refused("data.root: there is no folder nowhere", files[0], root="nowhere")
    with pytest.raises(ValueError, match=r"data.root is for tables on this machine"):
        load_splits(DataConfig(source="builtin/speech", root="x"), ASRTask.columns)


FORMATS = {
    **{".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG", ".oga": "OGG", ".mp3": "MP3"},
    **{".aiff": "AIFF", ".aif": "AIFF", ".aifc": "AIFF", ".au": "AU", ".snd": "AU", ".caf": "CAF"},
    **{".w64": "W64", ".rf64": "RF64", ".sph": "NIST", ".nist": "NIST", ".voc": "VOC"},
    **{".ircam": "IRCAM", ".avr": "AVR", ".paf": "PAF", ".pvf": "PVF", ".sf": "IRCAM"},
    **{".wave": "WAV", ".bwf": "WAVEX", ".mp2": "MP3", ".htk": "HTK", ".sds": "SDS", ".wve": "WVE"},
    **{".iff": "SVX", ".svx": "SVX", ".8svx": "SVX"},
}


def test_formats_that_libsndfile_reads_are_read(tmp_path: Path) -> None:
    for suffix, kind in FORMATS.items():
        write(tmp_path / "all" / "class" / f"x{suffix}", format=kind)
    write(tmp_path / "all" / "class" / "x.opus", format="OGG", subtype="OPUS")
    assert set(media.AUDIO_SUFFIXES) == {*FORMATS, ".opus"}
    rows = classes(tmp_path / "all")["train"]
    assert len(rows) == len(media.AUDIO_SUFFIXES)
    for row in rows:
        if row["audio"]["path"].endswith(".opus"):  # it drops constant levels
            assert len(media.read_audio(row["audio"], RATE)) == RATE // 10
            continue
        assert abs(level(row) - 0.1) < 0.02, row
        data = {"bytes": Path(row["audio"]["path"]).read_bytes(), "path": "x"}
        assert abs(level({"audio": data}) - 0.1) < 0.02, row


def test_formats_that_it_does_not_read_say_how_to_convert_them(tmp_path: Path) -> None:
    for suffix in (".m4a", ".aac", ".wma", ".amr"):
        file = tmp_path / f"x{suffix}"
        file.write_bytes(b"something else" * 100)
        with pytest.raises(BadRow, match=rf"convert it by ffmpeg -i x{suffix} x.flac"):
            media.read_audio(str(file), RATE)


def test_a_labelled_part_becomes_an_example(kaldi: Path) -> None:
    file = lines(
        kaldi / "a.csv", "audio,label,offset,duration", "long.wav,x,1,0.5", "long.wav,y,2,1"
    )
    config = ClassificationConfig(
        backbone={"name": "nano/wav2vec2"}, data={"source": str(file), "kind": "audio"}
    )
    task = ClassificationTask(config)
    rows = load_splits(config.data, task.columns)["train"]
    task.fit(rows, mmadapters.load_backbone("nano/wav2vec2"))
    assert [len(task.example(row, train=False)["wave"]) for row in rows] == [8000, 16_000]
    assert task.lengths(rows) == [8000, 16_000]
