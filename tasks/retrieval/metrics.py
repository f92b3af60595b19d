"""Recall in both directions with several captions for each image, exact over a whole split.

The rank of an image is that of its best caption among all texts. The rank of a text is that of its
image among all images (Karpathy & Fei-Fei 2015, §4.1; open_clip prints another one, the paired rank
of one caption for each image). Ranks begin at 0. Ties count against the query: a wrong answer whose
score equals that of the right one, to within TIE, stands before it.

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

TIE = 1e-6  # products of equal vectors in different blocks of a matmul differ by less than this
CUTS = (1, 5, 10)  # k of R@k
AT_A_TIME = 2**24  # similarities in memory at once
TO_IMAGE, TO_TEXT = "text-to-image", "image-to-text"


def ranks(queries: Tensor, gallery: Tensor, of_query: Tensor, of_gallery: Tensor) -> Tensor:
    """Returns (Q,) ranks: the numbers of wrong members that score no less than the best right one.

    A query with a similarity of NaN comes last.

    Args:
        queries: (Q, E).
        gallery: (G, E).
        of_query: (Q,) labels. Members of the gallery with the query's label are right.
        of_gallery: (G,) labels.
    """
    parts = []
    for part, labels in _chunks(queries, of_query, len(gallery)):
        similar = part @ gallery.T
        right = labels[:, None] == of_gallery
        best = similar.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        parts.append((~(similar < best - TIE) & ~right).sum(dim=1))
    return torch.cat(parts)


def candidates(queries: Tensor, gallery: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the similarities (Q, K) and the numbers (Q, K) of the gallery's most similar members.

    Args:
        queries: (Q, E).
        gallery: (G, E).
        count: K; at most G are returned.
    """
    count = min(count, len(gallery))
    labels = torch.zeros(len(queries))
    # In bf16 many members of a gallery would be equally similar.
    with torch.autocast(queries.device.type, enabled=False):
        chunks = _chunks(queries, labels, len(gallery))
        best = [(part @ gallery.T).topk(count) for part, _ in chunks]
    return torch.cat([top.values for top in best]), torch.cat([top.indices for top in best])


def reranked(
    first: Tensor, chosen: Tensor, scores: Tensor, of_query: Tensor, of_gallery: Tensor
) -> Tensor:
    """Returns ranks (Q,) after the candidates of each query were ordered by new scores.

    Args:
        first: (Q,) ranks before. A query without a right candidate keeps its rank, or gets rank K
            if it was better.
        chosen: (Q, K) numbers of the candidates.
        scores: (Q, K) their new scores.
        of_query: (Q,) labels.
        of_gallery: (G,) labels.
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
    """Returns R@1/5/10 and the median rank (from 1) in both directions.

    Intervals come from resampled images.

    Args:
        image_ranks: (M,) ranks of images that search for texts, from 0.
        text_ranks: (N,) ranks of texts that search for images, from 0.
        images: (M,) the number of each image.
        image_of: (N,) the number of each text's image; texts of one image are drawn together.
        deciding: the name of the metric that stands first.
        resamples: for the intervals; 0 for none.
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
    """Returns the mean of R@1 in both directions. An image and its texts are one cluster."""
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

    metric = summed_metric("mean R@1", statistics, value, resamples=resamples)
    return replace(metric, count=len(images))


def grouped(
    values: Sequence[Any], of_images: np.ndarray, of_texts: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns for each value of a column, as bool, the images (M,) and texts (N,) of its records.

    Args:
        values: of the column, one for each record.
        of_images: (M,) the record of each image.
        of_texts: (N,) the record of each text.
    """
    names = np.asarray([str(value) for value in values])
    return {
        str(name): (names[of_images] == name, names[of_texts] == name) for name in np.unique(names)
    }
