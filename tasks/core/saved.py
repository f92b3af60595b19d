"""The metadata that a task saves with its adapter, and how they are read again.

They come from a file that may be of another version, damaged, or written by somebody else. So the
type and range of each value are checked before anything is built from it. Keys that are not listed
here are kept: later versions may add some.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

VERSION = 1

Count = Annotated[int, Field(ge=0)]
Side = Annotated[int, Field(ge=1, le=16_384)]
Colours = Annotated[list[float], Field(min_length=3, max_length=3)]
Layer = Annotated[
    list[Annotated[int, Field(ge=1, le=1_000_000)]], Field(min_length=2, max_length=2)
]


class Saved(BaseModel):
    """The base of all parts."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Metadata(Saved):
    """All metadata of an adapter that belongs to a task."""

    version: Annotated[int, Field(ge=1, le=VERSION)] = VERSION
    """The version of this form; files without one have the first."""
    mmadapters: str = ""
    """The version of the package."""
    task: str
    """The name of the task."""
    mode: str
    """The `trainer.mode` of the training."""
    job: dict[str, Any]
    """The config of the job, which the config's own classes check."""
    state: dict[str, Any]
    """Values that the task has taken from its training data; see `STATES`."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """Figures of the run."""


class SavedPicture(Saved):
    """How pictures are prepared for the encoder."""

    height: Side
    width: Side
    mean: Colours
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
    resize: Literal["squash", "shortest", "longest"] = "squash"
    crop: Annotated[float, Field(ge=0.01, le=1)] = 1.0
    bits: Annotated[int, Field(ge=1, le=16)] | None = None


class SavedSound(Saved):
    """How recordings are prepared for the encoder."""

    rate: Annotated[int, Field(ge=100, le=1_000_000)]
    layers: Annotated[list[Layer], Field(max_length=100)]
    longest: Annotated[int, Field(ge=1)] | None
    normalise: bool


class SavedText(Saved):
    """The limits of a text model, and for BLIP its special tokens."""

    context_length: Annotated[int, Field(ge=1, le=1_000_000)]
    vocabulary: Annotated[int, Field(ge=1, le=100_000_000)]
    pad: Count = 0
    start: Count = 0
    end: Count = 0
    encode: Count | None = None


class SavedLabels(Saved):
    """The classes of a classification."""

    names: Annotated[list[str], Field(min_length=1)]
    coded: list[str]
    separator: str | None


class SavedCharacters(Saved):
    """The tokens of a CTC head."""

    tokens: Annotated[list[str], Field(min_length=1)]
    blank: Count
    special: list[Count] | None = None
    spaced: bool = False


class SegmentationState(Saved):
    """See `SegmentationTask.fit`."""

    classes: Annotated[list[str], Field(min_length=1)]
    preprocessing: SavedPicture


class AsrState(SavedSound):
    """See `ASRTask.fit`."""

    vocabulary: SavedCharacters
    words: bool = True


class RetrievalState(Saved):
    """See `RetrievalTask.fit`."""

    preprocessing: SavedPicture
    blip: bool
    text: SavedText


class CaptioningState(Saved):
    """See `CaptioningTask.fit`."""

    preprocessing: SavedPicture
    text: SavedText


class VqaState(Saved):
    """See `VQATask.fit`."""

    preprocessing: SavedPicture
    head: str
    text: SavedText
    answers: list[str] | None
    official: bool
    several: bool


class ClassificationState(Saved):
    """See `ClassificationTask.fit`."""

    labels: SavedLabels
    counts: list[Count]
    rows: Count
    keys: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    preprocessing: SavedPicture | SavedSound


STATES: dict[str, type[Saved]] = {
    "segmentation": SegmentationState,
    "asr": AsrState,
    "retrieval": RetrievalState,
    "captioning": CaptioningState,
    "vqa": VqaState,
    "classification": ClassificationState,
}


def read_metadata(data: Mapping[str, Any], source: str) -> Metadata:
    """Returns the metadata of an adapter directory.

    Args:
        source: says in errors where they come from.

    Raises:
        ValueError: a value is missing, of another type, or out of its range.
    """
    metadata = _checked(Metadata, data, f"{source}: metadata")
    if (state := STATES.get(metadata.task)) is not None:
        _checked(state, metadata.state, f"{source}: metadata.state")
    return metadata


def _checked(cls: type[Any], data: Any, place: str) -> Any:
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(map(str, (place, *first["loc"])))
        more = error.error_count() - 1
        also = f" (and {more} more)" if more else ""
        raise ValueError(
            f"{path} cannot be used: {first['msg'][0].lower()}{first['msg'][1:]}{also}; the file "
            "was changed, or another version wrote it"
        ) from None
    except RecursionError:
        raise ValueError(f"{place} is nested too deeply") from None
