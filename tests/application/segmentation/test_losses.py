"""Losses against brute force, against torch where it has them, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmadapters.tasks.segmentation.config import LossConfig
from mmadapters.tasks.segmentation.losses import (
    SegmentationLoss,
    cross_entropy,
    dice,
    focal,
    lovasz_softmax,
)

IGNORE = 255
LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": partial(cross_entropy, ignore=IGNORE),
    "dice": partial(dice, ignore=IGNORE),
    "lovasz": partial(lovasz_softmax, ignore=IGNORE),
    "focal": partial(focal, ignore=IGNORE),
}
EVERY = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
CLASSES = pytest.mark.parametrize("classes", [2, 4], ids=["binary", "multi-class"])


def batch(classes: int, *, dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor]:
    """Logits (2, C, 3, 4) and targets with some pixels ignored; the last class is never there."""
    logits = 2 * torch.randn(2, classes, 3, 4, dtype=dtype)
    target = torch.randint(max(classes - 1, 2), (2, 3, 4))
    target[0, 0, :2] = IGNORE
    return logits, target


def pixels(logits: Tensor, target: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(P, C) probabilities and (P,) classes, a pixel at a time."""
    chances, classes = [], []
    for b in range(logits.shape[0]):
        for y in range(logits.shape[2]):
            for x in range(logits.shape[3]):
                if target[b, y, x] != IGNORE:
                    e = np.exp(logits[b, :, y, x].numpy())
                    chances.append(e / e.sum())
                    classes.append(int(target[b, y, x]))
    return np.array(chances), np.array(classes)


@CLASSES
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_torchs(classes: int, weighted: bool) -> None:
    logits, target = batch(classes)
    weights = torch.rand(classes, dtype=torch.double) + 0.1 if weighted else None
    expected = F.cross_entropy(logits, target, weight=weights, ignore_index=IGNORE)
    torch.testing.assert_close(
        cross_entropy(logits, target, ignore=IGNORE, weights=weights), expected
    )


def test_two_classes_are_a_sigmoid_of_their_difference() -> None:
    logits, target = batch(2)
    valid = target != IGNORE
    difference = (logits[:, 1] - logits[:, 0])[valid]
    expected = F.binary_cross_entropy_with_logits(difference, target[valid].double())
    torch.testing.assert_close(cross_entropy(logits, target, ignore=IGNORE), expected)


@CLASSES
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_its_formula(classes: int, gamma: float) -> None:
    logits, target = batch(classes)
    weights = torch.rand(classes, dtype=torch.double) + 0.1
    chances, truth = pixels(logits, target)
    above = below = 0.0
    for p, k in zip(chances, truth, strict=True):
        above += -float(weights[k]) * (1 - p[k]) ** gamma * math.log(p[k])
        below += float(weights[k])
    found = focal(logits, target, ignore=IGNORE, weights=weights, gamma=gamma)
    assert float(found) == pytest.approx(above / below, rel=1e-9)


def test_focal_without_focus_is_cross_entropy() -> None:
    logits, target = batch(4)
    torch.testing.assert_close(
        focal(logits, target, ignore=IGNORE, gamma=0.0),
        cross_entropy(logits, target, ignore=IGNORE),
    )


@CLASSES
def test_dice_is_its_formula_over_the_classes_that_are_there(classes: int) -> None:
    logits, target = batch(classes)
    chances, truth = pixels(logits, target)
    losses = []
    for k in sorted(set(truth)):
        both = sum(p[k] for p, t in zip(chances, truth, strict=True) if t == k)
        sums = sum(p[k] for p in chances) + sum(t == k for t in truth)
        losses.append(1 - (2 * both + 1) / (sums + 1))
    assert float(dice(logits, target, ignore=IGNORE)) == pytest.approx(np.mean(losses), rel=1e-9)


def jaccard_loss(wrong: set[int], truth: set[int]) -> float:
    """1 − IoU of a class when the pixels of `wrong` are predicted wrongly (eq. 4 there)."""
    return len(wrong) / len(truth | wrong) if truth | wrong else 0.0


@CLASSES
def test_lovasz_is_the_extension_of_the_jaccard_loss(classes: int) -> None:
    """By the definition of the Lovász extension (Berman et al., Definition 1), set by set."""
    logits, target = batch(classes)
    chances, classes_at = pixels(logits, target)
    losses = []
    for k in sorted(set(classes_at)):
        truth = {i for i, t in enumerate(classes_at) if t == k}
        errors = [1 - p[k] if i in truth else p[k] for i, p in enumerate(chances)]
        order = sorted(range(len(errors)), key=lambda i: -errors[i])
        total = 0.0
        for place, pixel in enumerate(order):
            gain = jaccard_loss(set(order[: place + 1]), truth) - jaccard_loss(
                set(order[:place]), truth
            )
            total += errors[pixel] * gain
        losses.append(total)
    found = float(lovasz_softmax(logits, target, ignore=IGNORE))
    assert found == pytest.approx(np.mean(losses), rel=1e-9)


def test_lovasz_of_hard_predictions_is_one_minus_iou() -> None:
    target = torch.randint(3, (1, 6, 7))
    guess = torch.randint(3, (1, 6, 7))
    logits = 1e4 * F.one_hot(guess, 3).movedim(-1, 1).double()
    expected = np.mean(
        [
            1 - float(((guess == k) & (target == k)).sum() / ((guess == k) | (target == k)).sum())
            for k in range(3)
        ]
    )
    found = float(lovasz_softmax(logits, target, ignore=IGNORE))
    assert found == pytest.approx(expected, rel=1e-6)


@EVERY
@CLASSES
def test_gradients_are_right(loss: Callable[..., Tensor], classes: int) -> None:
    logits, target = batch(classes)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), logits.requires_grad_())


@EVERY
def test_right_and_sure_costs_nothing(loss: Callable[..., Tensor]) -> None:
    target = torch.randint(3, (2, 8, 8))
    logits = 50 * F.one_hot(target, 3).movedim(-1, 1).double()
    assert float(loss(logits, target)) == pytest.approx(0, abs=1e-6)
    assert float(loss(-logits, target)) > 0.4


@EVERY
def test_ignored_pixels_count_for_nothing(loss: Callable[..., Tensor]) -> None:
    logits, target = batch(4)
    logits.requires_grad_()
    before = loss(logits, target)
    changed = torch.where((target == IGNORE)[:, None], logits + 3, logits)
    torch.testing.assert_close(loss(changed, target), before)
    before.backward()
    assert logits.grad is not None
    ignored = logits.grad.movedim(1, -1)[target == IGNORE]
    assert len(ignored)
    assert (ignored == 0).all()


@EVERY
def test_an_ignored_batch_gives_zero_and_a_gradient_of_zeros(loss: Callable[..., Tensor]) -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    value = loss(logits, torch.full((2, 4, 4), IGNORE))
    assert value.item() == 0
    value.backward()
    assert logits.grad is not None
    assert (logits.grad == 0).all()


@EVERY
def test_extreme_logits_stay_finite(loss: Callable[..., Tensor]) -> None:
    logits = (200 * torch.randn(2, 3, 8, 8)).requires_grad_()
    value = loss(logits, torch.randint(3, (2, 8, 8)))
    value.backward()
    assert torch.isfinite(value)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_the_sum_is_that_of_the_config() -> None:
    logits, target = batch(3, dtype=torch.float)
    weights = {"cross_entropy": 0.5, "dice": 2.0, "lovasz": 1.5, "focal": 3.0}
    options: dict[str, Any] = {"focal_gamma": 1.0, "class_weights": {"b": 4.0}}
    module = SegmentationLoss(LossConfig(**weights, **options), ("a", "b", "c"), ignore=IGNORE)
    assert module.weights is not None
    assert module.weights.tolist() == [1.0, 4.0, 1.0]
    parts = module(logits, target)
    expected = sum(weight * float(parts[name]) for name, weight in weights.items())
    assert float(parts["loss"]) == pytest.approx(expected, rel=1e-6)
    own = {"ignore": IGNORE, "weights": module.weights}
    torch.testing.assert_close(parts["focal"], focal(logits, target, gamma=1.0, **own))
    torch.testing.assert_close(parts["cross_entropy"], cross_entropy(logits, target, **own))


def test_half_precision_is_summed_in_single() -> None:
    logits, target = batch(3, dtype=torch.float)
    module = SegmentationLoss(LossConfig(dice=1.0, lovasz=1.0), ("a", "b", "c"), ignore=IGNORE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(logits.bfloat16(), target)["loss"]
    assert found.dtype == torch.float
    torch.testing.assert_close(found, module(logits.bfloat16().float(), target)["loss"])


def test_weights_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="'d' is none of the classes a, b"):
        SegmentationLoss(LossConfig(class_weights={"d": 1.0}), ("a", "b"), ignore=IGNORE)
    with pytest.raises(ValueError, match="give at least one loss a weight"):
        LossConfig(cross_entropy=0.0)


def test_classes_of_weight_zero_alone_give_a_finite_zero() -> None:
    logits = torch.randn(1, 2, 3, 3, requires_grad=True)
    target = torch.zeros(1, 3, 3, dtype=torch.long)
    weights = torch.tensor([0.0, 1.0])
    for loss in (cross_entropy, focal):
        value = loss(logits, target, ignore=IGNORE, weights=weights)
        assert value.item() == 0
