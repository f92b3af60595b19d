"""Speech encoders of transformers and torchaudio: tower `audio`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..spec import Architecture, SublayerSpec, TableRow, TowerSpec
from .huggingface import below, if_sdpa, path_of, place, token_ids

_NO_PROMPTS = (
    "its blocks take a padding mask or position biases made for the frames alone, so that an "
    "appended token would not fit them"
)
_FFN_LEAVES = {"up": "feed_forward.intermediate_dense", "down": "feed_forward.output_dense"}
_CALLED = {
    role: f"attention.{path}"
    for role, path in zip("qkvo", ("q_proj", "k_proj", "v_proj", "out_proj"), strict=True)
}
# WavLM of transformers passes the weights of its projections to F.multi_head_attention_forward.
_READ = {role: f"{path}.weight" for role, path in _CALLED.items()}
# WavLM of torchaudio keeps them in an nn.MultiheadAttention of which it calls only out_proj.
_PACKED = {
    "q": "attention.attention.in_proj_weight[0/3]",
    "k": "attention.attention.in_proj_weight[1/3]",
    "v": "attention.attention.in_proj_weight[2/3]",
    "o": "attention.attention.out_proj",
}


def _layers(
    *, pre_norm: bool, attention: str | None, leaves: dict[str, str]
) -> dict[str, SublayerSpec]:
    """Returns the sublayers of Wav2Vec2's layer, whose children have the same names in transformers
    and torchaudio.

    In both placements of the norms `layer_norm` belongs to attention and `final_layer_norm` to the
    feed-forward part. The residual enters the norm in pre-norm, the sublayer itself in post-norm.
    """
    return {
        "attn": SublayerSpec(
            output="dropout",
            residual="layer_norm" if pre_norm else "attention",
            input="attention",
            attention=attention,
            owner="attention",
            norm="layer_norm",
            post_norm=not pre_norm,
            leaves=leaves,
        ),
        "ffn": SublayerSpec(
            output="feed_forward",
            residual="final_layer_norm" if pre_norm else "feed_forward",
            norm="final_layer_norm",
            post_norm=not pre_norm,
            leaves=_FFN_LEAVES,
        ),
    }


def _samples(frames: int, kernels: Sequence[int], strides: Sequence[int]) -> int:
    """Returns the least number of samples from which the convolutions make `frames` frames."""
    length = frames
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        length = (length - 1) * stride + kernel
    return length


def _wave(model: nn.Module, samples: int) -> Tensor:
    """Returns a random waveform (1, samples)."""
    return torch.randn(1, samples, **place(model))


def huggingface_example(model: Any) -> tuple[tuple, dict]:
    """Returns a random waveform (1, T) of a quarter of a second or as long as SpecAugment's masks
    need."""
    config = model.config
    # x-vector heads lose 14 frames in their own convolutions and take a deviation over the rest.
    frames = max(12, config.mask_time_length + 2, 24 if hasattr(model, "tdnn") else 0)
    samples = _samples(frames, config.conv_kernel, config.conv_stride)
    return (_wave(model, samples),), {}


def _huggingface(model: Any) -> Iterable[Architecture]:
    name = model.base_model_prefix
    path = name if hasattr(model, name) else ""
    encoder = model.get_submodule(below(path, "encoder"))
    # Read from the layers, not from the configuration: they are what runs.
    stable = "EncoderLayerStableLayerNorm" in type(encoder.layers[0]).__name__
    reads_raw = name == "wavlm"
    tower = TowerSpec(
        name="audio",
        blocks=below(path, "encoder.layers"),
        sublayers=_layers(
            pre_norm=stable,
            attention=None if reads_raw else if_sdpa(model, "attention"),
            leaves=_READ if reads_raw else _CALLED,
        ),
        # In post-norm encoders this norm stands before the first block.
        norm=below(path, "encoder.layer_norm") if stable else None,
        prompts=_NO_PROMPTS,
        front=below(path, "feature_extractor.conv_layers"),
        runner=below(path, "encoder"),
        stem=(below(path, "feature_projection"), below(path, "encoder.pos_conv_embed")),
    )
    yield Architecture(towers=(tower,), example=huggingface_example, library="transformers")


def whisper_example(model: Any) -> tuple[tuple, dict]:
    """Returns a random spectrogram (1, mel bins, 2 × positions), and two tokens if there is a
    decoder."""
    config = model.config
    frames = 2 * config.max_source_positions
    features = torch.randn(1, config.num_mel_bins, frames, **place(model))
    if path_of(model, "WhisperDecoder") is None:
        return (features,), {}
    return (features,), {"decoder_input_ids": token_ids(model, config.vocab_size, 1, 2)}


def _whisper(model: Any) -> Iterable[Architecture]:
    path = path_of(model, "WhisperEncoder")
    if path is None:
        raise ValueError(
            f"{type(model).__name__} has no Whisper encoder; of Whisper only the encoder is adapted"
        )
    attn = SublayerSpec(
        # Dropout is a function here, so that the branch ends in the last module before it.
        output="self_attn",
        residual="self_attn_layer_norm",
        attention=if_sdpa(model, "self_attn"),
        norm="self_attn_layer_norm",
        leaves={
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "o": "self_attn.out_proj",
        },
    )
    ffn = SublayerSpec(
        output="fc2",
        residual="final_layer_norm",
        input="fc1",
        norm="final_layer_norm",
        leaves={"up": "fc1", "down": "fc2"},
    )
    tower = TowerSpec(
        name="audio",
        blocks=below(path, "layers"),
        sublayers={"attn": attn, "ffn": ffn},
        norm=below(path, "layer_norm"),
        runner=path,
        stem=(below(path, "conv1"), below(path, "conv2")),
    )
    yield Architecture(towers=(tower,), example=whisper_example, library="transformers")


def torchaudio_example(model: Any) -> tuple[tuple, dict]:
    """Returns a random waveform (1, T) of a quarter of a second.

    HuBERT's pretraining model also needs labels (1, frames).
    """
    frames = 12
    path = path_of(model, "FeatureExtractor")
    convolutions = model.get_submodule(path or "").conv_layers
    kernels = [layer.kernel_size for layer in convolutions]
    strides = [layer.stride for layer in convolutions]
    wave = _wave(model, _samples(frames, kernels, strides))
    if not hasattr(model, "logit_generator"):
        return (wave,), {}
    return (wave, torch.zeros(1, frames, dtype=torch.long, device=wave.device)), {}


def _torchaudio(model: Any) -> Iterable[Architecture]:
    path = path_of(model, "Transformer")
    front = path_of(model, "FeatureExtractor")
    projection = path_of(model, "FeatureProjection")
    assert path is not None
    assert front is not None
    assert projection is not None
    transformer = model.get_submodule(path)
    # The stack's own flag says the opposite of its layers' flag. It places the stack's norm: before
    # the first block if True, after the last if False.
    pre_norm = transformer.layers[0].layer_norm_first
    for leaves in (_CALLED, _PACKED):
        tower = TowerSpec(
            name="audio",
            blocks=below(path, "layers"),
            sublayers=_layers(pre_norm=pre_norm, attention="attention", leaves=leaves),
            norm=None if transformer.layer_norm_first else below(path, "layer_norm"),
            prompts=_NO_PROMPTS,
            front=below(front, "conv_layers"),
            runner=path,
            stem=(projection, below(path, "pos_conv_embed")),
        )
        yield Architecture(towers=(tower,), example=torchaudio_example, library="torchaudio")


ROWS: tuple[TableRow, ...] = (
    TableRow(
        classes=(
            "transformers.models.wav2vec2.modeling_wav2vec2.Wav2Vec2PreTrainedModel",
            "transformers.models.hubert.modeling_hubert.HubertPreTrainedModel",
            "transformers.models.wavlm.modeling_wavlm.WavLMPreTrainedModel",
        ),
        architectures=_huggingface,
    ),
    TableRow(
        classes=("transformers.models.whisper.modeling_whisper.WhisperPreTrainedModel",),
        architectures=_whisper,
    ),
    TableRow(
        classes=(
            "torchaudio.models.wav2vec2.model.Wav2Vec2Model",
            "torchaudio.models.wav2vec2.model.HuBERTPretrainModel",
            "torchaudio.pipelines._wav2vec2.utils._Wav2Vec2Model",
        ),
        architectures=_torchaudio,
    ),
)
