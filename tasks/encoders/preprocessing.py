"""The preprocessing of image encoders: size, cropping and normalisation of pictures.

A preprocessing is a JSON-ready dict, saved with the adapter:

    height, width   pixels
    mean, std       of the three channels, for values between 0 and 1
    interpolation   nearest, bilinear, bicubic, lanczos, box or hamming
    resize          squash (to height × width), shortest (cover height × width, then crop the
                    centre) or longest (fit into height × width, on black)
    crop            share of the resized picture that the crop keeps, for shortest
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmadapters.errors import first_line

from ..config.schema import BackboneConfig

Preprocessing = dict[str, Any]

HALF = (0.5, 0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

# The preprocessing of published checkpoints by model type, for models without a processor file. The
# defaults of transformers' processor classes differ: DINOv2's has CLIP's normalisation.
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
    """Returns the preprocessing of the encoder's training.

    It comes from the config of a nano encoder, timm's pretrained_cfg, open_clip's preprocess_cfg,
    or for transformers from the processor of `config.processor` or of the backbone's hub name or
    folder, else from the usual values of its model type. The size is that of the backbone.

    Raises:
        ValueError: the processor cannot be loaded, or the encoder reads no images.
        RuntimeError: the processor must be downloaded and the hub cannot be reached.
    """
    library, _, name = config.name.partition("/")
    if library == "nano":
        values = _nano(config.name, backbone)
    elif library == "timm":
        values = _timm(backbone)
    elif library == "open_clip":
        values = _open_clip(backbone)
    elif library == "hf":
        values = _transformers(config, name, backbone)
    else:
        raise ValueError(f"{config.name} reads no images")
    height, width = values.pop("size")
    return {
        "height": int(height),
        "width": int(width),
        "mean": [float(value) for value in values["mean"]],
        "std": [float(value) for value in values["std"]],
        "interpolation": str(values["interpolation"]),
        "resize": values["resize"],
        "crop": float(values.get("crop", 1.0)),
    }


def to_tensor(
    image: Image.Image,
    preprocessing: Preprocessing,
    size: int | tuple[int, int] | None = None,
) -> Tensor:
    """Prepares a picture for the encoder: (3, H, W) float32, resized, cropped and normalised.

    Args:
        size: (H, W) or a side in pixels; None means that of the preprocessing.
    """
    if size is None:
        height, width = preprocessing["height"], preprocessing["width"]
    else:
        height, width = (size, size) if isinstance(size, int) else size
    return normalised(_fitted(image.convert("RGB"), height, width, preprocessing), preprocessing)


def normalised(image: Image.Image | Tensor, preprocessing: Preprocessing) -> Tensor:
    """Normalises a picture without resizing: (3, H, W) float32.

    Args:
        image: a picture, or a tensor (3, H, W) of uint8 or of floats in [0, 1].
    """
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
    # The longer side is rounded down to whole pixels, as in torchvision.
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

    config = resolve_model_data_config(backbone)
    built = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    size = config["input_size"][1:] if built is None else built
    return {
        **{key: config[key] for key in ("mean", "std")},
        "size": size,
        "interpolation": _filter(config["interpolation"]),
        "resize": "squash" if config["crop_mode"] == "squash" else "shortest",
        "crop": config["crop_pct"] if tuple(size) == tuple(config["input_size"][1:]) else 1.0,
    }


def _filter(name: str) -> str:
    """Returns the filter of a name; "random" means bicubic for pictures that are not augmented."""
    return name if name in _FILTERS else "bicubic"


def _open_clip(backbone: Any) -> Preprocessing:
    visual = backbone.visual
    config = getattr(visual, "preprocess_cfg", None) or {}
    mean, std = OPENAI
    return {
        "size": _pair(getattr(visual, "image_size", None) or config["size"]),
        "mean": config.get("mean") or getattr(visual, "image_mean", None) or mean,
        "std": config.get("std") or getattr(visual, "image_std", None) or std,
        "interpolation": _filter(config.get("interpolation", "bicubic")),
        "resize": config.get("resize_mode", "shortest"),
    }


def _vision_config(backbone: Any) -> Any:
    """Returns the vision config of a model of transformers.

    Raises:
        ValueError: the model reads no images.
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
            f"the preprocessing of {config.name} is not known; set backbone.processor to a hub "
            "name or a folder with a preprocessor_config.json"
        )
    return {**usual, "size": _pair(vision.image_size)}


def _published(name: str) -> str | None:
    """Returns the hub name or folder in a backbone's name if it has a processor, else None."""
    import transformers

    if Path(name).is_dir():
        return name if _prepares(Path(name)) else None
    return name if "/" in name and name not in transformers.CONFIG_MAPPING else None


def _prepares(folder: Path) -> bool:
    return any((folder / f"{what}_config.json").is_file() for what in ("preprocessor", "processor"))


def _only_tokenizes(folder: Path) -> bool:
    """Tells whether a local folder has a tokenizer but no image processor."""
    return (folder / "tokenizer_config.json").is_file() and not _prepares(folder)


def _processor(source: str) -> Any:
    import transformers

    try:
        return transformers.AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    # Errors of transformers and of the hub's client have many classes.
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
    """Returns a processor's size as a dict; in transformers 5 it is a class with Nones."""
    if size is None:
        return {}
    if isinstance(size, int):
        return {"height": size, "width": size}
    return {key: value for key, value in dict(size).items() if value is not None}
