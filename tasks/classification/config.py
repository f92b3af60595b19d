"""The config of `task: classification`."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from ..config.schema import LOSS, DataConfig, EvaluationConfig, JobConfig, Section

SPEECH = re.compile("^torchaudio/|wav2vec|hubert|wavlm|whisper")  # names of speech encoders
MetricName = Literal["accuracy", "balanced accuracy", "macro F1", "mAP", "micro F1"]


class ImageAugmentation(Section):
    """Augmentation of training images. The fields act in this order."""

    crop: tuple[float, float] | None = (0.5, 1.0)
    """The least and the greatest share of the picture's area that a random resized crop takes, each
    above 0; null: no crop."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """The least and the greatest ratio of width to height of the random resized crop, each above
    0."""
    horizontal_flip: float = Field(default=0.5, ge=0, le=1)
    """The probability that a picture is mirrored, from 0 to 1. Set it to 0 for digits, letters and
    all things for which left and right matter."""
    vertical_flip: float = Field(default=0.0, ge=0, le=1)
    """The probability that a picture is turned upside down, from 0 to 1 (for microscopes and
    satellites)."""
    rand_augment: int | None = Field(default=None, ge=0, le=30)
    """The magnitude of RandAugment's two random operations, from 0 to 30 (9 is usual); null: no
    RandAugment."""
    brightness: float = Field(default=0.2, ge=0)
    """Colour jitter: brightness changes by a random factor from 1 − this to 1 + this; from 0."""
    contrast: float = Field(default=0.2, ge=0)
    """Colour jitter: contrast changes by a random factor from 1 − this to 1 + this; from 0."""
    saturation: float = Field(default=0.2, ge=0)
    """Colour jitter: saturation changes by a random factor from 1 − this to 1 + this; from 0."""
    hue: float = Field(default=0.0, ge=0, le=0.5)
    """Colour jitter: hue moves by up to this part of the colour circle either way, from 0 to
    0.5."""
    erase: float = Field(default=0.0, ge=0, le=1)
    """The probability that a rectangle is filled with the mean colour, from 0 to 1."""

    def drawn(self) -> str | None:
        """Returns the name of the first field that makes examples random, or None."""
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
    """Augmentation of training recordings. All of it is off by default."""

    gain: float = Field(default=0.0, ge=0)
    """The most decibels by which a recording is made louder or softer, from 0."""
    shift: float = Field(default=0.0, ge=0, le=1)
    """The greatest share of a recording, from 0 to 1, by which it is moved in time. Gaps are filled
    with silence."""
    noise: tuple[float, float] | None = None
    """The lowest and the highest signal-to-noise ratio of added white noise, in decibels; null: no
    noise."""

    @field_validator("noise")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError("two numbers of decibels, the smaller one first")
        return value


class ClassificationData(DataConfig):
    kind: Literal["auto", "image", "audio"] = "auto"
    """The inputs that are classified. auto: image or audio, if data.columns names only one of them,
    else audio for speech encoders and image for all others."""
    multi_label: bool = False
    """Let a row have any number of labels: a list, or a text with a separator."""
    separator: str = Field(default=",", min_length=1)
    """The text between the labels of a row, with multi_label; at least one letter."""
    labels: tuple[str, ...] = ()
    """The classes, in order. By default they are those of the training split, sorted (of its first
    rows, if it is streamed)."""
    shots: int | None = Field(default=None, ge=1)
    """The most training rows of each class that are used, from 1, drawn with the seed; null: all
    rows."""
    size: int | tuple[int, int] | None = None
    """The side, or height and width, of the images that the encoder reads, in pixels; null: the
    encoder's own size."""
    max_seconds: float | None = Field(default=None, gt=0)
    """The most seconds of a recording, above 0. Longer ones are cut: at a random place in training,
    around their middle in evaluation. null: no limit but the encoder's."""
    augment: ImageAugmentation = ImageAugmentation()
    """Augmentation of training images."""
    augment_audio: AudioAugmentation = AudioAugmentation()
    """Augmentation of training recordings."""


# Seven of CLIP's eighty templates, which do about as well on ImageNet as all; from its repository.
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
    """The kind of head. linear, mlp: layers on pooled features of any encoder; zero_shot: compares
    the image's embedding with those of the class names (for CLIP, SigLIP and similar encoders);
    tip_adapter: compares it with those of a few training pictures, too."""
    pooling: Literal["auto", "mean", "cls", "attention"] = "auto"
    """How features of patches or frames become one. auto: the class token of an image encoder that
    has one, else the mean; mean: the mean; cls: the class token; attention: a learned query."""
    layers: Literal["last", "all"] = "last"
    """The layers that the head reads. last: the last one; all: a learned weighted sum of the states
    after every block, for a speech encoder also before the first one, as SUPERB does it."""
    hidden: int | None = Field(default=None, ge=1)
    """The width of the MLP's hidden layer, from 1; null: the encoder's width."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """The dropout probability before each linear layer of the head, from 0 to below 1."""
    heads: int = Field(default=4, ge=1)
    """The number of heads of attention pooling, from 1; it must divide the encoder's width."""
    templates: tuple[str, ...] = TEMPLATES
    """Sentences in which {} stands for a class. A class is the mean of its sentences'
    embeddings."""
    class_names: dict[str, str] = Field(default_factory=dict)
    """The names of classes in the templates, for labels that are no words: {n01443537:
    goldfish}."""
    shots: int = Field(default=16, ge=1)
    """The most training pictures of each class in the cache of tip_adapter, from 1, drawn with
    data.seed."""
    augment_epochs: int = Field(default=0, ge=0)
    """The number of passes of augmented pictures over which the cache's keys are means, from 0 (10
    in the paper's code); 0: one pass of the pictures as they are."""
    alpha: float | None = Field(default=None, ge=0)
    """The weight of the cache against the class names, from 0; null: searched on the validation
    split."""
    beta: float | None = Field(default=None, gt=0)
    """The sharpness of the cache, above 0; null: searched on the validation split."""
    finetune: bool = False
    """Train the keys of the cache on its pictures (Tip-Adapter-F); else the cache is not
    trained."""

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
            raise ValueError(
                "layers: all sums states of patches or frames, which pooling: cls does not read: "
                "set one of the two otherwise"
            )
        return self


class LossConfig(Section):
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """The share of the target that is spread over all classes, from 0 to below 1. With multi_label,
    targets are moved by this share towards ½."""
    class_weights: Literal["none", "balanced"] | dict[str, float] = "none"
    """The weights of the classes in the loss, each from 0. none: equal weights; balanced: inverse
    to the number of a class's training rows; or a weight for each class by name (1 if it has none).
    With multi_label, the weight of a label's presence against its absence."""

    @field_validator("class_weights")
    @classmethod
    def _positive(cls, value: str | dict[str, float]) -> str | dict[str, float]:
        if isinstance(value, dict) and any(weight < 0 for weight in value.values()):
            raise ValueError("a weight is below 0: weights are 0 or more")
        return value


class ClassificationEvaluationConfig(EvaluationConfig):
    deciding: MetricName | Literal["loss"] | None = None
    """The figure on the validation split by which the best checkpoint is chosen; of equal ones the
    latest is kept. loss is the training loss. null: `metric`."""


class ClassificationConfig(JobConfig):
    task: Literal["classification"] = "classification"
    data: ClassificationData
    """The data; its columns are image or audio, and label."""
    head: HeadConfig = HeadConfig()
    """The head of the classifier."""
    loss: LossConfig = LossConfig()
    """The training loss."""
    evaluation: ClassificationEvaluationConfig = ClassificationEvaluationConfig()
    """The evaluation and the report."""
    metric: MetricName | None = None
    """The metric that decides which checkpoint is best; null: accuracy, or mAP with
    multi_label."""
    threshold: float = Field(default=0.5, gt=0, lt=1)
    """The probability from which a label counts as predicted, above 0 and below 1, with
    multi_label."""
    top: int = Field(default=5, ge=1)
    """The number of classes that `predict` names for each input, from 1."""

    @model_validator(mode="after")
    def _metric_fits(self) -> ClassificationConfig:
        many, deciding = self.data.multi_label, self.evaluation.deciding
        known = ("mAP", "micro F1", "macro F1") if many else MULTICLASS
        if deciding not in (None, LOSS) and self.metric not in (None, deciding):
            raise ValueError(
                f"metric is {self.metric} and evaluation.deciding is {deciding}: keep one of them"
            )
        for key, name in (("metric", self.metric), ("evaluation.deciding", deciding)):
            if name is not None and name not in (*known, LOSS):
                with_or_without = "with" if many else "without"
                raise ValueError(
                    f"{key} {name!r} does not exist {with_or_without} data.multi_label; there "
                    f"are {', '.join(known)}"
                )
        return self

    @model_validator(mode="after")
    def _head_fits(self) -> ClassificationConfig:
        head, data, mode = self.head, self.data, self.trainer.mode
        few = data.shots is not None or head.kind == "tip_adapter"
        if few and (data.multi_label or data.streaming):
            raise ValueError(
                "shots are drawn from each class: they need one label for each row "
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
            raise ValueError(
                f"head.kind {head.kind} reads pictures of the encoder's own size only: leave out "
                "data.size"
            )
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
        """The inputs that are classified: "image" or "audio"."""
        if self.data.kind != "auto":
            return self.data.kind
        if ("audio" in self.data.columns) != ("image" in self.data.columns):
            return "audio" if "audio" in self.data.columns else "image"
        return "audio" if SPEECH.search(self.backbone.name.lower()) else "image"

    @property
    def deciding_metric(self) -> str:
        """The metric that decides which checkpoint is best."""
        deciding = self.evaluation.deciding
        if deciding is not None and deciding != LOSS:
            return deciding
        return self.metric or ("mAP" if self.data.multi_label else "accuracy")


MULTICLASS = ("accuracy", "balanced accuracy", "macro F1")
