"""The visual question answering task."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mmadapters import AdapterModel

from ..core.capabilities import BatchGrouping, CacheableInputs, DataChecks, ReportPictures, TowerRow
from ..core.errors import BadRow, InputErrors, Problem
from ..core.model import TaskModel
from ..core.results import Figure, Scores, Table
from ..core.rows import Batch, Column, Example, Record, Rows
from ..core.task import Task
from ..data import media
from ..encoders.blip import is_blip
from ..encoders.blip_text import BlipTokens, blip_tokenizer
from ..encoders.clip import load_tokenizer, text_limits
from ..encoders.preprocessing import image_preprocessing, to_tensor
from . import metrics, pictures
from .answers import MANY, Vocabulary, all_answers, answers_of
from .blip import BlipVQA
from .clip import ClipVQA
from .config import VQAConfig

BEST = 5  # answers of a record and of a prediction
OF_CLIP, OF_BLIP = ("fusion", "bilinear", "coattention"), ("ranking", "generation")
SEPARATOR = "::"
PREDICTED_AT_ONCE = 32
_REMEMBERED = 20_000  # questions whose ids are kept


class VQATask(Task[VQAConfig], CacheableInputs, BatchGrouping, DataChecks, ReportPictures):
    """A row is an image, a question and one answer or several.

    `state`: "preprocessing" of the encoder; "text", the limits and special tokens of its text
    tower; "head", its kind; "answers", the vocabulary (None if nothing is trained); "official",
    whether the rules of the VQA challenge say which answers are the same; "several", whether
    training questions have several answers.
    """

    name = "vqa"
    metric = "accuracy"
    columns: ClassVar[Mapping[str, Column]] = {
        "image": Column("image", description="the picture"),
        "question": Column("text", description="what is asked about it"),
        "answer": Column("text", required=False, description="the answer"),
        "answers": Column("texts", required=False, description="or those of several people"),
        "image_id": Column(
            "text", required=False, description="rows of one image; without it, equal files"
        ),
    }
    usage = f"pairs of an image and a question: 'photo.jpg{SEPARATOR}what is on the table?'"

    def fit(self, rows: Rows | None, backbone: nn.Module) -> None:
        blip = is_blip(backbone)
        preprocessing = image_preprocessing(self.config.backbone, backbone)
        resize = self.config.data.resize
        preprocessing |= {"resize": resize, "crop": 1.0} if resize != "shortest" else {}
        preprocessing |= media.picture_bits(self.config.data, rows)
        self.state = {
            "preprocessing": preprocessing,
            "head": _head_kind(self.config.head.kind, blip=blip),
            "text": BlipTokens.of(backbone).to_dict() if blip else text_limits(backbone),
            "answers": None,
            "official": False,
            "several": False,
        }
        if rows is not None:
            self._fit_answers(rows)
        elif self.state["head"] != "generation":
            raise ValueError(
                "there are no training answers to choose from: give a training split, or answer "
                "with BLIP by head.kind: generation"
            )

    def _fit_answers(self, rows: Rows) -> None:
        if not {"answer", "answers"} & set(rows.column_names):
            raise ValueError(
                "vqa needs a column of answers: name it in data.columns, as answer (one text) or "
                f"answers (a list); there are {', '.join(rows.column_names)}"
            )
        questions = [answers for answers in all_answers(rows) if answers is not None]
        if not questions:
            raise ValueError("no row of the training split has an answer")
        config = self.config.answers
        several = max(map(len, questions)) >= MANY
        official = config.normalise == "official" or (config.normalise == "auto" and several)
        vocabulary = Vocabulary.counted(
            questions, size=config.size, min_count=config.min_count, official=official
        )
        self.state |= {"answers": vocabulary.answers, "official": official, "several": several}

    @functools.cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The answers of the training split; None if nothing is trained."""
        answers = self.state["answers"]
        return None if answers is None else Vocabulary(answers, official=self.state["official"])

    @property
    def blip(self) -> bool:
        """Whether BLIP's decoder answers."""
        return self.state["head"] in OF_BLIP

    @functools.cached_property
    def tokenizer(self) -> Any:
        backbone, text = self.config.backbone, self.state["text"]
        length = self.config.data.question_length
        if self.blip:
            return blip_tokenizer(backbone, BlipTokens(**text), length=length)
        if length is not None:
            text = {**text, "context_length": min(length, text["context_length"])}
        return load_tokenizer(backbone, **text)

    @functools.cached_property
    def candidates(self) -> Tensor:
        """(M, T): ids of the vocabulary's answers for BLIP's decoder."""
        assert self.vocabulary is not None
        return self.tokenizer.answers(self.vocabulary.answers)

    def build(self, encoder: AdapterModel) -> ClipVQA | BlipVQA:
        if self.blip:
            if self.config.trainer.mode == "head" and not self.config.blip.train_lm_head:
                raise ValueError(
                    "trainer.mode head would train nothing: BLIP answers by its own decoder; set "
                    "blip.train_lm_head to train a copy of its last layers"
                )
            return BlipVQA(encoder, self.config.blip)
        assert self.vocabulary is not None
        loss = self.config.head.loss
        binary = loss == "binary_cross_entropy" or (loss == "auto" and self.state["several"])
        head = self.config.head.model_copy(update={"kind": self.state["head"]})
        return ClipVQA(encoder, head, answers=len(self.vocabulary), binary=binary)

    def example(self, row: Mapping[str, Any], *, train: bool) -> Example:
        example = self.asked(row["image"], row.get("question"), image_id=row.get("image_id"))
        answers = answers_of(row)
        example["reference"]["answers"] = answers
        if not train:
            return example
        if self.blip:
            shares = Counter(map(self._spelt, answers))
            example["answers"] = self.tokenizer.answers(list(shares))
            example["weights"] = torch.tensor([n / len(answers) for n in shares.values()])
        else:
            assert self.vocabulary is not None
            example["targets"] = torch.zeros(len(self.vocabulary))
            for number, value in self.vocabulary.targets(answers).items():
                example["targets"][number] = value
        return example

    def _spelt(self, answer: str) -> str:
        return answer if self.vocabulary is None else self.vocabulary.spelt(answer)

    def asked(self, image: Any, question: Any, *, image_id: Any = None) -> Example:
        """Returns the example of an image and a question about it, without answers.

        Raises:
            BadRow: one of them cannot be read.
        """
        if not isinstance(question, str) or not question.strip():
            raise BadRow("there is no question" if not question else f"{question!r} is no question")
        question = " ".join(question.split())
        tokens = self._tokens(question)
        key = image_key(image) if image_id in (None, "") else str(image_id)
        return {
            "pixels": self._pixels(image, key),
            "tokens": tokens,
            "reference": {"image": key, "question": question},
        }

    def _tokens(self, question: str) -> Tensor:
        """Returns the ids of a question. They are kept, because most questions come many times."""
        known: dict[str, Tensor] = self.__dict__.setdefault("_ids_of", {})
        if question not in known:
            if len(known) >= _REMEMBERED:
                known.clear()
            ask = self.tokenizer.with_image if self.blip else self.tokenizer
            known[question] = ask([question])[0]
        return known[question]

    def _pixels(self, image: Any, key: str) -> Tensor:
        """Returns an image as (3, H, W).

        The last image is kept, because rows with the same image mostly follow each other.
        """
        last = self.__dict__.get("_last")
        if last is None or last[0] != key:
            how = self.state["preprocessing"]
            last = (key, to_tensor(media.read_image(image, bits=how.get("bits")), how))
            self.__dict__["_last"] = last
        return last[1]

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Returns a batch with every image once, and for CLIP every question's text once."""
        references = [example["reference"] for example in examples]
        images, image_of = _unique([reference["image"] for reference in references])
        batch: Batch = {
            "pixels": torch.stack([examples[first]["pixels"] for first in images]),
            "image_of": torch.tensor(image_of),
            "references": references,
        }
        if not self.blip:
            texts, text_of = _unique([reference["question"] for reference in references])
            batch["tokens"] = torch.stack([examples[first]["tokens"] for first in texts])
            batch["text_of"] = torch.tensor(text_of)
            if "targets" in examples[0]:
                batch["targets"] = torch.stack([example["targets"] for example in examples])
            return batch
        batch["tokens"] = self._padded([example["tokens"] for example in examples])
        if "answers" in examples[0]:
            counts = torch.tensor([len(example["answers"]) for example in examples])
            batch["answers"] = self._padded([ids for e in examples for ids in e["answers"]])
            batch["question_of"] = torch.arange(len(examples)).repeat_interleave(counts)
            batch["weights"] = torch.cat([example["weights"] for example in examples])
        return batch

    def tower_rows(self, tower: str, example: Example) -> Sequence[TowerRow]:
        reference = example["reference"]
        if tower == "vision":
            return (TowerRow(key=reference["image"]),)
        if not self.blip:
            return (TowerRow(key=reference["question"]),)
        return (TowerRow(tokens=len(example["tokens"])),)

    def randomness(self, rows: Rows) -> str | None:
        return None

    def _padded(self, ids: Sequence[Tensor]) -> Tensor:
        return pad_sequence(list(ids), batch_first=True, padding_value=self.state["text"]["pad"])

    def records(self, model: TaskModel, batch: Batch) -> list[Record]:
        return [
            {**reference, "prediction": best[0][0], "probability": best[0][1], "best": best}
            for reference, best in zip(batch["references"], self._best(model, batch), strict=True)
        ]

    def _best(self, model: TaskModel, batch: Batch) -> list[list[tuple[str, float]]]:
        """Returns the likeliest answers to each question with their probabilities, best first."""
        if isinstance(model, ClipVQA):
            output = model(**{k: v for k, v in batch.items() if k != "targets"})
            shares = model.probabilities(output["logits"])
            return self._named(*shares.topk(min(BEST, shares.shape[1]), dim=1))
        assert isinstance(model, BlipVQA)
        states, mask = model.question_states(batch["pixels"], batch["tokens"], batch["image_of"])
        if self.state["head"] == "ranking":
            shares, numbers = model.rank(states, mask, self.candidates)
            return self._named(shares[:, :BEST], numbers[:, :BEST])
        answers, likelihoods = model.generate(states, mask)
        texts = [self._spelt(text) for text in self.tokenizer.decode(answers)]
        return [[pair] for pair in zip(texts, likelihoods.tolist(), strict=True)]

    def _named(self, shares: Tensor, numbers: Tensor) -> list[list[tuple[str, float]]]:
        assert self.vocabulary is not None
        names = self.vocabulary.answers
        return [
            [(names[number], share) for number, share in zip(*row, strict=True)]
            for row in zip(numbers.tolist(), shares.tolist(), strict=True)
        ]

    def score(self, records: Sequence[Record], *, bootstrap: int) -> Scores:
        return metrics.scores(
            records,
            self.vocabulary,
            limited=self.state["head"] != "generation",
            groups=self.config.evaluation.groups,
            resamples=bootstrap,
        )

    def illustrate(
        self, model: TaskModel, rows: Rows, records: Sequence[Record], *, count: int
    ) -> list[Figure | Table]:
        return pictures.illustrate(rows, records, count=count)

    def predict(
        self,
        model: TaskModel,
        inputs: Sequence[str],
        *,
        out: Path | None,
        bad: InputErrors | None = None,
    ) -> Iterator[dict[str, Any]]:
        bad = bad or InputErrors()
        for start in range(0, len(inputs), PREDICTED_AT_ONCE):
            part, examples = [], []
            for text in inputs[start : start + PREDICTED_AT_ONCE]:
                with bad.guarded(text):
                    pair = _pair(text)
                    examples.append(self._asked(*pair))
                    part.append(pair)
            if not part:
                continue
            batch = self.collate(examples)
            batch = {
                k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()
            }
            with torch.no_grad():
                answers = self._best(model, batch)
            for (image, question), best in zip(part, answers, strict=True):
                yield {
                    "image": image,
                    "question": question,
                    "answer": best[0][0],
                    "probability": best[0][1],
                    "best": [{"answer": answer, "probability": p} for answer, p in best],
                }
        bad.end()

    def _asked(self, image: str, question: str) -> Example:
        try:
            return self.asked(image, question)
        except BadRow as error:
            raise ValueError(f"{image}{SEPARATOR}{question}: {error}") from error

    def groups(self, rows: Rows) -> list[int] | None:
        """Returns the group of each row: rows with the same image.

        In one batch the image is read and encoded once. There are groups only if an `image_id` or a
        path names the image, so that no picture has to be read.
        """
        if "image_id" in rows.column_names:
            keys = [str(value) for value in rows["image_id"]]
        elif _path(rows[0]["image"]) is not None:
            keys = [_path(value) or "" for value in rows["image"]]
        else:
            return None
        numbers: dict[str, int] = {}
        return [numbers.setdefault(key, len(numbers)) for key in keys]

    def check(self, rows: Rows) -> list[Problem]:
        """Returns problems of questions that are cut, and of answers outside the vocabulary."""
        problems = []
        length = self.config.data.question_length or self.state["text"]["context_length"]
        questions = list(rows["question"])
        for index, (question, answers) in enumerate(zip(questions, all_answers(rows), strict=True)):
            tokens = self.tokenizer.count(question) if isinstance(question, str) else 0
            if tokens > length:
                reason = f"a question of {tokens} tokens is cut to the {length} that are read"
            elif self.vocabulary is not None and answers and not self.vocabulary.targets(answers):
                answer, known = metrics.truth(answers), len(self.vocabulary)
                reason = f"the answer {answer!r} is not among the {known} of the vocabulary"
            else:
                continue
            problems.append(Problem(index, reason))
        return problems

    def survey(self, rows: Rows) -> list[Table]:
        """Returns a table of how often each answer comes."""
        counts = Counter(metrics.truth(answers) for answers in all_answers(rows) if answers)
        total = sum(counts.values())
        lines = [(a, n, f"{100 * n / total:.1f} %") for a, n in counts.most_common()]
        return [Table("Answers", ("answer", "questions", "share"), lines)]


def image_key(value: Any) -> str:
    """Returns a key that is equal for equal paths, and for equal pictures without a path."""
    path = _path(value)
    digest = media.media_digest(value) if path is None else path
    if digest is None:  # the picture is decoded already, or broken
        digest = hashlib.blake2b(np.asarray(value).tobytes(), digest_size=16).hexdigest()
    return digest


def _path(value: Any) -> str | None:
    """Returns the path of a picture that is not read yet, or None if it has none."""
    if isinstance(value, Mapping):
        value = None if value.get("bytes") else value.get("path")
    return str(value) if isinstance(value, str | Path) else None


def _unique(keys: Sequence[str]) -> tuple[list[int], list[int]]:
    """Returns the places where each key stands first, and for every key the number of its place."""
    firsts = {key: len(keys) - 1 - place for place, key in enumerate(reversed(keys))}
    order = sorted(firsts.values())
    numbers = {keys[place]: number for number, place in enumerate(order)}
    return order, [numbers[key] for key in keys]


def _head_kind(kind: str, *, blip: bool) -> str:
    """Returns the kind of head; "auto" becomes the default of the encoder.

    Raises:
        ValueError: the kind is for another encoder.
    """
    kinds = OF_BLIP if blip else OF_CLIP
    if kind == "auto":
        return kinds[0]
    if kind not in kinds:
        name = "BLIP" if blip else "CLIP and SigLIP"
        raise ValueError(f"head.kind {kind} is not for {name}: choose one of {', '.join(kinds)}")
    return kind


def _pair(text: str) -> tuple[str, str]:
    """Returns the path of an image and the question in an input of the command line.

    Raises:
        ValueError: the input has no separator, or nothing on one side of it.
    """
    image, separator, question = text.partition(SEPARATOR)
    if not separator or not image or not question.strip():
        raise ValueError(
            f"{text!r} is no pair of an image and a question: write photo.jpg{SEPARATOR}'what is "
            "on the table?'"
        )
    return image, question.strip()
