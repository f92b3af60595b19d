"""`SpeechTower`: any speech encoder of transformers or torchaudio, from waveforms to valid frames.

The frames of an utterance do not depend on its batch. In two cases padding would change them, so
utterances of each length run separately: in front ends with group norm (wav2vec 2.0, HuBERT base),
whose statistics are over time, and in encoders that take no mask. (A masked norm over the whole
batch gives the same frames but takes four times as long on a CPU.)

Shape legend: B utterances, T samples, F frames, D width, M mel bands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmadapters import AdapterModel

from ..config.schema import BackboneConfig

__all__ = ["SpeechTower", "convolutions", "layer_drop", "normalises", "without_layer_drop"]

SAMPLE_RATE = 16_000
# The attributes of modules and configs that hold the probability of LayerDrop.
LAYER_DROP = ("layer_drop", "layerdrop", "encoder_layerdrop")


class SpeechTower:
    """The speech encoder of an `AdapterModel` with its active adapters.

    It has no parameters of its own, so a `TaskModel` can keep it as a plain attribute.

    Attributes:
        width: D.
        depth: number of blocks.
        sample_rate: sample rate of the waveforms in Hz.
        longest: most samples of an utterance, None without a bound.
        layers: (kernel, stride) of the layers that turn samples into frames, for `conv_frames`.

    Raises:
        ValueError: the encoder reads no audio, or changes the number of frames after its blocks.
    """

    def __init__(self, encoder: AdapterModel, *, normalise: bool = False) -> None:
        """Finds the front end of the encoder.

        Args:
            normalise: whether each utterance gets zero mean and unit variance, see `normalises`.
                Bundles of torchaudio that need it get it in any case.
        """
        tower = encoder.sites.towers.get("audio")
        if tower is None:
            raise ValueError(
                f"{encoder.sites.architecture} reads no audio: it has the towers "
                f"{', '.join(encoder.sites.towers)}"
            )
        self.encoder = encoder
        self.width = tower.width
        self.depth = len(tower.blocks)
        self.sample_rate = SAMPLE_RATE
        self._front = _front_end(encoder.backbone)
        self._normalise = normalise or self._front.normalises
        self.longest = self._front.longest
        self.layers = self._front.layers

    def frames(self, samples: Any) -> Any:
        """Returns the number of frames of a number of samples, an int or a tensor."""
        return conv_frames(samples, self.layers)

    def __call__(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns frames (B, F, D) and the number of valid frames of each utterance (B,).

        Args:
            waves: (B, T) at `sample_rate`; samples after the length of an utterance have no effect.
            lengths: (B,) in samples.

        Raises:
            ValueError: an utterance is too short for one frame, or longer than the encoder takes.
        """
        counts = self.frames(lengths)
        if int(counts.min()) < 1:
            raise ValueError(
                f"an utterance of {int(lengths.min())} samples is too short for one frame"
            )
        if self.longest is not None and int(lengths.max()) > self.longest:
            raise ValueError(
                f"an utterance of {int(lengths.max()) / self.sample_rate:.1f} s is longer than "
                f"the {self.longest / self.sample_rate:.1f} s that the encoder takes: cut it up"
            )
        longest = int(lengths.max())
        waves = waves[:, :longest]
        if _has_values(waves):
            waves = self._cleaned(waves, lengths)
        return self._front.run(waves, lengths, counts), counts

    def _cleaned(self, waves: Tensor, lengths: Tensor) -> Tensor:
        """Sets samples after each utterance to 0 and normalises the others if requested."""
        longest = waves.shape[1]
        valid = torch.arange(longest, device=waves.device) < lengths[:, None]
        waves = waves.masked_fill(~valid, 0.0)
        return normalised(waves, valid) if self._normalise else waves


def normalised(waves: Tensor, valid: Tensor) -> Tensor:
    """Returns waves (B, T) with zero mean and unit variance over each utterance's valid samples.

    Other samples are 0.
    """
    count = valid.sum(dim=1, keepdim=True)
    mean = waves.sum(dim=1, keepdim=True) / count
    centred = (waves - mean).masked_fill(~valid, 0.0)
    variance = centred.square().sum(dim=1, keepdim=True) / count
    return centred / (variance + 1e-7).sqrt()


def normalises(config: BackboneConfig, backbone: nn.Module) -> bool:
    """Tells whether the encoder was trained on waveforms of zero mean and unit variance.

    The feature extractor of hub models says so; without one, the answer is no.

    Raises:
        RuntimeError, OSError: the feature extractor cannot be downloaded.
    """
    if _is_whisper(backbone) or not config.name.startswith("hf/"):
        return False
    name = config.processor or (config.name.partition("/")[2] if config.pretrained else None)
    if name is None:
        return False
    from transformers import AutoFeatureExtractor

    return bool(getattr(AutoFeatureExtractor.from_pretrained(name), "do_normalize", False))


def conv_frames(samples: Any, layers: list[tuple[int, int]]) -> Any:
    """Returns the number of frames: ⌊(n − k) / s⌋ + 1 for each (kernel, stride), at least 0.

    Args:
        samples: an int or a tensor.
    """
    for kernel, stride in layers:
        samples = (samples - kernel) // stride + 1
        samples = samples.clamp(min=0) if isinstance(samples, Tensor) else max(samples, 0)
    return samples


class _FrontEnd:
    """Runs the speech encoder of a library.

    Attributes:
        normalises: whether the encoder itself asks for zero mean and unit variance.
        longest: most samples of an utterance, None without a bound.
        layers: (kernel, stride) of the layers that turn samples into frames.
        convolutions: the modules of these layers.
    """

    normalises = False
    longest: int | None = None
    layers: list[tuple[int, int]]
    convolutions: tuple[nn.Module, ...]

    def run(self, waves: Tensor, lengths: Tensor, counts: Tensor) -> Tensor:
        """Returns frames (B, F, D) of waves (B, T) with zeros after each utterance."""
        raise TypeError(f"{type(self).__name__} does not implement run")


class _HuggingFace(_FrontEnd):
    """Wav2Vec2, HuBERT and WavLM of transformers, under a CTC head or alone."""

    def __init__(self, backbone: Any) -> None:
        model = getattr(backbone, getattr(backbone, "base_model_prefix", ""), backbone)
        if getattr(model, "adapter", None) is not None:
            raise ValueError(
                f"this {type(model).__name__} has convolutions after its blocks (add_adapter), "
                "which change the number of frames; load it with options {add_adapter: false}"
            )
        self.model, config = model, model.config
        self.convolutions = (model.feature_extractor,)
        self.layers = list(zip(config.conv_kernel, config.conv_stride, strict=True))
        self.by_length = config.feat_extract_norm == "group"

    def run(self, waves: Tensor, lengths: Tensor, counts: Tensor) -> Tensor:
        def features(part: Tensor) -> Tensor:
            return self.model.feature_extractor(part).transpose(1, 2)

        if self.by_length and _has_values(waves):
            states = by_length(features, waves, lengths)
        else:
            states = features(waves)
        mask = torch.arange(states.shape[1], device=states.device) < counts[:, None]
        states = self.model.feature_projection(states)
        # HuBERT returns states only; wav2vec 2.0 and WavLM also return the normed features.
        states = states[0] if isinstance(states, tuple) else states
        # SpecAugment; transformers refuses inputs that are shorter than one of its masks.
        if self.model.training and states.shape[1] >= self.model.config.mask_time_length:
            states = self.model._mask_hidden_states(states, attention_mask=mask)
        return self.model.encoder(states, attention_mask=mask).last_hidden_state


class _TorchAudio(_FrontEnd):
    """Wav2Vec2, HuBERT and WavLM of torchaudio, alone or from a bundle."""

    def __init__(self, backbone: Any) -> None:
        self.normalises = bool(getattr(backbone, "normalize_waveform", False))
        self.model = getattr(backbone, "model", backbone)
        self.convolutions = (self.model.feature_extractor,)
        layers = self.model.feature_extractor.conv_layers
        self.layers = [(layer.kernel_size, layer.stride) for layer in layers]
        self.by_length = isinstance(layers[0].layer_norm, nn.GroupNorm)
        attention = self.model.encoder.transformer.layers[0].attention
        self.masks = not type(attention).__name__.startswith("WavLM")

    def run(self, waves: Tensor, lengths: Tensor, counts: Tensor) -> Tensor:
        def features(part: Tensor) -> Tensor:
            return self.model.feature_extractor(part, None)[0]

        if not self.masks:
            return by_length(lambda part: self.model.encoder(features(part)), waves, lengths)
        if self.by_length and _has_values(waves):
            states = by_length(features, waves, lengths)
        else:
            states = features(waves)
        return self.model.encoder(states, counts)


class _Whisper(_FrontEnd):
    """Whisper's encoder: log-mel spectrograms of a fixed length, 30 s in the published models."""

    WINDOW, HOP = 400, 160

    def __init__(self, backbone: Any) -> None:
        from transformers.audio_utils import mel_filter_bank

        self.model = getattr(getattr(backbone, "model", backbone), "encoder", backbone)
        self.convolutions = (self.model.conv1, self.model.conv2)
        # There is a spectrum every HOP samples, then a convolution of stride 2.
        self.layers = [(self.HOP, self.HOP), (1, 2)]
        self.longest = self.model.max_source_positions * 2 * self.HOP
        filters = mel_filter_bank(
            num_frequency_bins=1 + self.WINDOW // 2,
            num_mel_filters=self.model.num_mel_bins,
            min_frequency=0.0,
            max_frequency=SAMPLE_RATE / 2,
            sampling_rate=SAMPLE_RATE,
            norm="slaney",
            mel_scale="slaney",
        )
        self.filters = torch.from_numpy(filters).float()  # (frequencies, M)

    def run(self, waves: Tensor, lengths: Tensor, counts: Tensor) -> Tensor:
        waves = F.pad(waves, (0, self.longest - waves.shape[1]))  # type: ignore[operator]
        dtype = self.model.conv1.weight.dtype
        states = self.model(self.log_mel(waves).to(dtype)).last_hidden_state
        return states[:, : int(counts.max())]

    def log_mel(self, waves: Tensor) -> Tensor:
        """Returns log-mel spectrograms (B, M, T / 160) of waves (B, T).

        As in OpenAI's `log_mel_spectrogram`, values are within 80 dB of the utterance's maximum and
        scaled to about −1 to 1.
        """
        window = torch.hann_window(self.WINDOW, device=waves.device)
        with torch.autocast(waves.device.type, enabled=False):
            spectrum = torch.stft(
                waves.float(), self.WINDOW, self.HOP, window=window, return_complex=True
            )
            power = spectrum[..., :-1].abs().square()
            mel = self.filters.to(waves.device).T @ power
        log = mel.clamp(min=1e-10).log10()
        log = torch.maximum(log, log.amax(dim=(1, 2), keepdim=True) - 8.0)
        return (log + 4.0) / 4.0


def _has_values(waves: Tensor) -> bool:
    """Tells whether waves have values; a pass that starts from stored states gets a placeholder."""
    return waves.numel() <= 1 or any(waves.stride())


def by_length(run: Callable[[Tensor], Tensor], waves: Tensor, lengths: Tensor) -> Tensor:
    """Runs `run` on the utterances of each length without padding.

    Returns:
        (B, F, D) with zeros after the frames of each utterance.
    """
    order: list[Tensor] = []
    parts: list[Tensor] = []
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero().flatten()
        parts.append(run(waves[rows, :length]))
        order.append(rows)
    longest = max(part.shape[1] for part in parts)
    padded = [F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts]
    return torch.cat(padded)[torch.cat(order).argsort()]


def convolutions(backbone: nn.Module) -> tuple[nn.Module, ...]:
    """Returns the front end of a speech encoder, which usually stays frozen in full fine-tuning.

    Raises:
        ValueError: see `SpeechTower`.
    """
    return _front_end(backbone).convolutions


def layer_drop(encoder: AdapterModel) -> tuple[nn.Module, float]:
    """Returns the module that runs the blocks of a speech encoder, and its LayerDrop probability.

    In train mode that module leaves out each block with this probability (Fan et al. 2020).

    Raises:
        ValueError: the encoder reads no audio.
    """
    if "audio" not in encoder.sites.towers:
        raise ValueError(f"{encoder.sites.architecture} is no speech encoder")
    blocks = {id(block.module) for block in encoder.sites.towers["audio"].blocks}
    runner = next(
        module
        for module in encoder.backbone.modules()
        for child in module.children()
        if isinstance(child, nn.ModuleList) and any(id(block) in blocks for block in child)
    )
    # torchaudio: layer_drop; Whisper: layerdrop; wav2vec 2.0 and its kin read their config.
    for holder in (runner, getattr(runner, "config", None)):
        for name in LAYER_DROP:
            if isinstance(value := getattr(holder, name, None), float | int):
                return runner, float(value)
    return runner, 0.0


def without_layer_drop(backbone: nn.Module) -> None:
    """Sets every LayerDrop probability of an encoder to 0."""
    for holder in (getattr(backbone, "config", None), *backbone.modules()):
        for name in LAYER_DROP:
            if isinstance(getattr(holder, name, None), float):
                setattr(holder, name, 0.0)


def _is_whisper(backbone: nn.Module) -> bool:
    return type(backbone).__name__.startswith("Whisper")


def _front_end(backbone: Any) -> _FrontEnd:
    if _is_whisper(backbone):
        return _Whisper(backbone)
    inner = getattr(backbone, "model", backbone)
    if type(inner).__module__.startswith("torchaudio."):
        return _TorchAudio(backbone)
    model = getattr(backbone, getattr(backbone, "base_model_prefix", ""), backbone)
    if hasattr(model, "feature_projection"):
        return _HuggingFace(backbone)
    raise ValueError(
        f"{type(backbone).__name__} is no speech encoder that mmadapters can run; take wav2vec "
        "2.0, HuBERT, WavLM or Whisper's encoder"
    )
