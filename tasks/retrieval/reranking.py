"""BLIP's second stage: the best candidates of every query, each matched together with the query.

Shape legend: M images, N texts, K candidates of a query, P pairs, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..core.device import processes, to_device
from ..core.errors import DataError
from ..core.rows import Record
from ..data.examples import Collate, Examples
from .gallery import Gallery
from .metrics import candidates
from .model import RetrievalModel


@dataclass(frozen=True)
class MatchingStage:
    """Scores pairs of images and texts of a split by BLIP's image-text matching.

    Attributes:
        model: matches; it must have a `matcher`.
        examples: of the split, not augmented. Images are read again, because their tokens would
            take too much memory to be kept.
        tokens: n captions -> (n, L) int64.
        batch_size: images, and pairs, that pass the model at once.
        workers: processes that read images.
    """

    model: RetrievalModel
    examples: Examples
    tokens: Callable[[Sequence[str]], Tensor]
    batch_size: int
    workers: int

    def rerank(self, records: list[Record], *, count: int) -> None:
        """Adds to the records, as "to_text" and "to_image", the candidates and their scores.

        A score is the logit of "matches" plus the similarity, as BLIP ranks (salesforce/BLIP,
        train_retrieval.py).

        Args:
            count: K, the number of candidates of a query.

        Raises:
            DataError: an image that was read before cannot be read again.
        """
        gallery = Gallery.of(records)
        text_similarity, texts = candidates(gallery.images, gallery.texts, count)
        image_similarity, images = candidates(gallery.texts, gallery.images, count)
        number = len(gallery.texts)
        image_major = np.arange(len(gallery.images))[:, None] * number + texts.numpy()  # (M, K)
        text_major = images.numpy() * number + np.arange(number)[:, None]  # (N, K)
        pairs, where = np.unique(
            np.concatenate([image_major.ravel(), text_major.ravel()]), return_inverse=True
        )
        rank, world = processes()
        share = self.scores(records, gallery, pairs, rank=rank, world=world)
        scores = _sum_over_processes(share)[where.reshape(-1)]
        to_text = scores[: image_major.size].reshape(image_major.shape) + text_similarity.numpy()
        to_image = scores[image_major.size :].reshape(text_major.shape) + image_similarity.numpy()
        for image, index in enumerate(gallery.first):
            records[index]["to_text"] = (texts[image].numpy(), to_text[image])
        for index, record in enumerate(records):
            of_record = np.flatnonzero(gallery.record_of == index)
            record["to_image"] = (images[of_record].numpy(), to_image[of_record])

    def scores(
        self,
        records: Sequence[Record],
        gallery: Gallery,
        pairs: np.ndarray,
        *,
        rank: int,
        world: int,
    ) -> np.ndarray:
        """Returns this process's share of the logits of "matches".

        Args:
            records: of the split, from which the gallery was made.
            pairs: (P,) sorted numbers of pairs, image · N + text.
            rank: this process. It scores every `world`-th image.
            world: the number of processes.

        Returns:
            (P,) float32, 0 for the pairs of other processes.

        Raises:
            DataError: an image that was read before cannot be read again.
        """
        size = self.batch_size
        of_process = np.arange(len(gallery.images))[rank::world]
        batches = [of_process[start : start + size] for start in range(0, len(of_process), size)]
        loader: DataLoader = DataLoader(
            self.examples,
            batch_sampler=[[records[gallery.first[i]]["index"] for i in part] for part in batches],
            collate_fn=Collate(self.examples.task),
            num_workers=min(self.workers, len(batches)),
        )
        number = len(gallery.texts)
        bounds = np.searchsorted(pairs, np.arange(len(gallery.images) + 1) * number)
        scores = np.zeros(len(pairs), dtype=np.float32)
        device = self.model.device
        for part, loaded in zip(batches, loader, strict=True):
            if loaded.problems or loaded.batch is None:
                raise DataError(
                    f"a row could be read once, but not again: {loaded.problems[0].reason}"
                )
            image_tokens = self.model.match_tokens(to_device(loaded.batch, device)["pixels"])
            of_part = np.concatenate([np.arange(bounds[i], bounds[i + 1]) for i in part])
            place = np.repeat(np.arange(len(part)), bounds[part + 1] - bounds[part])
            texts = pairs[of_part] % number
            for start in range(0, len(of_part), size):
                some = slice(start, start + size)
                tokens = self.tokens([gallery.captions[text] for text in texts[some]])
                logits = self.model.match(image_tokens[place[some]], tokens.to(device))
                scores[of_part[some]] = logits[:, 1].float().cpu().numpy()
        return scores


def _sum_over_processes(share: np.ndarray) -> np.ndarray:
    _, world = processes()
    if world == 1:
        return share
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, share)
    return np.sum(parts, axis=0)
