"""What a speech-recognition config may say."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from ..config.schema import DataConfig, JobConfig, Section


class HeadConfig(Section):
    init: Literal["fresh", "backbone"] = "fresh"
    """A new output layer over the characters of the training text, or the encoder's own CTC head
    with its own characters (nano/wav2vec2, hf/…-ctc and hub models with one, torchaudio's ASR
    bundles)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Before the output layer."""


class TextConfig(Section):
    lowercase: bool = True
    """Case does not count."""
    punctuation: bool = False
    """Punctuation is part of the text."""
    apostrophes: bool = True
    """Apostrophes inside words are part of them (don't)."""


class AudioConfig(Section):
    normalise: bool | None = None
    """Bring each utterance to zero mean and unit variance; by default as the encoder was
    trained."""
    longest: float | None = Field(default=None, gt=0)
    """Seconds beyond which an utterance is not trained on."""


class AugmentConfig(Section):
    speed: tuple[float, float] = (1.0, 1.0)
    """The range of the factor by which an utterance is played faster (pitch goes with it)."""
    noise: float = Field(default=0.0, ge=0, le=1)
    """The share of utterances with white noise 5 to 40 dB below the speech."""
    gain: float = Field(default=0.0, ge=0)
    """Decibels up or down, at most."""

    @field_validator("speed")
    @classmethod
    def _range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0.5 <= value[0] <= value[1] <= 2.0:
            raise ValueError("speed is a range from low to high, between 0.5 and 2")
        return value


class DecodingConfig(Section):
    method: Literal["greedy", "beam"] = "greedy"
    """The best character of each frame, or a search over prefixes."""
    beams: int = Field(default=16, ge=1)
    """Prefixes that a beam search keeps."""
    language_model: str | None = None
    """An ARPA file over words, for the beam search."""
    alpha: float = Field(default=0.5, ge=0)
    """The weight of the language model's log probability."""
    beta: float = 1.0
    """What every word adds to the score, against the model's liking for few words."""

    @model_validator(mode="after")
    def _searched(self) -> DecodingConfig:
        if self.language_model is not None and self.method != "beam":
            raise ValueError("a language_model acts in the beam search alone: set method to beam")
        return self


class ChunkConfig(Section):
    seconds: float = Field(default=30.0, gt=0)
    """Audio longer than this is recognised in pieces of this length."""
    stride: float = Field(default=5.0, ge=0)
    """What neighbouring pieces share on each side; their characters there are left out."""

    @model_validator(mode="after")
    def _more_than_strides(self) -> ChunkConfig:
        if 2 * self.stride >= self.seconds:
            raise ValueError("seconds must be more than two strides, or nothing is left of a piece")
        return self


class ASRConfig(JobConfig):
    task: Literal["asr"] = "asr"
    head: HeadConfig = HeadConfig()
    """The output layer."""
    text: TextConfig = TextConfig()
    """One normaliser for training, evaluation and vocabulary."""
    audio: AudioConfig = AudioConfig()
    """What the encoder hears."""
    augment: AugmentConfig = AugmentConfig()
    """Of training utterances."""
    decoding: DecodingConfig = DecodingConfig()
    """From characters of frames to text."""
    chunks: ChunkConfig = ChunkConfig()
    """For long audio."""
    data: DataConfig
    """Columns: audio, text; speaker where there is one."""
