"""Small pretrained encoders that ship with the package: real library classes, no download.

Importing this module imports neither torch nor timm, transformers, open_clip or torchaudio. Each
encoder imports the library that it needs when it is loaded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import blip, clip, vit, wav2vec2
from .files import read_config

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["NANO", "Nano", "image_transform", "load_nano", "load_tokenizer", "nano_config"]


@dataclass(frozen=True)
class Nano:
    """One shipped encoder: where its files are and which functions load it.

    Attributes:
        folder: the folder in `weights/` that holds `model.safetensors`, `config.json` and the card.
        load: builds the encoder, as `load(directory, library, **kwargs)`.
        libraries: the libraries that have a class for this encoder; the first is the default.
        summary: one line for a listing.
        tokenizer: loads the tokenizer, as `tokenizer(directory, library)`; None without text.
    """

    folder: str
    load: "Callable[..., nn.Module]"
    libraries: tuple[str, ...]
    summary: str
    tokenizer: Callable[[Path, str], Callable[..., Any]] | None = None

    @property
    def directory(self) -> Path:
        """Returns the folder of the encoder's files."""
        return Path(__file__).parent / "weights" / self.folder


NANO: dict[str, Nano] = {
    "nano/vit": Nano(
        folder="vit",
        load=vit.load,
        libraries=("timm", "hf"),
        summary="ViT, 64×64 in patches of 8, width 224, 8 blocks; trained on photographs",
    ),
    "nano/wav2vec2": Nano(
        folder="wav2vec2",
        load=wav2vec2.load,
        libraries=("hf", "torchaudio"),
        summary="wav2vec 2.0, 16 kHz waveform in; trained on synthetic US English",
    ),
    "nano/clip": Nano(
        folder="clip",
        load=clip.load,
        libraries=("open_clip", "hf"),
        summary="CLIP, 64×64 images, its own BPE; trained on photographs and drawn scenes",
        tokenizer=clip.load_tokenizer,
    ),
    "nano/blip-retrieval": Nano(
        folder="blip",
        load=partial(blip.load, kind="retrieval"),
        libraries=("hf",),
        summary="BLIP that embeds and matches, 64×64 images; trained on the same, over nano/vit",
        tokenizer=blip.load_tokenizer,
    ),
    "nano/blip-caption": Nano(
        folder="blip",
        load=partial(blip.load, kind="caption"),
        libraries=("hf",),
        summary="BLIP that writes captions, of the same training",
        tokenizer=blip.load_tokenizer,
    ),
}


def load_nano(name: str, *, library: str | None = None, **kwargs: Any) -> "nn.Module":
    """Loads a shipped encoder as the real class of a library, in fp32, in eval mode.

    | name            | library=             | class                                           |
    |-----------------|----------------------|-------------------------------------------------|
    | `nano/vit`      | `timm` (default)     | `timm.models.vision_transformer.VisionTransformer` |
    |                 | `hf`                 | `transformers.ViTModel`                         |
    | `nano/clip`     | `open_clip` (default)| `open_clip.CLIP`                                |
    |                 | `hf`                 | `transformers.CLIPModel`                        |
    | `nano/wav2vec2` | `hf` (default)       | `transformers.Wav2Vec2Model`                    |
    |                 | `torchaudio`         | `torchaudio.models.Wav2Vec2Model`               |
    | `nano/blip-retrieval` | `hf`           | `transformers.BlipForImageTextRetrieval`        |
    | `nano/blip-caption` | `hf`             | `transformers.BlipForConditionalGeneration`     |

    Args:
        name: a key of `NANO`.
        library: see the table.
        kwargs: arguments of the class's constructor or of its config. They replace the shipped
            values (`img_size=128`, `num_classes=10`, `attn_implementation="eager"`, …).

    Raises:
        ValueError: the name is unknown, or the library has no class for this encoder.
    """
    row = _row(name)
    return row.load(row.directory, _library(name, row, library), **kwargs)


def nano_config(name: str) -> dict[str, Any]:
    """Reads the `config.json` of a shipped encoder: architecture, preprocessing, training, figures.

    Raises:
        ValueError: the name is unknown.
    """
    return read_config(_row(name).directory)


def image_transform(name: str, *, size: int | None = None) -> Callable[[Any], "Tensor"]:
    """Returns the transform from a PIL image to the encoder's input, (3, S, S) in fp32.

    It is there for `nano/vit`, `nano/clip` and both BLIPs.

    Args:
        name: a key of `NANO`.
        size: S in pixels; the encoder's image size if None.

    Raises:
        ValueError: the name is unknown, or the encoder takes no images.
    """
    config = nano_config(name)
    if "image" not in config:
        raise ValueError(f"{name} takes no images")
    image = config["image"]
    from torchvision import transforms

    size = size or image["size"]
    return transforms.Compose(
        [
            transforms.Lambda(_rgb),  # a named function, since workers of a data loader pickle it
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(image["mean"], image["std"]),
        ]
    )


def load_tokenizer(name: str, *, library: str | None = None) -> Callable[..., Any]:
    """Loads the tokenizer of `nano/clip` or of a BLIP.

    `open_clip`, the default of `nano/clip`, gives `open_clip.tokenizer.HFTokenizer`, which turns N
    texts into (N, L) int64, padded to the context length L. `hf` gives
    `transformers.PreTrainedTokenizerFast`. Both give the same ids.

    Raises:
        ValueError: the name is unknown, the encoder reads no text, or the library has no class for
            this encoder.
    """
    row = _row(name)
    if row.tokenizer is None:
        raise ValueError(f"{name} has no tokenizer")
    return row.tokenizer(row.directory, _library(name, row, library))


def _rgb(picture: Any) -> Any:
    return picture.convert("RGB")


def _row(name: str) -> Nano:
    if name not in NANO:
        raise ValueError(
            f"no encoder {name!r} ships with the package; there are {', '.join(sorted(NANO))}"
        )
    return NANO[name]


def _library(name: str, row: Nano, library: str | None) -> str:
    if library is None:
        return row.libraries[0]
    if library not in row.libraries:
        raise ValueError(
            f"{name} does not exist in {library!r}, only in {', '.join(row.libraries)}"
        )
    return library
