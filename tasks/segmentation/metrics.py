"""Metrics of segmentation, from exact counts of each image.

All metrics except boundary F1 are functions of the confusion matrix of the whole split. Each image
keeps its own counts, so that images can be resampled.

Shape legend: N images, C classes, H × W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.metrics import Metric, bootstrap, summed_metric
from ..core.results import Table

Values = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Counts:
    """The counts of one image.

    Attributes:
        cells: (M,) indices of the flat confusion matrix (truth × prediction) that are not 0.
        pixels: (M,) number of pixels of each of these cells.
        outlines: (K, 2), class and boundary F1 of the classes in truth or prediction.
    """

    cells: np.ndarray
    pixels: np.ndarray
    outlines: np.ndarray


def count(
    prediction: Tensor, truth: Tensor, *, classes: int, ignore: int, tolerance: float
) -> Counts:
    """Counts the pixels of one image.

    Args:
        prediction, truth: (H, W) class ids on any device; truth may hold the ignore index.
        tolerance: see `boundary_f1`; 0 leaves outlines out.
    """
    prediction, truth = prediction.long(), truth.long()
    valid = truth != ignore
    flat = torch.bincount(
        truth[valid] * classes + prediction[valid], minlength=classes * classes
    ).cpu()
    cells = flat.nonzero()[:, 0]
    outlines = np.zeros((0, 2))
    if tolerance:
        outlines = boundary_f1(prediction, truth, ignore=ignore, tolerance=tolerance)
    return Counts(cells.numpy(), flat[cells].numpy(), outlines)


def confusion(counts: Sequence[Counts], classes: int) -> np.ndarray:
    """Returns the confusion matrix (C, C) int64, truth × prediction, of all images."""
    matrix = np.zeros(classes * classes, dtype=np.int64)
    for part in counts:
        matrix[part.cells] += part.pixels
    return matrix.reshape(classes, classes)


def statistics(counts: Sequence[Counts], classes: int) -> np.ndarray:
    """Returns (N, 3C) float64: true positives, pixels of truth, pixels of prediction."""
    table = np.zeros((len(counts), 3, classes))
    for row, part in zip(table, counts, strict=True):
        truth, prediction = np.divmod(part.cells, classes)
        hit = truth == prediction
        row[0, truth[hit]] = part.pixels[hit]
        np.add.at(row[1], truth, part.pixels)
        np.add.at(row[2], prediction, part.pixels)
    return table.reshape(len(counts), 3 * classes)


def outline_statistics(counts: Sequence[Counts], classes: int) -> np.ndarray:
    """Returns (N, 2C): the boundary F1 of each class, and 1 if the image has the class."""
    table = np.zeros((len(counts), 2, classes))
    for row, part in zip(table, counts, strict=True):
        numbers = part.outlines[:, 0].astype(int)
        row[0, numbers], row[1, numbers] = part.outlines[:, 1], 1
    return table.reshape(len(counts), 2 * classes)


def _split(sums: np.ndarray, parts: int) -> list[np.ndarray]:
    """Splits (…, parts · C) into parts of (…, C)."""
    return np.split(sums, parts, axis=-1)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Divides; the ratio is NaN where `below` is 0."""
    return np.divide(above, below, out=np.full(np.shape(below), np.nan), where=below > 0)


def nanmean(values: np.ndarray) -> np.ndarray:
    """Returns the mean over the last axis without NaNs, or NaN if all values are NaN."""
    there = ~np.isnan(values)
    return _ratio(np.where(there, values, 0).sum(axis=-1), there.sum(axis=-1).astype(float))


def class_iou(sums: np.ndarray) -> np.ndarray:
    """Computes IoU (…, C) from sums (…, 3C); NaN for a class in neither truth nor prediction."""
    hits, truth, predicted = _split(sums, 3)
    return _ratio(hits, truth + predicted - hits)


def class_dice(sums: np.ndarray) -> np.ndarray:
    """Computes 2 TP / (2 TP + FP + FN), (…, C), from sums (…, 3C); NaN as for IoU."""
    hits, truth, predicted = _split(sums, 3)
    return _ratio(2 * hits, truth + predicted)


def class_accuracy(sums: np.ndarray) -> np.ndarray:
    """Computes recall (…, C) from sums (…, 3C); NaN for classes without pixels."""
    hits, truth, _ = _split(sums, 3)
    return _ratio(hits, truth)


def class_precision(sums: np.ndarray) -> np.ndarray:
    """Computes precision (…, C) from sums (…, 3C); NaN for classes never predicted."""
    hits, _, predicted = _split(sums, 3)
    return _ratio(hits, predicted)


def pixel_accuracy(sums: np.ndarray) -> np.ndarray:
    """Computes the share (…) of correct pixels from sums (…, 3C)."""
    hits, truth, _ = _split(sums, 3)
    return _ratio(hits.sum(axis=-1), truth.sum(axis=-1))


def class_outline(sums: np.ndarray) -> np.ndarray:
    """Computes the mean boundary F1 (…, C) over the images with a class, from sums (…, 2C)."""
    return _ratio(*_split(sums, 2))


def metrics(
    counts: Sequence[Counts],
    classes: Sequence[str],
    *,
    background: str | None,
    resamples: int,
    first: str = "mIoU",
) -> list[Metric]:
    """Computes all metrics with intervals over resampled images.

    Args:
        background: name of the class that the foreground IoU leaves out.
        resamples: number of bootstrap samples.
        first: name of the metric that stands first.
    """
    sums = statistics(counts, len(classes))
    results = [
        summed_metric("mIoU", sums, lambda s: nanmean(class_iou(s)), resamples=resamples),
        summed_metric("pixel accuracy", sums, pixel_accuracy, resamples=resamples),
        summed_metric(
            "mean accuracy", sums, lambda s: nanmean(class_accuracy(s)), resamples=resamples
        ),
        summed_metric("Dice", sums, lambda s: nanmean(class_dice(s)), resamples=resamples),
    ]
    if background in classes:
        front = [number for number, name in enumerate(classes) if name != background]
        results.append(
            summed_metric(
                "foreground IoU",
                sums,
                lambda s: nanmean(class_iou(s)[..., front]),
                resamples=resamples,
            )
        )
    if any(len(part.outlines) for part in counts):
        outlines = outline_statistics(counts, len(classes))
        results.append(
            summed_metric(
                "boundary F1", outlines, lambda s: nanmean(class_outline(s)), resamples=resamples
            )
        )
    return sorted(results, key=lambda metric: metric.name != first)


def image_iou(counts: Sequence[Counts], classes: int) -> np.ndarray:
    """Returns the mIoU (N,) of each image; NaN if all its pixels are ignored."""
    return nanmean(class_iou(statistics(counts, classes)))


def class_table(counts: Sequence[Counts], classes: Sequence[str], *, resamples: int) -> Table:
    """Makes the table of the metrics of every class; undefined metrics are empty."""
    sums = statistics(counts, len(classes))
    total = sums.sum(axis=0)
    low, high = _class_intervals(sums, resamples)
    outlines = outline_statistics(counts, len(classes)).sum(axis=0)
    pixels = _split(total, 3)[1]
    columns = {
        "pixels": _ratio(pixels, np.full_like(pixels, pixels.sum())),
        "IoU": class_iou(total),
        "low": low,
        "high": high,
        "Dice": class_dice(total),
        "accuracy": class_accuracy(total),
        "precision": class_precision(total),
        "boundary F1": class_outline(outlines),
    }
    kept = {name: values for name, values in columns.items() if not np.isnan(values).all()}
    rows = [
        [name, *(_percent(values[number]) for values in kept.values())]
        for number, name in enumerate(classes)
    ]
    caption = (
        "Percent. `pixels`: the share of the truth; `low` and `high`: the 95 % interval of IoU"
    )
    return Table("Classes", ["class", *kept], rows, f"{caption} over resampled images.")


def confused(matrix: np.ndarray, classes: Sequence[str], *, count: int = 10) -> Table:
    """Makes the table of the classes that are most often taken for another, by pixels."""
    wrong = matrix * (1 - np.eye(len(matrix), dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    rows = []
    for truth, predicted in zip(*np.unravel_index(order, wrong.shape), strict=True):
        if pixels := int(wrong[truth, predicted]):
            share = pixels / int(matrix[truth].sum())
            rows.append([classes[truth], classes[predicted], pixels, _percent(share)])
    columns = ["truth", "prediction", "pixels", "% of the class"]
    return Table("What is taken for what", columns, rows)


def _class_intervals(sums: np.ndarray, resamples: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the 2.5 and 97.5 percentiles of the IoU of every class, (C,) each."""
    classes = sums.shape[1] // 3
    bounds = np.full((classes, 2), np.nan)
    for number in range(classes):
        of_class = sums.reshape(-1, 3, classes)[:, :, number]
        if of_class[:, 1:].any():
            ends = bootstrap(of_class, lambda s: class_iou(s)[..., 0], resamples=resamples)
            bounds[number] = [np.nan if value is None else value for value in ends]
    return bounds[:, 0], bounds[:, 1]


def _percent(share: float) -> float | str:
    return "" if math.isnan(share) else round(100 * float(share), 2)


def boundary_f1(prediction: Tensor, truth: Tensor, *, ignore: int, tolerance: float) -> np.ndarray:
    """Computes the F1 of outlines: of the shares of outline pixels near the other outline.

    Csurka et al. 2013, §3, per image and class. Outlines and distances are those of DAVIS (Perazzi
    et al. 2016): an outline pixel has one of 4 neighbours in another class, and is near if within a
    disk whose radius is rounded up to whole pixels. A class in only one of truth and prediction has
    0. Ignored pixels belong to no class and have no outline.

    Args:
        prediction, truth: (H, W) int64.
        tolerance: radius; below 1 a share of the diagonal, else pixels.

    Returns:
        (K, 2) float64: class and F1 of the classes with pixels in truth or prediction.
    """
    height, width = truth.shape
    radius = math.ceil(tolerance * math.hypot(height, width) if tolerance < 1 else tolerance)
    prediction = torch.where(truth == ignore, truth, prediction)
    present = torch.unique(torch.stack([truth, prediction]))
    present = present[present != ignore]
    if not len(present):
        return np.zeros((0, 2))
    maps = torch.stack([truth, prediction])[None] == present[:, None, None, None]
    outlines = maps & _beside_others(maps, truth != ignore)  # (K, 2, H, W)
    reach = dilate(outlines, radius)
    matched = (outlines & reach.flip(1)).sum(dim=(2, 3)).double()
    total = outlines.sum(dim=(2, 3)).double()
    shares = matched / total.clamp_min(1)
    f1 = 2 * shares.prod(dim=1) / shares.sum(dim=1).clamp_min(torch.finfo(torch.double).tiny)
    # A class that fills the image in truth and prediction has no outline; its F1 is 1.
    f1 = torch.where((total == 0).all(dim=1) & maps.any(dim=(2, 3)).all(dim=1), 1.0, f1)
    return torch.stack([present.double(), f1], dim=1).cpu().numpy()


def _beside_others(maps: Tensor, valid: Tensor) -> Tensor:
    """Marks pixels with one of 4 neighbours in another class, (K, 2, H, W) bool."""
    others = ~maps & valid
    marked = torch.zeros_like(maps)
    marked[..., 1:, :] |= others[..., :-1, :]
    marked[..., :-1, :] |= others[..., 1:, :]
    marked[..., 1:] |= others[..., :-1]
    marked[..., :-1] |= others[..., 1:]
    return marked


def dilate(maps: Tensor, radius: int) -> Tensor:
    """Marks all pixels within Euclidean distance `radius` of marked ones, (K, 2, H, W) bool.

    A disk is a stack of bars, one for each row; each bar is a max-pooling along rows, shifted.
    """
    values = maps.to(torch.float32)
    dilated = torch.zeros_like(maps)
    height = maps.shape[-2]
    for dy in range(min(radius, height - 1) + 1):
        half = min(math.isqrt(radius * radius - dy * dy), maps.shape[-1] - 1)
        bar = F.max_pool2d(values, (1, 2 * half + 1), stride=1, padding=(0, half)) > 0
        dilated[..., dy:, :] |= bar[..., : height - dy, :]
        dilated[..., : height - dy, :] |= bar[..., dy:, :]
    return dilated
