"""Speech recognition: data, head, decoding and error rates."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import mmadapters
from mmadapters import AdapterModel

from ..config.schema import LOSS
from ..core.capabilities import (
    BatchGrouping,
    CacheableInputs,
    DataChecks,
    ReportPictures,
    Tally,
    TowerRow,
)
from ..core.errors import BadRow, InputErrors, Problem
from ..core.model import TaskModel
from ..core.results import Figure, Scores, Table
from ..core.rows import Batch, Column, Example, Record, Rows
from ..core.task import Task
from ..data.columns import PART_ROLES
from ..data.media import audio_samples, read_audio
from ..encoders.speech import SpeechTower, conv_frames, normalises
from . import pictures
from .augment import augmented
from .config import ASRConfig
from .decoding import BeamSearch, Decoded, greedy
from .head import own_head, own_vocabulary
from .language_model import LanguageModel
from .metrics import CER, WER, counts, error_rates
from .model import CTCModel, hop_and_field
from .text import Vocabulary, has_words, needed_frames, normalise

EMPTY = "the transcript is empty"


class ASRTask(Task[ASRConfig], CacheableInputs, BatchGrouping, DataChecks, ReportPictures):
    """A row is a recording with its transcript.

    `state`: "vocabulary" of the head; "words", whether spaces separate the words of the text; of
    the encoder the sampling "rate" in Hz, the "layers" of its convolutions as (kernel, stride), its
    "longest" input in samples (None without a bound), and "normalise", whether it reads utterances
    of zero mean and unit variance.
    """

    name = "asr"
    metric = WER
    greater_is_better = False
    columns: ClassVar = {
        "audio": Column("audio", description="a recording of any rate"),
        **PART_ROLES,
        "text": Column("text", description="what is said in it"),
    }
    usage = "audio files, or folders of them"
    _search: BeamSearch | None = None

    def __init__(self, config: ASRConfig, state: dict[str, Any] | None = None) -> None:
        super().__init__(config, state)
        self._set_metric()

    def fit(self, rows: Rows | None, backbone: nn.Module) -> None:
        for column in self.config.evaluation.groups:
            if rows is not None and rows.column_names and column not in rows.column_names:
                raise ValueError(
                    f"evaluation.groups: there is no column {column!r}; there are "
                    f"{', '.join(rows.column_names)}"
                )
        asked = self.config.audio.normalise
        model = mmadapters.init(backbone)
        tower = SpeechTower(model)
        model.detach()
        self.state = {
            "rate": tower.sample_rate,
            "layers": tower.layers,
            "longest": tower.longest,
            "normalise": normalises(self.config.backbone, backbone) if asked is None else asked,
        }
        if self.config.head.init == "backbone":
            vocabulary = own_vocabulary(self.config.backbone, backbone)
            if rows is not None and hasattr(rows, "__len__"):
                self.state["words"] = vocabulary.spaced or has_words(rows["text"])
        elif rows is None or not hasattr(rows, "__len__"):
            raise ValueError(
                "a fresh head takes its characters from the training text: give a training split "
                "that is not streamed, or set head.init to backbone"
            )
        else:
            vocabulary = self._fresh(rows)
            self.state["words"] = vocabulary.spaced or has_words(rows["text"])
        self._take(vocabulary)
        self._set_metric()

    def _fresh(self, rows: Rows) -> Vocabulary:
        """Returns the vocabulary of those training texts that are trained on.

        A recording is read only if its text has a token that no readable one before it had.
        """
        words = self.config.text.tokens == "words"
        texts = [normalise(text, self.config.text) for text in rows["text"]]
        self._take(Vocabulary.of_texts(texts, words=words))
        kept: set[int] = set()
        reason = None
        for index, text in enumerate(texts):
            labels = set(self.vocabulary.encode(text))
            if labels <= kept:
                continue
            try:
                self._heard(rows[index])
            except BadRow as error:
                reason = reason or f"row {index}: {error}"
            else:
                kept |= labels
        if not kept:
            raise ValueError(f"no row of the training split can be used ({reason})")
        tokens = (self.vocabulary.tokens[number] for number in kept)
        return Vocabulary.of_texts(tokens, words=words)

    def _take(self, vocabulary: Vocabulary) -> None:
        self.state["vocabulary"] = vocabulary.to_state()
        self.__dict__.pop("vocabulary", None)

    def _set_metric(self) -> None:
        """Chooses the first metric: CER where words have no spaces between them."""
        if self.config.evaluation.deciding in (None, LOSS):
            self.metric = WER if self.state.get("words", True) else CER  # type: ignore[misc]

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens of the head."""
        return Vocabulary.from_state(self.state["vocabulary"], language=self.config.text.language)

    def normal(self, text: str) -> str:
        """Returns the normal form of a text.

        Parts between spaces that are tokens of a head of phonemes stay as they are.
        """
        vocabulary = self.vocabulary
        if not vocabulary.spaced:
            return normalise(text, self.config.text)
        parts = unicodedata.normalize("NFC", text).split()
        kept = (p if vocabulary.holds(p) else normalise(p, self.config.text) for p in parts)
        return " ".join(filter(None, kept))

    def build(self, encoder: AdapterModel) -> CTCModel:
        vocabulary = self.vocabulary
        if self.config.head.init == "backbone":
            output = own_head(self.config.backbone, encoder.backbone)
        else:
            output = nn.Linear(encoder.sites.towers["audio"].width, len(vocabulary.tokens))
        return CTCModel(
            encoder,
            output,
            dropout=self.config.head.dropout,
            normalise=self.state["normalise"],
            blank=vocabulary.blank,
        )

    def example(self, row: Mapping[str, Any], *, train: bool) -> Example:
        if not train:
            wave = self._wave(row)
            return {"wave": wave, "text": self.normal(row["text"])}
        example = self._heard(row)
        wave, labels = example["wave"], example["labels"]
        changed = augmented(wave, self.config.augment, rate=self.state["rate"])
        # A change of speed is not used if it leaves too few frames or too many samples.
        return {**example, "wave": changed if self._unfit(len(changed), labels) is None else wave}

    def unchanging_example(self, row: Mapping[str, Any]) -> Example:
        return self._heard(row)

    def _wave(self, row: Mapping[str, Any]) -> Tensor:
        wave = torch.from_numpy(read_audio(row["audio"], self.state["rate"]))
        if self._frames(len(wave)) < 1:
            raise BadRow(f"{len(wave)} samples are too few for one frame of the encoder")
        return wave

    def _heard(self, row: Mapping[str, Any]) -> Example:
        """Returns the example of a row that can be trained on, without random changes.

        Raises:
            BadRow: it cannot.
        """
        wave, text = self._wave(row), self.normal(row["text"])
        if not text:
            raise BadRow(EMPTY)
        labels = self.vocabulary.encode(text)
        if (reason := self._unfit(len(wave), labels)) is not None:
            raise BadRow(reason)
        return {"wave": wave, "text": text, "labels": labels}

    def _frames(self, samples: int) -> int:
        return conv_frames(samples, self.state["layers"])

    def _unfit(self, samples: int, labels: Sequence[int]) -> str | None:
        """Returns why an utterance cannot be trained on, or None if it can."""
        frames, needed = self._frames(samples), needed_frames(labels)
        if frames < needed:
            return f"too short for CTC: {frames} frames for a transcript that needs {needed}"
        seconds, longest = samples / self.state["rate"], self.config.audio.longest
        if longest is not None and seconds > longest:
            return f"{seconds:.1f} s are longer than audio.longest, {longest:g} s"
        if self.state["longest"] is not None and samples > self.state["longest"]:
            return f"{seconds:.1f} s are more than the encoder reads at once: cut it into pieces"
        return None

    def collate(self, examples: Sequence[Example]) -> Batch:
        waves = [example["wave"] for example in examples]
        batch: Batch = {
            "waves": nn.utils.rnn.pad_sequence(waves, batch_first=True),
            "lengths": torch.tensor([len(wave) for wave in waves]),
        }
        if "labels" in examples[0]:
            labels = [torch.tensor(example["labels"]) for example in examples]
            batch["labels"] = nn.utils.rnn.pad_sequence(labels, batch_first=True)
            batch["label_lengths"] = torch.tensor([len(label) for label in labels])
        else:
            batch["texts"] = [example["text"] for example in examples]
        return batch

    def tower_rows(self, tower: str, example: Example) -> Sequence[TowerRow]:
        # Whisper reads a fixed length, with silence after the end.
        fixed = self.state["longest"] is not None
        return (TowerRow(tokens=None if fixed else self._frames(len(example["wave"]))),)

    def randomness(self, rows: Rows) -> str | None:
        config = self.config.augment
        drawn = {
            "speed": config.speed[0] != config.speed[1],
            "noise": config.noise,
            "gain": config.gain,
        }
        return next((f"augment.{name}" for name, on in drawn.items() if on), None)

    def one_pass(self, rows: Rows) -> str | None:
        rate, bounds = self.state["rate"], [self.config.chunks.seconds * self.state["rate"]]
        if self.state["longest"] is not None:
            bounds.append(self.state["longest"])
        # A length that comes from a header is only about right.
        if all(0 < samples < min(bounds) - 2 for samples in self.lengths(rows)):
            return None
        return f"a recording may be longer than {min(bounds) / rate:g} s and run in pieces"

    def records(self, model: TaskModel, batch: Batch) -> list[Record]:
        heard = self.transcribe(model, batch["waves"], batch["lengths"])
        return [
            {"reference": said, "hypothesis": text, "counts": counts(said, text)}
            for said, (text, _) in zip(batch["texts"], heard, strict=True)
        ]

    def transcribe(
        self, model: TaskModel, waves: Tensor, lengths: Tensor
    ) -> list[tuple[str, Decoded]]:
        """Returns the text of each wave, and its characters. Long waves are recognised in pieces.

        Args:
            model: a `CTCModel` in eval mode.
            waves: (B, T).
            lengths: (B,) samples.
        """
        assert isinstance(model, CTCModel)
        chunks = self.config.chunks
        long = [i for i, n in enumerate(lengths.tolist()) if model.is_long(n, chunks)]
        short = [i for i in range(len(lengths)) if i not in set(long)]
        decoded: dict[int, Decoded] = {}
        if short:
            whole = waves, lengths
            some = whole if not long else (waves[short], lengths[short])
            log_probs, frames = model.log_probs(*some)
            decoded |= zip(short, self._decode(log_probs, frames), strict=True)
        for i in long:
            log_probs = model.long_log_probs(waves[i, : int(lengths[i])], chunks)[None]
            (decoded[i],) = self._decode(log_probs, torch.tensor([log_probs.shape[1]]))
        lowercase = self.config.text.lowercase
        vocabulary = self.vocabulary
        return [
            (self.normal(vocabulary.decode(decoded[i].ids, lowercase=lowercase)), decoded[i])
            for i in range(len(lengths))
        ]

    def _decode(self, log_probs: Tensor, frames: Tensor) -> list[Decoded]:
        config = self.config.decoding
        if config.method == "greedy":
            return greedy(log_probs, frames.to(log_probs.device), blank=self.vocabulary.blank)
        if self._search is None:
            lowercase = self.config.text.lowercase
            model = None
            if config.language_model is not None:
                if self.vocabulary.spaced:
                    raise ValueError(
                        "decoding.language_model is over words, and the tokens of this head have "
                        "no sign between words: leave it out"
                    )
                model = LanguageModel.read(
                    config.language_model, lowercase=lowercase, language=self.config.text.language
                )
            self._search = BeamSearch(self.vocabulary, config, model, lowercase=lowercase)
        return self._search(log_probs, frames)

    def score(self, records: Sequence[Record], *, bootstrap: int) -> Scores:
        groups = {}
        for column in self.config.evaluation.groups:
            values: dict[str, list[Record]] = {}
            for record in records:
                values.setdefault(str(record["row"].get(column)), []).append(record)
            groups[column] = {
                value: error_rates(group, resamples=bootstrap, first=self.metric)
                for value, group in sorted(values.items())
                if any(record["reference"] for record in group)
            }
        return Scores(error_rates(records, resamples=bootstrap, first=self.metric), groups)

    def lengths(self, rows: Rows) -> list[int]:
        rate = self.state["rate"]
        return [audio_samples(value, rate) for value in rows["audio"]]

    def tally(self) -> Tally:
        return Tally()

    def inspect(
        self, index: int, row: Mapping[str, Any], tally: Tally, *, train: bool
    ) -> str | None:
        """Finds utterances that are evaluated but that training would leave out."""
        if train:
            self._heard(row)
            return None
        wave, text = self._wave(row), self.normal(row["text"])
        try:
            labels = self.vocabulary.encode(text)
        except BadRow as error:
            return str(error)
        return self._unfit(len(wave), labels) if labels else EMPTY

    def check(self, rows: Rows) -> list[Problem]:
        """Returns the utterances that training would leave out, as far as their headers show it."""
        problems = []
        for index, (samples, text) in enumerate(zip(self.lengths(rows), rows["text"], strict=True)):
            try:
                labels = self.vocabulary.encode(self.normal(text))
            except BadRow as error:
                problems.append(Problem(index, str(error)))
                continue
            reason = self._unfit(samples, labels) if labels else EMPTY
            # Doctor reports a recording whose header cannot be read, as it makes no example.
            if samples and reason is not None:
                problems.append(Problem(index, reason))
        return problems

    def illustrate(
        self, model: TaskModel, rows: Rows, records: Sequence[Record], *, count: int
    ) -> list[Figure | Table]:
        scores = self.score(records, bootstrap=self.config.evaluation.bootstrap)
        return pictures.illustrate(records, scores.groups, count=count)

    def predict(
        self,
        model: TaskModel,
        inputs: Sequence[str],
        *,
        out: Path | None,
        bad: InputErrors | None = None,
    ) -> Iterator[dict[str, Any]]:
        rate = self.state["rate"]
        hop, _ = hop_and_field(self.state["layers"])
        bad = bad or InputErrors()
        for name in inputs:
            wave = None
            with bad.guarded(name, f"{name}: "):
                samples = torch.from_numpy(read_audio(name, rate))
                if self._frames(len(samples)) < 1:
                    raise BadRow("it is too short for one frame of the encoder")
                wave = samples
            if wave is None:
                continue
            with torch.no_grad():
                ((text, decoded),) = self.transcribe(
                    model, wave[None].to(model.device), torch.tensor([len(wave)]).to(model.device)
                )
            result: dict[str, Any] = {
                "input": name,
                "text": text,
                "seconds": round(len(wave) / rate, 3),
            }
            if decoded.frames is not None:
                result["words"] = _words(decoded, self.vocabulary, seconds=hop / rate)
            yield result
        bad.end()


def _words(decoded: Decoded, vocabulary: Vocabulary, *, seconds: float) -> list[dict[str, Any]]:
    """Returns the words with the times in seconds of their first and last characters.

    Args:
        decoded: with the frames of its characters.
        vocabulary: of the head.
        seconds: from one frame to the next.
    """
    assert decoded.frames is not None
    words: list[dict[str, Any]] = []
    open_word = False
    for i, frame in zip(decoded.ids, decoded.frames, strict=True):
        token = vocabulary.tokens[i]
        if i == vocabulary.delimiter or not vocabulary.shown(i):
            open_word = False
            continue
        time = round(frame * seconds, 3)
        if not open_word:
            words.append({"word": "", "start": time})
            open_word = True
        words[-1]["word"] += token
        words[-1]["end"] = round(time + seconds, 3)
        open_word = not vocabulary.spaced
    return words
