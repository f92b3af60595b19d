"""The task of semantic segmentation: the class of every pixel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmadapters import AdapterModel

from ..config.schema import Split
from ..core.capabilities import CacheableInputs, DataChecks, ReportPictures, inspected
from ..core.errors import InputErrors, Problem
from ..core.files import output_names
from ..core.findings import Finding
from ..core.model import TaskModel
from ..core.results import Figure, Scores, Table
from ..core.rows import Column, Rows
from ..core.task import Task
from ..data.media import exif_orientation, image_size, picture_bits, read_image
from ..encoders.vision import image_preprocessing
from . import metrics, pictures
from .checks import MaskCounts, count_masks, mask_findings
from .coco import lines_among
from .config import SegmentationConfig
from .inference import predict_classes
from .labels import Labels, check_outside, class_names
from .model import SegmentationModel
from .orientation import Drawn
from .transforms import Augmentation, crop_size, prepare, target_size


class SegmentationTask(Task[SegmentationConfig], CacheableInputs, DataChecks, ReportPictures):
    """Predicts the class of every pixel of images; trains on masks or COCO segments.

    `state` holds "classes", the names by id, and the "preprocessing" of the encoder.
    """

    name = "segmentation"
    metric = "mIoU"
    usage = "image files"
    columns: ClassVar[Mapping[str, Column]] = {
        "image": Column("image", description="the picture"),
        "mask": Column("mask", required=False, description="a picture of class ids or colours"),
        "segments": Column(
            "segments", required=False, description="COCO annotations, instead of a mask"
        ),
    }

    def fit(self, rows: Rows | None, backbone: nn.Module) -> None:
        if rows is not None and not {"mask", "segments"} & set(rows.column_names):
            raise ValueError(
                "the data has no column 'mask' (a picture of class ids) and none of COCO segments; "
                f"its columns are {', '.join(rows.column_names)}: say which one it is by "
                "data.columns: {mask: ITS_COLUMN}"
            )
        names = class_names(self.config.data, rows)
        check_outside(self.config.data, names, rows)
        self.state = {
            "classes": names,
            "preprocessing": {
                **image_preprocessing(self.config.backbone, backbone),
                **picture_bits(self.config.data, rows),
            },
        }

    def build(self, encoder: AdapterModel) -> TaskModel:
        return SegmentationModel(encoder, self.config, self.classes)

    @property
    def bits(self) -> int | None:
        """Returns the bits in use in pictures with 16 bits a channel; None for all 16."""
        return self.state["preprocessing"].get("bits")

    @property
    def classes(self) -> tuple[str, ...]:
        """Returns the names of the classes by id."""
        return tuple(self.state["classes"])

    @cached_property
    def labels(self) -> Labels:
        """Returns the reader of masks."""
        return Labels(self.config.data, self.classes)

    @cached_property
    def augment(self) -> Augmentation:
        """Returns the augmentation of training."""
        preprocessing = self.state["preprocessing"]
        return Augmentation(
            self.config.transforms,
            crop=crop_size(self.config.transforms, preprocessing),
            preprocessing=preprocessing,
            ignore=self.labels.ignore,
        )

    @cached_property
    def colours(self) -> pictures.Colours:
        """Returns the colours of the classes, (C, 3) uint8."""
        return pictures.colours_of(self.classes, self.config.data.palette)

    @property
    def background(self) -> int | None:
        """Returns the id of the class that is no object, or None."""
        name = self.config.data.background
        return self.classes.index(name) if name in self.classes else None

    @cached_property
    def cacheable_inputs(self) -> Mapping[str, str]:  # type: ignore[override]
        """Returns the cacheable inputs: none for heads that also read the pixels."""
        head = self.config.head
        reads = head.kind == "fpn" or head.neck is not None
        return {} if reads else {"pixels": "vision"}

    def randomness(self, rows: Rows) -> str | None:
        config = self.config.transforms
        if (setting := config.random_setting()) is not None:
            return f"transforms.{setting}"
        # A crop is not random if no picture, turned by its EXIF data or not, is larger.
        crop = self.augment.crop
        for index in range(len(rows)):
            size = image_size(rows[index]["image"])
            if size is None:
                return "transforms.crop"
            scaled = target_size(config, size, factor=config.scale[0])
            if max(scaled) > min(crop):
                return "transforms.crop"
        return None

    def one_pass(self, rows: Rows) -> str | None:
        if self.config.trainer.eval_batch_size == 1:
            return None
        return (
            "pictures of several sizes run one size at a time (with trainer.eval_batch_size 1 "
            "there is one size)"
        )

    def example(self, row: Mapping[str, Any], *, train: bool) -> dict[str, Any]:
        image = read_image(row["image"], bits=self.bits)
        mask = self.labels.read(row, (image.height, image.width))
        if train:
            pixels, cut = self.augment(image, mask)
            return {"pixels": pixels, "mask": cut}
        pixels = prepare(image, self.config.transforms, self.state["preprocessing"])
        return {"pixels": pixels, "mask": torch.from_numpy(mask)}

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Stacks examples of one size, as in training; keeps lists of others."""
        batch = {key: [example[key] for example in examples] for key in ("pixels", "mask")}
        return {
            key: torch.stack(values) if len({value.shape for value in values}) == 1 else values
            for key, values in batch.items()
        }

    def predictions(
        self, model: TaskModel, pixels: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """Predicts class maps (H, W) of the original sizes from pictures that `prepare` made."""
        assert isinstance(model, SegmentationModel)
        return predict_classes(model.logits, pixels, sizes, self.config.inference)

    def records(self, model: TaskModel, batch: dict[str, Any]) -> list[dict[str, Any]]:
        masks = batch["mask"]
        sizes = [(mask.shape[0], mask.shape[1]) for mask in masks]
        predicted = self.predictions(model, batch["pixels"], sizes)
        return [
            {
                "counts": metrics.count(
                    prediction,
                    mask,
                    classes=len(self.classes),
                    ignore=self.labels.ignore,
                    tolerance=self.config.evaluation.boundary_tolerance,
                )
            }
            for prediction, mask in zip(predicted, masks, strict=True)
        ]

    def score(self, records: Sequence[dict[str, Any]], *, bootstrap: int) -> Scores:
        counts = [record["counts"] for record in records]
        options: dict[str, Any] = {
            "background": self.config.data.background,
            "resamples": bootstrap,
            "first": self.metric,
        }
        groups: dict[str, dict[str, list]] = {}
        for column in self.config.evaluation.groups:
            values = [str(record["row"].get(column)) for record in records]
            groups[column] = {
                value: metrics.metrics(
                    [part for part, group in zip(counts, values, strict=True) if group == value],
                    self.classes,
                    **options,
                )
                for value in sorted(set(values))
            }
        tables = [metrics.class_table(counts, self.classes, resamples=bootstrap)]
        if len(self.classes) > 2:
            matrix = metrics.confusion(counts, len(self.classes))
            tables.append(metrics.confused(matrix, self.classes))
        return Scores(metrics.metrics(counts, self.classes, **options), groups, tables)

    def illustrate(
        self,
        model: TaskModel,
        rows: Rows,
        records: Sequence[dict[str, Any]],
        *,
        count: int,
    ) -> list[Figure | Table]:
        """Draws the best, median and worst images: picture, truth, prediction, errors."""
        scores = metrics.image_iou([record["counts"] for record in records], len(self.classes))
        chosen = _best_median_worst(scores, count)
        return [
            self._figure(model, rows, records[place]["index"], kind, float(scores[place]))
            for kind, place in chosen
        ]

    def _figure(self, model: TaskModel, rows: Rows, index: int, kind: str, score: float) -> Figure:
        row = rows[index]
        image = read_image(row["image"], bits=self.bits)
        truth = self.labels.read(row, (image.height, image.width)).astype(np.int64)
        prediction = self._predict_one(model, image)
        panels = {
            "image": np.asarray(image),
            "truth": pictures.overlay(image, truth, self.colours, clear=self.background),
            "prediction": pictures.overlay(image, prediction, self.colours, clear=self.background),
            "errors": pictures.errors(prediction, truth, self.labels.ignore),
        }
        shown = sorted({*np.unique(truth).tolist(), *np.unique(prediction).tolist()})
        legend = {
            self.classes[number]: self.colours[number]
            for number in shown
            if number < len(self.classes) and number != self.background
        }
        legend |= {"right": pictures.RIGHT, "wrong": pictures.WRONG}
        if self.labels.ignore in shown:
            legend["ignored"] = pictures.IGNORED
        title = f"{kind}: mIoU {100 * score:.1f} %, row {index}"
        return Figure(title, pictures.comparison(panels, legend))

    def _predict_one(self, model: TaskModel, image: Image.Image) -> np.ndarray:
        """Predicts the classes (H, W) int64 of one picture."""
        pixels = prepare(image, self.config.transforms, self.state["preprocessing"])
        with torch.no_grad():
            size = (image.height, image.width)
            (classes,) = self.predictions(model, [pixels.to(model.device)], [size])
        return classes.cpu().numpy()

    def predict(
        self,
        model: TaskModel,
        inputs: Sequence[str],
        *,
        out: Path | None,
        bad: InputErrors | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yields the share of each class in each image.

        With `out`, it also writes `<name>_mask.png` (class ids, with a palette) and
        `<name>_overlay.png`, see `output_names`.
        """
        names = output_names(inputs)
        bad = bad or InputErrors()
        for number, name in enumerate(inputs):
            image = None
            with bad.guarded(name, f"{name}: "):
                image = read_image(name, bits=self.bits)
            if image is None:
                continue
            classes = self._predict_one(model, image)
            shares = np.bincount(classes.ravel(), minlength=len(self.classes)) / classes.size
            result: dict[str, Any] = {
                "input": name,
                "height": image.height,
                "width": image.width,
                "shares": {
                    label: round(float(share), 6)
                    for label, share in zip(self.classes, shares, strict=True)
                },
            }
            if out is not None:
                result |= self._write(out, names[number], image, classes)
            yield result
        bad.end()

    def _write(
        self, out: Path, name: str, image: Image.Image, classes: np.ndarray
    ) -> dict[str, str]:
        mask, overlay = out / f"{name}_mask.png", out / f"{name}_overlay.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        pictures.write_mask(mask, classes, self.colours)
        mixed = pictures.overlay(image, classes, self.colours, clear=self.background)
        pictures.write_png(overlay, Image.fromarray(mixed))
        return {"mask": str(mask), "overlay": str(overlay)}

    def tally(self) -> MaskCounts:
        return MaskCounts.none(self.labels)

    def inspect(
        self, index: int, row: Mapping[str, Any], tally: MaskCounts, *, train: bool
    ) -> str | None:
        """Counts the pixels of a mask, and finds masks in which all pixels are ignored and segments
        that cover nothing."""
        image = read_image(row["image"], bits=self.bits)
        size = (image.height, image.width)
        mask = self.labels.read(row, size)
        drawn = Drawn(1, size)
        if exif_orientation(row["image"]) != 1:
            drawn = self.labels.drawn(row, size, guesses=True)
        tally.add(index, mask, drawn)
        if (mask == self.labels.ignore).all():
            return "every pixel of the mask is ignored"
        numbers = lines_among(row["segments"]) if row.get("segments") is not None else []
        if numbers:
            some = ", ".join(map(str, numbers[:5]))
            return (
                f"segments {some} have no outline, or one of one or two corners, and are left out"
            )
        return None

    def check(self, rows: Rows) -> list[Problem]:
        return inspected(self, rows)[0]

    def survey(self, rows: Rows) -> list[Table]:
        return self.tables(rows, inspected(self, rows)[1])

    def tables(self, rows: Rows, tally: MaskCounts) -> list[Table]:
        """Returns how many pixels and images have each class."""
        return [tally.table(self.classes)]

    def conclusions(
        self, splits: Mapping[Split, Rows], tallies: Mapping[Split, MaskCounts]
    ) -> list[Finding]:
        return mask_findings(self.config.data, self.labels, tallies, whole=True)

    def findings(self, splits: Mapping[Split, Rows], *, whole: bool) -> list[Finding]:
        counts = {split: count_masks(self.labels, rows) for split, rows in splits.items()}
        return mask_findings(self.config.data, self.labels, counts, whole=whole)


def _best_median_worst(scores: np.ndarray, count: int) -> list[tuple[str, int]]:
    """Returns the kinds and indices of `count` scores, about a third of each kind, without NaNs."""
    order = np.argsort(-scores, kind="stable")
    order = order[~np.isnan(scores[order])]
    count = min(count, len(order))
    best, worst = (count + 2) // 3, (count + 1) // 3
    middle = count - best - worst
    rest = order[best : len(order) - worst]
    start = (len(rest) - middle) // 2
    parts = {
        "best": order[:best],
        "median": rest[start : start + middle],
        "worst": order[len(order) - worst :],
    }
    return [(kind, int(place)) for kind, places in parts.items() for place in places]
