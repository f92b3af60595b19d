"""Images and masks stay together, masks stay ids, and sizes are what the config says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from mmadapters.tasks.segmentation.config import TransformsConfig
from mmadapters.tasks.segmentation.transforms import (
    Augmentation,
    RandomCrop,
    crop_size,
    pad_to_patch,
    prepare,
    target_size,
)

IGNORE = 255
PREPROCESSING = {
    "height": 32,
    "width": 32,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.25, 0.3],
    "interpolation": "bicubic",
    "resize": "squash",
    "crop": 1.0,
}
PLAIN: dict[str, Any] = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
STILL: dict[str, Any] = {**PLAIN, "horizontal_flip": 0, "scale": (1.0, 1.0), "cat_max_ratio": 1.0}


def augmentation(crop: tuple[int, int] = (24, 20), **options: Any) -> Augmentation:
    return Augmentation(
        TransformsConfig(**options), crop=crop, preprocessing=PREPROCESSING, ignore=IGNORE
    )


def scene(height: int = 40, width: int = 50) -> tuple[Image.Image, np.ndarray]:
    """A mask of blocks of four classes, and a picture whose brightness is the class."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(4, size=(height // 10, width // 10))
    mask = np.kron(coarse, np.ones((10, 10), dtype=np.uint8)).astype(np.uint8)
    return Image.fromarray(np.repeat(60 * mask[:, :, None], 3, axis=2)), mask


def brightness(pixels: torch.Tensor) -> torch.Tensor:
    """(H, W) in units of classes, normalisation undone."""
    mean, std = torch.tensor(PREPROCESSING["mean"]), torch.tensor(PREPROCESSING["std"])
    return ((pixels * std[:, None, None] + mean[:, None, None]) * 255 / 60)[0]


@pytest.mark.parametrize(
    "options",
    [
        {**STILL},
        {**STILL, "horizontal_flip": 1.0},
        {**STILL, "vertical_flip": 1.0},
        {**STILL, "rotate90": True},
        {**STILL, "scale": (0.7, 2.0)},
        {**PLAIN, "size": 64, "rotate90": True, "vertical_flip": 0.5},
    ],
    ids=["crop", "mirror", "flip", "turn", "scale", "all"],
)
def test_the_mask_says_what_the_picture_shows(options: dict[str, Any]) -> None:
    image, mask = scene()
    for seed in range(8):
        torch.manual_seed(seed)
        pixels, labels = augmentation(**options)(image, mask)
        assert pixels.shape == (3, 24, 20)
        assert labels.shape == (24, 20)
        assert labels.dtype == torch.uint8
        assert set(labels.unique().tolist()) <= {0, 1, 2, 3, IGNORE}
        valid = labels != IGNORE
        wrong = (brightness(pixels).round() != labels) & valid
        # Filters blur the picture along edges, where the mask stays sharp.
        assert wrong.sum() <= 0.25 * valid.sum()
        if options.get("scale") == (1.0, 1.0):
            assert not wrong.any()


def test_scaling_moves_the_mask_no_further_than_the_picture() -> None:
    """torchvision's nearest neighbour for masks shifts them by up to half a pixel."""
    side = 90
    disk = (np.hypot(*(np.indices((side, side)) - (side - 1) / 2)) < 30).astype(np.uint8)
    image = Image.fromarray(np.repeat(60 * disk[:, :, None], 3, axis=2))
    for factor in (0.4, 0.7, 1.3):
        target = round(side * factor)
        pixels, labels = augmentation((target, target), **STILL | {"scale": (factor, factor)})(
            image, disk
        )
        for values in (brightness(pixels), labels):
            weights = values.double().clamp_min(0)
            place = (weights.sum(dim=1) * torch.arange(target)).sum() / weights.sum()
            assert place.item() == pytest.approx((target - 1) / 2, abs=0.15)


def test_a_small_picture_is_padded_with_ignore_and_the_mean_colour() -> None:
    image, mask = scene(20, 10)
    pixels, labels = augmentation((24, 20), **STILL)(image, mask)
    assert (labels[:20, :10] != IGNORE).all()
    assert (labels[20:] == IGNORE).all()
    assert (labels[:, 10:] == IGNORE).all()
    assert (pixels[:, 20:] == 0).all()
    assert (pixels[:, :, 10:] == 0).all()


def test_many_classes_keep_their_ids() -> None:
    mask = np.full((30, 30), 700, dtype=np.int32)
    mask[:, 15:] = 70_0 + 41
    both = Augmentation(
        TransformsConfig(**PLAIN, scale=(0.5, 0.9)),
        crop=(32, 32),
        preprocessing=PREPROCESSING,
        ignore=65535,
    )
    _, labels = both(Image.new("RGB", (30, 30)), mask)
    assert labels.dtype == torch.int32
    assert set(labels.unique().tolist()) == {700, 741, 65535}


def crops(cat_max_ratio: float, mask: torch.Tensor) -> list[dict[str, int]]:
    crop = RandomCrop((10, 10), cat_max_ratio=cat_max_ratio, ignore=IGNORE)
    return [crop.make_params([tv_tensors.Mask(mask)]) for _ in range(40)]


def test_crops_of_one_class_are_drawn_anew() -> None:
    mask = torch.zeros(60, 60, dtype=torch.uint8)
    mask[25:35, 25:35] = 1

    def mixed(places: list[dict[str, int]]) -> int:
        """Crops in which the square has more than a quarter."""
        return sum(
            bool((mask[p["top"] : p["top"] + 10, p["left"] : p["left"] + 10] == 1).sum() > 25)
            for p in places
        )

    assert mixed(crops(0.75, mask)) > 2 * mixed(crops(1.0, mask))
    # Where there is nothing else, it ends all the same; ignored pixels are no class.
    assert len(crops(0.75, torch.zeros(60, 60, dtype=torch.uint8))) == 40
    assert len(crops(0.75, torch.full((60, 60), IGNORE, dtype=torch.uint8))) == 40


def test_crops_reach_every_corner() -> None:
    places = crops(1.0, torch.zeros(12, 11, dtype=torch.uint8))
    assert {p["top"] for p in places} == {0, 1, 2}
    assert {p["left"] for p in places} == {0, 1}


def test_the_same_seed_draws_the_same() -> None:
    image, mask = scene()
    both = augmentation(rotate90=True, vertical_flip=0.5)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(both(image, mask)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_outside_training_the_proportions_stay() -> None:
    image = Image.new("RGB", (50, 40), (128, 102, 76))
    whole = prepare(image, TransformsConfig(), PREPROCESSING)
    assert whole.shape == (3, 40, 50)
    torch.testing.assert_close(
        whole[:, 0, 0], torch.tensor([0.01, 0.0, -0.0065]), atol=0.01, rtol=0
    )
    assert prepare(image, TransformsConfig(size=60), PREPROCESSING).shape == (3, 60, 75)
    limited = TransformsConfig(size=60, longest=64)
    assert prepare(image, limited, PREPROCESSING).shape == (3, 51, 64)
    assert target_size(TransformsConfig(size=60), (80, 40), factor=0.5) == (60, 30)


def test_the_crop_is_the_encoders_size_unless_said() -> None:
    assert crop_size(TransformsConfig(), PREPROCESSING) == (32, 32)
    assert crop_size(TransformsConfig(crop=48), PREPROCESSING) == (48, 48)
    assert crop_size(TransformsConfig(crop=(48, 64)), PREPROCESSING) == (48, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"scale": (2.0, 0.5)}, "smaller first"), ({"longest": 100}, "longest needs size")],
)
def test_transforms_that_contradict_themselves_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformsConfig(**options)


def test_padding_to_the_patch_adds_at_the_right_and_the_bottom() -> None:
    pixels = torch.randn(1, 3, 13, 16)
    padded = pad_to_patch(pixels, 8)
    assert padded.shape == (1, 3, 16, 16)
    assert torch.equal(padded[:, :, :13], pixels)
    assert (padded[:, :, 13:] == 0).all()
    assert pad_to_patch(padded, 8) is padded
