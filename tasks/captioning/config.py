"""What a config of `task: captioning` may say."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ..config.schema import DataConfig, EvaluationConfig, JobConfig, Section

Deciding = Literal["CIDEr", "BLEU-4", "ROUGE-L", "perplexity"]


class CaptioningDataConfig(DataConfig):
    prompt: str = "a picture of"
    """What every caption begins with; it is given, not learned, and left out of what is written.
    That of BLIP's training; "" for none."""
    captions: Literal["one", "all"] = "one"
    """Of a row with several captions, one drawn anew for each epoch, or all of them, which count
    together as much as one."""
    caption_length: int = Field(default=40, ge=4)
    """Cut captions to so many tokens, start and end included, without the prompt; fewer where the
    decoder reads fewer."""
    resize: Literal["squash", "longest", "shortest"] = "squash"
    """The whole picture stretched to the encoder's size, or fitted in on black; shortest crops the
    centre, and with it perhaps what is told."""


class LossConfig(Section):
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Of the training loss; BLIP's is 0.1."""


class DecodingConfig(Section):
    beams: int = Field(default=3, ge=1)
    """Of the beam search; 1 is greedy."""
    max_tokens: int = Field(default=20, ge=1)
    """The most tokens of a caption, its end included; fewer where the decoder reads fewer."""
    min_tokens: int = Field(default=0, ge=0)
    """The least."""
    length_penalty: float = 1.0
    """Above 1 a beam search prefers longer captions, below 1 shorter ones."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Above 1 words that stand already, those of the prompt too, are less likely to come again."""
    no_repeat_ngram: int = Field(default=0, ge=0)
    """So many tokens never follow each other twice; 0 sets no limit."""

    @model_validator(mode="after")
    def _lengths(self) -> DecodingConfig:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"at least {self.min_tokens} tokens and at most {self.max_tokens}")
        return self


class CaptioningEvaluationConfig(EvaluationConfig):
    deciding: Deciding = "CIDEr"
    """The metric by which the best checkpoint is chosen, on the validation split; perplexity is the
    exponential of the loss of its captions for each token, without label smoothing."""


class CaptioningConfig(JobConfig):
    task: Literal["captioning"] = "captioning"
    data: CaptioningDataConfig
    loss: LossConfig = LossConfig()
    decoding: DecodingConfig = DecodingConfig()
    evaluation: CaptioningEvaluationConfig = CaptioningEvaluationConfig()

    @model_validator(mode="after")
    def _something_to_train(self) -> CaptioningConfig:
        if self.trainer.mode == "head":
            raise ValueError(
                "trainer.mode head would train nothing: BLIP writes by its own decoder; choose "
                "adapter, full or none"
            )
        return self
