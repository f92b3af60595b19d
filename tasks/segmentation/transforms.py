"""Transforms images and masks together with torchvision v2.

Masks are resized by nearest neighbour and padded with the ignore index. An image is (3, H, W) uint8
until it is normalised, a mask (H, W). All randomness comes from torch's random state.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from ..encoders.vision import normalised
from .config import TransformsConfig

TRIES = 10  # most crops that are tried to find one of several classes


class Augmentation:
    """Makes a training example: crops picture and mask to one size and normalises the picture.

    Args:
        crop: (H, W) in pixels.
        preprocessing: that of the encoder.
        ignore: value of the mask outside of the picture.
    """

    def __init__(
        self,
        config: TransformsConfig,
        *,
        crop: tuple[int, int],
        preprocessing: dict[str, Any],
        ignore: int,
    ) -> None:
        self.config, self.preprocessing, self.crop = config, preprocessing, crop
        filter = interpolation(preprocessing)
        # Turn before the crop, since the sides of a crop may differ.
        steps: list[v2.Transform] = [RandomQuarterTurns()] if config.rotate90 else []
        steps += [
            RandomScale(config, filter),
            RandomCrop(crop, cat_max_ratio=config.cat_max_ratio, ignore=ignore),
            v2.RandomHorizontalFlip(config.horizontal_flip),
            v2.RandomVerticalFlip(config.vertical_flip),
        ]
        jitter = {name: getattr(config, name) for name in _JITTER}
        if any(jitter.values()):
            steps.append(v2.ColorJitter(**jitter))
        steps += [Normalise(preprocessing), PadTo(crop, ignore=ignore)]
        self.steps = v2.Compose(steps)

    def __call__(self, image: Image.Image, mask: np.ndarray) -> tuple[Tensor, Tensor]:
        """Returns the picture (3, H, W) float32 and the mask (H, W) in its dtype."""
        picture, labels = self.steps(F.to_image(image), tv_tensors.Mask(torch.from_numpy(mask)))
        return picture.as_subclass(Tensor), labels.as_subclass(Tensor)


_JITTER = ("brightness", "contrast", "saturation", "hue")


def prepare(image: Image.Image, config: TransformsConfig, preprocessing: dict[str, Any]) -> Tensor:
    """Prepares a picture for evaluation: (3, H, W) float32, normalised.

    It keeps its proportions and is resized only if `config.size` is set.
    """
    picture: Tensor = F.to_image(image)
    size = target_size(config, (image.height, image.width))
    if size != (image.height, image.width):
        picture = F.resize(picture, list(size), interpolation(preprocessing), antialias=True)
    return normalised(picture.as_subclass(Tensor), preprocessing)


def target_size(
    config: TransformsConfig, size: tuple[int, int], *, factor: float = 1.0
) -> tuple[int, int]:
    """Returns (H, W) of an image after resizing to `config.size` and by `factor`."""
    if config.size is not None:
        factor *= config.size / min(size)
        if config.longest is not None:
            factor = min(factor, config.longest / max(size))
    height, width = (max(round(side * factor), 1) for side in size)
    return height, width


def interpolation(preprocessing: dict[str, Any]) -> InterpolationMode:
    """Returns the filter of the encoder's training, or bicubic if tensors do not have it."""
    name = preprocessing["interpolation"]
    return InterpolationMode(name if name in ("nearest", "bilinear", "bicubic") else "bicubic")


class RandomScale(v2.Transform):
    """Resizes to `config.size` times a random factor, uniform in `config.scale`."""

    def __init__(self, config: TransformsConfig, filter: InterpolationMode) -> None:
        super().__init__()
        self.config, self.filter = config, filter

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        low, high = self.config.scale
        factor = low + (high - low) * torch.rand(()).item()
        size = flat_inputs[0].shape[-2:]
        return {"size": target_size(self.config, (size[0], size[1]), factor=factor)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        size = list(params["size"])
        if not isinstance(inpt, tv_tensors.Mask):
            return F.resize(inpt, size, self.filter, antialias=True)
        # For masks, torchvision takes the pixel up and left of the centre of the picture's filter;
        # NEAREST_EXACT takes the pixel at the centre.
        plain = inpt.as_subclass(Tensor)[None]
        return tv_tensors.Mask(F.resize(plain, size, InterpolationMode.NEAREST_EXACT)[0])


class RandomCrop(v2.Transform):
    """Crops a random window; a side is that of the image if the image is smaller.

    While one class has more than `cat_max_ratio` of the pixels that are not ignored, it tries
    another window, at most ten in all (the training of Zhao et al. 2017 in mmsegmentation's form).
    """

    def __init__(self, size: tuple[int, int], *, cat_max_ratio: float, ignore: int) -> None:
        super().__init__()
        self.size, self.cat_max_ratio, self.ignore = size, cat_max_ratio, ignore

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        mask = next(part for part in flat_inputs if isinstance(part, tv_tensors.Mask))
        full = mask.shape[-2:]
        height, width = min(self.size[0], full[0]), min(self.size[1], full[1])
        for _ in range(TRIES):
            top = int(torch.randint(full[0] - height + 1, ()))
            left = int(torch.randint(full[1] - width + 1, ()))
            window = mask[..., top : top + height, left : left + width]
            if self.cat_max_ratio == 1 or self._mixed(window):
                break
        return {"top": top, "left": left, "height": height, "width": width}

    def _mixed(self, window: Tensor) -> bool:
        valid = window[window != self.ignore]
        if not len(valid):
            return False
        return bool(torch.bincount(valid.long()).max() < self.cat_max_ratio * len(valid))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.crop(inpt, **params)


class RandomQuarterTurns(v2.Transform):
    """Turns by 0, 90, 180 or 270 degrees."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"turns": int(torch.randint(4, ()))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        turned = torch.rot90(inpt.as_subclass(Tensor), params["turns"], dims=(-2, -1))
        return tv_tensors.wrap(turned, like=inpt)


class Normalise(v2.Transform):
    """Normalises the picture for the encoder and leaves the mask unchanged."""

    def __init__(self, preprocessing: dict[str, Any]) -> None:
        super().__init__()
        self.preprocessing = preprocessing

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return inpt
        return tv_tensors.Image(normalised(inpt.as_subclass(Tensor), self.preprocessing))


class PadTo(v2.Transform):
    """Pads right and bottom to a size: pictures with 0 (the mean colour), masks with ignore."""

    def __init__(self, size: tuple[int, int], *, ignore: int) -> None:
        super().__init__()
        self.size, self.ignore = size, ignore

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        fill = self.ignore if isinstance(inpt, tv_tensors.Mask) else 0.0
        height, width = inpt.shape[-2:]
        bottom, right = max(self.size[0] - height, 0), max(self.size[1] - width, 0)
        padded = torch.nn.functional.pad(
            inpt.as_subclass(Tensor), (0, right, 0, bottom), value=fill
        )
        return tv_tensors.wrap(padded, like=inpt)


def pad_to_patch(pixels: Tensor, patch: int) -> Tensor:
    """Pads (B, 3, H, W) with 0 at the right and the bottom to multiples of `patch`."""
    height, width = pixels.shape[-2:]
    bottom, right = -height % patch, -width % patch
    if not bottom and not right:
        return pixels
    return torch.nn.functional.pad(pixels, (0, right, 0, bottom))


def crop_size(config: TransformsConfig, preprocessing: dict[str, Any]) -> tuple[int, int]:
    """Returns (H, W) of training crops: those of the config, or the encoder's size."""
    if config.crop is None:
        return preprocessing["height"], preprocessing["width"]
    return (config.crop, config.crop) if isinstance(config.crop, int) else config.crop
