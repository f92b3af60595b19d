"""Whole, sliding-window, multi-scale and flip inference against brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmadapters.tasks.segmentation import inference
from mmadapters.tasks.segmentation.config import InferenceConfig
from mmadapters.tasks.segmentation.inference import predict_classes, slide, starts


class Network:
    """A 5×5 convolution: what a pixel gets depends on where a window ends. Counts its calls."""

    def __init__(self, classes: int = 3) -> None:
        self.conv = nn.Conv2d(3, classes, 5, padding=2)
        self.batches: list[int] = []

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        self.batches.append(len(pixels))
        return self.conv(pixels)


def config(**options: Any) -> InferenceConfig:
    return InferenceConfig(**options)


@pytest.mark.parametrize(
    ("length", "window", "stride", "expected"),
    [
        (10, 4, 3, [0, 3, 6]),
        (11, 4, 3, [0, 3, 6, 7]),
        (4, 4, 3, [0]),
        (5, 4, 4, [0, 1]),
        (1024, 512, 341, [0, 341, 512]),
    ],
)
def test_windows_cover_a_side_and_end_with_it(
    length: int, window: int, stride: int, expected: list[int]
) -> None:
    assert starts(length, window, stride) == expected


@pytest.mark.parametrize("size", [(20, 23), (9, 30), (7, 6)], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_windows_are_averaged_by_how_many_see_a_pixel(size: tuple[int, int], batch: int) -> None:
    network = Network()
    pixels = torch.randn(2, 3, *size)
    window, stride = (9, 8), (6, 5)
    found = slide(network, pixels, window=window, stride=stride, batch=batch)
    assert max(network.batches) <= max(batch, 1)
    total, count = torch.zeros(2, 3, *size), torch.zeros(size)
    height, width = min(window[0], size[0]), min(window[1], size[1])
    tops = [*range(0, size[0] - height, stride[0]), size[0] - height]
    lefts = [*range(0, size[1] - width, stride[1]), size[1] - width]
    for top in tops:
        for left in lefts:
            rows, columns = slice(top, top + height), slice(left, left + width)
            total[:, :, rows, columns] += network(pixels[:, :, rows, columns])
            count[rows, columns] += 1
    assert count.min() >= 1
    torch.testing.assert_close(found, total / count, atol=1e-5, rtol=1e-5)


def test_one_window_is_the_whole_image() -> None:
    network = Network()
    pixels = torch.randn(1, 3, 9, 8)
    whole = network(pixels)
    torch.testing.assert_close(
        slide(network, pixels, window=(20, 20), stride=(10, 10), batch=4), whole
    )


def test_every_image_gets_its_own_size_and_what_it_gets_alone() -> None:
    """Sizes differ in the batch: of the images, and of the originals of equal images."""
    network = Network()
    images = [torch.randn(3, *size) for size in ((8, 8), (6, 9), (8, 8), (8, 8))]
    sizes = [(8, 8), (12, 18), (16, 16), (8, 8)]
    for options in ({}, {"mode": "slide", "window": 5, "stride": 3}, {"flip": True}):
        together = predict_classes(network, images, sizes, config(**options))
        for image, size, classes in zip(images, sizes, together, strict=True):
            (alone,) = predict_classes(network, [image], [size], config(**options))
            assert classes.shape == size
            assert torch.equal(classes, alone)


def test_images_of_one_size_share_a_pass() -> None:
    network = Network()
    images = [torch.randn(3, 8, 8) for _ in range(4)] + [torch.randn(3, 6, 9)]
    predict_classes(network, images, [(8, 8)] * 4 + [(6, 9)], config())
    assert network.batches == [4, 1]


def test_logits_are_resized_before_the_choice() -> None:
    """Classes chosen at the small size and then enlarged would have steps."""
    network = Network()
    image, size = torch.randn(3, 6, 6), (25, 31)
    logits = F.interpolate(network(image[None]), size=size, mode="bilinear", align_corners=False)
    (found,) = predict_classes(network, [image], [size], config())
    assert torch.equal(found, logits.argmax(1)[0])
    coarse = F.interpolate(network(image[None]).argmax(1)[None].float(), size=size)[0, 0]
    assert not torch.equal(found, coarse.long())


def test_several_views_are_averaged_as_probabilities() -> None:
    network = Network()
    image, size = torch.randn(3, 12, 10), (18, 15)
    total = torch.zeros(1, 3, *size)
    for side in ((6, 5), (12, 10), (24, 20)):
        view = image[None]
        if side != (12, 10):
            view = F.interpolate(
                view, size=side, mode="bilinear", align_corners=False, antialias=True
            )
        for mirrored in (False, True):
            logits = network(view.flip(-1)).flip(-1) if mirrored else network(view)
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            total += logits.softmax(dim=1)
    (found,) = predict_classes(network, [image], [size], config(scales=(0.5, 1.0, 2.0), flip=True))
    assert torch.equal(found, total.argmax(1)[0])


def test_large_logits_are_made_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network()
    images = [torch.randn(3, 8, 8) for _ in range(5)]
    whole = predict_classes(network, images, [(16, 16)] * 5, config(flip=True))
    monkeypatch.setattr(inference, "LIMIT", 2 * 3 * 16 * 16)
    parts = predict_classes(network, images, [(16, 16)] * 5, config(flip=True))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 100, "stride": 200}, "leave pixels out"),
        ({"scales": ()}, "at least one"),
        ({"scales": (0.0,)}, "greater than 0"),
    ],
)
def test_inference_that_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)
