"""Recall both ways with several captions for each image, exact among all of a split.

An image's rank is that of its best-placed caption among all texts; a text's rank that of its one
image among all images (Karpathy & Fei-Fei 2015, §4.1; not the paired rank of one caption each that
open_clip prints). Ranks begin at 0. Ties count against the query: what scores the same as the
right answer, to within TIE, stands before it.

Shape legend: M images, N texts, Q queries, G gallery, E width of the embeddings, K candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.metrics import Metric, summed_metric

TIE = 1e-6  # products of equal vectors differ by less where they stand in other blocks of a matmul
CUTS = (1, 5, 10)
AT_A_TIME = 2**24  # similarities held at once
TO_IMAGE, TO_TEXT = "text-to-image", "image-to-text"


def ranks(queries: Tensor, gallery: Tensor, of_query: Tensor, of_gallery: Tensor) -> Tensor:
    """(Q,): how many wrong members of the gallery score no less than the best right one.

    queries, gallery: (Q, E) and (G, E); right are those with the query's label in (Q,) and (G,).
    Where a similarity is NaN the query comes last.
    """
    found = []
    for part, labels in _chunks(queries, of_query, len(gallery)):
        similar = part @ gallery.T
        right = labels[:, None] == of_gallery
        best = similar.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        found.append((~(similar < best - TIE) & ~right).sum(dim=1))
    return torch.cat(found)


def candidates(queries: Tensor, gallery: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(Q, K) similarities and numbers of the most similar members of the gallery."""
    count = min(count, len(gallery))
    labels = torch.zeros(len(queries))
    # In bf16 many of a gallery would be equally similar.
    with torch.autocast(queries.device.type, enabled=False):
        chunks = _chunks(queries, labels, len(gallery))
        found = [(part @ gallery.T).topk(count) for part, _ in chunks]
    return torch.cat([top.values for top in found]), torch.cat([top.indices for top in found])


def reranked(
    first: Tensor, chosen: Tensor, scores: Tensor, of_query: Tensor, of_gallery: Tensor
) -> Tensor:
    """Ranks (Q,) after the candidates of each query were put in the order of new scores.

    Args:
        first: (Q,) ranks before; a query without a right candidate keeps its own.
        chosen, scores: (Q, K) candidates and their new scores.
    """
    right = of_gallery[chosen] == of_query[:, None]
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    rank = (~(scores < best - TIE) & ~right).sum(dim=1)
    return torch.where(right.any(dim=1), rank, first.clamp(min=chosen.shape[1]))


def _chunks(queries: Tensor, labels: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, AT_A_TIME // max(width, 1))
    return zip(queries.split(size), labels.split(size), strict=True)


def recalls(
    image_ranks: np.ndarray,
    text_ranks: np.ndarray,
    *,
    images: np.ndarray,
    image_of: np.ndarray,
    deciding: str,
    resamples: int,
) -> list[Metric]:
    """R@1/5/10 and median rank (from 1) both ways, with intervals over resampled images.

    Args:
        image_ranks, text_ranks: (M,) and (N,) of the queries, from 0.
        images: (M,) the number of each image.
        image_of: (N,) the number of each text's image; texts of one image are drawn together.
        deciding: the name of the metric that comes first.
    """
    metrics = []
    if len(image_ranks) and len(text_ranks):
        metrics.append(_mean_recall(image_ranks, text_ranks, images, image_of, resamples=resamples))
    for name, rank, clusters in ((TO_IMAGE, text_ranks, image_of), (TO_TEXT, image_ranks, images)):
        if len(rank):
            metrics += _one_way(name, rank, clusters, resamples=resamples)
    return sorted(metrics, key=lambda metric: metric.name != deciding)


def _one_way(
    name: str, rank: np.ndarray, clusters: np.ndarray, *, resamples: int
) -> Iterator[Metric]:
    for cut in CUTS:
        hits = np.stack([rank < cut, np.ones(len(rank), dtype=bool)], axis=1)
        yield summed_metric(
            f"{name} R@{cut}",
            hits,
            lambda sums: sums[..., 0] / sums[..., 1],
            resamples=resamples,
            clusters=clusters.tolist(),
        )
    yield Metric(
        f"{name} median rank",
        float(np.median(rank) + 1),
        count=len(rank),
        unit="",
        greater_is_better=False,
    )


def _mean_recall(
    image_ranks: np.ndarray,
    text_ranks: np.ndarray,
    images: np.ndarray,
    image_of: np.ndarray,
    *,
    resamples: int,
) -> Metric:
    """The mean of R@1 both ways; an image and its texts are one cluster."""
    number = int(max(images.max(), image_of.max())) + 1
    columns = [
        np.bincount(who, weights=what, minlength=number)
        for who, rank in ((images, image_ranks), (image_of, text_ranks))
        for what in (rank < 1, np.ones(len(rank)))
    ]
    statistics = np.stack(columns, axis=1)
    statistics = statistics[statistics.any(axis=1)]

    def value(sums: np.ndarray) -> np.ndarray:
        return (sums[..., 0] / sums[..., 1] + sums[..., 2] / sums[..., 3]) / 2

    found = summed_metric("mean R@1", statistics, value, resamples=resamples)
    return replace(found, count=len(images))


def grouped(
    values: Sequence[Any], of_images: np.ndarray, of_texts: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Which images and which texts are queries of a group, by the value of a column.

    values: one for each record; of_images, of_texts: (M,) and (N,) records.
    """
    names = np.asarray([str(value) for value in values])
    return {
        str(name): (names[of_images] == name, names[of_texts] == name) for name in np.unique(names)
    }
