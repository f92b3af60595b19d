"""Measures `nano/wav2vec2` on held-out synthetic speech, on the CPU, and writes its card."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from mmadapters.files import write_text
from mmadapters.zoo import wav2vec2
from mmadapters.zoo.files import CARD, WEIGHTS, read_config, write_config

from ...data.synthetic import sentences, speech
from .. import wav2vec2_figures

if TYPE_CHECKING:
    from transformers import Wav2Vec2ForCTC

Readings = list[tuple[str, Tensor]]


def write(directory: Path, *, count: int) -> None:
    """Measures on `count` sentences; writes the figures to `config.json`, and `README.md`."""
    config = read_config(directory)
    model = wav2vec2.load_ctc(directory)
    config["test_sentences"] = count
    config["figures"] = dict(figures(model, count))
    config["parameters"] = sum(p.numel() for p in model.parameters())
    config["bytes"] = (directory / WEIGHTS).stat().st_size
    write_config(config, directory)
    write_text(directory / CARD, card(config))


def figures(model: "Wav2Vec2ForCTC", count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields every figure of the card: its key, and its name, value and tolerance."""
    console, started = Console(), time.monotonic()

    def figure(key: str, name: str, value: float) -> tuple[str, dict[str, Any]]:
        console.print(f"{time.monotonic() - started:5.0f} s  {name}: {value:.3f}")
        return key, {"name": name, "value": round(value, 4), "tolerance": 0.005}

    def wer(readings: Readings) -> float:
        return wav2vec2_figures.word_error_rate(wav2vec2_figures.recognise(model, readings))

    us = list(wav2vec2_figures.held_out_readings("en-us", count))
    yield figure("wer", "WER, en-us, held-out sentences and voices", wer(us))
    count = other_conditions(count)
    yield figure("wer_half", "WER, en-us, the sentences of the other rows", wer(us[:count]))
    for accent in speech.ACCENTS:
        if accent != "en-us":
            readings = list(wav2vec2_figures.held_out_readings(accent, count))
            yield figure(f"wer_{accent}", f"WER, {accent}", wer(readings))
    generator = torch.Generator().manual_seed(0)
    noisy = [(text, speech.augment(x[None], generator=generator)[0]) for text, x in us[:count]]
    yield figure("wer_noisy", "WER, en-us, noise, reverberation and level drawn", wer(noisy))
    unit = [(text, (x - x.mean()) / x.std()) for text, x in us[:count]]
    yield figure("wer_normalised", "WER, en-us, waveforms scaled to unit variance", wer(unit))
    strings = list(wav2vec2_figures.held_out_readings("en-us", count, text=sentences.word_string))
    yield figure("wer_strings", "WER, en-us, strings of words in no order", wer(strings))
    # Half of the content words here are new to the model; the other half is the comparison.
    mixed = wav2vec2_figures.held_out_readings(
        "en-us", count, text=lambda seed: sentences.sentence(seed, reserved_share=0.5)
    )
    pairs = wav2vec2_figures.recognise(model, list(mixed))
    unheard = sentences.reserved_words()
    heard = frozenset(word for text, _ in pairs for word in text.split()) - unheard
    missed = wav2vec2_figures.share_missed
    yield figure("missed_unheard", "words never heard, missed", missed(pairs, unheard))
    yield figure("missed_heard", "other words of these sentences, missed", missed(pairs, heard))


def other_conditions(count: int) -> int:
    """Returns the number of sentences of the other accents and conditions: the first half."""
    return max(1, count // 2)


def card(config: dict[str, Any]) -> str:
    """Returns the card as Markdown, from the content of `config.json`."""
    training, values, count = config["training"], config["figures"], config["test_sentences"]

    def percent(key: str) -> str:
        return f"{100 * values[key]['value']:.1f} %"

    def ratio(key: str) -> str:
        return f"{values[key]['value'] / values['wer_half']['value']:.1f}×"

    half = other_conditions(count)
    accents = "\n".join(
        f"| `{accent}` | {speech.ACCENTS[accent]} | {percent(key)} | {ratio(key)} |"
        for accent, key in (
            ("en-us", "wer_half"),
            *((accent, f"wer_{accent}") for accent in speech.ACCENTS if accent != "en-us"),
        )
    )
    near = [
        accent
        for accent in speech.ACCENTS
        if accent != "en-us" and values[f"wer_{accent}"]["value"] < 2 * values["wer_half"]["value"]
    ]
    gap = (
        f"Less than twice the en-us figure: {', '.join(f'`{a}`' for a in near)}."
        if near
        else "In every other accent the WER is at least twice that of en-us."
    )
    curve = "\n".join(
        f"| {point['step']} | {point['seconds']} | {point['hours']} | {100 * point['wer']:.1f} % |"
        for point in training["curve"]
    )
    architecture = config["architecture"]
    return f"""# nano/wav2vec2

A small wav2vec 2.0 encoder with its CTC head, trained from random weights on **synthetic** speech:
US English (`en-us`) sentences of a small grammar, read by eSpeak NG. It gives speech adapters a
real pretrained encoder without a download. It does not recognise human speech.

- Class: `transformers.Wav2Vec2Model` (`Wav2Vec2ForCTC` with the head) or, converted,
  `torchaudio.models.Wav2Vec2Model`. The input is a raw waveform at 16,000 Hz
  of any level; the output has 50 frames a second.
- Size: {config["parameters"]:,} parameters with the head, {config["bytes"] / 1e6:.2f} MB in fp16;
  {architecture["num_hidden_layers"]} pre-norm layers of width {architecture["hidden_size"]},
  layer norm in the feature extractor, so that padded and batched inputs give the same outputs as
  single ones.
- Characters: a–z, the apostrophe, `|` between words, and the CTC blank, which is also the padding,
  id 0.

## Figures

**WER {percent("wer")}** on {count} sentences of synthetic held-out speech in en-us. Neither the
sentences nor the {len(speech.held_out_variants())} voice variants that read them were in training.
WER is Σ(substitutions + deletions + insertions) / Σ words, from greedy decoding without a language
model. The tables are on the first {half} of these sentences, in every accent with the same voices,
rates and pitches. Training heard `en-us` alone.

| accent | | WER | relative to en-us |
|---|---|---|---|
{accents}

{gap}

| en-us, other conditions | |
|---|---|
| with noise (5–40 dB), short reverberation, levels from −40 to 0 dB | WER {percent("wer_noisy")} |
| each waveform scaled to zero mean and unit variance | WER {percent("wer_normalised")} |
| one to six words in random order (no grammar) | WER {percent("wer_strings")} |
| words never heard in training: missed | {percent("missed_unheard")} |
| the other words of the same sentences: missed | {percent("missed_heard")} |

A word that was never heard in training must be spelt from its sounds, but English spelling does not
follow from sounds. That figure is the price of spelling by characters and of a training vocabulary
of {len(sentences.heard_words()):,} word forms.

`mmadapters zoo verify` reads the {count} en-us sentences again and recomputes the first figure.
This command measures all of them:

    python -m mmadapters.tasks.zoo.pretrain wav2vec2 --stages card --out FOLDER

## Data

{training["audio_hours"]:.0f} hours, synthesised while training. Text:
`mmadapters.tasks.data.synthetic.sentences` (70 % sentences of its grammar, 30 % words in no
order), from a word list written for this project (Apache-2.0); a twelfth of the content words is
never used, and sentences of the test are left out. Voices:
{len(speech.pretraining_variants())} of eSpeak NG's
{len(speech.variants())} speaker variants, rate 130–220 words a minute, pitch 30–70. eSpeak NG
(GPL-3) made the audio; this package contains neither eSpeak NG nor the audio.

## Training

CTC, AdamW, peak learning rate {training["learning_rate"]}, cosine, {training["batch_seconds"]} s of
audio a step (pauses included), bf16; reverberation, noise and level are random at each step,
SpecAugment masks the features. {training["steps"]} steps in {training["wall_seconds"]} s in all, on
one {training["device"]} with {training["workers"]} synthesis processes; seed {training["seed"]}.
WER on {training["curve_sentences"]} sentences of the validation seeds, held-out voices:

| step | seconds | hours of audio so far | WER |
|---|---|---|---|
{curve}

Nothing was chosen by this curve. The shipped weights were made with
`--minutes 7.2 --steps 1000000`, so the time limit ended training. The defaults take about as many
steps without a limit.

Two CPU cores would need about 48 hours for those steps (extrapolated from 2.2 s for a step of 8
slots forward and backward, and 16 times that for 128), and the audio needs 28 GB of memory.
`--batch 8 --hours 20` fits in 5 GB; its figures were not measured. The figures of the card alone
take 11 minutes there.

## Not good for

Recordings of people, children, or other languages without adaptation, since it has never heard a
human. Words outside its list. Numbers written as digits. Anything that must be correct.
"""
