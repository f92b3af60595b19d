"""What a config of `task: vqa` may say."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ..config.schema import DataConfig, JobConfig, Section

HeadKind = Literal["auto", "fusion", "bilinear", "coattention", "ranking", "generation"]


class VQAHeadConfig(Section):
    kind: HeadKind = "auto"
    """On CLIP and SigLIP a classifier over the answers: fusion of the two embeddings by an MLP,
    bilinear pooling of them, or coattention over image and text tokens. On BLIP its own decoder:
    ranking of the answers, or generation. auto: fusion and ranking."""
    width: int = Field(default=256, ge=1)
    """Of the layers of a classifier."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """In a classifier."""
    factors: int = Field(default=5, ge=1)
    """Products that are summed for each feature of the bilinear pooling."""
    layers: int = Field(default=2, ge=1)
    """Co-attention: layers over the text, and as many over the image."""
    heads: int = Field(default=4, ge=1)
    """Co-attention: heads of each attention; a divisor of width."""
    loss: Literal["auto", "cross_entropy", "binary_cross_entropy"] = "auto"
    """Of a classifier. auto: binary with several answers to a question, as for VQAv2, else not."""

    @model_validator(mode="after")
    def _heads(self) -> VQAHeadConfig:
        if self.kind == "coattention" and self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {self.width}")
        return self


class BlipAnswersConfig(Section):
    candidates: int = Field(default=128, ge=1)
    """Ranking: how many answers, those with the likeliest first token, are read to their end."""
    beams: int = Field(default=3, ge=1)
    """Generation: of the beam search; 1 is greedy."""
    max_tokens: int = Field(default=10, ge=1)
    """Generation: the most tokens of an answer."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Of the training loss."""
    train_lm_head: bool = False
    """Train a copy of the decoder's last layers too, and save it; else only the adapter."""


class AnswersConfig(Section):
    size: int = Field(default=3129, ge=1)
    """The vocabulary: so many of the training split's most frequent answers."""
    min_count: int = Field(default=1, ge=1)
    """Leave out answers that are rarer."""
    normalise: Literal["auto", "official", "plain"] = "auto"
    """Which answers are the same: by the rules of the VQA challenge (punctuation, number words,
    articles, contractions), or by letters regardless of case. auto: official where questions have
    several answers."""


class VQADataConfig(DataConfig):
    resize: Literal["squash", "longest", "shortest"] = "squash"
    """The whole picture stretched to the encoder's size, or fitted in on black; shortest crops the
    centre, and with it perhaps what is asked about."""
    question_length: int | None = Field(default=None, ge=4)
    """Cut questions to so many tokens; by default to what the encoder reads."""


class VQAConfig(JobConfig):
    task: Literal["vqa"] = "vqa"
    data: VQADataConfig
    head: VQAHeadConfig = VQAHeadConfig()
    answers: AnswersConfig = AnswersConfig()
    blip: BlipAnswersConfig = BlipAnswersConfig()
