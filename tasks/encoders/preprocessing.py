"""What an image encoder wants of a picture: size, cropping, normalisation; and making it.

A preprocessing is a JSON-ready dict, saved with the adapter:

    height, width   pixels
    mean, std       of the three channels, of values between 0 and 1
    interpolation   nearest, bilinear, bicubic, lanczos, box or hamming
    resize          squash (to height × width), shortest (cover it, then crop the centre) or
                    longest (fit into it, on black)
    crop            the share of the covered size that is kept, for shortest
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..config.schema import BackboneConfig
from ..core.errors import first_line

Preprocessing = dict[str, Any]

HALF = (0.5, 0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

# What the published checkpoints of transformers' model types say, where no file is there to ask.
# The defaults of its processor classes are not that: DINOv2's has CLIP's normalisation.
_TRANSFORMERS: dict[str, Preprocessing] = {
    "vit": {"mean": HALF, "std": HALF, "interpolation": "bilinear", "resize": "squash"},
    "beit": {"mean": HALF, "std": HALF, "interpolation": "bicubic", "resize": "squash"},
    "deit": {
        **dict(zip(("mean", "std"), IMAGENET, strict=True)),
        "interpolation": "bicubic",
        "resize": "shortest",
        "crop": 224 / 256,
    },
    "dinov2": {
        **dict(zip(("mean", "std"), IMAGENET, strict=True)),
        "interpolation": "bicubic",
        "resize": "shortest",
        "crop": 224 / 256,
    },
    "dinov3_vit": {
        **dict(zip(("mean", "std"), IMAGENET, strict=True)),
        "interpolation": "bilinear",
        "resize": "squash",
    },
    "clip": {
        **dict(zip(("mean", "std"), OPENAI, strict=True)),
        "interpolation": "bicubic",
        "resize": "shortest",
    },
    "siglip": {"mean": HALF, "std": HALF, "interpolation": "bicubic", "resize": "squash"},
    "blip": {
        **dict(zip(("mean", "std"), OPENAI, strict=True)),
        "interpolation": "bicubic",
        "resize": "squash",
    },
}
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


def image_preprocessing(config: BackboneConfig, backbone: nn.Module) -> Preprocessing:
    """What the encoder was trained on, from where its library keeps it.

    nano: its card; timm: its pretrained_cfg; open_clip: its preprocess_cfg; transformers: the
    processor of `config.processor` or of the backbone's own hub name or folder, else what is usual
    for its model type. The size is the one that the backbone was built for.

    Raises:
        ValueError: the processor cannot be loaded, or the encoder reads no images.
        RuntimeError: the processor must be downloaded and the hub cannot be reached.
    """
    library, _, name = config.name.partition("/")
    if library == "nano":
        found = _nano(config.name, backbone)
    elif library == "timm":
        found = _timm(backbone)
    elif library == "open_clip":
        found = _open_clip(backbone)
    elif library == "hf":
        found = _transformers(config, name, backbone)
    else:
        raise ValueError(f"{config.name} reads no images")
    height, width = found.pop("size")
    return {
        "height": int(height),
        "width": int(width),
        "mean": [float(value) for value in found["mean"]],
        "std": [float(value) for value in found["std"]],
        "interpolation": str(found["interpolation"]),
        "resize": found["resize"],
        "crop": float(found.get("crop", 1.0)),
    }


def to_tensor(
    image: Image.Image,
    preprocessing: Preprocessing,
    size: int | tuple[int, int] | None = None,
) -> Tensor:
    """A picture as the encoder wants it: (3, H, W) float32, resized, cropped and normalised.

    Args:
        size: (H, W), or a side, instead of the preprocessing's own.
    """
    if size is None:
        height, width = preprocessing["height"], preprocessing["width"]
    else:
        height, width = (size, size) if isinstance(size, int) else size
    return normalised(_fitted(image.convert("RGB"), height, width, preprocessing), preprocessing)


def normalised(image: Image.Image | Tensor, preprocessing: Preprocessing) -> Tensor:
    """(3, H, W) float32 of a picture as it is, or of a tensor of uint8 or of values in [0, 1]."""
    if isinstance(image, Tensor):
        pixels = image
    else:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    if not pixels.is_floating_point():
        pixels = pixels.float() / 255
    mean = torch.tensor(preprocessing["mean"])[:, None, None]
    std = torch.tensor(preprocessing["std"])[:, None, None]
    return ((pixels - mean) / std).contiguous()


def _fitted(image: Image.Image, height: int, width: int, how: Preprocessing) -> Image.Image:
    resample = _FILTERS[how["interpolation"]]
    mode = how.get("resize", "squash")
    if mode == "squash":
        return image.resize((width, height), resample)
    if mode == "longest":
        scale = min(height / image.height, width / image.width)
        inner = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        canvas = Image.new("RGB", (width, height))
        corner = (width - inner[0]) // 2, (height - inner[1]) // 2
        canvas.paste(image.resize(inner, resample), corner)
        return canvas
    tall, wide = int(height / how.get("crop", 1.0)), int(width / how.get("crop", 1.0))
    # The longer side is cut down to whole pixels, as torchvision does it.
    if wide * image.height >= tall * image.width:
        tall = max(tall, int(wide * image.height / image.width))
    else:
        wide = max(wide, int(tall * image.width / image.height))
    left, top = round((wide - width) / 2), round((tall - height) / 2)
    return image.resize((wide, tall), resample).crop((left, top, left + width, top + height))


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _nano(name: str, backbone: Any) -> Preprocessing:
    from mmadapters.zoo import nano_config

    config = nano_config(name)
    if "image" not in config:
        raise ValueError(f"{name} reads no images")
    image = config["image"]
    vision = getattr(backbone, "visual", backbone)
    if hasattr(vision, "patch_embed"):
        size = vision.patch_embed.img_size
    elif hasattr(vision, "image_size"):
        size = vision.image_size
    else:
        size = _vision_config(backbone).image_size
    return {
        "size": _pair(size or image["size"]),
        "mean": image["mean"],
        "std": image["std"],
        "interpolation": image.get("interpolation", "bicubic"),
        "resize": "shortest",
    }


def _timm(backbone: Any) -> Preprocessing:
    from timm.data import resolve_model_data_config

    found = resolve_model_data_config(backbone)
    built = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    size = found["input_size"][1:] if built is None else built
    return {
        **{key: found[key] for key in ("mean", "std")},
        "size": size,
        "interpolation": _filter(found["interpolation"]),
        "resize": "squash" if found["crop_mode"] == "squash" else "shortest",
        "crop": found["crop_pct"] if tuple(size) == tuple(found["input_size"][1:]) else 1.0,
    }


def _filter(name: str) -> str:
    """timm's "random" and open_clip's means bicubic when a picture is not augmented."""
    return name if name in _FILTERS else "bicubic"


def _open_clip(backbone: Any) -> Preprocessing:
    visual = backbone.visual
    found = getattr(visual, "preprocess_cfg", None) or {}
    mean, std = OPENAI
    return {
        "size": _pair(getattr(visual, "image_size", None) or found["size"]),
        "mean": found.get("mean") or getattr(visual, "image_mean", None) or mean,
        "std": found.get("std") or getattr(visual, "image_std", None) or std,
        "interpolation": _filter(found.get("interpolation", "bicubic")),
        "resize": found.get("resize_mode", "shortest"),
    }


def _vision_config(backbone: Any) -> Any:
    """The config of what reads images in a model of transformers.

    Raises:
        ValueError: nothing in it does.
    """
    config = getattr(backbone.config, "vision_config", backbone.config)
    if not hasattr(config, "image_size"):
        raise ValueError(f"{type(backbone).__name__} reads no images")
    return config


def _transformers(config: BackboneConfig, name: str, backbone: Any) -> Preprocessing:
    vision = _vision_config(backbone)
    source = config.processor
    if source is None or _only_tokenizes(Path(source)):
        source = _published(name)
    if source is not None:
        return _of_processor(_processor(source), config, vision)
    usual = next(
        (
            usual
            for kind, usual in sorted(_TRANSFORMERS.items(), key=lambda row: -len(row[0]))
            if vision.model_type.startswith(kind)
        ),
        None,
    )
    if usual is None:
        raise ValueError(
            f"nothing says how pictures are prepared for {config.name}; name a hub model or a "
            "folder with a preprocessor_config.json as backbone.processor"
        )
    return {**usual, "size": _pair(vision.image_size)}


def _published(name: str) -> str | None:
    """The hub name or folder in a backbone's name that comes with a processor, None for a type."""
    import transformers

    if Path(name).is_dir():
        return name if _prepares(Path(name)) else None
    return name if "/" in name and name not in transformers.CONFIG_MAPPING else None


def _prepares(folder: Path) -> bool:
    return any((folder / f"{what}_config.json").is_file() for what in ("preprocessor", "processor"))


def _only_tokenizes(folder: Path) -> bool:
    """Whether a local folder holds a tokenizer and says nothing of pictures."""
    return (folder / "tokenizer_config.json").is_file() and not _prepares(folder)


def _processor(source: str) -> Any:
    import transformers

    try:
        return transformers.AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    # Its own errors and those of the hub's client, which are of many classes.
    except Exception as error:
        reason = first_line(error)
        raise ValueError(
            f"the image processor of {source!r} cannot be loaded: {reason}; give a hub name that "
            "can be reached, or a folder, as backbone.processor"
        ) from error


def _of_processor(processor: Any, config: BackboneConfig, vision: Any) -> Preprocessing:
    size, crop = _sides(processor.size), _sides(getattr(processor, "crop_size", None))
    squash = "shortest_edge" not in size
    cropped = bool(getattr(processor, "do_center_crop", False)) and bool(crop)
    if "image_size" in config.options:
        target = _pair(vision.image_size)
    elif cropped:
        target = crop["height"], crop["width"]
    elif squash:
        target = size["height"], size["width"]
    else:
        target = _pair(size["shortest_edge"])
    share = 1.0
    if cropped:
        covered = size["shortest_edge"] if not squash else size["height"]
        share = min(1.0, (crop["height"] if crop else covered) / covered)
    return {
        "size": target,
        "mean": processor.image_mean,
        "std": processor.image_std,
        "interpolation": _filter(Image.Resampling(int(processor.resample)).name.lower()),
        "resize": "squash" if squash and share == 1.0 else "shortest",
        "crop": share,
    }


def _sides(size: Any) -> dict[str, int]:
    """A processor's size as a dict, which it is in transformers 4; 5 has a class with Nones."""
    if size is None:
        return {}
    if isinstance(size, int):
        return {"height": size, "width": size}
    return {key: value for key, value in dict(size).items() if value is not None}
