"""An encoder with a classification head, for images or for recordings.

Shape legend: B examples, T samples, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmadapters import AdapterModel
from mmadapters.suggest import nearest

from ..core.model import TaskModel
from ..encoders.block_states import BlockStates
from ..encoders.refusals import refuse_embedding_adapters, refuse_other_towers
from ..encoders.vision import ImageTower
from .config import ClassificationConfig
from .head import ClassificationHead


class Classifier(TaskModel):
    """Logits and loss. Subclasses compute the logits from the encoder's inputs.

    Args:
        encoder: with its adapters.
        head: from the encoder's states to logits.
        config: of the job.
        weights: (C,) of the classes in the loss, or of their presence with several labels; None for
            equal weights.
    """

    def __init__(
        self,
        encoder: AdapterModel,
        head: nn.Module,
        config: ClassificationConfig,
        *,
        weights: Tensor | None,
    ) -> None:
        super().__init__(encoder, head)
        # transformers' Trainer takes `config` for that of one of its own models.
        self.job = config
        self.weights: Tensor | None
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, *, targets: Tensor | None = None, **inputs: Any) -> dict[str, Tensor]:
        """Returns "logits" (B, C), and "loss" if there are targets.

        Args:
            targets: (B,) class numbers, or (B, C) of 0 and 1 with several labels.
            inputs: of `logits`.
        """
        logits = self.logits(**inputs)
        if targets is None:
            return {"logits": logits}
        return {"logits": logits, "loss": self.loss(logits, targets)}

    def logits(self, **inputs: Any) -> Tensor:
        """Returns logits (B, C)."""
        raise NotImplementedError

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the training loss, a scalar, of logits (B, C) and targets as in `forward`."""
        smoothing = self.job.loss.label_smoothing
        if not self.job.data.multi_label:
            return F.cross_entropy(logits, targets, self.weights, label_smoothing=smoothing)
        targets = targets * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=self.weights)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Returns probabilities (B, C): sigmoids with several labels, else a softmax."""
        return logits.sigmoid() if self.job.data.multi_label else logits.softmax(dim=-1)


class ImageClassifier(Classifier):
    """A classifier of images.

    Raises:
        ValueError: the encoder has no image tower, or it has no class token and pooling is "cls".
    """

    def __init__(self, encoder: AdapterModel, config: ClassificationConfig, **options: Any) -> None:
        tower = ImageTower(encoder)
        refuse_other_towers(encoder, ["vision"], f"head.kind {config.head.kind}")
        refuse_embedding_adapters(encoder, f"head.kind {config.head.kind}")
        if config.head.pooling == "cls" and not tower.has_class_token:
            raise ValueError(
                f"{config.backbone.name} has no class token: set head.pooling to mean or attention"
            )
        head = ClassificationHead(
            config.head, width=tower.width, layers=tower.depth, classes=options.pop("classes")
        )
        super().__init__(encoder, head, config, **options)
        self.tower = tower

    def logits(self, *, pixels: Tensor) -> Tensor:  # type: ignore[override]
        """Returns logits (B, C) of pixels (B, 3, H, W)."""
        config = self.job.head
        layers = range(self.tower.depth) if config.layers == "all" else (-1,)
        states = self.tower(pixels, layers=layers)
        if config.layers == "last" and config.pooling == "auto":
            return self.head(None, pooled=states.pooled)
        if config.pooling == "cls":
            return self.head(None, pooled=states.cls)
        return self.head([part.flatten(2).transpose(1, 2) for part in states.maps])


class AudioClassifier(Classifier):
    """A classifier of recordings. Their padding never changes a result.

    Args:
        encoder: with its adapters.
        config: of the job.
        normalise: as in `SpeechTower`.
        options: `classes`, C, and the `weights` of `Classifier`.

    Raises:
        ValueError: the encoder has no audio tower, or pooling is "cls".
    """

    def __init__(
        self,
        encoder: AdapterModel,
        config: ClassificationConfig,
        *,
        normalise: bool = False,
        **options: Any,
    ) -> None:
        from ..encoders.speech import SpeechTower

        if config.head.pooling == "cls":
            raise ValueError("speech encoders have no class token: set head.pooling to mean")
        tower = SpeechTower(encoder, normalise=normalise)
        head = ClassificationHead(
            config.head, width=tower.width, layers=tower.depth + 1, classes=options.pop("classes")
        )
        super().__init__(encoder, head, config, **options)
        self.tower = tower

    def logits(self, *, waves: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        """Returns logits (B, C).

        Args:
            waves: (B, T) at the encoder's sampling rate.
            lengths: (B,) samples of each.
        """
        if self.job.head.layers == "all":
            states = self._all_layers(waves, lengths)
        else:
            states = [self.tower(waves, lengths)[0]]
        places = torch.arange(states[0].shape[1], device=lengths.device)
        mask = places < self.tower.frames(lengths)[:, None]
        return self.head(states, mask)

    def _all_layers(self, waves: Tensor, lengths: Tensor) -> list[Tensor]:
        """Returns the states (B, F, D) before the first block and after each block."""
        from ..encoders.speech import by_length

        tower = self.encoder.sites.towers["audio"]
        layers = range(len(tower.blocks))

        def run(waves: Tensor, lengths: Tensor) -> list[Tensor] | None:
            skips = self.training and bool(self.active_in_training)
            with BlockStates(tower, layers, reads_entered=True, skips=skips) as watch:
                frames, _ = self.tower(waves, lengths)
            # LayerDrop may leave out all blocks.
            entered = frames if watch.entered is None else watch.entered
            if len(entered) != len(waves):
                return None
            states = [entered]
            for layer in layers:
                # A layer that LayerDrop left out changed nothing.
                states.append(watch.states.get(layer, states[-1]))
            return [state[:, : frames.shape[1]] for state in states]

        all_states = run(waves, lengths)
        if all_states is None:
            # The encoder's blocks run on utterances of one length at a time (torchaudio's WavLM).
            def together(part: Tensor) -> Tensor:
                length = torch.full((len(part),), part.shape[1], device=lengths.device)
                states = run(part, length)
                assert states is not None
                return torch.cat(states, dim=-1)

            states = by_length(together, waves, lengths)
            all_states = list(states.split(self.tower.width, dim=-1))
        return all_states


def class_weights(
    given: str | Mapping[str, float],
    names: Sequence[str],
    counts: Sequence[int],
    *,
    rows: int | None,
) -> Tensor | None:
    """Returns weights (C,) of the classes, or None for equal weights.

    With n_c rows of class c, balanced weights are N / (C n_c), whose mean over rows is 1. With
    several labels they are (N - n_c) / n_c, so that a label's presence weighs as much as its
    absence.

    Args:
        given: "none", "balanced", or a weight for each class by name (1 if it has none).
        names: of the classes.
        counts: (C,) n_c.
        rows: N if a row may have several labels, else None.

    Raises:
        ValueError: a weight is given for a class that does not exist.
    """
    if given == "none":
        return None
    if isinstance(given, Mapping):
        for name in given:
            if name not in names:
                raise ValueError(f"loss.class_weights has {name!r}, no class{nearest(name, names)}")
        return torch.tensor([float(given.get(name, 1.0)) for name in names])
    there = torch.tensor(counts).clamp(min=1)
    if rows is None:
        return sum(counts) / (len(names) * there)
    return (rows - there).clamp(min=1) / there
