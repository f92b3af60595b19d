"""Word and character error rates, in total and by group, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

import jiwer
import numpy as np

from ..core.metrics import Metric, summed_metric
from ..core.rows import Record

WER, CER = "WER", "CER"
# The places of `counts`.
WORD_ERRORS, WORDS, CHARACTER_ERRORS, CHARACTERS, WRONG = range(5)


def counts(reference: str, hypothesis: str) -> list[int]:
    """Returns the counts of one utterance from normalised texts.

    Returns:
        Word errors, words of the reference, character errors, characters of the reference, and 1
        if there is a word error, else 0.
    """
    if not reference:
        heard = len(hypothesis.split())
        return [heard, 0, len(hypothesis), 0, int(heard > 0)]
    words = jiwer.process_words(reference, hypothesis)
    characters = jiwer.process_characters(reference, hypothesis)
    word_errors = words.substitutions + words.deletions + words.insertions
    return [
        word_errors,
        words.hits + words.substitutions + words.deletions,
        characters.substitutions + characters.deletions + characters.insertions,
        characters.hits + characters.substitutions + characters.deletions,
        int(word_errors > 0),
    ]


def error_rates(records: Sequence[Record], *, resamples: int, first: str = WER) -> list[Metric]:
    """Returns WER, CER and the share of utterances with an error, and `first` before the others.

    WER and CER are errors over all words and characters, never a mean of the utterances' rates.
    Utterances without a word have no rate; the words recognised in them are counted separately. If
    a column `speaker` names several speakers, whole speakers are resampled, because utterances of
    one speaker are not independent.

    Raises:
        ValueError: no utterance has a word.
    """
    silent = [record for record in records if not record["counts"][WORDS]]
    records = [record for record in records if record["counts"][WORDS]]
    if not records:
        raise ValueError("no transcript has a word, so there is no word error rate")
    statistics = np.array([record["counts"] for record in records], dtype=float)
    options: dict[str, Any] = {
        "resamples": resamples,
        "clusters": speakers(records),
        "greater_is_better": False,
    }
    rates = [
        summed_metric(WER, statistics, _rate(WORD_ERRORS, WORDS), **options),
        summed_metric(CER, statistics, _rate(CHARACTER_ERRORS, CHARACTERS), **options),
        summed_metric(
            "utterances with an error",
            np.column_stack([statistics[:, WRONG], np.ones(len(statistics))]),
            _rate(0, 1),
            **options,
        ),
    ]
    if silent:
        heard = np.array([[record["counts"][WORD_ERRORS], 1] for record in silent], dtype=float)
        options["clusters"] = speakers(silent)
        rates.append(
            summed_metric("words heard in silence", heard, _rate(0, 1), unit="", **options)
        )
    return sorted(rates, key=lambda rate: rate.name != first)


def speakers(records: Sequence[Record]) -> list[Any] | None:
    """Returns the speaker of each record if there are several speakers, else None."""
    names = [record.get("row", {}).get("speaker") for record in records]
    return names if len(set(names)) > 1 else None


def improvement(before: Sequence[Record], after: Sequence[Record], *, resamples: int) -> Metric:
    """Returns WER before minus WER after, with an interval from resampled pairs.

    Args:
        before: records of a split.
        after: records of the same utterances in the same order.
        resamples: for the interval; 0 for none.

    Raises:
        ValueError: they are not the same utterances in the same order.
    """
    if [r["reference"] for r in before] != [r["reference"] for r in after]:
        raise ValueError("before and after are not the same utterances in the same order")
    pairs = np.array(
        [[*a["counts"][:2], *b["counts"][:2]] for a, b in zip(before, after, strict=True)],
        dtype=float,
    )
    first, second = _rate(0, 1), _rate(2, 3)
    return summed_metric(
        "WER saved",
        pairs,
        lambda sums: first(sums) - second(sums),
        resamples=resamples,
        clusters=speakers(before),
    )


def _rate(errors: int, of: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda sums: sums[..., errors] / sums[..., of]


def misheard(reference: str, hypothesis: str) -> Iterator[tuple[str, str]]:
    """Yields the word errors as (said, heard); one is empty if a word was left out or added."""
    if not reference:
        yield from (("", word) for word in hypothesis.split())
        return
    said, heard = reference.split(), hypothesis.split()
    for chunk in jiwer.process_words(reference, hypothesis).alignments[0]:
        if chunk.type != "equal":
            left = said[chunk.ref_start_idx : chunk.ref_end_idx]
            right = heard[chunk.hyp_start_idx : chunk.hyp_end_idx]
            yield from zip_longest(left, right, fillvalue="")


def aligned(reference: str, hypothesis: str) -> tuple[str, str]:
    """Returns both texts with equal words at equal places.

    In the first, `*` marks words that were added; in the second, `-` marks words that were left
    out. Words in capitals differ.
    """
    if not reference:
        return " ".join("*" * len(word) for word in hypothesis.split()), hypothesis.upper()
    out = jiwer.process_words(reference, hypothesis)
    said, heard = reference.split(), hypothesis.split()
    above: list[str] = []
    below: list[str] = []
    for chunk in out.alignments[0]:
        left = said[chunk.ref_start_idx : chunk.ref_end_idx]
        right = heard[chunk.hyp_start_idx : chunk.hyp_end_idx]
        if chunk.type == "substitute":
            left, right = [w.upper() for w in left], [w.upper() for w in right]
        elif chunk.type == "insert":
            left = ["*" * len(word) for word in right]
            right = [word.upper() for word in right]
        elif chunk.type == "delete":
            right = ["-" * len(word) for word in left]
            left = [word.upper() for word in left]
        for a, b in zip(left, right, strict=True):
            size = max(len(a), len(b))
            above.append(a.ljust(size))
            below.append(b.ljust(size))
    return " ".join(above).rstrip(), " ".join(below).rstrip()
