"""Decoding against sums over all paths, and n-grams against figures worked out by hand."""

from __future__ import annotations

import gzip
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from mmadapters.tasks.asr.config import DecodingConfig
from mmadapters.tasks.asr.decoding import BeamSearch, greedy
from mmadapters.tasks.asr.language_model import END, START, LanguageModel
from mmadapters.tasks.asr.text import Vocabulary

VOCABULARY = Vocabulary(("<pad>", "|", "a", "b"))
ARPA = r"""
\data\
ngram 1=6
ngram 2=4
ngram 3=1

\1-grams:
-99	<s>	-0.30
-1.00	</s>
-2.00	<unk>
-0.50	a	-0.20
-0.70	ab	-0.40
-0.90	b

\2-grams:
-0.25	<s> a	-0.10
-0.60	a ab
-0.45	ab </s>
-0.80	b a

\3-grams:
-0.15	<s> a ab

\end\
"""
LN10 = math.log(10)


@pytest.fixture
def arpa(tmp_path: Path) -> Path:
    path = tmp_path / "words.arpa"
    path.write_text(ARPA, "utf-8")
    return path


def random_log_probs(frames: int, classes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(frames, classes, generator=generator)).log_softmax(-1)


def collapsed(path: Sequence[int]) -> tuple[int, ...]:
    return tuple(c for c, _ in itertools.groupby(path) if c != 0)


def by_all_paths(log_probs: np.ndarray) -> dict[tuple[int, ...], float]:
    """ln p of every text that CTC can give: the sum over all of its paths."""
    frames, classes = log_probs.shape
    found: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(classes), repeat=frames):
        score = float(log_probs[np.arange(frames), path].sum())
        text = collapsed(path)
        found[text] = float(np.logaddexp(found.get(text, -np.inf), score))
    return found


def test_greedy_is_the_best_path_without_repeats_and_blanks() -> None:
    log_probs = torch.stack([random_log_probs(23, 4, seed) for seed in range(6)])
    counts = torch.tensor([23, 1, 7, 23, 12, 2])
    for row, decoded in enumerate(greedy(log_probs, counts, blank=0)):
        path = log_probs[row, : counts[row]].argmax(-1).tolist()
        assert tuple(decoded.ids) == collapsed(path)
        assert decoded.frames is not None
        for i, frame in zip(decoded.ids, decoded.frames, strict=True):
            assert path[frame] == i
            assert frame == 0 or path[frame - 1] != i


def test_greedy_knows_any_blank() -> None:
    log_probs = torch.full((1, 4, 3), -9.0)
    for frame, best in enumerate([0, 2, 0, 0]):
        log_probs[0, frame, best] = 0.0
    assert greedy(log_probs, torch.tensor([4]), blank=2)[0].ids == [0, 0]


@pytest.mark.parametrize("seed", range(8))
def test_beam_search_finds_the_text_of_most_probability(seed: int) -> None:
    log_probs = random_log_probs(5, 4, seed)
    table = by_all_paths(log_probs.double().numpy())
    best = max(table, key=lambda text: table[text])
    search = BeamSearch(VOCABULARY, DecodingConfig(method="beam", beams=1000))
    assert tuple(search.search(log_probs.double().numpy()).ids) == best


def test_a_text_of_many_paths_beats_the_best_path() -> None:
    # Blank is the best of each frame, and the text "a" has more probability than no text.
    frame = torch.tensor([0.45, 0.05, 0.4, 0.1]).log()
    log_probs = frame.expand(1, 2, 4)
    counts = torch.tensor([2])
    assert greedy(log_probs, counts, blank=0)[0].ids == []
    assert BeamSearch(VOCABULARY, DecodingConfig(beams=4))(log_probs, counts)[0].ids == [2]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 1.0), (2.0, -0.5)])
def test_beam_search_with_words_finds_the_best_sum(
    arpa: Path, seed: int, alpha: float, beta: float
) -> None:
    model = LanguageModel.read(arpa)
    log_probs = random_log_probs(6, 4, 100 + seed).double().numpy()

    def score(text: tuple[int, ...], acoustic: float) -> float:
        words = VOCABULARY.decode(text, lowercase=True).split()
        history: tuple[str, ...] = (START,)
        total = 0.0
        for word in (*words, END):
            total += model.score(word, history)
            history = (*history, word)
        return acoustic + alpha * total + beta * len(words)

    table = {text: score(text, value) for text, value in by_all_paths(log_probs).items()}
    best = max(table, key=lambda text: table[text])
    config = DecodingConfig(method="beam", beams=5000, alpha=alpha, beta=beta)
    assert tuple(BeamSearch(VOCABULARY, config, model).search(log_probs).ids) == best


def test_beams_of_a_batch_are_those_of_each_utterance_alone(arpa: Path) -> None:
    log_probs = torch.stack([random_log_probs(30, 4, seed) for seed in range(5)])
    counts = torch.tensor([30, 3, 17, 1, 29])
    search = BeamSearch(VOCABULARY, DecodingConfig(beams=8), LanguageModel.read(arpa))
    for row, decoded in enumerate(search(log_probs, counts)):
        alone = search(log_probs[row : row + 1, : counts[row]], counts[row : row + 1])
        assert decoded == alone[0]


def test_more_beams_never_find_a_text_of_less_probability() -> None:
    for seed in range(10):
        log_probs = random_log_probs(6, 4, 50 + seed).double().numpy()
        table = by_all_paths(log_probs)
        scores = [
            table[tuple(BeamSearch(VOCABULARY, DecodingConfig(beams=n)).search(log_probs).ids)]
            for n in (1, 1000)
        ]
        assert scores[0] <= scores[1] + 1e-12


def test_n_grams_and_back_off_as_worked_out_by_hand(arpa: Path) -> None:
    model = LanguageModel.read(arpa)
    assert model.order == 3
    by_hand = {
        # There as they are.
        ("a", (START,)): -0.25,
        ("ab", (START, "a")): -0.15,
        (END, ("a", "ab")): -0.45,  # no back-off weight of "a ab": 0
        # Back-off of "<s> a" and then of "a" to p(b).
        ("b", (START, "a")): -0.10 - 0.20 - 0.90,
        # "<s> b" is no bigram: weight of <s>, and p(b).
        ("b", (START,)): -0.30 - 0.90,
        # b has no weight.
        (END, ("b",)): -1.00,
        # What is not in the model is <unk>, in the history too.
        ("zebra", ("a",)): -0.20 - 2.00,
        ("a", ("zebra",)): -0.50,
        # A history longer than the order is cut.
        ("ab", ("b", "b", START, "a")): -0.15,
    }
    for (word, history), log10 in by_hand.items():
        assert model.score(word, history) == pytest.approx(log10 * LN10), (word, history)


def test_a_gzipped_model_of_capitals_is_read_in_lower_case(tmp_path: Path, arpa: Path) -> None:
    path = tmp_path / "words.arpa.gz"
    capitals = ARPA.replace("\ta", "\tA").replace("ab", "AB").replace(" a", " A")
    path.write_bytes(gzip.compress(capitals.replace("<unk>", "<UNK>").encode()))
    model, expected = LanguageModel.read(path, lowercase=True), LanguageModel.read(arpa)
    assert model.table == expected.table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.partition("-0.80")[0], "cut off: it holds 3 of 4 2-grams"),
        (lambda text: text.replace("\\end\\", ""), "cut off: it holds no end"),
        (lambda text: text.replace("-0.60", "minus"), r"words.arpa:17 is no 2-gram"),
        (lambda text: text.replace("a ab\n-0.45", "a ab b b b\n-0.45"), r":17 is no 2-gram"),
        (lambda text: "hello\n", "declares no n-grams"),
    ],
)
def test_what_is_no_whole_model_is_refused(arpa: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    arpa.write_text(change(ARPA), "utf-8")
    with pytest.raises(ValueError, match=message):
        LanguageModel.read(arpa)


def test_a_model_that_is_not_there_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no language model"):
        LanguageModel.read(tmp_path / "none.arpa")
    damaged = tmp_path / "words.arpa.gz"
    damaged.write_bytes(gzip.compress(ARPA.encode())[:60])
    with pytest.raises(ValueError, match=r"words\.arpa\.gz is no ARPA file"):
        LanguageModel.read(damaged)
