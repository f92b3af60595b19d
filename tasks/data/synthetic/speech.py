"""English by speech synthesis in many accents and voices, with reverberation and noise.

eSpeak NG synthesizes the speech, through the shared library in the wheel `espeakng-loader`. The
wheel is an optional extra (`pip install mmadapters[speech]`), since eSpeak NG is GPL-3; nothing of
it is part of this package. It runs in a separate process (`espeak.py`), one for each process that
uses it, and makes about 200 s of audio per second on one core. The same request gives the same
samples.

Shape legend: B utterances, T samples at 16,000 Hz.
"""

import functools
import importlib.util
import json
import math
import os
import random
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SAMPLE_RATE = 16_000
ACCENTS: dict[str, str] = {
    "en-us": "General American",
    "en-us-nyc": "New York City",
    "en-gb": "British",
    "en-gb-x-rp": "Received Pronunciation",
    "en-gb-scotland": "Scotland",
    "en-gb-x-gbclan": "Lancaster",
    "en-gb-x-gbcwmd": "West Midlands",
    "en-029": "Caribbean",
}
PRETRAINING_ACCENT = "en-us"


@dataclass(frozen=True)
class Reader:
    """A voice variant of an accent, with its rate and pitch.

    Attributes:
        accent: a key of `ACCENTS`.
        variant: one of `variants()` ("f3"), or "" for the accent's own voice.
        rate: words per minute, 80 to 450.
        pitch: 0 to 99; 50 is the variant's own pitch.
    """

    accent: str = PRETRAINING_ACCENT
    variant: str = ""
    rate: int = 175
    pitch: int = 50

    @property
    def voice(self) -> str:
        """eSpeak NG's name of the voice: "en-us+f3"."""
        # Its British voice is the default English, without a country in its name.
        accent = "en" if self.accent == "en-gb" else self.accent
        return f"{accent}+{self.variant}" if self.variant else accent


class _Espeak:
    """The synthesis process; one thread at a time may send it a request."""

    def __init__(self) -> None:
        import espeakng_loader

        program = Path(__file__).with_name("espeak.py")
        library, data = espeakng_loader.get_library_path(), _data_folder().parent
        self.lock = threading.Lock()
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(program), str(library), str(data)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.sample_rate = self._number()
        if self.sample_rate <= 0:
            raise RuntimeError(f"eSpeak NG did not start from its data in {data}")

    def _number(self) -> int:
        assert self.process.stdout is not None
        answer = self.process.stdout.read(4)
        if len(answer) < 4:
            raise RuntimeError("the speech synthesis process ended; its message is above")
        return struct.unpack("<i", answer)[0]

    def read(self, text: str, reader: Reader) -> bytes:
        """Returns 16-bit samples at `sample_rate`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = json.dumps([text, reader.voice, reader.rate, reader.pitch])
        with self.lock:
            self.process.stdin.write(request.encode() + b"\n")
            self.process.stdin.flush()
            count = self._number()
            if count < 0:
                raise RuntimeError(f"eSpeak NG could not read {text!r} as {reader}")
            return self.process.stdout.read(count)


@functools.cache
def _espeak(pid: int) -> _Espeak:
    """Starts one synthesis process for each process: a fork (a worker of a data loader) must not
    share the pipes of its parent."""
    return _Espeak()


@functools.cache
def _data_folder() -> Path:
    if importlib.util.find_spec("espeakng_loader") is None:
        raise ImportError(
            "speech synthesis needs the optional extra: pip install mmadapters[speech]"
        )
    import espeakng_loader

    return Path(espeakng_loader.get_data_path())


@functools.cache
def variants() -> tuple[str, ...]:
    """Returns all voice variants, sorted; each can read every accent."""
    return tuple(sorted(path.name for path in (_data_folder() / "voices" / "!v").iterdir()))


def held_out_variants() -> tuple[str, ...]:
    """Returns every eighth variant. Pretraining never uses them, so they measure new speakers."""
    return variants()[::8]


def pretraining_variants() -> tuple[str, ...]:
    """Returns the variants that pretraining uses."""
    return tuple(name for name in variants() if name not in held_out_variants())


def random_reader(
    rng: random.Random, *, accent: str = PRETRAINING_ACCENT, among: Sequence[str] | None = None
) -> Reader:
    """Draws a reader of `accent`: a variant from `among` (by default all), a rate of 130–220 words
    per minute and a pitch of 30–70."""
    variant = rng.choice(among if among is not None else variants())
    return Reader(accent, variant, rate=rng.randint(130, 220), pitch=rng.randint(30, 70))


def synthesize(text: str, reader: Reader) -> Tensor:
    """Returns `text` read by `reader`: (T,) float32 in [−1, 1] at 16,000 Hz.

    Raises:
        ImportError: the optional extra is not installed; the message says how to install it.
        ValueError: there is no such accent or variant.
    """
    import torchaudio

    if reader.accent not in ACCENTS or (reader.variant and reader.variant not in variants()):
        raise ValueError(f"no voice {reader.voice!r}: see ACCENTS and variants()")
    espeak = _espeak(os.getpid())
    raw = espeak.read(text, reader)
    if not raw:
        return torch.zeros(0)
    samples = torch.frombuffer(bytearray(raw), dtype=torch.int16).float() / 32768
    return torchaudio.functional.resample(samples, espeak.sample_rate, SAMPLE_RATE).clamp(-1, 1)


def augment(waveform_BT: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Adds reverberation and coloured noise to each utterance and changes its level.

    Half of the utterances get a short reverberation: an exponentially decaying noise tail of
    0.05–0.3 s (Polack's model of a diffuse room), mixed at 5–30 % with the direct sound, which
    keeps its place in time. Three in four get noise at 5–40 dB below the speech, with a spectral
    slope between white and brown. Last, each gets a random level: an RMS of −40 to 0 dB.

    Args:
        waveform_BT: (B, T) at 16,000 Hz. Trailing zeros are not taken for padding: noise covers
            them too.
        generator: draws all random numbers; on the waveform's device.

    Returns:
        (B, T), same dtype and device.
    """
    batch, length = waveform_BT.shape
    device = waveform_BT.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, 1, device=device, generator=generator)

    def rms(x_BT: Tensor) -> Tensor:
        return x_BT.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-5)

    x_BT = waveform_BT.float()
    tail = int(0.3 * SAMPLE_RATE)
    seconds = torch.arange(tail, device=device) / SAMPLE_RATE
    # 60 dB (a factor of 1,000) within the reverberation time.
    decay = torch.exp(-math.log(1000) * seconds / uniform(0.05, 0.3))
    room = decay * torch.randn(batch, tail, device=device, generator=generator)
    room = room / room.norm(dim=-1, keepdim=True) * uniform(0.05, 0.3) * (uniform(0, 1) < 0.5)
    room[:, 0] = 1
    size = 1 << (length + tail - 1).bit_length()
    wet = torch.fft.irfft(torch.fft.rfft(x_BT, size) * torch.fft.rfft(room, size), size)
    x_BT = wet[:, :length]

    noise = torch.randn(batch, size, device=device, generator=generator)
    frequency = torch.linspace(0.01, 1, size // 2 + 1, device=device)
    spectrum = torch.fft.rfft(noise) * frequency ** -uniform(0, 1)
    noise = torch.fft.irfft(spectrum, size)[:, :length]
    below = 10 ** (-uniform(5, 40) / 20) * (uniform(0, 1) < 0.75)
    x_BT = x_BT + noise / rms(noise) * rms(x_BT) * below

    return (x_BT / rms(x_BT) * 10 ** (uniform(-40, 0) / 20)).to(waveform_BT.dtype)
