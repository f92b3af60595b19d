"""The images and texts of a split, and the search among them.

Shape legend: M images, N texts, E width of the embeddings, Q queries, G gallery, K candidates.
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
    """The second stage of a direction.

    Attributes:
        chosen: (Q, K) numbers of each query's candidates.
        scores: (Q, K) scores by which the candidates are ordered again.
    """

    chosen: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Direction:
    """Queries of one kind, and the gallery of the other kind in which they search.

    Attributes:
        queries: (Q, E) unit vectors.
        everything: (G, E) unit vectors of the gallery.
        of_queries: (Q,) labels. Members of the gallery with the query's label are right.
        of_everything: (G,) labels.
        reranking: the second stage, if there was one.
    """

    queries: Tensor
    everything: Tensor
    of_queries: Tensor
    of_everything: Tensor
    reranking: Reranking | None = None

    def ranks(self) -> np.ndarray:
        """Returns (Q,) ranks from 0, as `metrics.ranks` defines them."""
        labels = (self.of_queries, self.of_everything)
        places = ranks(self.queries, self.everything, *labels)
        if self.reranking is not None:
            places = reranked(places, self.reranking.chosen, self.reranking.scores, *labels)
        return places.numpy()

    def top(self, query: int, count: int) -> tuple[list[int], list[float]]:
        """Returns the numbers and scores of the first `count` members that a query gets."""
        if self.reranking is None:
            scores = self.everything @ self.queries[query]
            chosen = torch.arange(len(scores))
        else:
            scores, chosen = self.reranking.scores[query], self.reranking.chosen[query]
        best = scores.topk(min(count, len(scores)))
        return chosen[best.indices].tolist(), best.values.tolist()


@dataclass(frozen=True)
class Gallery:
    """The images of a split, each once and in order, and all of its texts.

    Attributes:
        images: (M, E) unit vectors.
        texts: (N, E) unit vectors.
        image_of: (N,) int64, the number of each text's image.
        first: (M,) int64, the first record of each image.
        record_of: (N,) int64, the record of each text.
        captions: N strings.
        rerankings: by direction, if there was a second stage.
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
        """Makes a gallery of records.

        Args:
            records: each with "image" (E,), "texts" (C, E), "image_id" and "captions" (C strings);
                after a second stage also with "to_image" and, for an image's first record,
                "to_text".
        """
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
        """(M,) int64, the numbers of the images."""
        return torch.arange(len(self.images))

    def direction(self, name: str) -> Direction:
        """Returns a direction of search.

        Args:
            name: TO_TEXT, if images search for texts, or TO_IMAGE, if texts search for images.
        """
        images, texts = (self.images, self.numbers), (self.texts, self.image_of)
        (query, label), (members, labels) = (images, texts) if name == TO_TEXT else (texts, images)
        return Direction(query, members, label, labels, self.rerankings.get(name))


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
