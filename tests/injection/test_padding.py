"""Padding changes nothing: a short sample gives beside a long one what it gives alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from families import Family, seeded, tensors
from families.small import randomise
from families.speech import SMALL
from families.speech_twins import to_torchaudio
from injection import selection
from injection.matrix import (
    FAMILIES,
    FOR_IMAGES,
    HAS_PROMPT,
    METHODS,
    ON_EMBEDDINGS,
    distance,
    refusal,
)
from torch import Tensor, nn

import mmadapters
from mmadapters import AdapterModel

TOLERANCE = 1e-4
# Lengths of the two samples of a batch, in tokens and in samples of sound.
TOKENS = (5, 8)
SAMPLES = (3300, 4800)
END, PAD = 63, 0

Inputs = tuple[tuple, dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """`inputs` of a batch of two, of which the first sample is padded, and of that sample alone.

    `read`: the outputs that say something of the sample; padded ones are cut to its length.
    """

    family: Family
    inputs: Callable[[], tuple[Inputs, Inputs]]
    read: Callable[[Any], Any] = lambda output: output

    def outputs(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """What the first sample gives padded, and what it gives alone."""
        beside, alone = (self._outputs(model, inputs) for inputs in self.inputs())
        return [_like(a, b) for a, b in zip(beside, alone, strict=True)], alone

    def _outputs(self, model: nn.Module, inputs: Inputs) -> list[Tensor]:
        args, kwargs = inputs
        with torch.no_grad():
            return tensors(self.read(model(*args, **kwargs)))


def _like(padded: Tensor, alone: Tensor) -> Tensor:
    return padded[tuple(slice(size) for size in alone.shape)]


def token_ids() -> Tensor:
    """(2, 8): the padding of the first text holds tokens, too, which only a mask can hide."""
    return torch.randint(8, 40, (2, TOKENS[1]), generator=torch.Generator().manual_seed(3))


def texts(*, end: int | None = None, **more: Tensor) -> tuple[Inputs, Inputs]:
    """Texts with their mask, and what else a model takes, one row a sample.

    `end`: the token that each text ends with, at which CLIP reads it.
    """
    ids = token_ids()
    if end is not None:
        ids[0, TOKENS[0] - 1] = ids[1, -1] = end
    mask = torch.ones_like(ids)
    mask[0, TOKENS[0] :] = 0
    alone = {name: value[:1] for name, value in more.items()}
    alone["input_ids"] = ids[:1, : TOKENS[0]]
    alone["attention_mask"] = mask[:1, : TOKENS[0]]
    return ((), {"input_ids": ids, "attention_mask": mask, **more}), ((), alone)


def ended_texts() -> tuple[Inputs, Inputs]:
    return texts(end=END)


def pictures() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def ended_texts_and_pictures() -> tuple[Inputs, Inputs]:
    return texts(end=END, pixel_values=pictures())


def texts_and_pictures() -> tuple[Inputs, Inputs]:
    return texts(pixel_values=pictures())


def question() -> tuple[Inputs, Inputs]:
    """The padded sample only, as what comes of a batch is one loss."""
    answers = token_ids()[:, :3]
    (args, padded), alone = texts(
        pixel_values=pictures(), decoder_input_ids=answers, labels=answers
    )
    return (args, {name: value[:1] for name, value in padded.items()}), alone


def padded_ids_and_pictures() -> tuple[Inputs, Inputs]:
    """For models that find the padding by the id of its token."""
    ids, images = token_ids(), pictures()
    ids[0, TOKENS[0] :] = PAD
    return ((images, ids), {}), ((images[:1], ids[:1, : TOKENS[0]]), {})


def waves() -> Tensor:
    """(2, 4800), with noise as padding."""
    return torch.randn(2, SAMPLES[1], generator=torch.Generator().manual_seed(5))


def masked_waves() -> tuple[Inputs, Inputs]:
    sound = waves()
    mask = torch.ones(2, SAMPLES[1], dtype=torch.long)
    mask[0, SAMPLES[0] :] = 0
    alone = sound[:1, : SAMPLES[0]]
    return ((sound,), {"attention_mask": mask}), ((alone,), {})


def waves_of_lengths() -> tuple[Inputs, Inputs]:
    sound = waves()
    alone = sound[:1, : SAMPLES[0]]
    return ((sound, torch.tensor(SAMPLES)), {}), ((alone, torch.tensor(SAMPLES[:1])), {})


def _layer_normed(kind: str) -> Callable[[], nn.Module]:
    """A speech encoder whose convolutions are normed frame by frame, unlike its family's."""

    def build() -> nn.Module:
        buckets = {"num_buckets": 8} if kind == "WavLM" else {}
        config = getattr(transformers, f"{kind}Config")(
            **SMALL, **buckets, feat_extract_norm="layer", conv_bias=True, layerdrop=0.0
        )
        return seeded(lambda: getattr(transformers, f"{kind}Model")(config))

    return build


def _speech(kind: str, libraries: tuple[str, ...] = ("hf", "torchaudio")) -> dict[str, Case]:
    """As it comes, and with its convolutions normed frame by frame."""
    build, cases = _layer_normed(kind), {}
    builds = {"hf": build, "torchaudio": lambda: to_torchaudio(build())}
    for library in libraries:
        family = FAMILIES[f"{library}-{kind.lower()}"]
        inputs = masked_waves if library == "hf" else waves_of_lengths
        cases[family.name] = Case(family, inputs)
        normed = dataclasses.replace(family, build=builds[library])
        cases[f"{family.name}-layer_normed"] = Case(normed, inputs)
    return cases


# All other text towers of open_clip take texts of one length alone.
CASES: dict[str, Case] = {
    **{name: Case(FAMILIES[name], texts) for name in ("hf-bert", "hf-roberta", "hf-t5")},
    "hf-clip": Case(FAMILIES["hf-clip"], ended_texts_and_pictures),
    "hf-clip-text": Case(FAMILIES["hf-clip-text"], ended_texts),
    "hf-clip-text-projected": Case(FAMILIES["hf-clip-text-projected"], ended_texts),
    # SigLIP's embedding of a text is that of its last token, padding or not.
    "hf-siglip": Case(
        FAMILIES["hf-siglip"],
        texts_and_pictures,
        lambda output: output.text_model_output.last_hidden_state,
    ),
    "hf-siglip-text": Case(
        FAMILIES["hf-siglip-text"], texts, lambda output: output.last_hidden_state
    ),
    "hf-blip-retrieval": Case(FAMILIES["hf-blip-retrieval"], texts_and_pictures),
    "hf-blip-vqa": Case(FAMILIES["hf-blip-vqa"], question),
    "hf-blip-caption": Case(FAMILIES["hf-blip-caption"], texts_and_pictures),
    "open_clip-bert": Case(FAMILIES["open_clip-bert"], padded_ids_and_pictures),
    **_speech("Wav2Vec2"),
    **_speech("Hubert"),
    # torchaudio's WavLM takes no lengths.
    **_speech("WavLM", ("hf",)),
    "hf-wav2vec2-stable": Case(FAMILIES["hf-wav2vec2-stable"], masked_waves),
    "torchaudio-wav2vec2-prenorm": Case(FAMILIES["torchaudio-wav2vec2-prenorm"], waves_of_lengths),
}
OVER_TIME = "the norm of its first convolution takes its mean over all of the time, padding too"
# Encoders that padding changes without any adapter.
NOT_INVARIANT: dict[str, str] = {
    "hf-wav2vec2": OVER_TIME,
    "hf-hubert": OVER_TIME,
    "hf-wavlm": OVER_TIME,
    "torchaudio-wav2vec2": OVER_TIME,
    "torchaudio-hubert": OVER_TIME,
    "hf-blip-vqa": "its decoder is given a mask of ones over the question, padding too",
}
EVERY_PAIR = [
    (name, method)
    for name, case in CASES.items()
    for method in METHODS
    # What goes into image towers has no padding, and an embedding no tokens.
    if method not in HAS_PROMPT | FOR_IMAGES | {"ladder"} | ON_EMBEDDINGS.keys()
    and name not in NOT_INVARIANT
    and refusal(case.family, method) is None
]
if selection.SCOPE == "cover":
    PAIRS = selection.cover(EVERY_PAIR, lambda pair: selection.facts(*pair))
else:
    PAIRS = EVERY_PAIR
each_pair = pytest.mark.parametrize(
    ("name", "method"), PAIRS, ids=[f"{name}-{method}" for name, method in PAIRS]
)


@functools.cache
def encoder(name: str) -> tuple[AdapterModel, list[Tensor]]:
    """A case's encoder, and what it gives for the first sample alone, without an adapter."""
    model = mmadapters.init(CASES[name].family.build())
    return model, CASES[name].outputs(model)[1]


@pytest.mark.parametrize("name", CASES)
def test_padding_changes_nothing_without_an_adapter_unless_listed(name: str) -> None:
    padded, alone = CASES[name].outputs(CASES[name].family.build())
    assert (distance(padded, alone) <= TOLERANCE) is (name not in NOT_INVARIANT)


@each_pair
def test_padding_changes_nothing_with_an_adapter(name: str, method: str) -> None:
    model, bare = encoder(name)
    model.add_adapter(method, METHODS[method])
    try:
        randomise(model.adapter(method), std=0.5)
        with model.using(method):
            padded, alone = CASES[name].outputs(model)
    finally:
        model.delete_adapter(method)
    assert distance(alone, bare) > 10 * TOLERANCE
    assert distance(padded, alone) <= TOLERANCE
