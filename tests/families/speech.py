"""Small speech encoders: 14 frames from 0.3 s of sound at 16 kHz."""

from typing import Any

import torch
import transformers
from torch import nn

from . import Family, seeded
from .speech_twins import to_torchaudio

SAMPLES = 4800
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 12,
}
# The large models: LayerNorm in the convolutions and before each sublayer.
STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}


def waves() -> tuple[tuple, dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(2, SAMPLES, generator=generator),), {}


def spectrograms() -> tuple[tuple, dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(2, 8, 24, generator=generator),), {}


def hf_wav2vec2() -> nn.Module:
    # LayerDrop and SpecAugment stay as users get them: both are on.
    config = transformers.Wav2Vec2Config(**SMALL)
    return seeded(lambda: transformers.Wav2Vec2ForCTC(config))


def hf_wav2vec2_stable() -> nn.Module:
    config = transformers.Wav2Vec2Config(**SMALL, **STABLE, layerdrop=0.0)
    return seeded(lambda: transformers.Wav2Vec2Model(config))


def hf_hubert() -> nn.Module:
    config = transformers.HubertConfig(**SMALL, layerdrop=0.0)
    return seeded(lambda: transformers.HubertModel(config))


def hf_wavlm() -> nn.Module:
    config = transformers.WavLMConfig(**SMALL, layerdrop=0.0, num_buckets=8)
    return seeded(lambda: transformers.WavLMModel(config))


def hf_whisper() -> nn.Module:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = transformers.WhisperConfig(
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=12,
    )
    return seeded(lambda: WhisperEncoder(config))


FAMILIES = [
    Family("hf-wav2vec2", hf_wav2vec2, waves, frozenset({"prefix"})),
    Family("hf-wav2vec2-stable", hf_wav2vec2_stable, waves, frozenset({"prefix"})),
    Family("hf-hubert", hf_hubert, waves, frozenset({"prefix"})),
    Family("hf-wavlm", hf_wavlm, waves, frozenset({"raw"})),
    Family("hf-whisper", hf_whisper, spectrograms, frozenset({"prefix", "prompt"})),
    Family(
        "torchaudio-wav2vec2",
        lambda: to_torchaudio(hf_wav2vec2()),
        waves,
        frozenset({"prefix", "twin:hf-wav2vec2"}),
    ),
    Family(
        "torchaudio-wav2vec2-prenorm",
        lambda: to_torchaudio(hf_wav2vec2_stable()),
        waves,
        frozenset({"prefix", "twin:hf-wav2vec2-stable"}),
    ),
    Family(
        "torchaudio-hubert",
        lambda: to_torchaudio(hf_hubert()),
        waves,
        frozenset({"prefix", "twin:hf-hubert"}),
    ),
    Family(
        "torchaudio-wavlm",
        lambda: to_torchaudio(hf_wavlm()),
        waves,
        frozenset({"prefix", "raw", "twin:hf-wavlm"}),
    ),
]
