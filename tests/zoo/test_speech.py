"""Synthetic speech: the same request gives the same samples, and accents and voices are real."""

import random
import subprocess
import sys

import pytest
import torch

from mmadapters.tasks.data.synthetic import sentences, speech

pytest.importorskip("espeakng_loader", reason="speech synthesis is the optional extra [speech]")

TEXT = "seven green rivers"


@pytest.mark.parametrize("variant", ["", "f3", "whisper", "klatt2"])
def test_what_was_read_before_changes_no_sample(variant: str) -> None:
    reader = speech.Reader("en-us", variant)
    first = speech.synthesize(TEXT, reader)
    speech.synthesize("another sentence", speech.Reader("en-gb-scotland", "m3", rate=210, pitch=35))
    assert torch.equal(first, speech.synthesize(TEXT, reader))


def test_another_process_reads_the_same_samples() -> None:
    program = (
        "from mmadapters.tasks.data.synthetic import speech\n"
        f"x = speech.synthesize({TEXT!r}, speech.Reader('en-029', 'm1', rate=150, pitch=60))\n"
        "print(len(x), x.double().abs().sum().item())"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    here = speech.synthesize(TEXT, speech.Reader("en-029", "m1", rate=150, pitch=60))
    assert answer.stdout.decode().split() == [str(len(here)), str(here.double().abs().sum().item())]


def test_waveform_is_float32_at_16_khz_between_minus_one_and_one() -> None:
    waveform = speech.synthesize(TEXT, speech.Reader(rate=175))
    assert waveform.dtype == torch.float32
    assert waveform.ndim == 1
    assert 0.05 < waveform.abs().max() <= 1
    assert 0.8 < len(waveform) / speech.SAMPLE_RATE < 2.5  # three words at 175 a minute


def test_every_accent_reads_differently() -> None:
    """An accent that silently does not happen (an unknown voice name) would leave two alike."""
    read = {speech.synthesize(TEXT, speech.Reader(a)).numpy().tobytes() for a in speech.ACCENTS}
    assert len(read) == len(speech.ACCENTS)


def test_rate_and_pitch_change_the_reading() -> None:
    slow, fast = (speech.synthesize(TEXT, speech.Reader(rate=rate)) for rate in (130, 220))
    assert len(slow) > 1.2 * len(fast)
    low, high = (speech.synthesize(TEXT, speech.Reader(pitch=pitch)) for pitch in (30, 70))
    assert low.shape != high.shape or not torch.equal(low, high)


def test_held_out_voices_and_pretraining_voices_share_none() -> None:
    held_out, used = set(speech.held_out_variants()), set(speech.pretraining_variants())
    assert not held_out & used
    assert held_out | used == set(speech.variants())
    assert len(held_out) >= 10


def test_unknown_voice_is_named() -> None:
    with pytest.raises(ValueError, match=r"en-us\+nobody"):
        speech.synthesize(TEXT, speech.Reader("en-us", "nobody"))
    with pytest.raises(ValueError, match="en-mars"):
        speech.synthesize(TEXT, speech.Reader("en-mars"))


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    speech.variants.cache_clear()
    speech._data_folder.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"pip install mmadapters\[speech\]"):
            speech.variants()
    finally:
        speech.variants.cache_clear()
        speech._data_folder.cache_clear()


def test_augmentation_repeats_with_its_seed_and_keeps_shape_and_time() -> None:
    waveform = torch.stack([speech.synthesize(TEXT, speech.Reader())] * 8)
    once, again = (
        speech.augment(waveform, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(once, again)
    assert once.shape == waveform.shape
    levels = 20 * once.square().mean(-1).log10() / 2
    assert ((levels > -41) & (levels < 1)).all()
    # Reverberation keeps the direct sound where it was: the best alignment is no shift.
    spectrum = (
        torch.fft.rfft(once, 2 * once.shape[1]) * torch.fft.rfft(waveform, 2 * once.shape[1]).conj()
    )
    assert (torch.fft.irfft(spectrum).argmax(-1) == 0).all()


def test_a_sentence_is_a_function_of_its_seed() -> None:
    assert [sentences.sentence(seed) for seed in range(50)] == [
        sentences.sentence(seed) for seed in range(50)
    ]
    assert len({sentences.sentence(seed) for seed in range(1000)}) > 950


def test_pretraining_text_holds_no_reserved_word_and_reserved_text_does() -> None:
    heard, reserved = set(sentences.heard_words()), sentences.reserved_words()
    assert len(reserved) > 150
    seeds = random.Random(0).sample(sentences.PRETRAINING_SEEDS, 2000)
    words = {
        w for s in seeds for w in f"{sentences.sentence(s)} {sentences.word_string(s)}".split()
    }
    assert words <= heard
    assert not words & reserved
    mixed = " ".join(sentences.sentence(seed, reserved_share=0.5) for seed in range(200)).split()
    assert sum(word in reserved for word in mixed) > 100


def test_every_word_can_be_spelt_with_letters_and_an_apostrophe() -> None:
    text = "".join(sentences.heard_words()) + "".join(sentences.reserved_words())
    assert set(text) <= set("abcdefghijklmnopqrstuvwxyz'")


def test_digits_are_among_the_words_heard() -> None:
    digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert set(digits) <= set(sentences.heard_words())
    assert [sentences.number_words(n) for n in (7, 13, 20, 42)] == [
        *("seven", "thirteen", "twenty", "forty two")
    ]
