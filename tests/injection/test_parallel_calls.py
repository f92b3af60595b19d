"""Parallel in calls that have a second input, decode step by step, or read between the blocks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from families.small import randomise, seeded
from injection.matrix import FAMILIES, bare
from torch import Tensor, nn

import mmadapters
from mmadapters import AdapterModel, Parallel, SeqBnConfig

IDS = torch.tensor([[5, 6, 7, 8], [9, 4, 3, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
LABELS = torch.tensor([[4, 5, 6], [7, 8, 1]])


def adapted(backbone: nn.Module, **options: Any) -> AdapterModel:
    model = mmadapters.init(backbone.double())
    for name in "ab":
        model.add_adapter(name, SeqBnConfig(reduction_factor=2, **options))
    randomise(model.adapters, 0.5)
    return model


@functools.cache
def held(build: Callable[[], nn.Module], sites: tuple[str, ...]) -> AdapterModel:
    return adapted(build(), sites=sites)


def whisper(kind: str = "ForConditionalGeneration") -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=40,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=6,
        max_target_positions=12,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=39,
        decoder_start_token_id=2,
        begin_suppress_tokens=None,
        suppress_tokens=None,
    )
    return seeded(lambda: getattr(transformers, f"Whisper{kind}")(config))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        decoder_start_token_id=0, eos_token_id=19, pad_token_id=0,
    )  # fmt: skip
    return seeded(lambda: transformers.T5ForConditionalGeneration(config))


def sounds(samples: int = 2000) -> Tensor:
    return torch.randn(2, samples, generator=torch.Generator().manual_seed(1)).double()


def spectra(frames: int = 12) -> Tensor:
    return torch.randn(2, 8, frames, generator=torch.Generator().manual_seed(1)).double()


def inputs_of(name: str) -> dict[str, Any]:
    kwargs = FAMILIES[name].inputs()[1]
    return {k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()}


@functools.cache
def build(name: str) -> Callable[[], nn.Module]:
    return partial(bare, FAMILIES[name])


def blip(name: str) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
    return build(name), inputs_of(name)


def classifier() -> nn.Module:
    config = transformers.Wav2Vec2Config(
        **{**bare(FAMILIES["hf-wav2vec2"]).config.to_dict(), "num_labels": 3}
    )
    return seeded(lambda: transformers.Wav2Vec2ForSequenceClassification(config))


STEPS = {"max_new_tokens": 4, "do_sample": False}
# A model, and calls that have an output with a row for each sample.
CASES: dict[str, Callable[[], Any]] = {}


def case(make: Callable[[], Any]) -> None:
    CASES[make.__name__] = make


@case
def whisper_forward() -> Any:
    ids = LABELS
    return whisper, lambda m: m(input_features=spectra(), decoder_input_ids=ids).logits


@case
def whisper_positional() -> Any:
    return partial(whisper, "Model"), lambda m: m(spectra(), None, LABELS).last_hidden_state


@case
def whisper_labels() -> Any:
    return whisper, lambda m: m(input_features=spectra(), labels=LABELS).logits


@case
def whisper_classes() -> Any:
    labels = torch.tensor([0, 1])
    return partial(whisper, "ForAudioClassification"), lambda m: m(spectra(), labels=labels).logits


@case
def t5_forward() -> Any:
    return t5, lambda m: m(input_ids=IDS, attention_mask=MASK, labels=LABELS).logits


@case
def t5_generate() -> Any:
    return t5, lambda m: m.generate(IDS, attention_mask=MASK, **STEPS)


@case
def t5_beams() -> Any:
    return t5, lambda m: m.generate(input_ids=IDS, attention_mask=MASK, num_beams=2, **STEPS)


@case
def blip_vqa() -> Any:
    model, inputs = blip("hf-blip-vqa")
    return model, lambda m: m(**inputs).image_embeds


@case
def blip_vqa_generate() -> Any:
    model, inputs = blip("hf-blip-vqa")
    given = {name: inputs[name] for name in ("pixel_values", "input_ids")}
    return model, lambda m: m.generate(**given, **STEPS)


@case
def blip_caption_generate() -> Any:
    model, inputs = blip("hf-blip-caption")
    return model, lambda m: m.generate(pixel_values=inputs["pixel_values"], **STEPS)


@case
def hidden_states() -> Any:
    images = inputs_of("hf-vit")["pixel_values"]
    return build("hf-vit"), lambda m: m(images, output_hidden_states=True).hidden_states


@case
def feature_maps() -> Any:
    config = bare(FAMILIES["hf-dinov2"]).config.to_dict()
    config = transformers.Dinov2Config(**{**config, "out_indices": [1, 2], "out_features": None})
    images = inputs_of("hf-dinov2")["pixel_values"]
    make = partial(seeded, lambda: transformers.Dinov2Backbone(config))
    return make, lambda m: m(images).feature_maps


@case
def timm_maps() -> Any:
    images = FAMILIES["timm-vit"].inputs()[0][0].double()
    return build("timm-vit"), lambda m: m.forward_intermediates(images)[1]


@case
def padded_sounds() -> Any:
    mask = torch.ones(2, 2000, dtype=torch.long)
    mask[1, 1200:] = 0
    return classifier, lambda m: m(sounds(), attention_mask=mask).logits


@case
def torchaudio_layers() -> Any:
    lengths = torch.tensor([2000, 1200])
    return build("torchaudio-wav2vec2"), lambda m: m.extract_features(sounds(), lengths)


@pytest.mark.parametrize("name", CASES)
def test_rows_of_parallel_are_those_of_each_adapter(name: str) -> None:
    make, call = CASES[name]()
    # Above the first block, so that the blocks below could be run once for both.
    model = held(make, ("*.blocks.1",) if "whisper" not in name else ("*",))
    alone = {}
    with torch.no_grad():
        for adapter in "ab":
            with model.using(adapter):
                alone[adapter] = _listed(call(model))
        with model.using(Parallel("a", "b")):
            together = _listed(call(model))
        with model.using("a"):
            again = _listed(call(model))
    assert len(together) == len(alone["a"]) > 0
    assert all(map(torch.equal, again, alone["a"]))
    for both, a, b in zip(together, alone["a"], alone["b"], strict=True):
        assert both.shape[0] == 2 * a.shape[0]
        if a.dtype == torch.long and a.dim() == 2:  # Sequences that end at different steps.
            length = max(a.shape[1], b.shape[1])
            a, b = (nn.functional.pad(x, (0, length - x.shape[1])) for x in (a, b))
        torch.testing.assert_close(both, torch.cat([a, b]), rtol=1e-8, atol=1e-8)


def test_loss_is_the_mean_over_all_members() -> None:
    model = held(whisper, ("*",))

    def loss() -> Tensor:
        return model(input_features=spectra(), labels=LABELS).loss

    with torch.no_grad():
        with model.using("a"):
            a = loss()
        with model.using("b"):
            b = loss()
        with model.using(Parallel("a", "b")):
            torch.testing.assert_close(loss(), (a + b) / 2)


@pytest.mark.parametrize("name", ["encoder_outputs", "past_key_values"])
def test_states_of_another_call_are_refused(name: str) -> None:
    model = held(t5, ("*.blocks.1",))
    with (
        model.using(Parallel("a", "b")),
        torch.no_grad(),
        pytest.raises(ValueError, match=f"{name} come from another call"),
    ):
        model(input_ids=IDS, decoder_input_ids=LABELS, **{name: (torch.zeros(2, 4, 16),)})


def test_contrastive_loss_is_refused() -> None:
    model = adapted(bare(FAMILIES["hf-siglip"]))
    model.set_active_adapters(Parallel("a", "b"))
    with pytest.raises(ValueError, match="leave return_loss out"):
        model(**inputs_of("hf-siglip"), return_loss=True)


def test_libraries_read_the_signatures_of_the_methods() -> None:
    model = adapted(t5())
    before = inspect.signature(model.backbone.forward)
    with model.using(Parallel("a", "b")):
        assert inspect.signature(model.backbone.forward) == before
        assert "generate" in vars(model.backbone)
    backbone = model.detach()
    assert not {"generate", "forward"} & vars(backbone).keys()


def _listed(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [tensor for value in output for tensor in _listed(value)]


class Fallbacks(transformers.WhisperForConditionalGeneration):
    """A Whisper whose `generate` leaves out rows on the way, as it does in long recordings."""

    def generate(self, input_features: Tensor, **kwargs: Any) -> Tensor:
        return self.model.encoder(input_features[:-1]).last_hidden_state


@torch.no_grad()
def test_rows_that_a_library_leaves_out_on_the_way_are_refused() -> None:
    model = adapted(seeded(lambda: Fallbacks(whisper().config)))
    model.set_active_adapters(Parallel("a", "b"))
    with pytest.raises(ValueError, match="Parallel has 4 rows in this call and 3 of them reached"):
        model.generate(spectra())
    model.set_active_adapters("a")
    assert len(model.generate(spectra())) == 1
