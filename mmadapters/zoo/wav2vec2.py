"""`nano/wav2vec2`: HF's `Wav2Vec2Model`, the same weights as torchaudio's, its CTC head, its check.

Shape legend: B utterances, T samples at 16,000 Hz, F = ⌊(T − 400) / 320⌋ + 1 frames (50 a second),
C characters.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapters.tasks.zoo.figure import Figure

from .files import read_config, read_weights

if TYPE_CHECKING:
    import torchaudio
    from torch import Tensor, nn
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

PAD, SPACE = "<pad>", "|"
# The blank of CTC is the padding of the labels, id 0.
CHARACTERS = (PAD, SPACE, "'", *"abcdefghijklmnopqrstuvwxyz")
VOCABULARY = {character: index for index, character in enumerate(CHARACTERS)}
VERIFIED_SENTENCES = 300


def load(directory: Path, library: str | None = None, **kwargs: Any) -> "nn.Module":
    """The encoder of a directory as the class of `library`, without the CTC head, in eval mode.

    Args:
        library: "hf" (default): `transformers.Wav2Vec2Model`, whose `attention_mask` is (B, T), in
            samples; "torchaudio": `torchaudio.models.Wav2Vec2Model`, whose `lengths` are (B,).
        kwargs: fields of `Wav2Vec2Config` over the shipped ones (`attn_implementation`, …).

    Raises:
        ValueError: another library.
        RuntimeError: the weights are not those of the config.
    """
    if library not in (None, "hf", "torchaudio"):
        raise ValueError(f"nano/wav2vec2 is 'hf' or 'torchaudio', not {library!r}")
    model = load_ctc(directory, **kwargs)
    if library == "torchaudio":
        return to_torchaudio(model, head=False)
    return model.wav2vec2


def load_ctc(directory: Path, **kwargs: Any) -> "Wav2Vec2ForCTC":
    """The encoder with the CTC head that it was trained with; logits (B, F, C), blank 0."""
    import torch

    weights = read_weights(directory)
    # On the meta device nothing is drawn that the weights would replace.
    with torch.device("meta"):
        model = build(**read_config(directory)["architecture"] | kwargs)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def build(**architecture: Any) -> "Wav2Vec2ForCTC":
    """HF's network with random weights, in fp32."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    # A frozen trunk must have neither LayerDrop nor SpecAugment, which HF turns on by default. Both
    # masking probabilities at 0 also keep the unused `masked_spec_embed` out of the weights.
    unmasked = {"apply_spec_augment": False, "mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    return Wav2Vec2ForCTC(Wav2Vec2Config(**{**unmasked, "layerdrop": 0.0, **architecture}))


def to_torchaudio(
    model: "Wav2Vec2ForCTC", *, head: bool = True
) -> "torchaudio.models.Wav2Vec2Model":
    """The same network as torchaudio's class, on the same parameters (not copies of them).

    Names that differ: the extractor's `layer` norm is its "layer_norm" mode, and HF's
    `do_stable_layer_norm` its `encoder_layer_norm_first`; with `head`, its `aux` gives the logits.
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
    """Greedy CTC decoding: the best character of each frame, repeats merged, blanks dropped.

    Args:
        waveforms: each (T,) at 16,000 Hz, of any lengths; padded together, so keep it a batch.
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
    """How many frames the feature extractor makes of so many samples."""
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        samples = (samples - kernel) // stride + 1
    return samples


def decode(ids: Sequence[int]) -> str:
    """The text of a sequence of frames' character ids."""
    merged = [i for i, previous in zip(ids, [0, *ids], strict=False) if i != previous and i != 0]
    return " ".join("".join(CHARACTERS[i] for i in merged).replace(SPACE, " ").split())


def held_out_readings(
    accent: str, count: int, *, text: Callable[[int], str] | None = None
) -> Iterator[tuple[str, "Tensor"]]:
    """Held-out texts, each read by a held-out voice variant: (text, (T,) at 16,000 Hz).

    Text i has the same variant, rate and pitch in every accent.

    Args:
        text: of a seed; `mmadapters.tasks.data.synthetic.sentences.sentence` by default.
    """
    from mmadapters.tasks.data.synthetic import sentences, speech

    for seed in sentences.TEST_SEEDS[:count]:
        words = (text or sentences.sentence)(seed)
        rng = random.Random(f"test reader {seed}")
        reader = speech.random_reader(rng, accent=accent, among=speech.held_out_variants())
        yield words, speech.synthesize(words, reader)


def recognise(
    model: "Wav2Vec2ForCTC", readings: Sequence[tuple[str, "Tensor"]]
) -> list[tuple[str, str]]:
    """What was said and what was heard, for each (text, (T,) at 16,000 Hz), in any order."""
    # Neighbours in length share a batch, so little of it is padding.
    ordered = sorted(readings, key=lambda reading: len(reading[1]))
    pairs: list[tuple[str, str]] = []
    for start in range(0, len(ordered), 16):
        texts, waveforms = zip(*ordered[start : start + 16], strict=True)
        pairs += zip(texts, transcribe(model, waveforms), strict=True)
    return pairs


def word_error_rate(pairs: Sequence[tuple[str, str]]) -> float:
    """(substitutions + deletions + insertions) / words over all pairs (said, heard)."""
    import jiwer

    said, heard = zip(*pairs, strict=True)
    return jiwer.process_words(list(said), list(heard)).wer


def share_missed(pairs: Sequence[tuple[str, str]], words: frozenset[str]) -> float:
    """The share of the said words among `words` that the best alignment does not find heard."""
    import jiwer

    said, heard = zip(*pairs, strict=True)
    result = jiwer.process_words(list(said), list(heard))
    hits = total = 0
    for reference, chunks in zip(result.references, result.alignments, strict=True):
        total += sum(word in words for word in reference)
        for chunk in chunks:
            if chunk.type == "equal":
                hit = reference[chunk.ref_start_idx : chunk.ref_end_idx]
                hits += sum(word in words for word in hit)
    return 1 - hits / total


def verify(
    directory: Path, data: Path | None = None, *, sentences: int = VERIFIED_SENTENCES
) -> list[Figure]:
    """The card's WER on en-us, recomputed from what ships; speech synthesis makes the data.

    Args:
        data: not needed here; every encoder's `verify` takes it.
        sentences: how many of the card's sentences to read. Fewer are noisier, so the tolerance
            widens with two standard errors of the card's figure.
    """
    claimed = read_config(directory)["figures"]["wer"]
    tolerance = claimed["tolerance"]
    if sentences != VERIFIED_SENTENCES:
        # A sentence's errors come together, so it, rather than a word, is the unit of chance.
        tolerance += 2 * (claimed["value"] / sentences) ** 0.5
    try:
        readings = list(held_out_readings("en-us", sentences))
        measured = word_error_rate(recognise(load_ctc(directory), readings))
        note = f"{sentences} sentences"
    except ImportError as error:
        measured, note = None, str(error)
    return [
        Figure(
            name=claimed["name"],
            expected=claimed["value"],
            measured=measured,
            tolerance=tolerance,
            higher_is_better=False,
            note=note,
        )
    ]
