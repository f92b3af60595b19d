"""The images and texts of a split, and who finds whom among them.

Shape legend: M images, N texts, E width of the embeddings, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.rows import Record
from .metrics import TO_IMAGE, TO_TEXT, ranks, reranked


@dataclass(frozen=True)
class Reranking:
    """The candidates (Q, K) of each query, and the scores by which they are ordered anew."""

    chosen: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Direction:
    """Queries (Q, E) against everything (G, E); right are those with the query's label."""

    queries: Tensor
    everything: Tensor
    of_queries: Tensor
    of_everything: Tensor
    reranking: Reranking | None = None

    def ranks(self) -> np.ndarray:
        """(Q,) from 0; see `metrics.ranks`."""
        labels = (self.of_queries, self.of_everything)
        found = ranks(self.queries, self.everything, *labels)
        if self.reranking is not None:
            found = reranked(found, self.reranking.chosen, self.reranking.scores, *labels)
        return found.numpy()

    def top(self, query: int, count: int) -> tuple[list[int], list[float]]:
        """The numbers and scores of what a query finds first."""
        if self.reranking is None:
            scores = self.everything @ self.queries[query]
            chosen = torch.arange(len(scores))
        else:
            scores, chosen = self.reranking.scores[query], self.reranking.chosen[query]
        best = scores.topk(min(count, len(scores)))
        return chosen[best.indices].tolist(), best.values.tolist()


@dataclass(frozen=True)
class Gallery:
    """Each image once, in the order in which they come, and every text.

    Attributes:
        images, texts: (M, E) and (N, E) unit vectors.
        image_of: (N,) int64, the image of each text.
        first: (M,) int64, the record in which an image comes first.
        record_of: (N,) int64, the record of each text.
        captions: N strings.
        rerankings: by direction, where a second stage gave scores.
    """

    images: Tensor
    texts: Tensor
    image_of: Tensor
    first: np.ndarray
    record_of: np.ndarray
    captions: list[str]
    rerankings: dict[str, Reranking]

    @classmethod
    def of(cls, records: Sequence[Record]) -> Gallery:
        """From records with "image" (E,), "texts" (C, E), "image_id" and "captions" (C strings);
        and, after a second stage, "to_text" (one for an image's first record) and "to_image"."""
        ids = [record["image_id"] for record in records]
        _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
        order = np.argsort(first)
        number = np.argsort(order)[inverse.reshape(-1)]
        counts = [len(record["texts"]) for record in records]
        record_of = np.repeat(np.arange(len(records)), counts)
        first = first[order]
        return cls(
            images=torch.from_numpy(np.stack([records[index]["image"] for index in first])),
            texts=torch.from_numpy(np.concatenate([record["texts"] for record in records])),
            image_of=torch.from_numpy(number[record_of]),
            first=first,
            record_of=record_of,
            captions=[caption for record in records for caption in record["captions"]],
            rerankings=_rerankings(records, first),
        )

    @property
    def numbers(self) -> Tensor:
        """(M,): the images' own numbers."""
        return torch.arange(len(self.images))

    def direction(self, name: str) -> Direction:
        """TO_TEXT: images look for texts; TO_IMAGE: texts look for images."""
        images, texts = (self.images, self.numbers), (self.texts, self.image_of)
        (query, label), (found, labels) = (images, texts) if name == TO_TEXT else (texts, images)
        return Direction(query, found, label, labels, self.rerankings.get(name))


def _rerankings(records: Sequence[Record], first: np.ndarray) -> dict[str, Reranking]:
    if not records or "to_image" not in records[0]:
        return {}
    to_text = [records[index]["to_text"] for index in first]
    to_image = [record["to_image"] for record in records]
    return {
        TO_TEXT: Reranking(*_tensors(np.stack, to_text)),
        TO_IMAGE: Reranking(*_tensors(np.concatenate, to_image)),
    }


def _tensors(
    join: Callable[[Sequence[np.ndarray]], np.ndarray],
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
) -> list[Tensor]:
    return [torch.from_numpy(join(parts)) for parts in zip(*pairs, strict=True)]
