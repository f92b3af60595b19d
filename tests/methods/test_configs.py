"""What all configs have in common: their names, their plain data, their published sizes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mmadapters import (
    AdapterPlusConfig,
    AdaptFormerConfig,
    BitFitConfig,
    BottleneckConfig,
    CLIPAdapterConfig,
    CompacterConfig,
    ConfigUnion,
    ConformerAdapterConfig,
    ConvpassConfig,
    CrossModalConfig,
    DoRAConfig,
    DoubleSeqBnConfig,
    EAdapterConfig,
    FacTConfig,
    FrontEndAdapterConfig,
    GatedCrossAttentionConfig,
    IA3Config,
    LAdapterConfig,
    LadderConfig,
    LoRAConfig,
    MAMConfig,
    MethodConfig,
    MMAConfig,
    MMSAdapterConfig,
    MonaConfig,
    ParallelPlacement,
    ParBnConfig,
    PrefixConfig,
    PromptConfig,
    RepAdapterConfig,
    SeqBnConfig,
    SequentialPlacement,
    SSFConfig,
    UniAdapterConfig,
    UniPELTConfig,
)
from mmadapters.methods import METHODS, from_dict, method_named, to_dict
from mmadapters.sites.sitemap import SiteMap
from mmadapters.sites.tables import describe

CONFIGS: list[MethodConfig] = [
    BottleneckConfig(),
    BottleneckConfig(
        sites=("vision.blocks.1", "*.attn"),
        placement=ParallelPlacement(at=("attn", "ffn"), input="normed"),
        size=7,
        activation="silu",
        norm="before",
        scale=0.25,
        learn_scale="channel",
        dropout=0.1,
        drop_path=0.2,
    ),
    BottleneckConfig(
        placement=SequentialPlacement(at=("ffn",), residual="after"), reduction_factor=2.5
    ),
    DoubleSeqBnConfig(),
    SeqBnConfig(norm="after"),
    ParBnConfig(size=9),
    AdaptFormerConfig(reduction_factor=12),
    AdapterPlusConfig(),
    CLIPAdapterConfig(ratio=0.5, reduction_factor=2, towers=("vision", "text")),
    CompacterConfig(phm_dim=2, phm_rank=3),
    ConvpassConfig(size=4, scale=0.1, dropout=0.2, sites=("*.attn",)),
    MonaConfig(size=16, dropout=0.0),
    FacTConfig(rank=4, core=2, scale=10, targets=("q", "v")),
    RepAdapterConfig(size=6, groups=3, scale=0.5),
    LoRAConfig(rank=4, alpha=1.5, targets=("q", "up"), dropout=0.05, rslora=True),
    DoRAConfig(targets=("o",)),
    IA3Config(targets=("v",)),
    SSFConfig(sites=("vision.norm",)),
    BitFitConfig(),
    PrefixConfig(length=4, reparametrise=16),
    PromptConfig(length=5, deep=False),
    EAdapterConfig(size=4, sites=("audio.blocks.1",)),
    MMSAdapterConfig(size=8),
    ConformerAdapterConfig(
        placement=ParallelPlacement(at=("attn", "ffn"), input="normed"),
        size=7,
        kernel=5,
        dropout=0.1,
    ),
    LAdapterConfig(residual=False),
    LadderConfig(size=24, heads=3, mlp_ratio=2, every=2, temperature=0.5, dropout=0.1),
    FrontEndAdapterConfig(size=4, kernel=1, sites=("audio.front.[0-2]",)),
    UniAdapterConfig(size=6, scale=0.2, dropout=0.1, sites=("text", "vision.blocks.1")),
    MMAConfig(size=6, scale=0.01, lowest=2),
    CrossModalConfig(size=6, activation="silu", scale=0.5, dropout=0.1),
    GatedCrossAttentionConfig(size=12, heads=3, every=2, feed_forward=4, dropout=0.1),
    ConfigUnion(
        LoRAConfig(sites=("*.0",)),
        SeqBnConfig(placement=ParallelPlacement(at=("attn",))),
        SSFConfig(),
    ),
    MAMConfig(PrefixConfig(length=2), ParBnConfig(reduction_factor=4)),
    UniPELTConfig(PrefixConfig(), LoRAConfig(rank=2), AdaptFormerConfig()),
    UniPELTConfig(),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
def test_config_comes_back_whole_from_json(config: MethodConfig) -> None:
    back = from_dict(json.loads(json.dumps(to_dict(config))))
    assert back == config
    assert type(back) is type(config)
    assert hash(back) == hash(config)


def test_every_method_is_among_the_configs_that_come_back() -> None:
    assert {config.method for config in CONFIGS} == set(METHODS)


def test_data_alone_says_the_method_and_leaves_the_rest_to_defaults() -> None:
    assert from_dict({"method": "lora"}) == LoRAConfig()
    assert from_dict({"method": "adaptformer", "reduction_factor": 4}) == AdaptFormerConfig(
        reduction_factor=4
    )
    union = {"method": "union", "configs": [{"method": "ia3"}, {"method": "prefix", "length": 2}]}
    assert from_dict(union) == ConfigUnion(IA3Config(), PrefixConfig(length=2))


def test_reading_a_config_leaves_the_data_as_it_was() -> None:
    data = to_dict(ConfigUnion(ParBnConfig(), LoRAConfig()))
    before = json.dumps(data)
    from_dict(data)
    assert json.dumps(data) == before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"method": "loar"}, "no method is called 'loar'; did you mean 'lora'"),
        ({"method": "bottelneck"}, "did you mean 'bottleneck'"),
        ({}, "no method is called ''"),
        ({"method": None}, "no method is called"),
        ({"method": "gate"}, "no method is called 'gate'"),
        ({"method": "lora", "rnak": 8}, "LoRAConfig has no option 'rnak'; did you mean 'rank'"),
        (
            {"method": "seq_bn", "reduction": 4},
            "has no option 'reduction'; did you mean 'reduct",
        ),
        ({"method": "lora", "rank": "8"}, "rank must be a whole number"),
        ({"method": "lora", "targets": "q"}, r"targets=\('q',\)"),
        ({"method": "union", "configs": [{"method": "lora"}]}, "at least two methods"),
        (
            {"method": "union", "config": []},
            "ConfigUnion has no option 'config'; did you mean",
        ),
        ({"method": "union", "configs": "lora"}, "configs must be a list"),
        ({"method": "mam", "configs": [{"method": "lora"}] * 3}, "a MAMConfig takes"),
        ({"method": "bottleneck", "placement": {"kind": "around"}}, "placement.kind must be 'sequ"),
        ({"method": "bottleneck", "placement": "parallel"}, "placement must be"),
        (
            {"method": "bottleneck", "placement": {"kind": "parallel", "residual": "after"}},
            "ParallelPlacement has no option 'residual'",
        ),
        (
            {"method": "bottleneck", "placement": {"kind": "sequential", "residul": "after"}},
            "SequentialPlacement has no option 'residul'; did you mean 'residual'",
        ),
        ("lora", "a config must be a mapping, not 'lora'"),
        ([1], "a config must be a mapping"),
    ],
    ids=str,
)
def test_data_that_is_no_config_is_refused_in_one_sentence(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        from_dict(data)
    assert "\n" not in str(caught.value)


def test_each_method_is_found_under_its_own_name() -> None:
    for name, config in METHODS.items():
        assert method_named(name) is config
        assert config.method == name


@pytest.fixture(scope="module")
def vit_b() -> SiteMap:
    """ViT-B/16, whose weights do not matter."""
    vit = VisionTransformer(
        embed_dim=768, depth=12, num_heads=12, num_classes=0, weight_init="skip"
    )
    return describe(vit)[0]


def size(config: MethodConfig, sites: SiteMap) -> int:
    modules = nn.ModuleList(
        module for _, part in config.parts() for module in part.build(sites).values()
    )
    return sum(parameter.numel() for parameter in modules.parameters())


# Those with a comment are printed in the named source for twelve blocks of width 768; the others
# follow from the formulas of their papers.
PUBLISHED = [
    (DoubleSeqBnConfig(), 1_789_056),  # AdapterHub, "Overview of adapter methods": double_seq_bn
    (SeqBnConfig(), 894_528),  # seq_bn
    (ParBnConfig(), 7_091_712),  # par_bn
    (CompacterConfig(), 57_088),  # compacter
    (LoRAConfig(rank=8), 294_912),  # lora
    (IA3Config(), 55_296),  # ia3
    (DoubleSeqBnConfig(size=48), 24 * (2 * 768 * 48 + 48 + 768)),
    (AdaptFormerConfig(), 12 * (2 * 768 * 64 + 64 + 768)),
    (AdapterPlusConfig(), 12 * (2 * 768 * 8 + 8 + 768 + 768)),
    (LoRAConfig(rank=8, targets=("q", "v")), 12 * 2 * 2 * 768 * 8),
    (DoRAConfig(rank=8), 12 * 2 * (2 * 768 * 8 + 768)),
    (LoRAConfig(rank=4, targets=("up", "down")), 12 * 2 * 4 * (768 + 3072)),
    (SSFConfig(), 2 * (12 * (7 * 768 + 3072) + 768)),
    (BitFitConfig(), 12 * (6 * 768 + 3072) + 768),  # all but the biases of keys
    (ConvpassConfig(), 24 * (2 * 768 * 8 + 8 + 768 + 9 * 8 * 8 + 8)),  # 0.33 M, Jie and Deng
    (MonaConfig(), 24 * (4 * 768 + 2 * 768 * 64 + 64 + 768 + (9 + 25 + 49 + 64 + 4) * 64)),
    (RepAdapterConfig(), 24 * (768 * 8 + 8 + 768 * 4 + 768)),
    (FacTConfig(), 16 * (2 * 768 + 2 * 3072) + 12 * 6 * 16 * 16),
    (FacTConfig(core=16, targets=("q", "k", "v", "o")), 16 * 2 * 768 + 16**3 + 12 * 4 * 16),
    (PromptConfig(length=10), 12 * 10 * 768),
    (PromptConfig(length=10, deep=False), 10 * 768),
    (PrefixConfig(length=10), 12 * 2 * 10 * 768),
]


@pytest.mark.parametrize(("config", "count"), PUBLISHED, ids=str)
def test_parameters_on_vit_b_are_as_many_as_published(
    config: MethodConfig, count: int, vit_b: SiteMap
) -> None:
    assert size(config, vit_b) == count


def test_gates_of_unipelt_are_one_map_to_one_number_each(vit_b: SiteMap) -> None:
    parts = (PrefixConfig(), LoRAConfig(), SeqBnConfig())
    gates = 12 * (1 + 2 + 1) * (768 + 1)
    assert size(UniPELTConfig(*parts), vit_b) == gates + sum(size(part, vit_b) for part in parts)
