"""The synthetic audio that trains `nano/wav2vec2`: made by processes, kept on the accelerator.

Shape legend: B slots, T = 96,000 samples at 16,000 Hz in a slot (6 s), N slots in store.
"""

from __future__ import annotations

import functools
import multiprocessing
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmadapters.zoo.wav2vec2 import SPACE, VOCABULARY

from ...data.synthetic import sentences, speech

SLOT = 6 * speech.SAMPLE_RATE


CHUNK = 100  # most slots that one call of a worker makes


TEST_TEXTS = 2000  # number of test sentences that training leaves out


def make_slots(chunk: int, count: int) -> tuple[Tensor, Tensor, list[str]]:
    """Makes the first `count` slots of a chunk of read text; a chunk's number fixes its content.

    A slot holds one or more utterances with pauses; each has another reader.

    Returns:
        samples: (count, T) int16.
        ends: (count,), the end of the last word, in samples.
        texts: one of each slot.
    """
    torch.set_num_threads(1)
    rng = random.Random(f"slots {chunk}")
    utterances = read_utterances(chunk, rng)
    samples = torch.zeros(count, SLOT, dtype=torch.int16)
    ends, texts = torch.zeros(count, dtype=torch.long), []
    text, waveform = next(utterances)
    for slot in range(count):
        alone, end = rng.random() < 0.15, 0
        said: list[str] = []
        while not (alone and said):
            start = end + rng.randrange(speech.SAMPLE_RATE // 3)
            if start + len(waveform) > SLOT:
                break
            end = start + len(waveform)
            samples[slot, start:end] = (waveform * 32767).to(torch.int16)
            said.append(text)
            text, waveform = next(utterances)
        ends[slot] = end
        texts.append(" ".join(said))
    return samples, ends, texts


def read_utterances(chunk: int, rng: random.Random) -> Iterator[tuple[str, Tensor]]:
    """Yields (text, waveform) of at most 5.5 s in pretraining voices, without texts of the test."""
    forbidden = test_texts()
    for seed in sentences.PRETRAINING_SEEDS[chunk * 5000 :]:
        text = sentences.word_string(seed) if rng.random() < 0.3 else sentences.sentence(seed)
        reader = speech.random_reader(rng, among=speech.pretraining_variants())
        if text not in forbidden:
            waveform = speech.synthesize(text, reader)
            if len(waveform) <= 5.5 * speech.SAMPLE_RATE:
                yield text, waveform


@functools.cache
def test_texts() -> frozenset[str]:
    """Returns the sentences of the test.

    Other seeds can give the same short sentence, so training must skip texts, not seeds.
    """
    return frozenset(sentences.sentence(seed) for seed in sentences.TEST_SEEDS[:TEST_TEXTS])


def encode(text: str) -> list[int]:
    """Returns the character ids of a text."""
    return [VOCABULARY[c] for c in text.replace(" ", SPACE)]


@dataclass
class Store:
    """Audio on the training device; `fill` adds to it while `batch` draws from it.

    Attributes:
        size: number of slots, N.
        device: device of `samples_NT`.
        ready: number of slots that are filled.
        closed: set by the trainer to stop `fill`.
        samples_NT: (N, T) int16.
        ends_N: (N,), the end of the last word of each slot, in samples.
        targets: character ids of each filled slot.
    """

    size: int
    device: str
    ready: int = 0
    closed: bool = False
    samples_NT: Tensor = field(init=False)
    ends_N: Tensor = field(init=False)
    targets: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.samples_NT = torch.empty(self.size, SLOT, dtype=torch.int16, device=self.device)
        self.ends_N = torch.empty(self.size, dtype=torch.long)

    def fill(self, workers: int) -> None:
        """Synthesises slots until the store is full or closed."""
        starts = range(0, self.size, CHUNK)
        counts = [min(CHUNK, self.size - start) for start in starts]
        # Forked processes would inherit locks of the accelerator's runtime, so spawn them.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            for samples, ends, texts in pool.map(make_slots, range(len(counts)), counts):
                here = slice(self.ready, self.ready + len(texts))
                self.samples_NT[here] = samples.to(self.device)
                self.ends_N[here] = ends
                self.targets += [encode(text) for text in texts]
                self.ready += len(texts)
                if self.closed:
                    pool.shutdown(cancel_futures=True)
                    break

    def batch(
        self, size: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, list[list[int]]]:
        """Draws random slots.

        Returns:
            waveforms: (B, T) in [−1, 1].
            ends: (B,), in samples.
            targets: character ids of each slot.
        """
        picked = torch.randint(self.ready, (size,), generator=generator)
        waveform_BT = self.samples_NT[picked.to(self.device)].float() / 32768
        return waveform_BT, self.ends_N[picked], [self.targets[i] for i in picked.tolist()]


def validation_readings(count: int) -> list[tuple[str, Tensor]]:
    """Makes the readings of the curve, in held-out voices; no choice depends on them."""
    readings = []
    for seed in sentences.VALIDATION_SEEDS[:count]:
        rng = random.Random(f"validation reader {seed}")
        reader = speech.random_reader(rng, among=speech.held_out_variants())
        text = sentences.sentence(seed)
        readings.append((text, speech.synthesize(text, reader)))
    return readings
