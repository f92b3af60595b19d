"""Question answering by BLIP's own decoder, which ranks a vocabulary or writes an answer.

Shape legend: B questions, I images, L question tokens, M answers, T answer tokens, D width,
V vocabulary of the tokenizer.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from mmadapters import AdapterModel

from ..core.model import TaskModel
from ..encoders.blip import BlipAnswerer
from .config import BlipAnswersConfig


class LMHead(nn.Module):
    """A copy of the decoder's last layers, with word embeddings of its own: (…, D) -> (…, V)."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        predictions = decoder.cls.predictions
        self.transform = copy.deepcopy(predictions.transform)
        # transformers has the bias under two names, which safetensors files do not allow.
        self.words = nn.Linear(predictions.decoder.in_features, predictions.decoder.out_features)
        self.words.weight.data.copy_(predictions.decoder.weight.data)
        self.words.bias.data.copy_(predictions.decoder.bias.data)
        self.requires_grad_(True)

    def forward(self, states: Tensor) -> Tensor:
        return self.words(self.transform(states))


class BlipVQA(TaskModel):
    """BLIP that answers questions. It trains the adapter and, if asked, the decoder's last layers.

    Args:
        encoder: with its adapters.
        config: of training and of the answers.
    """

    def __init__(self, encoder: AdapterModel, config: BlipAnswersConfig) -> None:
        answerer = BlipAnswerer(encoder)
        trained = config.train_lm_head
        super().__init__(
            encoder, LMHead(encoder.backbone.text_decoder) if trained else nn.Identity()
        )
        self.answerer = answerer
        self.settings = config

    @property
    def lm_head(self) -> nn.Module | None:
        """The trained copy of the decoder's last layers; None for the decoder's own."""
        return self.head if isinstance(self.head, LMHead) else None

    def forward(
        self,
        pixels: Tensor,
        tokens: Tensor,
        image_of: Tensor,
        answers: Tensor | None = None,
        question_of: Tensor | None = None,
        weights: Tensor | None = None,
        references: Any = None,
    ) -> dict[str, Tensor]:
        """Returns as "loss" the weighted sum of the answers' negative log-likelihoods, over B.

        Without answers it returns the "states" (B, L, D) of the questions.

        Args:
            pixels: (I, 3, H, W), each image once.
            tokens: (B, L) questions.
            image_of: (B,) the number of a question's image.
            answers: (M, T) of `BlipTokenizer.answers`, several for a question.
            question_of: (M,) the number of an answer's question.
            weights: (M,) the share of people who gave this answer to the question.
            references: not used; batches have it for evaluation.
        """
        states, mask = self.question_states(pixels, tokens, image_of)
        if answers is None:
            return {"states": states}
        assert question_of is not None and weights is not None  # noqa: PT018
        losses = self.answerer.losses(
            states[question_of],
            mask[question_of],
            answers,
            lm_head=self.lm_head,
            label_smoothing=self.settings.label_smoothing,
        )
        return {"loss": (weights * losses).sum() / len(tokens)}

    def question_states(
        self, pixels: Tensor, tokens: Tensor, image_of: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns states (B, L, D) of the questions with their images, and their mask (B, L).

        Args:
            pixels: (I, 3, H, W), each image once.
            tokens: (B, L) questions.
            image_of: (B,) the number of a question's image.
        """
        images = self.answerer.image_tokens(pixels)[image_of]
        return self.answerer.question_states(images, tokens)

    def rank(self, states: Tensor, mask: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the best candidates for each question, the best first.

        Args:
            states: (B, L, D) of the questions.
            mask: (B, L) of the questions.
            candidates: (M, T) answers.

        Returns:
            Likelihoods (B, K) of the best candidates, as shares of their sum, and their numbers
            (B, K).
        """
        likelihoods, numbers = self.answerer.rank(
            states,
            mask,
            candidates.to(states.device),
            count=self.settings.candidates,
            lm_head=self.lm_head,
        )
        return likelihoods.softmax(dim=-1), numbers

    def generate(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the answers (B, T) that BLIP writes, and their likelihoods (B,).

        Args:
            states: (B, L, D) of the questions.
            mask: (B, L) of the questions.
        """
        answers = self.answerer.generate(
            states,
            mask,
            beams=self.settings.beams,
            max_tokens=self.settings.max_tokens,
            lm_head=self.lm_head,
        )
        losses = self.answerer.losses(states, mask, answers, lm_head=self.lm_head)
        return answers, losses.neg().exp()
