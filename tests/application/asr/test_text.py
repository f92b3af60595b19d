"""One normaliser and one vocabulary, and the frames that CTC needs for a label."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmadapters.tasks.asr.config import TextConfig
from mmadapters.tasks.asr.head import own_vocabulary
from mmadapters.tasks.asr.text import Vocabulary, has_words, needed_frames, normalise
from mmadapters.tasks.config.schema import BackboneConfig
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


@pytest.mark.parametrize(
    ("config", "text", "expected"),
    [
        # Zero-width characters: a space, a joiner, a soft hyphen, a mark of order, a direction.
        ({}, "\ufeffzero\u200b wi\u00addth\u200d \u200eend\u2060", "zero width end"),
        ({}, "می\u200cخواهم", "میخواهم"),
        # Turkish and Azeri have four letters i.
        ({"language": "tr"}, "IŞIK İyi DİL", "ışık iyi dil"),
        ({"language": "tr"}, "I\u0307yi", "iyi"),
        ({"language": "az-AZ"}, "QIRMIZI", "qırmızı"),
        ({}, "QIRMIZI", "qirmizi"),
        ({"language": "de"}, "IN", "in"),
        # Tones and modifiers of sounds.
        ({}, "ma˥˩ tʰaŋ˨˩˦ kʷɪ̃ː", "ma˥˩ tʰaŋ˨˩˦ kʷɪ̃ː"),
        ({}, "ma⁵⁵ nʲet ˈə", "ma⁵⁵ nʲet ˈə"),
        ({"modifiers": False}, "ma˥˩ tʰaː ma⁵⁵ ˈə", "ma ta ma ə"),
        ({}, "ã", "ã"),
        ({}, "ßtraße ﬀ", "ßtraße ff"),
        ({}, "`q´ ´s´", "q s"),
    ],
)
def test_normalisation_knows_unicode(config: dict, text: str, expected: str) -> None:
    once = normalise(text, TextConfig(**config))
    assert once == expected
    assert normalise(once, TextConfig(**config)) == once


def test_a_language_is_a_code() -> None:
    with pytest.raises(ValueError, match="'Turkish' is no code of a language: write tr"):
        TextConfig(language="Turkish")


def test_a_turkish_head_of_capitals_keeps_its_two_kinds_of_i() -> None:
    tokens = ("<pad>", "|", "I", "İ", "Ş", "K", "Y")
    turkish = Vocabulary(tokens, language="tr")
    assert turkish.encode("ışık iyi") == [2, 4, 2, 5, 1, 3, 6, 3]
    assert turkish.decode([2, 4, 2, 5, 1, 3, 6, 3], lowercase=True) == "ışık iyi"


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["yes we can", "no"], True),
        (["yes", "no", "stop"], False),
        (["三五七", "一二", "九"], False),
        (["你好，世界", "今天 天气", "再见", "谢谢"], False),
        (["我 爱 你", "今天 好"], True),
        (["สวัสดีครับ", "ขอบคุณ มาก", "ไปไหน"], False),
        (["turn left", "stop", "go"], True),
        (["", " "], True),
        ([], True),
    ],
)
def test_texts_tell_whether_spaces_separate_words(texts: list[str], words: bool) -> None:
    assert has_words(texts) is words


PHONES = ("h", "ɪ", "ə", "ɪə", "oʊ", "o", "ʊ", "l", "t", "tʃ", "s", "tʃʰ", "a", "aɪ")


def tokenizer(folder: Path, kind: str) -> Any:
    import transformers

    specials = ["<pad>", "<s>", "</s>", "<unk>", "|"]
    table = {token: i for i, token in enumerate([*specials, *PHONES])}
    (folder / "vocab.json").write_text(json.dumps(table), "utf-8")
    options = {"do_phonemize": False} if "Phoneme" in kind else {}
    made = getattr(transformers, kind)(str(folder / "vocab.json"), **options)
    made.save_pretrained(folder)
    return made


def vocabulary_of(folder: Path) -> Vocabulary:
    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = torch.nn.Linear(2, len(PHONES) + 6)

    named = BackboneConfig(name="hf/wav2vec2-ctc", processor=str(folder))
    return own_vocabulary(named, Head())


def test_long_tokens_are_matched_as_by_the_tokenizer_of_transformers(tmp_path: Path) -> None:
    theirs = tokenizer(tmp_path, "Wav2Vec2CTCTokenizer")
    ours = vocabulary_of(tmp_path)
    # Their tokenizer swallows spaces beside a token of several characters: none stand there.
    for text in ("hɪəl", "həloʊ", "hɪ tɪəs", "tʃtʃʰts", "oʊʊo", "taɪla at", "laa l"):
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        assert ours.decode(ids, lowercase=True) == text
        decoded = theirs.decode(ids, group_tokens=False, skip_special_tokens=True)
        assert ours.decode(ids, lowercase=True) == decoded
    assert ours.decode(ours.encode("loʊ hɪə l"), lowercase=True) == "loʊ hɪə l"
    # What no token names (here the last id of the head) and special tokens are no text.
    assert ours.decode([1, 5, 3, 19, 8], lowercase=True) == "hɪə"
    with pytest.raises(BadRow, match="'x', which is not among the characters"):
        ours.encode("həx")


def test_phonemes_between_spaces_are_read_as_by_their_tokenizer(tmp_path: Path) -> None:
    theirs = tokenizer(tmp_path, "Wav2Vec2PhonemeCTCTokenizer")
    ours = vocabulary_of(tmp_path)
    assert ours.spaced
    for text in ("h ə l oʊ", "tʃʰ ɪə tʃ t s", "a ɪ aɪ", "o ʊ oʊ"):
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        assert ours.decode(ids, lowercase=True) == text
        assert theirs.decode(ids, group_tokens=False) == text
    assert ours.encode("həloʊ") == ours.encode("h ə l oʊ")


def test_a_head_that_was_saved_without_a_list_of_special_tokens_is_read() -> None:
    old = Vocabulary.from_state({"tokens": ["[PAD]", "|", "[UNK]", "a", "oʊ"], "blank": 0})
    assert old.decode([3, 2, 4, 1, 3], lowercase=True) == "aoʊ a"
    assert old.encode("oʊa") == [4, 3]


def test_a_vocabulary_of_words_has_a_token_for_each_part() -> None:
    phones = Vocabulary.of_texts(["h ə l oʊ", "oʊ tʃ"], words=True)
    assert phones.tokens == ("<pad>", "h", "l", "oʊ", "tʃ", "ə")
    assert phones.encode("tʃ oʊ") == [4, 3]
    assert phones.decode([4, 3], lowercase=True) == "tʃ oʊ"
    assert Vocabulary.from_state(json.loads(json.dumps(phones.to_state()))) == phones
