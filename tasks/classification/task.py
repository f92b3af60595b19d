"""The classification task: images or recordings, with one label or several."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mmadapters import AdapterModel
from mmadapters.suggest import nearest

from ..config.schema import Split
from ..core.capabilities import (
    BatchGrouping,
    CacheableInputs,
    Calibration,
    DataChecks,
    ReportPictures,
    Tally,
    TowerRow,
)
from ..core.device import to_device
from ..core.errors import BadRow, InputErrors
from ..core.findings import Finding
from ..core.metrics import Metric
from ..core.model import TaskModel
from ..core.results import Figure, Scores, Table
from ..core.rows import Batch, Column, Example, Record, Rows
from ..core.task import Task
from ..data import media
from ..data.columns import PART_ROLES
from ..encoders.speech import conv_frames
from ..encoders.vision import image_preprocessing, to_tensor
from . import few_shot, metrics, pictures
from .audio import audio_preprocessing, longest
from .augment import ImageAugmenter, augment_audio, cut
from .checks import class_shares, label_findings
from .config import ClassificationConfig
from .embedding_heads import ALPHA, BETA, TipAdapterHead
from .embeddings import EmbeddingClassifier, spoken
from .labels import LabelMap, fit_labels
from .model import AudioClassifier, Classifier, ImageClassifier, class_weights
from .tables import confusions, of_classes, of_labels


class ClassificationTask(
    Task[ClassificationConfig],
    CacheableInputs,
    BatchGrouping,
    Calibration,
    DataChecks,
    ReportPictures,
):
    """A row is an image or a recording with one label, or with any number of labels.

    `state`: "labels", the label map; "counts" of each class and the number of "rows" in the
    training split; the encoder's "preprocessing" (see `encoders.preprocessing` for images and
    `audio` for recordings); "keys", the size of Tip-Adapter's cache, if there is one.
    """

    name = "classification"
    metric = "accuracy"
    columns: ClassVar[Mapping[str, Column]] = {
        "image": Column("image", description="the picture"),
        "audio": Column("audio", description="the recording"),
        "label": Column("label", description="its class, or its classes with data.multi_label"),
    }
    usage = "image or audio files"

    def __init__(self, config: ClassificationConfig, state: dict[str, Any] | None = None) -> None:
        super().__init__(config, state)
        # These are of this job; the class attributes are for all jobs of the task.
        columns = {role: self.columns[role] for role in (config.kind, "label")}
        if config.kind == "audio":
            columns |= PART_ROLES
        self.__dict__ |= {"metric": config.deciding_metric, "columns": columns}

    def fit(self, rows: Rows | None, backbone: nn.Module) -> None:
        config = self.config
        if rows is None and not (config.head.kind == "zero_shot" and config.data.labels):
            raise ValueError(
                "the classes are those of a training split, and there is none: name it in "
                "data.splits, or, for head.kind zero_shot, the classes in data.labels"
            )
        if rows is not None and config.kind not in rows.column_names:
            raise ValueError(
                f"the data has no column {config.kind}, only {', '.join(rows.column_names)}; what "
                "is classified is said by data.kind"
            )
        separator = config.data.separator if config.data.multi_label else None
        labels, counts = fit_labels(rows, names=config.data.labels, separator=separator)
        counts = [min(count, config.data.shots or count) for count in counts]
        self.state = {
            "labels": labels.to_state(),
            "counts": counts,
            "rows": sum(counts) if config.data.shots else 0 if rows is None else len(rows),
        }
        if config.head.kind == "tip_adapter":
            self.state["keys"] = sum(min(count, config.head.shots) for count in counts)
        if unknown := set(config.head.class_names) - set(labels.names):
            name = min(unknown)
            raise ValueError(
                f"head.class_names has {name!r}, no class{nearest(name, labels.names)}"
            )
        if self.kind == "image":
            preprocessing = image_preprocessing(config.backbone, backbone)
            if config.data.size is not None:
                height, width = _pair(config.data.size)
                preprocessing |= {"height": height, "width": width}
            preprocessing |= media.picture_bits(config.data, rows)
            self.state["preprocessing"] = preprocessing
        else:
            self.state["preprocessing"] = audio_preprocessing(config.backbone, backbone)
        self._weights()

    @property
    def kind(self) -> Literal["image", "audio"]:
        """The inputs that are classified: "image" or "audio"."""
        return self.config.kind

    @functools.cached_property
    def labels(self) -> LabelMap:
        return LabelMap.from_state(self.state["labels"])

    @functools.cached_property
    def _augmenter(self) -> ImageAugmenter:
        how = self.state["preprocessing"]
        return ImageAugmenter(self.config.data.augment, how, (how["height"], how["width"]))

    def _weights(self) -> torch.Tensor | None:
        many = self.config.data.multi_label
        return class_weights(
            self.config.loss.class_weights,
            self.state["labels"]["names"],
            self.state["counts"],
            rows=self.state["rows"] if many else None,
        )

    def build(self, encoder: AdapterModel) -> TaskModel:
        options: dict[str, Any] = {
            "classes": len(self.labels.names),
            "weights": self._weights(),
        }
        if self.config.by_embeddings:
            names = spoken(self.labels.names, self.config.head.class_names)
            return EmbeddingClassifier(
                encoder,
                self.config,
                names=names,
                keys=self.state.get("keys", 0),
                weights=self._weights(),
            )
        if self.kind == "image":
            return ImageClassifier(encoder, self.config, **options)
        normalise = self.state["preprocessing"]["normalise"]
        return AudioClassifier(encoder, self.config, normalise=normalise, **options)

    def choose(self, rows: Rows) -> Rows:
        config = self.config
        bounds = [config.data.shots, config.head.shots if config.head.finetune else None]
        shots = [bound for bound in bounds if bound is not None]
        return rows if not shots else self._drawn(rows, min(shots))

    def _drawn(self, rows: Any, shots: int) -> Rows:
        chosen = few_shot.drawn(rows, self.labels, shots, seed=self.config.data.seed)
        return rows if len(chosen) == len(rows) else rows.select(chosen)

    def prepare(self, model: TaskModel, splits: Mapping[Split, Rows]) -> None:
        if not isinstance(model, EmbeddingClassifier):
            return
        model.text_weights()
        head, config = model.head, self.config.head
        if not isinstance(head, TipAdapterHead):
            return
        if None in (config.alpha, config.beta) and "validation" not in splits:
            raise ValueError(
                "head.alpha and head.beta are searched on a validation split, and there is none: "
                "cut one with data.fractions: {validation: 0.2}, or write both"
            )
        self._check_train(splits)
        if config.finetune:
            self._fill(model, head, splits)
            head.alpha.fill_(ALPHA if config.alpha is None else config.alpha)
            head.beta.fill_(BETA if config.beta is None else config.beta)

    def calibrate(self, model: TaskModel, splits: Mapping[Split, Rows]) -> dict[str, Any]:
        if not isinstance(model, EmbeddingClassifier):
            return {}
        model.text_weights()
        head, config = model.head, self.config.head
        if not isinstance(head, TipAdapterHead):
            return {}
        if not config.finetune:
            # The keys are computed after training, because the adapter changes the embeddings.
            self._fill(model, head, splits)
        alpha, beta = config.alpha, config.beta
        told: dict[str, Any] = {"keys": len(head.keys)}
        if alpha is None or beta is None:
            features, targets = few_shot.embedded(self, model, splits["validation"])
            alpha, beta, told["validation_accuracy"] = few_shot.search(
                head,
                features,
                targets,
                alphas=few_shot.ALPHAS if alpha is None else (alpha,),
                betas=few_shot.BETAS if beta is None else (beta,),
            )
        head.alpha.fill_(alpha)
        head.beta.fill_(beta)
        return {"tip_adapter": {**told, "alpha": alpha, "beta": beta}}

    def _check_train(self, splits: Mapping[Split, Rows]) -> None:
        if "train" not in splits:
            raise ValueError(
                "the cache of tip_adapter holds training pictures, and there is no training split: "
                "name it in data.splits"
            )

    def _fill(
        self, model: EmbeddingClassifier, head: TipAdapterHead, splits: Mapping[Split, Rows]
    ) -> None:
        self._check_train(splits)
        config = self.config.head
        rows = self._drawn(splits["train"], config.shots)
        head.fill(*few_shot.embedded(self, model, rows, epochs=config.augment_epochs))
        self.state["keys"] = len(head.keys)

    def example(self, row: Mapping[str, Any], *, train: bool) -> Example:
        classes = self.labels.indices(row.get("label"))
        if self.config.data.multi_label:
            target = torch.zeros(len(self.labels.names))
            target[classes] = 1
        else:
            target = torch.tensor(classes[0])
        return {**self._input(row.get(self.kind), train=train), "target": target}

    def unchanging_example(self, row: Mapping[str, Any]) -> Example:
        return self.example(row, train=False)

    def _input(self, value: Any, *, train: bool) -> Example:
        """Returns a row's picture or recording as a tensor; raises BadRow as `_read`."""
        read = self._read(value, train=train)
        if isinstance(read, Tensor):
            return {"wave": augment_audio(read, self.config.data.augment_audio) if train else read}
        how = self.state["preprocessing"]
        return {"pixels": self._augmenter(read) if train else to_tensor(read, how)}

    def _read(self, value: Any, *, train: bool) -> Image.Image | Tensor:
        """Returns a row's picture, or the samples (T,) of its recording.

        Raises:
            BadRow: it cannot be read, or the recording is too short.
        """
        how = self.state["preprocessing"]
        if value is None:
            raise BadRow(f"it has no {self.kind}")
        if self.kind == "image":
            return media.read_image(value, bits=how.get("bits"))
        samples = torch.from_numpy(media.read_audio(value, how["rate"]))
        bound = longest(how, self.config.data.max_seconds)
        if bound is not None:
            samples = cut(samples, bound, train=train)
        if len(samples) < how["least"]:
            raise BadRow(
                f"it lasts {1000 * len(samples) / how['rate']:.0f} ms; the encoder needs "
                f"{1000 * how['least'] / how['rate']:.0f} ms for one frame"
            )
        return samples

    def collate(self, examples: Sequence[Example]) -> Batch:
        batch: Batch = {}
        if self.kind == "image":
            batch["pixels"] = torch.stack([example["pixels"] for example in examples])
        else:
            waves = [example["wave"] for example in examples]
            batch["waves"] = pad_sequence(waves, batch_first=True)
            batch["lengths"] = torch.tensor([len(wave) for wave in waves])
        if "target" in examples[0]:
            batch["targets"] = torch.stack([example["target"] for example in examples])
        return batch

    def tower_rows(self, tower: str, example: Example) -> Sequence[TowerRow]:
        how = self.state["preprocessing"]
        # Pictures have one size. Whisper reads a fixed length, with silence after the end.
        if self.kind == "image" or how["longest"] is not None:
            return (TowerRow(),)
        return (TowerRow(tokens=conv_frames(len(example["wave"]), how["layers"])),)

    def randomness(self, rows: Rows) -> str | None:
        config = self.config.data
        if self.kind == "image":
            drawn = config.augment.drawn()
            return None if drawn is None else f"data.augment.{drawn}"
        audio = config.augment_audio
        if name := next((n for n in ("gain", "shift", "noise") if getattr(audio, n)), None):
            return f"data.augment_audio.{name}"
        bound = longest(self.state["preprocessing"], self.config.data.max_seconds)
        # A length that comes from a header is only about right.
        if bound is not None and not all(0 < n < bound - 2 for n in self.lengths(rows) or ()):
            return "where longer recordings are cut"
        return None

    def lengths(self, rows: Rows) -> list[int] | None:
        if self.kind == "image":
            return None
        rate = self.state["preprocessing"]["rate"]
        return [media.audio_samples(value, rate) for value in rows["audio"]]

    def records(self, model: TaskModel, batch: Batch) -> list[Record]:
        assert isinstance(model, Classifier)
        inputs = {key: value for key, value in batch.items() if key != "targets"}
        probabilities = model.probabilities(model.logits(**inputs)).float().cpu().numpy()
        targets = batch["targets"].cpu().numpy()
        if self.config.data.multi_label:
            targets = targets.astype(np.uint8)
        else:
            targets = targets.tolist()
        return [
            {"truth": truth, "probabilities": row}
            for truth, row in zip(targets, probabilities, strict=True)
        ]

    def score(self, records: Sequence[Record], *, bootstrap: int) -> Scores:
        truth = np.array([record["truth"] for record in records])
        probabilities = np.stack([record["probabilities"] for record in records])
        groups: dict[str, dict[str, list[Metric]]] = {}
        for column in self.config.evaluation.groups:
            values = np.array([str(record["row"].get(column)) for record in records])
            groups[column] = {
                str(value): self._metrics(truth[members], probabilities[members], bootstrap)
                for value in np.unique(values)
                for members in [values == value]
            }
        return Scores(
            self._metrics(truth, probabilities, bootstrap),
            groups,
            self._tables(truth, probabilities),
        )

    def _metrics(
        self, truth: np.ndarray, probabilities: np.ndarray, bootstrap: int
    ) -> list[Metric]:
        if self.config.data.multi_label:
            return metrics.multi_label(
                truth,
                probabilities,
                threshold=self.config.threshold,
                resamples=bootstrap,
                first=self.metric,
            )
        return metrics.single_label(truth, probabilities, resamples=bootstrap, first=self.metric)

    def _tables(self, truth: np.ndarray, probabilities: np.ndarray) -> list[Table]:
        names = self.labels.names
        if self.config.data.multi_label:
            return [of_labels(truth, probabilities, names, threshold=self.config.threshold)]
        matrix = metrics.confusion(truth, probabilities.argmax(axis=1), len(names))
        return [of_classes(matrix, names, self.state["counts"]), *confusions(matrix, names)]

    def tally(self) -> Tally:
        return Tally()

    def inspect(
        self, index: int, row: Mapping[str, Any], tally: Tally, *, train: bool
    ) -> str | None:
        self.labels.indices(row.get("label"))
        self._read(row.get(self.kind), train=False)
        return None

    def survey(self, rows: Rows) -> list[Table]:
        return [class_shares(self.labels, rows)]

    def findings(self, splits: Mapping[Split, Rows], *, whole: bool) -> list[Finding]:
        return label_findings(self.labels, self.state["counts"], splits)

    def illustrate(
        self, model: TaskModel, rows: Rows, records: Sequence[Record], *, count: int
    ) -> list[Figure | Table]:
        shown = pictures.Answers(
            self.labels.names, self.config.threshold, multi_label=self.config.data.multi_label
        )
        return shown.illustrate(rows, records, kind=self.kind, count=count)

    def predict(
        self,
        model: TaskModel,
        inputs: Sequence[str],
        *,
        out: Path | None,
        bad: InputErrors | None = None,
    ) -> Iterator[dict[str, Any]]:
        assert isinstance(model, Classifier)
        size = self.config.trainer.eval_batch_size or self.config.trainer.batch_size
        bad = bad or InputErrors()
        for start in range(0, len(inputs), size):
            names, examples = [], []
            for name in inputs[start : start + size]:
                with bad.guarded(name, f"{name} cannot be classified: "):
                    examples.append(self._input(name, train=False))
                    names.append(name)
            if not names:
                continue
            with torch.no_grad():
                batch = to_device(self.collate(examples), model.device)
                probabilities = model.probabilities(model.logits(**batch)).float().cpu()
            for name, row in zip(names, probabilities, strict=True):
                yield {"input": name, **self._answer(row)}
        bad.end()

    def _answer(self, probabilities: torch.Tensor) -> dict[str, Any]:
        names = self.labels.names
        best, order = probabilities.topk(min(self.config.top, len(names)))
        top = [
            {"label": names[index], "probability": round(value, 4)}
            for value, index in zip(best.tolist(), order.tolist(), strict=True)
        ]
        if self.config.data.multi_label:
            chosen = (probabilities >= self.config.threshold).nonzero().flatten().tolist()
            return {"labels": [names[index] for index in chosen], "top": top}
        return {**top[0], "top": top}


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
