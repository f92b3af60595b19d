"""What a config of `task: retrieval` may say."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from ..config.schema import DataConfig, EvaluationConfig, JobConfig, Section

Deciding = Literal["mean R@1", "text-to-image R@1", "image-to-text R@1"]


class RetrievalHeadConfig(Section):
    projection: Literal["none", "linear", "bottleneck"] = "linear"
    """What is added to each embedding of width E, nothing at first: a linear map, the bottleneck
    E -> E / reduction -> E of CLIP-Adapter, or none, which leaves only the temperature to train."""
    reduction: int = Field(default=4, ge=1)
    """Of the bottleneck."""
    learn_temperature: bool = True
    """Train a copy of the encoder's temperature; the encoder keeps its own."""


class LossConfig(Section):
    kind: Literal["info_nce", "sigmoid"] = "info_nce"
    """Symmetric InfoNCE of CLIP, or the pairwise sigmoid loss of SigLIP."""
    same_image: Literal["positive", "masked"] = "positive"
    """What other captions of an image (or images of a caption) in a batch are to it: positives,
    or left out. They are never negatives."""
    chunk_size: int | None = Field(default=None, ge=1)
    """Encode the batch of a process in chunks of so many pairs, and each anew for backward: the
    gradient of the whole batch in a chunk's memory."""
    bias: float = -10.0
    """Where the bias of the sigmoid loss starts, if the encoder has none."""
    matching: float = Field(default=1.0, ge=0)
    """Weight of BLIP's image-text matching loss with hard negatives; 0 leaves it out."""


class RetrievalDataConfig(DataConfig):
    template: str = "{}"
    """The sentence that a caption or query is put into, at {}: a photo of {}."""
    random_crop: float = Field(default=1.0, gt=0, le=1)
    """The least share of a picture that a random crop keeps in training; 1 crops nothing."""

    @field_validator("template")
    @classmethod
    def _template(cls, value: str) -> str:
        if value.count("{}") != 1 or value.replace("{}", "").count("{"):
            raise ValueError("a template holds {} once, where the caption goes: 'a photo of {}'")
        return value


class RetrievalEvaluationConfig(EvaluationConfig):
    deciding: Deciding = "mean R@1"
    """The metric by which the best checkpoint is chosen, on the validation split."""
    rerank: int = Field(default=16, ge=0)
    """BLIP: how many candidates of each query are ordered anew by image-text matching; 0 for
    none."""


class RetrievalConfig(JobConfig):
    task: Literal["retrieval"] = "retrieval"
    data: RetrievalDataConfig
    head: RetrievalHeadConfig = RetrievalHeadConfig()
    loss: LossConfig = LossConfig()
    evaluation: RetrievalEvaluationConfig = RetrievalEvaluationConfig()

    @model_validator(mode="after")
    def _whole_batches(self) -> RetrievalConfig:
        if self.trainer.accumulation > 1:
            raise ValueError(
                "trainer.accumulation would cut a batch whose pairs are each other's negatives; "
                "set loss.chunk_size instead, which saves the memory and changes no gradient"
            )
        if self.trainer.mode == "head" and self.head.projection == "none":
            raise ValueError(
                "trainer.mode head would train nothing but the temperature; set head.projection "
                "to linear or bottleneck"
            )
        return self
