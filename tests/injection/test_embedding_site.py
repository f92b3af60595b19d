"""The embedding behind a tower as a place for adapters: several in one batch, drops, twins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import blip, seeded
from families.small import randomise
from families.twins import TWINS, Twin, assert_alike
from families.vision import images
from injection.matrix import FAMILIES, bare, distance
from torch import Tensor

import mmadapters
from mmadapters import (
    AdapterModel,
    Architecture,
    Average,
    BatchSplit,
    CLIPAdapterConfig,
    EmbeddingSpec,
    Fuse,
    LoRAConfig,
    Parallel,
    PromptConfig,
    Route,
    SeqBnConfig,
    Split,
    Stack,
    SublayerSpec,
    TowerSpec,
)

NAMES = ("hf-clip", "hf-siglip", "open_clip-clip", "open_clip-timm_tower", "open_clip-coca")
each_family = pytest.mark.parametrize("name", NAMES)


def holding(name: str) -> AdapterModel:
    """Two random CLIP-Adapters, `a` and `b`, and a bottleneck in the blocks, `blocks`."""
    torch.manual_seed(4)
    model = mmadapters.init(bare(FAMILIES[name]))
    model.add_adapter("a", CLIPAdapterConfig())
    model.add_adapter("b", CLIPAdapterConfig(ratio=0.7, reduction_factor=2))
    model.add_adapter("blocks", SeqBnConfig(size=4, sites=("vision",)))
    randomise(model.adapter("blocks"))
    return model


@torch.no_grad()
def embeddings(model: Any, pictures: Tensor) -> Tensor:
    """(B, E) of pictures, not of unit length."""
    if hasattr(model.backbone, "visual"):
        return model.encode_image(pictures, normalize=False)
    output = model.get_image_features(pixel_values=pictures)
    return output if isinstance(output, Tensor) else output.pooler_output


def pictures(name: str) -> Tensor:
    """Three different ones of the encoder's size."""
    size = 160 if name == "open_clip-timm_tower" else 32
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(8))


@each_family
def test_every_sample_gets_what_its_own_adapter_gives_alone(name: str) -> None:
    model, x = holding(name), pictures(name)
    members = ("b", Stack("blocks", "a"), "base")
    alone = []
    for member, row in zip(members, x.split(1), strict=True):
        with model.using(member):
            alone.append(embeddings(model, row))
    for setup in (Route(members), BatchSplit(*members, batch_sizes=(1, 1, 1))):
        with model.using(setup):
            assert distance([embeddings(model, x)], [torch.cat(alone)]) <= 1e-5
    assert distance([alone[0]], [alone[1]]) > 1e-2


@each_family
def test_a_stack_is_one_after_another_and_an_average_their_mean(name: str) -> None:
    model, x = holding(name), pictures(name)
    modules: dict[str, Any] = {
        key: dict(model.adapter(key).entries())["vision.embedding"] for key in "ab"
    }

    def formula(key: str, f: Tensor) -> Tensor:
        module = modules[key]
        hidden = (f @ module.down.weight.T).clamp(min=0)
        made = (hidden @ module.up.weight.T).clamp(min=0)
        return module.ratio * made + (1 - module.ratio) * f

    plain = embeddings(model, x)
    with torch.no_grad():
        chained = formula("b", formula("a", plain))
        mean = (formula("a", plain) + 3 * formula("b", plain)) / 4
    with model.using(Stack("a", "b")):
        assert distance([embeddings(model, x)], [chained]) <= 1e-5
    with model.using(Average("a", "b", weights=(1, 3))):
        assert distance([embeddings(model, x)], [mean]) <= 1e-5


@pytest.mark.parametrize("name", [name for name in NAMES if name != "open_clip-coca"])
def test_parallel_is_each_adapter_on_its_copy(name: str) -> None:
    model, x = holding(name), pictures(name)
    for members in (("a", "b"), ("blocks", "a", "base")):
        each = []
        for member in members:
            with model.using(None if member == "base" else member):
                each.append(embeddings(model, x))
        with model.using(Parallel(*members)):
            assert distance([embeddings(model, x)], [torch.cat(each)]) <= 1e-5


@each_family
def test_what_deals_out_tokens_is_refused_in_one_sentence(name: str) -> None:
    model = holding(name)
    with pytest.raises(ValueError, match=r"Split cannot hold 'a', a clip_adapter: at vision.emb"):
        model.set_active_adapters(Split("a", "b", splits=(2,)))
    with pytest.raises(ValueError, match=r"adapter 'a', a clip_adapter, cannot be fused"):
        model.add_adapter_fusion(["a", "blocks"])
    model.add_adapter("more", SeqBnConfig(size=3, sites=("vision",)))
    model.add_adapter_fusion(["blocks", "more"])
    model.set_active_adapters(Stack(Fuse("blocks", "more"), "a"))


@each_family
def test_adapter_drop_leaves_the_embedding_alone(name: str) -> None:
    model, x = holding(name), pictures(name)
    depth = len(model.sites.towers["vision"].blocks)
    with model.using("a"):
        expected = embeddings(model, x)
    with model.using(Stack("blocks", "a"), drop=depth):
        assert torch.equal(embeddings(model, x), expected)


def test_other_methods_do_not_reach_for_it() -> None:
    model = mmadapters.init(bare(FAMILIES["hf-clip"]))
    for number, config in enumerate((LoRAConfig(), SeqBnConfig(), PromptConfig(sites=("vision",)))):
        model.add_adapter(f"a{number}", config)
        assert not any(
            site.endswith("embedding") for site, _ in model.adapter(f"a{number}").entries()
        )


@pytest.mark.parametrize(
    "twin", [t for t in TWINS if t.source == "hf-clip"], ids=lambda twin: twin.target
)
def test_saved_adapter_gives_the_same_in_the_other_library(twin: Twin, tmp_path: Path) -> None:
    source, target = twin.pair()
    assert_alike(
        *(source, target, lambda m: [embeddings(m, images())], lambda m: [embeddings(m, images())]),
        tmp_path,
        CLIPAdapterConfig(),
        std=0.5,
    )


def test_blip_model_has_both_embeddings() -> None:
    model: Any = mmadapters.init(seeded(lambda: transformers.BlipModel(blip.config())))
    model.add_adapter("a", CLIPAdapterConfig(ratio=0.5, towers=("vision", "text")))
    assert [site for site, _ in model.adapter("a").entries()] == [
        "vision.embedding",
        "text.embedding",
    ]
    assert model.sites.towers["text"].embedding.width == 16
    plain = embeddings(model, images())
    with model.using("a"):
        assert distance([embeddings(model, images())], [plain]) > 1e-2


def test_a_described_tower_may_name_its_embedding() -> None:
    backbone = bare(FAMILIES["hf-clip-vision-projected"])
    prefix = "vision_model" if hasattr(backbone, "vision_model") else ""
    attn = SublayerSpec(
        output="self_attn", residual="layer_norm1", leaves={"o": "self_attn.out_proj"}
    )
    tower = TowerSpec(
        name="vision",
        blocks=f"{prefix}.encoder.layers",
        sublayers={"attn": attn},
        embedding=EmbeddingSpec(path="visual_projection", width=32),
    )
    model = mmadapters.init(
        backbone,
        sites=Architecture(towers=(tower,)),
        example_inputs={"pixel_values": images()},
    )
    model.add_adapter("a", CLIPAdapterConfig())
    assert "vision.embedding" in model.sites.names()
