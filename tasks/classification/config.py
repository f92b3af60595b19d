"""What a classification job may say."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from ..config import DataConfig, JobConfig, Section

SPEECH = re.compile("^torchaudio/|wav2vec|hubert|wavlm|whisper")  # names of speech encoders
MetricName = Literal["accuracy", "balanced accuracy", "macro F1", "mAP", "micro F1"]


class ImageAugmentation(Section):
    """Of training images, in the order in which they act."""

    crop: tuple[float, float] | None = (0.5, 1.0)
    """The share of the picture's area that a random resized crop takes; null: no crop."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Width to height of the random resized crop."""
    horizontal_flip: float = Field(default=0.5, ge=0, le=1)
    """How often a picture is mirrored; 0 for digits, letters and whatever has a side."""
    vertical_flip: float = Field(default=0.0, ge=0, le=1)
    """How often a picture is turned upside down (microscopes, satellites)."""
    rand_augment: int | None = Field(default=None, ge=0, le=30)
    """The magnitude of two random operations of RandAugment (9 is usual); null: none."""
    brightness: float = Field(default=0.2, ge=0)
    """Colour jitter: a factor of up to 1 ± this."""
    contrast: float = Field(default=0.2, ge=0)
    """Colour jitter: a factor of up to 1 ± this."""
    saturation: float = Field(default=0.2, ge=0)
    """Colour jitter: a factor of up to 1 ± this."""
    hue: float = Field(default=0.0, ge=0, le=0.5)
    """Colour jitter: up to this part of the colour circle either way."""
    erase: float = Field(default=0.0, ge=0, le=1)
    """How often a rectangle is filled with the mean colour."""

    @field_validator("crop", "ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 < value[0] <= value[1]:
            raise ValueError("two numbers above 0, the smaller one first")
        return value


class AudioAugmentation(Section):
    """Of training recordings; all off by default."""

    gain: float = Field(default=0.0, ge=0)
    """Louder or softer by up to so many decibels."""
    shift: float = Field(default=0.0, ge=0, le=1)
    """Moved in time by up to this share of the recording, silence where it leaves a gap."""
    noise: tuple[float, float] | None = None
    """White noise at a random signal-to-noise ratio between two values in decibels."""

    @field_validator("noise")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError("two numbers of decibels, the smaller one first")
        return value


class ClassificationData(DataConfig):
    kind: Literal["auto", "image", "audio"] = "auto"
    """What is classified; auto: what data.columns names, else what the backbone's name stands
    for: audio for speech encoders, image for all others."""
    multi_label: bool = False
    """A row may have any number of labels: a list, or text with a separator."""
    separator: str = Field(default=",", min_length=1)
    """Between the labels of a text, with multi_label."""
    labels: tuple[str, ...] = ()
    """The classes, in order; by default those of the training split, sorted (of its first rows, if
    it is streamed)."""
    size: int | tuple[int, int] | None = None
    """Side, or height and width, of the images that the encoder sees; its own by default."""
    max_seconds: float | None = Field(default=None, gt=0)
    """Longer recordings are cut: at random in training, to their middle in evaluation."""
    augment: ImageAugmentation = ImageAugmentation()
    augment_audio: AudioAugmentation = AudioAugmentation()


class HeadConfig(Section):
    kind: Literal["linear", "mlp"] = "linear"
    """What computes the classes from pooled features."""
    pooling: Literal["auto", "mean", "cls", "attention"] = "auto"
    """auto: the class token of an image encoder that has one, else the mean of patches or frames;
    attention: a learned query."""
    layers: Literal["last", "all"] = "last"
    """all: a learned weighted sum of the states after every block, and before the first one of a
    speech encoder, as SUPERB does it."""
    hidden: int | None = Field(default=None, ge=1)
    """Width of the MLP's hidden layer; the encoder's by default."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Before each linear map of the head."""
    heads: int = Field(default=4, ge=1)
    """Of the attention pooling; must divide the encoder's width."""

    @model_validator(mode="after")
    def _fits(self) -> HeadConfig:
        if self.layers == "all" and self.pooling == "cls":
            raise ValueError("layers: all sums patches or frames; pooling: cls has none of them")
        return self


class LossConfig(Section):
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target that is spread over all classes; with multi_label, that labels are moved
    towards ½."""
    class_weights: Literal["none", "balanced"] | dict[str, float] = "none"
    """Weights of the classes in the loss; balanced: inverse to their number of training rows. With
    multi_label, weights of a label's presence."""

    @field_validator("class_weights")
    @classmethod
    def _positive(cls, value: str | dict[str, float]) -> str | dict[str, float]:
        if isinstance(value, dict) and any(weight < 0 for weight in value.values()):
            raise ValueError("weights are not below 0")
        return value


class ClassificationConfig(JobConfig):
    task: Literal["classification"] = "classification"
    data: ClassificationData
    head: HeadConfig = HeadConfig()
    loss: LossConfig = LossConfig()
    metric: MetricName | None = None
    """Decides which checkpoint is best; accuracy by default, mAP with multi_label."""
    threshold: float = Field(default=0.5, gt=0, lt=1)
    """The probability from which a label counts as predicted, with multi_label."""
    top: int = Field(default=5, ge=1)
    """How many classes `predict` names for each input."""

    @model_validator(mode="after")
    def _metric_fits(self) -> ClassificationConfig:
        many = self.data.multi_label
        known = ("mAP", "micro F1", "macro F1") if many else MULTICLASS
        if self.metric is not None and self.metric not in known:
            with_or_without = "with" if many else "without"
            raise ValueError(
                f"metric {self.metric!r} does not exist {with_or_without} data.multi_label; there "
                f"are {', '.join(known)}"
            )
        return self

    @property
    def kind(self) -> Literal["image", "audio"]:
        """What is classified."""
        if self.data.kind != "auto":
            return self.data.kind
        if ("audio" in self.data.columns) != ("image" in self.data.columns):
            return "audio" if "audio" in self.data.columns else "image"
        return "audio" if SPEECH.search(self.backbone.name.lower()) else "image"

    @property
    def deciding_metric(self) -> str:
        return self.metric or ("mAP" if self.data.multi_label else "accuracy")


MULTICLASS = ("accuracy", "balanced accuracy", "macro F1")
