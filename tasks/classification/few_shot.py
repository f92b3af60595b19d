"""Few-shot rows of each class, their embeddings, and the search for Tip-Adapter's two weights.

Shape legend: N images, K keys, E width of the shared space, C classes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..core.device import autocast, to_device
from ..core.errors import BadRow, Problem, refuse
from ..core.rows import Rows
from ..core.task import Task
from ..data.examples import Collate, Examples, Loaded
from ..data.workers import readers
from .embedding_heads import TipAdapterHead, cache_logits, unit
from .embeddings import EmbeddingClassifier
from .labels import LabelMap

# The grid of the authors' code: 20 and 200 even steps, without the upper ends of the ranges.
ALPHAS = tuple(0.1 + i * (3 - 0.1) / 20 for i in range(20))
BETAS = tuple(0.1 + i * (7 - 0.1) / 200 for i in range(200))
ROWS = 1024  # rows whose logits are in memory at once during the search


def drawn(rows: Rows, labels: LabelMap, shots: int, *, seed: int) -> list[int]:
    """Returns the sorted numbers of at most `shots` rows of each class, drawn with the seed."""
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, value in enumerate(rows["label"]):
        try:
            (label,) = labels.indices(value)
        except BadRow:
            continue  # the row is reported when it is used
        by_class[label].append(index)
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(by_class[label])[:shots] for label in sorted(by_class)]
    return sorted(int(index) for part in chosen for index in part)


@torch.no_grad()
def embedded(
    task: Task, model: EmbeddingClassifier, rows: Rows, *, epochs: int = 0
) -> tuple[Tensor, Tensor]:
    """Returns the embeddings (N, E) of the rows that can be read, and their classes (N,).

    The embeddings do not have unit length.

    Args:
        task: makes the examples.
        model: embeds them; it is in its former mode afterwards.
        rows: with a label each.
        epochs: the number of passes of pictures augmented as in training, over which embeddings are
            means; 0 for one pass of the pictures as they are.

    Raises:
        DataError: a row cannot be used and `data.on_error` is "refuse", or no row can be used.
    """
    trainer = task.config.trainer
    size = trainer.eval_batch_size or trainer.batch_size
    asked = list(_batches(len(rows), size, epochs, seed=task.config.seed))
    loader: DataLoader = DataLoader(
        Examples(task, rows, train=epochs > 0),
        batch_sampler=asked,  # type: ignore[arg-type]
        collate_fn=Collate(task),
        num_workers=min(readers(trainer), len(asked)),
    )
    features = torch.zeros(len(rows), model.towers.width, device=model.device)
    counts, targets = torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.int64)
    problems: dict[int, Problem] = {}
    training = model.training
    model.eval()
    for keys, loaded in zip(asked, loader, strict=True):
        problems |= {problem.index: problem for problem in loaded.problems}
        if loaded.batch is None:
            continue
        asked_for = _as_asked(keys, loaded)
        batch = to_device(loaded.batch, model.device)
        with autocast(trainer.precision, model.device):
            images = model.towers.images(batch["pixels"])[asked_for].float()
        index = torch.tensor(loaded.indices)[asked_for]
        features.index_add_(0, index.to(model.device), images)
        counts.index_add_(0, index, torch.ones(len(index)))
        targets[index] = loaded.batch["targets"][asked_for]
    model.train(training)
    refuse(list(problems.values()), on_error=task.config.data.on_error, rows=len(rows))
    there = counts > 0
    mean = features[there.to(model.device)] / counts[there].to(model.device)[:, None]
    return mean, targets[there].to(model.device)


def _batches(count: int, size: int, epochs: int, *, seed: int) -> Iterator[list[Any]]:
    """Yields the keys of `Examples`, batch by batch."""
    for epoch in range(max(epochs, 1)):
        for start in range(0, count, size):
            part = range(start, min(start + size, count))
            draws = [(index, (seed * 1_000_003 + epoch) * count + index) for index in part]
            yield draws if epochs else list(part)


def _as_asked(keys: Sequence[Any], loaded: Loaded) -> Tensor:
    """Returns for each example of a batch, as bool, whether it is of the row that was asked for.

    In training the next good row takes the place of a bad one.
    """
    bad = {problem.index for problem in loaded.problems}
    wanted = [key[0] if isinstance(key, tuple) else key for key in keys]
    if not isinstance(keys[0], tuple):
        wanted = [index for index in wanted if index not in bad]
    return torch.tensor(
        [row == index for row, index in zip(loaded.indices, wanted, strict=True)], dtype=torch.bool
    )


@torch.no_grad()
def search(
    head: TipAdapterHead,
    features: Tensor,
    targets: Tensor,
    *,
    alphas: Sequence[float] = ALPHAS,
    betas: Sequence[float] = BETAS,
) -> tuple[float, float, float]:
    """Returns the α and β with the highest accuracy, and that accuracy.

    Of equal accuracies it takes the smaller α, then the smaller β.

    Args:
        head: with its keys.
        features: (N, E) of the validation split, of any length.
        targets: (N,) their classes.
        alphas: values of α to try, rising.
        betas: values of β to try, rising.
    """
    values, right = head.values(), torch.zeros(len(alphas), len(betas), dtype=torch.int64)
    for part, truth in zip(unit(features).split(ROWS), targets.split(ROWS), strict=True):
        zero_shot, affinity = head.zero_shot(part, head.weight), part @ head.keys.T
        for column, beta in enumerate(betas):
            cached = cache_logits(affinity, values, beta)
            for row, alpha in enumerate(alphas):
                hits = (zero_shot + alpha * cached).argmax(dim=1) == truth
                right[row, column] += int(hits.sum())
    row, column = divmod(int(right.flatten().argmax()), len(betas))
    return alphas[row], betas[column], int(right[row, column]) / len(targets)
