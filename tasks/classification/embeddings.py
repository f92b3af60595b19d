"""The classifier by embeddings: an image-text encoder with a head that has the class names.

Shape legend: B images, C classes, T templates, L text tokens, E width of the shared space.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmadapters import AdapterModel
from mmadapters.adapters.adapter import Adapter

from ..encoders.clip import ClipTowers, tokenizer
from ..encoders.refusals import refuse_other_towers, refuse_unpaired
from .config import ClassificationConfig
from .embedding_heads import TipAdapterHead, ZeroShotHead, unit
from .model import Classifier

MAX_SCALE = 100.0  # CLIP's limit (Radford et al. 2021, section 2.5)
TEXTS = 256  # texts that pass the text tower at once


class EmbeddingClassifier(Classifier):
    """Compares the image's adapted embedding with those of the class names.

    W, the embeddings of the class names, is computed once. If the text tower is trained, W is
    computed again for each training batch, with gradients.

    Args:
        encoder: with its adapters.
        config: of the job.
        names: of the classes, as they stand in the templates.
        keys: the most pictures in the cache of Tip-Adapter.
        weights: as in `Classifier`.

    Raises:
        ValueError: the encoder lacks a text tower or an image tower, or an adapter is at a site
            that no embedding passes.
    """

    head: ZeroShotHead

    def __init__(
        self,
        encoder: AdapterModel,
        config: ClassificationConfig,
        *,
        names: Sequence[str],
        keys: int = 0,
        weights: Tensor | None,
    ) -> None:
        towers = ClipTowers(encoder)
        refuse_unpaired(encoder, "a classifier by class names")
        refuse_other_towers(encoder, ["vision", "text"], "a classifier by class names")
        size: dict[str, Any] = {"width": towers.width, "classes": len(names)}
        size["scale"] = towers.logit_scale.exp().clamp(max=MAX_SCALE)
        head = ZeroShotHead(**size)
        if config.head.kind == "tip_adapter":
            head = TipAdapterHead(**size, keys=keys, finetune=config.head.finetune)
        super().__init__(encoder, head, config, weights=weights)
        self.towers = towers
        self.names = tuple(names)

    def train(self, mode: bool = True) -> EmbeddingClassifier:
        super().train(mode)
        if self.trains_text:
            self.head.current = False
        return self

    @property
    def trains_text(self) -> bool:
        """Whether a parameter of the text tower, or of the backbone, is trained."""
        return any(parameter.requires_grad for parameter in _of_text(self.encoder))

    def logits(self, *, pixels: Tensor) -> Tensor:  # type: ignore[override]
        """Returns logits (B, C) of pixels (B, 3, H, W)."""
        return self.head(self.towers.images(pixels), self.text_weights())

    def text_weights(self) -> Tensor:
        """Returns W, (C, E): for each class the mean of its texts' embeddings, at unit length."""
        if self.training and self.trains_text:
            return self._embedded()
        if not self.head.current:
            training = self.encoder.training
            self.encoder.eval()
            with torch.no_grad():
                self.head.weight.copy_(self._embedded())
            self.encoder.train(training)
            self.head.current = True
        return self.head.weight

    def _embedded(self) -> Tensor:
        device = self.device
        parts = [unit(self.towers.texts(part.to(device))) for part in self._tokens.split(TEXTS)]
        each = torch.cat(parts).view(len(self.names), -1, self.towers.width)
        return unit(each.mean(dim=1))

    @functools.cached_property
    def _tokens(self) -> Tensor:
        """(C * T, L) ids, the templates of a name one after another."""
        tokenize = tokenizer(self.job.backbone, self.encoder.backbone)
        templates = self.job.head.templates
        return tokenize([text.replace("{}", name) for name in self.names for text in templates])


def _of_text(encoder: AdapterModel) -> Iterator[nn.Parameter]:
    """Yields the parameters of the backbone and of the modules that adapt the text tower."""
    yield from encoder.backbone.parameters()
    for adapter in (*encoder.adapters.children(), *encoder.fusions.children()):
        assert isinstance(adapter, Adapter)
        for site, module in adapter.entries():
            if site.partition(".")[0] == "text":
                yield from module.parameters()


def spoken(names: Sequence[str], given: dict[str, str]) -> list[str]:
    """Returns the words for each class: those given, else its name with spaces for underscores."""
    return [given.get(name, name.replace("_", " ")) for name in names]
