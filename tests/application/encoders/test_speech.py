"""SpeechTower against the libraries' own forward, and batched against single utterances."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import Family, families
from families.speech import SMALL
from torch import Tensor

import mmadapters
from mmadapters import AdapterModel
from mmadapters.tasks.config.schema import BackboneConfig
from mmadapters.tasks.encoders.speech import (
    SpeechTower,
    conv_frames,
    convolutions,
    normalised,
    normalises,
)

SPEECH = {
    name: f
    for name, f in families().items()
    if name.split("-")[1] in ("wav2vec2", "hubert", "wavlm", "whisper")
}
LENGTHS = (3200, 1700, 3200, 2411)
every_family = pytest.mark.parametrize("family", SPEECH.values(), ids=list(SPEECH))


def waves(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    """Noise up to each length, and large values behind it that must not count."""
    batch = torch.full((len(lengths), max(lengths)), 9.0)
    for row, length in enumerate(lengths):
        batch[row, :length] = torch.randn(length)
    return batch, torch.tensor(lengths)


def tower_of(family: Family, method: str | None = None) -> SpeechTower:
    model = mmadapters.init(family.build())
    if method is not None:
        model.add_adapter("a", method)
        for parameter in model.adapter("a").parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        model.set_active_adapters("a")
    return SpeechTower(model)


def test_all_speech_families_are_here() -> None:
    assert len(SPEECH) == 9


@every_family
@pytest.mark.parametrize("method", [None, "double_seq_bn", "lora"])
@pytest.mark.parametrize("normalise", [False, True])
def test_batched_frames_are_those_of_each_utterance_alone(
    family: Family, method: str | None, normalise: bool
) -> None:
    tower = tower_of(family, method)
    tower._normalise = normalise
    batch, lengths = waves()
    with torch.no_grad():
        frames, counts = tower(batch, lengths)
        for row, length in enumerate(LENGTHS):
            alone, (count,) = tower(batch[row : row + 1, :length], lengths[row : row + 1])
            assert count == counts[row] == alone.shape[1]
            torch.testing.assert_close(frames[row, :count], alone[0], atol=2e-5, rtol=1e-4)


@every_family
def test_one_utterance_gives_what_the_library_gives(family: Family) -> None:
    tower = tower_of(family)
    backbone = tower.encoder.backbone
    batch, lengths = waves((3200,))
    with torch.no_grad():
        frames, counts = tower(batch, lengths)
        if family.name == "hf-whisper":
            mel = tower._front.log_mel(torch.nn.functional.pad(batch, (0, 3840 - 3200)))  # type: ignore[attr-defined]
            expected = backbone(mel).last_hidden_state[:, : int(counts)]
        elif family.name.startswith("hf-"):
            model = getattr(backbone, backbone.base_model_prefix, backbone)
            expected = model(batch).last_hidden_state
        else:
            expected = backbone.extract_features(batch)[0][-1]
            norm = backbone.encoder.transformer
            if not norm.layer_norm_first:
                expected = backbone.encoder(backbone.feature_extractor(batch, None)[0])
    torch.testing.assert_close(frames, expected, atol=1e-5, rtol=1e-5)


@every_family
def test_frames_are_counted_as_the_encoder_makes_them(family: Family) -> None:
    tower = tower_of(family)
    for length in (400, 401, 719, 720, 721, 1999, 3200, 3839):
        with torch.no_grad():
            frames, counts = tower(torch.randn(1, length), torch.tensor([length]))
        assert frames.shape == (1, tower.frames(length), tower.width)
        assert int(counts) == tower.frames(length)
    assert torch.equal(
        tower.frames(torch.tensor([0, 399, 3200])),
        torch.tensor([tower.frames(n) for n in (0, 399, 3200)]),
    )


def test_the_formula_of_ctc_frames() -> None:
    layers = list(zip((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2), strict=True))
    assert conv_frames(16_000, layers) == 49
    assert conv_frames(400, layers) == 1
    assert conv_frames(399, layers) == 0
    assert conv_frames(3, layers) == 0


@every_family
def test_what_is_too_short_or_too_long_is_refused(family: Family) -> None:
    tower = tower_of(family)
    with pytest.raises(ValueError, match="too short for one frame"):
        tower(torch.randn(1, 100), torch.tensor([100]))
    if tower.longest is not None:
        with pytest.raises(ValueError, match="cut it up"):
            tower(torch.randn(1, tower.longest + 1), torch.tensor([tower.longest + 1]))


@every_family
def test_gradients_reach_the_adapter_and_nothing_else(family: Family) -> None:
    tower = tower_of(family)
    tower.encoder.add_adapter("b", "double_seq_bn")
    tower.encoder.train_adapter("b")
    frames, _ = tower(*waves())
    frames.square().sum().backward()
    assert all(p.grad is not None for p in tower.encoder.adapter("b").parameters())
    assert all(p.grad is None for p in tower.encoder.backbone.parameters())


def test_log_mel_is_that_of_transformers() -> None:
    from transformers import WhisperConfig, WhisperFeatureExtractor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32
    )
    tower = SpeechTower(mmadapters.init(WhisperEncoder(config).eval()))
    wave = torch.randn(1, 480_000) * torch.linspace(0, 1, 480_000)
    expected = WhisperFeatureExtractor()(wave[0].numpy(), sampling_rate=16_000).input_features
    mel = tower._front.log_mel(wave)  # type: ignore[attr-defined]
    torch.testing.assert_close(mel[0], torch.as_tensor(expected[0]), atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tower._front.log_mel(wave), mel)  # type: ignore[attr-defined]


def test_normalisation_reads_an_utterances_own_samples() -> None:
    batch, lengths = waves()
    valid = torch.arange(batch.shape[1]) < lengths[:, None]
    out = normalised(batch.masked_fill(~valid, 0.0), valid)
    for row, length in enumerate(LENGTHS):
        own = out[row, :length]
        assert own.mean().abs() < 1e-5
        assert own.var(unbiased=False) == pytest.approx(1, abs=1e-4)
        assert not out[row, length:].any()


def bundled() -> AdapterModel:
    """As a bundle of torchaudio wraps the models that want normalised waveforms."""
    from torchaudio.pipelines._wav2vec2.utils import _extend_model

    wrapped = _extend_model(SPEECH["torchaudio-wav2vec2-prenorm"].build(), normalize_waveform=True)
    return mmadapters.init(wrapped.eval())


def test_a_bundle_that_normalises_does_so_utterance_by_utterance() -> None:
    tower = SpeechTower(bundled())
    batch, lengths = waves()
    batch = 5 * batch + 1
    with torch.no_grad():
        frames, counts = tower(batch, lengths)
        for row, length in enumerate(LENGTHS):
            # torchaudio normalises whatever it is given as one: alone it is right.
            alone = tower.encoder.backbone(batch[row : row + 1, :length])[0]
            torch.testing.assert_close(frames[row, : counts[row]], alone[0], atol=1e-4, rtol=1e-4)


def test_what_the_libraries_do_with_padding_is_why() -> None:
    """The front end with a group norm: a mask alone does not make a batch like its utterances."""
    model = SPEECH["hf-hubert"].build()
    batch, lengths = waves((3200, 1600))
    mask = torch.arange(3200) < lengths[:, None]
    batch = batch.masked_fill(~mask, 0.0)
    with torch.no_grad():
        padded = model(batch, attention_mask=mask.long()).last_hidden_state[1]
        alone = model(batch[1:, :1600]).last_hidden_state[0]
    assert (padded[: len(alone)] - alone).abs().max() > 0.05


@pytest.mark.parametrize("name", ["hf-wav2vec2", "hf-wavlm"])
def test_spec_augment_acts_where_asked_and_lets_short_utterances_be(name: str) -> None:
    model = mmadapters.init(SPEECH[name].build())
    tower, module = SpeechTower(model), model.backbone
    module = getattr(module, module.base_model_prefix, module)
    batch, lengths = waves((4800, 4800))
    with torch.no_grad():
        still, _ = tower(batch, lengths)
        module.training = True
        masked, _ = tower(batch, lengths)
        short, _ = tower(batch[:, :1500], torch.tensor([1500, 1500]))
        module.training = False
        kept, _ = tower(batch[:, :1500], torch.tensor([1500, 1500]))
        again, _ = tower(batch, lengths)
    assert torch.equal(still, again)
    assert not torch.allclose(still, masked)
    # Four frames are fewer than a mask has: transformers would raise.
    assert short.shape[1] == 4
    assert torch.equal(short, kept)


def test_whether_waveforms_are_normalised_is_said_by_the_feature_extractor(tmp_path: Path) -> None:
    from transformers import Wav2Vec2FeatureExtractor

    backbone = SPEECH["hf-wav2vec2"].build()
    for says in (True, False):
        Wav2Vec2FeatureExtractor(do_normalize=says).save_pretrained(tmp_path)
        named = BackboneConfig(name="hf/wav2vec2", processor=str(tmp_path))
        assert normalises(named, backbone) is says
    assert not normalises(BackboneConfig(name="nano/wav2vec2"), backbone)


@every_family
def test_the_convolutions_are_what_comes_before_the_blocks(family: Family) -> None:
    model = mmadapters.init(family.build())
    inside = {id(p) for block in model.sites.blocks() for p in block.module.parameters()}
    front = [p for module in convolutions(model.backbone) for p in module.parameters()]
    assert front
    assert all(p.dim() <= 3 and id(p) not in inside for p in front)
    kernels = [p for p in front if p.dim() == 3]
    assert len(kernels) == (2 if family.name == "hf-whisper" else 7)


def test_an_encoder_that_hears_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="reads no audio: it has the towers vision"):
        SpeechTower(mmadapters.init(families()["timm-vit"].build()))


def test_convolutions_behind_the_blocks_are_refused() -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(**SMALL, add_adapter=True, output_hidden_size=32)
    with pytest.raises(ValueError, match="add_adapter: false"):
        SpeechTower(mmadapters.init(Wav2Vec2Model(config)))
