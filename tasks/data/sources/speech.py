"""Sentences read in English accents by eSpeak NG (`synthetic.speech`), with their text.

Splits share neither sentences nor speakers. The test split has an eighth of the voice variants,
which the nano encoder never heard; the validation split has an eighth of the others. In validation
and test the same variant reads text i at the same rate and pitch in every accent, so that accents
can be compared. The readings of the test split are those of nano/wav2vec2's card.

Readings are kept in the cache of `datasets`, since each takes about 12 ms to make.
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

HELD_OUT_TEXTS = 1000  # at least so many texts of test and validation are never trained on
DEFAULT_ACCENT = "en-gb-scotland"


class Options(Section):
    """The options of `builtin/speech`."""

    accents: tuple[str, ...] = Field(default=(DEFAULT_ACCENT,), min_length=1)
    """The accents: en-us, en-us-nyc, en-gb, en-gb-x-rp, en-gb-scotland, en-gb-x-gbclan,
    en-gb-x-gbcwmd or en-029."""
    train: int = Field(default=600, ge=0, le=100_000)
    """Number of training utterances in each accent, about 2.5 s each."""
    validation: int = Field(default=60, ge=0, le=len(sentences.VALIDATION_SEEDS))
    """Number of validation utterances in each accent."""
    test: int = Field(default=150, ge=0, le=len(sentences.TEST_SEEDS))
    """Number of test utterances in each accent."""
    augment: bool = False
    """Add reverberation, noise and random levels to the training utterances."""
    seed: int = 0
    """Seed of the readers and of the augmentation of the training utterances."""

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
            raise ValueError("an accent is named twice")
        return value


class Reading(NamedTuple):
    """An utterance to synthesize.

    Attributes:
        text: the sentence.
        reader: the voice.
        name: the file name of the recording.
        noise: the seed of the augmentation; None for no augmentation.
    """

    text: str
    reader: speech.Reader
    name: str
    noise: int | None


def read(options: Options, split: Split) -> Dataset:
    """Reads a split with the columns audio (FLAC, 16,000 Hz), text, accent and speaker (a voice
    variant).

    Raises:
        ImportError: speech synthesis is not installed; the message says how to install it.
    """
    import datasets

    speech.variants()  # raises the ImportError before anything is written to the cache
    features = datasets.Features(
        {
            # Writing an Audio column would need torchcodec.
            "audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            **dict.fromkeys(("text", "accent", "speaker"), datasets.Value("string")),
        }
    )
    count = getattr(options, split)
    # A tuple, since `datasets` would cut a list into shards of one reading.
    wanted = tuple(readings(options, split, count))
    made = datasets.Dataset.from_generator(
        _rows,
        features=features,
        gen_kwargs={"readings": wanted, "version": _version()},
        split=datasets.NamedSplit(split),
    )
    return made.cast_column("audio", datasets.Audio(decode=False))


def readings(options: Options, split: Split, count: int) -> list[Reading]:
    """Returns `count` readings in each accent, the accents in turn."""
    if split == "train":
        return _training(options, count)
    seeds = sentences.TEST_SEEDS if split == "test" else sentences.VALIDATION_SEEDS
    chosen = []
    for seed in seeds[:count]:
        for accent in options.accents:
            rng = random.Random(f"{split} reader {seed}")
            reader = speech.random_reader(rng, accent=accent, among=speakers(split))
            text = sentences.sentence(seed)
            chosen.append(Reading(text, reader, f"{accent}-{seed}.flac", None))
    return chosen


def _training(options: Options, count: int) -> list[Reading]:
    """Returns the readings for training, each with a different sentence."""
    taken = _held_out_texts(max(options.validation, options.test, HELD_OUT_TEXTS))
    texts = (
        (s, text) for s in sentences.TASK_SEEDS if (text := sentences.sentence(s)) not in taken
    )
    rng = random.Random(f"train readers {options.seed}")
    chosen = []
    for _ in range(count):
        for accent in options.accents:
            seed, text = next(texts)
            reader = speech.random_reader(rng, accent=accent, among=speakers("train"))
            noise = rng.getrandbits(32) if options.augment else None
            chosen.append(Reading(text, reader, f"{accent}-{seed}.flac", noise))
    return chosen


@functools.cache
def speakers(split: Split) -> tuple[str, ...]:
    """Returns the voice variants of a split; no other split has any of them."""
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
    # While one thread waits for the synthesis process, the other resamples and encodes.
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
    """Returns a hash of everything that the samples depend on, so that the cache of another version
    is not used."""
    from importlib.metadata import version

    digest = hashlib.sha256(version("espeakng-loader").encode())
    for file in (*sorted(Path(speech.__file__).parent.glob("*.*")), Path(__file__)):
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()
