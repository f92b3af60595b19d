"""The config of `task: vqa`, visual question answering."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ..config.schema import DataConfig, EvaluationConfig, JobConfig, Section

HeadKind = Literal["auto", "fusion", "bilinear", "coattention", "ranking", "generation"]


class VQAHeadConfig(Section):
    kind: HeadKind = "auto"
    """The kind of head. On CLIP and SigLIP it is a classifier over the answers: fusion (an MLP on
    the two embeddings), bilinear (bilinear pooling of them) or coattention (attention over image
    and text tokens). On BLIP it is BLIP's decoder: ranking of the answers, or generation. auto:
    fusion for CLIP and SigLIP, ranking for BLIP."""
    width: int = Field(default=256, ge=1)
    """Classifiers: the width of their layers, from 1."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Classifiers: the dropout probability, from 0 to below 1."""
    factors: int = Field(default=5, ge=1)
    """Bilinear pooling: the number of products, from 1, that are summed for each feature."""
    layers: int = Field(default=2, ge=1)
    """Co-attention: the number of layers over the text, and over the image, from 1."""
    heads: int = Field(default=4, ge=1)
    """Co-attention: the number of heads of each attention, from 1; it must divide width."""
    loss: Literal["auto", "cross_entropy", "binary_cross_entropy"] = "auto"
    """Classifiers: the training loss. auto: binary_cross_entropy if questions have several answers,
    as in VQAv2, else cross_entropy."""

    @model_validator(mode="after")
    def _heads(self) -> VQAHeadConfig:
        if self.kind == "coattention" and self.width % self.heads:
            raise ValueError(
                f"{self.heads} heads do not divide a width of {self.width}: change heads or width"
            )
        return self


class BlipAnswersConfig(Section):
    candidates: int = Field(default=128, ge=1)
    """Ranking: the number of answers, from 1, whose full likelihood is computed. They are those
    with the likeliest first token."""
    beams: int = Field(default=3, ge=1)
    """Generation: the number of answers that the beam search keeps, from 1; 1 is greedy
    decoding."""
    max_tokens: int = Field(default=10, ge=1)
    """Generation: the most tokens of an answer, from 1."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """The share of the target that is spread over all tokens in the training loss, from 0 to below
    1."""
    train_lm_head: bool = False
    """Train and save a copy of the decoder's last layers too; else only the adapter is trained."""


class AnswersConfig(Section):
    size: int = Field(default=3129, ge=1)
    """The most answers of the vocabulary, from 1: the most frequent ones of the training split."""
    min_count: int = Field(default=1, ge=1)
    """The least number of times, from 1, that an answer of the vocabulary occurs in the training
    split."""
    normalise: Literal["auto", "official", "plain"] = "auto"
    """The rule for which answers are the same. official: by the rules of the VQA challenge
    (punctuation, number words, articles, contractions); plain: by letters, regardless of case;
    auto: official if questions have several answers, else plain."""


class VQADataConfig(DataConfig):
    resize: Literal["squash", "longest", "shortest"] = "squash"
    """How a picture gets the encoder's size. squash: the whole picture is stretched; longest: the
    whole picture is fitted in, on black; shortest: the centre is cropped, so parts that a question
    is about may be lost."""
    question_length: int | None = Field(default=None, ge=4)
    """The most tokens of a question, from 4; longer questions are cut. null: as many as the encoder
    reads."""


class VQAEvaluationConfig(EvaluationConfig):
    deciding: Literal["accuracy", "loss"] = "accuracy"
    """The figure on the validation split by which the best checkpoint is chosen; of equal ones the
    latest is kept. loss is the training loss."""


class VQAConfig(JobConfig):
    task: Literal["vqa"] = "vqa"
    data: VQADataConfig
    """The data; its columns are image, question and answer or answers, and image_id if there is
    one."""
    head: VQAHeadConfig = VQAHeadConfig()
    """The head that answers."""
    answers: AnswersConfig = AnswersConfig()
    """The vocabulary of answers."""
    blip: BlipAnswersConfig = BlipAnswersConfig()
    """Training and answers of BLIP."""
    evaluation: VQAEvaluationConfig = VQAEvaluationConfig()
    """How answers are measured."""
