"""The config of `task: captioning`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ..config.schema import DataConfig, EvaluationConfig, JobConfig, Section

Deciding = Literal["CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "perplexity", "loss"]


class CaptioningDataConfig(DataConfig):
    prompt: str = "a picture of"
    """The beginning of every caption, by default that of BLIP's training; "" for none. It is given
    to the decoder, not learned, and removed from the captions that are written."""
    captions: Literal["one", "all"] = "one"
    """The captions of a row with several that a training example has. one: a caption that is drawn
    again in each epoch; all: all captions, which together weigh as much as one."""
    caption_length: int = Field(default=40, ge=4)
    """The most tokens of a training caption, from 4, with start and end and without the prompt.
    Longer captions are cut. The decoder may read fewer tokens."""
    resize: Literal["squash", "longest", "shortest"] = "squash"
    """How a picture gets the encoder's size. squash: the whole picture is stretched; longest: the
    whole picture is fitted in, on black; shortest: the centre is cropped, so parts that a caption
    names may be lost."""


class LossConfig(Section):
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """The share of the target that is spread over all tokens in the training loss, from 0 to below
    1; 0.1 for BLIP."""


class DecodingConfig(Section):
    beams: int = Field(default=3, ge=1)
    """The number of captions that the beam search keeps, from 1; 1 is greedy decoding."""
    max_tokens: int = Field(default=20, ge=1)
    """The most tokens of a caption, with its end, from 1. The decoder may have room for fewer."""
    min_tokens: int = Field(default=0, ge=0)
    """The fewest tokens of a caption, from 0 to max_tokens."""
    length_penalty: float = 1.0
    """The preference of a beam search: longer captions above 1, shorter ones below 1."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Above 1, tokens of the caption and of the prompt are less likely to come again. The value is
    above 0; 1 changes nothing."""
    no_repeat_ngram: int = Field(default=0, ge=0)
    """The length in tokens of sequences that must not come twice; 0 allows all."""

    @model_validator(mode="after")
    def _lengths(self) -> DecodingConfig:
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}: lower it"
            )
        return self


class CaptioningEvaluationConfig(EvaluationConfig):
    deciding: Deciding = "CIDEr"
    """The figure on the validation split by which the best checkpoint is chosen; of equal ones the
    latest is kept. perplexity is the exponential of the captions' loss per token, without label
    smoothing; loss is the training loss."""


class CaptioningConfig(JobConfig):
    task: Literal["captioning"] = "captioning"
    data: CaptioningDataConfig
    """The data; its columns are image and caption or captions, and image_id if there is one."""
    loss: LossConfig = LossConfig()
    """The training loss."""
    decoding: DecodingConfig = DecodingConfig()
    """How captions are written."""
    evaluation: CaptioningEvaluationConfig = CaptioningEvaluationConfig()
    """How captions are measured."""

    @model_validator(mode="after")
    def _something_to_train(self) -> CaptioningConfig:
        if self.trainer.mode == "head":
            raise ValueError(
                "trainer.mode head would train nothing: BLIP writes by its own decoder; choose "
                "adapter, full or none"
            )
        return self
