"""Where adapters go in text encoders and in BLIP."""

import pytest
import torch
import transformers
from families import Family, tensors
from families.blip import FAMILIES as BLIP
from families.blip import config as blip_config
from families.language import FAMILIES as LANGUAGE
from families.language import SMALL, VOCABULARY
from injection.checks import check_example, check_family

from mmadapters.sites.tables import describe

FAMILIES = [*LANGUAGE, *BLIP]
BLIP_SUBLAYERS = {
    "hf-blip-retrieval": {"vision": ["attn", "ffn"], "text": ["attn", "cross", "ffn"]},
    "hf-blip-vqa": {
        "vision": ["attn", "ffn"],
        "text": ["attn", "cross", "ffn"],
        "decoder": ["attn", "cross", "ffn"],
    },
    "hf-blip-caption": {"vision": ["attn", "ffn"], "decoder": ["attn", "cross", "ffn"]},
}
HEADS = [
    f"{kind}For{head}"
    for kind in ("Bert", "Roberta")
    for head in (
        "MaskedLM",
        "MultipleChoice",
        "QuestionAnswering",
        "SequenceClassification",
        "TokenClassification",
    )
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_sites_are_what_the_model_computes(family: Family) -> None:
    check_family(family)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_example_runs_in_training_mode(family: Family) -> None:
    model = family.build().train()
    args, kwargs = describe(model)[1](model)
    assert tensors(model(*args, **kwargs))


@pytest.mark.parametrize("family", BLIP, ids=lambda family: family.name)
def test_towers_of_blip(family: Family) -> None:
    sites, _ = describe(family.build())
    expected = BLIP_SUBLAYERS[family.name]
    assert list(sites.towers) == list(expected)
    for tower in sites.towers.values():
        assert all(list(block.sublayers) == expected[tower.name] for block in tower.blocks)


def test_what_the_question_sees_of_the_image_is_fusion_and_the_answer_is_decoder() -> None:
    family = next(family for family in BLIP if family.name == "hf-blip-vqa")
    names = describe(family.build())[0].names()
    crossed = [name for name in names if name.endswith(".cross")]
    assert crossed == [f"{tower}.blocks.{i}.cross" for tower in ("fusion", "decoder") for i in "01"]


def test_blip_that_only_compares_has_no_fusion() -> None:
    model = transformers.BlipModel(blip_config())
    sites, _ = describe(model)
    assert list(sites.towers) == ["vision", "text"]
    assert not any(sublayer.kind == "cross" for sublayer in sites.sublayers())
    check_example(model, BLIP[0])


@pytest.mark.parametrize("cls", HEADS)
def test_names_do_not_depend_on_the_head(cls: str) -> None:
    kind = cls.partition("For")[0]
    config = getattr(transformers, f"{kind}Config")(**SMALL)
    bare = getattr(transformers, f"{kind}Model")(config)
    model = getattr(transformers, cls)(config)
    sites, example = describe(model)
    assert sites.names() == describe(bare)[0].names()
    args, kwargs = example(model)
    assert tensors(model(*args, **kwargs))


@pytest.mark.parametrize("cls", ["T5Model", "T5ForConditionalGeneration"])
@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_of_t5_only_the_encoder_is_adapted(cls: str, feed_forward: str) -> None:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        feed_forward_proj=feed_forward,
        decoder_start_token_id=0,
    )
    model = getattr(transformers, cls)(config)
    sites, example = describe(model)
    assert list(sites.towers) == ["text"]
    assert ("gate" in sites.towers["text"].blocks[0].sublayers["ffn"].leaves) is (
        feed_forward == "gated-gelu"
    )
    args, kwargs = example(model)
    assert tensors(model(*args, **kwargs))


def test_prefixes_are_not_offered_where_positions_are_relative() -> None:
    config = transformers.BertConfig(**SMALL)
    # Of transformers 4.x; later versions know only absolute positions and ignore the setting.
    config.position_embedding_type = "relative_key"
    sites, _ = describe(transformers.BertModel(config))
    assert all(sublayer.attention is None for sublayer in sites.sublayers())


def test_vqa_loss_is_finite_on_the_example() -> None:
    family = next(family for family in BLIP if family.name == "hf-blip-vqa")
    model = family.build()
    args, kwargs = describe(model)[1](model)
    assert torch.isfinite(model(*args, **kwargs).loss)
