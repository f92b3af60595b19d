"""Few pictures of each class: which are drawn, their embeddings, and Tip-Adapter's two weights.

Shape legend: N images, K keys, E width of the shared space, C classes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..core.device import autocast, to_device
from ..core.errors import BadRow, Problem, refuse
from ..core.task import Rows
from ..data.examples import Collate, Examples, Loaded
from ..data.workers import readers
from .embedding_heads import TipAdapterHead, cache_logits, unit
from .labels import LabelMap

if TYPE_CHECKING:
    from .embeddings import EmbeddingClassifier
    from .task import ClassificationTask

# The grid of the authors' code: 20 and 200 even steps that leave their upper ends out.
ALPHAS = tuple(0.1 + i * (3 - 0.1) / 20 for i in range(20))
BETAS = tuple(0.1 + i * (7 - 0.1) / 200 for i in range(200))
ROWS = 1024  # whose logits are there at once during the search


def drawn(rows: Rows, labels: LabelMap, shots: int, *, seed: int) -> list[int]:
    """The numbers, rising, of at most `shots` rows of each class, drawn with the seed."""
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, value in enumerate(rows["label"]):
        try:
            (label,) = labels.indices(value)
        except BadRow:
            continue  # counted when the row is used
        by_class[label].append(index)
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(by_class[label])[:shots] for label in sorted(by_class)]
    return sorted(int(index) for part in chosen for index in part)


@torch.no_grad()
def embedded(
    task: ClassificationTask, model: EmbeddingClassifier, rows: Rows, *, epochs: int = 0
) -> tuple[Tensor, Tensor]:
    """The embeddings (N, E) of the rows that can be read, not of unit length, and their classes
    (N,), in one pass; or the means over `epochs` passes of pictures augmented as in training.

    Raises:
        DataError: a row cannot be used and `data.on_error` is "refuse".
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
        own = _as_asked(keys, loaded)
        batch = to_device(loaded.batch, model.device)
        with autocast(trainer.precision, model.device):
            found = model.towers.images(batch["pixels"])[own].float()
        index = torch.tensor(loaded.indices)[own]
        features.index_add_(0, index.to(model.device), found)
        counts.index_add_(0, index, torch.ones(len(index)))
        targets[index] = loaded.batch["targets"][own]
    model.train(training)
    refuse(list(problems.values()), on_error=task.config.data.on_error, rows=len(rows))
    there = counts > 0
    mean = features[there.to(model.device)] / counts[there].to(model.device)[:, None]
    return mean, targets[there].to(model.device)


def _batches(count: int, size: int, epochs: int, *, seed: int) -> Iterator[list[Any]]:
    """The keys of `Examples`, batch by batch."""
    for epoch in range(max(epochs, 1)):
        for start in range(0, count, size):
            part = range(start, min(start + size, count))
            draws = [(index, (seed * 1_000_003 + epoch) * count + index) for index in part]
            yield draws if epochs else list(part)


def _as_asked(keys: Sequence[Any], loaded: Loaded) -> Tensor:
    """Which examples of a batch, bool, are of the very rows asked for: in training the next good
    row stands in for a bad one."""
    bad = {problem.index for problem in loaded.problems}
    wanted = [key[0] if isinstance(key, tuple) else key for key in keys]
    if not isinstance(keys[0], tuple):
        wanted = [index for index in wanted if index not in bad]
    return torch.tensor(
        [own == index for own, index in zip(loaded.indices, wanted, strict=True)], dtype=torch.bool
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
    """The α and β of the highest accuracy on features (N, E), and that; of equal ones the smaller
    α, then the smaller β."""
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
