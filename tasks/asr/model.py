"""A speech encoder with a CTC head, also for long audio, in pieces.

Shape legend: B utterances, T samples, F frames, C characters, U characters of a label.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmadapters import AdapterModel

from ..core.model import TaskModel
from ..encoders.speech import SpeechTower
from .config import ChunkConfig

PIECES = 8  # pieces of long audio in a batch


class CTCModel(TaskModel):
    """CTC (Graves et al. 2006) over the frames of a speech encoder.

    Args:
        encoder: with its adapters.
        output: the layer from the encoder's width to C characters.
        dropout: the probability before the output layer.
        normalise: whether the encoder reads utterances of zero mean and unit variance.
        blank: the id of CTC's blank.
    """

    def __init__(
        self,
        encoder: AdapterModel,
        output: nn.Linear,
        *,
        dropout: float,
        normalise: bool,
        blank: int,
    ) -> None:
        super().__init__(encoder, nn.Sequential(nn.Dropout(dropout), output))
        self.tower = SpeechTower(encoder, normalise=normalise)
        self.blank = blank

    def forward(
        self, waves: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor
    ) -> dict[str, Tensor]:
        """Returns as "loss" the mean over utterances of their loss per character, in float32.

        Args:
            waves: (B, T).
            lengths: (B,) samples.
            labels: (B, U) ids.
            label_lengths: (B,); every utterance must have the frames that its label needs.
        """
        log_probs, counts = self.log_probs(waves, lengths)
        losses = F.ctc_loss(
            log_probs.transpose(0, 1),
            labels,
            counts,
            label_lengths,
            blank=self.blank,
            reduction="none",
        )
        return {"loss": (losses / label_lengths).mean()}

    def log_probs(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log probabilities (B, F, C) in float32 and the numbers of valid frames (B,).

        Args:
            waves: (B, T).
            lengths: (B,) samples.
        """
        frames, counts = self.tower(waves, lengths)
        return self.head(frames).float().log_softmax(dim=-1), counts

    def long_log_probs(self, wave: Tensor, config: ChunkConfig) -> Tensor:
        """Returns log probabilities (F, C) of a wave (T,) of any length.

        The wave is cut into pieces that overlap, and the frames of a piece near its cuts are left
        out. A piece begins at a multiple of the encoder's hop and holds a whole number of frames.
        So its frames are those of the whole audio, and only the transformer's context differs.
        """
        hop, field = hop_and_field(self.tower.layers)
        size = self._piece(config, hop, field)
        total = self.tower.frames(len(wave))
        stride = min(round(config.stride * self.tower.sample_rate / hop), (size - 1) // 2)
        starts = list(range(0, max(total - 2 * stride, 1), size - 2 * stride))
        pieces = [wave[start * hop : start * hop + hop * (size - 1) + field] for start in starts]
        parts = []
        for first in range(0, len(pieces), PIECES):
            some = pieces[first : first + PIECES]
            lengths = torch.tensor([len(piece) for piece in some], device=wave.device)
            padded = nn.utils.rnn.pad_sequence(some, batch_first=True)
            values, counts = self.log_probs(padded, lengths)
            for row, count in enumerate(counts.tolist()):
                left = 0 if first + row == 0 else stride
                right = count if first + row == len(pieces) - 1 else count - stride
                parts.append(values[row, left:right])
        return torch.cat(parts)[:total]

    def _piece(self, config: ChunkConfig, hop: int, field: int) -> int:
        """Returns the frames of a piece, which is no longer than the encoder's longest input."""
        samples = round(config.seconds * self.tower.sample_rate)
        if self.tower.longest is not None:
            samples = min(samples, self.tower.longest)
        return max((samples - field) // hop + 1, 1)

    def is_long(self, samples: int, config: ChunkConfig) -> bool:
        """Returns whether audio of so many samples is recognised in pieces."""
        longest = self.tower.longest or math.inf
        return samples > min(config.seconds * self.tower.sample_rate, longest)


def hop_and_field(layers: list[tuple[int, int]]) -> tuple[int, int]:
    """Returns the samples from one frame to the next, and the samples that one frame reads.

    Args:
        layers: (kernel, stride) of each convolution, in samples of its input.
    """
    hop, field = 1, 1
    for kernel, stride in layers:
        field += (kernel - 1) * hop
        hop *= stride
    return hop, field
