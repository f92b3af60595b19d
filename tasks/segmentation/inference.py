"""Predicts class maps of whole images of any size, in one piece or by windows, scales and flips.

Shape legend: B images of one size, C classes. A `Network` maps (B, 3, H, W) to logits (B, C, H, W).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import InferenceConfig, pair

Network = Callable[[Tensor], Tensor]
Size = tuple[int, int]
LIMIT = 2**27  # most values of full-size logits in memory at once


def predict_classes(
    network: Network, images: Sequence[Tensor], sizes: Sequence[Size], config: InferenceConfig
) -> list[Tensor]:
    """Predicts the class of every pixel of every image, in its original size.

    Args:
        images: (3, h, w) each, prepared for the encoder.
        sizes: original size (H, W) of each image.

    Returns:
        (H, W) int64 of each image, on the device of the images.
    """
    maps: dict[int, Tensor] = {}
    for numbers in _alike(images, sizes):
        size = sizes[numbers[0]]
        pixels = torch.stack([images[number] for number in numbers])
        views = list(_views(network, pixels, config))
        for start, scores in _full_size(views, size):
            for number, classes in zip(numbers[start:], scores.argmax(dim=1), strict=False):
                maps[number] = classes
    return [maps[number] for number in range(len(images))]


def _alike(images: Sequence[Tensor], sizes: Sequence[Size]) -> Iterator[list[int]]:
    """Groups the indices of images with the same size and the same original size."""
    groups: dict[tuple, list[int]] = defaultdict(list)
    for number, (image, size) in enumerate(zip(images, sizes, strict=True)):
        groups[tuple(image.shape), tuple(size)].append(number)
    yield from groups.values()


def _views(network: Network, pixels: Tensor, config: InferenceConfig) -> Iterator[Tensor]:
    """Yields the logits (B, C, h, w) of each scale, and of each mirrored scale."""
    height, width = pixels.shape[-2:]
    for scale in config.scales:
        view = pixels
        if scale != 1:
            size = (max(round(height * scale), 1), max(round(width * scale), 1))
            view = F.interpolate(
                pixels, size=size, mode="bilinear", align_corners=False, antialias=True
            )
        yield _logits(network, view, config).float()
        if config.flip:
            yield _logits(network, view.flip(-1), config).float().flip(-1)


def _logits(network: Network, pixels: Tensor, config: InferenceConfig) -> Tensor:
    if config.mode == "whole":
        return network(pixels)
    return slide(
        network,
        pixels,
        window=pair(config.window),
        stride=pair(config.stride),
        batch=config.window_batch,
    )


def slide(network: Network, pixels: Tensor, *, window: Size, stride: Size, batch: int) -> Tensor:
    """Returns logits (B, C, H, W), averaged over all windows that contain a pixel.

    The last window of a row or column ends with the image. If the image is smaller than a window,
    the window has the size of the image.

    Args:
        window: (height, width) in pixels.
        stride: distances of windows, in pixels.
        batch: number of windows in a batch.
    """
    images, _, height, width = pixels.shape
    side = min(window[0], height), min(window[1], width)
    corners = [
        (top, left)
        for top in starts(height, side[0], stride[0])
        for left in starts(width, side[1], stride[1])
    ]
    total = count = pixels.new_zeros(())
    together = max(batch // images, 1)
    for first in range(0, len(corners), together):
        group = corners[first : first + together]
        # (windows · B, 3, h, w): all images of a window follow each other.
        windows = torch.cat([_cut(pixels, corner, side) for corner in group])
        logits = torch.cat([network(part).float() for part in windows.split(batch)])
        if first == 0:
            total = logits.new_zeros(images, logits.shape[1], height, width)
            count = logits.new_zeros(1, 1, height, width)
        for corner, part in zip(group, logits.split(images), strict=True):
            _cut(total, corner, side).add_(part)
            _cut(count, corner, side).add_(1)
    return total / count


def _cut(x: Tensor, corner: Size, side: Size) -> Tensor:
    """Returns a view (…, h, w) at (top, left)."""
    return x[..., corner[0] : corner[0] + side[0], corner[1] : corner[1] + side[1]]


def starts(length: int, window: int, stride: int) -> list[int]:
    """Returns the starts of the windows along a side."""
    last = length - window
    return sorted({*range(0, last, stride), last})


def _full_size(views: Sequence[Tensor], size: Size) -> Iterator[tuple[int, Tensor]]:
    """Yields scores (b, C, H, W) of the original size for a few images, and the first one's index.

    Several views are averaged as probabilities, since their logits may differ in scale.
    """
    images, classes = views[0].shape[:2]
    step = max(LIMIT // (classes * size[0] * size[1]), 1)
    for start in range(0, images, step):
        parts = [resize_logits(view[start : start + step], size) for view in views]
        if len(parts) == 1:
            yield start, parts[0]
        else:
            yield start, torch.stack([part.softmax(dim=1) for part in parts]).mean(dim=0)


def resize_logits(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Resizes logits (B, C, h, w) to (B, C, H, W), bilinear."""
    if logits.shape[-2:] == torch.Size(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
