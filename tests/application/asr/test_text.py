"""One normaliser and one vocabulary, and the frames that CTC needs for a label."""

from __future__ import annotations

import itertools

import pytest
import torch

from mmadapters.tasks.asr.config import TextConfig
from mmadapters.tasks.asr.text import Vocabulary, needed_frames, normalise
from mmadapters.tasks.core.errors import BadRow


@pytest.mark.parametrize(
    ("config", "text", "expected"),
    [
        ({}, "  Hello,\tWORLD! ", "hello world"),
        ({}, "don’t ‘quote’ rock'n'roll", "don't quote rock'n'roll"),
        ({}, "dogs' and cats'", "dogs and cats"),
        ({}, "well-known — 42 things: 3.5 %", "well known 42 things 3 5"),
        ({}, "ﬁve ｆｕｌｌ Ⅳ", "five full iv"),
        ({}, "Äpfel, ÇA va? Straße", "äpfel ça va straße"),
        ({}, "e\u0301te\u0301", "été"),
        ({}, "…?!", ""),
        ({"apostrophes": False}, "don't", "dont"),
        ({"lowercase": False}, "Hello, World!", "Hello World"),
        ({"punctuation": True}, "Hello,  World! Don’t", "hello, world! don't"),
    ],
)
def test_texts_that_mean_the_same_are_the_same(
    config: dict[str, bool], text: str, expected: str
) -> None:
    assert normalise(text, TextConfig(**config)) == expected


@pytest.mark.parametrize("config", [{}, {"punctuation": True}, {"lowercase": False}])
def test_normalising_twice_changes_nothing(config: dict[str, bool]) -> None:
    for text in ("It’s 5 o'clock -- 'really'?", "a|b", "İstanbul ǅ ß", "x ̈y", "½ cup ①"):
        once = normalise(text, TextConfig(**config))
        assert normalise(once, TextConfig(**config)) == once


def test_the_vocabulary_is_the_characters_of_the_texts_and_nothing_else() -> None:
    vocabulary = Vocabulary.of_texts(["bad cab", "a cab"])
    assert vocabulary.tokens == ("<pad>", "|", "a", "b", "c", "d")
    assert vocabulary.blank == 0
    assert vocabulary.delimiter == 1
    assert vocabulary.encode("a cab") == [2, 1, 4, 2, 3]
    assert vocabulary.decode([2, 1, 4, 2, 3], lowercase=True) == "a cab"
    assert Vocabulary.from_state(vocabulary.to_state()) == vocabulary


def test_a_character_that_the_head_does_not_know_is_named() -> None:
    with pytest.raises(BadRow, match="'é'"):
        Vocabulary.of_texts(["cafe"]).encode("café")


def test_no_text_at_all_makes_no_vocabulary() -> None:
    with pytest.raises(ValueError, match="no text"):
        Vocabulary.of_texts(["", " "])


def test_a_head_of_capitals_reads_and_writes_lower_case() -> None:
    vocabulary = Vocabulary(("<pad>", "<s>", "|", "A", "B", "'"))
    assert vocabulary.encode("ab a") == [3, 4, 2, 3]
    assert vocabulary.decode([1, 3, 4, 2, 2, 3], lowercase=True) == "ab a"
    assert vocabulary.decode([3, 4], lowercase=False) == "AB"


def collapsed(path: tuple[int, ...], blank: int) -> tuple[int, ...]:
    return tuple(c for c, _ in itertools.groupby(path) if c != blank)


def test_needed_frames_are_the_fewest_that_hold_a_path_of_the_label() -> None:
    for label in [(1,), (1, 2), (1, 1), (1, 1, 1), (1, 2, 2, 1), (2, 2, 1)]:
        needed = needed_frames(label)
        for frames in range(1, 8):
            paths = itertools.product(range(3), repeat=frames)
            possible = any(collapsed(path, 0) == label for path in paths)
            assert possible is (frames >= needed)


def test_ctc_loss_is_finite_exactly_with_the_needed_frames() -> None:
    label = torch.tensor([[1, 1, 2, 2, 1]])
    needed = needed_frames(label[0].tolist())
    assert needed == 7
    for frames in (needed - 1, needed):
        log_probs = torch.randn(frames, 1, 3).log_softmax(-1)
        loss = torch.nn.functional.ctc_loss(
            log_probs, label, torch.tensor([frames]), torch.tensor([5])
        )
        assert loss.isfinite().item() is (frames == needed)
