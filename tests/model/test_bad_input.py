"""What a user may get wrong that no other file covers: one clear sentence, and nothing changed."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import transformers
from families import seeded
from families.vision import images
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mmadapters import (
    AdapterModel,
    Architecture,
    BitFitConfig,
    BottleneckConfig,
    IA3Config,
    LoRAConfig,
    PrefixConfig,
    PromptConfig,
    SSFConfig,
    Stack,
    SublayerSpec,
    TowerSpec,
    init,
)


def small_model() -> AdapterModel:
    """With an active adapter `lora`."""
    vit = seeded(
        lambda: VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    )
    model = init(vit)
    model.add_adapter("lora", LoRAConfig(rank=2))
    with torch.no_grad():
        for parameter in model.adapter("lora").parameters():
            parameter.add_(0.3)
    model.set_active_adapters("lora")
    return model


@pytest.fixture(scope="module")
def model() -> AdapterModel:
    return small_model()


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (5, "adapters are given by name, not as 5"),
        (2.5, "adapters are given by name"),
        (object, "adapters are given by name"),
        (("lora", 5), "Stack holds adapter names and compositions, not 5"),
        (["lora", None], "'base' is the encoder without adapters: Stack cannot hold it"),
        ([["lora"]], r"Stack holds adapter names and compositions, not \['lora'\]"),
        ((), "Stack needs at least one adapter"),
        ("", "no adapter is called ''"),
        (("lora", "lora"), "adapter 'lora' stands twice in one Stack"),
        (LoRAConfig(), "adapters are given by name"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("verb", ["set_active_adapters", "train_adapter"])
def test_setup_that_names_no_adapters_is_refused(
    verb: str, setup: Any, message: str, model: AdapterModel
) -> None:
    with torch.no_grad():
        before = model(images())
    with pytest.raises(ValueError, match=message) as caught:
        getattr(model, verb)(setup)
    assert "\n" not in str(caught.value)
    assert model.active_adapters == Stack("lora")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(images()), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stack(), "Stack needs at least one adapter"),
        (lambda: Stack(1), "Stack holds adapter names and compositions, not 1"),
        (lambda: Stack("a", ("b",)), r"Stack holds adapter names and compositions, not \('b',\)"),
        (lambda: Stack("a", Stack("b", "a")), "adapter 'a' stands twice in one Stack"),
    ],
    ids=["empty", "number", "tuple", "twice"],
)
def test_stack_of_anything_else_cannot_be_made(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("vison", "matches 'vison'; did you mean 'vision'"),
        ("vision.blocks.2", "matches 'vision.blocks.2'; did you mean 'vision.blocks"),
        ("vision.block.*", "matches 'vision.block.*'"),
        ("audio.*", "matches 'audio.*'; its towers are vision"),
        ("vision.blocks.0.mlp", "matches 'vision.blocks.0.mlp'; did you mean 'vision.blocks.0"),
        ("", "no site of VisionTransformer matches ''"),
    ],
)
@pytest.mark.parametrize(
    "cls",
    [BottleneckConfig, LoRAConfig, IA3Config, SSFConfig, BitFitConfig, PrefixConfig, PromptConfig],
)
def test_pattern_that_matches_no_site_is_refused(
    cls: type, pattern: str, message: str, model: AdapterModel
) -> None:
    with pytest.raises(ValueError) as caught:
        model.add_adapter("new", cls(sites=("*", pattern)))
    assert message in str(caught.value)
    assert model.adapter_names == ("lora",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRAConfig(sites=("vision.norm",)), "has no linear map 'q' under"),
        (lambda: IA3Config(sites=("*.ffn",)), "has no linear map 'k' under"),
        (lambda: BottleneckConfig(sites=("vision.norm",)), "has no attn or cross or ffn under"),
        (lambda: PrefixConfig(sites=("*.ffn",)), "has no attn under"),
        (lambda: PromptConfig(sites=("*.ffn",)), "no block of VisionTransformer lies under"),
        (lambda: SSFConfig(sites=("vision.blocks.0.attn.x*",)), "no site of VisionTransformer"),
    ],
    ids=["lora", "ia3", "bottleneck", "prefix", "prompt", "ssf"],
)
def test_sites_without_a_place_for_the_method_are_refused(
    make: Any, message: str, model: AdapterModel
) -> None:
    with pytest.raises(ValueError, match=message):
        model.add_adapter("new", make())
    assert model.adapter_names == ("lora",)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class UnknownEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Unknown() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def site_map(blocks: str = "layers", **options: Any) -> Architecture:
    ffn = {"output": "mlp", "residual": "norm", "leaves": {"up": "mlp"}, **options}
    tower = TowerSpec(name="text", blocks=blocks, sublayers={"ffn": SublayerSpec(**ffn)})
    return Architecture(towers=(tower,))


def test_a_wrapper_around_a_known_encoder_names_what_is_inside() -> None:
    wrapped = timm.create_model(
        "vit_tiny_patch16_224",
        features_only=True,
        out_indices=(0, 1),
        depth=2,
        embed_dim=32,
        num_heads=2,
    )
    with pytest.raises(ValueError, match=r"wrapper around VisionTransformer.* init\(encoder.model"):
        init(wrapped)
    init(wrapped.model)


def test_unknown_architecture_is_refused_with_the_way_out() -> None:
    encoder = UnknownEncoder()
    message = r"UnknownEncoder is not a known encoder; .* mmadapters.Architecture .* sites=\.\.\."
    with pytest.raises(ValueError, match=message) as caught:
        init(encoder)
    assert "\n" not in str(caught.value)
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    assert encoder.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": "blocks"}, "UnknownEncoder has no module 'blocks'"),
        ({"blocks": "stages.*.blocks"}, "no blocks at 'stages"),
        ({"output": "ffn"}, "Unknown has no module 'ffn'"),
        ({"residual": "norm1"}, "Unknown has no module 'norm1'"),
        ({"leaves": {"up": "mlp.fc1"}}, "has no module 'mlp.fc1'"),
        ({"leaves": {"up": "mlp.bias"}}, "ffn.up: 'bias' is not the weight of a linear map"),
        ({"leaves": {"up": "mlp[0/2"}}, r"'mlp\[0/2' is not a leaf"),
        ({"leaves": {}}, "give at least one of the leaves"),
        ({"kind": "mixer"}, "a sublayer's kind is 'attn', 'cross' or 'ffn', not 'mixer'"),
    ],
    ids=str,
)
def test_site_map_that_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    encoder = UnknownEncoder()
    with pytest.raises(ValueError, match=message) as caught:
        init(encoder, sites=site_map(**options))
    assert "\n" not in str(caught.value)
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_unknown_architecture_without_an_example_input_says_what_is_missing() -> None:
    model = init(UnknownEncoder(), sites=site_map())
    with pytest.raises(ValueError, match=r"pass example_inputs=\(tensor, \.\.\.\) to init"):
        model.add_adapter("a", BottleneckConfig(size=2))
    assert model.adapter_names == ()
    assert not any(module._forward_hooks for module in model.backbone.modules())


def test_what_is_no_module_is_refused() -> None:
    for wrong in (None, "timm/vit_small_patch16_224", 3):
        with pytest.raises(ValueError, match=r"init takes a torch\.nn\.Module, not "):
            init(wrong)  # type: ignore[arg-type]


def test_a_language_of_mms_says_what_it_is_taken_for() -> None:
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(16,),
        conv_kernel=(10,),
        conv_stride=(5,),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        do_stable_layer_norm=True,
        adapter_attn_dim=4,
        vocab_size=12,
    )
    model = init(transformers.Wav2Vec2ForCTC(config))
    with pytest.raises(FileNotFoundError, match=r"'eng' is taken for an adapter directory.*MMS"):
        model.load_adapter("eng")
    with pytest.raises(FileNotFoundError, match="no/such is not an adapter directory"):
        model.load_adapter("no/such")
