"""Builtin data: the same everywhere, and no split sees what another does."""

import functools
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from mmadapters.tasks.config.schema import DataConfig
from mmadapters.tasks.core.rows import Column, Rows
from mmadapters.tasks.data import media
from mmadapters.tasks.data.load import load_splits
from mmadapters.tasks.data.sources import builtin_parts, scenes, speech
from mmadapters.tasks.data.synthetic import scenes as drawing
from mmadapters.tasks.data.synthetic import sentences

SEGMENTATION = {"image": Column("image"), "mask": Column("mask")}
SPEECH = {"audio": Column("audio"), "text": Column("text")}
QUESTIONS = {"image": Column("image"), "question": Column("text"), "answer": Column("text")}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def load(name: str, columns: dict[str, Column], **options) -> dict[str, Rows]:
    return load_splits(DataConfig(source=f"builtin/{name}", options=options), columns)


def digest(rows: Rows) -> str:
    return hashlib.sha256(repr([rows[i] for i in range(len(rows))]).encode()).hexdigest()


# Scenes


def test_scenes_keep_the_promise_of_their_seeds() -> None:
    found = load("scenes", SEGMENTATION, train=3, validation=2, test=2)
    seeds = {
        split: [int(row["path"].removesuffix(".png")) for row in rows["image"]]
        for split, rows in found.items()
    }
    assert {split: len(some) for split, some in seeds.items()} == {
        "train": 3,
        "validation": 2,
        "test": 2,
    }
    assert all(seed in drawing.TASK_SEEDS for seed in seeds["train"])
    assert all(seed in drawing.VALIDATION_SEEDS for seed in seeds["validation"])
    assert all(seed in drawing.TEST_SEEDS for seed in seeds["test"])
    with pytest.raises(ValueError, match=r"data.options.test: .*100000"):
        load("scenes", SEGMENTATION, test=100_001)


@pytest.mark.parametrize("vocabulary", ["unseen", "pretraining", "retold"])
def test_scenes_are_what_is_drawn_for_their_seed(
    vocabulary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenes, "DRAWN_AT_ONCE", 3)
    words = {
        "unseen": drawing.UNSEEN,
        "pretraining": drawing.PRETRAINING,
        "retold": drawing.RETOLD,
    }[vocabulary]
    options = {"vocabulary": vocabulary, "size": 48, "train": 5, "validation": 0, "test": 0}
    found = load("scenes", SEGMENTATION, **options)
    assert set(found) == {"train"}
    for i, row in enumerate(found["train"]):
        scene = drawing.make_scene(drawing.TASK_SEEDS[i], words)
        images, masks = drawing.render([scene], words, size=48)
        image = np.asarray(media.read_image(row["image"]))
        np.testing.assert_array_equal(image, images[0].permute(1, 2, 0))
        np.testing.assert_array_equal(media.read_mask(row["mask"]), masks[0])
        assert row["caption"] == drawing.describe(scene, words)
        assert row["count"] == len(scene.things)
    names = scenes.class_names(scenes.Options(vocabulary=vocabulary))
    assert names == ("background", *words.shapes)


def test_scenes_are_told_in_so_many_wordings() -> None:
    columns = SEGMENTATION | {"captions": Column("texts")}
    found = load("scenes", columns, wordings=4, train=20, validation=0, test=0)["train"]
    rows = [found[i] for i in range(len(found))]
    assert all(len(row["captions"]) == 3 for row in rows)
    texts = [{row["caption"], *row["captions"]} for row in rows]
    assert sum(len(some) for some in texts) > 50
    for row, some in zip(rows, texts, strict=True):
        scene = drawing.make_scene(int(row["image"]["path"].removesuffix(".png")), drawing.UNSEEN)
        shapes = {thing.shape for thing in scene.things}
        assert all(shape in text for text in some for shape in shapes)
    assert "captions" not in load("scenes", SEGMENTATION, train=1, validation=0, test=0)["train"][0]


def test_scenes_are_the_same_again() -> None:
    first, again = (
        load("scenes", SEGMENTATION, train=5, validation=0, test=0)["train"] for _ in range(2)
    )
    assert digest(first) == digest(again)


# Speech


def needs_espeak(test):
    @functools.wraps(test)
    def run(*args, **kwargs):
        pytest.importorskip("espeakng_loader")
        return test(*args, **kwargs)

    return run


SMALL = {"train": 6, "validation": 2, "test": 3}


@needs_espeak
def test_speech_is_sound_with_its_text_speaker_and_accent() -> None:
    accents = ["en-us", "en-029"]
    found = load("speech", SPEECH, accents=accents, **SMALL)
    assert {split: len(rows) for split, rows in found.items()} == {
        "train": 12,
        "validation": 4,
        "test": 6,
    }
    for rows in found.values():
        assert set(rows.column_names) == {"audio", "text", "accent", "speaker"}
        assert Counter(rows["accent"]) == dict.fromkeys(accents, len(rows) / 2)
        for i in range(len(rows)):
            samples = media.read_audio(rows[i]["audio"], 16_000)
            assert len(samples) > 16_000 * 0.03 * len(rows[i]["text"])
            assert 0.05 < np.abs(samples).max() <= 1
    test = found["test"]
    by_accent = {a: [row for row in test if row["accent"] == a] for a in accents}
    for one, other in zip(*by_accent.values(), strict=True):
        assert (one["text"], one["speaker"]) == (other["text"], other["speaker"])
        assert one["audio"]["bytes"] != other["audio"]["bytes"]


@needs_espeak
def test_test_readings_are_those_of_the_encoders_card() -> None:
    from mmadapters.tasks.zoo.wav2vec2_figures import held_out_readings

    rows = load("speech", SPEECH, accents=["en-gb"], train=0, validation=0, test=3)["test"]
    for row, (text, waveform) in zip(rows, held_out_readings("en-gb", 3), strict=True):
        assert row["text"] == text
        samples = torch.from_numpy(media.read_audio(row["audio"], 16_000))
        torch.testing.assert_close(samples, waveform, atol=1 / 32768, rtol=0)


@needs_espeak
def test_speech_splits_share_no_speaker_and_no_sentence() -> None:
    options = speech.Options(accents=("en-us", "en-gb"), train=2000, validation=500, test=500)
    found = {s: speech.readings(options, s, getattr(options, s)) for s in SMALL}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not set(speech.speakers(one)) & set(speech.speakers(other))
        assert not {r.reader.variant for r in found[one]} & {r.reader.variant for r in found[other]}
    texts = {split: [reading.text for reading in some] for split, some in found.items()}
    assert not set(texts["train"]) & {*texts["validation"], *texts["test"]}
    in_order = [sentences.sentence(seed) for seed in sentences.TASK_SEEDS[:4000]]
    held_out = {*texts["validation"], *texts["test"]}
    assert held_out & set(in_order), "without passing over some, training would hold test texts"


@needs_espeak
def test_speech_is_the_same_again_and_is_made_once(cache: Path) -> None:
    import datasets

    options = {"accents": ["en-gb-scotland"], **SMALL, "augment": True}
    first = load("speech", SPEECH, **options)
    made = {file: file.stat().st_mtime_ns for file in cache.rglob("*.arrow")}
    assert len(made) == 3
    again = load("speech", SPEECH, **options)
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*.arrow")} == made
    datasets.config.HF_DATASETS_CACHE = cache.parent / "other"
    anew = load("speech", SPEECH, **options)
    for split in SMALL:
        assert digest(first[split]) == digest(again[split]) == digest(anew[split])


@needs_espeak
def test_augmentation_and_seed_change_training_alone() -> None:
    plain, noisy, other = (
        load("speech", SPEECH, **SMALL, **extra) for extra in ({}, {"augment": True}, {"seed": 1})
    )
    assert plain["train"]["text"][:] == noisy["train"]["text"][:] == other["train"]["text"][:]
    assert digest(plain["train"]) != digest(noisy["train"]) != digest(other["train"])
    assert digest(plain["test"]) == digest(noisy["test"]) == digest(other["test"])


def test_speech_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmadapters.tasks.data.synthetic import speech as synthesis

    caches = (synthesis._data_folder, synthesis.variants)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(synthesis.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install mmadapters\[speech\]"):
        load("speech", SPEECH, train=1)
    for cached in caches:
        cached.cache_clear()


# Easy-VQA


def test_easy_vqa_is_cut_by_picture_and_never_from_its_test() -> None:
    pytest.importorskip("easy_vqa")
    found = load("easy_vqa", QUESTIONS)
    pictures = {split: {row["path"] for row in rows["image"]} for split, rows in found.items()}
    assert {split: len(some) for split, some in pictures.items()} == {
        "train": 3600,
        "validation": 400,
        "test": 1000,
    }
    assert not pictures["train"] & pictures["validation"]
    # The figures of the package's own description.
    assert len(found["train"]) + len(found["validation"]) == 38_575
    assert len(found["test"]) == 9_673
    yes_no = [a for rows in (found["train"], found["validation"]) for a in rows["answer"]]
    assert sum(answer in ("yes", "no") for answer in yes_no) == 28_407
    assert all("/test/" in path.replace("\\", "/") for path in pictures["test"])
    assert not any("/test/" in path for s in ("train", "validation") for path in pictures[s])
    assert media.read_image(found["test"][0]["image"]).size == (64, 64)


def test_easy_vqa_question_types_fit_their_answers() -> None:
    pytest.importorskip("easy_vqa")
    rows = load("easy_vqa", QUESTIONS, train=0, validation=0)["test"]
    answers: dict[str, set[str]] = {}
    for kind, answer in zip(rows["question_type"], rows["answer"], strict=True):
        answers.setdefault(kind, set()).add(answer)
    assert answers["shape"] == {"circle", "rectangle", "triangle"}
    assert answers["presence"] == answers["absence"] == {"yes", "no"}
    assert len(answers["color"]) == 8
    truth = {}
    for row in rows:
        if row["question_type"] == "color":
            truth[row["image"]["path"]] = row["answer"]
    for row in rows:
        color = truth.get(row["image"]["path"])
        words = row["question"].replace("?", "").split()
        if color in words and row["question_type"] in ("presence", "absence"):
            assert row["answer"] == ("yes" if row["question_type"] == "presence" else "no")


def test_easy_vqa_sizes_are_pictures() -> None:
    pytest.importorskip("easy_vqa")
    found = load("easy_vqa", QUESTIONS, train=10, validation=5, test=7)
    counts = {s: len({row["path"] for row in rows["image"]}) for s, rows in found.items()}
    assert counts == {"train": 10, "validation": 5, "test": 7}


# What is asked wrongly


def test_wrong_names_and_options_are_told() -> None:
    cases = [
        ("scene", {}, r"no builtin/scene; did you mean 'scenes'\?; there are builtin/scenes"),
        ("scenes", {"sise": 64}, r"no 'sise'; did you mean 'size'\?; it has vocabulary, train"),
        ("scenes", {"size": "big"}, r"data.options.size: .*integer.* \(got 'big'\)"),
        (
            "scenes",
            {"vocabulary": "old"},
            "data.options.vocabulary: .*'unseen', 'pretraining' or 'retold'",
        ),
        ("speech", {"accents": []}, "data.options.accents: .*at least 1"),
        ("speech", {"accents": ["en-gb-scot"]}, "data.options.accents: there is no accent 'en-gb"),
        ("speech", {"accents": ["en-us", "en-us"]}, "data.options.accents: .*twice"),
    ]
    for name, options, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            builtin_parts(name, options)
        assert "\n" not in str(caught.value)
