"""The config of `task: asr`, speech recognition."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from ..config.schema import DataConfig, EvaluationConfig, JobConfig, Section


class HeadConfig(Section):
    init: Literal["fresh", "backbone"] = "fresh"
    """fresh: a new output layer over the characters of the training text; backbone: a copy of the
    encoder's own CTC head, with its own characters (nano/wav2vec2, hf/…-ctc and hub models with
    one, torchaudio's ASR bundles)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """The dropout probability before the output layer, from 0 to below 1."""


class TextConfig(Section):
    lowercase: bool = True
    """Put all text into lower case, so that case does not count."""
    punctuation: bool = False
    """Keep punctuation as part of the text."""
    apostrophes: bool = True
    """Keep apostrophes inside words (don't); else they are removed."""
    modifiers: bool = True
    """Keep tone letters and letters that modify a sound (˥ ʰ ː ˈ ⁵); else they are removed."""
    language: str | None = None
    """The language of the text by its code (tr, az, de, zh-CN), for its rules of case: Turkish and
    Azeri have a dotted and a dotless i. null: the rules that most languages share."""
    tokens: Literal["characters", "words"] = "characters"
    """The tokens of a fresh head. characters: every character, with a sign between words; words:
    every part between spaces, for phonemes that are written with spaces between them (t oʊ n)."""

    @field_validator("language")
    @classmethod
    def _code(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]+)*", value):
            raise ValueError(f"{value!r} is no code of a language: write tr for Turkish")
        return value


class AudioConfig(Section):
    normalise: bool | None = None
    """Bring each utterance to zero mean and unit variance; null: if the encoder was trained so."""
    longest: float | None = Field(default=None, gt=0)
    """The most seconds of a training utterance, above 0; longer ones are not trained on. null: no
    limit."""


class AugmentConfig(Section):
    speed: tuple[float, float] = (1.0, 1.0)
    """The lowest and the highest factor by which an utterance is played faster, each from 0.5 to 2.
    The pitch changes too."""
    noise: float = Field(default=0.0, ge=0, le=1)
    """The share of utterances, from 0 to 1, that get white noise 5 to 40 dB below the speech."""
    gain: float = Field(default=0.0, ge=0)
    """The most decibels by which an utterance is made louder or softer, from 0."""

    @field_validator("speed")
    @classmethod
    def _range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0.5 <= value[0] <= value[1] <= 2.0:
            raise ValueError("speed is a range from low to high, between 0.5 and 2")
        return value


class DecodingConfig(Section):
    method: Literal["greedy", "beam"] = "greedy"
    """greedy: take the best character of each frame; beam: search for the best text."""
    beams: int = Field(default=16, ge=1)
    """The number of beginnings of a text that a beam search keeps, from 1."""
    language_model: str | None = None
    """The path of an ARPA file over words, plain or .gz, for the beam search; null: none."""
    alpha: float = Field(default=0.5, ge=0)
    """The weight of the language model's log probability, from 0."""
    beta: float = 1.0
    """A number that every word adds to the score, because the language model prefers few words."""

    @model_validator(mode="after")
    def _searched(self) -> DecodingConfig:
        if self.language_model is not None and self.method != "beam":
            raise ValueError("a language_model acts in the beam search only: set method to beam")
        return self


class ChunkConfig(Section):
    seconds: float = Field(default=30.0, gt=0)
    """The length of a piece in seconds, above 0. Longer audio is recognised in pieces."""
    stride: float = Field(default=5.0, ge=0)
    """The seconds by which pieces overlap on each side, from 0 to below half of a piece. Characters
    near a cut are taken from the neighbouring piece."""

    @model_validator(mode="after")
    def _more_than_strides(self) -> ChunkConfig:
        if 2 * self.stride >= self.seconds:
            raise ValueError("seconds must be more than two strides, or nothing is left of a piece")
        return self


class ASREvaluationConfig(EvaluationConfig):
    deciding: Literal["WER", "CER", "loss"] | None = None
    """The figure on the validation split by which the best checkpoint is chosen: WER, CER, or loss
    (the training loss). Of equal checkpoints the latest is kept. null: WER, or CER where the text
    of the training split has no spaces between words."""


class ASRConfig(JobConfig):
    task: Literal["asr"] = "asr"
    head: HeadConfig = HeadConfig()
    """The output layer."""
    text: TextConfig = TextConfig()
    """The form of the text in training, evaluation and vocabulary."""
    audio: AudioConfig = AudioConfig()
    """The audio that the encoder reads."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes of training utterances."""
    decoding: DecodingConfig = DecodingConfig()
    """The way from the characters of frames to a text."""
    chunks: ChunkConfig = ChunkConfig()
    """The pieces of long audio."""
    evaluation: ASREvaluationConfig = ASREvaluationConfig()
    """How recognition is measured."""
    data: DataConfig
    """The data; its columns are audio and text, and speaker if there is one."""
