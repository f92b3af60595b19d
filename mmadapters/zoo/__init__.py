"""Small pretrained encoders that ship with the package: real library classes, no download.

Importing this module imports no library: torch, timm, transformers, open_clip and torchaudio
are loaded by the encoder that needs them.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import read_config

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["NANO", "Nano", "image_transform", "load_nano", "load_tokenizer", "nano_config"]


@dataclass(frozen=True)
class Nano:
    """One shipped encoder: where its files lie and which module builds it.

    Attributes:
        folder: beside this file; holds `model.safetensors`, `config.json` and the card.
        module: has `load(directory, library, **kwargs)` and `verify(directory, data)`.
        libraries: the libraries whose class it can be; the first is the default.
        summary: one line for a listing.
        options: what both functions of the module take beside.
    """

    folder: str
    module: str
    libraries: tuple[str, ...]
    summary: str
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        return Path(__file__).parent / "weights" / self.folder


NANO: dict[str, Nano] = {
    "nano/vit": Nano(
        folder="vit",
        module="mmadapters.zoo.vit",
        libraries=("timm", "hf"),
        summary="ViT, 64×64 in patches of 8, width 224, 8 blocks; trained on photographs",
    ),
    "nano/wav2vec2": Nano(
        folder="wav2vec2",
        module="mmadapters.zoo.wav2vec2",
        libraries=("hf", "torchaudio"),
        summary="wav2vec 2.0, 16 kHz waveform in; trained on synthetic US English",
    ),
    "nano/clip": Nano(
        folder="clip",
        module="mmadapters.zoo.clip",
        libraries=("open_clip", "hf"),
        summary="CLIP, 64×64 images, its own BPE; trained on photographs and drawn scenes",
    ),
    "nano/blip-retrieval": Nano(
        folder="blip",
        module="mmadapters.zoo.blip",
        libraries=("hf",),
        summary="BLIP that embeds and matches, 64×64 images; trained on the same, over nano/vit",
        options={"kind": "retrieval"},
    ),
    "nano/blip-caption": Nano(
        folder="blip",
        module="mmadapters.zoo.blip",
        libraries=("hf",),
        summary="BLIP that writes captions, of the same training",
        options={"kind": "caption"},
    ),
}


def load_nano(name: str, *, library: str | None = None, **kwargs: Any) -> "nn.Module":
    """A shipped encoder as the real class of a library, in fp32, in eval mode.

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
        kwargs: what the class's constructor or its config takes, over the shipped values
            (`img_size=128`, `num_classes=10`, `attn_implementation="eager"`, …).

    Raises:
        ValueError: unknown name, or a library in which this encoder does not exist.
    """
    row = _row(name)
    library = _library(name, row, library)
    module = importlib.import_module(row.module)
    return module.load(row.directory, library, **row.options, **kwargs)


def nano_config(name: str) -> dict[str, Any]:
    """The `config.json` of a shipped encoder: architecture, preprocessing, training, figures."""
    return read_config(_row(name).directory)


def image_transform(name: str, *, size: int | None = None) -> Callable[[Any], "Tensor"]:
    """What turns a PIL image into the (3, S, S) fp32 input of `nano/vit`, `nano/clip` or a BLIP.

    Args:
        size: S in pixels, the encoder's own by default.

    Raises:
        ValueError: unknown name, or an encoder that takes no images.
    """
    image = _of_config(name, "image")
    from torchvision import transforms

    size = size or image["size"]
    return transforms.Compose(
        [
            transforms.Lambda(_rgb),  # not a lambda: workers of a data loader pickle it
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(image["mean"], image["std"]),
        ]
    )


def load_tokenizer(name: str, *, library: str | None = None) -> Callable[..., Any]:
    """The tokenizer of `nano/clip` and the BLIPs; both kinds give the same ids.

    `open_clip` (default of `nano/clip`): `open_clip.tokenizer.HFTokenizer`, texts -> (N, L) int64,
    padded to the context length. `hf`: `transformers.PreTrainedTokenizerFast`.

    Raises:
        ValueError: unknown name, or an encoder that reads no text.
    """
    _of_config(name, "tokenizer")
    row = _row(name)
    module = importlib.import_module(row.module)
    return module.load_tokenizer(row.directory, _library(name, row, library))


def _rgb(picture: Any) -> Any:
    return picture.convert("RGB")


def _row(name: str) -> Nano:
    if name not in NANO:
        raise ValueError(f"no encoder {name!r} ships with the package; there are {sorted(NANO)}")
    return NANO[name]


def _library(name: str, row: Nano, library: str | None) -> str:
    if library is None:
        return row.libraries[0]
    if library not in row.libraries:
        raise ValueError(f"{name} does not exist in {library!r}, only in {row.libraries}")
    return library


def _of_config(name: str, key: str) -> dict[str, Any]:
    config = nano_config(name)
    if key not in config:
        raise ValueError(f"{name} has no {key}")
    return config[key]
