"""The captioning task: BLIP learns to write what an image shows."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mmadapters import AdapterModel

from ..core.capabilities import CacheableInputs, DataChecks, ReportPictures, TowerRow
from ..core.errors import InputErrors, Problem
from ..core.model import TaskModel
from ..core.results import Figure, Scores, Table
from ..core.rows import Batch, Column, Example, Record, Rows
from ..core.task import Task
from ..data import media
from ..data.captions import (
    COLUMNS,
    all_captions,
    caption_rows,
    captions_of,
    image_id,
    one_of_several,
    stated_captions,
)
from ..encoders.blip import is_blip
from ..encoders.blip_text import BlipTokenizer, BlipTokens, blip_tokenizer
from ..encoders.preprocessing import image_preprocessing, to_tensor
from . import metrics, pictures
from .config import CaptioningConfig
from .model import CaptioningModel

PREDICTED_AT_ONCE = 32
SHORTEST = 4  # tokens of a caption for which a prompt must leave room


class CaptioningTask(Task[CaptioningConfig], CacheableInputs, DataChecks, ReportPictures):
    """A row is an image with one caption or several; rows may share an image.

    `state`: "preprocessing" of the encoder, and "text", the decoder's special tokens and limits.
    """

    name = "captioning"
    metric = metrics.CIDER
    columns: ClassVar[Mapping[str, Column]] = COLUMNS
    usage = "image files"

    def __init__(self, config: CaptioningConfig, state: dict[str, Any] | None = None) -> None:
        super().__init__(config, state)
        self.greater_is_better = self.metric != metrics.PERPLEXITY  # type: ignore[misc]

    def fit(self, rows: Rows | None, backbone: nn.Module) -> None:
        if rows is not None and not {"caption", "captions"} & set(rows.column_names):
            raise ValueError(
                "captioning needs a column of captions: name it in data.columns, as caption (one "
                f"text) or captions (a list); there are {', '.join(rows.column_names)}"
            )
        name = self.config.backbone.name
        if not is_blip(backbone) or type(backbone).__name__ != "BlipForConditionalGeneration":
            raise ValueError(
                f"captioning needs a BLIP that writes captions, and {name} is a "
                f"{type(backbone).__name__}: set backbone.name to nano/blip-caption, to "
                "hf/Salesforce/blip-image-captioning-base or, for one of its own config, to "
                "hf/blip-caption"
            )
        preprocessing = image_preprocessing(self.config.backbone, backbone)
        resize = self.config.data.resize
        preprocessing |= {"resize": resize, "crop": 1.0} if resize != "shortest" else {}
        preprocessing |= media.picture_bits(self.config.data, rows)
        self.state = {"preprocessing": preprocessing, "text": BlipTokens.of(backbone).to_dict()}
        if self.length < SHORTEST:
            raise ValueError(
                f"data.prompt has {len(self.prompt) - 1} tokens and leaves no room for captions in "
                f"the {self.tokenizer.length} that {name} reads: shorten it"
            )

    @functools.cached_property
    def tokenizer(self) -> BlipTokenizer:
        return blip_tokenizer(self.config.backbone, BlipTokens(**self.state["text"]))

    @functools.cached_property
    def prompt(self) -> Tensor:
        """(P,) int64: [DEC] and the tokens with which every caption begins."""
        return self.tokenizer.answers([self.config.data.prompt])[0, :-1]

    @property
    def length(self) -> int:
        """The most tokens of a caption, with start and end and without the prompt."""
        room = self.tokenizer.length - len(self.prompt) + 1
        return min(self.config.data.caption_length, room)

    def build(self, encoder: AdapterModel) -> CaptioningModel:
        return CaptioningModel(encoder, self.config, prompt=self.prompt)

    def example(self, row: Mapping[str, Any], *, train: bool) -> Example:
        captions = captions_of(row)
        pixels = self.pixels(row["image"])
        if train and self.config.data.captions == "one":
            captions = [random.choice(captions)]
        return {
            "pixels": pixels,
            "tokens": self.tokens(captions),
            "reference": {"image_id": image_id(row), "captions": captions},
        }

    def pixels(self, image: Any) -> Tensor:
        """Returns a picture as the encoder reads it, (3, H, W).

        Raises:
            BadRow: the picture cannot be read.
        """
        how = self.state["preprocessing"]
        return to_tensor(media.read_image(image, bits=how.get("bits")), how)

    def tokens(self, captions: Sequence[str]) -> list[Tensor]:
        """Returns the ids (T,) of each caption: [DEC] prompt caption [SEP]."""
        cut = BlipTokenizer(self.tokenizer.source, self.tokenizer.tokens, length=self.length)
        return [torch.cat([self.prompt, cut([caption])[0, 1:]]) for caption in captions]

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Returns a batch with every image once, even if several rows share it."""
        references = [example["reference"] for example in examples]
        places: dict[int, int] = {}
        image_of_row = [places.setdefault(r["image_id"], len(places)) for r in references]
        firsts = {place: row for row, place in reversed([*enumerate(image_of_row)])}
        counts = torch.tensor([len(example["tokens"]) for example in examples])
        return {
            "pixels": torch.stack([examples[firsts[n]]["pixels"] for n in range(len(firsts))]),
            "tokens": pad_sequence(
                [ids for example in examples for ids in example["tokens"]],
                batch_first=True,
                padding_value=self.state["text"]["pad"],
            ),
            "image_of": torch.tensor(image_of_row).repeat_interleave(counts),
            "weights": (1 / counts / len(examples)).repeat_interleave(counts),
            "references": [
                {**reference, "image": place}
                for reference, place in zip(references, image_of_row, strict=True)
            ],
        }

    def tower_rows(self, tower: str, example: Example) -> Sequence[TowerRow]:
        return (TowerRow(key=str(example["reference"]["image_id"])),)

    def randomness(self, rows: Rows) -> str | None:
        return one_of_several(rows) if self.config.data.captions == "one" else None

    def records(self, model: TaskModel, batch: Batch) -> list[Record]:
        assert isinstance(model, CaptioningModel)
        images = model.captioner.image_tokens(batch["pixels"])
        written = self.tokenizer.decode(model.generate(images))
        sums, counts = model.likelihoods(images, batch["tokens"], batch["image_of"])
        captions = [len(reference["captions"]) for reference in batch["references"]]
        return [
            {
                "image_id": reference["image_id"],
                "caption": written[reference["image"]],
                "captions": reference["captions"],
                "likelihood": float(likelihoods.sum()),
                "tokens": int(number.sum()),
            }
            for reference, likelihoods, number in zip(
                batch["references"],
                sums.cpu().split(captions),
                counts.cpu().split(captions),
                strict=True,
            )
        ]

    def score(self, records: Sequence[Record], *, bootstrap: int) -> Scores:
        evaluation = self.config.evaluation
        return metrics.scores(
            records, deciding=self.metric, groups=evaluation.groups, resamples=bootstrap
        )

    def illustrate(
        self, model: TaskModel, rows: Rows, records: Sequence[Record], *, count: int
    ) -> list[Figure | Table]:
        return pictures.illustrate(rows, metrics.images_of(records), count=count)

    def predict(
        self,
        model: TaskModel,
        inputs: Sequence[str],
        *,
        out: Path | None,
        bad: InputErrors | None = None,
    ) -> Iterator[dict[str, Any]]:
        assert isinstance(model, CaptioningModel)
        bad = bad or InputErrors()
        for start in range(0, len(inputs), PREDICTED_AT_ONCE):
            read: dict[int, Tensor] = {}
            for number, path in enumerate(inputs[start : start + PREDICTED_AT_ONCE], start):
                with bad.guarded(path, f"{path}: "):
                    read[number] = self.pixels(path)
            if not read:
                continue
            pixels = torch.stack([*read.values()]).to(model.device)
            with torch.no_grad():
                written = model.generate(model.captioner.image_tokens(pixels))
            for number, caption in zip(read, self.tokenizer.decode(written), strict=True):
                yield {"image": inputs[number], "caption": caption}
        bad.end()

    def check(self, rows: Rows) -> list[Problem]:
        """Returns problems of captions that are cut, and of empty ones among others."""
        problems = []
        for index, row in enumerate(caption_rows(rows)):
            texts = [text for text in stated_captions(row) if isinstance(text, str)]
            longest = max((self.tokenizer.count(text) for text in texts), default=0)
            empty = sum(not text.strip() for text in texts)
            if longest > self.length:
                reason = f"a caption of {longest} tokens is cut to the {self.length} that are read"
            elif empty:
                reason = f"{empty} of its {len(texts)} captions say nothing and are left out"
            else:
                continue
            problems.append(Problem(index, reason))
        return problems

    def survey(self, rows: Rows) -> list[Table]:
        """Returns a table with the number of captions and the numbers of their words."""
        captions = [text for texts in all_captions(rows) for text in texts]
        lengths = sorted(len(text.split()) for text in captions)
        if not lengths:
            return []
        line = (len(captions), lengths[0], lengths[len(lengths) // 2], lengths[-1])
        columns = ("captions", "fewest words", "median", "most")
        return [Table("Captions", columns, [line])]
