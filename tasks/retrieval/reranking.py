"""BLIP's second stage: the best candidates of every query, matched by looking at both.

Shape legend: M images, N texts, K candidates of a query, P pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..core.device import processes, to_device
from ..core.errors import DataError
from ..core.rows import Record, Rows
from ..data.examples import Collate, Examples
from ..data.workers import readers
from .gallery import Gallery
from .metrics import candidates
from .model import RetrievalModel

if TYPE_CHECKING:
    from .task import RetrievalTask


def rerank(
    task: RetrievalTask, model: RetrievalModel, rows: Rows, records: list[Record], *, count: int
) -> None:
    """Adds to the records, as "to_text" and "to_image", candidates (K) and their scores: the logit
    of "matches" plus the similarity, as BLIP ranks (salesforce/BLIP, train_retrieval.py)."""
    gallery = Gallery.of(records)
    text_similarity, texts = candidates(gallery.images, gallery.texts, count)
    image_similarity, images = candidates(gallery.texts, gallery.images, count)
    number = len(gallery.texts)
    image_major = np.arange(len(gallery.images))[:, None] * number + texts.numpy()  # (M, K)
    text_major = images.numpy() * number + np.arange(number)[:, None]  # (N, K)
    pairs, where = np.unique(
        np.concatenate([image_major.ravel(), text_major.ravel()]), return_inverse=True
    )
    share = matching_scores(task, model, rows, records, gallery, pairs, *processes())
    scores = _summed(share)[where.reshape(-1)]
    to_text = scores[: image_major.size].reshape(image_major.shape) + text_similarity.numpy()
    to_image = scores[image_major.size :].reshape(text_major.shape) + image_similarity.numpy()
    for image, index in enumerate(gallery.first):
        records[index]["to_text"] = (texts[image].numpy(), to_text[image])
    for index, record in enumerate(records):
        own = np.flatnonzero(gallery.record_of == index)
        record["to_image"] = (images[own].numpy(), to_image[own])


def matching_scores(
    task: RetrievalTask,
    model: RetrievalModel,
    rows: Rows,
    records: list[Record],
    gallery: Gallery,
    pairs: np.ndarray,
    rank: int,
    world: int,
) -> np.ndarray:
    """(P,) float32 logits of "matches" for sorted pairs image · N + text, 0 for the pairs of other
    processes. Images are read anew: their tokens would be too much to keep."""
    trainer = task.config.trainer
    size = trainer.eval_batch_size or trainer.batch_size
    own = np.arange(len(gallery.images))[rank::world]
    batches = [own[start : start + size] for start in range(0, len(own), size)]
    loader: DataLoader = DataLoader(
        Examples(task, rows, train=False),
        batch_sampler=[[records[gallery.first[i]]["index"] for i in part] for part in batches],
        collate_fn=Collate(task),
        num_workers=min(readers(trainer), len(batches)),
    )
    number = len(gallery.texts)
    bounds = np.searchsorted(pairs, np.arange(len(gallery.images) + 1) * number)
    scores = np.zeros(len(pairs), dtype=np.float32)
    for part, loaded in zip(batches, loader, strict=True):
        if loaded.problems or loaded.batch is None:
            raise DataError(f"a row could be read once, but not again: {loaded.problems[0].reason}")
        image_tokens = model.match_tokens(to_device(loaded.batch, model.device)["pixels"])
        of_part = np.concatenate([np.arange(bounds[i], bounds[i + 1]) for i in part])
        place = np.repeat(np.arange(len(part)), bounds[part + 1] - bounds[part])
        texts = pairs[of_part] % number
        for start in range(0, len(of_part), size):
            some = slice(start, start + size)
            tokens = task.tokens([gallery.captions[text] for text in texts[some]])
            logits = model.match(image_tokens[place[some]], tokens.to(model.device))
            scores[of_part[some]] = logits[:, 1].float().cpu().numpy()
    return scores


def _summed(share: np.ndarray) -> np.ndarray:
    """What all processes have, added up."""
    _, world = processes()
    if world == 1:
        return share
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, share)
    return np.sum(parts, axis=0)
