"""Sentences read in English accents by eSpeak NG (`synthetic.speech`), with their text.

Splits share neither sentences nor speakers: an eighth of the voice variants, those that the nano
encoder never heard either, are the test's, an eighth of the others the validation's. Text i of
validation and test is read by the same variant at the same rate and pitch in every accent, so that
accents can be compared; those of the test are the readings of nano/wav2vec2's card.

What is read is kept in the cache of `datasets`: some 12 ms an utterance are spent once.
"""

from __future__ import annotations

import functools
import hashlib
import io
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import Field, field_validator

from mmadapters.suggest import nearest

from ...config.schema import Section, Split
from ..synthetic import sentences, speech

if TYPE_CHECKING:
    from datasets import Dataset

HELD_OUT_TEXTS = 1000  # so many of the test and the validation are never trained on, at least
DEFAULT_ACCENT = "en-gb-scotland"


class Options(Section):
    accents: tuple[str, ...] = Field(default=(DEFAULT_ACCENT,), min_length=1)
    """Of en-us, en-us-nyc, en-gb, en-gb-x-rp, en-gb-scotland, en-gb-x-gbclan, en-gb-x-gbcwmd,
    en-029."""
    train: int = Field(default=600, ge=0, le=100_000)
    """Utterances of each accent for training, some 2.5 s each."""
    validation: int = Field(default=60, ge=0, le=len(sentences.VALIDATION_SEEDS))
    """Utterances of each accent for choices."""
    test: int = Field(default=150, ge=0, le=len(sentences.TEST_SEEDS))
    """Utterances of each accent for the reported figures."""
    augment: bool = False
    """Rooms, noise and levels on the training utterances."""
    seed: int = 0
    """Draws who reads the training utterances and what augments them."""

    @field_validator("accents")
    @classmethod
    def _accents(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for accent in value:
            if accent not in speech.ACCENTS:
                raise ValueError(
                    f"there is no accent {accent!r}{nearest(accent, speech.ACCENTS)}; there are "
                    f"{', '.join(speech.ACCENTS)}"
                )
        if len(set(value)) < len(value):
            raise ValueError("an accent stands there twice")
        return value


class Reading(NamedTuple):
    """What is to be read by whom. `noise`: seed of the augmentation, None for none."""

    text: str
    reader: speech.Reader
    name: str
    noise: int | None


def read(options: Options, split: Split) -> Dataset:
    """Columns: audio (FLAC, 16,000 Hz), text, accent, speaker (a voice variant).

    Raises:
        ImportError: speech synthesis is not installed; says how to.
    """
    import datasets

    speech.variants()  # says what is missing before anything is written to the cache
    features = datasets.Features(
        {
            # Writing an Audio column would need torchcodec.
            "audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            **dict.fromkeys(("text", "accent", "speaker"), datasets.Value("string")),
        }
    )
    count = getattr(options, split)
    # A tuple, since a list would be cut into shards of one.
    wanted = tuple(readings(options, split, count))
    made = datasets.Dataset.from_generator(
        _rows,
        features=features,
        gen_kwargs={"readings": wanted, "version": _version()},
        split=datasets.NamedSplit(split),
    )
    return made.cast_column("audio", datasets.Audio(decode=False))


def readings(options: Options, split: Split, count: int) -> list[Reading]:
    """`count` for each accent, accents by turns."""
    if split == "train":
        return _training(options, count)
    seeds = sentences.TEST_SEEDS if split == "test" else sentences.VALIDATION_SEEDS
    found = []
    for seed in seeds[:count]:
        for accent in options.accents:
            rng = random.Random(f"{split} reader {seed}")
            reader = speech.random_reader(rng, accent=accent, among=speakers(split))
            found.append(Reading(sentences.sentence(seed), reader, f"{accent}-{seed}.flac", None))
    return found


def _training(options: Options, count: int) -> list[Reading]:
    """Every utterance has a sentence of its own, whatever its accent."""
    taken = _held_out_texts(max(options.validation, options.test, HELD_OUT_TEXTS))
    texts = (
        (s, text) for s in sentences.TASK_SEEDS if (text := sentences.sentence(s)) not in taken
    )
    rng = random.Random(f"train readers {options.seed}")
    found = []
    for _ in range(count):
        for accent in options.accents:
            seed, text = next(texts)
            reader = speech.random_reader(rng, accent=accent, among=speakers("train"))
            noise = rng.getrandbits(32) if options.augment else None
            found.append(Reading(text, reader, f"{accent}-{seed}.flac", noise))
    return found


@functools.cache
def speakers(split: Split) -> tuple[str, ...]:
    """The voice variants of a split, none of which another split has."""
    if split == "test":
        return speech.held_out_variants()
    others = speech.pretraining_variants()
    if split == "validation":
        return others[::8]
    return tuple(variant for i, variant in enumerate(others) if i % 8)


@functools.cache
def _held_out_texts(count: int) -> frozenset[str]:
    seeds = (*sentences.TEST_SEEDS[:count], *sentences.VALIDATION_SEEDS[:count])
    return frozenset(sentences.sentence(seed) for seed in seeds)


def _rows(readings: Sequence[Reading], version: str) -> Iterator[dict[str, Any]]:
    # Two threads: while one waits for the synthesis process, the other resamples and encodes.
    with ThreadPoolExecutor(2) as pool:
        for reading, data in zip(readings, pool.map(_flac, readings), strict=True):
            yield {
                "audio": {"bytes": data, "path": reading.name},
                "text": reading.text,
                "accent": reading.reader.accent,
                "speaker": reading.reader.variant,
            }


def _flac(reading: Reading) -> bytes:
    import soundfile

    samples = speech.synthesize(reading.text, reading.reader)
    if reading.noise is not None:
        generator = torch.Generator().manual_seed(reading.noise)
        samples = speech.augment(samples[None], generator=generator)[0]
        samples = samples / samples.abs().max().clamp_min(1.0)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.numpy(), speech.SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


@functools.cache
def _version() -> str:
    """Of all that the samples depend on: what another version made is not taken from the cache."""
    from importlib.metadata import version

    digest = hashlib.sha256(version("espeakng-loader").encode())
    for file in (*sorted(Path(speech.__file__).parent.glob("*.*")), Path(__file__)):
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()
