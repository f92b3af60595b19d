"""Error rates against an edit distance of our own, pooled, by group, with intervals."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mmadapters.tasks.asr.metrics import aligned, counts, error_rates, improvement, misheard
from mmadapters.tasks.asr.pictures import confusions, worst


def edit_distance(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Levenshtein 1966, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        above, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def record(said: str, heard: str, **row: Any) -> dict[str, Any]:
    return {"reference": said, "hypothesis": heard, "counts": counts(said, heard), "row": row}


def drawn(rng: random.Random, *, least: int = 0) -> str:
    words = ("a", "cat", "sat", "on", "the", "mat")
    return " ".join(rng.choices(words, k=rng.randint(least, 7)))


def pairs(number: int) -> list[tuple[str, str]]:
    rng = random.Random(1)
    return [(drawn(rng, least=1), drawn(rng)) for _ in range(number)]


def test_counts_are_edit_distances() -> None:
    for said, heard in pairs(200):
        word_errors, words, character_errors, characters, wrong = counts(said, heard)
        assert word_errors == edit_distance(said.split(), heard.split())
        assert words == len(said.split())
        assert character_errors == edit_distance(said, heard)
        assert characters == len(said)
        assert wrong == (said != heard)


def test_rates_are_all_errors_over_all_words() -> None:
    found = pairs(50)
    wer, cer, wrong = error_rates([record(*pair) for pair in found], resamples=0)
    errors = sum(edit_distance(a.split(), b.split()) for a, b in found)
    assert wer.name == "WER"
    assert wer.value == pytest.approx(errors / sum(len(a.split()) for a, _ in found))
    assert cer.value == pytest.approx(
        sum(edit_distance(a, b) for a, b in found) / sum(len(a) for a, _ in found)
    )
    assert wrong.value == pytest.approx(sum(a != b for a, b in found) / 50)
    assert not wer.greater_is_better
    assert wer.low is None
    # One long utterance weighs as much as its words do: the mean of rates would be 1/2.
    long = [record("one", "two"), record("a b c d e f g h i", "a b c d e f g h i")]
    assert error_rates(long, resamples=0)[0].value == pytest.approx(1 / 10)


def test_a_wer_may_exceed_one() -> None:
    assert error_rates([record("yes", "oh no no")], resamples=0)[0].value == 3.0


def test_utterances_without_words_are_counted_apart_and_make_nothing_infinite() -> None:
    records = [record("a b", "a c"), record("", "x y z"), record("", "")]
    metrics = {metric.name: metric for metric in error_rates(records, resamples=100)}
    assert metrics["WER"].value == 0.5
    assert metrics["WER"].count == 1
    assert metrics["words heard in silence"].value == 1.5
    assert metrics["words heard in silence"].count == 2
    assert all(math.isfinite(metric.value) for metric in metrics.values())
    assert "words heard in silence" not in {m.name for m in error_rates(records[:1], resamples=0)}
    with pytest.raises(ValueError, match="no transcript has a word"):
        error_rates(records[1:], resamples=0)


def test_utterances_of_a_speaker_are_resampled_together() -> None:
    # Each of four speakers is all right or all wrong: 400 utterances are four pieces of evidence.
    said = [
        record("yes", "yes" if s % 2 else "no", speaker=s) for s in range(4) for _ in range(100)
    ]
    nameless = [record(r["reference"], r["hypothesis"]) for r in said]
    by_speaker = error_rates(said, resamples=2000)[0]
    by_utterance = error_rates(nameless, resamples=2000)[0]
    assert by_speaker.value == by_utterance.value == 0.5
    assert by_speaker.low is not None
    assert by_speaker.high is not None
    # Of four draws with replacement, all are of one kind with probability 1/8: both ends are there.
    assert (by_speaker.low, by_speaker.high) == (0.0, 1.0)
    half = 1.96 * math.sqrt(0.25 / 400)
    assert by_utterance.low == pytest.approx(0.5 - half, abs=0.01)
    assert by_utterance.high == pytest.approx(0.5 + half, abs=0.01)


def test_one_speaker_alone_is_resampled_by_utterance() -> None:
    said = [record("yes", "no" if i % 3 else "yes", speaker="a") for i in range(60)]
    wer = error_rates(said, resamples=500)[0]
    assert wer.low is not None
    assert wer.high is not None
    assert 0.4 < wer.low < wer.value < wer.high < 0.9


def test_what_an_adapter_saves_is_known_better_in_pairs() -> None:
    rng = np.random.default_rng(0)
    hard = rng.integers(0, 9, 80)
    said = " ".join("abcdefghij")

    def heard(errors: int) -> str:
        return " ".join("x" * errors + said.replace(" ", "")[errors:])

    before = [record(said, heard(int(n) + 1)) for n in hard]
    after = [record(said, heard(int(n))) for n in hard]
    saved = improvement(before, after, resamples=500)
    assert saved.value == pytest.approx(0.1)
    assert saved.greater_is_better
    # Every utterance has one error less, so that there is no doubt at all.
    assert (saved.low, saved.high) == (pytest.approx(0.1), pytest.approx(0.1))
    wer = error_rates(after, resamples=500)[0]
    assert wer.low is not None
    assert wer.high is not None
    assert wer.high - wer.low > 0.05


def test_pairs_of_other_utterances_are_refused() -> None:
    with pytest.raises(ValueError, match="not the same utterances"):
        improvement([record("a", "a")], [record("b", "b")], resamples=0)


@pytest.mark.parametrize(
    ("said", "heard", "above", "below"),
    [
        ("the cat sat", "the cat sat", "the cat sat", "the cat sat"),
        ("the cat sat", "the bat sat", "the CAT sat", "the BAT sat"),
        ("the cat sat", "the sat", "the CAT sat", "the --- sat"),
        ("the sat", "the cat sat", "the *** sat", "the CAT sat"),
        ("it is", "", "IT IS", "-- --"),
        ("", "hm hm", "** **", "HM HM"),
        ("see me", "seeing me", "SEE    me", "SEEING me"),
    ],
)
def test_alignments_stand_word_under_word(said: str, heard: str, above: str, below: str) -> None:
    assert aligned(said, heard) == (above, below)


def test_what_is_misheard_is_counted_word_by_word() -> None:
    assert list(misheard("the cat sat on the mat", "the bat sat the mat yes")) == [
        ("cat", "bat"),
        ("on", ""),
        ("", "yes"),
    ]
    assert list(misheard("", "oh no")) == [("", "oh"), ("", "no")]
    for said, heard in pairs(200):
        assert len(list(misheard(said, heard))) == counts(said, heard)[0]


def test_the_report_shows_the_worst_first_and_what_comes_again() -> None:
    texts = [("one two three", "one two three"), ("one two", "won two"), ("one six", "won sick")]
    records = [{**record(*pair), "index": 10 + i} for i, pair in enumerate(texts)]
    table = worst(records, count=5)
    assert [row[:2] for row in table.rows] == [(12, "2 of 2"), (11, "1 of 2")]
    assert table.rows[0][2] == "ONE SIX\nWON SICK"
    assert len(worst(records, count=1).rows) == 1
    assert confusions(records, count=5).rows == [("one", "won", 2)]
