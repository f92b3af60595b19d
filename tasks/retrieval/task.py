"""The retrieval task: images by texts and texts by images, on any image-text encoder.

Shape legend: B images, C captions of an image, T captions of a batch, E width of the embeddings,
L text tokens.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mmadapters import AdapterModel

from ..core.capabilities import CacheableInputs, DataChecks, ReportPictures, SecondPass, TowerRow
from ..core.errors import InputErrors, Problem
from ..core.model import TaskModel
from ..core.results import Figure, Scores, Table
from ..core.rows import Batch, Column, Example, Record, Rows
from ..core.task import Task
from ..data import media
from ..data.captions import COLUMNS, all_captions, captions_of, image_id, number_of, one_of_several
from ..data.examples import Examples
from ..data.workers import readers
from ..encoders.blip import is_blip
from ..encoders.blip_text import BlipTokens, blip_tokenizer
from ..encoders.clip import load_tokenizer, text_limits
from ..encoders.preprocessing import image_preprocessing, to_tensor
from .config import RetrievalConfig
from .gallery import Gallery
from .metrics import TO_IMAGE, TO_TEXT, grouped, recalls
from .model import RetrievalModel
from .pictures import figures
from .predict import matches
from .queries import Embedder
from .reranking import MatchingStage

if TYPE_CHECKING:
    from PIL import Image

HARDEST = 10  # queries in the table of those that went worst


class RetrievalTask(Task[RetrievalConfig], CacheableInputs, SecondPass, DataChecks, ReportPictures):
    """A row is an image with one caption or several; rows may share an image.

    `state`: "preprocessing" of the encoder, "blip", whether it is a BLIP, and "text", the limits
    and special tokens of its text tower.
    """

    name = "retrieval"
    metric = "mean R@1"
    columns: ClassVar[Mapping[str, Column]] = COLUMNS
    usage = "image files, .txt files with a text on each line, or texts in quotes"

    def fit(self, rows: Rows | None, backbone: nn.Module) -> None:
        if rows is not None and not {"caption", "captions"} & set(rows.column_names):
            raise ValueError(
                "retrieval needs a column of captions: name it in data.columns, as caption (one "
                f"text) or captions (a list); there are {', '.join(rows.column_names)}"
            )
        blip = is_blip(backbone)
        self.state = {
            "preprocessing": {
                **image_preprocessing(self.config.backbone, backbone),
                **media.picture_bits(self.config.data, rows),
            },
            "blip": blip,
            "text": BlipTokens.of(backbone).to_dict() if blip else text_limits(backbone),
        }

    def build(self, encoder: AdapterModel) -> RetrievalModel:
        return RetrievalModel(encoder, self.config)

    @functools.cached_property
    def tokenizer(self) -> Any:
        backbone, text = self.config.backbone, self.state["text"]
        if self.state["blip"]:
            return blip_tokenizer(backbone, BlipTokens(**text))
        return load_tokenizer(backbone, **text)

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Returns ids (T, L) int64 of captions or queries, each put into the template."""
        return self.tokenizer([self.sentence(caption) for caption in captions])

    def sentence(self, caption: str) -> str:
        """Returns a caption or query put into the template."""
        return self.config.data.template.replace("{}", caption)

    def pixels(self, image: Image.Image) -> Tensor:
        """Returns a picture as the encoder reads it, (3, H, W)."""
        return to_tensor(image, self.state["preprocessing"])

    def example(self, row: Mapping[str, Any], *, train: bool) -> Example:
        captions = captions_of(row)
        image = media.read_image(row["image"], bits=self.state["preprocessing"].get("bits"))
        if train:
            captions = [random.choice(captions)]
            image = _cropped(image, self.config.data.random_crop)
        example = {
            "pixels": self.pixels(image),
            "tokens": self.tokens(captions),
            "image_id": image_id(row),
            "text_ids": [number_of(caption.encode()) for caption in captions],
        }
        return example if train else {**example, "captions": captions}

    def collate(self, examples: Sequence[Example]) -> Batch:
        padding = self.state["text"].get("pad", 0)
        texts = [text for example in examples for text in example["tokens"]]
        batch: Batch = {
            "pixels": torch.stack([example["pixels"] for example in examples]),
            "tokens": pad_sequence(texts, batch_first=True, padding_value=padding),
            "image_ids": torch.tensor([example["image_id"] for example in examples]),
            "text_ids": torch.tensor([i for example in examples for i in example["text_ids"]]),
        }
        if "captions" in examples[0]:
            batch["captions"] = [example["captions"] for example in examples]
        return batch

    def tower_rows(self, tower: str, example: Example) -> Sequence[TowerRow]:
        if tower != "text":
            return (TowerRow(),)
        padding = self.state["text"].get("pad")
        if padding is None:  # every text has the encoder's full length, without padding
            return [TowerRow() for _ in example["tokens"]]
        return [TowerRow(tokens=int((text != padding).sum())) for text in example["tokens"]]

    def randomness(self, rows: Rows) -> str | None:
        if self.config.data.random_crop != 1:
            return "data.random_crop"
        return one_of_several(rows)

    def records(self, model: TaskModel, batch: Batch) -> list[Record]:
        assert isinstance(model, RetrievalModel)
        images = model.images(batch["pixels"]).cpu().numpy()
        texts = model.texts(batch["tokens"]).cpu().numpy()
        ends = np.cumsum([len(captions) for captions in batch["captions"]])
        return [
            {"image": image, "texts": embeddings, "image_id": number, "captions": captions}
            for image, embeddings, number, captions in zip(
                images,
                np.split(texts, ends[:-1]),
                batch["image_ids"].tolist(),
                batch["captions"],
                strict=True,
            )
        ]

    def refine(self, model: TaskModel, rows: Rows, records: list[Record]) -> None:
        assert isinstance(model, RetrievalModel)
        count = self.config.evaluation.rerank
        if records and count and model.matcher is not None:
            self.matching_stage(model, rows).rerank(records, count=count)

    def matching_stage(self, model: RetrievalModel, rows: Rows) -> MatchingStage:
        """Returns the second stage of a BLIP model on the rows."""
        trainer = self.config.trainer
        return MatchingStage(
            model,
            Examples(self, rows, train=False),
            self.tokens,
            batch_size=trainer.eval_batch_size or trainer.batch_size,
            workers=readers(trainer),
        )

    def embedder(self, model: RetrievalModel) -> Embedder:
        """Returns the model with all that turns queries into its inputs."""
        return Embedder(
            model, self.tokens, self.pixels, bits=self.state["preprocessing"].get("bits")
        )

    def score(self, records: Sequence[Record], *, bootstrap: int) -> Scores:
        gallery = Gallery.of(records)
        image_ranks = gallery.direction(TO_TEXT).ranks()
        text_ranks = gallery.direction(TO_IMAGE).ranks()
        images, image_of = gallery.numbers.numpy(), gallery.image_of.numpy()

        def of(some: np.ndarray, other: np.ndarray) -> list:
            return recalls(
                image_ranks[some],
                text_ranks[other],
                images=images[some],
                image_of=image_of[other],
                deciding=self.metric,
                resamples=bootstrap,
            )

        groups = {
            column: {
                value: of(*queries)
                for value, queries in grouped(
                    [record["row"].get(column) for record in records],
                    gallery.first,
                    gallery.record_of,
                ).items()
            }
            for column in self.config.evaluation.groups
        }
        everything = np.ones(len(images), dtype=bool), np.ones(len(image_of), dtype=bool)
        return Scores(of(*everything), groups, _tables(gallery, text_ranks))

    def illustrate(
        self, model: TaskModel, rows: Rows, records: Sequence[Record], *, count: int
    ) -> list[Figure | Table]:
        return list(figures(Gallery.of(records), rows, records, count=count))

    def predict(
        self,
        model: TaskModel,
        inputs: Sequence[str],
        *,
        out: Path | None,
        bad: InputErrors | None = None,
    ) -> Iterator[dict[str, Any]]:
        assert isinstance(model, RetrievalModel)
        yield from matches(self.embedder(model), inputs, out=out, bad=bad or InputErrors())

    def check(self, rows: Rows) -> list[Problem]:
        """Returns problems of captions that are longer than the encoder reads."""
        length = self.state["text"]["context_length"]
        problems = []
        for index, texts in enumerate(all_captions(rows)):
            longest = max((self.tokenizer.count(self.sentence(text)) for text in texts), default=0)
            if longest > length:
                reason = f"a caption of {longest} tokens is cut to the {length} that are read"
                problems.append(Problem(index, reason))
        return problems


def _cropped(image: Image.Image, least: float) -> Image.Image:
    """Returns a random part of the picture, of at least this share of its area."""
    if least == 1:
        return image
    from torchvision.transforms import RandomResizedCrop

    top, left, height, width = RandomResizedCrop.get_params(
        image,
        scale=[least, 1.0],
        ratio=[3 / 4, 4 / 3],
    )
    return image.crop((left, top, left + width, top + height))


def _tables(gallery: Gallery, text_ranks: np.ndarray) -> list[Table]:
    worst = np.argsort(-text_ranks, kind="stable")[:HARDEST]
    hardest = Table(
        "Texts that find their image last",
        ("text", "rank of its image"),
        [(gallery.captions[text], int(text_ranks[text]) + 1) for text in worst],
        f"Among {len(gallery.images):,} images; a guess is right once in as many.",
    )
    return [hardest]
