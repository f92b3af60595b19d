"""What a classification job may say."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from ..config.schema import DataConfig, JobConfig, Section

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

    def drawn(self) -> str | None:
        """The first setting by which something is drawn, None where nothing is."""
        if self.crop is not None:
            return "crop"
        if self.rand_augment is not None:
            return "rand_augment"
        names = (
            *("horizontal_flip", "vertical_flip"),
            *("brightness", "contrast", "saturation", "hue", "erase"),
        )
        return next((name for name in names if getattr(self, name)), None)

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
    shots: int | None = Field(default=None, ge=1)
    """Use at most so many training rows of each class, drawn with the seed."""
    size: int | tuple[int, int] | None = None
    """Side, or height and width, of the images that the encoder sees; its own by default."""
    max_seconds: float | None = Field(default=None, gt=0)
    """Longer recordings are cut: at random in training, to their middle in evaluation."""
    augment: ImageAugmentation = ImageAugmentation()
    augment_audio: AudioAugmentation = AudioAugmentation()


# Seven templates that do about as well on ImageNet as all eighty of CLIP's; from its repository.
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
_POOLED, _EMBEDDED, _TIP = ("linear", "mlp"), ("zero_shot", "tip_adapter"), ("tip_adapter",)
_OF_KIND = {
    **dict.fromkeys(("pooling", "layers", "hidden", "dropout", "heads"), _POOLED),
    **dict.fromkeys(("templates", "class_names"), _EMBEDDED),
    **dict.fromkeys(("shots", "augment_epochs", "alpha", "beta", "finetune"), _TIP),
}


class HeadConfig(Section):
    kind: Literal["linear", "mlp", "zero_shot", "tip_adapter"] = "linear"
    """linear, mlp: on pooled features of any encoder; zero_shot: the image's embedding is compared
    with those of the class names, of CLIP, SigLIP and their like; tip_adapter: with those of a few
    training pictures, too."""
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
    templates: tuple[str, ...] = TEMPLATES
    """Sentences in which {} stands for a class; a class is the mean of its sentences."""
    class_names: dict[str, str] = Field(default_factory=dict)
    """What classes are called in the templates, where their labels are no words: {n01443537:
    goldfish}."""
    shots: int = Field(default=16, ge=1)
    """Training pictures of each class in the cache of tip_adapter, drawn with data.seed."""
    augment_epochs: int = Field(default=0, ge=0)
    """Keys of the cache are means over so many passes of augmented pictures (10 in the paper's
    code); 0: of the pictures as they are."""
    alpha: float | None = Field(default=None, ge=0)
    """Weight of the cache beside the class names; null: searched on the validation split."""
    beta: float | None = Field(default=None, gt=0)
    """Sharpness of the cache; null: searched on the validation split."""
    finetune: bool = False
    """Train the keys (Tip-Adapter-F) on the pictures of the cache; else nothing of it learns."""

    @field_validator("templates")
    @classmethod
    def _has_a_place(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or any(text.count("{}") != 1 for text in value):
            raise ValueError("at least one sentence, each with one {} where the class stands")
        return value

    @model_validator(mode="after")
    def _acts(self) -> HeadConfig:
        for option, kinds in _OF_KIND.items():
            default = type(self).model_fields[option].get_default(call_default_factory=True)
            if self.kind not in kinds and getattr(self, option) != default:
                raise ValueError(
                    f"{option} does nothing with kind {self.kind}, only with {' and '.join(kinds)}"
                )
        return self

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

    @model_validator(mode="after")
    def _head_fits(self) -> ClassificationConfig:
        head, data, mode = self.head, self.data, self.trainer.mode
        few = data.shots is not None or head.kind == "tip_adapter"
        if few and (data.multi_label or data.streaming):
            raise ValueError(
                "shots are drawn of each class: they need one label for each row "
                "(data.multi_label: false) and all rows at once (data.streaming: false)"
            )
        if not self.by_embeddings:
            return self
        if data.multi_label or self.kind == "audio":
            raise ValueError(
                f"head.kind {head.kind} chooses one class for a picture: take linear or mlp for "
                "several labels or for sound"
            )
        if data.size is not None:
            raise ValueError(f"head.kind {head.kind} sees pictures of the encoder's own size alone")
        if head.kind == "zero_shot" and mode == "head":
            raise ValueError(
                "trainer.mode head has nothing to train with head.kind zero_shot: take none to "
                "evaluate the encoder as it is, or an adapter"
            )
        if head.kind == "tip_adapter" and mode == "none":
            raise ValueError(
                "trainer.mode none evaluates the encoder as it is, without a cache: take mode head "
                "for tip_adapter, which trains nothing without head.finetune"
            )
        if head.finetune and mode != "head":
            raise ValueError(
                "head.finetune trains the keys of a frozen encoder: take trainer.mode head"
            )
        return self

    @property
    def by_embeddings(self) -> bool:
        """Whether the head compares embeddings."""
        return self.head.kind in ("zero_shot", "tip_adapter")

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
