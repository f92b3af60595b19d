"""Augmentation of pictures and recordings."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmadapters.tasks.classification.augment import ImageAugmenter, augment_audio, cut
from mmadapters.tasks.classification.config import AudioAugmentation, ImageAugmentation
from mmadapters.tasks.encoders.preprocessing import to_tensor

HOW = {
    "height": 32,
    "width": 48,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.2, 0.2],
    "interpolation": "bicubic",
    "resize": "shortest",
    "crop": 1.0,
}
OFF = {
    "crop": None,
    "horizontal_flip": 0.0,
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
}


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def augmenter(**settings: object) -> ImageAugmenter:
    return ImageAugmenter(ImageAugmentation(**{**OFF, **settings}), HOW, (32, 48))  # type: ignore[arg-type]


def test_without_augmentation_training_sees_what_evaluation_sees() -> None:
    assert torch.equal(augmenter()(picture()), to_tensor(picture(), HOW))


def test_flips_mirror_the_picture() -> None:
    plain = augmenter()(picture())
    assert torch.equal(augmenter(horizontal_flip=1.0)(picture()), plain.flip(-1))
    assert torch.equal(augmenter(vertical_flip=1.0)(picture()), plain.flip(-2))


def test_a_crop_of_the_whole_picture_is_the_picture_resized() -> None:
    whole = augmenter(crop=(1.0, 1.0), ratio=(1.5, 1.5))(picture())
    assert torch.equal(whole, to_tensor(picture(), {**HOW, "resize": "squash"}))


@pytest.mark.parametrize(
    "settings",
    [
        {"crop": (0.3, 0.6)},
        {"rand_augment": 9},
        {"brightness": 0.5},
        {"hue": 0.4},
        {"erase": 1.0},
    ],
)
def test_every_draw_differs_and_the_seed_decides_it(settings: dict[str, object]) -> None:
    augment = pickle.loads(pickle.dumps(augmenter(**settings)))
    drawn = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        drawn.append(augment(picture()))
    assert drawn[0].shape == (3, 32, 48)
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def tone(number: int = 4000) -> Tensor:
    return torch.sin(torch.arange(number) * 0.1)


def test_recordings_are_left_alone_by_default() -> None:
    assert torch.equal(augment_audio(tone(), AudioAugmentation()), tone())


def test_gain_is_in_decibels() -> None:
    config = AudioAugmentation(gain=12)
    levels = []
    for seed in range(200):
        torch.manual_seed(seed)
        factor = augment_audio(tone(), config)[100] / tone()[100]
        levels.append(20 * math.log10(factor))
    assert -12 <= min(levels) < -11
    assert 11 < max(levels) <= 12


def test_noise_has_the_asked_for_ratio_to_the_signal() -> None:
    noise = augment_audio(tone(100_000), AudioAugmentation(noise=(10, 10))) - tone(100_000)
    ratio = 10 * torch.log10(tone(100_000).square().mean() / noise.square().mean())
    assert ratio == pytest.approx(10, abs=0.1)


def test_a_shift_moves_and_leaves_silence() -> None:
    config = AudioAugmentation(shift=0.5)
    ramp = torch.arange(1.0, 101.0)
    steps = set()
    for seed in range(300):
        torch.manual_seed(seed)
        moved = augment_audio(ramp, config)
        assert len(moved) == 100
        start = int((moved != 0).nonzero()[0])
        step = start if start else -int(moved[0] - 1)
        steps.add(step)
        expected = torch.zeros(100)
        if step >= 0:
            expected[step:] = ramp[: 100 - step]
        else:
            expected[:step] = ramp[-step:]
        assert torch.equal(moved, expected)
    assert min(steps) < -45
    assert max(steps) > 45


def test_long_recordings_are_cut_anywhere_in_training_and_to_the_middle_otherwise() -> None:
    ramp = torch.arange(100)
    assert torch.equal(cut(ramp, 10, train=False), torch.arange(45, 55))
    assert torch.equal(cut(ramp, 100, train=True), ramp)
    starts = {int(cut(ramp, 10, train=True)[0]) for _ in range(1000)}
    assert starts == set(range(91))
