"""Metrics of captions: by hand, by brute force, and as the field's packages give them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from mmadapters.tasks.captioning import metrics
from mmadapters.tasks.captioning.cider import cider
from mmadapters.tasks.captioning.words import words

SPLIT = [
    (
        "a dog runs on the grass",
        [
            "a dog runs on the grass",
            "a brown dog is running through the grass",
            "the dog plays outside",
        ],
    ),
    (
        "a man riding a horse on a beach",
        ["a man rides a horse along the beach", "a person on a horse near the water"],
    ),
    (
        "a a a a cat",
        ["a cat sits on a mat", "a black cat on a small mat in a room with a window"],
    ),
    (
        "two people",
        [
            "two people stand next to each other holding umbrellas in the rain",
            "two people with umbrellas",
        ],
    ),
    (
        "a red bus drives down the street past a dog and a cat",
        ["a red bus on the street", "the bus drives down a street"],
    ),
]
# What pycocoevalcap 1.2 gives for them: its CiderScorer, BleuScorer and Rouge.
PYCOCOEVALCAP = {
    "CIDEr": [4.11501645, 1.799441648, 1.069764129, 1.830913081, 1.400093913],
    "BLEU": [0.7647058823, 0.6289177413, 0.4624263434, 0.3489833763],
    "ROUGE-L": [1.0, 0.625, 0.4380610413, 0.6288659794, 0.5637707948],
}
CANDIDATES = [caption.split() for caption, _ in SPLIT]
REFERENCES = [[text.split() for text in texts] for _, texts in SPLIT]


def records(split: Sequence[tuple[str, list[str]]], **row: Any) -> list[dict[str, Any]]:
    """A record of each image, whose references have a token a word, all equally likely."""
    return [
        {
            "index": index,
            "image_id": index,
            "caption": caption,
            "captions": texts,
            "likelihood": -np.log(4) * sum(len(text.split()) for text in texts),
            "tokens": sum(len(text.split()) for text in texts),
            "row": {name: values[index] for name, values in row.items()},
        }
        for index, (caption, texts) in enumerate(split)
    ]


def brute_force(candidates: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """CIDEr-D by its equations, with a dense vector over all n-grams of an order."""

    def grams(caption: list[str], n: int) -> Counter[tuple[str, ...]]:
        return Counter(tuple(caption[i : i + n]) for i in range(len(caption) - n + 1))

    found = np.zeros(len(candidates))
    for n in range(1, 5):
        everything = [*candidates, *itertools.chain(*references)]
        axes = sorted({gram for caption in everything for gram in grams(caption, n)})
        documents = np.array(
            [sum(any(g in grams(r, n) for r in some) for some in references) for g in axes]
        )
        rarity = np.log(len(candidates) / np.maximum(documents, 1))
        for image, (candidate, some) in enumerate(zip(candidates, references, strict=True)):
            said = np.array([grams(candidate, n)[gram] for gram in axes]) * rarity
            for reference in some:
                right = np.array([grams(reference, n)[gram] for gram in axes]) * rarity
                norms = np.linalg.norm(said) * np.linalg.norm(right)
                cosine = (np.minimum(said, right) * right).sum() / norms if norms else 0
                penalty = np.exp(-((len(candidate) - len(reference)) ** 2) / (2 * 6.0**2))
                found[image] += 10 * cosine * penalty / len(some) / 4
    return found.tolist()


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A man riding a wave on top of a surfboard.", "a man riding a wave on top of a surfboard"),
        ("Two dogs, one cat; and -- a bird!", "two dogs one cat and a bird"),
        ("The man's dog doesn't move", "the man 's dog does n't move"),
        ("They’re here & can’t be seen", "they 're here & ca n't be seen"),
        ("You cannot see it: it isn't there", "you can not see it it is n't there"),
        ("he wanna surf", "he wan na surf"),
        ("a black-and-white photo (old)", "a black-and-white photo old"),
        ("It costs $3.50, or 1,000 yen", "it costs $ 3.50 or 1,000 yen"),
        ("the U.S. flag", "the u.s. flag"),
        ("five o'clock", "five o'clock"),
        ('a sign says "stop"', "a sign says stop"),
        ("ein Café über dem Fluß", "ein café über dem fluß"),
        ("  ...  ", ""),
    ],
)
def test_captions_are_cut_as_the_penn_treebank_does(caption: str, expected: str) -> None:
    assert words(caption) == expected.split()


def test_cider_is_what_pycocoevalcap_gives() -> None:
    np.testing.assert_allclose(cider(CANDIDATES, REFERENCES), PYCOCOEVALCAP["CIDEr"], rtol=1e-8)


def test_cider_of_drawn_captions_is_that_of_its_equations() -> None:
    rng = np.random.default_rng(0)
    letters = list("abcdef")

    def drawn() -> list[str]:
        return rng.choice(letters, rng.integers(1, 12)).tolist()

    candidates = [*(drawn() for _ in range(12)), []]
    references = [[drawn() for _ in range(rng.integers(1, 5))] for _ in candidates]
    expected = brute_force(candidates, references)
    np.testing.assert_allclose(cider(candidates, references), expected, rtol=1e-10, atol=1e-12)
    assert max(expected) > 0.5


def test_the_only_reference_repeated_scores_ten() -> None:
    captions = [["a", "red", "box", "here"], ["two", "blue", "balls", "there"]]
    np.testing.assert_allclose(cider(captions, [[one] for one in captions]), [10, 10])
    assert cider(captions[:1], [[captions[0]]]).tolist() == [0]


def test_bleu_is_what_pycocoevalcap_and_sacrebleu_give() -> None:
    texts = [list(some) for some in itertools.zip_longest(*(some for _, some in SPLIT))]
    candidates = [caption for caption, _ in SPLIT]
    sums = metrics.bleu_counts(CANDIDATES, REFERENCES).sum(axis=0)
    for order, expected in enumerate(PYCOCOEVALCAP["BLEU"], 1):
        theirs = BLEU(tokenize="none", max_ngram_order=order, smooth_method="none")
        ours = float(metrics.bleu(sums, order))
        assert ours == pytest.approx(expected, abs=1e-9)
        assert 100 * ours == pytest.approx(theirs.corpus_score(candidates, texts).score)


def test_bleu_is_zero_without_a_match_or_a_word() -> None:
    for caption in ("zebra", ""):
        sums = metrics.bleu_counts([caption.split()], [[["a", "dog", "runs"]]]).sum(axis=0)
        assert [float(metrics.bleu(sums, order)) for order in (1, 4)] == [0, 0]


def test_rouge_is_what_pycocoevalcap_gives() -> None:
    found = [metrics.rouge_l(*pair) for pair in zip(CANDIDATES, REFERENCES, strict=True)]
    np.testing.assert_allclose(found, PYCOCOEVALCAP["ROUGE-L"], rtol=1e-9)
    assert metrics.rouge_l([], [["a"]]) == 0


def test_scores_of_a_split_have_intervals_over_images() -> None:
    found = metrics.scores(records(SPLIT), deciding="CIDEr", groups=(), resamples=200)
    assert [metric.name for metric in found.metrics] == [
        *("CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "perplexity")
    ]
    assert found["CIDEr"].value == pytest.approx(100 * np.mean(PYCOCOEVALCAP["CIDEr"]))
    assert found["ROUGE-L"].value == pytest.approx(np.mean(PYCOCOEVALCAP["ROUGE-L"]))
    assert found["perplexity"].value == pytest.approx(4)
    assert not found["perplexity"].greater_is_better
    for metric in found.metrics:
        assert metric.count == len(SPLIT)
        assert metric.low is not None
        assert metric.low <= metric.value * (1 + 1e-9) <= metric.high * (1 + 1e-9) + 1e-9
    deciding = metrics.scores(records(SPLIT), deciding="BLEU-4", groups=(), resamples=0)
    assert deciding.metrics[0].name == "BLEU-4"


def test_bleu_of_resamples_is_that_of_their_corpora() -> None:
    """Of two images, a resample is one of them twice or both: the interval has their bounds."""
    found = metrics.scores(records(SPLIT[:2]), deciding="CIDEr", groups=(), resamples=400)["BLEU-1"]
    each = [
        float(metrics.bleu(metrics.bleu_counts([said], [right]).sum(axis=0), 1))
        for said, right in zip(CANDIDATES[:2], REFERENCES[:2], strict=True)
    ]
    assert (found.low, found.high) == pytest.approx((min(each), max(each)))


def test_rows_of_one_image_are_one_image() -> None:
    split = records(SPLIT)
    apart = [
        {
            **record,
            "index": number,
            "captions": [text],
            "likelihood": record["likelihood"] * len(text.split()) / record["tokens"],
            "tokens": len(text.split()),
        }
        for number, (record, text) in enumerate(
            (record, text) for record in split for text in record["captions"]
        )
    ]
    together, other = (
        metrics.scores(some, deciding="CIDEr", groups=(), resamples=50) for some in (split, apart)
    )
    for one, two in zip(together.metrics, other.metrics, strict=True):
        assert one.to_dict() == pytest.approx(two.to_dict())


def test_groups_keep_the_rarity_of_the_whole_split() -> None:
    split = records(SPLIT, place=["out", "out", "in", "in", "out"])
    groups = metrics.scores(split, deciding="CIDEr", groups=("place",), resamples=0).groups
    inside = {metric.name: metric for metric in groups["place"]["in"]}
    assert inside["CIDEr"].value == pytest.approx(100 * np.mean(PYCOCOEVALCAP["CIDEr"][2:4]))
    assert inside["CIDEr"].count == 2


def test_the_tables_show_the_lowest_and_the_highest() -> None:
    lowest, highest = metrics.scores(
        records(SPLIT), deciding="CIDEr", groups=(), resamples=0
    ).tables
    assert lowest.rows[0][1] == "a a a a cat"
    assert highest.rows[0][:2] == (411.5, "a dog runs on the grass")
