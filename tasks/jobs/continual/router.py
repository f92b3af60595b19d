"""Chooses the job of a picture that has no task label, by the nearest class mean of the encoder.

The feature of a picture is the mean of the patch tokens after the final norm, scaled to length 1,
of the frozen encoder without any adapter. A class mean is the mean of the features of the class's
training pictures, scaled to length 1. The nearest mean is the one with the largest cosine. A job
whose pictures do not have one class each (segmentation, several labels) has a single mean. Nothing
is trained.

Nearest class mean in a fixed space: Mensink et al. 2013, "Distance-based image classification".

Shape legend: N pictures, D width of the encoder, M means, J jobs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmadapters import AdapterModel

from ...classification.task import ClassificationTask
from ...core.errors import BadRow
from ...core.rows import Record, Rows
from ...core.task import Task
from ...data.media import read_image
from ...encoders.vision import ImageTower, image_preprocessing, to_tensor
from .results import Routing

BATCH = 64  # pictures that the encoder reads at once


def obstacle(tasks: Sequence[Task]) -> str | None:
    """Returns why pictures cannot be routed to these jobs, or None if they can."""
    for task in tasks:
        kinds = {column.kind for column in task.columns.values()}
        if "image" not in kinds or kinds & {"audio", "text", "texts"}:
            others = ", ".join(sorted(kinds & {"image", "audio", "text", "texts"}))
            return (
                f"{task.config.name} reads {others}: routing is measured where all jobs read "
                "only pictures"
            )
    return None


class Router:
    """Sends features to the job of the nearest class mean.

    Args:
        means: (M, D), each of length 1.
        owners: (M,) the number of the job of each mean.
    """

    def __init__(self, means: Tensor, owners: Tensor) -> None:
        self.means, self.owners = means, owners

    def __call__(self, features: Tensor) -> Tensor:
        """Returns the job numbers (N,) of features (N, D) of length 1."""
        return self.owners[(features @ self.means.T).argmax(dim=1)]


class FrozenFeatures:
    """Computes features of pictures with the encoder while no adapter is active.

    Raises:
        ValueError: the encoder reads no images.
    """

    def __init__(self, encoder: AdapterModel, task: Task) -> None:
        self.encoder, self.tower = encoder, ImageTower(encoder)
        self.preprocessing = image_preprocessing(task.config.backbone, encoder.backbone)
        self.bits = task.state.get("preprocessing", {}).get("bits")

    def __call__(self, rows: Any) -> Iterator[tuple[list[int], Tensor]]:
        """Yields row numbers and features (N, D) by batch, without rows whose picture is bad."""
        numbers: list[int] = []
        pixels: list[Tensor] = []
        for number in range(len(rows)):
            try:
                image = read_image(rows[number]["image"], bits=self.bits)
                pixels.append(to_tensor(image, self.preprocessing))
            except BadRow:
                continue
            numbers.append(number)
            if len(numbers) == BATCH:
                yield numbers, self._features(pixels)
                numbers, pixels = [], []
        if numbers:
            yield numbers, self._features(pixels)

    @torch.no_grad()
    def _features(self, pixels: Sequence[Tensor]) -> Tensor:
        device = next(self.encoder.parameters()).device
        training = self.encoder.training
        self.encoder.eval()
        with self.encoder.using(None):
            (tokens,) = self.tower(torch.stack(list(pixels)).to(device)).maps
        self.encoder.train(training)
        return F.normalize(tokens.mean(dim=(2, 3)).float(), dim=1)


def fit_router(features: FrozenFeatures, tasks: Sequence[Task], rows: Sequence[Rows]) -> Router:
    """Makes a router from the training rows of each job."""
    means, owners = [], []
    for owner, (task, of_task) in enumerate(zip(tasks, rows, strict=True)):
        sums: dict[int, Tensor] = defaultdict(lambda: torch.zeros(()))
        for numbers, batch in features(of_task):
            for number, feature in zip(numbers, batch, strict=True):
                if (name := _class_of(task, of_task[number])) is not None:
                    sums[name] = sums[name].to(feature) + feature
        means += [F.normalize(total, dim=0) for total in sums.values()]
        owners += [owner] * len(sums)
    stacked = torch.stack(means)
    return Router(stacked, torch.tensor(owners, device=stacked.device))


def _class_of(task: Task, row: Any) -> int | None:
    """Returns the class to whose mean a row belongs, or None if its label cannot be used."""
    if not isinstance(task, ClassificationTask) or task.config.data.multi_label:
        return 0
    try:
        return task.labels.indices(row["label"])[0]
    except BadRow:
        return None


def measure(
    encoder: AdapterModel,
    tasks: Sequence[Task],
    train: Sequence[Rows],
    test: Sequence[Rows],
    records: Sequence[Sequence[Record]],
) -> Routing:
    """Routes the test rows of all jobs and scores the result.

    Args:
        train: the training rows of each job.
        test: the test rows of each job.
        records: the records of each job's test rows with its own adapter and head. A picture that
            is routed to the right job gives the same record, so that nothing is run twice.
    """
    features = FrozenFeatures(encoder, tasks[0])
    router = fit_router(features, tasks, train)
    shares, told, routed = [], [], []
    for place, (task, rows, known) in enumerate(zip(tasks, test, records, strict=True)):
        routes = {
            number: job
            for numbers, batch in features(rows)
            for number, job in zip(numbers, router(batch).tolist(), strict=True)
        }
        counts = [list(routes.values()).count(other) for other in range(len(tasks))]
        shares.append([count / max(len(routes), 1) for count in counts])
        told.append(_score(task, known))
        arrived = [record for record in known if routes.get(record["index"]) == place]
        routed.append(_score(task, arrived) * len(arrived) / len(known) if arrived else 0.0)
    owners = router.owners.tolist()
    names = [task.config.name for task in tasks]
    return Routing(names, shares, told, routed, [owners.count(n) for n in range(len(tasks))])


def _score(task: Task, records: Sequence[Record]) -> float:
    return task.score(records, bootstrap=0)[task.metric].value
