"""What a config of `task: segmentation` may say."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ..config.schema import DataConfig, EvaluationConfig, JobConfig, Section

IGNORE = "ignore"  # what label_map and palette call pixels that count for nothing
Channel = Annotated[int, Field(ge=0, le=255)]
Side = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]


def pair(sides: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of one side or two."""
    return (sides, sides) if isinstance(sides, int) else sides


class SegmentationDataConfig(DataConfig):
    classes: tuple[str, ...] = ()
    """Names of the classes, by id. Without them those of the palette or of label_map, or the ids
    that the training masks hold."""
    palette: dict[str, tuple[Channel, Channel, Channel]] = Field(default_factory=dict)
    """The colour of each class in RGB masks and in pictures (road: [128, 64, 128]); `ignore` may
    have one too."""
    label_map: dict[int, int | str] = Field(default_factory=dict)
    """What each id of the masks means: a class by name or id, or `ignore` ({0: background, 255:
    nucleus}). Ids that are not listed make a row unusable."""
    reduce_zero_label: bool = False
    """Id 0 is ignored and all others are one too high (ADE20K)."""
    ignore_index: int = Field(default=255, ge=1, le=65535)
    """The id of pixels that count for nothing (VOC's borders)."""
    unsegmented: int = Field(default=0, ge=0)
    """The id of pixels outside all segments, where a column of COCO segments takes the place of
    masks."""
    background: str | None = "background"
    """The class that is no object, left out of the foreground IoU, if it is among the classes."""

    @field_validator("classes")
    @classmethod
    def _classes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("two classes have the same name")
        if IGNORE in value:
            raise ValueError(f"no class can be called {IGNORE!r}, which names pixels without one")
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
    mode: Literal["frozen", "full"] = "frozen"
    """frozen: the neck reads the encoder's states; in trainer.mode head nothing goes back through
    the encoder. full: it also adds to the patches between the blocks, so gradients pass through the
    encoder, whose weights stay as they are all the same."""
    width: int | None = Field(default=None, ge=1)
    """Channels inside the attention; the encoder's by default (the authors take half of it for
    ViT-B and ViT-L)."""
    heads: int | None = Field(default=None, ge=1)
    """Attention heads; by default one for each 64 channels of the encoder, or the next fewer that
    divide the width."""
    points: int = Field(default=4, ge=1)
    """Places at which a head looks on each level."""
    stem: int = Field(default=64, ge=1)
    """Channels of the first convolutions on the pixels; four times as many at 1/16."""
    ffn_ratio: float = Field(default=0.25, gt=0)
    """Width of the feed-forward parts, as a factor of the encoder's."""
    extra: int = Field(default=2, ge=0)
    """Extractors after that of the last stage."""


# The heads that take a neck's levels.
BEHIND_NECK = ("upernet", "panoptic_fpn")


class HeadConfig(Section):
    kind: Literal["linear", "setr_pup", "segmenter", "upernet", "panoptic_fpn", "fpn"] = "linear"
    """linear: batch norm and a 1×1 convolution. setr_pup: convolutions and upsampling in turn
    (SETR-PUP). segmenter: a transformer of patches and class tokens. upernet: pyramid pooling and
    a feature pyramid on four blocks. panoptic_fpn: a feature pyramid alone, lighter. fpn: a feature
    pyramid of four blocks with a convolutional stem on the pixels, for fine outlines."""
    neck: Literal["vit_adapter"] | None = None
    """What stands between encoder and head (upernet, panoptic_fpn). vit_adapter: a pyramid of the
    pixels that looks at the encoder's patches by deformable attention, and is part of the head."""
    vit_adapter: ViTAdapterConfig = ViTAdapterConfig()
    layers: tuple[int, ...] | None = None
    """The blocks that the head reads, from 0, or from the end by negative numbers. By default the
    last one (linear, setr_pup, segmenter) or four at equal distances (upernet, panoptic_fpn, fpn);
    linear takes any number ([-4, -3, -2, -1]). With a neck the last block of each stage."""
    norm: bool = True
    """Apply the encoder's final norm to what is read."""
    channels: int = Field(default=256, ge=8)
    """Width of the head (all but linear)."""
    depth: int = Field(default=2, ge=1)
    """Transformer layers of segmenter."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Before the last layer, of whole channels; inside the layers of segmenter."""

    @model_validator(mode="after")
    def _neck(self) -> HeadConfig:
        if self.neck is None and self.vit_adapter != ViTAdapterConfig():
            raise ValueError(
                "vit_adapter says how a neck is made, but there is none: write neck: vit_adapter"
            )
        if self.neck is not None and self.kind not in BEHIND_NECK:
            own = (
                "has a stem on the pixels of its own"
                if self.kind == "fpn"
                else "reads the encoder's maps"
            )
            raise ValueError(
                f"neck: {self.neck} gives a pyramid of four levels, but {self.kind} {own}: set "
                f"kind to {' or '.join(BEHIND_NECK)}, or take the neck out"
            )
        return self


class LossConfig(Section):
    cross_entropy: Weight = 1.0
    """Weight of the cross-entropy in the sum."""
    dice: Weight = 0.0
    """Weight of the soft Dice loss, over the classes that a batch holds."""
    lovasz: Weight = 0.0
    """Weight of the Lovász-softmax loss, over the classes that a batch holds."""
    focal: Weight = 0.0
    """Weight of the focal loss."""
    focal_gamma: float = Field(default=2.0, ge=0)
    """How much the focal loss turns away from easy pixels."""
    class_weights: dict[str, Weight] = Field(default_factory=dict)
    """Of cross-entropy and focal loss, by name; 1 for classes that are not listed."""

    @model_validator(mode="after")
    def _some(self) -> LossConfig:
        if not self.cross_entropy + self.dice + self.lovasz + self.focal:
            raise ValueError("all weights are 0: nothing would be learned")
        return self


class TransformsConfig(Section):
    size: Side | None = None
    """The short side in pixels to which every image is resized first, in training, evaluation and
    prediction; images keep their size without it. Predictions always have the image's own size."""
    longest: Side | None = None
    """The long side is at most this, with `size`."""
    crop: Side | tuple[Side, Side] | None = None
    """Side, or height and width, of training crops; the encoder's own size by default."""
    scale: tuple[float, float] = (0.5, 2.0)
    """The range of random scaling before the crop."""
    cat_max_ratio: float = Field(default=0.75, gt=0, le=1)
    """A crop of which one class has more is drawn anew, up to ten times; 1 takes any."""
    horizontal_flip: float = Field(default=0.5, ge=0, le=1)
    """Probability."""
    vertical_flip: float = Field(default=0.0, ge=0, le=1)
    """Probability; for pictures without an up (microscopy, aerial)."""
    rotate90: bool = False
    """Turn by 0, 90, 180 or 270 degrees; for pictures without an up."""
    brightness: float = Field(default=0.25, ge=0, le=1)
    """Colour jitter, as in torchvision's ColorJitter."""
    contrast: float = Field(default=0.25, ge=0, le=1)
    """Colour jitter."""
    saturation: float = Field(default=0.25, ge=0, le=1)
    """Colour jitter."""
    hue: float = Field(default=0.03, ge=0, le=0.5)
    """Colour jitter."""

    def drawn(self) -> str | None:
        """The first setting beside the crop by which something is drawn, None where nothing is."""
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
            raise ValueError("longest is a bound beside size, and not below it")
        return self


class InferenceConfig(Section):
    mode: Literal["whole", "slide"] = "whole"
    """The image in one piece, or windows over it whose logits are averaged."""
    window: Side | tuple[Side, Side] = 512
    """Side, or height and width, of the windows."""
    stride: Side | tuple[Side, Side] = 341
    """Steps between windows, at most their side."""
    window_batch: int = Field(default=8, ge=1)
    """Windows that go through the encoder at once."""
    scales: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)
    """Sizes, as factors, at which an image is seen; probabilities are averaged."""
    flip: bool = False
    """See each of them mirrored too."""

    @model_validator(mode="after")
    def _windows(self) -> InferenceConfig:
        window, stride = pair(self.window), pair(self.stride)
        if stride[0] > window[0] or stride[1] > window[1]:
            raise ValueError("a stride above the window's side would leave pixels out")
        if not self.scales:
            raise ValueError("scales needs at least one factor")
        return self


class SegmentationEvaluationConfig(EvaluationConfig):
    boundary_tolerance: float = Field(default=0.0075, ge=0)
    """How far outlines may lie apart in the boundary F1: below 1 a share of the image's diagonal,
    else pixels; 0 leaves the metric out."""


class SegmentationConfig(JobConfig):
    task: Literal["segmentation"] = "segmentation"
    data: SegmentationDataConfig
    head: HeadConfig = HeadConfig()
    loss: LossConfig = LossConfig()
    transforms: TransformsConfig = TransformsConfig()
    inference: InferenceConfig = InferenceConfig()
    evaluation: SegmentationEvaluationConfig = SegmentationEvaluationConfig()
