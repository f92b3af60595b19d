"""Where adapters go in speech encoders of transformers and torchaudio."""

import pytest
import torch
import transformers
from families import Family, tensors
from families.speech import FAMILIES, SMALL, STABLE
from families.speech_twins import to_torchaudio
from injection.checks import check_family
from torchaudio.pipelines._wav2vec2.utils import _extend_model

from mmadapters.sites.tables import describe

BY_NAME = {family.name: family for family in FAMILIES}
TWINS = [
    (BY_NAME[trait.removeprefix("twin:")], family)
    for family in FAMILIES
    for trait in family.traits
    if trait.startswith("twin:")
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_sites_are_what_the_model_computes(family: Family) -> None:
    check_family(family)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_example_runs_in_training_mode(family: Family) -> None:
    model = family.build().train()
    args, kwargs = describe(model)[1](model)
    assert tensors(model(*args, **kwargs))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_names_of_two_blocks(family: Family) -> None:
    sites, _ = describe(family.build())
    leaves = {"attn": ["q", "k", "v", "o", "norm"], "ffn": ["up", "down", "norm"]}
    fronts = 0 if family.name == "hf-whisper" else 7
    expected = ["audio", *(f"audio.front.{index}" for index in range(fronts))]
    for index in range(2):
        expected.append(f"audio.blocks.{index}")
        for sublayer, roles in leaves.items():
            name = f"audio.blocks.{index}.{sublayer}"
            expected.extend([name, *(f"{name}.{role}" for role in roles)])
    pre_norm = family.name in ("hf-wav2vec2-stable", "torchaudio-wav2vec2-prenorm", "hf-whisper")
    assert sites.names() == [*expected, *(["audio.norm"] if pre_norm else [])]


@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: f"{twin[0].name}={twin[1].name}")
def test_twins_have_equal_names_and_outputs(twin: tuple[Family, Family]) -> None:
    theirs, mine = (family.build() for family in twin)
    assert describe(theirs)[0].names() == describe(mine)[0].names()
    args, _ = twin[0].inputs()
    with torch.no_grad():
        one, other = tensors(theirs(*args))[0], tensors(mine(*args))[0]
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", ["ForCTC", "ForSequenceClassification"])
@pytest.mark.parametrize("kind", ["Wav2Vec2", "Hubert", "WavLM"])
def test_names_do_not_depend_on_the_head(kind: str, head: str) -> None:
    config = getattr(transformers, f"{kind}Config")(**SMALL)
    names = [
        describe(getattr(transformers, f"{kind}{suffix}")(config))[0].names()
        for suffix in ("Model", head)
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("kind", ["Wav2Vec2", "Hubert", "WavLM"])
@pytest.mark.parametrize("stable", [False, True])
def test_placement_of_norms_is_read_from_the_layers(kind: str, stable: bool) -> None:
    options = {**SMALL, **(STABLE if stable else {})}
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**options))
    # The configuration no longer says what was built.
    model.config.do_stable_layer_norm = not stable
    assert all(sublayer.post_norm is not stable for sublayer in describe(model)[0].sublayers())


def test_longer_heads_get_a_longer_example() -> None:
    config = transformers.Wav2Vec2Config(**SMALL, tdnn_dim=(16,) * 5, xvector_output_dim=16)
    model = transformers.Wav2Vec2ForXVector(config).train()
    args, kwargs = describe(model)[1](model)
    assert all(tensor.isfinite().all() for tensor in tensors(model(*args, **kwargs)))


def test_wrapper_of_a_bundle_has_the_sites_of_its_model() -> None:
    bare = to_torchaudio(BY_NAME["hf-wav2vec2-stable"].build())
    wrapped = _extend_model(bare, normalize_waveform=True)
    sites, example = describe(wrapped)
    assert sites.names() == describe(bare)[0].names()
    args, kwargs = example(wrapped)
    assert wrapped(*args, **kwargs)[0].shape == (1, 12, 32)


@pytest.mark.parametrize(
    "cls", ["WhisperModel", "WhisperForConditionalGeneration", "WhisperForAudioClassification"]
)
def test_of_whisper_only_the_encoder_is_adapted(cls: str) -> None:
    size = {"d_model": 32, "num_mel_bins": 8, "max_source_positions": 12, "vocab_size": 64}
    layers = {"encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 48}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = transformers.WhisperConfig(**size, **layers, **heads, **tokens)
    model = getattr(transformers, cls)(config)
    sites, example = describe(model)
    assert sites.names() == describe(BY_NAME["hf-whisper"].build())[0].names()
    args, kwargs = example(model)
    assert tensors(model(*args, **kwargs))


def test_whisper_without_an_encoder_is_refused_in_one_sentence() -> None:
    config = transformers.WhisperConfig(
        d_model=32, decoder_layers=1, decoder_attention_heads=2, vocab_size=64, pad_token_id=0
    )
    with pytest.raises(ValueError, match="only the encoder"):
        describe(transformers.WhisperForCausalLM(config))


def test_attention_by_matrix_products_offers_no_place_for_prefixes() -> None:
    model = transformers.Wav2Vec2Model._from_config(
        transformers.Wav2Vec2Config(**SMALL), attn_implementation="eager"
    )
    assert all(sublayer.attention is None for sublayer in describe(model)[0].sublayers())
