"""The config of `task: retrieval`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from ..config.schema import DataConfig, EvaluationConfig, JobConfig, Section

Deciding = Literal[
    "mean R@1",
    "text-to-image R@1",
    "text-to-image R@5",
    "text-to-image R@10",
    "image-to-text R@1",
    "image-to-text R@5",
    "image-to-text R@10",
    "loss",
]


class RetrievalHeadConfig(Section):
    projection: Literal["none", "linear", "bottleneck"] = "linear"
    """A layer whose output is added to each embedding of width E; it starts at zero. linear: E ->
    E; bottleneck: E -> E / reduction -> E, as in CLIP-Adapter; none: no layer, so that the head
    has only the temperature to train."""
    reduction: int = Field(default=4, ge=1)
    """The factor by which the bottleneck is narrower than the embedding, from 1."""
    learn_temperature: bool = True
    """Train a copy of the encoder's temperature; the encoder's own is not changed."""


class LossConfig(Section):
    kind: Literal["info_nce", "sigmoid"] = "info_nce"
    """The contrastive loss. info_nce: the symmetric InfoNCE of CLIP; sigmoid: the pairwise sigmoid
    loss of SigLIP."""
    same_image: Literal["positive", "masked"] = "positive"
    """The role of an image's other captions (and of a caption's other images) in a batch. positive:
    they are positives; masked: they are left out. They are never negatives."""
    chunk_size: int | None = Field(default=None, ge=1)
    """The number of pairs, from 1, in the chunks in which a process encodes its batch. Each chunk
    is encoded again in the backward pass, which gives the gradient of the whole batch in the memory
    of a chunk. null: no chunks."""
    bias: float = -10.0
    """The bias of the sigmoid loss at the start of training, if the encoder has none."""
    matching: float = Field(default=1.0, ge=0)
    """The weight of BLIP's image-text matching loss with hard negatives, from 0; 0 leaves it
    out."""


class RetrievalDataConfig(DataConfig):
    template: str = "{}"
    """A sentence with one {}, which is replaced by each caption or query: a photo of {}."""
    random_crop: float = Field(default=1.0, gt=0, le=1)
    """The least share of a picture's area that a random crop keeps in training, above 0 and up to
    1; 1 crops nothing."""

    @field_validator("template")
    @classmethod
    def _template(cls, value: str) -> str:
        if value.count("{}") != 1 or value.replace("{}", "").count("{"):
            raise ValueError("a template holds {} once, where the caption goes: 'a photo of {}'")
        return value


class RetrievalEvaluationConfig(EvaluationConfig):
    deciding: Deciding = "mean R@1"
    """The figure on the validation split by which the best checkpoint is chosen; of equal ones the
    latest is kept. loss is the training loss, over the pairs of a batch."""
    rerank: int = Field(default=16, ge=0)
    """BLIP: the number of candidates of each query that image-text matching orders again, from 0; 0
    for no reranking."""


class RetrievalConfig(JobConfig):
    task: Literal["retrieval"] = "retrieval"
    data: RetrievalDataConfig
    """The data; its columns are image and caption or captions, and image_id if there is one."""
    head: RetrievalHeadConfig = RetrievalHeadConfig()
    """The head on the embeddings."""
    loss: LossConfig = LossConfig()
    """The training loss."""
    evaluation: RetrievalEvaluationConfig = RetrievalEvaluationConfig()
    """How retrieval is measured."""

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
