"""torchaudio's twin of a speech encoder of transformers: the same weights under its own classes."""

import logging

from torch import nn
from torchaudio.models.wav2vec2.utils import import_huggingface_model


def to_torchaudio(original: nn.Module) -> nn.Module:
    """The torchaudio model with the weights of a Wav2Vec2, HuBERT or WavLM of transformers.

    torchaudio's own converter does it; it warns of every model without a CTC head.
    """
    logging.getLogger("torchaudio").setLevel(logging.ERROR)
    return import_huggingface_model(original).train(original.training)
