"""The config of `task: segmentation`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ..config.schema import DataConfig, EvaluationConfig, JobConfig, Section

IGNORE = "ignore"  # name of ignored pixels in label_map and palette
Channel = Annotated[int, Field(ge=0, le=255)]
Side = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]


def pair(sides: int | tuple[int, int]) -> tuple[int, int]:
    """Returns (height, width) of one side or two."""
    return (sides, sides) if isinstance(sides, int) else sides


class SegmentationDataConfig(DataConfig):
    """The data and the meaning of the ids in its masks."""

    classes: tuple[str, ...] = ()
    """Names of the classes in the order of their ids, from 0. If empty, they are taken from
    `palette`, else from `label_map`, else from the categories that segments name (behind the
    background), else from the ids in the training masks."""
    palette: dict[str, tuple[Channel, Channel, Channel]] = Field(default_factory=dict)
    """Colour of each class in RGB masks and in pictures, channels 0 to 255 (road: [128, 64, 128]);
    `ignore` may have a colour, too."""
    label_map: dict[int, int | str] = Field(default_factory=dict)
    """Meaning of each id in the masks: the name or id of a class, or `ignore` ({0: background, 255:
    nucleus}). A row with an id that is not listed cannot be used."""
    reduce_zero_label: bool = False
    """Ignore id 0 and subtract 1 from all other ids (ADE20K)."""
    ignore_index: int = Field(default=255, ge=1, le=65535)
    """Id of ignored pixels (VOC's borders), from 1 to 65535; it must be above the ids of all
    classes. Ignored pixels count in no loss and no metric."""
    unsegmented: int = Field(default=0, ge=0)
    """Id of pixels outside all segments, 0 or more, for data with COCO segments in place of
    masks."""
    drawn_on: Literal["auto", "stored", "upright"] = "auto"
    """The pixels that masks and segments were drawn on, for pictures that are turned by their EXIF
    data. stored: those in the file, so masks are turned with the picture. upright: those of the
    turned picture. auto: stored where only this fits the size of the mask (or `height` and `width`
    of a row with segments), else upright. A mask with EXIF data of its own is turned by these."""
    background: str | None = "background"
    """Name of the class that is no object; the foreground IoU leaves it out. A name that is no
    class has no effect."""

    @field_validator("classes")
    @classmethod
    def _classes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("two classes have the same name")
        if IGNORE in value:
            raise ValueError(
                f"no class can be called {IGNORE!r}, which is the name of ignored pixels"
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> SegmentationDataConfig:
        if self.reduce_zero_label and self.label_map:
            raise ValueError(
                "reduce_zero_label and label_map both say what ids mean: give label_map alone, "
                "with 0: ignore"
            )
        if len(self.classes) > self.ignore_index:
            raise ValueError(
                f"ignore_index {self.ignore_index} is the id of a class, as there are "
                f"{len(self.classes)}: set it to 65535"
            )
        names = set(self.classes)
        strangers = [name for name in self.palette if names and name not in {*names, IGNORE}]
        if strangers:
            raise ValueError(f"the palette's {strangers[0]!r} is none of the classes")
        colours = list(self.palette.values())
        if len(set(colours)) < len(colours):
            raise ValueError("two names of the palette have the same colour")
        return self


class ViTAdapterConfig(Section):
    """The neck of ViT-Adapter (Chen et al. 2023)."""

    mode: Literal["frozen", "full"] = "frozen"
    """frozen: the neck only reads the encoder's states; with trainer.mode head no gradient passes
    through the encoder. full: the neck also adds to the patches between the blocks, so gradients
    pass through the encoder, but its weights do not change."""
    width: int | None = Field(default=None, ge=1)
    """Number of channels inside the attention, 1 or more; null means the encoder's width (the
    authors use half of it for ViT-B and ViT-L)."""
    heads: int | None = Field(default=None, ge=1)
    """Number of attention heads, 1 or more; null means one for each 64 channels of the encoder, or
    the next smaller divisor of the width."""
    points: int = Field(default=4, ge=1)
    """Number of points that a head reads on each level, 1 or more."""
    stem: int = Field(default=64, ge=1)
    """Number of channels of the first convolutions on the pixels, 1 or more; there are four times
    as many at 1/16 of the resolution."""
    ffn_ratio: float = Field(default=0.25, gt=0)
    """Width of the feed-forward parts relative to the encoder's width, above 0."""
    extra: int = Field(default=2, ge=0)
    """Number of extractors after that of the last stage, 0 or more."""


# The heads that can read the levels of a neck.
BEHIND_NECK = ("upernet", "panoptic_fpn")


class HeadConfig(Section):
    """The head and the blocks that it reads."""

    kind: Literal["linear", "setr_pup", "segmenter", "upernet", "panoptic_fpn", "fpn"] = "linear"
    """linear: batch norm and a 1×1 convolution. setr_pup: convolutions and upsampling in turn
    (SETR-PUP). segmenter: a transformer over patches and class tokens. upernet: pyramid pooling and
    a feature pyramid on four blocks. panoptic_fpn: a lighter feature pyramid without pooling. fpn:
    a feature pyramid on four blocks with a convolutional stem on the pixels, for fine outlines."""
    neck: Literal["vit_adapter"] | None = None
    """Module between encoder and head, for upernet and panoptic_fpn; null means none. vit_adapter:
    a pyramid of the pixels that reads the encoder's patches by deformable attention. It is trained
    and saved with the head."""
    vit_adapter: ViTAdapterConfig = ViTAdapterConfig()
    """Settings of the neck vit_adapter."""
    layers: tuple[int, ...] | None = None
    """Blocks that the head reads, counted from 0, or from the end by negative numbers. null means
    the last one (linear, setr_pup, segmenter) or four at equal distances (upernet, panoptic_fpn,
    fpn). linear takes any number of blocks ([-4, -3, -2, -1]). With a neck, give the last block of
    each of four stages."""
    norm: bool = True
    """Whether the encoder's final norm is applied to the states that the head reads."""
    channels: int = Field(default=256, ge=8)
    """Number of channels of the head, 8 or more; linear has none of its own."""
    depth: int = Field(default=2, ge=1)
    """Number of transformer layers of segmenter, 1 or more."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Probability of dropping a channel before the last layer, or a value inside the layers of
    segmenter; 0 or more, below 1."""

    @model_validator(mode="after")
    def _neck(self) -> HeadConfig:
        if self.neck is None and self.vit_adapter != ViTAdapterConfig():
            raise ValueError(
                "vit_adapter has settings, but there is no neck: set neck to vit_adapter"
            )
        if self.neck is not None and self.kind not in BEHIND_NECK:
            reason = (
                "has its own stem on the pixels"
                if self.kind == "fpn"
                else "reads the encoder's maps"
            )
            raise ValueError(
                f"neck: {self.neck} gives a pyramid of four levels, but {self.kind} {reason}: set "
                f"kind to {' or '.join(BEHIND_NECK)}, or remove the neck"
            )
        return self


class LossConfig(Section):
    """The loss: a weighted sum of up to four parts."""

    cross_entropy: Weight = 1.0
    """Weight of the cross-entropy, 0 or more; 0 leaves it out."""
    dice: Weight = 0.0
    """Weight of the soft Dice loss over the classes of a batch, 0 or more."""
    lovasz: Weight = 0.0
    """Weight of the Lovász-softmax loss over the classes of a batch, 0 or more."""
    focal: Weight = 0.0
    """Weight of the focal loss, 0 or more."""
    focal_gamma: float = Field(default=2.0, ge=0)
    """Exponent γ of the focal loss, 0 or more; the higher it is, the less easy pixels count."""
    class_weights: dict[str, Weight] = Field(default_factory=dict)
    """Weights of classes in cross-entropy and focal loss, by name, 0 or more; classes that are not
    listed have 1."""

    @model_validator(mode="after")
    def _some(self) -> LossConfig:
        if not self.cross_entropy + self.dice + self.lovasz + self.focal:
            raise ValueError("all weights are 0: give at least one loss a weight above 0")
        return self


class TransformsConfig(Section):
    """Resizing of all images and augmentation in training."""

    size: Side | None = None
    """Length in pixels, 1 or more, to which the short side of every image is resized first, in
    training, evaluation and prediction; null means no resizing. Predictions always have the
    original size of the image."""
    longest: Side | None = None
    """Greatest length of the long side in pixels after resizing, `size` or more; null means no
    bound."""
    crop: Side | tuple[Side, Side] | None = None
    """Side, or height and width, of training crops in pixels, 1 or more; null means the encoder's
    size."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Smallest and greatest factor of random scaling before the crop, both above 0."""
    cat_max_ratio: float = Field(default=0.75, gt=0, le=1)
    """Greatest share of one class in a crop, above 0 and at most 1. A crop with a greater share is
    replaced by another one, up to ten times; 1 accepts any crop."""
    horizontal_flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of mirroring an image left to right, 0 to 1."""
    vertical_flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of mirroring an image top to bottom, 0 to 1; for images without an upright
    direction (microscopy, aerial)."""
    rotate90: bool = False
    """Whether images are turned by 0, 90, 180 or 270 degrees at random; for images without an
    upright direction."""
    brightness: float = Field(default=0.25, ge=0, le=1)
    """Range of random brightness: a factor of up to 1 ± this, 0 to 1, as in torchvision's
    ColorJitter."""
    contrast: float = Field(default=0.25, ge=0, le=1)
    """Range of random contrast: a factor of up to 1 ± this, 0 to 1."""
    saturation: float = Field(default=0.25, ge=0, le=1)
    """Range of random saturation: a factor of up to 1 ± this, 0 to 1."""
    hue: float = Field(default=0.03, ge=0, le=0.5)
    """Range of the random shift of hue: up to ± this share of the colour circle, 0 to 0.5."""

    def random_setting(self) -> str | None:
        """Returns the first setting with a random effect, apart from the crop, or None."""
        if self.scale[0] != self.scale[1]:
            return "scale"
        names = (
            *("horizontal_flip", "vertical_flip", "rotate90"),
            *("brightness", "contrast", "saturation", "hue"),
        )
        return next((name for name in names if getattr(self, name)), None)

    @field_validator("scale")
    @classmethod
    def _scale(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("give two factors, the smaller first: [0.5, 2.0]")
        return value

    @model_validator(mode="after")
    def _sides(self) -> TransformsConfig:
        if self.longest is not None and (self.size is None or self.longest < self.size):
            raise ValueError("longest needs size and must not be below it")
        return self


class InferenceConfig(Section):
    """Evaluation and prediction."""

    mode: Literal["whole", "slide"] = "whole"
    """whole: run the image in one piece. slide: run windows over it and average their logits."""
    window: Side | tuple[Side, Side] = 512
    """Side, or height and width, of the windows in pixels, 1 or more."""
    stride: Side | tuple[Side, Side] = 341
    """Distance between windows in pixels, from 1 to their side; one number or height and width."""
    window_batch: int = Field(default=8, ge=1)
    """Number of windows in a batch, 1 or more."""
    scales: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)
    """Factors, above 0, by which an image is resized; the probabilities of all sizes are
    averaged."""
    flip: bool = False
    """Whether each size is also run mirrored and averaged."""

    @model_validator(mode="after")
    def _windows(self) -> InferenceConfig:
        window, stride = pair(self.window), pair(self.stride)
        if stride[0] > window[0] or stride[1] > window[1]:
            raise ValueError("a stride above the window's side would leave pixels out")
        if not self.scales:
            raise ValueError("scales needs at least one factor")
        return self


Deciding = Literal[
    "mIoU", "pixel accuracy", "mean accuracy", "Dice", "foreground IoU", "boundary F1", "loss"
]


class SegmentationEvaluationConfig(EvaluationConfig):
    """Metrics."""

    deciding: Deciding = "mIoU"
    """Figure on the validation split by which the best checkpoint is chosen; of equal ones the
    latest is kept. loss is the training loss, on crops that are the same each time."""
    boundary_tolerance: float = Field(default=0.0075, ge=0)
    """Greatest distance of matching outlines in the boundary F1, 0 or more: a share of the image's
    diagonal if below 1, else pixels; 0 leaves the metric out."""


class SegmentationConfig(JobConfig):
    """The config of a segmentation job."""

    task: Literal["segmentation"] = "segmentation"
    """The task, always segmentation."""
    data: SegmentationDataConfig
    """The data and the meaning of the ids in its masks."""
    head: HeadConfig = HeadConfig()
    """The head and the blocks that it reads."""
    loss: LossConfig = LossConfig()
    """The weighted sum of losses."""
    transforms: TransformsConfig = TransformsConfig()
    """Resizing of all images and augmentation in training."""
    inference: InferenceConfig = InferenceConfig()
    """Evaluation and prediction."""
    evaluation: SegmentationEvaluationConfig = SegmentationEvaluationConfig()
    """Metrics."""

    @model_validator(mode="after")
    def _measured(self) -> SegmentationConfig:
        deciding, least = self.evaluation.deciding, self.evaluation.boundary_tolerance
        if deciding == "boundary F1" and not least:
            raise ValueError(
                "evaluation.deciding is boundary F1, which evaluation.boundary_tolerance 0 leaves "
                "out: set it above 0"
            )
        return self
