"""Recomputes the figures of `nano/wav2vec2`'s card on synthetic speech."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jiwer
from torch import Tensor

from mmadapters.zoo.files import read_config
from mmadapters.zoo.wav2vec2 import load_ctc, transcribe

from ..data.synthetic import speech
from ..data.synthetic.sentences import TEST_SEEDS, sentence
from .figure import CardFigure

if TYPE_CHECKING:
    from transformers import Wav2Vec2ForCTC

VERIFIED_SENTENCES = 300  # number of sentences of the card's first figure


def held_out_readings(
    accent: str, count: int, *, text: Callable[[int], str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yields held-out texts, each read by a held-out voice variant: (text, (T,) at 16,000 Hz).

    Text i has the same variant, rate and pitch in every accent.

    Args:
        accent: a key of `speech.ACCENTS`.
        text: makes the text of a seed; `sentences.sentence` if None.
    """
    for seed in TEST_SEEDS[:count]:
        words = (text or sentence)(seed)
        rng = random.Random(f"test reader {seed}")
        reader = speech.random_reader(rng, accent=accent, among=speech.held_out_variants())
        yield words, speech.synthesize(words, reader)


def recognise(
    model: "Wav2Vec2ForCTC", readings: Sequence[tuple[str, Tensor]]
) -> list[tuple[str, str]]:
    """Transcribes readings (text, (T,) at 16,000 Hz) to pairs (said, heard), in any order."""
    # Readings of similar length share a batch, so that little of it is padding.
    ordered = sorted(readings, key=lambda reading: len(reading[1]))
    pairs: list[tuple[str, str]] = []
    for start in range(0, len(ordered), 16):
        texts, waveforms = zip(*ordered[start : start + 16], strict=True)
        pairs += zip(texts, transcribe(model, waveforms), strict=True)
    return pairs


def word_error_rate(pairs: Sequence[tuple[str, str]]) -> float:
    """Returns (substitutions + deletions + insertions) / words over all pairs (said, heard)."""
    said, heard = zip(*pairs, strict=True)
    return jiwer.process_words(list(said), list(heard)).wer


def share_missed(pairs: Sequence[tuple[str, str]], words: frozenset[str]) -> float:
    """Returns the share of the occurrences of `words` that were said but not heard.

    The best alignment of said and heard words decides.
    """
    said, heard = zip(*pairs, strict=True)
    result = jiwer.process_words(list(said), list(heard))
    hits = total = 0
    for reference, chunks in zip(result.references, result.alignments, strict=True):
        total += sum(word in words for word in reference)
        for chunk in chunks:
            if chunk.type == "equal":
                hit = reference[chunk.ref_start_idx : chunk.ref_end_idx]
                hits += sum(word in words for word in hit)
    return 1 - hits / total


def verify(
    directory: Path, data: Path | None = None, *, sentences: int = VERIFIED_SENTENCES
) -> list[CardFigure]:
    """Measures the card's WER on en-us with the shipped weights, on synthesised speech.

    Args:
        data: not needed here; every encoder's `verify` takes it.
        sentences: number of the card's sentences to read. Fewer give a noisier figure, so the
            tolerance grows by two standard errors of the card's figure.
    """
    claimed = read_config(directory)["figures"]["wer"]
    tolerance = claimed["tolerance"]
    if sentences != VERIFIED_SENTENCES:
        # The errors of a sentence depend on each other, so the sample size is the number of
        # sentences, not of words.
        tolerance += 2 * (claimed["value"] / sentences) ** 0.5
    try:
        readings = list(held_out_readings("en-us", sentences))
        measured = word_error_rate(recognise(load_ctc(directory), readings))
        note = f"{sentences} sentences"
    except ImportError as error:
        measured, note = None, str(error)
    return [
        CardFigure(
            name=claimed["name"],
            expected=claimed["value"],
            measured=measured,
            tolerance=tolerance,
            higher_is_better=False,
            note=note,
        )
    ]
