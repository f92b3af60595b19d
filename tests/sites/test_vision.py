"""Where adapters go in vision transformers of timm and transformers."""

import pytest
import torch
import transformers
from families import Family
from families.vision import FAMILIES, TIMM
from injection.checks import check_complete, check_family, check_stream, record
from timm.models.eva import Eva
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ParallelThingsBlock,
    VisionTransformer,
)

from mmadapters.sites.tables import describe


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_sites_are_what_the_model_computes(family: Family) -> None:
    check_family(family)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_sites_are_those_of_any_vision_transformer(family: Family) -> None:
    names = set(describe(family.build())[0].names())
    plain = next(f for f in FAMILIES if f.name == "timm-vit")
    extra = names - set(describe(plain.build())[0].names())
    assert all(name.endswith(".ffn.gate") for name in extra)


def test_norm_on_the_branch_of_eva_is_found() -> None:
    try:
        model = Eva(**TIMM, use_rot_pos_emb=True, use_post_norm=True).eval()
    except TypeError:
        pytest.skip("this timm cannot build EVA blocks with the norm behind")
    sites, _ = describe(model)
    check_complete(sites)
    check_stream(sites, record(model, (torch.randn(2, 3, 32, 32),), {}))


@pytest.mark.parametrize("block", [ParallelScalingBlock, ParallelThingsBlock])
def test_parallel_blocks_are_refused_in_one_sentence(block: type) -> None:
    with pytest.raises(ValueError, match=f"are {block.__name__}s"):
        describe(VisionTransformer(**TIMM, block_fn=block))


def test_attention_by_matrix_products_offers_no_place_for_prefixes() -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    model = transformers.ViTModel._from_config(config, attn_implementation="eager")
    assert all(sublayer.attention is None for sublayer in describe(model)[0].sublayers())
