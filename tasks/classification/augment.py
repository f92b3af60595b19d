"""Augmentation of training images and recordings.

All random numbers come from torch's global random state, which is seeded for each example.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..encoders.preprocessing import Preprocessing, normalised, to_tensor
from .config import AudioAugmentation, ImageAugmentation


class ImageAugmenter:
    """Turns a picture into an augmented (3, H, W) float32 tensor, by torchvision v2.

    It can be pickled, for worker processes.

    Args:
        config: of the augmentation.
        preprocessing: of the encoder.
        size: (H, W) in pixels.
    """

    def __init__(
        self, config: ImageAugmentation, preprocessing: Preprocessing, size: tuple[int, int]
    ) -> None:
        from torchvision.transforms import InterpolationMode, v2

        self.preprocessing, self.size = preprocessing, size
        self.cropped = config.crop is not None
        steps: list[Any] = []
        if config.crop is not None:
            mode = InterpolationMode(preprocessing["interpolation"])
            steps.append(
                v2.RandomResizedCrop(
                    size, scale=config.crop, ratio=config.ratio, interpolation=mode, antialias=True
                )
            )
        if config.horizontal_flip:
            steps.append(v2.RandomHorizontalFlip(config.horizontal_flip))
        if config.vertical_flip:
            steps.append(v2.RandomVerticalFlip(config.vertical_flip))
        if config.rand_augment is not None:
            fill = [round(255 * value) for value in preprocessing["mean"]]
            steps.append(v2.RandAugment(magnitude=config.rand_augment, fill=fill))
        jitter = (config.brightness, config.contrast, config.saturation, config.hue)
        if any(jitter):
            steps.append(v2.ColorJitter(*jitter))
        self.steps = v2.Compose(steps) if steps else v2.Identity()
        # It acts on normalised values, in which 0 is the mean colour.
        self.erase = v2.RandomErasing(config.erase) if config.erase else v2.Identity()

    def __call__(self, image: Image.Image) -> Tensor:
        image = self.steps(image)
        if self.cropped:
            return self.erase(normalised(image, self.preprocessing))
        return self.erase(to_tensor(image, self.preprocessing, self.size))


def augment_audio(samples: Tensor, config: AudioAugmentation) -> Tensor:
    """Returns a recording (T,) with random gain, shift and noise, as the config says."""
    if config.shift:
        limit = round(config.shift * len(samples))
        step = int(torch.randint(-limit, limit + 1, ()))
        samples = F.pad(samples, (max(step, 0), max(-step, 0)))
        samples = samples[: len(samples) - step] if step > 0 else samples[-step:]
    if config.noise is not None:
        low, high = config.noise
        decibels = low + (high - low) * torch.rand(())
        power = samples.square().mean()
        noise = torch.randn_like(samples) * (power * 10 ** (-decibels / 10)).sqrt()
        samples = samples + noise
    if config.gain:
        decibels = config.gain * (2 * torch.rand(()) - 1)
        samples = samples * 10 ** (decibels / 20)
    return samples


def cut(samples: Tensor, longest: int, *, train: bool) -> Tensor:
    """Returns at most `longest` of the samples (T,): from a random place in training, else from the
    middle."""
    spare = len(samples) - longest
    if spare <= 0:
        return samples
    start = int(torch.randint(spare + 1, ())) if train else spare // 2
    return samples[start : start + longest]
