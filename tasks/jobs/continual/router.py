"""Which job a picture belongs to, where nothing says it: the nearest class mean of the encoder.

A feature is the mean of the patch tokens after the final norm, of the frozen encoder without any
adapter, scaled to length 1. A class mean is the mean of its training pictures' features, scaled
likewise, and the nearest one has the largest cosine. A job without one class to each picture
(segmentation, several labels) has one mean in all. Nothing is trained.

Nearest class mean in a fixed space: Mensink et al. 2013, "Distance-based image classification".

Shape legend: N pictures, D width of the encoder, M means, J jobs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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

BATCH = 64


def obstacle(tasks: Sequence[Task]) -> str | None:
    """Why pictures cannot be sent to these jobs, None if they can."""
    for task in tasks:
        kinds = {column.kind for column in task.columns.values()}
        if "image" not in kinds or kinds & {"audio", "text", "texts"}:
            others = ", ".join(sorted(kinds & {"image", "audio", "text", "texts"}))
            return (
                f"{task.config.name} reads {others}: routing is measured where all jobs read "
                "pictures alone"
            )
    return None


@dataclass(frozen=True)
class Routing:
    """Where the test pictures went.

    Attributes:
        jobs: J names.
        shares: (J, J), of a job's test pictures the share that went to each job.
        told: the score of each job where its adapter is told, as in the matrix's last row.
        routed: the same where the picture's way decides; one that went astray earns nothing.
        means: how many class means each job has.
    """

    jobs: list[str]
    shares: list[list[float]]
    told: list[float]
    routed: list[float]
    means: list[int]

    @property
    def accuracy(self) -> dict[str, float]:
        """The share of each job's pictures that found it."""
        return {name: self.shares[place][place] for place, name in enumerate(self.jobs)}


class Router:
    """Means (M, D) of length 1 and the job (M,) that each belongs to."""

    def __init__(self, means: Tensor, owners: Tensor) -> None:
        self.means, self.owners = means, owners

    def __call__(self, features: Tensor) -> Tensor:
        """Features (N, D) of length 1 -> job numbers (N,)."""
        return self.owners[(features @ self.means.T).argmax(dim=1)]


class FrozenFeatures:
    """What the encoder makes of pictures while no adapter acts.

    Raises:
        ValueError: the encoder reads no images.
    """

    def __init__(self, encoder: AdapterModel, task: Task) -> None:
        self.encoder, self.tower = encoder, ImageTower(encoder)
        self.preprocessing = image_preprocessing(task.config.backbone, encoder.backbone)

    def __call__(self, rows: Any) -> Iterator[tuple[list[int], Tensor]]:
        """Row numbers and features (N, D), batch by batch; rows without a picture are left out."""
        numbers: list[int] = []
        pixels: list[Tensor] = []
        for number in range(len(rows)):
            try:
                pixels.append(to_tensor(read_image(rows[number]["image"]), self.preprocessing))
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
    """The class means of each job's training rows."""
    means, owners = [], []
    for owner, (task, own) in enumerate(zip(tasks, rows, strict=True)):
        sums: dict[int, Tensor] = defaultdict(lambda: torch.zeros(()))
        for numbers, found in features(own):
            for number, feature in zip(numbers, found, strict=True):
                if (name := _class_of(task, own[number])) is not None:
                    sums[name] = sums[name].to(feature) + feature
        means += [F.normalize(total, dim=0) for total in sums.values()]
        owners += [owner] * len(sums)
    stacked = torch.stack(means)
    return Router(stacked, torch.tensor(owners, device=stacked.device))


def _class_of(task: Task, row: Any) -> int | None:
    """The class whose mean a row counts for; None for a label that cannot be used."""
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
    """Sends the test rows of all jobs.

    Args:
        records: of each job's test rows, by its own adapter and head. A picture that finds its job
            gives the same record, so nothing is run twice.
    """
    features = FrozenFeatures(encoder, tasks[0])
    router = fit_router(features, tasks, train)
    shares, told, routed = [], [], []
    for place, (task, rows, known) in enumerate(zip(tasks, test, records, strict=True)):
        ways = {
            number: way
            for numbers, found in features(rows)
            for number, way in zip(numbers, router(found).tolist(), strict=True)
        }
        counts = [list(ways.values()).count(other) for other in range(len(tasks))]
        shares.append([count / max(len(ways), 1) for count in counts])
        told.append(_score(task, known))
        arrived = [record for record in known if ways.get(record["index"]) == place]
        routed.append(_score(task, arrived) * len(arrived) / len(known) if arrived else 0.0)
    owners = router.owners.tolist()
    names = [task.config.name for task in tasks]
    return Routing(names, shares, told, routed, [owners.count(n) for n in range(len(tasks))])


def _score(task: Task, records: Sequence[Record]) -> float:
    return task.score(records, bootstrap=0)[task.metric].value
