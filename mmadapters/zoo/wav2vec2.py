"""`nano/wav2vec2`: HF's `Wav2Vec2Model`, torchaudio's with the same weights, and the CTC head.

Shape legend: B utterances, T samples at 16,000 Hz, F = ⌊(T − 400) / 320⌋ + 1 frames (50 a second),
C characters.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import read_config, read_weights

if TYPE_CHECKING:
    import torchaudio
    from torch import Tensor, nn
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

PAD, SPACE = "<pad>", "|"
# The blank of CTC is the padding of the labels, id 0.
CHARACTERS = (PAD, SPACE, "'", *"abcdefghijklmnopqrstuvwxyz")
VOCABULARY = {character: index for index, character in enumerate(CHARACTERS)}


def load(directory: Path, library: str | None = None, **kwargs: Any) -> "nn.Module":
    """Loads the encoder of a directory as the class of `library`, without CTC head, in eval mode.

    Args:
        library: "hf" (default) gives `transformers.Wav2Vec2Model`; its `attention_mask` is (B, T),
            in samples. "torchaudio" gives `torchaudio.models.Wav2Vec2Model`; its `lengths` are
            (B,), in samples.
        kwargs: fields of `Wav2Vec2Config` that replace the shipped ones (`attn_implementation`, …).

    Raises:
        ValueError: the library is neither.
        RuntimeError: the weights do not fit the config.
    """
    if library not in (None, "hf", "torchaudio"):
        raise ValueError(f"nano/wav2vec2 is 'hf' or 'torchaudio', not {library!r}")
    model = load_ctc(directory, **kwargs)
    if library == "torchaudio":
        return to_torchaudio(model, head=False)
    return model.wav2vec2


def load_ctc(directory: Path, **kwargs: Any) -> "Wav2Vec2ForCTC":
    """Loads the encoder with its CTC head; logits are (B, F, C), the blank is id 0."""
    import torch

    weights = read_weights(directory)
    # On the meta device no random values are made that the weights would replace.
    with torch.device("meta"):
        model = build(**read_config(directory)["architecture"] | kwargs)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def build(**architecture: Any) -> "Wav2Vec2ForCTC":
    """Builds HF's network with random weights, in fp32.

    Args:
        architecture: fields of `Wav2Vec2Config`.
    """
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    # A frozen trunk must have neither LayerDrop nor SpecAugment, which HF turns on by default. Both
    # masking probabilities at 0 also keep the unused `masked_spec_embed` out of the weights.
    unmasked = {"apply_spec_augment": False, "mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    return Wav2Vec2ForCTC(Wav2Vec2Config(**{**unmasked, "layerdrop": 0.0, **architecture}))


def to_torchaudio(
    model: "Wav2Vec2ForCTC", *, head: bool = True
) -> "torchaudio.models.Wav2Vec2Model":
    """Builds the same network as torchaudio's class, on the same parameters (not copies of them).

    HF's `feat_extract_norm="layer"` is torchaudio's mode "layer_norm", and HF's
    `do_stable_layer_norm` is torchaudio's `encoder_layer_norm_first`.

    Args:
        head: whether torchaudio's `aux` is the CTC head, so that the model returns logits.
    """
    import torch
    from torchaudio.models import wav2vec2_model

    config = model.config
    convolutions = zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)
    with torch.device("meta"):
        converted = wav2vec2_model(
            extractor_mode=f"{config.feat_extract_norm}_norm",
            extractor_conv_layer_config=list(convolutions),
            extractor_conv_bias=config.conv_bias,
            encoder_embed_dim=config.hidden_size,
            encoder_projection_dropout=config.feat_proj_dropout,
            encoder_pos_conv_kernel=config.num_conv_pos_embeddings,
            encoder_pos_conv_groups=config.num_conv_pos_embedding_groups,
            encoder_num_layers=config.num_hidden_layers,
            encoder_num_heads=config.num_attention_heads,
            encoder_attention_dropout=config.attention_dropout,
            encoder_ff_interm_features=config.intermediate_size,
            encoder_ff_interm_dropout=config.activation_dropout,
            encoder_dropout=config.hidden_dropout,
            encoder_layer_norm_first=config.do_stable_layer_norm,
            encoder_layer_drop=config.layerdrop,
            aux_num_out=config.vocab_size if head else None,
        )
    parts = {
        "feature_extractor.": model.wav2vec2.feature_extractor,
        "encoder.feature_projection.": model.wav2vec2.feature_projection,
        "encoder.transformer.": model.wav2vec2.encoder,
        **({"aux.": model.lm_head} if head else {}),
    }
    parameters = {
        prefix + name: parameter
        for prefix, part in parts.items()
        for name, parameter in part.named_parameters()
    }
    converted.load_state_dict(parameters, assign=True)
    return converted.train(model.training)


def transcribe(model: "Wav2Vec2ForCTC", waveforms: Sequence["Tensor"]) -> list[str]:
    """Decodes greedily: the best character of each frame, repeats merged, blanks dropped.

    Args:
        waveforms: each (T,) at 16,000 Hz, of any length. They are padded to one batch.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    device = next(model.parameters()).device
    lengths = [len(waveform) for waveform in waveforms]
    x_BT = pad_sequence(list(waveforms), batch_first=True).to(device)
    mask_BT = (
        torch.arange(x_BT.shape[1], device=device) < torch.tensor(lengths, device=device)[:, None]
    )
    with torch.inference_mode():
        best_BF = model(x_BT, attention_mask=mask_BT).logits.argmax(-1)
    frames = [frame_count(length, model.config) for length in lengths]
    return [decode(ids[:count]) for ids, count in zip(best_BF.tolist(), frames, strict=True)]


def frame_count(samples: int, config: "Wav2Vec2Config") -> int:
    """Returns the number of frames that the feature extractor makes of a number of samples."""
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        samples = (samples - kernel) // stride + 1
    return samples


def decode(ids: Sequence[int]) -> str:
    """Returns the text of a sequence of character ids, one id a frame."""
    merged = [i for i, previous in zip(ids, [0, *ids], strict=False) if i != previous and i != 0]
    return " ".join("".join(CHARACTERS[i] for i in merged).replace(SPACE, " ").split())
